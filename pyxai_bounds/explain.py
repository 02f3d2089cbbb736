"""Gradient explanations as plain functions of (x, target): run them, or bound them like any other function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pyxai_bounds import ops
from pyxai_bounds.identity import unwrap

Of = Literal["logit", "probability", "loss"]


@dataclass(frozen=True, eq=False)
class _Explanation:
    """A function (x, target) → attribution in the shape of x, for one model.

    Shapes: x [B, ...]; the model's output [B, K] with an integer target [B], or [B] or [B, 1] with target None.
    Differentiable in x and in the parameters wherever gradients are enabled, as every PyTorch function is.
    Two explanations of one model with equal options are the same function to ``bound``.
    """

    model: Callable[[Tensor], Tensor]
    of: Of = "logit"

    def __post_init__(self) -> None:
        if self.of not in ("logit", "probability", "loss"):
            raise ValueError(f"of={self.of!r} is unknown; choose 'logit', 'probability' or 'loss'.")
        if not callable(self.model):
            raise TypeError(f"model must be a module or a function of x, got {type(self.model).__name__}.")
        object.__setattr__(self, "model", unwrap(self.model))

    def __bound_key__(self) -> tuple[Any, Any]:
        options = {name: value for name, value in vars(self).items() if name != "model"}
        return self.model, (type(self), *sorted(options.items()))

    def __call__(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        raise NotImplementedError

    def gradient(self, x: Tensor, target: Tensor | None) -> Tensor:
        """∂ score[target] / ∂x at every sample."""
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() == 0:
            given = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x must be a floating tensor [B, ...], got {given}; to bound an explanation use xb.bound.")
        differentiable = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.enable_grad():
            x = x.clone() if x.is_inference() else x
            target = target.clone() if isinstance(target, Tensor) and target.is_inference() else target
            if not x.requires_grad:
                x = x.detach().requires_grad_()
            score = _score(self.model(x), target, self.of)
            found: Tensor | None = None
            if score.requires_grad:
                (found,) = torch.autograd.grad(score.sum(), x, create_graph=differentiable, allow_unused=True)
            if found is None:
                raise ValueError(
                    "The model's output has no gradient by x: something in it, such as detach(), .data, no_grad(), an "
                    "integer or a quantised layer, ends the path of derivatives."
                )
            return found


class Gradient(_Explanation):
    """The gradient itself (saliency): see :func:`gradient`."""

    def __call__(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        return self.gradient(x, target)


@dataclass(frozen=True, eq=False)
class Saliency(_Explanation):
    """See :func:`saliency`."""

    channels: Literal["sum", "none"] = "sum"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.channels not in ("sum", "none"):
            raise ValueError(f"channels={self.channels!r} is unknown; choose 'sum' or 'none'.")

    def __call__(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        size = self.gradient(x, target).abs()
        return size.sum(1) if self.channels == "sum" and x.dim() > 2 else size


@dataclass(frozen=True, eq=False)
class ReleasedREC(_Explanation):
    """See :func:`released_rec`."""

    functional: Literal["training", "evaluation"] = "training"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.functional not in ("training", "evaluation"):
            raise ValueError(f"functional={self.functional!r} is unknown; choose 'training' or 'evaluation'.")

    def __call__(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        score = _score(self.model(x), target, "probability" if self.functional == "training" else "logit")
        return (score - 1).reshape(-1, *[1] * (x.dim() - 1)) * self.gradient(x, target)


class GradientXInput(_Explanation):
    """See :func:`gradient_x_input`."""

    def __call__(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        return x * self.gradient(x, target)


@dataclass(frozen=True, eq=False)
class IntegratedGradients(_Explanation):
    """See :func:`integrated_gradients`."""

    steps: int = 50
    baseline: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.steps, int):
            raise TypeError(f"steps must be a whole number, got {self.steps!r}.")
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}: the Riemann sum needs at least one step.")

    def __call__(self, x: Tensor, target: Tensor | None = None, baseline: Tensor | None = None) -> Tensor:
        start = self.baseline if baseline is None else baseline
        if not isinstance(start, (int, float, Tensor)):
            raise TypeError(f"baseline must be a number or a tensor, got {type(start).__name__}.")
        if isinstance(start, Tensor) and not _broadcasts(start, x):
            raise ValueError(f"baseline of shape {list(start.shape)} does not broadcast to x of shape {list(x.shape)}.")
        difference = x - start
        fractions = torch.arange(1, self.steps + 1, dtype=x.dtype, device=x.device) / self.steps
        path = start + fractions.reshape(-1, 1, *[1] * (x.dim() - 1)) * difference
        targets = None if target is None else target.repeat(self.steps)
        gradients = self.gradient(path.flatten(0, 1), targets).reshape(path.shape)
        return difference * gradients.mean(0)


class SmoothGrad(_Explanation):
    """See :func:`smoothgrad`."""

    def __call__(self, x: Tensor, target: Tensor | None, noise: Tensor) -> Tensor:  # type: ignore[override]
        if noise.shape[1:] not in (x.shape, (1, *x.shape[1:])):
            sample = "".join(f", {n}" for n in x.shape[1:])
            raise ValueError(
                f"noise must have shape [S, *x.shape] = [S, {len(x)}{sample}], or [S, 1{sample}] for the same copies "
                f"of every sample, got {list(noise.shape)}."
            )
        copies = x + noise
        targets = None if target is None else target.repeat(len(noise))
        return self.gradient(copies.flatten(0, 1), targets).reshape(copies.shape).mean(0)


def gradient(model: Callable[[Tensor], Tensor], of: Of = "logit") -> Gradient:
    """∂ score / ∂x, where the score is the target's logit, its probability, or the cross-entropy loss.

    Call it with (x [B, ...], target [B] integer, or None for a model with one output); it returns [B, ...].
    Source: Simonyan et al., "Deep inside convolutional networks", 2013 (without the absolute value).
    """
    return Gradient(model, of)


def saliency(model: Callable[[Tensor], Tensor], of: Of = "loss", channels: Literal["sum", "none"] = "sum") -> Saliency:
    """|∂ score / ∂x|, summed over the channels (dimension 1) of inputs [B, C, ...]: what R2ET ranks.

    Returns [B, ...] without the channels; a table's [B, D] has none and keeps its shape, as do all with ``"none"``.
    Source: Chen et al., arXiv 2212.14106 (of the loss); Simonyan et al., 2013 (of the logit).
    """
    return Saliency(model, of, channels)


def released_rec(
    model: Callable[[Tensor], Tensor], functional: Literal["training", "evaluation"] = "training"
) -> ReleasedREC:
    """(p_t − 1)·∂z_t/∂x ("training") or (z_t − 1)·∂z_t/∂x ("evaluation"): what the released code of REC explains.

    Neither is the gradient of the logit z_t, of the probability p_t or of the loss: only for comparing with that code.
    Source: the code of Wicker et al., ICLR 2023, arXiv 2212.08507.
    """
    return ReleasedREC(model, "logit", functional)


def gradient_x_input(model: Callable[[Tensor], Tensor], of: Of = "logit") -> GradientXInput:
    """x ⊙ ∂ score / ∂x. Source: Shrikumar et al., arXiv 1605.01713."""
    return GradientXInput(model, of)


def integrated_gradients(
    model: Callable[[Tensor], Tensor], of: Of = "logit", steps: int = 50, baseline: float = 0.0
) -> IntegratedGradients:
    """(x − x′) ⊙ the mean gradient at x′ + (k / steps)(x − x′), k = 1 … steps: the right Riemann sum.

    x′ is the constant ``baseline``, or a tensor that broadcasts to x given as third argument of the call: the
    attribution of the change from x₀ to x₁, which RAR bounds, is ``integrated_gradients(model, "loss")(x₁, y, x₀)``.
    Source: Sundararajan et al., "Axiomatic attribution for deep networks", ICML 2017, equation 3; Chen et al., "Robust
    attribution regularization", NeurIPS 2019, arXiv 1905.09957.
    """
    return IntegratedGradients(model, of, steps, baseline)


def smoothgrad(model: Callable[[Tensor], Tensor], of: Of = "logit") -> SmoothGrad:
    """The mean gradient at x + noise[s]; call it with (x, target, noise [S, B, ...]).

    The noise is an argument, because bounds hold for one fixed program. ``certify`` and the attacks, which call
    fn(x, target) with batches of any size, take ``lambda x, y: smoothgrad(model)(x, y, noise)`` with one noise for all
    samples, [S, 1, ...].
    Source: Smilkov et al., arXiv 1706.03825.
    """
    return SmoothGrad(model, of)


def _broadcasts(t: Tensor, x: Tensor) -> bool:
    sizes = zip(reversed(t.shape), reversed(x.shape), strict=False)
    return t.dim() <= x.dim() and all(n in (1, m) for n, m in sizes)


def _score(output: Tensor, target: Tensor | None, of: Of) -> Tensor:
    """One number per sample [B] to differentiate."""
    if not isinstance(output, Tensor):
        raise TypeError(
            f"An explanation needs a model that returns one tensor of scores, but this one returns a "
            f"{type(output).__name__}: choose what to explain, for example with lambda x: model(x)[...]."
        )
    if target is None:
        if output.dim() > 2 or (output.dim() == 2 and output.shape[1] != 1):
            raise ValueError(
                f"target=None is for a model with one output, but this one returns {list(output.shape)}; pass a target "
                "of shape [B]."
            )
        if of != "logit":
            raise ValueError(f"of={of!r} needs a target; of a model with one output explain the output, of='logit'.")
        return output.reshape(-1)
    if output.dim() != 2:
        batch = " A batch comes first: for one sample pass x.unsqueeze(0) and target.reshape(1)."
        raise ValueError(
            f"A target needs logits of shape [B, K]; the model returns {list(output.shape)}."
            + (batch if output.dim() == 1 else "")
        )
    if not isinstance(target, Tensor) or target.is_floating_point() or target.dtype == torch.bool:
        kind = target.dtype if isinstance(target, Tensor) else type(target).__name__
        raise TypeError(
            f"target must be an integer tensor of shape [B], got {kind}: target.long() converts numbers of classes, "
            "target.argmax(1) one-hot rows, torch.full((len(x),), c) is one class for all."
        )
    if target.shape != output.shape[:1]:
        raise ValueError(
            f"target has shape {list(target.shape)}, but the batch has {len(output)} samples: it must be "
            f"[{len(output)}], one class index each; target.argmax(1) makes it of one-hot rows."
        )
    if target.device != output.device:
        raise ValueError(f"target is on {target.device} but the logits are on {output.device}; move one of them.")
    target = ops.check_target(target.long(), output.shape[1])
    if of == "loss":
        return torch.nn.functional.cross_entropy(output, target, reduction="none")
    score = output if of == "logit" else output.softmax(1)
    return score.gather(1, target.unsqueeze(1)).squeeze(1)
