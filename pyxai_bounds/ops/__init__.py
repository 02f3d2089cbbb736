"""The fused interval operators: schema, shape inference and autograd, once for all backends.

Each operator is ``torch.ops.pyxai_bounds.<name>`` and takes and returns midpoints and radii. What it
computes is said, and done in plain PyTorch, by the function of the same name in ``reference.py``.
Backends are chosen when an operator runs: see :func:`backend`.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.nn import Parameter

from pyxai_bounds.errors import any_wrong
from pyxai_bounds.ops import cuda, native, reference, triton
from pyxai_bounds.ops.layout import dense, memory_format, order_of, state_size
from pyxai_bounds.rounding import Rounding, check_dtype, without_autocast

BACKENDS: dict[str, ModuleType] = {"reference": reference, "native": native, "triton": triton, "cuda": cuda}
_forced: contextvars.ContextVar[str] = contextvars.ContextVar("pyxai_bounds_backend", default="auto")


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the fused operators on one backend inside the ``with`` block.

    ``reference`` plain PyTorch, any device and dtype; ``native`` C++, CPU, float32 and float64; ``triton`` GPU
    kernels, NVIDIA, floating point of 16 to 64 bits; ``cuda`` CUDA C++, NVIDIA, float32 and float64: outward rounding
    and exact products of boxes, all else as ``reference``; ``auto`` (the default) the fastest one that supports the
    tensors, which on a GPU is measured for every kind of matrix product: the kernel of ``triton``, or cuBLAS or cuDNN.
    Where bounds are rounded outward it takes ``native`` or ``cuda``.
    Raises ValueError for an unknown name, RuntimeError for one that is not available here.
    """
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"Unknown backend {name!r}; choose auto, {', '.join(BACKENDS)}.")
    if name not in ("auto", *available()):
        raise RuntimeError(BACKENDS[name].why_not_available())
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def available() -> list[str]:
    """The names of the backends that can run here."""
    return ["reference", *(name for name in ("native", "triton", "cuda") if BACKENDS[name].available())]


def forced() -> str:
    """The backend that a ``with backend(…)`` block has chosen; auto outside of any."""
    return _forced.get()


def _select(mid: Tensor) -> Any:
    name = _forced.get()
    if name == "auto":
        if mid.is_cuda:
            return triton.measured if triton.supports(mid) else reference
        return native if native.supports(mid) else reference
    chosen = BACKENDS[name]
    if not chosen.supports(mid):
        raise ValueError(
            f"The {name} backend does not support {mid.dtype} tensors on {mid.device}; "
            "use xb.backend('auto') or xb.backend('reference')."
        )
    return chosen


def _select_outward(mid: Tensor) -> Any:
    """The backend for outward rounding: ``native`` on the CPU and ``cuda`` on a GPU, where they run and are not ruled
    out, else ``reference``.
    """
    check_dtype(mid.dtype)
    forced = _forced.get()
    if forced == "cuda":
        return _select(mid)
    if forced in ("auto", "native") and native.supports(mid):
        return native
    return cuda if forced == "auto" and cuda.supports(mid) else reference


_library = torch.library.Library("pyxai_bounds", "DEF")

# What each operator runs, without PyTorch's dispatcher: on plain tensors and without gradients the same, sooner (of
# 30 us for a product of one box with a 256 x 256 weight 19 were the dispatcher's).
undispatched: dict[Any, Callable[..., Any]] = {}

# The same where gradients are on: one node of autograd, made by PyTorch's C++ around the derivative given here (of a
# training step of 1.3 ms, 784-256-256-10 at batch 1, the dispatcher's nodes took 0.15).
recorded: dict[Any, Callable[..., Any]] = {}


