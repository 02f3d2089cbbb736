"""The fused interval operators: schema, shape inference and autograd, once for all backends.

Each operator is ``torch.ops.pyxai_bounds.<name>`` and takes and returns midpoints and radii. What it
computes is said, and done in plain PyTorch, by the function of the same name in ``reference.py``.
Backends are chosen when an operator runs: see ``dispatch.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyxai_bounds.errors import any_wrong
from pyxai_bounds.ops import native, reference
from pyxai_bounds.ops.checks import output_size
from pyxai_bounds.ops.dispatch import (
    BACKENDS,
    available,
    backend,
    by_native,
    call,
    define,
    forced,
    has_kernels,
    library,
    needs_dispatcher,
    recorded,
    select,
    undispatched,
)
from pyxai_bounds.ops.layout import dense, memory_format, order_of, state_size


def _like(t: Tensor, shape: Any = None, bits: Tensor | None = None) -> Tensor:
    """An uninitialised tensor in the memory order of the bits, if they are given, else of ``t``."""
    order = memory_format(t) if bits is None else order_of(bits)
    return torch.empty(t.shape if shape is None else shape, dtype=t.dtype, device=t.device, memory_format=order)


def _bits(t: Tensor, present: bool = True) -> Tensor:
    return torch.empty(state_size(t) if present else 0, dtype=torch.uint8, device=t.device)


def _both(mid_grad: Tensor | None, rad_grad: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gradients of midpoint and radius; None, where the loss does not use one of them, becomes zeros."""
    some = rad_grad if mid_grad is None else mid_grad
    assert some is not None  # `define` sees to it
    return tuple(torch.zeros_like(some) if grad is None else grad for grad in (mid_grad, rad_grad))  # type: ignore[return-value]


# --- interval_gate: lower' = a·lower, upper' = b·upper; symmetric, so it is its own adjoint ---------------


def _gate_setup(ctx: Any, inputs: tuple, output: Any) -> None:
    ctx.save_for_backward(inputs[2])


def _gate_adjoint(mid_grad: Tensor | None, rad_grad: Tensor | None, gate: Tensor) -> Any:
    return call(interval_gate, *_both(mid_grad, rad_grad), gate)


def _gate_backward(ctx: Any, mid_grad: Tensor, rad_grad: Tensor) -> Any:
    return *_gate_adjoint(mid_grad, rad_grad, ctx.saved_tensors[0]), None


interval_gate = define(
    "interval_gate(Tensor mid, Tensor rad, Tensor gate) -> (Tensor, Tensor)",
    lambda mid, rad, gate: (_like(mid, bits=gate), _like(mid, bits=gate)),
    _gate_backward,
    _gate_setup,
)


# --- interval_relu, interval_relu_backward: their derivative is the gate they applied ----------------------

# A gate costs nothing as an epilogue of the product that makes its argument. Gating a gated box again changes nothing,
# so the reader of a gated box may be given the gate and return gradients that are gated already (see
# interval_conv2d_backward_relu). `gated` says that all gradients of a result come from such a reader and need no gate
# here; `fuse` sets it where a box has one reader and no other use.


def _relu_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.mark_non_differentiable(output[2])
    gated = len(inputs) > 4 and inputs[4]
    ctx.save_for_backward(None if gated else output[2])
    ctx.nones = (None,) * (len(inputs) - 2)


def _relu_backward(ctx: Any, mid_grad: Tensor, rad_grad: Tensor, _: Any) -> Any:
    (gate,) = ctx.saved_tensors
    box_grad = (mid_grad, rad_grad) if gate is None else _gate_adjoint(mid_grad, rad_grad, gate)
    return *box_grad, *ctx.nones


interval_relu = define(
    "interval_relu(Tensor mid, Tensor rad, int rounding=0) -> (Tensor, Tensor, Tensor)",
    lambda mid, rad, rounding=0: (_like(mid), _like(mid), _bits(mid)),
    _relu_backward,
    _relu_setup,
)

interval_relu_backward = define(
    "interval_relu_backward(Tensor mid, Tensor rad, Tensor state, int rounding=0, bool gated=False) -> "
    "(Tensor, Tensor, Tensor)",
    lambda mid, rad, state, *_: (_like(mid, bits=state), _like(mid, bits=state), torch.empty_like(state)),
    _relu_backward,
    _relu_setup,
    unseen=1,
)


