"""Which graphs of a single sample [1, ...] may be run on several at once [B, ...], row by row, and how.

A graph is captured at one sample, and its operators would take more. That each of them then treats every row as it
would by itself is no matter of trust: it is read off the graph, operator by operator, from the box to the result. What
is not in the tables here, or has its arguments in another order, is run sample by sample.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from pyxai_bounds.certify.differences import behind
from pyxai_bounds.fuse import VIEWS
from pyxai_bounds.patterns import Part, norms

aten = torch.ops.aten

_ELEMENTWISE = frozenset(
    (aten.relu.default, aten.leaky_relu.default, aten.abs.default, aten.neg.default, aten.exp.default,
     aten.log.default, aten.sqrt.default, aten.rsqrt.default, aten.sigmoid.default, aten.tanh.default,
     aten.softplus.default, aten.elu.default, aten.gelu.default, aten.silu.default, aten.hardtanh.default,
     aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default, aten.pow.Tensor_Scalar,
     aten.add.Tensor, aten.add.Scalar,
     aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar, aten.rsub.Tensor, aten.mul.Tensor, aten.mul.Scalar,
     aten.div.Tensor, aten.div.Scalar, aten.threshold_backward.default, aten.leaky_relu_backward.default,
     aten.softplus_backward.default, aten.elu_backward.default, aten.hardtanh_backward.default,
     aten.gelu_backward.default, aten.silu_backward.default, aten.tanh_backward.default,
     aten.sigmoid_backward.default, aten.clone.default, aten.alias.default, aten.detach.default)
)  # fmt: skip


@dataclass(frozen=True)
class Rows:
    """graph: the given one, without what says that there is one sample. shared: of its nodes, the arguments that are
    the same for all rows and are to be repeated for each. own: what depends on the function's other arguments, and is
    read row by row; None where it is not, so that these arguments must be the same for all rows.
    """

    graph: fx.GraphModule
    shared: dict[fx.Node, list[fx.Node]]
    own: frozenset[fx.Node] | None

    @classmethod
    def of(cls, program: fx.GraphModule) -> Rows | None:
        """``program``: a function whose first argument is the sample. None where rows might meet."""
        graph = fx.Graph()
        new: dict[fx.Node, fx.Node] = {}
        for node in program.graph.nodes:
            new[node] = graph.node_copy(node, new.__getitem__)
        first, *others = graph.find_nodes(op="placeholder") or [None]
        if first is None or _length(first) != 1:
            return None
        moving, rows = behind([first]), {first}
        chosen, read, own = behind(others) - moving, set[fx.Node](), set[fx.Node]()
        shared: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.nodes:
            if node not in moving or node is first or node.op == "output":
                continue
            if node.target is operator.getitem:  # what reads another result than these is refused
                if node.args[0] in rows and _length(node) == _length(shared[node.args[0]][0]) and _is_of_rows(node):
                    rows.add(node)
                continue
            places = _places(node)
            if places is None:
                return None
            apart = _nodes([node.args[place] for place in places])
            at = {place % len(node.args) for place in places}
            rest = {place: arg for place, arg in enumerate(node.args) if place not in at}
            read.update(_nodes([rest, node.kwargs]))
            for place in _IGNORED.get(node.target, ()):
                rest.pop(place, None)
            # What is a sample in one place may be a weight in another.
            if not moving.union(apart).isdisjoint(_nodes([rest, node.kwargs])):
                return None
            if not rows.issuperset(moving.intersection(apart)) or not _have_one_length(node, apart):
                return None
            rows.add(node)
            shared[node] = list(dict.fromkeys(apart))
            own.update(chosen.intersection(apart))
            if node.target in VIEWS or node.target is aten.expand.default:
                node.args = (node.args[0], [-1, *node.meta["val"].shape[1:]], *node.args[2:])
            if node.target in _GROUP_NORMS:  # the rules look at the shape, and PyTorch refuses this
                node.update_arg(_GROUP_NORMS[node.target], -1)
        results = graph.output_node().all_input_nodes
        if not rows.issuperset(results) or any(_length(n) != 1 for n in results):
            return None
        if not _are_of_rows(norms(graph), moving, rows):
            return None
        known = moving if not chosen.isdisjoint(read) else moving | own
        shared = {node: [arg for arg in args if arg not in known] for node, args in shared.items()}
        return cls(fx.GraphModule(program, graph), shared, None if known is moving else frozenset(own))


def _length(n: fx.Node) -> int:
    """Of the first dimension of a tensor that has numbers; else 0."""
    value = n.meta.get("val")
    return len(value) if isinstance(value, Tensor) and value.dim() > 0 and value.numel() > 0 else 0


def _have_one_length(n: fx.Node, apart: Sequence[fx.Node]) -> bool:
    """Has as much of the result as of all arguments that count rows to do with one of these?"""
    lengths = {_length(arg) for arg in apart}
    if n.target in VIEWS:  # rows lie one after the other, in whatever shape
        return 0 not in {*lengths, _length(n)}
    return 0 not in lengths and len(lengths if n.target in _SEVERAL else {*lengths, _length(n)}) == 1


def _nodes(args: Any) -> list[fx.Node]:
    return [arg for arg in pytree.tree_leaves(args) if isinstance(arg, fx.Node)]


def _places(n: fx.Node) -> Sequence[int] | None:
    """The places of the arguments whose first dimension counts rows, or as much as each row has of it, of an operator
    that keeps these apart; None where it may not.
    """
    if n.target in _ELEMENTWISE:  # what else there is is broadcast, in whatever number of rows
        nodes = [(place, arg) for place, arg in enumerate(n.args) if isinstance(arg, fx.Node)]
        return [place for place, arg in nodes if _dims(arg) == _dims(n) and _length(arg) == _length(n)]
    rule = _RULES.get(n.target)
    if rule is None or n.kwargs.keys() - {"dtype"}:
        return None
    places, keeps = rule
    return places if keeps(n) else None


def _is_of_rows(n: Any) -> bool:
    """Has this result of an operator a row for each sample?"""
    (call, place), users = n.args, n.users
    if call.target in _POOLS and place == 1:  # whatever else reads places is not looked into
        return all(user.target in _POOL_GRADIENTS and user.args[-1] is n for user in users)
    return place == 0 or call.target in (*_SPLITS, _LAYER_NORM, aten.native_group_norm.default)


def _are_of_rows(parts: Mapping[fx.Node, Part], moving: set[fx.Node], rows: set[fx.Node]) -> bool:
    """Do norms that are recognised in plain operators, and bounded as a whole, look at one row each?"""
    return all(part.x not in moving or (part.x in rows and part.dims < _dims(part.x)) for part in parts.values())


def _dims(n: Any) -> int:
    value = n.meta.get("val")
    return value.dim() if isinstance(value, Tensor) else 0


def _dim(place: int, usual: int | None = None) -> Callable[[Any], bool]:
    """Is the dimension that an argument names, or each of them, another than the rows'?"""

    def keeps(n: Any) -> bool:
        named: Any = n.args[place] if len(n.args) > place else usual
        dims = [named] if isinstance(named, int) else named
        return bool(dims) and all(d % (_dims(n.args[0]) or 1) != 0 for d in dims)

    return keeps


