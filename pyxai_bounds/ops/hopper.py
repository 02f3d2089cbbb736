"""Convolutions of boxes of 16-bit numbers on the tensor cores of Hopper GPUs (compute capability 9.0), in CUDA C++.

One more candidate of the triton backend, which allocates, checks and measures; this file says which convolutions the
kernels of ``csrc/hopper`` take, and calls them. Nothing here may serve outward rounding: sums round to nearest, in any
order.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyxai_bounds.ops import native

DTYPES = (torch.float16, torch.bfloat16)
EPILOGUES = ("none", "relu", "relu_backward", "gate")  # of a product; positions are the numbers in hopper.h


def supports(t: Tensor) -> bool:
    """Whether the kernels were built, and run where ``t`` is on numbers as it has."""
    return t.is_cuda and t.dtype in DTYPES and not why_not(t.get_device())


def why_not_available() -> str:
    """Why no device here can run the kernels; empty if one can."""
    if not _is_built():
        return "not built: put nvcc 12.0 or newer on PATH and run `pip install .` in the source tree"
    if not torch.cuda.is_available():
        return "not available: PyTorch finds no CUDA device; see nvidia-smi"
    wrong = [why_not(index) for index in range(torch.cuda.device_count())]
    return "" if "" in wrong else f"not available: of cuda:0, {wrong[0]}"


@functools.cache
def why_not(index: int) -> str:
    """Why the kernels do not run on this CUDA device; empty if they do."""
    if not _is_built():
        return "they were not built"
    try:
        _module().hopper_check(index)
    except RuntimeError as error:
        return str(error)
    return ""


@functools.cache
def takes(
    source: tuple[int, ...],
    target: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    transposed: bool,
) -> bool:
    """Whether the kernels take a convolution of ``source`` [B, C, H, W] to ``target``, or its backward-data pass."""
    if groups != 1:
        return False
    try:
        _run(0, 0, 0, 0, transposed, _sizes(source, target), (*kernel, *stride, *padding, *dilation), *(0,) * 12)
    except RuntimeError:
        return False
    return True


def convolve_into(
    mid: Tensor,
    rad: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    out_mid: Tensor,
    out_rad: Tensor,
    epilogue: str = "none",
    bias: Tensor | None = None,
    bits: Tensor | None = None,
    out_bits: Tensor | None = None,
) -> None:
    """The convolution with weight [K, C, kh, kw] of a box that ``takes`` accepts, or its backward-data pass.

    Boxes and results are dense and channels-last. ``epilogue`` is a kind of ``triton.Epilogue``: "relu_backward" and
    "gate" read ``bits``, "relu" and "relu_backward" write ``out_bits``, packed in that order. Runs on the current
    stream and waits for nothing.
    """
    # Its own strides would not do: they are arbitrary in dimensions of size 1.
    weight = weight.contiguous(memory_format=torch.channels_last)
    of_output, of_input, of_tap = weight[0].numel(), 1, weight.shape[1]
    of_target, of_source = (of_input, of_output) if transposed else (of_output, of_input)
    scratch = weight.new_empty(2 * weight.numel())
    mid, rad = _aligned(mid), _aligned(rad)
    tensors = (mid, rad, weight, scratch, bias, bits, out_mid, out_rad, out_bits)
    if any(t is not None and t.device != mid.device for t in tensors):
        raise RuntimeError(f"A kernel on {mid.device} was given tensors of other devices.")
    addresses = [0 if t is None else t.data_ptr() for t in tensors]
    index, stream = _current(mid)
    sizes, geometry = _sizes(mid.shape, out_mid.shape), (*weight.shape[2:], *stride, *padding, *dilation)
    _run(
        index, stream, mid.dtype is torch.float16, EPILOGUES.index(epilogue), transposed, sizes, geometry,
        of_target, of_source, of_tap, *addresses,
    )  # fmt: skip


@functools.cache
def weight_parts(
    index: int,
    source: tuple[int, ...],
    target: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> int:
    """The number of partial sums that ``weight_gradient`` adds up on this device; 0 if the kernels do not take it."""
    if groups != 1:
        return 0
    parts = ctypes.c_int64()
    sizes, geometry = _sizes(source, target), (*kernel, *stride, *padding, *dilation)
    try:
        _module().hopper_convolve_weight(index, 0, 0, *sizes, *geometry, *(0,) * 6, ctypes.addressof(parts))
    except RuntimeError:
        return 0
    return parts.value


def weight_gradient(
    grad_mid: Tensor,
    grad_rad: Tensor,
    mid: Tensor,
    rad: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """The gradient of the convolution's weight, channels-last, where ``weight_parts`` says that the kernels take it.

    All tensors are dense and channels-last. Reproducible: parts are summed in their order. Runs on the current stream
    and waits for nothing.
    """
    tensors = [_aligned(t) for t in (grad_mid, grad_rad, mid, rad, weight)]
    if any(t.device != mid.device for t in tensors):
        raise RuntimeError(f"A kernel on {mid.device} was given tensors of other devices.")
    outputs, channels, *kernel = weight.shape
    index, stream = _current(mid)
    geometry = (*kernel, *stride, *padding, *dilation)
    parts = weight_parts(
        index, tuple(mid.shape), tuple(grad_mid.shape), tuple(kernel), tuple(stride), tuple(padding), tuple(dilation), 1
    )
    if not parts:
        raise RuntimeError(f"Hopper's kernels do not take the weight {list(weight.shape)} of {list(mid.shape)}.")
    out = torch.empty(parts, outputs, *kernel, channels, dtype=torch.float32, device=mid.device)
    _module().hopper_convolve_weight(
        index, stream, mid.dtype is torch.float16, *_sizes(mid.shape, grad_mid.shape), *geometry,
        *(t.data_ptr() for t in (*tensors, out)), 0,
    )  # fmt: skip
    summed = out[0] if parts == 1 else out.sum(0)
    return summed.to(weight.dtype).permute(0, 3, 1, 2)


def _is_built() -> bool:
    return hasattr(native._native, "hopper_check")


def _aligned(t: Tensor) -> Tensor:
    """The copy engine reads from multiples of 16 bytes; a view may begin elsewhere."""
    return t.clone() if t.data_ptr() % 16 else t


def _sizes(source: Sequence[int], target: Sequence[int]) -> tuple[int, ...]:
    return source[0], *source[2:], source[1], *target[2:], target[1]


def _run(
    index: int, stream: int, is_half: int, epilogue: int, transposed: bool, sizes: tuple, geometry: tuple, *rest: int
) -> None:
    _module().hopper_convolve(index, stream, is_half, epilogue, transposed, *sizes, *geometry, *rest)


def _module() -> Any:
    return native._native


def _current(t: Tensor) -> tuple[int, int]:
    """The index of the device of ``t``, and the stream that is current there."""
    return t.get_device(), torch.cuda.current_stream(t.device).cuda_stream