# --- interval_linear_weight: gradᵀ·mid + sign(W) ⊙ (grad_radᵀ·rad); no derivative in W ---------------------


def _weight_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.args = inputs[5:]


def _linear_weight_backward(ctx: Any, weight_grad: Tensor) -> Any:
    grad_mid, grad_rad, mid, rad, weight = ctx.saved_tensors
    signed = weight_grad * weight.sign()
    return mid @ weight_grad.t(), rad @ signed.t(), grad_mid @ weight_grad, grad_rad @ signed, None


interval_linear_weight = define(
    "interval_linear_weight(Tensor grad_mid, Tensor grad_rad, Tensor mid, Tensor rad, Tensor weight) -> Tensor",
    lambda grad_mid, grad_rad, mid, rad, weight: _like(weight),
    _linear_weight_backward,
    _weight_setup,
)


def _weight_gradient(name: str, grad_mid: Any, grad_rad: Any, mid: Any, rad: Any, *rest: Any) -> Tensor:
    """A product of midpoints plus a signed product of radii. None as a factor leaves its product out."""
    weight = rest[0]
    if has_kernels(weight):
        operator = getattr(torch.ops.pyxai_bounds, name).default
        return call(operator, *_both(grad_mid, grad_rad), *_both(mid, rad), *rest)
    # Plain PyTorch where autograd or a trace must see the operators.
    seen = torch.is_grad_enabled() or needs_dispatcher(weight)
    return getattr(reference if seen else select(weight), name)(grad_mid, grad_rad, mid, rad, *rest)


# --- interval_conv2d_weight: the same for convolutions -----------------------------------------------------


def _conv2d_weight_backward(ctx: Any, weight_grad: Tensor) -> Any:
    grad_mid, grad_rad, mid, rad, weight = ctx.saved_tensors
    signed = weight_grad * weight.sign()
    return (
        torch.conv2d(mid, weight_grad, None, *ctx.args),
        torch.conv2d(rad, signed, None, *ctx.args),
        reference.conv2d_input(grad_mid, weight_grad, mid.shape, *ctx.args),
        reference.conv2d_input(grad_rad, signed, mid.shape, *ctx.args),
        *(None,) * 5,
    )


interval_conv2d_weight = define(
    "interval_conv2d_weight(Tensor grad_mid, Tensor grad_rad, Tensor mid, Tensor rad, Tensor weight, int[] stride, "
    "int[] padding, int[] dilation, int groups) -> Tensor",
    lambda grad_mid, grad_rad, mid, rad, weight, *args: _like(weight),
    _conv2d_weight_backward,
    _weight_setup,
)


# --- interval_linear: mid' = mid·Wᵀ + b, rad' = rad·|W|ᵀ, then ReLU ----------------------------------------


def _check_weight(mid: Tensor, weight: Tensor) -> None:
    for what in ("dtype", "device"):
        if getattr(mid, what) != getattr(weight, what):
            raise ValueError(
                f"A box of {what} {getattr(mid, what)} meets a weight of {what} {getattr(weight, what)}: convert one "
                "of them, with x.to(...) or model.to(...)."
            )


def _linear_fake(mid: Tensor, rad: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, rounding: int = 0) -> Any:
    _check_weight(mid, weight)
    out = mid.new_empty(*mid.shape[:-1], weight.shape[0])
    return out, torch.empty_like(out), _bits(out, relu)


def _affine_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    """Save the box if the weight needs a gradient, and of ReLU only the packed state."""
    mid, rad, weight, _, *ctx.args = inputs
    ctx.set_materialize_grads(False)  # where a loss reads radii alone, half of the products can be left out
    ctx.mark_non_differentiable(output[2])
    if not ctx.needs_input_grad[2]:
        mid = rad = None  # only the weight's gradient depends on the box
    ctx.save_for_backward(mid, rad, weight, output[2])
    ctx.relu = next(arg for arg in ctx.args if isinstance(arg, bool))
    ctx.input_size = inputs[0].shape


