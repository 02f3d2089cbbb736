"""Sharper bounds on what ranks entries: of a difference of two entries, where an explanation ends in linear layers.

Bounds of an explanation forget that its entries belong together. Those of a gradient are v·W, v what comes back to the
first layer: as v moves, entries move with it, and their difference v·(W_i - W_k) less than either. So the captured
function is cut where only operators linear in it are left, ``v`` is bounded, and an entry is a row w of numbers, by
which v is multiplied: w_i - w_k first, then the product with the box of v.

Source: eliding the last layer in interval bounds of a margin (Gowal et al., 2018, arXiv 1810.12715, section 3), here at
the end of the backward pass.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from pyxai_bounds.certify.properties import TopK, rounding_loss
from pyxai_bounds.interval import Interval
from pyxai_bounds.program import BoundFunction, bound, captured_graph
from pyxai_bounds.rules.registry import Product

aten = torch.ops.aten

# Beyond, a sample's margin stays what the bounds of its entries say: numbers in the rows of a sample's entries, and
# products of the differences of its pairs.
MOST_NUMBERS, MOST_PRODUCTS = 2**24, 2**30
MOST_CHANNELS = 3  # of which magnitudes are added: each has 2 signs


class Differences:
    """Margins of ``TopK`` by differences, of one function, for samples one by one; its parameters must not change."""

    def __init__(self, end: _End) -> None:
        self.end = end
        self._table = end.empty_rows(end.like.numel()) if end.like.numel() * end.numbers <= MOST_NUMBERS else None
        self._known = [False] * end.like.numel()

    @staticmethod
    def of(fn: Callable[..., Tensor], arguments: Sequence[Tensor], sound: bool, product: Product) -> Differences | None:
        """For samples like the one in ``arguments``, [1, ...]; None where ``fn`` does not end in linear layers, or is
        no function of a single sample, such as one that adds noise for so many.
        """
        try:
            captured = captured_graph(fn, *arguments)
            key = ("differences", sound, product)
            if key not in captured.derived:
                parts = _cut(captured.graph)
                end = None if parts is None else _End.of(*parts, sound, product)
                if end is not None:
                    end.row(0)
                    end.box([Interval.point(arguments[0]), *arguments[1:]])
                captured.derived[key] = end
        except Exception:  # whatever the function says of a batch of one: the batch's own bounds stand
            return None
        end = captured.derived[key]
        return None if end is None else Differences(end)

    def margin(
        self, property: TopK, nominal: Tensor, bounds: Interval, arguments: Sequence[Interval | Tensor]
    ) -> float:
        """Of one sample, [1, ...]: at most the least difference between an entry of the top and one of the rest."""
        lower, upper = (t[0].double() for t in property.scores(bounds))
        top = property.top(nominal)[0]
        least = lower[top].amin()
        open_ = ~top & ~(upper < least)
        known = torch.cat([least - upper[~top & ~open_], least.new_full((1,), math.inf)]).amin()
        # [channels added, entries ranked]: |a| >= sign·a for either sign, and |b| is the greater of b and -b.
        shape = (nominal.shape[1], -1) if property.channels == "sum" else (1, -1)
        signs = torch.where(nominal.reshape(shape) < 0, -1.0, 1.0).double()
        count = len(signs)
        if property.by == "signed":
            signs, patterns = torch.ones_like(signs), [(1.0,) * count]
        else:
            patterns = list(itertools.product((1.0, -1.0), repeat=count)) if count <= MOST_CHANNELS else []
        first, second = top.nonzero()[:, 0], open_.nonzero()[:, 0]
        if not patterns or not self._affordable(count, len(first), len(second), len(patterns)):
            return -math.inf
        box = self.end.box(arguments)
        if box is None:
            return -math.inf
        width = len(top)
        firsts = self._added(first, signs[:, first], width, box)
        if self._strays(firsts, box, (signs * nominal.reshape(shape))[:, first].sum(0)):
            return -math.inf
        worst = torch.full((len(first), len(second)), math.inf, dtype=torch.float64, device=lower.device)
        for pattern in patterns:
            factors = torch.tensor(pattern, dtype=torch.float64, device=lower.device)[:, None].expand(-1, len(second))
            seconds = self._added(second, factors, width, box)
            worst = worst.minimum(_least_differences(firsts, seconds, box.rad))
        worst = torch.where(worst.isnan(), -math.inf, worst)
        pairs = worst.maximum(lower[first][:, None] - upper[second][None])
        return min(known.item(), pairs.amin().item())

    def _strays(self, found: _Weighted, box: _Box, nominal: Tensor) -> bool:
        """Do entries lie outside their bounds by more than rounding? Then one sample is not explained as many are."""
        reach = found.rows.abs() @ box.rad + found.slack
        lost = 1e3 * torch.finfo(self.end.like.dtype).eps * (found.at_mid.abs() + reach)
        return not bool(((nominal - found.at_mid).abs() <= reach + lost).all())

    def _affordable(self, channels: int, first: int, second: int, patterns: int) -> bool:
        numbers = channels * (first + second) * self.end.numbers
        return numbers <= MOST_NUMBERS and patterns * first * second * self.end.numbers <= MOST_PRODUCTS

    def _added(self, entries: Tensor, signs: Tensor, width: int, box: _Box) -> _Weighted:
        """Entries of all channels, each with its sign, added."""
        total: Any = None
        for channel, factors in enumerate(signs):
            mid, rad = (t.double() for t in self._rows(channel * width + entries))
            part = factors[:, None] * mid, mid.abs() + rad, rad
            total = part if total is None else tuple(a + b for a, b in zip(total, part, strict=True))
        mid, size, rad = total
        greatest, loss = box.mid.abs() + box.rad, rounding_loss(self.end.numbers)
        slack = rad @ greatest * (1 + loss) + 2 * loss * (size @ greatest) + TINY
        return _Weighted(mid, mid @ box.mid, slack)

    def _rows(self, entries: Tensor) -> tuple[Tensor, Tensor]:
        """What gives these entries when it multiplies the box, [N, H], and its radii."""
        rows = self._table or self.end.empty_rows(len(entries))
        for place, entry in enumerate(entries.tolist()):
            if self._table is None or not self._known[entry]:
                place = place if self._table is None else entry
                rows[0][place], rows[1][place] = self.end.row(entry)
                self._known[entry] = self._table is not None
        return rows if self._table is None else (rows[0][entries], rows[1][entries])


# What underflows in float64, in sums of any length that fits into memory, is less.
TINY = 1e-290


@dataclass(frozen=True)
class _Box:
    """What an explanation depends on linearly, as vectors of float64."""

    mid: Tensor
    rad: Tensor


@dataclass(frozen=True)
class _Weighted:
    """Rows [N, H] by which a box is multiplied, the products with its midpoint [N], and what is not known of them."""

    rows: Tensor
    at_mid: Tensor
    slack: Tensor


def _least_differences(first: _Weighted, second: _Weighted, rad: Tensor) -> Tensor:
    """Lower bounds of first - second, [N, M]. ``slack`` holds what float64 may lose here, too: it is relative to the
    sizes of rows and box, and the distance of two rows is at most the sum of their sizes.
    """
    spread = torch.cdist((first.rows * rad)[None], (second.rows * rad)[None], p=1.0)[0]
    centre = first.at_mid[:, None] - second.at_mid[None]
    return centre - spread - first.slack[:, None] - second.slack[None]


@dataclass(frozen=True)
class _End:
    """A captured function of one sample in two parts: what is bounded, and the linear rest."""

    head: BoundFunction  # arguments -> what the rest depends on
    adjoint: BoundFunction  # coefficients of the explanation -> of those
    like: Tensor  # an explanation
    numbers: int  # of what the rest depends on

    @classmethod
    def of(
        cls, head: fx.GraphModule, tail: fx.GraphModule, cuts: list[Any], like: Any, sound: bool, product: Product
    ) -> _End:
        def adjoint(coefficients: Tensor) -> tuple[Tensor, ...]:
            points = [coefficients.new_zeros(cut.shape).requires_grad_() for cut in cuts]
            return torch.autograd.grad((tail(*points) * coefficients).sum(), points)

        return cls(
            bound(lambda *arguments: tuple(head(*arguments)), sound=sound, product=product),
            bound(adjoint, sound=sound),
            torch.zeros(like.shape, dtype=like.dtype, device=like.device),
            sum(math.prod(cut.shape) for cut in cuts),
        )

    def box(self, arguments: Sequence[Interval | Tensor]) -> _Box | None:
        found = _vectors(self.head(*arguments))
        return _Box(*found) if all(bool(t.isfinite().all()) for t in found) else None

    def empty_rows(self, count: int) -> tuple[Tensor, Tensor]:
        return self.like.new_empty(count, self.numbers), self.like.new_empty(count, self.numbers)

    def row(self, entry: int) -> tuple[Tensor, Tensor]:
        coefficients = self.like.clone()
        coefficients.view(-1)[entry] = 1.0
        mid, rad = _vectors(self.adjoint(Interval.of(coefficients, torch.zeros_like(coefficients))))
        return mid.to(self.like.dtype), rad.to(self.like.dtype)


def _vectors(found: Sequence[Interval | Tensor]) -> tuple[Tensor, Tensor]:
    pairs = [(t.mid, t.rad) if isinstance(t, Interval) else (t, torch.zeros_like(t)) for t in found]
    mid, rad = (torch.cat([t.reshape(-1).double() for t in half]) for half in zip(*pairs, strict=True))
    return mid, rad


# --- where a captured function is cut --------------------------------------------------------------------------


def _cut(program: fx.GraphModule) -> tuple[fx.GraphModule, fx.GraphModule, list[Any], Any] | None:
    """(head, tail, what lies between, result), the last two as fake tensors.

    None if the last operator that mixes entries is not linear in what depends on the arguments.
    """
    graph = program.graph
    result: Any = graph.output_node().all_input_nodes[0]
    region, cuts = _linear_region(result, _behind(graph.find_nodes(op="placeholder")))
    if not any(node.target in _MIXING for node in region):
        return None
    metas = [cut.meta["val"] for cut in cuts]
    if any(meta.dtype != result.meta["val"].dtype for meta in metas):
        return None
    head, tail = fx.Graph(), fx.Graph()
    known: dict[fx.Node, Any] = {}
    head.graph_copy(graph, known)
    head.output(tuple(known[cut] for cut in cuts))
    new = {cut: tail.placeholder(cut.name) for cut in cuts}
    tail.output(_copy(result, tail, new, region))
    for part in (head, tail):
        part.eliminate_dead_code()
    return fx.GraphModule(program, head), fx.GraphModule(program, tail), metas, result.meta["val"]


def _behind(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    found, ahead = set(nodes), list(nodes)
    while ahead:
        for user in ahead.pop().users:
            if user not in found:
                found.add(user)
                ahead.append(user)
    return found


def _linear_region(result: fx.Node, moving: set[fx.Node]) -> tuple[set[fx.Node], list[fx.Node]]:
    """The nodes through which the result depends linearly on others, and those others."""
    region: set[fx.Node] = set()
    cuts: dict[fx.Node, None] = {}
    ahead = [result]
    while ahead:
        node = ahead.pop()
        if node in region or node in cuts:
            continue
        sources = _linear_in(node, moving)
        if sources is None:
            cuts[node] = None
        else:
            region.add(node)
            ahead += sources
    return region, list(cuts)


def _linear_in(node: fx.Node, moving: set[fx.Node]) -> list[fx.Node] | None:
    """Its arguments among what moves, if the node is linear in all of them together; else None."""
    target: Any = node.target
    if target is operator.getitem:
        call: Any = node.args[0]
        if node.args[1] != 0 or call.target not in _BACKWARDS or call.args[0] not in moving:
            return None
        learns = call.target is aten.native_batch_norm_backward.default and call.args[7]
        fixed = all(call.args[place] not in moving for place in _BACKWARDS[call.target])
        return [call.args[0]] if fixed and not learns else None
    sources = [arg for arg in node.all_input_nodes if arg in moving]
    if target in _SUMS:  # of numbers as well they would not be linear, but affine
        terms: Any = node.args[0] if isinstance(node.args[0], (list, tuple)) else node.args[:2]
        return sources if all(term in moving for term in terms) else None
    if len(sources) != 1 or node.args.count(sources[0]) != 1:
        return None
    has_bias = target is aten.convolution.default and node.args[2] is not None
    return sources if node.args.index(sources[0]) in _LINEAR_AT.get(target, ()) and not has_bias else None


# Arguments in which an operator is linear while all others are numbers.
_VIEWS = (
    *(aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.t.default, aten.permute.default),
    *(aten.transpose.int, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default),
    *(aten.expand.default, aten.clone.default, aten.alias.default, aten.detach.default, aten.neg.default),
    *(aten.slice.Tensor, aten.select.int),
)
_MIXING = {
    *(aten.mm.default, aten.bmm.default, aten.convolution.default, aten.sum.dim_IntList, aten.mean.dim),
    operator.getitem,  # of a convolution's backward pass
}
_LINEAR_AT: dict[Any, tuple[int, ...]] = {
    **dict.fromkeys(_VIEWS, (0,)),
    **dict.fromkeys((aten.mul.Tensor, aten.mm.default, aten.bmm.default), (0, 1)),
    **dict.fromkeys((aten.div.Tensor, aten.sum.dim_IntList, aten.mean.dim, aten.convolution.default), (0,)),
}
_SUMS = {aten.add.Tensor, aten.sub.Tensor, aten.cat.default, aten.stack.default}
# Whose first result is linear in the first argument; and where the numbers lie on which it depends, too.
_BACKWARDS: dict[Any, tuple[int, ...]] = {
    aten.convolution_backward.default: (2,),
    aten.native_batch_norm_backward.default: (2, 4),
}


def _copy(node: fx.Node, graph: fx.Graph, new: dict[fx.Node, fx.Node], region: set[fx.Node]) -> fx.Node:
    """``node`` and what it needs, in another graph."""
    if node in new:
        return new[node]
    if node in region and node.target is operator.getitem:
        new[node] = _copy_backward(node, graph, new, region)
    else:
        for source in node.all_input_nodes:
            _copy(source, graph, new, region)
        new[node] = graph.node_copy(node, new.__getitem__)
    return new[node]


def _copy_backward(node: fx.Node, graph: fx.Graph, new: dict[fx.Node, fx.Node], region: set[fx.Node]) -> fx.Node:
    """The gradient in the input, without what the operator is given for other gradients and for shapes."""
    call: Any = node.args[0]
    grad, shape = _copy(call.args[0], graph, new, region), node.meta["val"]
    numbers = {place: call.args[place] for place in _BACKWARDS[call.target]}
    copied = {place: n and _copy(n, graph, new, region) for place, n in numbers.items()}
    like = {"dtype": shape.dtype, "device": shape.device}
    if call.target is aten.convolution_backward.default:
        nothing = graph.call_function(aten.full.default, (list(shape.shape), 0.0), like)
        args = (grad, nothing, copied[2], *call.args[3:10], [True, False, False])
        return graph.call_function(operator.getitem, (graph.call_function(call.target, args), 0))
    factor = graph.call_function(aten.rsqrt.default, (graph.call_function(aten.add.Tensor, (copied[4], call.args[8])),))
    if copied[2] is not None:
        factor = graph.call_function(aten.mul.Tensor, (factor, copied[2]))
    per_channel = [1, -1, *[1] * (shape.dim() - 2)]
    return graph.call_function(aten.mul.Tensor, (grad, graph.call_function(aten.view.default, (factor, per_channel))))
