"""Metrics of explanations: how alike two are, how robust they look, and what bounds guarantee of them.

Functions of tensors; the attacks whose results they measure are in :mod:`pyxai_bounds.attack`.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pyxai_bounds import explain
from pyxai_bounds.certify.certificate import certify
from pyxai_bounds.certify.properties import TopK, flat, rounding_loss
from pyxai_bounds.interval import Clip, Interval
from pyxai_bounds.program import BoundFunction, bound

# --- two explanations of each sample ---------------------------------------------------------------------------


def saliency_map(attribution: Tensor) -> Tensor:
    """|attribution| as one number per feature, [B, D]: summed over the channels (dimension 1) of [B, C, ...].

    The attribution has the shape of the input: what :func:`explain.saliency` has summed already must not come here.
    """
    size = attribution.detach().abs()
    return flat(size.sum(1) if size.dim() > 2 else size)


def top_features(k: int, x: Tensor) -> TopK:
    """The property of evaluations: the k greatest of the :func:`saliency_map` of inputs like x [B, …] stay so.

    Of images with several channels pixels are ranked, otherwise entries.
    """
    return TopK(k, channels="sum" if x.dim() > 2 and x.shape[1] > 1 else "none")


def intersection(a: Tensor, b: Tensor, k: int) -> Tensor:
    """|top-k of a ∩ top-k of b| / k for scores [B, D], float64 [B]: RAR's IN and R2ET's P@k. 1 where k ≥ D.

    Raises ValueError for k < 1 or different shapes.
    """
    _same_shape(a, b)
    if k < 1:
        raise ValueError(f"k={k} must be at least 1.")
    if k >= a.shape[1]:
        return torch.ones(len(a), dtype=torch.float64, device=a.device)
    tops = [torch.zeros_like(s, dtype=torch.bool).scatter(1, s.topk(k, 1).indices, True) for s in (a, b)]
    return (tops[0] & tops[1]).sum(1).double() / k


def kendall(a: Tensor, b: Tensor) -> Tensor:
    """Kendall's tau-b between the rankings of two score vectors, [B, D] → float64 [B]; NaN where one is constant.

    RAR's CO. Computed by scipy on the CPU. Raises ModuleNotFoundError without scipy.
    """
    _same_shape(a, b)
    tau = _scipy_stats().kendalltau
    rows = zip(a.detach().double().cpu().numpy(), b.detach().double().cpu().numpy(), strict=True)
    found = [float(tau(*row).statistic) if a.shape[1] > 1 else torch.nan for row in rows]
    return torch.tensor(found, dtype=torch.float64, device=a.device)


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's rank correlation (ties share their mean rank), [B, D] → float64 [B]; NaN where one is constant."""
    _same_shape(a, b)
    rank = _scipy_stats().rankdata
    ranks = [torch.from_numpy(rank(s.detach().double().cpu().numpy(), axis=1)).to(a.device) for s in (a, b)]
    return pearson(*ranks)