def _linear_backward(ctx: Any, mid_grad: Tensor | None, rad_grad: Tensor | None, _: Any) -> Any:
    mid, rad, weight, state = ctx.saved_tensors
    need_mid, need_rad, need_weight, need_bias = ctx.needs_input_grad[:4]
    if need_weight and by_native(rad_grad):
        needs = (need_mid or need_rad, need_weight, need_bias)
        found = native.interval_linear_adjoint(
            mid_grad, rad_grad, mid, rad, weight, state if ctx.relu else None, *needs
        )  # fmt: skip
        if found is not None:
            return *found, None, None
    if ctx.relu:
        mid_grad, rad_grad = _gate_adjoint(mid_grad, rad_grad, state)
    if need_mid and need_rad and has_kernels(weight):
        box_grad = call(interval_linear_backward, *_both(mid_grad, rad_grad), weight, None)
    else:
        box_grad = (
            mid_grad @ weight if need_mid and mid_grad is not None else None,
            rad_grad @ weight.abs() if need_rad and rad_grad is not None else None,
        )
    return (
        *box_grad,
        _weight_gradient("interval_linear_weight", mid_grad, rad_grad, mid, rad, weight) if need_weight else None,
        mid_grad.sum(0) if need_bias and mid_grad is not None else None,
        *(None,) * 2,
    )


interval_linear = define(
    "interval_linear(Tensor mid, Tensor rad, Tensor weight, Tensor? bias, bool relu, int rounding=0) -> "
    "(Tensor, Tensor, Tensor)",
    _linear_fake,
    _linear_backward,
    _affine_setup,
)


# --- interval_linear_backward: ReLU′ prologue, then mid' = mid·W, rad' = rad·|W| ---------------------------


def _data_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    """Save the box before ReLU′ and the state: the gated box is computed again when it is needed."""
    mid, rad, weight, state, *ctx.args = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(mid, rad, weight, state)


