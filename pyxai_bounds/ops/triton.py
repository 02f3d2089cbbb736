"""The fused interval operators as Triton kernels: on CUDA, and on the CPU in Triton's interpreter, for tests.

The functions are those of ``reference.py``. This file allocates, checks what a kernel could not survive, brings
tensors into the kernels' memory order, and chooses tile sizes by measurement. ``measured`` is what ``auto`` uses: the
same functions, but where cuBLAS or cuDNN was faster, it multiplies, and only the stages about the product are fused.
Nothing here may serve outward rounding: 32-bit operands may be rounded to tf32, and the order of sums is unknown.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyxai_bounds.ops import checks, hopper, reference
from pyxai_bounds.ops.checks import describe
from pyxai_bounds.ops.layout import dense_like, in_order_of, memory_format, order_of, state_size
from pyxai_bounds.ops.smooth import smooth

Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]  # stride, padding, dilation, groups

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HOPPER = "hopper"  # a candidate: the kernels of csrc/hopper
_FILLED = 256 * 64 * 132  # from so many results on, each multiprocessor has a tile of theirs
CAPABILITY = (8, 0)  # the oldest compute capability for which the tests compile the kernels


def available() -> bool:
    """Whether the kernels can run: on an NVIDIA GPU, or in the interpreter."""
    return not why_not_available()


def why_not_available() -> str:
    """What is wrong and how to mend it; empty if nothing is."""
    if not _is_installed():
        return "The triton backend is not available: triton is not installed; pip install triton (Linux, NVIDIA GPU)."
    if _interpreting():
        return ""
    if torch.version.cuda is None:
        return (
            "The triton backend is not available: this PyTorch is built without CUDA; install one with CUDA "
            "(https://pytorch.org), or set TRITON_INTERPRET=1 to test the kernels on the CPU, slowly."
        )
    if not torch.cuda.is_available():
        return "The triton backend is not available: PyTorch finds no CUDA device; see nvidia-smi."
    if not any(_is_capable(index) for index in range(torch.cuda.device_count())):
        return "The triton backend is not available: it needs a GPU of compute capability 8.0 (Ampere) or newer."
    return ""


def supports(mid: Tensor) -> bool:
    """Whether ``mid`` can run here. Asked at every call, so it looks no further than it must."""
    if mid.dtype not in DTYPES or not _is_installed():
        return False
    if _interpreting():
        return mid.device.type == "cpu"
    return mid.device.type == "cuda" and torch.version.cuda is not None and _is_capable(_index(mid))


def interval_gate(mid: Tensor, rad: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    mid, rad = in_order_of(gate, *checks.boxes(mid, rad))
    gate = checks.bits_of(gate, mid)
    out_mid, out_rad = dense_like(mid), dense_like(mid)
    if mid.numel():
        _kernels("interval_relu").gate_into(mid, rad, gate, out_mid, out_rad)
    return out_mid, out_rad


def interval_relu(mid: Tensor, rad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mid, rad = checks.boxes(mid, rad)
    out_mid, out_rad = dense_like(mid), dense_like(mid)
    state = torch.empty(state_size(mid), dtype=torch.uint8, device=mid.device)
    if mid.numel():
        _kernels("interval_relu").relu_into(mid, rad, out_mid, out_rad, state)
    return out_mid, out_rad, state


def interval_relu_backward(mid: Tensor, rad: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gate = torch.empty_like(state)
    return *_relu_backward(mid, rad, state, gate), gate


def interval_linear(
    mid: Tensor, rad: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, *, library: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    def check() -> _Problem:
        _check_weight(weight, mid, (weight.shape[0], mid.shape[-1]))
        _check_bias(bias, mid, weight.shape[0])
        key = ("linear", mid.shape, weight.shape, weight.stride(), bias is None, relu)
        return _Problem(key, (*mid.shape[:-1], weight.shape[0]), (mid, rad), library, weight.shape[1])

    problem = _known(("linear", relu, library), mid, (rad, weight, bias), check)
    mid, rad = problem.dense(mid, rad)
    epilogue = Epilogue("relu" if relu else "none")
    fused = relu and weight.shape[0] % 8 == 0  # or a byte of the state would belong to two rows

    def product(mid: Tensor, rad: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        return reference.interval_linear(mid, rad, weight, bias, False)[:2]

    def run(block: Any, mid: Tensor, rad: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        if block is None:
            return _by_library(product, epilogue, mid, rad, weight, bias, fused)
        out_mid, out_rad = _contiguous(mid, problem.size)
        state = epilogue.made(out_mid) if fused else None
        _kernels("interval_linear").box_product_into(
            _rows(mid), _rows(rad), weight, None if bias is None else bias.contiguous(),
            _rows(out_mid), _rows(out_rad), state, block, problem.tf32_matmul,
        )  # fmt: skip
        return _finish(epilogue, out_mid, out_rad) if state is None else (out_mid, out_rad, state)

    if problem.is_empty:
        return _finish(epilogue, *_contiguous(mid, problem.size))
    return _fastest(
        problem, (mid, rad, weight, bias), run, product, epilogue,
        lambda: _box_blocks(mid, weight.shape[0], weight.shape[1], problem.tf32_matmul),
    )  # fmt: skip


def interval_linear_backward(
    mid: Tensor, rad: Tensor, weight: Tensor, state: Tensor | None, *, library: bool = False
) -> tuple[Tensor, Tensor]:
    if state is not None:
        mid, rad = _relu_backward(mid, rad, state, None)

    def check() -> _Problem:
        _check_weight(weight, mid, (mid.shape[-1], weight.shape[1]))
        key = ("linear_backward", mid.shape, weight.shape, weight.stride())
        return _Problem(key, (*mid.shape[:-1], weight.shape[1]), (mid, rad), library, weight.shape[0])

    problem = _known(("linear_backward", library), mid, (rad, weight), check)
    mid, rad = problem.dense(mid, rad)

    def product(mid: Tensor, rad: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return reference.interval_linear_backward(mid, rad, weight, None)

    def run(block: Any, mid: Tensor, rad: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        if block is None:
            return product(mid, rad, weight)
        out_mid, out_rad = _contiguous(mid, problem.size)
        _kernels("interval_linear").box_product_into(
            _rows(mid), _rows(rad), weight.t(), None, _rows(out_mid), _rows(out_rad), None, block, problem.tf32_matmul
        )
        return out_mid, out_rad

    if problem.is_empty:
        return _contiguous(mid, problem.size)
    return _fastest(
        problem, (mid, rad, weight), run, product, Epilogue(),
        lambda: _box_blocks(mid, weight.shape[1], weight.shape[0], problem.tf32_matmul),
    )  # fmt: skip


def interval_linear_weight(
    grad_mid: Tensor, grad_rad: Tensor, mid: Tensor, rad: Tensor, weight: Tensor, *, library: bool = False
) -> Tensor:
    def check() -> _Problem:
        _check_weight(weight, mid, (grad_mid.shape[1], mid.shape[1]))
        _check_same(grad_mid, mid, (mid.shape[0], grad_mid.shape[1]))
        key = ("linear_weight", mid.shape, weight.shape, weight.stride())
        size = (mid.shape[0], *weight.shape)
        return _Problem(key, size, (grad_mid, grad_rad), library, mid.shape[0], (mid, rad))

    problem = _known(("linear_weight", library), grad_mid, (grad_rad, mid, rad, weight), check)
    grad_mid, grad_rad, mid, rad = problem.dense(grad_mid, grad_rad, mid, rad)

    def run(block: Any, *tensors: Tensor) -> Tensor:
        if block is None:
            return reference.interval_linear_weight(*tensors)
        return _kernels("interval_linear").weight_gradient(*tensors, block, problem.tf32_matmul)

    if problem.is_empty:
        return weight.new_zeros(weight.shape)
    return _fastest(
        problem, (grad_mid, grad_rad, mid, rad, weight), run, reference.interval_linear_weight, Epilogue(),
        lambda: _weight_blocks(mid, weight.shape[0], problem.tf32_matmul),
    )  # fmt: skip


def interval_conv2d(
    mid: Tensor,
    rad: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool,
    *,
    library: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    epilogue = Epilogue("relu" if relu else "none")
    return _convolve(mid, rad, weight, bias, _geometry(stride, padding, dilation, groups), epilogue, library)


def interval_conv2d_gate(
    mid: Tensor,
    rad: Tensor,
    weight: Tensor,
    gate: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    library: bool = False,
) -> tuple[Tensor, Tensor]:
    epilogue = Epilogue("gate", gate)
    return _convolve(mid, rad, weight, None, _geometry(stride, padding, dilation, groups), epilogue, library)[:2]


def interval_conv2d_backward(
    mid: Tensor,
    rad: Tensor,
    weight: Tensor,
    state: Tensor | None,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    library: bool = False,
) -> tuple[Tensor, Tensor]:
    if state is not None:
        mid, rad = _relu_backward(mid, rad, state, None)
    args = _geometry(stride, padding, dilation, groups)
    return _convolve_back(mid, rad, weight, input_size, args, Epilogue(), library)[:2]


def interval_conv2d_backward_relu(
    mid: Tensor,
    rad: Tensor,
    weight: Tensor,
    state: Tensor | None,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    library: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    epilogue = Epilogue() if state is None else Epilogue("relu_backward", state)
    args = _geometry(stride, padding, dilation, groups)
    return _convolve_back(mid, rad, weight, input_size, args, epilogue, library)


def interval_conv2d_weight(
    grad_mid: Tensor,
    grad_rad: Tensor,
    mid: Tensor,
    rad: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    library: bool = False,
) -> Tensor:
    args = _geometry(stride, padding, dilation, groups)

    def check() -> _Problem:
        outputs, _, *kernel = weight.shape
        _check_weight(weight, mid, (grad_mid.shape[1], mid.shape[1] // groups, *kernel))
        _check_same(grad_mid, mid, (mid.shape[0], outputs, *checks.output_size(mid.shape[2:], kernel, *args[:3])))
        orders = memory_format(mid), memory_format(grad_mid), weight.shape, memory_format(weight)
        size = (*weight.shape, mid.numel(), grad_mid.numel())
        key, summed = ("conv2d_weight", mid.shape, *orders, *args), grad_mid.numel() // max(1, outputs)
        return _Problem(key, size, (grad_mid, grad_rad), library, summed, (mid, rad))

    problem = _known(("conv2d_weight", args, library), grad_mid, (grad_rad, mid, rad, weight), check)
    grad_mid, grad_rad, mid, rad = problem.dense(grad_mid, grad_rad, mid, rad)
    tf32 = problem.tf32_convolution

    def product(grad_mid: Tensor, grad_rad: Tensor, mid: Tensor, rad: Tensor, weight: Tensor) -> Tensor:
        return reference.interval_conv2d_weight(grad_mid, grad_rad, mid, rad, weight, *args)

    def run(block: Any, *tensors: Tensor) -> Tensor:
        if block is None:
            return product(*tensors)
        kernels: Any = hopper if block is HOPPER else _convolution(block)
        rest = args[:3] if block is HOPPER else (*args, block, tf32)
        grad = kernels.weight_gradient(*_last(*tensors), *rest)
        return dense_like(weight).copy_(grad) if grad.stride() != dense_like(weight).stride() else grad

    def blocks() -> list[Any]:
        outputs, channels, *kernel = weight.shape
        found = _image_blocks("weight", mid.shape, weight, args, tf32)
        found += _weight_blocks(mid, outputs // groups, tf32, channels)
        if library and hopper.supports(mid):
            geometry = (tuple(mid.shape), tuple(grad_mid.shape), tuple(kernel), *args)
            found += [HOPPER] if hopper.weight_parts(mid.get_device(), *geometry) else []
        return found

    if problem.is_empty:
        return torch.zeros_like(weight, memory_format=memory_format(weight))
    return _fastest(problem, (grad_mid, grad_rad, mid, rad, weight), run, product, Epilogue(), blocks)


def interval_scale_shift(
    mid: Tensor,
    rad: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    scale_rad: Tensor | None = None,
    shift_rad: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if scale_rad is not None or shift_rad is not None:
        return reference.interval_scale_shift(mid, rad, scale, shift, scale_rad, shift_rad)
    mid, rad = checks.boxes(mid, rad)
    scale = checks.per_channel("scale", scale, mid)
    shift = None if shift is None else checks.per_channel("shift", shift, mid)
    out_mid, out_rad = dense_like(mid), dense_like(mid)
    if mid.numel():
        last = memory_format(mid) is torch.channels_last
        inner = 1 if last else mid.numel() // (mid.shape[0] * mid.shape[1])
        _kernels("interval_scale_shift").scale_shift_into(mid, rad, scale, shift, inner, out_mid, out_rad)
    return out_mid, out_rad


def interval_mul(a_mid: Tensor, a_rad: Tensor, b_mid: Tensor, b_rad: Tensor) -> tuple[Tensor, Tensor]:
    a_mid, a_rad, b_mid, b_rad = checks.boxes(a_mid, a_rad, b_mid, b_rad)
    out_mid, out_rad = dense_like(a_mid), dense_like(a_mid)
    if a_mid.numel():
        _kernels("interval_mul").mul_into(a_mid, a_rad, b_mid, b_rad, out_mid, out_rad)
    return out_mid, out_rad


def interval_smooth(mid: Tensor, rad: Tensor, name: str, params: Sequence[float]) -> tuple[Tensor, ...]:
    return _smooth("interval_smooth", (mid, rad), 2, name, params)


def interval_smooth_adjoint(*args: Any) -> tuple[Tensor, ...]:
    return _smooth("interval_smooth_adjoint", args[:-2], 2, *args[-2:])


def interval_smooth_backward(*args: Any) -> tuple[Tensor, ...]:
    return _smooth("interval_smooth_backward", args[:-2], 2, *args[-2:])


def interval_smooth_backward_adjoint(*args: Any) -> tuple[Tensor, ...]:
    return _smooth("interval_smooth_backward_adjoint", args[:-2], 4, *args[-2:])


def _smooth(
    op: str, tensors: tuple[Tensor, ...], results: int, name: str, params: Sequence[float]
) -> tuple[Tensor, ...]:
    """Run one of the four elementwise kernels. They have no exponential functions for float64: ``reference`` runs."""
    tensors = checks.boxes(*tensors)
    if tensors[0].dtype is torch.float64:
        return getattr(reference, op)(*tensors, name, params)
    out = tuple(dense_like(tensors[0]) for _ in range(results))
    if tensors[0].numel():
        _kernels("interval_smooth").launch(op, (*tensors, *out), name, params, smooth(name, params).critical)
    return out


def interval_max_pool2d(
    mid: Tensor,
    rad: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> tuple[Tensor, Tensor]:
    mid, rad = checks.boxes(mid, rad)
    size = torch.ops.aten.max_pool2d_with_indices(
        torch.empty(mid.shape, device="meta"), kernel, stride, padding, dilation, ceil_mode
    )[0].shape
    out_mid = torch.empty(size, dtype=mid.dtype, device=mid.device, memory_format=memory_format(mid))
    out_rad = torch.empty_like(out_mid)
    if out_mid.numel():
        geometry = (kernel, stride, padding, dilation)
        _kernels("interval_max_pool2d").max_pool_into(mid, rad, geometry, out_mid, out_rad)
    return out_mid, out_rad


def interval_first_maximum(
    mid: Tensor, rad: Tensor, size: Sequence[int], *geometry: Sequence[int]
) -> tuple[Tensor, Tensor]:
    mid, rad = checks.boxes(mid, rad)
    shape, order = (*mid.shape[:2], *size), memory_format(mid)
    must = torch.empty(shape, dtype=torch.int32, device=mid.device, memory_format=order)
    may = torch.empty_like(must)
    if must.numel():
        _kernels("interval_max_pool2d").first_maximum_into(mid, rad, geometry, must, may)
    return must, may


def interval_max_pool2d_backward(
    mid: Tensor, rad: Tensor, must: Tensor, may: Tensor, size: Sequence[int], *geometry: Sequence[int]
) -> tuple[Tensor, Tensor]:
    must, may, mid, rad = _of_windows(must, may, *checks.boxes(mid, rad))
    shape, order = (*mid.shape[:2], *size), memory_format(must)
    out_mid = torch.empty(shape, dtype=mid.dtype, device=mid.device, memory_format=order)
    out_rad = torch.empty_like(out_mid)
    if out_mid.numel():
        _kernels("interval_max_pool2d").max_pool_backward_into(mid, rad, must, may, geometry, out_mid, out_rad)
    return out_mid, out_rad


def interval_max_pool2d_gather(
    mid: Tensor,
    rad: Tensor,
    grad_mid: Tensor,
    grad_rad: Tensor,
    must: Tensor,
    may: Tensor,
    *geometry: Sequence[int],
) -> tuple[Tensor, Tensor]:
    must, may, grad_mid, grad_rad = _of_windows(must, may, *checks.boxes(grad_mid, grad_rad))
    mid, rad = (t.contiguous(memory_format=memory_format(must)) for t in checks.boxes(mid, rad))
    out_mid, out_rad = dense_like(grad_mid), dense_like(grad_mid)
    if grad_mid.numel():
        _kernels("interval_max_pool2d").max_pool_gather_into(
            mid, rad, grad_mid, grad_rad, must, may, geometry, out_mid, out_rad
        )
    return out_mid, out_rad


def _of_windows(must: Tensor, may: Tensor, *box: Tensor) -> tuple[Tensor, ...]:
    """The bits of windows and a box of one element per window, all in the memory order of the bits."""
    for bits in (must, may):
        if bits.shape != box[0].shape or bits.dtype is not torch.int32 or bits.device != box[0].device:
            raise ValueError(f"{describe(bits)} are not the bits of windows that {describe(box[0])} belongs to.")
    return tuple(t.contiguous(memory_format=memory_format(must)) for t in (must, may, *box))


_elementwise: tuple[Callable, ...] = (
    supports,
    interval_gate,
    interval_relu,
    interval_relu_backward,
    interval_scale_shift,
    interval_mul,
    interval_smooth,
    interval_smooth_adjoint,
    interval_smooth_backward,
    interval_smooth_backward_adjoint,
    interval_max_pool2d,
    interval_first_maximum,
    interval_max_pool2d_backward,
    interval_max_pool2d_gather,
)
_products: tuple[Callable, ...] = (
    interval_linear,
    interval_linear_backward,
    interval_linear_weight,
    interval_conv2d,
    interval_conv2d_gate,
    interval_conv2d_backward,
    interval_conv2d_backward_relu,
    interval_conv2d_weight,
)
measured = SimpleNamespace(
    **{f.__name__: f for f in _elementwise},
    **{f.__name__: functools.partial(f, library=True) for f in _products},
)


# --- products and their epilogues ---------------------------------------------------------------------------


class Epilogue(NamedTuple):
    """What is applied to the results of a product.

    ``kind``: one of ``hopper.EPILOGUES``. "none"; "relu", which makes the packed state; "relu_backward", which reads a
    state and makes the gate that it applied; "gate", which reads a gate. Bits have the memory order of the results.
    """

    kind: str = "none"
    bits: Tensor | None = None  # that are read

    @property
    def dims(self) -> int:
        """The number of dimensions of the bits that are read, which tells their memory order; 0 if there are none."""
        return 0 if self.bits is None else self.bits.dim()

    def order(self, mid: Tensor) -> torch.memory_format:
        """The memory order of the results: that of the bits that are read, else of the box."""
        return memory_format(mid) if self.bits is None else order_of(self.bits)

    def made(self, out: Tensor, size: tuple[int, ...] | None = None) -> Tensor:
        """Room for the bits that it makes, if any; ``size`` is ``state_size(out)``, if the caller knows it."""
        makes = self.kind in ("relu", "relu_backward")
        return torch.empty((size or state_size(out)) if makes else 0, dtype=torch.uint8, device=out.device)


def _convolve(
    mid: Tensor,
    rad: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    args: Geometry,
    epilogue: Epilogue,
    library: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    groups = args[3]
    outputs, channels, *kernel = weight.shape

    def check() -> _Problem:
        _check_weight(weight, mid, (outputs, mid.shape[1] // groups, *kernel))
        _check_bias(bias, mid, outputs)
        order = epilogue.order(mid)
        size = (mid.shape[0], outputs, *checks.output_size(mid.shape[2:], kernel, *args[:3]))
        key = ("conv2d", mid.shape, memory_format(mid), weight.shape, *args, bias is None, epilogue.kind, order)
        return _Problem(key, size, (mid, rad), library, weight.numel() // max(1, outputs), order=order)

    problem = _known(("conv2d", args, epilogue.kind, epilogue.dims, library), mid, (rad, weight, bias), check)
    mid, rad = problem.dense(mid, rad)
    order, size, tf32 = problem.order, problem.size, problem.tf32_convolution
    if problem.is_empty:
        out_mid = torch.empty(size, dtype=mid.dtype, device=mid.device, memory_format=order)
        return _finish(epilogue, out_mid, torch.empty_like(out_mid))

    def product(mid: Tensor, rad: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        return reference.interval_conv2d(mid, rad, weight, bias, *args, False)[:2]

    def run(block: Any, mid: Tensor, rad: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        if block is None:
            in_rows = epilogue.kind == "relu" and order is torch.channels_last and outputs % 8 == 0
            return _by_library(product, epilogue, mid, rad, weight, bias, in_rows)
        if block is HOPPER:
            return _hopper(problem, epilogue, mid, rad, weight, bias, args, False)
        return _in_one_kernel(
            problem, epilogue, mid, outputs // groups,
            lambda *results: _convolution(block).forward_into(
                *_last(mid, rad, weight), None if bias is None else bias.contiguous(), *args, *results, block, tf32
            ),
        )  # fmt: skip

    def blocks() -> list[Any]:
        found = _image_blocks("forward", mid.shape, weight, args, tf32)
        # Where there are kernels for whole images, only the first of those that gather a pixel's taps one by one.
        found += _box_blocks(mid, outputs // groups, channels, tf32, groups)[: 1 if found else None]
        return _with_hopper(found, mid, size, kernel, args, False, library)

    return _fastest(problem, (mid, rad, weight, bias), run, product, epilogue, blocks)


def _convolve_back(
    mid: Tensor,
    rad: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    args: Geometry,
    epilogue: Epilogue,
    library: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    groups, size = args[3], tuple(input_size)
    outputs, channels, *kernel = weight.shape

    def check() -> _Problem:
        _check_weight(weight, mid, (mid.shape[1], size[1] // groups, *kernel))
        _check_same(mid, mid, (size[0], outputs, *checks.output_size(size[2:], kernel, *args[:3])))
        order = epilogue.order(mid)
        key = ("conv2d_backward", mid.shape, memory_format(mid), weight.shape, size, *args, epilogue.kind, order)
        return _Problem(key, size, (mid, rad), library, weight.numel() // max(1, size[1]), order=order)

    problem = _known(("conv2d_backward", size, args, epilogue.kind, epilogue.dims, library), mid, (rad, weight), check)
    mid, rad = problem.dense(mid, rad)
    tf32 = problem.tf32_convolution
    if problem.is_empty or mid.numel() == 0:
        out_mid = torch.empty(size, dtype=mid.dtype, device=mid.device, memory_format=problem.order).zero_()
        return _finish(epilogue, out_mid, torch.zeros_like(out_mid))

    def product(mid: Tensor, rad: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return reference.interval_conv2d_backward(mid, rad, weight, None, size, *args)

    def run(block: Any, mid: Tensor, rad: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        if block is None:
            return _finish(epilogue, *product(mid, rad, weight))
        if block is HOPPER:
            return _hopper(problem, epilogue, mid, rad, weight, None, args, True)
        return _in_one_kernel(
            problem, epilogue, mid, channels,
            lambda *results: _convolution(block).backward_into(
                *_last(mid, rad, weight), *args, *results, block, tf32
            ),
        )  # fmt: skip

    def blocks() -> list[Any]:
        found = _image_blocks("backward", size, weight, args, tf32)
        found += _box_blocks(mid, channels, outputs // groups, tf32)
        return _with_hopper(found, mid, size, kernel, args, True, library)

    return _fastest(problem, (mid, rad, weight), run, product, epilogue, blocks)


def _with_hopper(
    blocks: list[Any], mid: Tensor, size: Sequence[int], kernel: Sequence[int], args: Geometry, back: bool, auto: bool
) -> list[Any]:
    """The candidates with those of csrc/hopper added, where they take the problem; alone where Triton never wins."""
    if not (auto and hopper.supports(mid)):
        return blocks
    geometry = (tuple(mid.shape), tuple(size), tuple(kernel), *args, back)
    if not hopper.takes(*geometry):
        return blocks
    return [HOPPER] if math.prod(size) >= _FILLED else [*blocks, HOPPER]


def _hopper(
    problem: _Problem,
    epilogue: Epilogue,
    mid: Tensor,
    rad: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    args: Geometry,
    back: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    *box, last_weight = _last(mid, rad, weight)
    bias = None if bias is None else bias.contiguous()

    def launch(out_mid: Tensor, out_rad: Tensor, kind: str, bits: Tensor | None, made: Tensor | None) -> None:
        hopper.convolve_into(box[0], box[1], last_weight, *args[:3], back, out_mid, out_rad, kind, bias, bits, made)

    return _in_one_kernel(problem, epilogue, mid, problem.size[1], launch)  # ``mid`` says which memory order is wanted


def _in_one_kernel(
    problem: _Problem, epilogue: Epilogue, mid: Tensor, channels: int, launch: Callable[..., None]
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a kernel that writes images channels-last, ``channels`` of them by each of its programs.

    ``launch`` takes midpoints and radii to write, the kind of epilogue, bits to read and bits to make. The epilogue is
    a kernel of its own where bits have another memory order, or where a byte of them would belong to two programs.
    """
    order = problem.order
    out_mid = torch.empty_strided(problem.size, problem.stride, dtype=mid.dtype, device=mid.device)
    out_rad = torch.empty_like(out_mid)
    if epilogue.kind != "none" and channels % 8 == 0 and problem.state:
        bits = None if epilogue.bits is None else checks.bits_of(epilogue.bits, out_mid, problem.state)
        made = epilogue.made(out_mid, problem.state)
        launch(out_mid, out_rad, epilogue.kind, bits, made)
        return out_mid, out_rad, made
    launch(out_mid, out_rad, "none", None, None)
    return _finish(epilogue, out_mid.contiguous(memory_format=order), out_rad.contiguous(memory_format=order))


