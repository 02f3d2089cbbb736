"""Compiles the Triton kernels for sm_80 and sm_90 without a GPU, and prints what the compiler used, as JSON lines.

``python -m tests.kernels.compile_kernels [--all]`` in a process of its own, without TRITON_INTERPRET: what Triton's
decorator makes of a function is decided when it is imported. ``--all`` takes every candidate block for every type
(minutes); without it each kernel, type and architecture is seen at least once.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from pyxai_bounds.kernels import (
    interval_conv2d,
    interval_conv2d_image,
    interval_linear,
    interval_max_pool2d,
    interval_mul,
    interval_relu,
    interval_scale_shift,
    interval_smooth,
)
from pyxai_bounds.kernels.launch import Block, box_blocks, few_channels_blocks, weight_blocks

DTYPES = {
    "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32,
    "fp64": torch.float64,
}  # fmt: skip


NUMBERS = ("p0", "v0", "p1", "v1", "a", "b", "c")  # arguments of kernels that are no integers


def gemm_variants() -> dict[str, tuple[Any, dict[str, Any], list[str], list[str]]]:
    """Name → kernel, its flags, its integers that are 1 and those that are known to be multiples of 16."""
    linear = interval_linear.interval_linear_kernel
    linear_weight = interval_linear.interval_linear_weight_kernel
    forward = interval_conv2d.interval_conv2d_fwd_kernel
    backward = interval_conv2d.interval_conv2d_bwd_kernel
    weight = interval_conv2d.interval_conv2d_weight_kernel
    channels = ["C", "OC", "CG", "OG"]
    even = {"EVEN": True}
    conv = even | {"WIDE": False}
    plain = even | {"HAS_BIAS": False, "EPILOGUE": "none"}
    return {
        "linear": (
            linear,
            plain | {"HAS_BIAS": True, "EPILOGUE": "relu"},
            ["weight_stride_k"],
            ["N", "K", "weight_stride_n"],
        ),
        "linear_backward": (linear, plain, ["weight_stride_n"], ["N", "K", "weight_stride_k"]),
        "linear_weight": (linear_weight, {}, ["weight_stride_k"], ["N", "K", "weight_stride_n"]),
        "conv2d": (forward, conv | {"HAS_BIAS": True, "EPILOGUE": "relu", "FLAT": False}, [], channels),
        "conv2d_linear": (forward, conv | {"HAS_BIAS": False, "EPILOGUE": "none", "FLAT": False}, [], channels),
        "conv2d_few": (
            forward,
            conv | {"HAS_BIAS": True, "EPILOGUE": "relu", "FLAT": False},
            [],
            channels,
        ),  # of 16 channels
        "conv2d_flat": (forward, conv | {"HAS_BIAS": True, "EPILOGUE": "relu", "FLAT": True}, [], ["OC", "OG"]),
        "conv2d_gate": (forward, conv | {"HAS_BIAS": False, "EPILOGUE": "gate", "FLAT": False}, [], channels),
        "conv2d_gate_flat": (forward, conv | {"HAS_BIAS": False, "EPILOGUE": "gate", "FLAT": True}, [], ["OC", "OG"]),
        "conv2d_backward": (backward, conv | {"EPILOGUE": "none"}, [], channels),
        "conv2d_backward_relu": (backward, conv | {"EPILOGUE": "relu_backward"}, [], channels),
        "conv2d_backward_narrow": (backward, conv | {"EPILOGUE": "none"}, [], ["OC", "OG"]),  # to 3 channels
        "conv2d_weight": (weight, conv | {"FLAT": False}, [], channels),
        "conv2d_weight_flat": (weight, conv | {"FLAT": True, "EVEN": False}, [], ["OC", "OG"]),
        # Integers that are 1 are constants to the compiler: one output of one input, and one channel to a group.
        "linear_of_one": (linear, plain | {"HAS_BIAS": True}, ["N", "K", "weight_stride_n", "weight_stride_k"], []),
        "conv2d_depthwise_flat": (
            forward,
            conv | {"HAS_BIAS": True, "EPILOGUE": "none", "FLAT": True},
            ["CG", "OG"],
            ["C", "OC"],
        ),
        **{f"conv2d_image_{op}": (kernel, {}, [], []) for op, kernel in image_kernels().items()},
        "conv2d_image_forward_7x7": (image_kernels()["forward"], {}, [], []),
        "conv2d_weight_depthwise_flat": (weight, conv | {"FLAT": True, "EVEN": False}, ["CG", "OG"], ["C", "OC"]),
    }


def image_kernels() -> dict[str, Any]:
    return {
        "forward": interval_conv2d_image.interval_conv2d_image_fwd_kernel,
        "backward": interval_conv2d_image.interval_conv2d_image_bwd_kernel,
        "weight": interval_conv2d_image.interval_conv2d_image_weight_kernel,
    }


IMAGE = ([1, 1], [1, 1], [1, 1])  # stride, padding, dilation of the layer that they are compiled for


def image_variant(variant: str, dtype: str) -> tuple[str, torch.Tensor]:
    """What is done, and the weight that it is compiled for."""
    op, _, size = variant.removeprefix("conv2d_image_").partition("_")
    return op, torch.empty(64, 3, *(int(side) for side in (size or "3x3").split("x")), dtype=DTYPES[dtype])


def image_flags(variant: str, dtype: str, block: Block) -> dict[str, Any]:
    """Constants of a kernel at images of 32 × 32."""
    (op, tensor), (stride, padding, dilation) = image_variant(variant, dtype), IMAGE
    weight = tensor.shape
    if op == "backward":
        return interval_conv2d_image.strip_sizes(weight, (32, 32), (32, 32), stride, padding, dilation, block)
    sizes = interval_conv2d_image.window_sizes(weight, DTYPES[dtype], (32, 32), stride, dilation)
    if op == "weight":
        return sizes
    return sizes | {"HAS_BIAS": True, "EPILOGUE": "relu", "BLOCK_K": max(block.k, sizes["SPAN"])}


def smooth(kernel: str, *names: str) -> dict[str, tuple[Any, dict[str, Any]]]:
    flags = {"CRITICAL": 2, "GROUPS": interval_smooth.GROUPS}
    return {
        f"{kernel}_{name}": (getattr(interval_smooth, f"{kernel}_kernel"), flags | {"NAME": name}) for name in names
    }


def elementwise_kernels() -> dict[str, tuple[Any, dict[str, Any]]]:
    return {
        "relu": (interval_relu.interval_relu_fwd_kernel, {}),
        "relu_backward": (interval_relu.interval_relu_bwd_kernel, {"WRITE_GATE": True}),
        "gate": (interval_relu.interval_gate_kernel, {}),
        "scale_shift": (interval_scale_shift.interval_scale_shift_kernel, {"HAS_SHIFT": True}),
        "mul": (interval_mul.interval_mul_kernel, {}),
        # The adjoint of a product contains all the others; one function shows that these compile by themselves.
        **smooth(
            "interval_smooth_backward_adjoint", "tanh", "gelu", "gelu_tanh_slope", "silu_slope", "softplus", "elu"
        ),
        **smooth("interval_smooth", "gelu"),
        **smooth("interval_smooth_backward", "gelu_slope"),
        **smooth("interval_smooth_adjoint", "gelu_slope"),
        "max_pool2d": (interval_max_pool2d.interval_max_pool2d_fwd_kernel, {"BLOCK": 512}),
        "first_maximum": (interval_max_pool2d.first_maximum_kernel, {"BLOCK": 512}),
        "max_pool2d_backward": (interval_max_pool2d.interval_max_pool2d_bwd_kernel, {"BLOCK": 512}),
        "max_pool2d_gather": (interval_max_pool2d.interval_max_pool2d_gather_kernel, {"BLOCK": 512}),
    }


def blocks_of(variant: str, dtype: str, capability: int) -> list[Block]:
    flat, tf32, hopper = variant.endswith("flat"), dtype == "tf32", capability >= 90
    if "image" in variant:
        op, weight = image_variant(variant, dtype)
        return interval_conv2d_image.image_blocks(op, (512, 3, 32, 32), weight, *IMAGE, 1, tf32)
    if "weight" in variant:
        return weight_blocks(DTYPES[dtype], 512, flat, tf32, hopper, linear=variant.startswith("linear"))
    columns = 3 if variant.endswith("narrow") else 512
    if flat:
        return [block for block in few_channels_blocks(DTYPES[dtype], columns, 1, tf32, hopper) if block.flat]
    return box_blocks(DTYPES[dtype], columns, 16 if variant.endswith("few") else 512, tf32, hopper)


def compile_one(
    kernel: Any, flags: dict[str, Any], dtype: str, capability: int, ones: list[str], sixteens: list[str], options: dict
) -> dict[str, Any]:
    pointer = "*" + dtype.replace("tf32", "fp32")
    signature: dict[str, str] = {}
    attributes: dict[tuple[int], list] = {}
    constants = flags | {name: 1 for name in ones}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            bits = {"state": "*u8", "gate": "*u8", "bits": "*u8", "made": "*u8", "must": "*i32", "may": "*i32"}
            signature[name] = next((kind for word, kind in bits.items() if word in name), pointer)
        else:
            signature[name] = "fp32" if name in NUMBERS else "i32"
        if signature[name] != "constexpr" and (name.endswith("_ptr") or name in sixteens):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = compiled.asm["ptx"]
    return {
        "shared": compiled.metadata.shared,
        **resources(compiled.asm["cubin"], ptx, capability),
        "wgmma": ptx.count("wgmma.mma_async"),
        "mma": ptx.count("mma.sync"),
        "fma": len(re.findall(r"\bfma\.", ptx)),
        "wide loads": len(re.findall(r"cp\.async\.cg|ld\.global[.\w:]*\.v[48]\.b32|ld\.global[.\w:]*\.v2\.b64", ptx)),
    }


def resources(cubin: bytes, ptx: str, capability: int) -> dict[str, int]:
    """Registers per thread, and bytes of registers that spilled."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(cubin)
        usage = _output([knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(binary)])
        spilled = 0
        if _number(r"STACK:(\d+)", usage):  # a stack need not hold spilled registers: the assembler knows
            text = Path(folder) / "kernel.ptx"
            text.write_text(ptx)
            arch = f"sm_{capability}" + ("a" if capability == 90 else "")  # as Triton does, for wgmma
            command = [get_ptxas(capability).path, "-v", f"--gpu-name={arch}", str(text), "-o", str(binary)]
            spilled = _number(r"(\d+) bytes spill stores", _output(command))
        return {"registers": _number(r"REG:(\d+)", usage), "spilled": spilled}