def _gated(mid: Tensor, rad: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    return (mid, rad, None) if state is None else call(interval_relu_backward, mid, rad, state)


def _ungate(mid_grad: Tensor | None, rad_grad: Tensor | None, gate: Tensor | None) -> Any:
    """The gate's adjoint on gradients to which nobody else refers, so that it may overwrite them."""
    if gate is None:
        return mid_grad, rad_grad
    if by_native(rad_grad):
        return native.gate_in_place(mid_grad, rad_grad, gate)
    return _gate_adjoint(mid_grad, rad_grad, gate)


def _linear_data_backward(ctx: Any, mid_grad: Tensor | None, rad_grad: Tensor | None) -> Any:
    mid, rad, weight, state = ctx.saved_tensors
    if by_native(rad_grad):
        need_box, need_weight = any(ctx.needs_input_grad[:2]), ctx.needs_input_grad[2]
        found = native.interval_linear_backward_adjoint(
            mid_grad, rad_grad, mid, rad, weight, state, need_box, need_weight
        )
        if found is not None:
            return *found, None, None
    mid, rad, gate = _gated(mid, rad, state)
    weight_grad = None
    box_grad: Any = (None, None)
    if ctx.needs_input_grad[2]:  # the roles of input and output gradient are exchanged
        weight_grad = _weight_gradient("interval_linear_weight", mid, rad, mid_grad, rad_grad, weight)
    del mid, rad  # free the gated copies before more is allocated
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
        if has_kernels(weight):
            box_grad = call(interval_linear, *_both(mid_grad, rad_grad), weight, None, False)[:2]
        else:
            box_grad = (
                None if mid_grad is None else mid_grad @ weight.t(),
                None if rad_grad is None else rad_grad @ weight.abs().t(),
            )
        box_grad = _ungate(box_grad[0], box_grad[1], gate)
    return *box_grad, weight_grad, *(None,) * 2


interval_linear_backward = define(
    "interval_linear_backward(Tensor mid, Tensor rad, Tensor weight, Tensor? state, int rounding=0) -> "
    "(Tensor, Tensor)",
    lambda mid, rad, weight, state, rounding=0: (
        mid.new_empty(*mid.shape[:-1], weight.shape[1]),
        mid.new_empty(*mid.shape[:-1], weight.shape[1]),
    ),
    _linear_data_backward,
    _data_setup,
)


# --- interval_conv2d ----------------------------------------------------------------------------------------


def _conv2d_fake(mid, rad, weight, bias, stride, padding, dilation, groups, relu, rounding=0):  # type: ignore[no-untyped-def]
    _check_weight(mid, weight)
    sides = output_size(mid.shape[2:], weight.shape[2:], stride, padding, dilation)
    out = _like(mid, (mid.shape[0], weight.shape[0], *sides))
    return out, torch.empty_like(out), _bits(out, relu)


def _conv2d_backward(ctx: Any, mid_grad: Tensor | None, rad_grad: Tensor | None, *_: Any) -> Any:
    mid, rad, weight, state = ctx.saved_tensors  # read once: checkpointing refuses a second time
    need_mid, need_rad, need_weight, need_bias = ctx.needs_input_grad[:4]
    if ctx.relu:
        mid_grad, rad_grad = _gate_adjoint(mid_grad, rad_grad, state)
    args = ctx.args[:4]
    if need_mid and need_rad and (has_kernels(weight) or (mid_grad is not None and rad_grad is not None)):
        both = _both(mid_grad, rad_grad)
        box_grad = call(interval_conv2d_backward, *both, weight, None, ctx.input_size, *args)
    else:
        conv2d_input = reference.conv2d_input
        box_grad = (
            conv2d_input(mid_grad, weight, ctx.input_size, *args) if need_mid and mid_grad is not None else None,
            conv2d_input(rad_grad, weight.abs(), ctx.input_size, *args) if need_rad and rad_grad is not None else None,
        )
    return (
        *box_grad,
        _weight_gradient("interval_conv2d_weight", mid_grad, rad_grad, mid, rad, weight, *args)
        if need_weight
        else None,
        mid_grad.sum((0, 2, 3)) if need_bias and mid_grad is not None else None,
        *(None,) * 6,
    )


interval_conv2d = define(
    "interval_conv2d(Tensor mid, Tensor rad, Tensor weight, Tensor? bias, int[] stride, int[] padding, "
    "int[] dilation, int groups, bool relu, int rounding=0) -> (Tensor, Tensor, Tensor)",
    _conv2d_fake,
    _conv2d_backward,
    _affine_setup,
)


# --- interval_conv2d_gate: a convolution, then a gate ------------------------------------------------------


def _conv2d_gate_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    mid, rad, weight, gate, *ctx.args = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(mid, rad, weight, gate)
    ctx.relu, ctx.input_size = True, mid.shape  # the derivative of a gate is that of ReLU


interval_conv2d_gate = define(
    "interval_conv2d_gate(Tensor mid, Tensor rad, Tensor weight, Tensor gate, int[] stride, int[] padding, "
    "int[] dilation, int groups) -> (Tensor, Tensor)",
    lambda mid, rad, weight, gate, stride, padding, dilation, groups: tuple(
        _like(out, bits=gate)
        for out in _conv2d_fake(mid, rad, weight, None, stride, padding, dilation, groups, False)[:2]
    ),
    _conv2d_backward,
    _conv2d_gate_setup,
)


# --- interval_conv2d_backward -------------------------------------------------------------------------------


def _conv2d_data_backward(ctx: Any, mid_grad: Tensor | None, rad_grad: Tensor | None) -> Any:
    mid, rad, weight, state = ctx.saved_tensors
    mid, rad, gate = _gated(mid, rad, state)
    args = ctx.args[1:5]
    mid_grad, rad_grad, weight_grad = _conv2d_data_weight(ctx, mid_grad, rad_grad, mid, rad, weight, args)
    del mid, rad  # free the gated copies before more is allocated
    return *_conv2d_data_box(ctx, mid_grad, rad_grad, weight, gate, args), weight_grad, *(None,) * 7


def _conv2d_data_weight(
    ctx: Any, mid_grad: Tensor | None, rad_grad: Tensor | None, mid: Tensor, rad: Tensor, weight: Tensor, args: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients in the box's own order, and the gradient of the weight if it is needed."""
    # The results are gated in that order, and channels-last convolutions are the faster ones.
    mid_grad, rad_grad = (None if grad is None else dense(mid, grad)[1] for grad in (mid_grad, rad_grad))
    if not ctx.needs_input_grad[2]:
        return mid_grad, rad_grad, None
    # The roles of input and output gradient are exchanged.
    return mid_grad, rad_grad, _weight_gradient("interval_conv2d_weight", mid, rad, mid_grad, rad_grad, weight, *args)


def _conv2d_data_box(
    ctx: Any, mid_grad: Tensor | None, rad_grad: Tensor | None, weight: Tensor, gate: Tensor | None, args: Any
) -> Any:
    """The gradient of the box if it is needed, gated if there is a gate."""
    if not (ctx.needs_input_grad[0] or ctx.needs_input_grad[1]):
        return None, None
    if gate is not None and has_kernels(weight):
        return call(interval_conv2d_gate, *_both(mid_grad, rad_grad), weight, gate, *args)
    if has_kernels(weight) or (mid_grad is not None and rad_grad is not None):
        box_grad = call(interval_conv2d, *_both(mid_grad, rad_grad), weight, None, *args, False)[:2]
    else:
        box_grad = (
            None if mid_grad is None else torch.conv2d(mid_grad, weight, None, *args),
            None if rad_grad is None else torch.conv2d(rad_grad, weight.abs(), None, *args),
        )
    return _ungate(box_grad[0], box_grad[1], gate)


interval_conv2d_backward = define(
    "interval_conv2d_backward(Tensor mid, Tensor rad, Tensor weight, Tensor? state, int[] input_size, "
    "int[] stride, int[] padding, int[] dilation, int groups, int rounding=0) -> (Tensor, Tensor)",
    lambda mid, rad, weight, state, input_size, *args: (
        _like(mid, input_size, state),
        _like(mid, input_size, state),
    ),
    _conv2d_data_backward,
    _data_setup,
)


# --- interval_conv2d_backward_relu: the same, then ReLU′ as an epilogue -------------------------------------


def _conv2d_data_relu_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    mid, rad, weight, state, _, *ctx.args, before, gated = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    box = (mid, rad) if ctx.needs_input_grad[2] else (None, None)
    ctx.save_for_backward(*box, weight, before, None if state is None or gated else output[2])


def _conv2d_data_relu_backward(ctx: Any, mid_grad: Tensor | None, rad_grad: Tensor | None, _: Any) -> Any:
    mid, rad, weight, before, after = ctx.saved_tensors
    if after is not None:
        mid_grad, rad_grad = _gate_adjoint(mid_grad, rad_grad, after)
    if before is not None and mid is not None and torch.is_grad_enabled():
        # A second derivative also reaches the box through the weight's gradient, and must be gated there.
        mid, rad = interval_gate(mid, rad, before)
    mid_grad, rad_grad, weight_grad = _conv2d_data_weight(ctx, mid_grad, rad_grad, mid, rad, weight, ctx.args)
    return *_conv2d_data_box(ctx, mid_grad, rad_grad, weight, before, ctx.args), weight_grad, *(None,) * 8


# `gate`: the gate that has been applied to the box. `gated`: gradients of the results are gated already. See above
# interval_relu.
interval_conv2d_backward_relu = define(
    "interval_conv2d_backward_relu(Tensor mid, Tensor rad, Tensor weight, Tensor? state, int[] input_size, "
    "int[] stride, int[] padding, int[] dilation, int groups, Tensor? gate, bool gated) -> "
    "(Tensor, Tensor, Tensor)",
    lambda mid, rad, weight, state, input_size, *_: (
        _like(mid, input_size, state),
        _like(mid, input_size, state),
        mid.new_empty(0, dtype=torch.uint8) if state is None else torch.empty_like(state),
    ),
    _conv2d_data_relu_backward,
    _conv2d_data_relu_setup,
    unseen=2,
)


# --- interval_scale_shift -----------------------------------------------------------------------------------


def _scale_shift_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    mid, rad, scale = inputs[:3]
    scale_rad = inputs[4] if len(inputs) > 4 else None  # arguments at their defaults are left out
    need_box = ctx.needs_input_grad[2] or scale_rad is not None
    ctx.save_for_backward(*(mid, rad) if need_box else (None, None), scale, scale_rad)


def _scale_shift_backward(ctx: Any, mid_grad: Tensor | None, rad_grad: Tensor | None) -> Any:
    mid, rad, scale, scale_rad = ctx.saved_tensors
    needs = (*ctx.needs_input_grad, False, False, False)
    need_mid, need_rad, need_scale, need_shift, need_scale_rad, need_shift_rad = needs[:6]
    some = mid_grad if mid_grad is not None else rad_grad
    assert some is not None
    mid_grad, rad_grad = _both(mid_grad, rad_grad)
    others = [0, *range(2, some.dim())]
    per_channel = [1, -1] + [1] * (some.dim() - 2)
    to_mid, to_rad = mid_grad * scale.reshape(per_channel), rad_grad * scale.abs().reshape(per_channel)
    if scale_rad is not None:  # rad' also holds scale_rad·(|mid| + rad)
        spread = rad_grad * scale_rad.reshape(per_channel)
        to_mid, to_rad = to_mid + spread * mid.sign(), to_rad + spread
    return (
        to_mid if need_mid else None,
        to_rad if need_rad else None,
        (mid_grad * mid).sum(others) + scale.sign() * (rad_grad * rad).sum(others) if need_scale else None,
        mid_grad.sum(others) if need_shift else None,
        (rad_grad * (mid.abs() + rad)).sum(others) if need_scale_rad else None,
        rad_grad.sum(others) if need_shift_rad else None,
        None,
    )


interval_scale_shift = define(
    "interval_scale_shift(Tensor mid, Tensor rad, Tensor scale, Tensor? shift, Tensor? scale_rad=None, "
    "Tensor? shift_rad=None, int rounding=0) -> (Tensor, Tensor)",
    lambda mid, rad, *_: (_like(mid), _like(mid)),
    _scale_shift_backward,
    _scale_shift_setup,
)


# --- interval_mul -------------------------------------------------------------------------------------------


def _mul_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:4])


