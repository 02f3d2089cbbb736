"""The fused interval operators in C++, on the CPU, for float32 and float64: one pass over memory per stage.

The functions are those of ``reference.py``. Matrix products for which there is no kernel here, or for which one would
be slower, are left to ATen. This file allocates, checks what the C++ code could not survive (a wrong shape, dtype or
device is a wild pointer), and hands over addresses.
"""

from __future__ import annotations

import importlib
import math
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyxai_bounds import rounding as rounding_units
from pyxai_bounds.ops import checks, reference
from pyxai_bounds.ops.checks import describe
from pyxai_bounds.ops.layout import dense, in_order_of, memory_format, state_size

# torch is imported above and before _native on purpose: its OpenMP runtime is then the one that both use.
_native: ModuleType | None
try:
    _native = importlib.import_module("pyxai_bounds._native")
    _failure = ""
except ImportError as error:
    _native = None
    _failure = str(error)

_warned = False
_DTYPES = (torch.float32, torch.float64)
CPU = torch.device("cpu")


def available() -> bool:
    """Whether the compiled module could be loaded."""
    return _native is not None


def why_not_available() -> str:
    """What is wrong and how to mend it, as one sentence each; empty if nothing is."""
    if available():
        return ""
    return (
        f"The native backend is not available: {_failure}. Everything runs on the reference backend, with the "
        "same results but more slowly. To build it, install a C++17 compiler and run `pip install .` (or `make`) "
        "in the source tree of pyxai_bounds."
    )


def supports(mid: Tensor) -> bool:
    """Whether ``mid`` can run here. Warns once if only the missing compiled module prevents it."""
    if not mid.is_cpu or mid.dtype not in _DTYPES:
        return False
    if _native is None:
        _warn_once()
        return False
    return True


def snapshot(objects: list[Any]) -> Any:
    """Records the identities of what these objects hold; ``.holds(objects)`` tells whether these are still the same."""
    return module().Snapshot(objects)


def _warn_once() -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(why_not_available(), RuntimeWarning, stacklevel=2)