def needs_dispatcher(*tensors: Tensor) -> bool:
    """Is something at work that must see operators: torch.compile, a mode, a transform, a subclass of Tensor?"""
    return (
        torch.compiler.is_compiling()
        or not all(type(t) is Tensor or type(t) is Parameter for t in tensors)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def _by_native(grad: Tensor | None) -> TypeGuard[Tensor]:
    """May a derivative with this gradient be one call of the native backend? Not if a second one will be asked for."""
    return grad is not None and not torch.is_grad_enabled() and not needs_dispatcher(grad) and _select(grad) is native


def _call(operator: Any, *args: Any) -> Any:
    """An operator inside a derivative: only a second derivative needs autograd to see it."""
    if torch.is_grad_enabled() or needs_dispatcher(args[0]):
        return operator(*args)
    return undispatched[operator](*args)


def _define(
    signature: str, fake: Callable[..., Any], backward: Callable, setup_context: Callable, unseen: int = 0
) -> Any:
    """Define one operator; its implementation is looked up in the selected backend at each call.

    The backward pass runs on the backend of the forward pass: autograd's threads do not know who forced which. The last
    arguments, ``unseen`` of them, concern the derivative alone: no backend sees them.
    """
    name, arguments = signature.split(")")[0].split("(")
    names = [argument.split()[-1] for argument in arguments.split(", ")[1:]]
    rounding_at = names.index("rounding=0") if "rounding=0" in names else None
    seen = len(names) - unseen
    _library.define(signature, tags=(torch.Tag.pt2_compliant_tag,))

    def run(mid: Tensor, *args: Any) -> Any:
        # How an operator rounds is the last that a backend sees (the dispatcher leaves it out where it is the default).
        if rounding_at is not None and len(args) > rounding_at and args[rounding_at] != Rounding.NEAREST:
            return getattr(_select_outward(mid), name)(mid, *args[:seen])
        return getattr(_select(mid), name, getattr(reference, name))(
            mid, *args[: seen if rounding_at is None else rounding_at]
        )

    def remember(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.backend = _forced.get()
        setup_context(ctx, inputs, output)

    def run_backward(ctx: Any, *grads: Any) -> Any:
        if all(grad is None for grad in grads[:2]):  # of midpoint and radius; packed bits have none
            return (None,) * len(ctx.needs_input_grad)
        token = _forced.set(ctx.backend)
        try:
            with without_autocast():
                return backward(ctx, *grads)
        finally:
            _forced.reset(token)

    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pyxai_bounds::{name}", fake, lib=_library)
    torch.library.register_autograd(f"pyxai_bounds::{name}", run_backward, setup_context=remember, lib=_library)
    operator = getattr(torch.ops.pyxai_bounds, name).default
    undispatched[operator] = run
    recorded[operator] = _recording(name, run, remember, run_backward)
    return operator


def _recording(name: str, run: Callable[..., Any], setup_context: Callable, backward: Callable) -> Callable[..., Any]:
    def forward(ctx: Any, *inputs: Any) -> Any:
        output = run(*inputs)
        setup_context(ctx, inputs, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(name, (torch.autograd.Function,), members)

    def record(*inputs: Any) -> Any:
        return function.apply(*inputs)

    return record


def _like(t: Tensor, shape: Any = None, bits: Tensor | None = None) -> Tensor:
    """Uninitialised, in the memory order of the bits if there are any, else of the tensor."""
    order = memory_format(t) if bits is None else order_of(bits)
    return torch.empty(t.shape if shape is None else shape, dtype=t.dtype, device=t.device, memory_format=order)


def _bits(t: Tensor, present: bool = True) -> Tensor:
    return torch.empty(state_size(t) if present else 0, dtype=torch.uint8, device=t.device)


def _both(mid_grad: Tensor | None, rad_grad: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gradients of both halves: zeros for the one that is left out because the loss does not use it."""
    some = rad_grad if mid_grad is None else mid_grad
    assert some is not None  # `_define` sees to it
    return tuple(torch.zeros_like(some) if grad is None else grad for grad in (mid_grad, rad_grad))  # type: ignore[return-value]


# --- interval_gate: lower' = a·lower, upper' = b·upper; symmetric, so it is its own adjoint ---------------


def _gate_setup(ctx: Any, inputs: tuple, output: Any) -> None:
    ctx.save_for_backward(inputs[2])


def _gate_adjoint(mid_grad: Tensor | None, rad_grad: Tensor | None, gate: Tensor) -> Any:
    return _call(interval_gate, *_both(mid_grad, rad_grad), gate)


def _gate_backward(ctx: Any, mid_grad: Tensor, rad_grad: Tensor) -> Any:
    return *_gate_adjoint(mid_grad, rad_grad, ctx.saved_tensors[0]), None


interval_gate = _define(
    "interval_gate(Tensor mid, Tensor rad, Tensor gate) -> (Tensor, Tensor)",
    lambda mid, rad, gate: (_like(mid, bits=gate), _like(mid, bits=gate)),
    _gate_backward,
    _gate_setup,
)


# --- interval_relu, interval_relu_backward: their derivative is the gate they applied ----------------------

# A gate costs nothing as an epilogue of the product that makes what it is applied to. And a gated box stays the same
# if it is gated again, so that its reader may be told the gate and return gradients that are gated already (see
# interval_conv2d_backward_relu). `gated` says that all gradients of a result come from such readers, and are not to be
# gated here: `fuse` says so where a box has one reader and no other use.


def _relu_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.mark_non_differentiable(output[2])
    gated = len(inputs) > 4 and inputs[4]
    ctx.save_for_backward(None if gated else output[2])
    ctx.nones = (None,) * (len(inputs) - 2)


def _relu_backward(ctx: Any, mid_grad: Tensor, rad_grad: Tensor, _: Any) -> Any:
    (gate,) = ctx.saved_tensors
    box_grad = (mid_grad, rad_grad) if gate is None else _gate_adjoint(mid_grad, rad_grad, gate)
    return *box_grad, *ctx.nones


interval_relu = _define(
    "interval_relu(Tensor mid, Tensor rad, int rounding=0) -> (Tensor, Tensor, Tensor)",
    lambda mid, rad, rounding=0: (_like(mid), _like(mid), _bits(mid)),
    _relu_backward,
    _relu_setup,
)

interval_relu_backward = _define(
    "interval_relu_backward(Tensor mid, Tensor rad, Tensor state, int rounding=0, bool gated=False) -> "
    "(Tensor, Tensor, Tensor)",
    lambda mid, rad, state, *_: (_like(mid, bits=state), _like(mid, bits=state), torch.empty_like(state)),
    _relu_backward,
    _relu_setup,
    unseen=1,
)


def has_kernels(t: Tensor) -> bool:
    """Does the backend of this tensor fuse what is several passes in plain PyTorch, on the way back too?"""
    return _select(t) not in (reference, native, cuda)


# --- interval_linear_weight: gradᵀ·mid + sign(W) ⊙ (grad_radᵀ·rad); no derivative in W ---------------------


def _weight_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.args = inputs[5:]


def _linear_weight_backward(ctx: Any, weight_grad: Tensor) -> Any:
    grad_mid, grad_rad, mid, rad, weight = ctx.saved_tensors
    signed = weight_grad * weight.sign()
    return mid @ weight_grad.t(), rad @ signed.t(), grad_mid @ weight_grad, grad_rad @ signed, None


interval_linear_weight = _define(
    "interval_linear_weight(Tensor grad_mid, Tensor grad_rad, Tensor mid, Tensor rad, Tensor weight) -> Tensor",
    lambda grad_mid, grad_rad, mid, rad, weight: _like(weight),
    _linear_weight_backward,
    _weight_setup,
)


def _weight_gradient(name: str, grad_mid: Any, grad_rad: Any, mid: Any, rad: Any, *rest: Any) -> Tensor:
    """A product of midpoints plus a signed one of radii; a product with a factor that is None is left out."""
    weight = rest[0]
    if has_kernels(weight):
        operator = getattr(torch.ops.pyxai_bounds, name).default
        return _call(operator, *_both(grad_mid, grad_rad), *_both(mid, rad), *rest)
    # Plain PyTorch where autograd or a trace must see it.
    seen = torch.is_grad_enabled() or needs_dispatcher(weight)
    return getattr(reference if seen else _select(weight), name)(grad_mid, grad_rad, mid, rad, *rest)


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


interval_conv2d_weight = _define(
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
    """Save what the weight gradient needs, and of ReLU the packed state alone."""
    mid, rad, weight, _, *ctx.args = inputs
    ctx.set_materialize_grads(False)  # half of the products are left out where a loss reads radii alone
    ctx.mark_non_differentiable(output[2])
    if not ctx.needs_input_grad[2]:
        mid = rad = None  # only the weight's gradient depends on the box
    ctx.save_for_backward(mid, rad, weight, output[2])
    ctx.relu = next(arg for arg in ctx.args if isinstance(arg, bool))
    ctx.input_size = inputs[0].shape


def _linear_backward(ctx: Any, mid_grad: Tensor | None, rad_grad: Tensor | None, _: Any) -> Any:
    mid, rad, weight, state = ctx.saved_tensors
    need_mid, need_rad, need_weight, need_bias = ctx.needs_input_grad[:4]
    if need_weight and _by_native(rad_grad):
        needs = (need_mid or need_rad, need_weight, need_bias)
        found = native.interval_linear_adjoint(
            mid_grad, rad_grad, mid, rad, weight, state if ctx.relu else None, *needs
        )  # fmt: skip
        if found is not None:
            return *found, None, None
    if ctx.relu:
        mid_grad, rad_grad = _gate_adjoint(mid_grad, rad_grad, state)
    if need_mid and need_rad and has_kernels(weight):
        box_grad = _call(interval_linear_backward, *_both(mid_grad, rad_grad), weight, None)
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


interval_linear = _define(
    "interval_linear(Tensor mid, Tensor rad, Tensor weight, Tensor? bias, bool relu, int rounding=0) -> "
    "(Tensor, Tensor, Tensor)",
    _linear_fake,
    _linear_backward,
    _affine_setup,
)


# --- interval_linear_backward: ReLU′ prologue, then mid' = mid·W, rad' = rad·|W| ---------------------------


def _data_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    """Keep the box before the prologue and its two bits: the gated box is made again when it is needed."""
    mid, rad, weight, state, *ctx.args = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(mid, rad, weight, state)


def _gated(mid: Tensor, rad: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    return (mid, rad, None) if state is None else _call(interval_relu_backward, mid, rad, state)


def _ungate(mid_grad: Tensor | None, rad_grad: Tensor | None, gate: Tensor | None) -> Any:
    """The gate's adjoint, on gradients that were computed a moment ago and that nobody else refers to."""
    if gate is None:
        return mid_grad, rad_grad
    if _by_native(rad_grad):
        return native.gate_in_place(mid_grad, rad_grad, gate)
    return _gate_adjoint(mid_grad, rad_grad, gate)


def _linear_data_backward(ctx: Any, mid_grad: Tensor | None, rad_grad: Tensor | None) -> Any:
    mid, rad, weight, state = ctx.saved_tensors
    if _by_native(rad_grad):
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
    del mid, rad  # the gated copies: the rest takes their place in memory
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
        if has_kernels(weight):
            box_grad = _call(interval_linear, *_both(mid_grad, rad_grad), weight, None, False)[:2]
        else:
            box_grad = (
                None if mid_grad is None else mid_grad @ weight.t(),
                None if rad_grad is None else rad_grad @ weight.abs().t(),
            )
        box_grad = _ungate(box_grad[0], box_grad[1], gate)
    return *box_grad, weight_grad, *(None,) * 2


interval_linear_backward = _define(
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
    shape = [mid.shape[0], weight.shape[0]]
    for size, kernel, s, p, d in zip(mid.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True):
        shape.append((size + 2 * p - d * (kernel - 1) - 1) // s + 1)
    out = _like(mid, shape)
    return out, torch.empty_like(out), _bits(out, relu)


def _conv2d_backward(ctx: Any, mid_grad: Tensor | None, rad_grad: Tensor | None, *_: Any) -> Any:
    mid, rad, weight, state = ctx.saved_tensors  # once: who checkpoints refuses a second time
    need_mid, need_rad, need_weight, need_bias = ctx.needs_input_grad[:4]
    if ctx.relu:
        mid_grad, rad_grad = _gate_adjoint(mid_grad, rad_grad, state)
    args = ctx.args[:4]
    if need_mid and need_rad and (has_kernels(weight) or (mid_grad is not None and rad_grad is not None)):
        both = _both(mid_grad, rad_grad)
        box_grad = _call(interval_conv2d_backward, *both, weight, None, ctx.input_size, *args)
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


interval_conv2d = _define(
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
    ctx.relu, ctx.input_size = True, mid.shape  # of which the derivative is a gate, too


interval_conv2d_gate = _define(
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
    del mid, rad  # the gated copies: the rest takes their place in memory
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
        return _call(interval_conv2d_gate, *_both(mid_grad, rad_grad), weight, gate, *args)
    if has_kernels(weight) or (mid_grad is not None and rad_grad is not None):
        box_grad = _call(interval_conv2d, *_both(mid_grad, rad_grad), weight, None, *args, False)[:2]
    else:
        box_grad = (
            None if mid_grad is None else torch.conv2d(mid_grad, weight, None, *args),
            None if rad_grad is None else torch.conv2d(rad_grad, weight.abs(), None, *args),
        )
    return _ungate(box_grad[0], box_grad[1], gate)


interval_conv2d_backward = _define(
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
        # A second derivative reaches the box through the weight's gradient as well, and must be gated on that way.
        mid, rad = interval_gate(mid, rad, before)
    mid_grad, rad_grad, weight_grad = _conv2d_data_weight(ctx, mid_grad, rad_grad, mid, rad, weight, ctx.args)
    return *_conv2d_data_box(ctx, mid_grad, rad_grad, weight, before, ctx.args), weight_grad, *(None,) * 8


# `gate`: the box has been gated by it. `gated`: the gradients of the results come gated. See interval_relu_backward.
interval_conv2d_backward_relu = _define(
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


interval_scale_shift = _define(
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


interval_mul = _define(
    "interval_mul(Tensor a_mid, Tensor a_rad, Tensor b_mid, Tensor b_rad, int rounding=0) -> (Tensor, Tensor)",
    lambda a_mid, a_rad, b_mid, b_rad, rounding=0: (_like(a_mid), _like(a_mid)),
    _mul_backward,
    _mul_setup,
)


# --- interval_smooth, interval_smooth_backward: their adjoints are operators, too ---------------------------


def _smooth_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    *box, ctx.name, ctx.params = inputs
    ctx.save_for_backward(*box)


def _smooth_gradient(ctx: Any, mid_grad: Tensor | None, rad_grad: Tensor | None) -> Any:
    box = ctx.saved_tensors
    mid_grad, rad_grad = _both(mid_grad, rad_grad)
    adjoint = interval_smooth_adjoint if len(box) == 2 else interval_smooth_backward_adjoint
    return *_call(adjoint, mid_grad, rad_grad, *box, ctx.name, ctx.params), None, None


def _boxes_like(first: Tensor, boxes: int) -> tuple[Tensor, ...]:
    return tuple(_like(first) for _ in range(2 * boxes))


interval_smooth = _define(
    "interval_smooth(Tensor mid, Tensor rad, str name, float[] params) -> (Tensor, Tensor)",
    lambda mid, rad, name, params: _boxes_like(mid, 1),
    _smooth_gradient,
    _smooth_setup,
)

interval_smooth_backward = _define(
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


interval_smooth_adjoint = _define(
    "interval_smooth_adjoint(Tensor mid_grad, Tensor rad_grad, Tensor mid, Tensor rad, str name, float[] params) -> "
    "(Tensor, Tensor)",
    lambda mid_grad, rad_grad, mid, rad, name, params: _boxes_like(mid_grad, 1),
    _no_second_derivative("The fused range of a smooth activation"),
    lambda ctx, inputs, output: None,
)

interval_smooth_backward_adjoint = _define(
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
    """Each end's gradient goes to where that end was found."""
    mid, rad = ctx.saved_tensors
    mid_grad, rad_grad = _both(mid_grad, rad_grad)
    pool = torch.ops.aten.max_pool2d_with_indices
    ends = []
    for end, grad in ((mid - rad, (mid_grad - rad_grad) * 0.5), (mid + rad, (mid_grad + rad_grad) * 0.5)):
        indices = pool(end, *ctx.geometry)[1]
        ends.append(torch.ops.aten.max_pool2d_with_indices_backward(grad, end, *ctx.geometry, indices))
    lower, upper = ends
    return lower + upper, upper - lower, *(None,) * 5


interval_max_pool2d = _define(
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


# Integers end the path of the gradient: where only they are used, nothing is differentiated through the image.
interval_first_maximum = _define(
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
    return *_call(interval_max_pool2d_gather, mid_grad, rad_grad, *box, *ctx.geometry), *(None,) * 7


interval_max_pool2d_backward = _define(
    "interval_max_pool2d_backward(Tensor mid, Tensor rad, Tensor must, Tensor may, int[] size, int[] kernel, "
    "int[] stride, int[] padding, int[] dilation) -> (Tensor, Tensor)",
    _unpool_fake,
    _unpool_backward,
    _unpool_setup,
)

interval_max_pool2d_gather = _define(
    "interval_max_pool2d_gather(Tensor mid, Tensor rad, Tensor grad_mid, Tensor grad_rad, Tensor must, Tensor may, "
    "int[] kernel, int[] stride, int[] padding, int[] dilation) -> (Tensor, Tensor)",
    lambda mid, rad, grad_mid, *_: (_like(grad_mid), _like(grad_mid)),
    _no_second_derivative("The derivative of interval_max_pool2d_backward"),
    lambda ctx, inputs, output: None,
)


# --- check_target: the one check that needs the data, so it must be part of the captured program ----------

# Not tagged as unsafe in CUDA graphs, around which Inductor would cut its own: captured, it looks on the device.
_library.define("check_target(Tensor target, int classes) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


_READ_AT_ONCE = 64  # so few integers are compared sooner in Python


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
    return target.clone()  # an operator may not return its argument


_library.impl("check_target", _check_target, "CompositeExplicitAutograd")
torch.library.register_fake(
    "pyxai_bounds::check_target", lambda target, classes: torch.empty_like(target), lib=_library
)
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


interval_matmul = _define(
    "interval_matmul(Tensor a_mid, Tensor a_rad, Tensor b_mid, Tensor b_rad, bool exact) -> (Tensor, Tensor)",
    _matmul_fake,
    _matmul_backward,
    _matmul_setup,
)


interval_matmul_backward = _define(
    "interval_matmul_backward(Tensor mid_grad, Tensor rad_grad, Tensor a_mid, Tensor a_rad, Tensor b_mid, "
    "Tensor b_rad) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda mid_grad, rad_grad, a_mid, a_rad, b_mid, b_rad: tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in (a_mid, a_rad, b_mid, b_rad)
    ),
    _no_second_derivative("The exact interval matrix product (use the Rump product, exact=False)"),
    lambda ctx, inputs, output: None,
)