def _mul_backward(ctx: Any, mid_grad: Tensor | None, rad_grad: Tensor | None) -> Any:
    a_mid, a_rad, b_mid, b_rad = ctx.saved_tensors
    mid_grad, rad_grad = _both(mid_grad, rad_grad)
    return *reference.interval_mul_adjoint(mid_grad, rad_grad, a_mid, a_rad, b_mid, b_rad), None


interval_mul = define(
    "interval_mul(Tensor a_mid, Tensor a_rad, Tensor b_mid, Tensor b_rad, int rounding=0) -> (Tensor, Tensor)",
    lambda a_mid, a_rad, b_mid, b_rad, rounding=0: (_like(a_mid), _like(a_mid)),
    _mul_backward,
    _mul_setup,
)


# --- interval_smooth, interval_smooth_backward; their adjoints are operators, too ---------------------------


def _smooth_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    *box, ctx.name, ctx.params = inputs
    ctx.save_for_backward(*box)


def _smooth_gradient(ctx: Any, mid_grad: Tensor | None, rad_grad: Tensor | None) -> Any:
    box = ctx.saved_tensors
    mid_grad, rad_grad = _both(mid_grad, rad_grad)
    adjoint = interval_smooth_adjoint if len(box) == 2 else interval_smooth_backward_adjoint
    return *call(adjoint, mid_grad, rad_grad, *box, ctx.name, ctx.params), None, None