def _always(n: Any) -> bool:
    return True


_IMAGES = (aten.avg_pool2d.default, aten._adaptive_avg_pool2d.default)
_POOLS = {  # of maxima, with their gradients: the places that they name lie each in its own row's image
    **{aten.max_pool2d_with_indices.default: 4, aten.adaptive_max_pool2d.default: 4},
    **{aten.max_pool3d_with_indices.default: 5, aten.adaptive_max_pool3d.default: 5},
}
_POOL_GRADIENTS = {
    **{aten.max_pool2d_with_indices_backward.default: 4, aten.adaptive_max_pool2d_backward.default: 4},
    **{aten.max_pool3d_with_indices_backward.default: 5, aten.adaptive_max_pool3d_backward.default: 5},
}
_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int)
_LAYER_NORM, _LAYER_NORM_BACKWARD = aten.native_layer_norm.default, aten.native_layer_norm_backward.default
# With the places of the number of samples.
_GROUP_NORMS = {aten.native_group_norm.default: 3, aten.native_group_norm_backward.default: 5}
_Rule = tuple[tuple[int, ...], Callable[[Any], bool]]
_RULES: dict[Any, _Rule] = {
    **dict.fromkeys(VIEWS, ((0,), _always)),
    **dict.fromkeys(_IMAGES, ((0,), lambda n: _dims(n.args[0]) == 4)),
    aten.avg_pool2d_backward.default: ((0, 1), lambda n: _dims(n.args[0]) == 4),
    aten._adaptive_avg_pool2d_backward.default: ((0, 1), lambda n: _dims(n.args[0]) == 4),
    **dict.fromkeys(_POOLS, ((0,), lambda n: _dims(n.args[0]) == _POOLS[n.target])),
    **dict.fromkeys(_POOL_GRADIENTS, ((0, 1, -1), lambda n: _dims(n.args[1]) == _POOL_GRADIENTS[n.target])),
    aten.constant_pad_nd.default: ((0,), lambda n: len(n.args[1]) < 2 * _dims(n.args[0])),
    aten.permute.default: ((0,), lambda n: bool(n.args[1][0] == 0)),
    aten.transpose.int: ((0,), lambda n: _dim(1)(n) and _dim(2)(n)),
    aten.unsqueeze.default: ((0,), lambda n: bool(n.args[1] % (_dims(n.args[0]) + 1))),
    aten.squeeze.dim: ((0,), _dim(1)),
    aten.expand.default: ((0,), lambda n: len(n.args[1]) == _dims(n.args[0])),
    aten.select.int: ((0,), _dim(1)),
    aten.slice.Tensor: ((0,), _dim(1, 0)),
    **dict.fromkeys(_SPLITS[:2], ((0,), _dim(2, 0))),
    aten.unbind.int: ((0,), _dim(1, 0)),
    **dict.fromkeys((aten.cat.default, aten.stack.default), ((0,), lambda n: len(n.args) > 1 and n.args[1] % _dims(n))),
    aten.gather.default: ((0, 2), _dim(1)),
    aten.index_select.default: ((0,), _dim(1)),
    **dict.fromkeys((aten.sum.dim_IntList, aten.mean.dim, aten.amax.default), ((0,), _dim(1))),
    **dict.fromkeys((aten._softmax.default, aten._log_softmax.default), ((0,), _dim(1))),
    **dict.fromkeys((aten._softmax_backward_data.default, aten._log_softmax_backward_data.default), ((0, 1), _dim(2))),
    # Of each row its own loss; the others are divided by what all rows weigh.
    aten.nll_loss_forward.default: ((0, 1), lambda n: n.args[3] == 0 and _dims(n.args[0]) == 2),
    aten.nll_loss_backward.default: ((0, 1, 2), lambda n: n.args[4] == 0 and _dims(n.args[1]) == 2),
    aten.mm.default: ((0,), _always),
    aten.addmm.default: ((1,), _always),
    aten.bmm.default: ((0, 1), _always),
    aten.convolution.default: ((0,), lambda n: _dims(n.args[0]) == _dims(n.args[1])),
    aten.convolution_backward.default: ((0, 1), lambda n: _dims(n.args[0]) == _dims(n.args[2])),
    aten.native_batch_norm.default: ((0,), lambda n: not n.args[5]),
    aten.native_batch_norm_backward.default: ((0, 1), lambda n: not n.args[7]),
    _LAYER_NORM: ((0,), lambda n: len(n.args[1]) < _dims(n.args[0])),
    _LAYER_NORM_BACKWARD: ((0, 1, 3, 4), lambda n: len(n.args[2]) < _dims(n.args[1])),
    aten.native_group_norm.default: ((0,), _always),
    aten.native_group_norm_backward.default: ((0, 1, 2, 3), _always),
}
_SEVERAL = {
    *(aten.native_batch_norm.default, aten.native_batch_norm_backward.default, aten.convolution_backward.default),
    *(_LAYER_NORM, _LAYER_NORM_BACKWARD, *_GROUP_NORMS, aten.nll_loss_forward.default, *_POOLS, *_SPLITS),
}
# Statistics of the batch, which are empty where the running ones are used, and what losses are divided by, or not.
_IGNORED: dict[Any, tuple[int, ...]] = {
    aten.native_batch_norm_backward.default: (5, 6),
    aten.nll_loss_backward.default: (6,),
}