def _output(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return result.stdout + result.stderr


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, f"no {pattern} in {text}"
    return int(found[1])


def chosen(everything: bool) -> Iterator[tuple[str, str, int, Block]]:
    """What is compiled: variant, type, architecture, block."""
    for variant in gemm_variants():
        for dtype in DTYPES:
            for capability in (80, 90):
                both = dtype in ("bf16", "fp32")
                for index, block in enumerate(blocks_of(variant, dtype, capability)):
                    first = index == 0 and (both or capability == 90)
                    if everything or first or (dtype == "bf16" and capability == 90):
                        yield variant, dtype, capability, block


def main() -> None:
    variants = gemm_variants()
    for variant, dtype, capability, block in chosen("--all" in sys.argv):
        kernel, flags, ones, sixteens = variants[variant]
        flags = flags | {
            "BLOCK_M": block.m, "BLOCK_N": block.n, "BLOCK_K": block.k, "WIDEN": False,
            "PRECISION": "tf32" if dtype == "tf32" else "ieee",
            "COMPUTE": tl.float64 if dtype == "fp64" else tl.float32,
        }  # fmt: skip
        if "image" in variant:
            flags |= image_flags(variant, dtype, block)
            flags = {name: value for name, value in flags.items() if name in kernel.arg_names}
        options = {"num_warps": block.warps, "num_stages": block.stages, "enable_fp_fusion": True}
        found = compile_one(kernel, flags, dtype, capability, ones, sixteens, options)
        print(json.dumps({"kernel": variant, "dtype": dtype, "sm": capability, "block": block, **found}), flush=True)
    for name, (kernel, flags) in elementwise_kernels().items():
        for dtype, capability in (("fp32", 80), ("bf16", 90), ("fp16", 90), ("fp64", 90)):
            flags = flags | {"WIDE": False, "COMPUTE": tl.float64 if dtype == "fp64" else tl.float32}
            flags = flags if "BLOCK" in flags else {"GROUPS": 256} | flags
            if "NAME" in flags:
                if dtype == "fp64":
                    continue  # the reference's
                del flags["COMPUTE"]
            found = compile_one(kernel, flags, dtype, capability, [], [], {"enable_fp_fusion": False})
            print(json.dumps({"kernel": name, "dtype": dtype, "sm": capability, "block": None, **found}), flush=True)


if __name__ == "__main__":
    assert "TRITON_INTERPRET" not in os.environ, "the interpreter compiles nothing"
    main()