def _boxes_like(first: Tensor, boxes: int) -> tuple[Tensor, ...]:
    return tuple(_like(first) for _ in range(2 * boxes))


interval_smooth = define(
    "interval_smooth(Tensor mid, Tensor rad, str name, float[] params) -> (Tensor, Tensor)",
    lambda mid, rad, name, params: _boxes_like(mid, 1),
    _smooth_gradient,
    _smooth_setup,
)

interval_smooth_backward = define(
    "interval_smooth_backward(Tensor grad_mid, Tensor grad_rad, Tensor mid, Tensor rad, str name, float[] params) -> "
    "(Tensor, Tensor)",
    lambda grad_mid, grad_rad, mid, rad, name, params: _boxes_like(grad_mid, 1),
    _smooth_gradient,
    _smooth_setup,
)


def _no_second_derivative(name: str) -> Callable[..., Any]:
    def refuse(ctx: Any, *grads: Tensor | None) -> Any:
        raise NotImplementedError(f"{name} has no second derivative.")

    return refuse


interval_smooth_adjoint = define(
    "interval_smooth_adjoint(Tensor mid_grad, Tensor rad_grad, Tensor mid, Tensor rad, str name, float[] params) -> "
    "(Tensor, Tensor)",
    lambda mid_grad, rad_grad, mid, rad, name, params: _boxes_like(mid_grad, 1),
    _no_second_derivative("The fused range of a smooth activation"),
    lambda ctx, inputs, output: None,
)

interval_smooth_backward_adjoint = define(
    "interval_smooth_backward_adjoint(Tensor mid_grad, Tensor rad_grad, Tensor grad_mid, Tensor grad_rad, Tensor mid, "
    "Tensor rad, str name, float[] params) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda mid_grad, *_: _boxes_like(mid_grad, 2),
    _no_second_derivative("The fused range of a smooth activation's slope"),
    lambda ctx, inputs, output: None,
)


# --- interval_max_pool2d, interval_first_maximum, interval_max_pool2d_backward ------------------------------


def _max_pool_fake(mid: Tensor, rad: Tensor, *geometry: Any) -> tuple[Tensor, Tensor]:
    shape = torch.ops.aten.max_pool2d_with_indices(mid, *geometry)[0].shape
    return _like(mid, shape), _like(mid, shape)