def _by_library(
    product: Callable[..., tuple[Tensor, Tensor]],
    epilogue: Epilogue,
    mid: Tensor,
    rad: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_rows: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The library's product, then the epilogue as a kernel of its own.

    ``in_rows``: ReLU's kernel can add the bias (see ``_finish``) and does, on the way. cuDNN takes a pass for it, and
    cuBLAS a slower product, which does not split the sum.
    """
    first, later = (None, bias) if in_rows else (bias, None)
    return _finish(epilogue, *product(mid, rad, weight, first), later)


def _finish(epilogue: Epilogue, mid: Tensor, rad: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The epilogue as a kernel of its own, which overwrites the box.

    ``bias``, if given, is added before ReLU: one value for each column, or channel of channels-last images, of which
    there is a multiple of 8.
    """
    if epilogue.bits is not None:
        mid, rad = in_order_of(epilogue.bits, mid, rad)
    made = epilogue.made(mid)
    bits = None if epilogue.bits is None else checks.bits_of(epilogue.bits, mid)
    if mid.numel():
        kernels = _kernels("interval_relu")
        if epilogue.kind == "relu":
            kernels.relu_into(mid, rad, mid, rad, made, None if bias is None else bias.contiguous())
        elif epilogue.kind == "relu_backward":
            kernels.relu_backward_into(mid, rad, bits, mid, rad, made)
        elif epilogue.kind == "gate":
            kernels.gate_into(mid, rad, bits, mid, rad)
    return mid, rad, made


def _plainly(epilogue: Epilogue, mid: Tensor, rad: Tensor) -> tuple[Tensor, ...]:
    """``_finish`` in plain PyTorch."""
    if epilogue.kind == "relu":
        return reference.interval_relu(mid, rad)
    if epilogue.bits is None:
        return mid, rad
    apply: Any = reference.interval_gate if epilogue.kind == "gate" else reference.interval_relu_backward
    return apply(mid, rad, epilogue.bits)


def _relu_backward(mid: Tensor, rad: Tensor, state: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    mid, rad = in_order_of(state, *checks.boxes(mid, rad))
    state = checks.bits_of(state, mid)
    out_mid, out_rad = dense_like(mid), dense_like(mid)
    if mid.numel():
        _kernels("interval_relu").relu_backward_into(mid, rad, state, out_mid, out_rad, gate)
    return out_mid, out_rad


# --- choices ------------------------------------------------------------------------------------------------


_UNKNOWN: Any = object()


class _Problem:
    """What can be known of a product from shapes, strides, dtypes and options alone. Its arguments have been checked.

    ``size``: of the results; for a weight's gradient also of what is summed, so that a 0 in it means nothing to do.
    ``box``, ``other``: midpoints and radii. ``library``: is cuBLAS or cuDNN, with fused stages about it, a candidate?
    ``summed``: the most products that a result is the sum of. ``order``: the memory order of the results.
    """

    def __init__(
        self,
        key: tuple,
        size: tuple[int, ...],
        box: tuple[Tensor, Tensor],
        library: bool,
        summed: int,
        other: tuple[Tensor, Tensor] | None = None,
        order: torch.memory_format = torch.contiguous_format,
    ) -> None:
        boxes = (box,) if other is None else (box, other)
        mid = box[0]
        self.are_dense = all(t is dense for box in boxes for t, dense in zip(box, checks.boxes(*box), strict=True))
        self.tf32_matmul, self.tf32_convolution = tf32 = _tf32(mid)
        self.key = (*key, mid.dtype, mid.device, tf32, library)  # the tuner's key
        self.size, self.library, self.summed, self.order = size, library, summed, order
        self.is_empty = math.prod(size) == 0
        self.choice = _UNKNOWN
        # The strides of results that a kernel writes channels-last, and the size of their bits if these are packed so.
        last = _empty_last(size, order) if len(size) == 4 else torch.empty(0, device="meta")
        self.stride = last.stride()
        self.state = state_size(last) if last.is_contiguous(memory_format=order) else ()

    def dense(self, *boxes: Tensor) -> tuple[Tensor, ...]:
        """The boxes, each dense in the order of its midpoint."""
        if self.are_dense:
            return boxes
        return tuple(t for place in range(0, len(boxes), 2) for t in checks.boxes(*boxes[place : place + 2]))


_problems: dict[tuple, _Problem] = {}
_MOST_PROBLEMS = 2**14


def _known(call: tuple, mid: Tensor, others: Sequence[Tensor | None], check: Callable[[], _Problem]) -> _Problem:
    """The problem of a call, kept for further calls like it: checks and lists of candidates take longer than a launch.

    ``call`` holds all that the problem depends on besides the tensors, of which only shapes, strides, dtypes and
    devices matter.
    """
    key = (call, _tf32(mid), *[t if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in (mid, *others)])
    problem = _problems.get(key)
    if problem is None:
        if len(_problems) >= _MOST_PROBLEMS:
            _problems.clear()
        problem = _problems[key] = check()
    return problem


def _fastest(
    problem: _Problem,
    tensors: tuple[Any, ...],
    run: Callable[..., Any],
    product: Callable[..., Any],
    epilogue: Epilogue,
    blocks: Callable[[], list[Any]],
) -> Any:
    """Run on ``tensors`` with the block that was fastest for this problem; the block None stands for the library.

    ``product``: the library's product, before the epilogue. Candidates are compared with it and with plain PyTorch.
    """
    with _kernels("launch").on_device(tensors[0]):
        if problem.choice is not _UNKNOWN:
            return run(problem.choice, *tensors)
        tuning = _kernels("tuning")
        trial = tuning.Trial(run, lambda: _whole_numbers(problem.summed, tensors, product, epilogue))

        def tried(block: Any) -> Any:
            trial(block)
            return run(block, *tensors)

        choice = tuning.fastest(problem.key, [*blocks(), None] if problem.library else blocks(), tried)
        problem.choice = tuning.choices().get(problem.key, _UNKNOWN)  # unknown still, if it was taken without measuring
        return run(choice, *tensors)


SUMMED = 64  # the mean number of nonzero products in a sum of a trial, so that bfloat16 holds the largest sums exactly


def _whole_numbers(summed: int, tensors: Sequence[Any], product: Callable[..., Any], epilogue: Epilogue) -> Any:
    """Arguments of −1, 0 and 1 for a trial, with the layout of ``tensors``, and their results."""
    generator = torch.Generator(tensors[0].device).manual_seed(0)
    share = min(1.0, math.sqrt(SUMMED / max(1, summed)))  # of factors that are not 0

    def positive(like: Tensor, share: float) -> Tensor:
        return torch.empty_like(like).bernoulli_(share, generator=generator)

    def signed(like: Tensor, share: float) -> Tensor:
        return positive(like, share / 2).sub_(positive(like, share / 2))

    # Fewer radii than midpoints are nonzero, so that some boxes contain 0 and some do not.
    given: list[Any] = [signed(tensors[0], share), positive(tensors[1], share / 8)]
    if len(tensors) == 5:  # a weight's gradient, of which only the signs of the weight count
        scaled = list(given)
        given += [signed(tensors[2], share), positive(tensors[3], share / 8), signed(tensors[4], 1.0)]
    else:
        biases = [b if b is None else signed(b, 1.0) for b in tensors[3:]]
        scaled = [*given, *(b for b in biases if b is not None)]
        given += [signed(tensors[2], share), *biases]
    results = product(*given)
    results = results if isinstance(results, tuple) else (results,)
    is_exact = all(torch.equal(t, t.round()) for t in results)
    results = [t.round_() for t in results]
    if len(results) == 2:
        results = _plainly(epilogue, *results)
    scaled += [t for t in results if t.is_floating_point()]  # linear in these arguments as long as no sign changes
    return _kernels("tuning").Given(given, results, scaled, is_exact)


def _box_blocks(mid: Tensor, columns: int, summed: int, tf32: bool, groups: int | None = None) -> list[Any]:
    """Candidates for a product. ``groups``: of a convolution, which may sum over few channels."""
    launch = _kernels("launch")
    if groups is not None and launch.is_flat(summed):
        return launch.few_channels_blocks(mid.dtype, columns, groups, tf32, _is_hopper(mid))
    return launch.box_blocks(mid.dtype, columns, summed, tf32, _is_hopper(mid))


def _image_blocks(op: str, size: Sequence[int], weight: Tensor, args: tuple, tf32: bool) -> list[Any]:
    return _kernels("interval_conv2d_image").image_blocks(op, size, weight, *args, tf32)


def _convolution(block: Any) -> ModuleType:
    """The file of kernels that a candidate belongs to."""
    return _kernels("interval_conv2d_image" if block.image else "interval_conv2d")


def _weight_blocks(mid: Tensor, rows: int, tf32: bool, channels: int | None = None) -> list[Any]:
    launch = _kernels("launch")
    flat = channels is not None and launch.is_flat(channels)
    return launch.weight_blocks(mid.dtype, rows, flat, tf32, _is_hopper(mid), linear=channels is None)


def _tf32(t: Tensor) -> tuple[bool, bool]:
    """May 32-bit operands of matrix products, and of convolutions, be rounded to tf32? As PyTorch is told."""
    if t.dtype is not torch.float32:
        return False, False
    backends: Any = torch.backends
    return backends.cuda.matmul.fp32_precision == "tf32", backends.cudnn.conv.fp32_precision == "tf32"


# --- the machine --------------------------------------------------------------------------------------------


@functools.cache
def _kernels(name: str) -> ModuleType:
    """One file of the kernels; importing it imports triton."""
    return importlib.import_module(f"pyxai_bounds.kernels.{name}")


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _interpreting() -> bool:
    """Do kernels run in Triton's interpreter? That is decided when triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def _is_capable(index: int) -> bool:
    return _capability(index) >= CAPABILITY


def _is_hopper(t: Tensor) -> bool:
    return not t.is_cuda or _capability(_index(t)) >= (9, 0)


def _index(t: Tensor) -> int:
    return t.get_device()


# --- allocation, memory order and checks --------------------------------------------------------------------


def _empty_last(size: Sequence[int], order: torch.memory_format) -> Tensor:
    """A meta tensor with the strides of channels-last; with one channel or one pixel, any order is channels-last."""
    order = order if size[1] == 1 or size[2] * size[3] == 1 else torch.channels_last
    return torch.empty(size, device="meta", memory_format=order)


def _contiguous(like: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Room for a box."""
    out_mid = like.new_empty(size)
    return out_mid, torch.empty_like(out_mid)


def _last(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.contiguous(memory_format=torch.channels_last) for t in tensors)


def _rows(t: Tensor) -> Tensor:
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def _geometry(stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int) -> Geometry:
    return tuple(stride), tuple(padding), tuple(dilation), groups


def _check_weight(weight: Tensor, mid: Tensor, shape: tuple[int, ...]) -> None:
    if weight.shape != shape or weight.dtype is not mid.dtype or weight.device != mid.device:
        raise ValueError(
            f"The box {describe(mid)} needs a weight of shape {list(shape)} of its dtype on its device, "
            f"not {describe(weight)}."
        )


def _check_bias(bias: Tensor | None, mid: Tensor, outputs: int) -> None:
    if bias is not None and (bias.shape != (outputs,) or bias.dtype is not mid.dtype or bias.device != mid.device):
        raise ValueError(
            f"A bias for {describe(mid)} is one value for each of {outputs} outputs, not {describe(bias)}."
        )


def _check_same(t: Tensor, like: Tensor, shape: tuple[int, ...]) -> None:
    if t.shape != shape or t.dtype is not like.dtype or t.device != like.device:
        raise ValueError(f"{describe(t)} does not fit {describe(like)}: it must have the shape {list(shape)}.")
