"""How fused operators are defined, and which backend runs them when they are called."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.nn import Parameter

from pyxai_bounds.ops import cuda, native, reference, triton
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


def select(mid: Tensor) -> Any:
    """The backend that runs an operator on this midpoint, rounding to nearest."""
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


def select_outward(mid: Tensor) -> Any:
    """The same for outward rounding: ``native`` on the CPU, ``cuda`` on a GPU, ``reference`` where they cannot run."""
    check_dtype(mid.dtype)
    forced = _forced.get()
    if forced == "cuda":
        return select(mid)
    if forced in ("auto", "native") and native.supports(mid):
        return native
    return cuda if forced == "auto" and cuda.supports(mid) else reference


def has_kernels(t: Tensor) -> bool:
    """Does the backend of this tensor have kernels that fuse several passes of PyTorch, in derivatives too?"""
    return select(t) not in (reference, native, cuda)


library = torch.library.Library("pyxai_bounds", "DEF")

# For each operator a function that does the same on plain tensors without gradients, without PyTorch's dispatcher:
# that took 19 of the 30 us of a product of one box with a 256 x 256 weight.
undispatched: dict[Any, Callable[..., Any]] = {}

# The same where gradients are on: one autograd.Function around the operator's derivative. The dispatcher's own nodes
# took 0.15 ms of a training step of 1.3 ms (784-256-256-10, batch 1).
recorded: dict[Any, Callable[..., Any]] = {}


def needs_dispatcher(*tensors: Tensor) -> bool:
    """Must PyTorch see the operators: is there torch.compile, a mode, a transform or a subclass of Tensor at work?"""
    return (
        torch.compiler.is_compiling()
        or not all(type(t) is Tensor or type(t) is Parameter for t in tensors)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def by_native(grad: Tensor | None) -> TypeGuard[Tensor]:
    """May a derivative be one call of the native backend? Not if a second derivative may be asked for."""
    return grad is not None and not torch.is_grad_enabled() and not needs_dispatcher(grad) and select(grad) is native


def call(operator: Any, *args: Any) -> Any:
    """Run an operator inside a derivative; autograd sees it only if a second derivative may be asked for."""
    if torch.is_grad_enabled() or needs_dispatcher(args[0]):
        return operator(*args)
    return undispatched[operator](*args)


def define(
    signature: str, fake: Callable[..., Any], backward: Callable, setup_context: Callable, unseen: int = 0
) -> Any:
    """Define one operator; each call looks its implementation up in the backend that is selected then.

    The backward pass runs on the backend of the forward pass, because a ``with backend(…)`` block does not reach the
    threads of autograd. The last ``unseen`` arguments concern the derivative alone and are not passed to backends.
    """
    name, arguments = signature.split(")")[0].split("(")
    names = [argument.split()[-1] for argument in arguments.split(", ")[1:]]
    rounding_at = names.index("rounding=0") if "rounding=0" in names else None
    seen = len(names) - unseen
    library.define(signature, tags=(torch.Tag.pt2_compliant_tag,))

    def run(mid: Tensor, *args: Any) -> Any:
        # `rounding` is the last argument that backends see. The dispatcher leaves it out where it has its default.
        if rounding_at is not None and len(args) > rounding_at and args[rounding_at] != Rounding.NEAREST:
            return getattr(select_outward(mid), name)(mid, *args[:seen])
        return getattr(select(mid), name, getattr(reference, name))(
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

    library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pyxai_bounds::{name}", fake, lib=library)
    torch.library.register_autograd(f"pyxai_bounds::{name}", run_backward, setup_context=remember, lib=library)
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
