"""REC's attacks on the weights: how far can an explanation move if every parameter may move by gamma times its size?

Each sample gets weights of its own, since a certificate over a box of parameters speaks of each sample by itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from pyxai_bounds import fuse
from pyxai_bounds.attack.rec import toward_each
from pyxai_bounds.attack.search import Attack, along
from pyxai_bounds.attack.surrogate import smooth_graph
from pyxai_bounds.certify.certificate import usual
from pyxai_bounds.certify.properties import Property, flat, kept
from pyxai_bounds.explain import _Explanation
from pyxai_bounds.interval import Interval
from pyxai_bounds.program import captured_graph

aten = torch.ops.aten


@dataclass(frozen=True)
class WeightAttack(Attack):
    """An :class:`Attack` whose x is the input itself; ``parameters`` holds the worst weights found, name → [B, ...]."""

    parameters: dict[str, Tensor]


def weights(
    fn: _Explanation,
    x: Tensor,
    target: Tensor,
    *,
    gamma: float,
    property: Property | None = None,
    toward: Tensor | None = None,
    tau: float = 0.0385,
    steps: int = 20,
    restarts: int = 1,
    seed: int = 0,
    beta: float = 5.0,
    batch_size: int = 32,
) -> WeightAttack:
    """Search weights within gamma·|θ| of the model's for those that break ``property`` or make v look like ``toward``.

    fn: an explanation of :mod:`pyxai_bounds.explain`, of an ``nn.Module``. Sign steps, scaled by each weight's own
    radius and shrinking, from a random start, descend the smooth twin: the property's margin, or MSE(v, toward).
    Margin, of the program itself: the property's, broken where it is not kept; or MSE(v, toward) − tau, broken where
    that is ≤ 0.
    Memory grows with batch_size times the number of parameters.
    Raises ValueError unless exactly one of property and toward is given, for gamma outside [0, 1), and for a model
    that is no module.
    Source: Wicker et al., ICLR 2023, arXiv 2212.08507 (model attack).
    """
    if (property is None) == (toward is None):
        raise ValueError("Give either a property to break or an explanation to move toward.")
    if not 0 <= gamma < 1:
        raise ValueError(f"gamma={gamma} is the relative radius of the parameters: it must lie in [0, 1).")
    if steps < 1 or restarts < 1 or batch_size < 1:
        raise ValueError(f"steps={steps}, restarts={restarts} and batch_size={batch_size} must be at least 1.")
    if not isinstance(fn, _Explanation) or not isinstance(fn.model, nn.Module):
        raise ValueError("The weights of a function cannot be found: pass explain.gradient(model) or its like.")
    with torch.inference_mode(False):
        x = usual(x)
        goal = None if toward is None else toward_each(toward, x, fn, target)
        program = _Program(fn, x[:1], target[:1], beta)
        generator = torch.Generator().manual_seed(seed)
        pieces = []
        for start in range(0, len(x), batch_size):
            piece = slice(start, start + batch_size)

            def margin(there: Tensor, nominal: Tensor, piece: slice = piece) -> Tensor:
                if property is not None:
                    return property.margin(nominal, Interval.of(there, torch.zeros_like(there)))
                assert goal is not None
                return flat(there - goal(piece)).square().mean(1) - tau

            pieces.append(_walk(program, x[piece], target[piece], gamma, margin, steps, restarts, generator))
    attribution, found, *parameters = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    broken = (found <= 0 if property is None else ~kept(property, found)) & ~found.isnan()
    return WeightAttack(x, attribution, found, broken, dict(zip(program.names, parameters, strict=True)))


class _Program:
    """The explanation and its smooth twin as functions of (x, target, *parameters), with weights for each sample."""

    def __init__(self, fn: _Explanation, x: Tensor, target: Tensor, beta: float) -> None:
        assert isinstance(fn.model, nn.Module)
        model = fn.model
        self.names = names = [name for name, _ in model.named_parameters()]
        self.values = [parameter.detach() for _, parameter in model.named_parameters()]

        def at(x: Tensor, target: Tensor, *values: Tensor) -> Tensor:
            given = dict(zip(names, values, strict=True))
            return dataclasses.replace(fn, model=lambda x: torch.func.functional_call(model, given, (x,)))(x, target)

        graph = captured_graph(at, x, target, *self.values).graph
        self.exact, self.twin = _per_sample(graph), _per_sample(smooth_graph(graph, beta))


def _per_sample(program: fx.GraphModule) -> Callable[..., Tensor]:
    """A graph captured for a batch of one, mapped over samples and weights alike."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(program.graph, {}))
    for node in list(graph.nodes):
        if node.target in fuse.VIEWS:
            node.target = aten.reshape.default  # mapped over a dimension, no tensor has the layout it was captured with
        elif node.target is torch.ops.pyxai_bounds.check_target.default:
            node.replace_all_uses_with(node.args[0])  # checked at capture, and cannot be mapped
            graph.erase_node(node)
    mapped = torch.func.vmap(fx.GraphModule(program, graph))
    return lambda x, target, *values: mapped(x.unsqueeze(1), target.unsqueeze(1), *values)[0].squeeze(1)


def _walk(
    program: _Program,
    x: Tensor,
    target: Tensor,
    gamma: float,
    margin: Callable[[Tensor, Tensor], Tensor],
    steps: int,
    restarts: int,
    generator: torch.Generator,
) -> Sequence[Tensor]:
    """(attribution, margin, each parameter) at the worst weights of each sample."""
    centers = [value.expand(len(x), *value.shape) for value in program.values]
    radii = [gamma * center.abs() for center in centers]
    # Rounded towards the middle, into the box that the certificate is about.
    lower, upper = zip(*(Interval.of(*box).inner_ends() for box in zip(centers, radii, strict=True)), strict=True)
    nominal = program.exact(x, target, *centers).detach()
    attribution, least = nominal, margin(nominal, nominal)
    worst = [center.clone() for center in centers]
    for _ in range(restarts):
        at = [
            torch.lerp(a, b, torch.rand(a.shape, generator=generator, dtype=torch.float64).to(a)).clamp(a, b)
            for a, b in zip(lower, upper, strict=True)
        ]
        for step in range(steps):
            at = [value.detach().requires_grad_() for value in at]
            with torch.enable_grad():
                loss = margin(program.twin(x, target, *at), nominal).sum()
            slopes = torch.autograd.grad(loss, at, allow_unused=True)
            length = 2 * (1 - step / steps)
            moved = []
            for value, slope, rad, a, b in zip(at, slopes, radii, lower, upper, strict=True):
                there = value.detach()
                moved.append(there if slope is None else (there - length * rad * slope.sign()).clamp(a, b))
            at = moved
            there = program.exact(x, target, *at).detach()
            found = margin(there, nominal)
            better = found < least
            least = torch.where(better, found, least)
            attribution = torch.where(along(better, there), there, attribution)
            worst = [torch.where(along(better, new), new, old) for new, old in zip(at, worst, strict=True)]
    return attribution, least, *worst
