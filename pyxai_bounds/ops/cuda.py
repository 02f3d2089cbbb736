"""The operators that round outward as CUDA C++ kernels, and the exact product of two boxes: float32 and float64.

Triton has no directed rounding, and cuDNN and cuBLAS say nothing of the order of their sums; here both are known, so
that bounds are proved in ``csrc/cuda`` and depend on no library. What is not here (rounding to nearest,
``semantics="float32"``) is ``reference``'s. This file allocates, checks what a kernel could not survive, and hands over
addresses and the current stream. Nothing waits for the device, so that all of it can be captured in a CUDA graph.

``auto`` chooses them for proofs. An H200 has run them: bit by bit what the emulation of the tests computes.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor

from pyxai_bounds.ops import checks, native, reference
from pyxai_bounds.ops.checks import describe
from pyxai_bounds.ops.layout import dense_like, in_order_of, memory_format, state_size
from pyxai_bounds.rounding import Rounding, gamma, scalar_up

DTYPES = (torch.float32, torch.float64)


def available() -> bool:
    """Whether the kernels were built and a GPU can run them."""
    return not why_not_available()


def why_not_available() -> str:
    """What is wrong and how to mend it; empty if nothing is."""
    if native._native is None:
        return f"The cuda backend is not available: {native._failure}. Run `pip install .` in the source tree."
    if not hasattr(native._native, "cuda_check"):
        return (
            "The cuda backend is not available: pyxai_bounds was built without it. Put nvcc 11.8 or newer on PATH and "
            "run `pip install . -C cmake.define.PYXAI_BOUNDS_CUDA=ON` in the source tree, which says what it lacks."
        )
    if torch.version.cuda is None:
        return (
            "The cuda backend is not available: this PyTorch is built without CUDA; install one with CUDA "
            "(https://pytorch.org)."
        )
    if not torch.cuda.is_available():
        return "The cuda backend is not available: PyTorch finds no CUDA device; see nvidia-smi."
    wrong = [_what_is_wrong(index) for index in range(torch.cuda.device_count())]
    return "" if "" in wrong else f"The cuda backend is not available: CUDA says {wrong[0]!r} of its kernels."


def supports(mid: Tensor) -> bool:
    """Whether ``mid`` can run here. Asked at every call, so it looks no further than it must."""
    built = hasattr(native._native, "cuda_check")
    return built and mid.is_cuda and mid.dtype in DTYPES and not _what_is_wrong(mid.get_device())


def interval_relu(mid: Tensor, rad: Tensor, rounding: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    if rounding == Rounding.NEAREST:
        return reference.interval_relu(mid, rad)
    mid, rad = checks.boxes(mid, rad)
    return _relu_into(mid, rad, dense_like(mid), dense_like(mid))


def interval_relu_backward(mid: Tensor, rad: Tensor, state: Tensor, rounding: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    if rounding == Rounding.NEAREST:
        return reference.interval_relu_backward(mid, rad, state)
    gate = torch.empty_like(state)
    return *_relu_backward(mid, rad, state, gate), gate


def interval_linear(
    mid: Tensor, rad: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, rounding: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    if rounding != Rounding.OUTWARD:
        return reference.interval_linear(mid, rad, weight, bias, relu, rounding)
    mid, rad = checks.boxes(mid, rad)
    _check_weight(weight, mid, (weight.shape[0], mid.shape[-1]))
    out = mid.new_empty(*mid.shape[:-1], weight.shape[0])
    return _maybe_relu(*_linear(mid, rad, weight, bias, out), relu)


def interval_linear_backward(
    mid: Tensor, rad: Tensor, weight: Tensor, state: Tensor | None, rounding: int = 0
) -> tuple[Tensor, Tensor]:
    if rounding != Rounding.OUTWARD:
        return reference.interval_linear_backward(mid, rad, weight, state, rounding)
    mid, rad = checks.boxes(mid, rad) if state is None else _relu_backward(mid, rad, state, None)
    _check_weight(weight, mid, (mid.shape[-1], weight.shape[1]))
    return _linear(mid, rad, weight.t(), None, mid.new_empty(*mid.shape[:-1], weight.shape[1]))


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
    rounding: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    args = (stride, padding, dilation, groups)
    if rounding != Rounding.OUTWARD:
        return reference.interval_conv2d(mid, rad, weight, bias, *args, relu, rounding)
    mid, rad = checks.boxes(mid, rad)
    _check_weight(weight, mid, (weight.shape[0], mid.shape[1] // groups, *weight.shape[2:]), groups)
    size = checks.output_size(mid.shape[2:], weight.shape[2:], stride, padding, dilation)
    by_tap = weight.permute(2, 3, 1, 0).contiguous()  # kh, kw, C / groups, K: neighbouring outputs side by side
    out = _convolve(mid, rad, by_tap, bias, (mid.shape[0], weight.shape[0], *size), *args, False)
    return _maybe_relu(*out, relu)


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
    rounding: int = 0,
) -> tuple[Tensor, Tensor]:
    args = (stride, padding, dilation, groups)
    if rounding != Rounding.OUTWARD:
        return reference.interval_conv2d_backward(mid, rad, weight, state, input_size, *args, rounding)
    mid, rad = checks.boxes(mid, rad) if state is None else _relu_backward(mid, rad, state, None)
    _check_weight(weight, mid, (mid.shape[1], input_size[1] // groups, *weight.shape[2:]), groups)
    by_tap = weight.permute(2, 3, 0, 1).contiguous()  # kh, kw, K, C / groups
    return _convolve(mid, rad, by_tap, None, input_size, *args, True)


def interval_scale_shift(
    mid: Tensor,
    rad: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    scale_rad: Tensor | None = None,
    shift_rad: Tensor | None = None,
    rounding: int = 0,
) -> tuple[Tensor, Tensor]:
    if rounding != Rounding.OUTWARD:
        return reference.interval_scale_shift(mid, rad, scale, shift, scale_rad, shift_rad, rounding)
    mid, rad = checks.boxes(mid, rad)
    named = {"scale": scale, "shift": shift, "scale_rad": scale_rad, "shift_rad": shift_rad}
    factors = [None if t is None else checks.per_channel(name, t, mid) for name, t in named.items()]
    channels_last = memory_format(mid) is torch.channels_last or mid.numel() == 0
    inner = 1 if channels_last else mid.numel() // (mid.shape[0] * mid.shape[1])
    out_mid, out_rad = dense_like(mid), dense_like(mid)
    _run("scale_shift", mid, mid.numel(), mid.shape[1], inner, mid, rad, *factors, out_mid, out_rad)
    return out_mid, out_rad


def interval_mul(
    a_mid: Tensor, a_rad: Tensor, b_mid: Tensor, b_rad: Tensor, rounding: int = 0
) -> tuple[Tensor, Tensor]:
    if rounding != Rounding.OUTWARD:
        return reference.interval_mul(a_mid, a_rad, b_mid, b_rad, rounding)
    a_mid, a_rad, b_mid, b_rad = checks.boxes(a_mid, a_rad, b_mid, b_rad)
    out_mid, out_rad = dense_like(a_mid), dense_like(a_mid)
    _run("mul", a_mid, a_mid.numel(), a_mid, a_rad, b_mid, b_rad, out_mid, out_rad)
    return out_mid, out_rad


def interval_matmul(a_mid: Tensor, a_rad: Tensor, b_mid: Tensor, b_rad: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    reference.check_matmul(a_mid, a_rad, b_mid, b_rad)
    if not exact:
        return reference.interval_matmul(a_mid, a_rad, b_mid, b_rad, False)
    box = [t.contiguous() for t in (a_mid, a_rad, b_mid, b_rad)]
    out_mid = a_mid.new_empty(*a_mid.shape[:-1], b_mid.shape[-1])
    out_rad = torch.empty_like(out_mid)
    _run("matmul", a_mid, *checks.matmul_sizes(a_mid, b_mid), *box, out_mid, out_rad)
    return out_mid, out_rad


def interval_matmul_backward(
    mid_grad: Tensor, rad_grad: Tensor, a_mid: Tensor, a_rad: Tensor, b_mid: Tensor, b_rad: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    reference.check_matmul(a_mid, a_rad, b_mid, b_rad)
    sizes = checks.matmul_sizes(a_mid, b_mid)
    grads = [_alike(t, a_mid).expand(*a_mid.shape[:-1], sizes[3]).contiguous() for t in (mid_grad, rad_grad)]
    box = [t.contiguous() for t in (a_mid, a_rad, b_mid, b_rad)]
    a_grad, a_rad_grad, b_grad, b_rad_grad = out = tuple(torch.empty_like(t) for t in box)
    _run("matmul_backward", a_mid, *sizes, *grads, *box, *out)
    return a_grad, a_rad_grad, b_grad, b_rad_grad


# --- what operators share ------------------------------------------------------------------------------------


def _linear(mid: Tensor, rad: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> tuple[Tensor, Tensor]:
    """x ↦ x·Wᵀ + b, a convolution of images of one pixel; ``weight`` [M, N] may be a transposed one."""
    mid, rad = mid.contiguous(), rad.contiguous()
    weight = weight if weight.t().is_contiguous() else weight.contiguous()
    sizes = (out.numel() // max(1, weight.shape[0]), 1, 1, 1, mid.shape[-1], 1, 1, weight.shape[0])
    strides = (0, 0, weight.stride(1), weight.stride(0))
    out_rad = torch.empty_like(out)
    _run_convolve(mid, rad, weight, bias, out, out_rad, False, sizes, (1, 1, 1, 1, 0, 0, 1, 1), strides)
    return out, out_rad


def _convolve(
    mid: Tensor,
    rad: Tensor,
    by_tap: Tensor,
    bias: Tensor | None,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    transposed: bool,
) -> tuple[Tensor, Tensor]:
    """A convolution or its backward-data pass to ``size`` [B, C, H, W]; ``by_tap`` [kh, kw, summed, C / groups].

    Forward, ``by_tap`` holds all outputs in its last dimension; backward, all that is summed in its last but one.
    The kernel reads and writes channels-last images; the results have the memory order of ``mid``.
    """
    order = memory_format(mid)
    sources, targets = mid.shape[1] // groups, size[1] // groups
    mid, rad = (t.contiguous(memory_format=torch.channels_last) for t in (mid, rad))
    out_mid = torch.empty(tuple(size), dtype=mid.dtype, device=mid.device, memory_format=torch.channels_last)
    out_rad = torch.empty_like(out_mid)
    columns = by_tap.shape[3]
    at_group = sources * columns if transposed else targets
    _run_convolve(
        mid, rad, by_tap, bias, out_mid, out_rad, transposed,
        (mid.shape[0], groups, *mid.shape[2:], sources, *size[2:], targets),
        (*by_tap.shape[:2], *stride, *padding, *dilation),
        (at_group, by_tap.shape[2] * columns, columns, 1),
    )  # fmt: skip
    return out_mid.contiguous(memory_format=order), out_rad.contiguous(memory_format=order)


def _run_convolve(
    mid: Tensor,
    rad: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_mid: Tensor,
    out_rad: Tensor,
    transposed: bool,
    sizes: tuple[int, ...],
    geometry: tuple[int, ...],
    strides: tuple[int, ...],
) -> None:
    """Sizes, geometry and strides as ``cuda_convolve`` in csrc/include/pyxai_bounds/cuda.h takes them."""
    if bias is not None:
        if bias.shape != (sizes[1] * sizes[7],):
            raise ValueError(f"The bias of {sizes[1] * sizes[7]} outputs has as many values, not {describe(bias)}.")
        bias = _alike(bias, mid).contiguous()
    terms = geometry[0] * geometry[1] * sizes[4]
    lost = scalar_up(gamma(terms, torch.float64), mid.dtype)
    underflow = terms * 5e-324 if mid.dtype == torch.float64 else 0.0
    boxes = (mid, rad, weight, bias, out_mid, out_rad)
    _run("convolve", mid, transposed, *sizes, *geometry, *strides, lost, underflow, *boxes)


def _relu_into(mid: Tensor, rad: Tensor, out_mid: Tensor, out_rad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    state = torch.empty(state_size(mid), dtype=torch.uint8, device=mid.device)
    _run("relu", mid, mid.numel(), mid, rad, out_mid, out_rad, state)
    return out_mid, out_rad, state


def _maybe_relu(mid: Tensor, rad: Tensor, relu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """ReLU in place, if asked for: nobody else has seen the results of a product yet."""
    return _relu_into(mid, rad, mid, rad) if relu else (mid, rad, mid.new_empty(0, dtype=torch.uint8))


def _relu_backward(mid: Tensor, rad: Tensor, state: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    mid, rad = in_order_of(state, *checks.boxes(mid, rad))
    state = checks.bits_of(state, mid)
    out_mid, out_rad = dense_like(mid), dense_like(mid)
    _run("relu_backward", mid, mid.numel(), mid, rad, state, out_mid, out_rad, gate)
    return out_mid, out_rad


# --- checks and the call -------------------------------------------------------------------------------------


def _check_weight(weight: Tensor, mid: Tensor, shape: Sequence[int], groups: int = 1) -> None:
    _alike(weight, mid)
    if weight.shape != tuple(shape) or weight.shape[0] % groups:
        raise ValueError(f"A box {describe(mid)} in {groups} groups does not fit a weight {list(weight.shape)}.")


def _alike(t: Tensor, mid: Tensor) -> Tensor:
    if t.dtype != mid.dtype or t.device != mid.device:
        raise ValueError(f"{describe(t)} meets {describe(mid)}: convert one of them with .to(...).")
    return t


def _module() -> ModuleType:
    if native._native is None or not hasattr(native._native, "cuda_check"):
        raise RuntimeError(why_not_available())
    return native._native


@functools.cache
def _what_is_wrong(index: int) -> str:
    """What CUDA says of the kernels on this device; empty if nothing."""
    try:
        with torch.cuda.device(index):
            _module().cuda_check(index)
    except RuntimeError as error:
        return str(error)
    return ""


@contextlib.contextmanager
def _current_stream(mid: Tensor) -> Iterator[tuple[int, int]]:
    """The index and the current stream of the device of ``mid``, which is the current device meanwhile."""
    with torch.cuda.device(mid.device):
        yield mid.get_device(), torch.cuda.current_stream().cuda_stream


def _run(name: str, mid: Tensor, *args: Tensor | float | None) -> None:
    """Queues a kernel on the current stream of the device of ``mid``; of tensors it takes the addresses, 0 for None."""
    for x in args:
        if isinstance(x, Tensor) and x.device != mid.device:
            raise RuntimeError(f"The CUDA kernel of {name} on {mid.device} was given {describe(x)}.")
    addresses = [0 if x is None else x.data_ptr() if isinstance(x, Tensor) else x for x in args]
    with _current_stream(mid) as (index, stream):
        try:
            getattr(_module(), f"cuda_{name}")(index, stream, mid.element_size(), *addresses)
        except RuntimeError as error:
            raise RuntimeError(f"The CUDA kernel of {name} was not launched: {error}.") from error
