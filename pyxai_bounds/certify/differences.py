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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from pyxai_bounds.capture import Captured
from pyxai_bounds.certify.properties import TopK, rounding_loss
from pyxai_bounds.interval import Interval
from pyxai_bounds.program import BoundFunction, bound
from pyxai_bounds.rules.registry import Product

aten = torch.ops.aten

# Beyond, a sample's margin stays what the bounds of its entries say: numbers in the rows of a sample's entries, and
# products of the differences of its pairs, of which a core does some 1e9 a second.
MOST_NUMBERS, MOST_PRODUCTS = 2**20, 2**25
LARGEST_TABLE = 2**22  # numbers of the rows of all entries that are kept; else each sample's are made for it
AT_ONCE = 32  # entries whose rows are made by one call
MOST_CHANNELS = 3  # of which magnitudes are added: each has 2 signs


class Rows(Protocol):
    """An explanation as rows of numbers, one for each entry, by which one box is multiplied."""

    numbers: int  # in a row
    at_once: int | None  # so many entries are asked for by one call; None: they are at hand

    def rows(self, entries: Tensor) -> tuple[Tensor, Tensor]:
        """Those of some entries [N], in float64: [N, H], and radii of their numbers."""
        ...


def least_difference(property: TopK, nominal: Tensor, bounds: Interval, found: Rows, box: Box) -> float:
    """Of one sample, [1, ...]: at most the least difference between an entry of the top and one of the rest.

    -∞ where that would take too much, or the rows do not belong to this explanation.
    """
    lower, upper = (t[0].double() for t in property.scores(bounds))
    top = property.top(nominal)[0]
    least = lower[top].amin()
    open_ = ~top & ~(upper < least)
    known = torch.cat([least - upper[~top & ~open_], least.new_full((1,), math.inf)]).amin()
    signs, patterns = _signs(property, nominal)
    first, second = top.nonzero()[:, 0], open_.nonzero()[:, 0]
    numbers = len(signs) * (len(first) + len(second)) * found.numbers
    products = len(patterns) * len(first) * len(second) * found.numbers
    if not patterns or products > MOST_PRODUCTS or (found.at_once is not None and numbers > MOST_NUMBERS):
        return -math.inf
    firsts = _added(_channels(found, first, len(signs), nominal.numel()), signs[:, first], box)
    at_point = (signs * nominal.reshape(signs.shape))[:, first].sum(0)
    if _strays(firsts, box, at_point, torch.finfo(nominal.dtype).eps):
        return -math.inf

    # Where rows are made for each sample, those of whom most is to be feared come first.
    second = second[upper[second].argsort(descending=True)]
    for entries in second.split(found.at_once or len(second)) if len(second) else ():
        rows = _channels(found, entries, len(signs), nominal.numel())
        seconds = (_added(rows, pattern.expand(-1, len(entries)), box) for pattern in patterns)
        worst = torch.stack([_least_differences(firsts, some, box.rad) for some in seconds]).amin(0)
        worst = torch.where(worst.isnan(), -math.inf, worst)
        known = known.minimum(worst.maximum(lower[first][:, None] - upper[entries]).amin())
        if found.at_once is not None and known <= 0:
            return -math.inf
    return known.item()