def pearson(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation of each row, [B, D] → float64 [B]; NaN where a row is constant."""
    _same_shape(a, b)
    a, b = (s.detach().double() - s.detach().double().mean(1, keepdim=True) for s in (a, b))
    lengths = torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(b, dim=1)
    return ((a * b).sum(1) / torch.where(lengths > 0, lengths, torch.nan)).clamp(-1, 1)


def mean_square(a: Tensor, b: Tensor) -> Tensor:
    """mean_j (a_j − b_j)² of each sample, [B, ...] → float64 [B]: REC's distance between explanations."""
    _same_shape(a, b)
    return flat(a.detach().double() - b.detach().double()).square().mean(1)


def mass_center(attribution: Tensor) -> Tensor:
    """The centre of mass of an image's saliency map in pixels, (row, column), [B, C, H, W] → [B, 2].

    An explanation that is zero everywhere has its centre in the middle. Differentiable.
    Source: Ghorbani et al., AAAI 2019.
    """
    if attribution.dim() != 4:
        raise ValueError(f"A centre of mass needs images [B, C, H, W], got explanations {list(attribution.shape)}.")
    size = attribution.abs().sum(1)
    total = size.sum((1, 2))
    mass = torch.where((total > 0)[:, None, None], size, torch.ones_like(size))
    mass = mass / mass.sum((1, 2), keepdim=True)
    rows, columns = (torch.arange(n, dtype=size.dtype, device=size.device) for n in size.shape[1:])
    return torch.stack([(mass.sum(2) * rows).sum(1), (mass.sum(1) * columns).sum(1)], 1)


def _same_shape(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(
            f"Explanations of the same samples must have one shape, got {list(a.shape)} and {list(b.shape)}."
        )


def _scipy_stats() -> ModuleType:
    try:
        import scipy.stats
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Rank correlations are computed by scipy, which is not installed: pip install 'pyxai-bounds[train]'."
        ) from error
    return scipy.stats


# --- one explanation and its neighbourhood ----------------------------------------------------------------------


def thickness(
    fn: Callable[..., Tensor],
    x: Tensor,
    target: Tensor,
    others: Tensor,
    *,
    k: int,
    points: int = 10,
    batch_size: int = 256,
) -> Tensor:
    """R2ET's ranking thickness Θ of each sample, float64 [B] in [0, 1].

    The mean over the pairs of a feature i in the top k at x and another j, over the neighbours x′ in ``others``
    [S, B, ...], and over t in [0, 1] (``points`` midpoints of equal parts), of 1[I_i(x(t)) ≥ I_j(x(t))], where
    x(t) = (1 − t)x + t·x′ and I is the saliency map of ``fn(x, target)``. 1: the top stays on top all the way.
    Raises ValueError for shapes that disagree, and unless 1 ≤ k < D.
    Source: Chen et al., arXiv 2212.14106 (top-k thickness).
    """
    if others.shape[1:] != x.shape or points < 1:
        raise ValueError(f"others must have shape [S, {', '.join(map(str, x.shape))}] and points be ≥ 1.")
    pieces = []
    for start in range(0, len(x), batch_size):
        part = slice(start, start + batch_size)
        here, y = x[part], target[part]
        order = saliency_map(_explained(fn, here, y)).argsort(1, descending=True)
        if not 1 <= k < order.shape[1]:
            raise ValueError(f"k={k} top features of {order.shape[1]}: give 1 ≤ k < {order.shape[1]}.")
        held = torch.zeros(len(here), dtype=torch.float64, device=x.device)
        for other in others[:, part]:
            for step in range(points):
                score = saliency_map(_explained(fn, here.lerp(other, (step + 0.5) / points), y)).gather(1, order)
                held += _ordered_pairs(score[:, :k], score[:, k:])
        pieces.append(held / (len(others) * points))
    return torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.float64, device=x.device)


def _ordered_pairs(top: Tensor, rest: Tensor) -> Tensor:
    """The share of pairs with top ≥ rest, [B, k] and [B, R] → [B]; k + R log R comparisons, never k·R."""
    at_most = torch.searchsorted(rest.sort(1).values.contiguous(), top.contiguous(), right=True)
    return at_most.double().mean(1) / rest.shape[1]


def _explained(fn: Callable[..., Tensor], x: Tensor, target: Tensor) -> Tensor:
    with torch.enable_grad():
        return fn(x, target).detach()


# --- what bounds guarantee ----------------------------------------------------------------------------------------


def ig_norm_bound(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float | Tensor,
    clip: Clip = None,
    *,
    bounds: BoundFunction | None = None,
    sound: bool = False,
) -> Tensor:
    """An upper bound on max_{x′} ‖IG(x, x′)‖₁ over the box, IG of the cross entropy: [B], differentiable.

    The path from x to x′ lies in the box, so |IG_i| ≤ |x′_i − x_i| · max(|v_L|, |v_U|)_i with [v_L, v_U] the bounds of
    the loss gradient; |x′_i − x_i| is at most the larger distance from x to an end of the (clipped) box. It bounds the
    integral and every Riemann sum of it. ``bounds``: the bound of the loss gradient, if it is not this model's own.
    ``sound=True`` rounds outward, and then the result is float64; otherwise to nearest, as training needs it.
    """
    box = Interval.linf(x, eps, clip)
    gradient = (bounds or bound(explain.gradient(model, "loss"), sound=sound))(box, y)
    lower, upper, most = box.lower, box.upper, gradient.mid.abs() + gradient.rad
    if sound:
        x, lower, upper = x.double(), lower.double(), upper.double()
        most = torch.maximum(gradient.lower.abs(), gradient.upper.abs()).double()
    total = flat(torch.maximum(upper - x, x - lower) * most).sum(1)
    return total * (1 + rounding_loss(x[0].numel())) if sound and len(x) else total


def certified_intersection(property: TopK, nominal: Tensor, bounds: Interval) -> Tensor:
    """A lower bound on :func:`intersection` of the nominal explanation with any in the bounds, float64 [B].

    m of the k top features stay on top if m of them have a lower bound above the (k − m + 1)-th largest upper bound of
    the others: were fewer to stay, so many others would be on top, one of them below all of these m. The greatest such
    m, divided by k: never above what an attack leaves; k/k exactly where the property itself holds.
    """
    lower, upper = property.scores(bounds)
    top = property.top(nominal)
    k, others = min(property.k, top.shape[1]), top.shape[1] - property.k
    leading = lower.masked_fill(~top, -torch.inf).topk(k, 1).values  # the m-th of these …
    rivals = upper.masked_fill(top, -torch.inf).topk(min(k, max(others, 0)), 1).values
    rivals = F.pad(rivals, (0, k - rivals.shape[1]), value=-torch.inf).flip(1)  # … against the (k − m + 1)-th
    kept = (leading > rivals) & bounds.isfinite().flatten(1).all(1, keepdim=True)
    return (kept * torch.arange(1, k + 1, device=kept.device)).amax(1).double() / k


