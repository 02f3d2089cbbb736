"""The search that all attacks on inputs share: steps inside the box, judged by the real program, the worst kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from pyxai_bounds.attack.surrogate import smooth
from pyxai_bounds.certify.certificate import check_batch, evaluate, usual
from pyxai_bounds.interval import Clip, Interval

Model = Callable[[Tensor], Tensor]
Keep = Literal["ignore", "judge", "stop", "hinge"]
Move = Literal["sign", "normalised", "adam", "random"]
Guide = Callable[[Tensor, Tensor], Tensor]  # (attribution of the twin, nominal) → what to descend, [B]
Judge = Callable[[Tensor, Tensor], Tensor]  # (attribution, nominal) → [B], lower is worse


@dataclass(frozen=True)
class Attack:
    """The worst input found per sample: x [B, ...] in the box, its attribution, the margin [B], broken bool [B].

    The margin is what the attack makes small, measured on the program itself; each attack says what it is, and from
    where on the sample counts as broken. A margin of NaN breaks nothing.
    """

    x: Tensor
    attribution: Tensor
    margin: Tensor
    broken: Tensor

    def __repr__(self) -> str:
        worst = f", least margin {float(self.margin.min()):.3g}" if len(self.margin) else ""
        return f"Attack(broke {int(self.broken.sum())} of {len(self.broken)}{worst})"


@dataclass(frozen=True)
class Search:
    """How to walk: ``steps`` moves of the given kind from ``restarts`` starts; what may happen to the label meanwhile.

    move     ``sign``: step_size along the gradient's sign; ``normalised``: step_size along gradient / ‖gradient‖₂ of
             the sample; ``adam``: Adam with learning rate step_size; ``random``: step_size in random signs, blindly
    start    is the first start x itself, or as all others a uniform random point of the box?
    decay    shorten the steps linearly to nothing
    keep     the label, of ``model``: ``ignore`` it; ``judge``: inputs with another label than x do not count;
             ``stop``: a sample stops for good before its first label flip; ``hinge``: as judge, and a hinge on the
             label's lead is added to what is descended, its weight raised by gradient ascent
    regularisation  weight of MSE(softmax f(x′), softmax f(x)) in what is descended, of the smooth twin (needs model)
    """

    steps: int
    step_size: float | Tensor
    move: Move = "sign"
    restarts: int = 1
    start: Literal["center", "random"] = "center"
    decay: bool = False
    keep: Keep = "ignore"
    regularisation: float = 0.0
    beta: float = 100.0
    seed: int = 0
    batch_size: int = 256

    def __post_init__(self) -> None:
        if self.steps < 1 or self.restarts < 1:
            raise ValueError(
                f"An attack needs steps ≥ 1 and restarts ≥ 1, got steps={self.steps}, restarts={self.restarts}."
            )
        if not isinstance(self.step_size, Tensor) and not self.step_size >= 0:
            raise ValueError(f"step_size must be ≥ 0, in the units of x, got {self.step_size}.")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}.")
        if self.keep not in get_args(Keep):
            raise ValueError(f"keep={self.keep!r} is unknown; choose one of {', '.join(get_args(Keep))}.")
        if self.move not in get_args(Move):
            raise ValueError(f"move={self.move!r} is unknown; choose one of {', '.join(get_args(Move))}.")


@torch.inference_mode(False)
def search(
    fn: Callable[..., Tensor],
    x: Tensor,
    target: Tensor | None,
    *,
    eps: float | Tensor,
    clip: Clip,
    guide: Callable[[slice], Guide],
    judge: Callable[[slice], Judge],
    broken: Callable[[Tensor], Tensor],
    how: Search,
    model: Model | None = None,
    extras: tuple[Tensor, ...] = (),
) -> Attack:
    """Walk down ``guide`` of the smooth twin of ``fn``, and keep of each sample the point where ``judge`` is lowest.

    guide and judge are asked once per piece of at most ``how.batch_size`` samples, with the piece. The points lie in
    the box of :meth:`Interval.linf` and in clip, exactly. ``extras``: further arguments of fn, one entry per sample.
    Deterministic for a seed.
    """
    if model is None and (how.keep != "ignore" or how.regularisation):
        raise ValueError(f"keep={how.keep!r} looks at labels: pass model, which gives logits [B, K].")
    check_batch(x, target)
    x = usual(x)
    box = Interval.linf(x, eps, clip)
    generator = torch.Generator(device="cpu").manual_seed(how.seed)
    pieces = []
    for start in range(0, max(len(x), 1), how.batch_size):
        piece = slice(start, start + how.batch_size)
        length = how.step_size
        if isinstance(length, Tensor):
            length = length.expand_as(x)[piece]
        targets = tuple(t[piece] for t in (target, *extras) if t is not None)
        walk = _Walk(fn, x[piece], targets, box[piece], clip, guide(piece), judge(piece), model, how, length)
        pieces.append(walk.run(generator))
    worst, attribution, margin = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return Attack(worst, attribution, margin, broken(margin) & ~margin.isnan())


class _Walk:
    """The search on one piece of the batch."""

    def __init__(
        self,
        fn: Callable[..., Tensor],
        x: Tensor,
        targets: tuple[Tensor, ...],
        box: Interval,
        clip: Clip,
        guide: Guide,
        judge: Judge,
        model: Model | None,
        how: Search,
        length: float | Tensor,
    ) -> None:
        self.fn, self.x, self.targets, self.how, self.length = fn, x, targets, how, length
        self.guide, self.judge = guide, judge
        self.model = model if how.keep != "ignore" or how.regularisation else None
        # Rounded towards the middle: what is found must lie in the very box that the certificate is about.
        self.lower, self.upper = box.inner_ends()
        if clip is not None:
            self.lower, self.upper = (end.clamp(min=clip[0]).clamp(max=clip[1]) for end in (self.lower, self.upper))
        if how.move != "random":  # first of all: a model in training mode is refused before it moves its statistics
            self.twin = smooth(fn, x, *targets, beta=how.beta)
        self.nominal = evaluate(fn, x, *targets)
        self.labels = self._logits(x).argmax(1) if self.model is not None else None
        if how.regularisation:
            assert self.model is not None
            self.soft_model = smooth(self.model, x, beta=how.beta)
            self.softmax = self.soft_model(x).detach().softmax(1)

    def run(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """(worst x, its attribution, its margin); x itself where nothing found is worse."""
        margin = self.judge(self.nominal, self.nominal)
        best = self.x, self.nominal, margin
        for restart in range(self.how.restarts):
            at, move = self._start(restart, generator), _move(self.how.move)
            walking = torch.ones_like(margin, dtype=torch.bool)
            weight = torch.ones_like(margin, dtype=self.x.dtype)
            for step in range(self.how.steps):
                direction, violation = self._direction(at, weight, move, generator)
                if direction is None:
                    break  # a constant explanation: nowhere to go
                weight = weight + violation
                length = self.length * (2 * (1 - step / self.how.steps) if self.how.decay else 1.0)
                there = (at.detach() - length * direction).clamp(self.lower, self.upper)
                allowed = torch.ones_like(walking)
                if self.labels is not None and self.how.keep != "ignore":
                    allowed = self._logits(there).argmax(1) == self.labels
                if self.how.keep == "stop":
                    walking = walking & allowed
                    there = torch.where(along(walking, there), there, at.detach())
                at = there
                best = self._better(best, at, allowed)
        return best

    def _start(self, restart: int, generator: torch.Generator) -> Tensor:
        if restart == 0 and self.how.start == "center":
            return self.x
        position = torch.rand(self.x.shape, generator=generator, dtype=torch.float64).to(self.x)
        start = torch.lerp(self.lower, self.upper, position).clamp(self.lower, self.upper)
        if self.how.keep == "stop":
            assert self.labels is not None
            same = self._logits(start).argmax(1) == self.labels  # a flip at the start would stop the sample there
            start = torch.where(along(same, start), start, self.x)
        return start

    def _direction(
        self, at: Tensor, weight: Tensor, move: Callable[[Tensor], Tensor], generator: torch.Generator
    ) -> tuple[Tensor | None, Tensor]:
        """Where to go *away* from, None if nothing depends on x; and by how much the label's hinge is violated, [B]."""
        none = torch.zeros_like(weight)
        if self.how.move == "random":
            return torch.randn(at.shape, generator=generator, dtype=torch.float64).to(at).sign(), none
        at = at.detach().requires_grad_()
        violation = none
        with torch.enable_grad():
            loss = self.guide(self.twin(at, *self.targets), self.nominal)
            if self.how.regularisation:
                change = self.soft_model(at).softmax(1) - self.softmax
                loss = loss + self.how.regularisation * change.square().mean(1)
            if self.how.keep == "hinge":
                assert self.labels is not None
                violation = F.relu(-lead(self._logits(at, grad=True), self.labels))
                loss = loss + weight * violation
            total = loss.sum()
        slope = torch.autograd.grad(total, at, allow_unused=True)[0] if total.requires_grad else None
        # Where the twin has no derivative, such as roots at 0, an entry stays where it is.
        return (None if slope is None else move(slope.nan_to_num(0.0))), violation.detach()

    def _better(
        self, best: tuple[Tensor, Tensor, Tensor], at: Tensor, allowed: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        worst, attribution, margin = best
        there = evaluate(self.fn, at, *self.targets)
        found = self.judge(there, self.nominal)
        better = (found < margin) & allowed
        return (
            torch.where(along(better, at), at, worst),
            torch.where(along(better, there), there, attribution),
            torch.where(better, found, margin),
        )

    def _logits(self, x: Tensor, grad: bool = False) -> Tensor:
        assert self.model is not None
        if not grad:
            return evaluate(self.model, x)
        return self.model(x)


def lead(logits: Tensor, label: Tensor) -> Tensor:
    """By how much the label's logit leads the largest other one, [B, K] → [B]."""
    chosen = label.unsqueeze(1)
    return logits.gather(1, chosen).squeeze(1) - logits.scatter(1, chosen, -torch.inf).amax(1)


def along(choice: Tensor, t: Tensor) -> Tensor:
    """[B] in the shape [B, 1, ...] of what it chooses between."""
    return choice.reshape([-1] + [1] * (t.dim() - 1))


def _move(kind: Move) -> Callable[[Tensor], Tensor]:
    if kind == "adam":
        return _Adam()
    return _normalised if kind == "normalised" else torch.sign


def _normalised(slope: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(slope.flatten(1), dim=1)
    return slope / along(torch.where(length > 0, length, 1.0), slope)


class _Adam:
    """Kingma and Ba's update with the usual constants; a state per element, so samples stay independent."""

    def __init__(self) -> None:
        self.step = 0
        self.first: Tensor | float = 0.0
        self.second: Tensor | float = 0.0

    def __call__(self, slope: Tensor) -> Tensor:
        self.step += 1
        self.first = 0.9 * self.first + 0.1 * slope
        self.second = 0.999 * self.second + 0.001 * slope.square()
        mean, square = self.first / (1 - 0.9**self.step), self.second / (1 - 0.999**self.step)
        return mean / (square.sqrt() + 1e-8)