def _max_pool_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.geometry = inputs[2:]


def _max_pool_backward(ctx: Any, mid_grad: Tensor | None, rad_grad: Tensor | None) -> Any:
    """The gradient of each end goes to the element that this end came from."""
    mid, rad = ctx.saved_tensors
    mid_grad, rad_grad = _both(mid_grad, rad_grad)
    pool = torch.ops.aten.max_pool2d_with_indices
    ends = []
    for end, grad in ((mid - rad, (mid_grad - rad_grad) * 0.5), (mid + rad, (mid_grad + rad_grad) * 0.5)):
        indices = pool(end, *ctx.geometry)[1]
        ends.append(torch.ops.aten.max_pool2d_with_indices_backward(grad, end, *ctx.geometry, indices))
    lower, upper = ends
    return lower + upper, upper - lower, *(None,) * 5


interval_max_pool2d = define(
    "interval_max_pool2d(Tensor mid, Tensor rad, int[] kernel, int[] stride, int[] padding, int[] dilation, "
    "bool ceil_mode) -> (Tensor, Tensor)",
    _max_pool_fake,
    _max_pool_backward,
    _max_pool_setup,
)


def _first_maximum_fake(mid: Tensor, rad: Tensor, size: Any, *_: Any) -> tuple[Tensor, Tensor]:
    shape, order = (*mid.shape[:2], *size), memory_format(mid)
    must = torch.empty(shape, dtype=torch.int32, device=mid.device, memory_format=order)
    return must, torch.empty_like(must)


# Integers carry no gradient, so where only these are used, the image needs no derivative.
interval_first_maximum = define(
    "interval_first_maximum(Tensor mid, Tensor rad, int[] size, int[] kernel, int[] stride, int[] padding, "
    "int[] dilation) -> (Tensor, Tensor)",
    _first_maximum_fake,
    lambda ctx, *_: (None,) * 7,
    lambda ctx, inputs, output: ctx.mark_non_differentiable(*output),
)


def _unpool_fake(mid: Tensor, rad: Tensor, must: Tensor, may: Tensor, size: Any, *_: Any) -> tuple[Tensor, Tensor]:
    shape = (*mid.shape[:2], *size)
    out = torch.empty(shape, dtype=mid.dtype, device=mid.device, memory_format=memory_format(must))
    return out, torch.empty_like(out)


def _unpool_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.geometry = inputs[5:]


def _unpool_backward(ctx: Any, mid_grad: Tensor | None, rad_grad: Tensor | None) -> Any:
    box = ctx.saved_tensors
    mid_grad, rad_grad = _both(mid_grad, rad_grad)
    return *call(interval_max_pool2d_gather, mid_grad, rad_grad, *box, *ctx.geometry), *(None,) * 7


interval_max_pool2d_backward = define(
    "interval_max_pool2d_backward(Tensor mid, Tensor rad, Tensor must, Tensor may, int[] size, int[] kernel, "
    "int[] stride, int[] padding, int[] dilation) -> (Tensor, Tensor)",
    _unpool_fake,
    _unpool_backward,
    _unpool_setup,
)


def _gather_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.geometry = inputs[6:]


def _gather_backward(ctx: Any, mid_grad: Tensor | None, rad_grad: Tensor | None) -> Any:
    """Linear in (mid, rad), and only there differentiable: what autograd makes of the reference, in one piece."""
    mid, rad, *rest = ctx.saved_tensors

    def gather(mid: Tensor, rad: Tensor) -> tuple[Tensor, Tensor]:
        return reference.interval_max_pool2d_gather(mid, rad, *rest, *ctx.geometry)

    return *torch.func.vjp(gather, mid, rad)[1](_both(mid_grad, rad_grad)), *(None,) * 8


interval_max_pool2d_gather = define(
    "interval_max_pool2d_gather(Tensor mid, Tensor rad, Tensor grad_mid, Tensor grad_rad, Tensor must, Tensor may, "
    "int[] kernel, int[] stride, int[] padding, int[] dilation) -> (Tensor, Tensor)",
    lambda mid, rad, grad_mid, *_: (_like(grad_mid), _like(grad_mid)),
    _gather_backward,
    _gather_setup,
)


# --- check_target: the only check that reads values, and therefore part of the captured program ----------