def certified_accuracy(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    clip: Clip = None,
    batch_size: int = 256,
    sound: bool = True,
) -> float:
    """The share of samples whose label keeps the largest logit everywhere in the box, as :func:`certify` proves it.

    ``sound=True``: rounded outward, a proof; otherwise to nearest. NaN without samples.
    """
    leading = TopK(1, by="signed")
    certificate = certify(model, x, eps=eps, property=leading, clip=clip, sound=sound, batch_size=batch_size)
    leads = certificate.nominal.argmax(1) == y
    return (certificate.holds & leads).double().mean().item()


# --- whole networks -------------------------------------------------------------------------------------------------


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor, batch_size: int = 256) -> float:
    """The share of samples whose largest logit is the label's. Shapes: x [N, ...], y [N] integer."""
    predicted = torch.cat([model(piece).argmax(1) for piece in x.split(batch_size)])
    return (predicted == y).double().mean().item()


@torch.no_grad()
def unstable_relu_fraction(
    model: nn.Module, x: Tensor, eps: float, clip: Clip = None, batch_size: int = 256
) -> float | None:
    """The share of ReLUs, over all samples, whose input may have either sign in the box: l ≤ 0 < u.

    None for a model without ReLUs. Such a unit's derivative is unknown, and only there do explanations get a width:
    0 means that each box lies in one linear piece of the network.
    Shapes: x [N, ...] in ``clip`` if given; eps in the units of x. Raises what ``bound`` and ``Interval.linf`` raise.
    """
    bounded = bound(relu_inputs(model))
    unstable = total = 0
    for piece in x.split(batch_size):
        for box in bounded(Interval.linf(piece, eps, clip)):
            unstable += int(((box.lower <= 0) & (box.upper > 0)).sum())
            total += box.mid.numel()
    return unstable / total if total else None


def relu_inputs(model: nn.Module) -> Callable[[Tensor], list[Tensor]]:
    """The function x → what every ReLU of the model is applied to, modules and functional calls alike."""

    def inputs(x: Tensor) -> list[Tensor]:
        with _RecordReLUs() as record:
            model(x)
        return record.inputs

    return inputs


_RELUS: frozenset[Any] = frozenset(
    (F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.leaky_relu, F.leaky_relu_, F.threshold)
)


class _RecordReLUs(TorchFunctionMode):
    """A mode rather than hooks: it sees functional ReLUs too, and leaves nothing on the modules."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in _RELUS:
            self.inputs.append(args[0].clone())  # an in-place ReLU is about to overwrite it
        return func(*args, **(kwargs or {}))


def same_class_cosine(attributions: Tensor, y: Tensor) -> float:
    """Mean cosine between the explanations of two different samples of one class, averaged over the classes.

    1 means that every sample of a class gets the same explanation, as a linear model's do. Classes with fewer than two
    samples do not count; NaN if none has two. Shapes: attributions [N, ...], y [N].
    """
    directions = F.normalize(attributions.detach().double().flatten(1), dim=1)
    means = []
    for label in y.unique():
        group = directions[y == label]
        if len(group) > 1:
            # Σ over ordered pairs of different samples = ‖Σ‖² − Σ‖·‖²
            pairs = group.sum(0).square().sum() - group.square().sum()
            means.append(pairs / (len(group) * (len(group) - 1)))
    return min(torch.stack(means).mean().item(), 1.0) if means else float("nan")  # rounding may step past 1


def certain_members(property: TopK, bounds: Interval) -> Tensor:
    """Which features are among the k largest for *every* explanation in the bounds: bool [B, D].

    A feature is when fewer than k others can reach its lower bound. All k are exactly where the property itself holds.
    """
    lower, upper = property.scores(bounds)
    rivals = (upper.unsqueeze(1) >= lower.unsqueeze(2)).sum(2) - 1  # itself
    return (rivals < property.k) & bounds.isfinite().flatten(1).all(1, keepdim=True)


def commonest_top_share(property: TopK, attributions: Tensor, y: Tensor) -> float:
    """The share of samples whose set of top features is the commonest one of their class.

    1 means that the set says nothing of the sample, as a linear model's: its certificate is then worth little, although
    the explanations may differ otherwise. Shapes: attributions [N, ...], y [N]. NaN without samples.
    """
    top = property.top(attributions.detach())
    commonest = sum(int(top[y == label].unique(dim=0, return_counts=True)[1].max()) for label in y.unique())
    return commonest / len(y) if len(y) else float("nan")