def interval_gate(mid: Tensor, rad: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    mid, rad = in_order_of(gate, *checks.boxes(mid, rad))
    gate = checks.bits_of(gate, mid)
    out_mid, out_rad = _like(mid), _like(mid)
    module().gate(
        mid.element_size(), mid.numel(), mid.data_ptr(), rad.data_ptr(), gate.data_ptr(),
        out_mid.data_ptr(), out_rad.data_ptr(),
    )  # fmt: skip
    return out_mid, out_rad


def gate_in_place(mid: Tensor | None, rad: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """``interval_gate`` that overwrites its arguments, to which nobody else may refer; None stands for zeros."""
    if mid is not None:
        rad, out_mid = in_order_of(gate, *checks.boxes(rad, mid))
    else:
        (rad,) = in_order_of(gate, rad)
        out_mid = _like(rad)
    gate = checks.bits_of(gate, rad)
    module().gate(
        rad.element_size(), rad.numel(), 0 if mid is None else out_mid.data_ptr(), rad.data_ptr(), gate.data_ptr(),
        out_mid.data_ptr(), rad.data_ptr(),
    )  # fmt: skip
    return out_mid, rad


def interval_relu(mid: Tensor, rad: Tensor, rounding: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    mid, rad = checks.boxes(mid, rad)
    return _relu_into(mid, rad, _like(mid), _like(mid), rounding)


def interval_relu_backward(mid: Tensor, rad: Tensor, state: Tensor, rounding: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    gate = torch.empty_like(state)
    return *_relu_backward_into(mid, rad, state, gate, rounding), gate


def interval_linear(
    mid: Tensor, rad: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, rounding: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    if not rounding and few(mid, rad, weight, 1) and (bias is None or is_vector(bias, mid, weight.shape[0])):
        state = torch.empty((2, (mid.shape[0] * weight.shape[0] + 7) // 8 * relu), dtype=torch.uint8, device=mid.device)
        out_mid = torch.empty((mid.shape[0], weight.shape[0]), dtype=mid.dtype, device=mid.device)
        out_rad = torch.empty_like(out_mid)
        module().linear(
            mid.element_size(), *mid.shape, weight.shape[0], mid.data_ptr(), rad.data_ptr(), weight.data_ptr(),
            0 if bias is None else bias.data_ptr(), out_mid.data_ptr(), out_rad.data_ptr(),
            state.data_ptr() if relu else 0,
        )  # fmt: skip
        return out_mid, out_rad, state if relu else state.new_empty(0)
    outputs = weight.shape[0]
    if several(mid, rad, weight, 1, rounding) and (bias is None or is_vector(bias, mid, outputs)):
        out_mid = mid.new_empty((mid.shape[0], outputs))
        out_rad = torch.empty_like(out_mid)
        fused = relu and _packs(mid, outputs)
        state = _bits(out_mid) if fused else _no_state(mid)
        widening = _widening_of_linear(weight.shape[1], mid.dtype, rounding, bias)
        done = module().linear_many(
            mid.element_size(), *mid.shape, outputs, widening.numbers, mid.data_ptr(), rad.data_ptr(),
            weight.data_ptr(), *weight.stride(), 0 if bias is None else bias.data_ptr(), out_mid.data_ptr(),
            out_rad.data_ptr(), state.data_ptr() if fused else 0,
        )  # fmt: skip
        if done:
            return _relu_in_place(out_mid, out_rad, rounding) if relu and not fused else (out_mid, out_rad, state)
    out = reference.interval_linear(mid, rad, weight, bias, False, rounding, _STAGES)
    return _relu_in_place(out[0], out[1], rounding) if relu else out


def interval_linear_backward(
    mid: Tensor, rad: Tensor, weight: Tensor, state: Tensor | None, rounding: int = 0
) -> tuple[Tensor, Tensor]:
    if not rounding and few(mid, rad, weight, 0) and (state is None or state.dim() == 2):
        state = None if state is None else checks.bits_of(state, mid)
        out_mid = torch.empty((mid.shape[0], weight.shape[1]), dtype=mid.dtype, device=mid.device)
        out_rad = torch.empty_like(out_mid)
        module().linear_backward(
            mid.element_size(), *mid.shape, weight.shape[1], mid.data_ptr(), rad.data_ptr(),
            0 if state is None else state.data_ptr(), weight.data_ptr(), out_mid.data_ptr(), out_rad.data_ptr(),
        )  # fmt: skip
        return out_mid, out_rad
    if several(mid, rad, weight, 0, rounding) and (state is None or state.dim() == 2):
        if state is not None and not _packs(mid, weight.shape[0]):
            mid, rad, state = *_relu_backward_into(mid, rad, state, None, rounding), None
        state = None if state is None else checks.bits_of(state, mid)
        out_mid = mid.new_empty((mid.shape[0], weight.shape[1]))
        out_rad = torch.empty_like(out_mid)
        done = module().linear_backward_many(
            mid.element_size(), *mid.shape, weight.shape[1],
            _widening_of_linear(weight.shape[0], mid.dtype, rounding).numbers, mid.data_ptr(), rad.data_ptr(),
            0 if state is None else state.data_ptr(), weight.data_ptr(), *weight.stride(), out_mid.data_ptr(),
            out_rad.data_ptr(),
        )  # fmt: skip
        if done:
            return out_mid, out_rad
    if state is not None:
        mid, rad = _relu_backward_into(mid, rad, state, None, rounding)
    return reference.interval_linear_backward(mid, rad, weight, None, rounding, _STAGES)


def interval_linear_adjoint(
    mid_grad: Tensor | None,
    rad_grad: Tensor,
    mid: Tensor,
    rad: Tensor,
    weight: Tensor,
    state: Tensor | None,
    need_box: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None] | None:
    """The gradients of ``interval_linear`` in box, weight and bias; ``state`` is that of the ReLU after it, if any.

    ``mid_grad`` None stands for zeros. Returns None where the kernels do not take these boxes.
    """
    many = _few_or_several(mid, rad, weight, 1)
    if many is None or not (state is None or state.dim() == 2):
        return None
    batch, outputs = mid.shape[0], weight.shape[0]
    mid_grad, rad_grad = _gradients(mid_grad, rad_grad, (batch, outputs), mid)
    state = None if state is None else checks.bits_of(state, rad_grad)
    has_mid = mid_grad is not None or state is not None
    box_mid, box_rad = _room(mid, need_box and has_mid), _room(mid, need_box)
    of_weight = _room(weight, need_weight)
    of_bias = torch.empty(outputs, dtype=mid.dtype, device=CPU) if need_bias and has_mid else None
    module().linear_adjoint(
        mid.element_size(), many, *mid.shape, outputs, mid.data_ptr(), rad.data_ptr(), weight.data_ptr(),
        *_addresses(state, mid_grad, rad_grad, box_mid, box_rad, of_weight), False, *_addresses(of_bias), False,
    )  # fmt: skip
    return box_mid, box_rad, of_weight, of_bias


def interval_linear_backward_adjoint(
    mid_grad: Tensor | None,
    rad_grad: Tensor,
    mid: Tensor,
    rad: Tensor,
    weight: Tensor,
    state: Tensor | None,
    need_box: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None] | None:
    """The gradients of ``interval_linear_backward`` in box and weight.

    ``mid_grad`` None stands for zeros. Returns None where the kernels do not take these boxes.
    """
    many = _few_or_several(mid, rad, weight, 0)
    if many is None or not (state is None or state.dim() == 2):
        return None
    mid_grad, rad_grad = _gradients(mid_grad, rad_grad, (mid.shape[0], weight.shape[1]), mid)
    state = None if state is None else checks.bits_of(state, mid)
    has_mid = mid_grad is not None or state is not None
    box_mid, box_rad = _room(mid, need_box and has_mid), _room(mid, need_box)
    of_weight = _room(weight, need_weight)
    module().linear_backward_adjoint(
        mid.element_size(), many, *mid.shape, weight.shape[1], mid.data_ptr(), rad.data_ptr(), weight.data_ptr(),
        *_addresses(state, mid_grad, rad_grad, box_mid, box_rad, of_weight), False,
    )  # fmt: skip
    return box_mid, box_rad, of_weight


def _few_or_several(mid: Tensor, rad: Tensor, weight: Tensor, dim: int) -> bool | None:
    """Which kernel takes the derivative of a linear layer: True, that for several boxes; False, for few; None, none.

    Times of the backward pass against a library's products, [256, 784], float32, two threads with AVX-512, in us: 1 box
    49 and 128, 8 boxes 109 and 275, 32 boxes 295 and 447, 64 boxes 542 and 609; [256, 4096] 32 boxes 1819 and 1871,
    64 boxes 3046 and 2937.
    """
    if few(mid, rad, weight, dim):
        return False
    return True if weight.is_contiguous() and several(mid, rad, weight, dim) else None


def _gradients(
    mid_grad: Tensor | None, rad_grad: Tensor, shape: tuple[int, int], mid: Tensor
) -> tuple[Tensor | None, Tensor]:
    for grad in (mid_grad, rad_grad):
        if grad is not None and (grad.shape != shape or grad.dtype is not mid.dtype or not grad.is_cpu):
            raise ValueError(f"The gradient of a {mid.dtype} box {list(shape)} on the CPU cannot be {describe(grad)}.")
    return None if mid_grad is None else mid_grad.contiguous(), rad_grad.contiguous()


def _room(like: Tensor, needed: bool) -> Tensor | None:
    return empty_contiguous(like.shape, like.dtype) if needed else None


def empty_contiguous(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    strides = [1]
    for size in shape[:0:-1]:
        strides.insert(0, strides[0] * size)
    return _empty(math.prod(shape), shape, strides, dtype)


def _addresses(*tensors: Tensor | None) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]


# Up to so many boxes, a kernel that reads the weight once beats a library's matrix products, which need |W| in memory.
# For a weight [256, 784], forward and backward, float32, one thread with AVX-512, in us: 1 box 23 and 15 against 102
# and 81, 4 boxes 54 and 35 against 133 and 107, 8 boxes 97 and 56 against 142 and 102.
FEW = 8


# Up to so many boxes, the tiles on a packed weight are faster. Beyond 64 boxes the products alone are not, but the
# tiles apply ReLU and its gates on the way, need half of the products for boxes of one radius, and can be part of a
# chain. A network of layers [256, 784], [256, 256] and [10, 256], bounds and training step, two threads with AVX-512,
# in ms: 128 boxes 1.0 and 3.1 against 1.4 and 3.6 with a library's products, 256 boxes 1.7 and 5.1 against 2.1 and 5.6,
# 512 boxes 3.8 and 7.9 against 4.0 and 8.1.
SEVERAL = 256
# The same with outward rounding, where the kernel sums in float64. [4096, 256], forward and backward: 32 boxes 1.6 and
# 1.4 against 4.3 and 3.3, 128 boxes 5.2 and 4.3 against 4.9 and 4.8.
SEVERAL_OUTWARD = 64


def few(mid: Tensor, rad: Tensor, weight: Tensor, dim: int) -> bool:
    """Does the kernel for few boxes take these and the weight, summing over the weight's dimension ``dim``?

    It does not if they must be copied first, or if they do not fit, which the other kernels refuse.
    """
    return mid.shape[0] <= FEW and weight.is_contiguous() and _are_boxes(mid, rad, weight, dim)


def several(mid: Tensor, rad: Tensor, weight: Tensor, dim: int, rounding: int = 0) -> bool:
    """Does the kernel for several boxes take these, and is it faster than a library's products?"""
    most = SEVERAL_OUTWARD if rounding else SEVERAL
    return mid.shape[0] <= most and _are_boxes(mid, rad, weight, dim) and min(weight.shape) >= 16 and _has_tiles()


def _are_boxes(mid: Tensor, rad: Tensor, weight: Tensor, dim: int) -> bool:
    shape, dtype = mid.shape, mid.dtype
    return (
        len(shape) == 2 == weight.dim()
        and shape[1] == weight.shape[dim]
        and weight.numel() > 0  # an empty tensor has the address 0, which stands for an absent one
        and rad.shape == shape
        and rad.dtype is dtype is weight.dtype
        and mid.is_cpu
        and rad.is_cpu
        and weight.is_cpu
        and mid.is_contiguous()
        and rad.is_contiguous()
    )


def is_vector(t: Tensor, like: Tensor, size: int) -> bool:
    return t.shape == (size,) and t.dtype is like.dtype and t.is_cpu and t.is_contiguous()


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
    geometry = conv2d_geometry(mid, rad, weight, mid.shape, stride, padding, dilation, groups, False)
    if geometry is not None and (bias is None or is_vector(bias, mid, weight.shape[0])):
        size = (geometry[0], geometry[4], geometry[5], geometry[6])
        out_mid, out_rad = empty_channels_last(size, mid.dtype), empty_channels_last(size, mid.dtype)
        fused = relu and _packs(mid, geometry[4])
        state = _bits(out_mid) if fused else None
        widening = _widening(geometry, mid, rounding, False, bias)
        done = module().conv2d(
            mid.element_size(), geometry, widening.numbers, mid.data_ptr(), rad.data_ptr(), weight.data_ptr(),
            0 if bias is None else bias.data_ptr(), out_mid.data_ptr(), out_rad.data_ptr(),
            0 if state is None else state.data_ptr(),
        )  # fmt: skip
        if done and state is not None:
            return out_mid, out_rad, state
        if done:
            return _relu_in_place(out_mid, out_rad, rounding) if relu else (out_mid, out_rad, _no_state(mid))
    out = reference.interval_conv2d(mid, rad, weight, bias, stride, padding, dilation, groups, False, rounding, _STAGES)
    return _relu_in_place(out[0], out[1], rounding) if relu else out


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
    if state is not None:
        mid, rad = in_order_of(state, mid, rad)
    geometry = conv2d_geometry(mid, rad, weight, input_size, stride, padding, dilation, groups, True)
    if state is not None and (geometry is None or not _packs(mid, geometry[4])):
        mid, rad, state = *_relu_backward_into(mid, rad, state, None, rounding), None
    if geometry is not None:
        state = None if state is None else checks.bits_of(state, mid)
        out_mid, out_rad = empty_channels_last(input_size, mid.dtype), empty_channels_last(input_size, mid.dtype)
        widening = _widening(geometry, mid, rounding, True)
        done = module().conv2d_backward(
            mid.element_size(), geometry, widening.numbers, mid.data_ptr(), rad.data_ptr(),
            0 if state is None else state.data_ptr(), weight.data_ptr(), out_mid.data_ptr(), out_rad.data_ptr(),
        )  # fmt: skip
        if done:
            return out_mid, out_rad
        if state is not None:
            mid, rad = _relu_backward_into(mid, rad, state, None, rounding)
    args = (input_size, stride, padding, dilation, groups)
    return reference.interval_conv2d_backward(mid, rad, weight, None, *args, rounding, _STAGES)


def conv2d_geometry(
    mid: Tensor,
    rad: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    backward: bool,
) -> tuple[int, ...] | None:
    """The numbers of the kernel's ``Conv2d`` if it takes these boxes and is faster than a library, else None.

    ``input_size``: shape of the convolution's input. The box is that input or, backward, a gradient of the output.
    Boxes that must be copied first, or that do not fit, are left to ``reference``.
    """
    if (
        groups != 1
        or mid.dim() != 4
        or weight.dim() != 4
        or rad.shape != mid.shape
        or not (rad.dtype is mid.dtype is weight.dtype)
        or not (mid.is_cpu and rad.is_cpu and weight.is_cpu)
        or memory_format(mid) is not torch.channels_last
        or memory_format(rad) is not torch.channels_last
        or min(*stride, *dilation) < 1
        or min(padding) < 0
        or stride[0] * stride[1] > module().most_remainders
        or not _has_tiles()
    ):
        return None
    outputs, channels, *kernel = weight.shape
    batch, features, *image = input_size
    sides = checks.output_size(image, kernel, stride, padding, dilation)
    shape = (batch, outputs, *sides) if backward else tuple(input_size)
    if features != channels or mid.shape != shape or min(*kernel, *image, *sides) < 1:
        return None
    return (batch, channels, *image, outputs, *sides, *kernel, *stride, *padding, *dilation, *weight.stride())


# The instruction sets for which the tiles of tile.h beat oneDNN and MKL: those with a fused multiply-add.
TILED = ("avx512", "avx2")


def _has_tiles() -> bool:
    return module().level() in TILED


class _Widening(NamedTuple):
    """How a kernel rounds outward. ``numbers`` holds the address of ``rad_bias``, which must outlive the call."""

    numbers: tuple[float, float, float, int] | None
    rad_bias: Tensor | None


def _widening(
    geometry: tuple[int, ...], mid: Tensor, rounding: int, backward: bool, bias: Tensor | None = None
) -> _Widening:
    """How a convolution rounds outward: it sums in the dtype of its boxes."""
    if not rounding:
        return _Widening(None, None)
    terms = geometry[4 if backward else 1] * geometry[7] * geometry[8]
    summed = module().conv2d_roundings(mid.element_size(), geometry, backward)
    return _widened_by(rounding_units.errors(terms, mid.dtype, rounding, summed=min(terms, summed)), bias)


def _widening_of_linear(terms: int, dtype: torch.dtype, rounding: int, bias: Tensor | None = None) -> _Widening:
    """How a linear layer rounds outward: it sums midpoints in float64."""
    if not rounding:
        return _Widening(None, None)
    return _widened_by(rounding_units.errors(terms, dtype, rounding, computed=torch.float64), bias)


def _widened_by(lost: rounding_units.Errors, bias: Tensor | None) -> _Widening:
    rad_bias = rounding_units.bias_error(bias, lost)
    address = 0 if rad_bias is None else rad_bias.data_ptr()
    return _Widening((lost.of_mid, lost.of_rad, 2 * lost.floor, address), rad_bias)


def _packs(mid: Tensor, channels: int) -> bool:
    """Do the tiles read and write the packed bits of so many channels?"""
    return module().packs(mid.element_size(), channels)


def empty_channels_last(size: Sequence[int], dtype: torch.dtype) -> Tensor:
    _, channels, height, width = size
    strides = (height * width * channels, 1, width * channels, channels)
    return _empty(math.prod(size), size, strides, dtype)


def _bits(mid: Tensor) -> Tensor:
    """Room for the packed bits of these boxes."""
    planes, length, *last = size = state_size(mid)
    return _empty(planes * length, size, (length, 1, *last), torch.uint8)


def _empty(count: int, size: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Tensor:
    """``torch.empty_strided`` for a dense tensor on the CPU; a large one gets memory that has been written before."""
    bytes_ = count * dtype.itemsize
    if not module().least_kept <= bytes_ <= module().most_kept or torch.are_deterministic_algorithms_enabled():
        return torch.empty_strided(size, strides, dtype=dtype, device=CPU)  # which then fills it
    # Assigned to .data, because autograd treats a view of the buffer's tensor differently from the result of an
    # operator. A tensor made from the buffer's storage would share it with Python, and autograd would not add gradients
    # in place.
    out = torch.empty(0, dtype=dtype, device=CPU)
    out.data = torch.frombuffer(module().Memory(bytes_), dtype=dtype).as_strided(size, strides)
    return out


def _no_state(mid: Tensor) -> Tensor:
    return mid.new_empty(0, dtype=torch.uint8)


def interval_linear_weight(
    grad_mid: Tensor | None, grad_rad: Tensor | None, mid: Tensor | None, rad: Tensor | None, weight: Tensor
) -> Tensor:
    of_mid = None if grad_mid is None or mid is None else _product(grad_mid.t(), mid)
    of_rad = None if grad_rad is None or rad is None else _product(grad_rad.t(), rad)
    return signed_sum(of_mid, of_rad, weight)


def _product(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b, out=empty_contiguous((a.shape[0], b.shape[1]), a.dtype))


def interval_conv2d_weight(
    grad_mid: Tensor | None,
    grad_rad: Tensor | None,
    mid: Tensor | None,
    rad: Tensor | None,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    if grad_mid is None or mid is None:
        grad_mid = mid = None
    if grad_rad is None or rad is None:
        grad_rad = rad = None
    box = [t for t in (mid, rad) if t is not None]
    if box:
        grads, size, args = (
            [t for t in (grad_mid, grad_rad) if t is not None],
            box[0].shape,
            (stride, padding, dilation),
        )
        geometry = conv2d_geometry(box[0], box[-1], weight, size, *args, groups, False)
        of_grads = conv2d_geometry(grads[0], grads[-1], weight, size, *args, groups, True)
        # So many channels, and it is faster than a library.
        if geometry is not None and geometry == of_grads and has_weight_kernel(geometry, weight) and geometry[1] >= 8:
            out = empty_contiguous(weight.shape, weight.dtype)
            addresses = _addresses(grad_mid, grad_rad, mid, rad, weight, out)
            module().conv2d_weight(weight.element_size(), geometry, *addresses)
            return out.contiguous(memory_format=memory_format(weight))
    return reference.interval_conv2d_weight(
        grad_mid, grad_rad, mid, rad, weight, stride, padding, dilation, groups, signed_sum=signed_sum
    )


def has_weight_kernel(geometry: tuple[int, ...], weight: Tensor) -> bool:
    """Do the outputs fill whole registers, which the kernel for a weight's gradient needs?"""
    return geometry[4] * weight.element_size() % 64 == 0


def signed_sum(of_mid: Tensor | None, of_rad: Tensor | None, weight: Tensor) -> Tensor:
    """``reference.signed_sum``, in one pass over memory; overwrites ``of_rad``."""
    if of_rad is None:
        return reference.signed_sum(of_mid, None, weight)
    out, weight, *first = checks.boxes(of_rad, weight, *(() if of_mid is None else (of_mid,)))
    module().signed_sum(
        out.element_size(), out.numel(), first[0].data_ptr() if first else 0, out.data_ptr(), weight.data_ptr(),
        out.data_ptr(),
    )  # fmt: skip
    return out


def interval_scale_shift(
    mid: Tensor,
    rad: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    scale_rad: Tensor | None = None,
    shift_rad: Tensor | None = None,
    rounding: int = 0,
) -> tuple[Tensor, Tensor]:
    mid, rad = checks.boxes(mid, rad)
    channels = mid.shape[1]
    numbers = [
        None if values is None else checks.per_channel(name, values, mid)
        for name, values in (("scale", scale), ("shift", shift), ("scale_rad", scale_rad), ("shift_rad", shift_rad))
    ]
    if memory_format(mid) is torch.channels_last or mid.numel() == 0:
        inner = 1
    else:
        inner = mid.numel() // (mid.shape[0] * channels)
    out_mid, out_rad = _like(mid), _like(mid)
    module().scale_shift(
        mid.element_size(), mid.numel(), channels, inner, mid.data_ptr(), rad.data_ptr(),
        *(0 if values is None else values.data_ptr() for values in numbers),
        *reference.scale_shift_losses(mid.dtype, rounding), out_mid.data_ptr(), out_rad.data_ptr(),
    )  # fmt: skip
    return out_mid, out_rad


def interval_mul(
    a_mid: Tensor, a_rad: Tensor, b_mid: Tensor, b_rad: Tensor, rounding: int = 0
) -> tuple[Tensor, Tensor]:
    a_mid, a_rad, b_mid, b_rad = checks.boxes(a_mid, a_rad, b_mid, b_rad)
    out_mid, out_rad = _like(a_mid), _like(a_mid)
    module().mul(
        a_mid.element_size(), a_mid.numel(), a_mid.data_ptr(), a_rad.data_ptr(), b_mid.data_ptr(), b_rad.data_ptr(),
        out_mid.data_ptr(), out_rad.data_ptr(), *reference.mul_losses(a_mid.dtype, rounding),
    )  # fmt: skip
    return out_mid, out_rad


def interval_matmul(a_mid: Tensor, a_rad: Tensor, b_mid: Tensor, b_rad: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    reference.check_matmul(a_mid, a_rad, b_mid, b_rad)
    _on_cpu(a_mid, a_rad, b_mid, b_rad)
    if not exact:
        return reference.interval_matmul(a_mid, a_rad, b_mid, b_rad, False)
    box = (a_mid, a_rad, b_mid, b_rad)
    by_products = reference.matmul_with_a_point(*box)
    if by_products is None and module().level() != "avx512":
        # With AVX-512 the kernel beats four matrix products (0.6 against 1.3 ns per 64 bytes and term, AMD EPYC, MKL).
        by_products = reference.matmul_of_definite(*box)
    if by_products is not None:
        return by_products
    if b_mid.shape[-1] < min(16, a_mid.shape[-2]):  # the kernel's registers run along the columns of b
        mid, rad = _matmul(b_mid.mT, b_rad.mT, a_mid.mT, a_rad.mT)
        return mid.mT.contiguous(), rad.mT.contiguous()
    return _matmul(*box)


def _matmul(a_mid: Tensor, a_rad: Tensor, b_mid: Tensor, b_rad: Tensor) -> tuple[Tensor, Tensor]:
    batch, m, k, n = checks.matmul_sizes(a_mid, b_mid)
    a_mid, a_rad, b_mid, b_rad = (t.contiguous() for t in (a_mid, a_rad, b_mid, b_rad))
    out_mid = a_mid.new_empty(*a_mid.shape[:-1], n)
    out_rad = torch.empty_like(out_mid)
    module().matmul(
        a_mid.element_size(), batch, m, k, n, a_mid.data_ptr(), a_rad.data_ptr(),
        b_mid.data_ptr(), b_rad.data_ptr(), out_mid.data_ptr(), out_rad.data_ptr(),
    )  # fmt: skip
    return out_mid, out_rad


def interval_matmul_backward(
    mid_grad: Tensor, rad_grad: Tensor, a_mid: Tensor, a_rad: Tensor, b_mid: Tensor, b_rad: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    reference.check_matmul(a_mid, a_rad, b_mid, b_rad)
    batch, m, k, n = checks.matmul_sizes(a_mid, b_mid)
    _on_cpu(a_mid, a_rad, b_mid, b_rad, mid_grad, rad_grad)
    mid_grad, rad_grad = (t.expand(*a_mid.shape[:-1], n).contiguous() for t in (mid_grad, rad_grad))
    a_mid, a_rad, b_mid, b_rad = (t.contiguous() for t in (a_mid, a_rad, b_mid.mT, b_rad.mT))
    a_grads = torch.empty_like(a_mid), torch.empty_like(a_mid)
    b_grads = torch.empty_like(b_mid), torch.empty_like(b_mid)
    module().matmul_backward(
        a_mid.element_size(), batch, m, k, n, mid_grad.data_ptr(), rad_grad.data_ptr(), a_mid.data_ptr(),
        a_rad.data_ptr(), b_mid.data_ptr(), b_rad.data_ptr(), *(grad.data_ptr() for grad in (*a_grads, *b_grads)),
    )  # fmt: skip
    return *a_grads, b_grads[0].mT.contiguous(), b_grads[1].mT.contiguous()


def _on_cpu(*tensors: Tensor) -> None:
    for t in tensors:
        if t.device.type != "cpu" or t.dtype is not tensors[0].dtype:
            raise ValueError(f"The native kernels take tensors of one dtype on the CPU, not {describe(t)}.")


# --- the stages that two operators share --------------------------------------------------------------------


def _relu_into(
    mid: Tensor, rad: Tensor, out_mid: Tensor, out_rad: Tensor, rounding: int
) -> tuple[Tensor, Tensor, Tensor]:
    state = _bits(mid)
    module().relu(
        mid.element_size(), mid.numel(), mid.data_ptr(), rad.data_ptr(),
        out_mid.data_ptr(), out_rad.data_ptr(), state.data_ptr(), bool(rounding),
    )  # fmt: skip
    return out_mid, out_rad, state


def _relu_in_place(mid: Tensor, rad: Tensor, rounding: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """ReLU on the results of a matrix product, which it overwrites."""
    mid, rad = checks.boxes(mid, rad)
    return _relu_into(mid, rad, mid, rad, rounding)


def _relu_backward_into(
    mid: Tensor, rad: Tensor, state: Tensor, gate: Tensor | None, rounding: int = 0
) -> tuple[Tensor, Tensor]:
    """ReLU′ on a box; with ``gate``, the gate that was applied is written there."""
    mid, rad = in_order_of(state, *checks.boxes(mid, rad))
    state = checks.bits_of(state, mid)
    out_mid, out_rad = _like(mid), _like(mid)
    module().relu_backward(
        mid.element_size(), mid.numel(), mid.data_ptr(), rad.data_ptr(), state.data_ptr(),
        out_mid.data_ptr(), out_rad.data_ptr(), 0 if gate is None else gate.data_ptr(), bool(rounding),
    )  # fmt: skip
    return out_mid, out_rad


def widen(mid: Tensor, rad: Tensor, lost: rounding_units.Errors) -> Tensor:
    """``rounding.widen``, in one pass over memory."""
    mid, rad = checks.boxes(mid, rad)
    out = _like(mid)
    module().widen(
        mid.element_size(), mid.numel(), mid.data_ptr(), rad.data_ptr(), lost.of_mid, lost.of_rad,
        2 * lost.floor, out.data_ptr(),
    )  # fmt: skip
    return out


def magnitude(weight: Tensor, lost: rounding_units.Errors) -> Tensor:
    """``rounding.magnitude``, in one pass over memory."""
    transposed = weight.dim() == 2 and weight.t().is_contiguous()
    (weight,) = dense(weight.t() if transposed else weight)
    out = _like(weight)
    module().magnitude(weight.element_size(), weight.numel(), weight.data_ptr(), lost.floor, out.data_ptr())
    return out.t() if transposed else out


_STAGES = sys.modules[__name__]  # from where the reference's affine operators call these two


# --- allocation ----------------------------------------------------------------------------------


def module() -> ModuleType:
    if _native is None:
        raise RuntimeError(why_not_available())
    return _native


def _like(mid: Tensor) -> Tensor:
    if memory_format(mid) is torch.channels_last:
        return empty_channels_last(mid.shape, mid.dtype)
    return torch.empty_like(mid, memory_format=memory_format(mid))