# Not tagged as unsafe in CUDA graphs, or Inductor would cut its graphs there: when captured, it checks on the device.
library.define("check_target(Tensor target, int classes) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


_READ_AT_ONCE = 64  # up to so many integers are compared faster in Python


def _check_target(target: Tensor, classes: int) -> Tensor:
    if target.device.type == "cpu" and target.numel() <= _READ_AT_ONCE:
        fits = all(0 <= label < classes for label in target.flatten().tolist())
    else:
        outside = (target < 0) | (target >= classes)
        fits = not any_wrong(outside, f"A target is out of range: the model has {classes} outputs.")
    if not fits:
        wrong = (target < 0) | (target >= classes)
        index = int(wrong.nonzero()[0])
        single = "; for a model with one output pass target=None" if classes == 1 else ""
        raise ValueError(
            f"target[{index}] = {int(target[index])} is out of range: the model has {classes} outputs, so targets "
            f"must lie in 0 … {classes - 1} ({int(wrong.sum())} of {target.numel()} do not){single}."
        )
    return target.clone()  # operators must not return an argument


library.impl("check_target", _check_target, "CompositeExplicitAutograd")
torch.library.register_fake("pyxai_bounds::check_target", lambda target, classes: torch.empty_like(target), lib=library)
check_target = torch.ops.pyxai_bounds.check_target.default
undispatched[check_target] = _check_target


# --- interval_matmul: two products of two boxes, Rump's and the exact one -----------------------------------


def _matmul_fake(a_mid: Tensor, a_rad: Tensor, b_mid: Tensor, b_rad: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    reference.check_matmul(a_mid, a_rad, b_mid, b_rad)
    out = a_mid.new_empty(*a_mid.shape[:-1], b_mid.shape[-1])
    return out, torch.empty_like(out)


def _matmul_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.exact = inputs[4]


def _matmul_backward(ctx: Any, mid_grad: Tensor | None, rad_grad: Tensor | None) -> Any:
    a_mid, a_rad, b_mid, b_rad = ctx.saved_tensors
    mid_grad, rad_grad = _both(mid_grad, rad_grad)
    if ctx.exact:
        return *interval_matmul_backward(mid_grad, rad_grad, a_mid, a_rad, b_mid, b_rad), None
    need = ctx.needs_input_grad
    return (
        mid_grad @ b_mid.mT + a_mid.sign() * (rad_grad @ b_rad.mT) if need[0] else None,
        rad_grad @ (b_mid.abs() + b_rad).mT if need[1] else None,
        a_mid.mT @ mid_grad + b_mid.sign() * (a_rad.mT @ rad_grad) if need[2] else None,
        (a_mid.abs() + a_rad).mT @ rad_grad if need[3] else None,
        None,
    )


interval_matmul = define(
    "interval_matmul(Tensor a_mid, Tensor a_rad, Tensor b_mid, Tensor b_rad, bool exact) -> (Tensor, Tensor)",
    _matmul_fake,
    _matmul_backward,
    _matmul_setup,
)


interval_matmul_backward = define(
    "interval_matmul_backward(Tensor mid_grad, Tensor rad_grad, Tensor a_mid, Tensor a_rad, Tensor b_mid, "
    "Tensor b_rad) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda mid_grad, rad_grad, a_mid, a_rad, b_mid, b_rad: tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in (a_mid, a_rad, b_mid, b_rad)
    ),
    _no_second_derivative("The exact interval matrix product (use the Rump product, exact=False)"),
    lambda ctx, inputs, output: None,
)


__all__ = [
    "BACKENDS",
    "available",
    "backend",
    "check_target",
    "forced",
    "has_kernels",
    "interval_conv2d",
    "interval_conv2d_backward",
    "interval_conv2d_backward_relu",
    "interval_conv2d_gate",
    "interval_conv2d_weight",
    "interval_first_maximum",
    "interval_gate",
    "interval_linear",
    "interval_linear_backward",
    "interval_linear_weight",
    "interval_matmul",
    "interval_matmul_backward",
    "interval_max_pool2d",
    "interval_max_pool2d_backward",
    "interval_max_pool2d_gather",
    "interval_mul",
    "interval_relu",
    "interval_relu_backward",
    "interval_scale_shift",
    "interval_smooth",
    "interval_smooth_adjoint",
    "interval_smooth_backward",
    "interval_smooth_backward_adjoint",
    "needs_dispatcher",
    "recorded",
    "undispatched",
]