def _channels(found: Rows, entries: Tensor, channels: int, numel: int) -> tuple[Tensor, Tensor]:
    """The rows of these entries of each channel, [C, N, H], and their radii."""
    wanted = torch.arange(channels, device=entries.device)[:, None] * (numel // channels) + entries
    mid, rad = (t.unflatten(0, (channels, -1)) for t in found.rows(wanted.flatten()))
    return mid, rad


def _strays(found: _Weighted, box: Box, nominal: Tensor, eps: float) -> bool:
    """Do entries lie outside their bounds by more than rounding? Then one sample is not explained as many are."""
    reach = found.rows.abs() @ box.rad + found.slack
    lost = 1e3 * eps * (found.at_mid.abs() + reach)
    return not bool(((nominal - found.at_mid).abs() <= reach + lost).all())


class Differences:
    """Margins of ``TopK`` by differences, of one function, for samples one by one; its parameters must not change."""

    def __init__(self, end: _End) -> None:
        self.end, self.numbers, self.are_all = end, end.numbers, end.is_shallow
        entries = end.like.numel()
        fits = entries * end.numbers <= LARGEST_TABLE
        self.at_once = None if fits else AT_ONCE
        self._table = [end.like.new_empty(entries, end.numbers) for _ in range(2)] if fits else None
        self._known = torch.zeros(entries, dtype=torch.bool, device=end.like.device)

    @staticmethod
    def of(captured: Captured, arguments: Sequence[Tensor], sound: bool, product: Product) -> Differences | None:
        """``captured``: the function of a single sample like the one in ``arguments``, [1, ...]. None where it does not
        end in linear layers, or where one of its parts has no bounds.
        """
        key = ("differences", sound, product)
        try:
            if key not in captured.derived:
                parts = _cut(captured.graph)
                end = None if parts is None else _End.of(*parts, sound, product)
                if end is not None:
                    end.rows(torch.zeros(1, dtype=torch.long, device=end.like.device))
                    end.box([Interval.point(arguments[0]), *arguments[1:]])
                captured.derived[key] = end
        except Exception:  # the bounds of the entries stand
            return None
        end = captured.derived[key]
        return None if end is None else Differences(end)

    def margin(
        self, property: TopK, nominal: Tensor, bounds: Interval, arguments: Sequence[Interval | Tensor]
    ) -> float:
        """Of one sample, [1, ...]: see :func:`least_difference`."""
        box = self.end.box(arguments)
        return -math.inf if box is None else least_difference(property, nominal, bounds, self, box)

    def rows(self, entries: Tensor) -> tuple[Tensor, Tensor]:
        """What gives these entries when it multiplies the box, [N, H], and its radii."""
        if self._table is None:
            found = self.end.rows(entries)
        else:
            new = entries[~self._known[entries]]
            if len(new):
                for kept, made in zip(self._table, self.end.rows(new), strict=True):
                    kept[new] = made
                self._known[new] = True
            found = self._table[0][entries], self._table[1][entries]
        return found[0].double(), found[1].double()


def _signs(property: TopK, nominal: Tensor) -> tuple[Tensor, list[Tensor]]:
    """What entries of the top are multiplied by, [channels added, entries ranked], and all that those of the rest may
    be, [channels, 1] each: |a| >= sign·a for either sign, and |b| is the greater of b and -b.
    """
    channels = nominal.shape[1] if property.channels == "sum" else 1
    signs = torch.where(nominal.reshape(channels, -1) < 0, -1.0, 1.0).double()
    if property.by == "signed":
        return torch.ones_like(signs), [torch.ones_like(signs[:, :1])]
    if channels > MOST_CHANNELS:
        return signs, []
    return signs, [signs.new_tensor(pattern)[:, None] for pattern in itertools.product((1.0, -1.0), repeat=channels)]


def _added(rows: tuple[Tensor, Tensor], signs: Tensor, box: Box) -> _Weighted:
    """Entries of all channels, each with its sign [C, N], added."""
    mid, size, rad = (signs[..., None] * rows[0]).sum(0), (rows[0].abs() + rows[1]).sum(0), rows[1].sum(0)
    greatest, loss = box.mid.abs() + box.rad, rounding_loss(len(box.mid) + len(signs))
    slack = rad @ greatest * (1 + loss) + 2 * loss * (size @ greatest) + TINY
    return _Weighted(mid, mid @ box.mid, slack)


# What underflows in float64, in sums of any length that fits into memory, is less.
TINY = 1e-290


@dataclass(frozen=True)
class Box:
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
    is_shallow: bool  # do these depend on one layer that mixes? Then nothing ties them to one another but the inputs

    @classmethod
    def of(
        cls, head: fx.GraphModule, tail: fx.GraphModule, cuts: list[Any], like: Any, sound: bool, product: Product
    ) -> _End:
        def adjoint(coefficients: Tensor) -> tuple[Tensor, ...]:
            points = [coefficients.new_zeros(cut.shape) for cut in cuts]
            return torch.func.vmap(torch.func.vjp(tail, *points)[1])(coefficients)

        return cls(
            bound(lambda *arguments: tuple(head(*arguments)), sound=sound, product=product),
            bound(adjoint, sound=sound),
            torch.zeros(like.shape, dtype=like.dtype, device=like.device),
            sum(math.prod(cut.shape) for cut in cuts),
            sum(node.target in _LAYERS for node in behind(head.graph.find_nodes(op="placeholder"))) <= 1,
        )

    def box(self, arguments: Sequence[Interval | Tensor]) -> Box | None:
        found = [t[0].double() for t in _vectors(self.head(*arguments))]
        return Box(*found) if all(bool(t.isfinite().all()) for t in found) else None

    def rows(self, entries: Tensor) -> tuple[Tensor, Tensor]:
        """What gives these entries when it multiplies the box, [N, H], and its radii."""
        found = [self._rows(some) for some in entries.split(AT_ONCE)]
        mid, rad = (torch.cat(parts) for parts in zip(*found, strict=True))
        return mid, rad

    def _rows(self, entries: Tensor) -> tuple[Tensor, Tensor]:
        coefficients = self.like.new_zeros(AT_ONCE, self.like.numel())  # one program for all
        coefficients[torch.arange(len(entries), device=entries.device), entries] = 1.0
        coefficients = coefficients.unflatten(1, self.like.shape)
        found = self.adjoint(Interval.of(coefficients, torch.zeros_like(coefficients)))
        mid, rad = _vectors(found, AT_ONCE)
        return mid[: len(entries)], rad[: len(entries)]


def _vectors(found: Sequence[Interval | Tensor], count: int = 1) -> tuple[Tensor, Tensor]:
    """All of it side by side, [count, H], midpoints and radii."""
    pairs = [(t.mid, t.rad) if isinstance(t, Interval) else (t, torch.zeros_like(t)) for t in found]
    mid, rad = (torch.cat([t.reshape(count, -1) for t in half], 1) for half in zip(*pairs, strict=True))
    return mid, rad


# --- where a captured function is cut --------------------------------------------------------------------------


def _cut(program: fx.GraphModule) -> tuple[fx.GraphModule, fx.GraphModule, list[Any], Any] | None:
    """(head, tail, what lies between, result), the last two as fake tensors.

    None if the last operator that mixes entries is not linear in what depends on the arguments.
    """
    graph = program.graph
    result: Any = graph.output_node().all_input_nodes[0]
    region, cuts = _linear_region(result, behind(graph.find_nodes(op="placeholder")))
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


def behind(nodes: Sequence[fx.Node]) -> set[fx.Node]:
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
        if node.args[1] != 0 or call.target not in BACKWARDS or call.args[0] not in moving:
            return None
        learns = call.target is aten.native_batch_norm_backward.default and call.args[7]
        fixed = all(call.args[place] not in moving for place in BACKWARDS[call.target])
        return [call.args[0]] if fixed and not learns else None
    sources = [arg for arg in node.all_input_nodes if arg in moving]
    if target in _SUMS:  # of numbers as well they would not be linear, but affine
        terms: Any = node.args[0] if isinstance(node.args[0], (list, tuple)) else node.args[:2]
        return sources if all(term in moving for term in terms) else None
    if len(sources) != 1 or node.args.count(sources[0]) != 1:
        return None
    has_bias = target is aten.convolution.default and node.args[2] is not None
    return sources if node.args.index(sources[0]) in LINEAR_AT.get(target, ()) and not has_bias else None


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
_LAYERS = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.convolution.default)
LINEAR_AT: dict[Any, tuple[int, ...]] = {
    **dict.fromkeys(_VIEWS, (0,)),
    **dict.fromkeys((aten.mul.Tensor, aten.mm.default, aten.bmm.default), (0, 1)),
    **dict.fromkeys((aten.div.Tensor, aten.sum.dim_IntList, aten.mean.dim, aten.convolution.default), (0,)),
}
_SUMS = {aten.add.Tensor, aten.sub.Tensor, aten.cat.default, aten.stack.default}
# Whose first result is linear in the first argument; and where the numbers lie on which it depends, too.
BACKWARDS: dict[Any, tuple[int, ...]] = {
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
    numbers = {place: call.args[place] for place in BACKWARDS[call.target]}
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
