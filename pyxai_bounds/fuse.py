"""Optimise a traced bound program: remove repetition, fuse stages, mark what needs no gradient.

The third stage of the engine. It works on the flat graph of tensors that the rules left behind; every pass
keeps the computed set the same in real arithmetic.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import _disable_current_modes

from pyxai_bounds import ops
from pyxai_bounds.capture import remove_unused
from pyxai_bounds.ops.layout import memory_format
from pyxai_bounds.rounding import without_autocast

aten = torch.ops.aten

VIEWS = (aten.view.default, aten._unsafe_view.default)  # unlike reshape, these fail on some layouts


def optimise(graph: fx.GraphModule) -> None:
    """Run all passes, in place."""
    for simplify in (
        _remove_no_ops,
        _cancel_transposes,
        _share_equal_nodes,
        _zeros_of_their_own,
        _compute_constants,
        _select_rows,
        _fold_scale_into_affine,
        _fold_scale_of_gradient_into_affine,
        _share_equal_nodes,
        _fuse_relu_into_affine,
        _fuse_relu_backward_after_convolution,
        _gate_gradients_where_they_are_made,
        _fuse_relu_backward_into_affine_backward,
        _reshape_instead_of_view,
        _flatten_as_images_lie,
    ):
        simplify(graph)
        remove_unused(graph.graph)  # what a pass leaves behind would look like a second user to the next
    mark_dead_gradients(graph.graph)
    graph.recompile()


def is_call(node: Any, target: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is target


def parts(node: fx.Node) -> dict[int, fx.Node]:
    """The getitem nodes of a node with several results, by position."""
    return {user.args[1]: user for user in node.users if is_call(user, operator.getitem)}  # type: ignore[misc]


def _both_from(mid: Any, rad: Any, target: Any) -> fx.Node | None:
    """The node that calls ``target`` and has ``mid`` and ``rad`` as its first two results; None if there is none."""
    if not (is_call(mid, operator.getitem) and is_call(rad, operator.getitem)):
        return None
    source = mid.args[0]
    if source is not rad.args[0] or (mid.args[1], rad.args[1]) != (0, 1) or not is_call(source, target):
        return None
    return source


def _only_used_by(parts: list[fx.Node], user: fx.Node) -> bool:
    return all(set(part.users) == {user} for part in parts)


def _nodes(graph: fx.GraphModule, target: Any) -> list[fx.Node]:
    return graph.graph.find_nodes(op="call_function", target=target)


def _remove_no_ops(graph: fx.GraphModule) -> None:
    """Views, expansions and paddings to the shape that the argument already has."""
    for target in (aten.view.default, aten.expand.default, aten.constant_pad_nd.default):
        for node in _nodes(graph, target):
            before = node.args[0].meta["val"]  # type: ignore[union-attr]
            padded = target is aten.constant_pad_nd.default and any(node.args[1])  # type: ignore[arg-type]
            if before.shape == node.meta["val"].shape and not padded:
                node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]


_COMPUTED = "_computed_"  # how the names of constants that were computed here begin
_SMALL = 1 << 14  # elements of a constant that may be kept for the life of the program


def _compute_constants(graph: fx.GraphModule) -> None:
    """Compute now what depends on no argument, such as the seed of a gradient and the zeros it is scattered into.

    Results of the program are not constants: the caller owns them and may write into them.
    """
    if ops.needs_dispatcher():
        return  # a mode is active, which would see these operators and might change what they return
    arguments = [node.meta.get("val") for node in graph.graph.find_nodes(op="placeholder")]
    devices = {
        t.device for t in arguments if isinstance(t, torch.Tensor)
    }  # a recording holds constants of its own device alone
    constant: dict[fx.Node, None] = {}
    for node in graph.graph.nodes:
        if _is_aten(node) and all(n in constant for n in node.all_input_nodes):
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor) and value.numel() <= _SMALL and value.device in devices:
                constant[node] = None
    values: dict[fx.Node, torch.Tensor] = {}
    with torch.inference_mode(False), torch.no_grad(), without_autocast():
        for node in constant:
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    for node, value in values.items():
        readers = [user for user in node.users if user not in constant]
        # Not if a result, or a constant that is too large to keep, may be a view of it.
        if not readers or any(
            user.op == "output" or all(n in constant for n in user.all_input_nodes) for user in readers
        ):
            continue
        name = f"{_COMPUTED}{node.name}"
        graph.register_buffer(name, value, persistent=False)
        with graph.graph.inserting_before(node):
            kept = graph.graph.get_attr(name)
        kept.meta = dict(node.meta)
        for user in readers:
            user.replace_input_with(node, kept)


def _zeros_of_their_own(graph: fx.GraphModule) -> None:
    """The radius of a point, zeros_like, becomes a constant where the point is known to be contiguous."""
    for node in _nodes(graph, aten.zeros_like.default):
        value = node.meta["val"]
        if value.dim() > 3 or not value.is_contiguous():
            continue  # its memory order is only known when the program runs
        with graph.graph.inserting_before(node):
            options = {"dtype": value.dtype, "device": value.device}
            zeros = graph.graph.call_function(aten.full.default, (list(value.shape), 0), options)
        zeros.meta = node.meta
        node.replace_all_uses_with(zeros)


def _select_rows(graph: fx.GraphModule) -> None:
    """The seed of a gradient (one-hot in the target) times the last weight selects rows of that weight."""
    for node in _nodes(graph, aten.mm.default):
        seed: Any
        seed, weight = node.args
        if not is_call(seed, aten.scatter_add.default):
            continue
        zeros, dim, index, ones = seed.args
        if (
            dim == 1
            and is_call(index, aten.unsqueeze.default)
            and index.args[1] in (1, -1)
            and index.meta["val"].dim() == 2
            and _is_constant(graph, zeros, 0)
            and _is_constant(graph, ones, 1)
            and ones.meta["val"].shape == index.meta["val"].shape
            and len(zeros.meta["val"]) == len(index.meta["val"])
        ):
            with graph.graph.inserting_before(node):
                rows = graph.graph.call_function(aten.index_select.default, (weight, 0, index.args[0]))
            rows.meta = node.meta
            node.replace_all_uses_with(rows)


def _is_constant(graph: fx.GraphModule, node: fx.Node, value: float) -> bool:
    """Is it a constant that ``_compute_constants`` made, not a parameter, and does it equal a number throughout?"""
    if node.op != "get_attr" or not str(node.target).startswith(_COMPUTED):
        return False
    return bool((operator.attrgetter(str(node.target))(graph) == value).all())


def _is_aten(node: fx.Node) -> bool:
    target = node.target
    return node.op == "call_function" and isinstance(target, torch._ops.OpOverload) and target.namespace == "aten"


def _cancel_transposes(graph: fx.GraphModule) -> None:
    for node in _nodes(graph, aten.t.default):
        inner = node.args[0]
        if is_call(inner, aten.t.default):
            node.replace_all_uses_with(inner.args[0])  # type: ignore[union-attr, arg-type]


def _reshape_instead_of_view(graph: fx.GraphModule) -> None:
    """Kernels may return other strides than the trace foresaw."""
    for view in VIEWS:
        for node in _nodes(graph, view):
            node.target = aten.reshape.default


def _share_equal_nodes(graph: fx.GraphModule) -> None:
    """Common-subexpression elimination: forward and backward pass use the same scales and |W|."""
    known: dict[Any, fx.Node] = {}
    for node in list(graph.graph.nodes):
        if node.op == "get_attr":
            key: Any = ("get_attr", id(operator.attrgetter(str(node.target))(graph)))
        elif node.op == "call_function":
            key = (node.target, _freeze(node.args), _freeze(node.kwargs))
        else:
            continue
        first = known.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.graph.erase_node(node)


def _freeze(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_freeze(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _freeze(v)) for k, v in value.items())
    return type(value), value


RELU = {ops.interval_linear: 4, ops.interval_conv2d: 8}  # operator → position of its relu flag
ROUNDING = {  # affine operator → position of its rounding
    ops.interval_linear: 5,
    ops.interval_linear_backward: 4,
    ops.interval_conv2d: 9,
    ops.interval_conv2d_backward: 9,
}


def _scaled_weight(graph: fx.Graph, weight: fx.Node, scale: fx.Node) -> fx.Node:
    """weight · scale, one factor per output channel (dimension 0)."""
    like = weight.meta["val"]
    column = graph.call_function(aten.reshape.default, (scale, [-1] + [1] * (like.dim() - 1)))
    column.meta["val"] = scale.meta["val"]
    product = graph.call_function(aten.mul.Tensor, (weight, column))
    product.meta["val"] = like
    return product


def _fold_scale_into_affine(graph: fx.GraphModule) -> None:
    """Batch norm after an affine operator: scale the weight once instead of the activations."""
    for node in _nodes(graph, ops.interval_scale_shift):
        if any(arg not in (None, 0) for arg in node.args[4:]):
            continue  # a scale that is a box, or a rounded product that would need one
        mid, rad, scale, shift = node.args[:4]
        for target, relu_at in RELU.items():
            affine = _both_from(mid, rad, target)
            if affine is None or affine.args[relu_at] or not _only_used_by([mid, rad], node):  # type: ignore[list-item]
                continue
            with graph.graph.inserting_before(node):
                weight, bias = affine.args[2], affine.args[3]
                new_bias = shift
                if bias is not None:
                    new_bias = graph.graph.call_function(aten.mul.Tensor, (bias, scale))
                    new_bias.meta["val"] = bias.meta["val"]  # type: ignore[union-attr]
                    if shift is not None:
                        new_bias = graph.graph.call_function(aten.add.Tensor, (new_bias, shift))
                        new_bias.meta["val"] = bias.meta["val"]  # type: ignore[union-attr]
                new_weight = _scaled_weight(graph.graph, weight, scale)  # type: ignore[arg-type]
                args = (*affine.args[:2], new_weight, new_bias, *affine.args[4:])
                _replace(graph.graph, node, target, args, affine.meta["val"])


def _fold_scale_of_gradient_into_affine(graph: fx.GraphModule) -> None:
    """The same batch norm on the way back: its scale goes into the weight of the transposed operator."""
    for target in (ops.interval_linear_backward, ops.interval_conv2d_backward):
        for node in _nodes(graph, target):
            mid, rad, weight, state, *rest = node.args
            scaling = _both_from(mid, rad, ops.interval_scale_shift)
            if state is not None or scaling is None or any(arg not in (None, 0) for arg in scaling.args[3:]):
                continue
            if not _only_used_by([mid, rad], node):  # type: ignore[list-item]
                continue
            with graph.graph.inserting_before(node):
                new_weight = _scaled_weight(graph.graph, weight, scaling.args[2])  # type: ignore[arg-type]
            node.args = (*scaling.args[:2], new_weight, None, *rest)


def _fuse_relu_into_affine(graph: fx.GraphModule) -> None:
    for node in _nodes(graph, ops.interval_relu):
        box = list(node.args[:2])
        for target, relu_at in RELU.items():
            affine = _both_from(node.args[0], node.args[1], target)
            if affine is None or affine.args[relu_at] or not _only_used_by(box, node):  # type: ignore[arg-type]
                continue
            with graph.graph.inserting_before(node):
                args = (*affine.args[:relu_at], True, *affine.args[relu_at + 1 :])
                _replace(graph.graph, node, target, args, node.meta["val"])


_GATE, _GATED = 9, 10  # positions in interval_conv2d_backward_relu


def _fuse_relu_backward_after_convolution(graph: fx.GraphModule) -> None:
    """Where kernels run, ReLU′ is an epilogue of the backward-data product before it."""
    for node in _nodes(graph, ops.interval_relu_backward):
        mid, rad, state, *rounding = node.args
        product = _both_from(mid, rad, ops.interval_conv2d_backward)
        if product is None or any(rounding) or not _only_used_by([mid, rad], node):  # type: ignore[list-item]
            continue
        args = _with_epilogue(product)
        if args is not None:
            with graph.graph.inserting_before(node):
                args[3] = state
                _replace(graph.graph, node, ops.interval_conv2d_backward_relu, tuple(args), node.meta["val"])


def _gate_gradients_where_they_are_made(graph: fx.GraphModule) -> None:
    """Let the operator that reads a gated box gate the gradients that its own derivative makes for that box.

    The gate, which is the derivative of ReLU′, is then an epilogue of a product. The box must have one reader and no
    other use: a gradient from elsewhere would not be gated.
    """
    for relu_backward in list(graph.graph.nodes):
        if is_call(relu_backward, ops.interval_relu_backward) and not any(relu_backward.args[3:]):
            gated: tuple = (*relu_backward.args[:3], 0, True)
        elif is_call(relu_backward, ops.interval_conv2d_backward_relu) and relu_backward.args[3] is not None:
            gated = (*relu_backward.args[:_GATED], True)
        else:
            continue
        results = parts(relu_backward)
        box = [results.get(0), results.get(1)]
        readers = {user for part in box if part is not None for user in part.users}
        reader = readers.pop() if len(readers) == 1 else None
        args = None if reader is None or list(reader.args[:2]) != box else _with_epilogue(reader)
        if reader is None or args is None or any(part is arg for part in box for arg in args[2:]):
            continue
        with graph.graph.inserting_before(reader):
            args[_GATE] = results.get(2) or graph.graph.call_function(operator.getitem, (relu_backward, 2))
            args[_GATE].meta["val"] = relu_backward.meta["val"][2]
            if reader.target is ops.interval_conv2d_backward:
                value = (*reader.meta["val"], args[_GATE].meta["val"].new_empty(0))
                _replace(graph.graph, reader, ops.interval_conv2d_backward_relu, tuple(args), value)
            else:
                reader.args = tuple(args)
        relu_backward.args = gated


def _with_epilogue(node: fx.Node) -> list[Any] | None:
    """The arguments of a backward-data product as an operator with an epilogue, if there are kernels for it."""
    if is_call(node, ops.interval_conv2d_backward_relu):
        return list(node.args)
    if not is_call(node, ops.interval_conv2d_backward) or node.args[3] is not None or any(node.args[9:]):
        return None
    return [*node.args[:9], None, False] if ops.has_kernels(node.meta["val"][0]) else None


def _fuse_relu_backward_into_affine_backward(graph: fx.GraphModule) -> None:
    for node in _nodes(graph, ops.interval_linear):
        mid, rad, weight, bias, relu, *rounding = node.args
        relu_backward = _both_from(mid, rad, ops.interval_relu_backward)
        if relu_backward is None or bias is not None or relu or not _only_used_by([mid, rad], node):  # type: ignore[list-item]
            continue
        with graph.graph.inserting_before(node):
            if is_call(weight, aten.t.default):
                plain = weight.args[0]  # type: ignore[union-attr]
            else:
                plain = graph.graph.call_function(aten.t.default, (weight,))
                plain.meta["val"] = weight.meta["val"]  # type: ignore[union-attr]
            args = (mid, rad, plain, None, *rounding)
            _replace(graph.graph, node, ops.interval_linear_backward, args, node.meta["val"][:2])
    for target in (ops.interval_linear_backward, ops.interval_conv2d_backward):
        for node in _nodes(graph, target):
            mid, rad, weight, state, *rest = node.args
            relu_backward = _both_from(mid, rad, ops.interval_relu_backward)
            if relu_backward is None or state is not None or not _only_used_by([mid, rad], node):  # type: ignore[list-item]
                continue
            if relu_backward.meta["val"][0].device.type != "cpu":
                continue  # products there do not gate their argument, and the derivative would compute ReLU′ again
            gate = parts(relu_backward).get(2)
            if gate is None or not gate.users:
                node.args = (*relu_backward.args[:2], weight, relu_backward.args[2], *rest)


def _replace(graph: fx.Graph, node: fx.Node, target: Any, args: tuple, value: Any) -> None:
    """Replace a node with several results by a call."""
    new = graph.call_function(target, args)
    new.meta["val"] = value
    if node.stack_trace:
        new.stack_trace = node.stack_trace
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def mark_dead_gradients(graph: fx.Graph) -> None:
    """Switch autograd off for nodes on which no result depends differentiably: less memory, the same gradients.

    A value reaches the results differentiably only along floating-point values. Packed states, masks and indices end
    the path, so for the logit gradient of a piecewise linear network the whole interval forward pass is dead.
    """
    alive = with_gradients(graph)
    enabled = True
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        if (node in alive) != enabled:
            enabled = not enabled
            with graph.inserting_before(node):
                graph.call_function(torch._C._set_grad_enabled, (enabled,))


def with_gradients(graph: fx.Graph) -> set[fx.Node]:
    """The nodes on which the results depend differentiably."""
    alive: set[fx.Node] = set()
    pending = list(graph.output_node().all_input_nodes)
    while pending:
        node = pending.pop()
        if node not in alive and _carries_gradient(node):
            alive.add(node)
            pending.extend(node.meta.get("differentiable", node.all_input_nodes))
    return alive


def _carries_gradient(node: fx.Node) -> bool:
    values = node.meta.get("val")
    values = values if isinstance(values, (list, tuple)) else [values]
    return any(isinstance(v, torch.Tensor) and v.is_floating_point() for v in values)


# --- images as rows -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rows:
    """An operator that reads images [B, C, H, W] as rows [B, C·H·W], or makes rows that are read as images."""

    node: fx.Node
    weight: fx.Node  # [M, C·H·W]
    flattened: tuple[fx.Node, ...]  # the images that it reads
    unflattened: tuple[fx.Node, ...]  # the images that its results are read as

    @property
    def shape(self) -> torch.Size:
        return (self.flattened + self.unflattened)[0].meta["val"].shape

    @property
    def columns(self) -> tuple[fx.Node, torch.Size]:
        """The weight, and the shape [C, H, W] that its columns stand for."""
        return self.weight, self.shape[1:]


def _flatten_as_images_lie(graph: fx.GraphModule) -> None:
    """Reorder the columns of a weight instead of flattening channels-last images to rows in the order of channels.

    Such rows are copies of the images, of midpoint and radius, forward and backward; rows in memory order are the
    images themselves. One reordered copy of the weight serves both passes. It is not made where it is as large as the
    copies that it saves, or where no kernels run.
    """
    found = [rows for node in graph.graph.nodes if (rows := _flattening(node) or _unflattening(node))]
    saved: dict[Any, int] = {}
    for rows in found:
        copies = len(rows.flattened + rows.unflattened) * rows.shape.numel()
        saved[rows.columns] = saved.get(rows.columns, 0) + copies
    known: dict[Any, fx.Node] = {}
    moved: set[fx.Node] = set()
    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad(), without_autocast():
        for rows in found:  # in the order of the program, because later ones use what earlier ones insert
            if saved[rows.columns] > rows.weight.meta["val"].numel():
                moved |= _reorder(graph.graph, rows, known)
        for node in graph.graph.nodes:  # the results of operators follow the order of images
            if node.op == "call_function" and moved.intersection(node.all_input_nodes):
                node.meta["val"] = _foreseen(node)
                moved.add(node)


def _flattening(node: fx.Node) -> _Rows | None:
    """A linear layer on a box of channels-last images."""
    if not is_call(node, ops.interval_linear) or any(node.args[ROUNDING[ops.interval_linear] :]):
        return None
    mid, rad = (_image_behind(rows) for rows in node.args[:2])
    if mid is None or rad is None or mid.meta["val"].shape != rad.meta["val"].shape:
        return None
    fits = _is_channels_last(mid) and ops.has_kernels(mid.meta["val"])
    return _Rows(node, node.args[2], (mid, rad), ()) if fits else None  # type: ignore[arg-type]


def _image_behind(rows: Any) -> fx.Node | None:
    """The images [B, C, H, W] that were flattened to these rows [B, C·H·W], if they were."""
    if not is_call(rows, aten.reshape.default) or rows.meta["val"].dim() != 2:
        return None
    image = rows.args[0].args[0] if is_call(rows.args[0], aten.clone.default) else rows.args[0]
    value = image.meta["val"]
    return image if value.dim() == 4 and len(value) == len(rows.meta["val"]) else None


def _unflattening(node: fx.Node) -> _Rows | None:
    """An operator whose results are all read as images, and some of them channels-last."""
    weight = _summed_rows(node)
    if weight is None:
        return None
    results = parts(node).values() if node.target in ROUNDING else [node]
    views = tuple(user for result in results for user in result.users)
    shapes = {view.meta["val"].shape if is_call(view, aten.reshape.default) else None for view in views}
    shape = shapes.pop() if len(shapes) == 1 else None
    if shape is None or len(shape) != 4 or shape[1:].numel() != weight.meta["val"].shape[1]:
        return None
    wanted = any(_is_read_channels_last(view) for view in views) and ops.has_kernels(views[0].meta["val"])
    return _Rows(node, weight, (), views) if wanted else None


def _summed_rows(node: Any) -> fx.Node | None:
    """The weight if every result of the operator is a sum or a choice of its rows, else None."""
    if is_call(node, ops.interval_linear_backward) and not any(node.args[ROUNDING[ops.interval_linear_backward] :]):
        return node.args[2]
    if is_call(node, ops.interval_linear) and is_call(node.args[2], aten.t.default) and not any(node.args[3:]):
        return node.args[2].args[0]
    if is_call(node, aten.index_select.default) and node.args[1] == 0 and node.args[0].meta["val"].dim() == 2:
        return node.args[0]
    return node.args[1] if is_call(node, aten.mm.default) else None


def _is_channels_last(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and memory_format(value) is torch.channels_last


def _is_read_channels_last(image: fx.Node) -> bool:
    """Does an operator read it together with a channels-last image, or with bits that were packed channels-last?"""
    shape = image.meta["val"].shape
    bits = (2, (shape.numel() + 7) // 8, 1)
    for user in image.users:
        for other in user.all_input_nodes if user.op == "call_function" else ():
            found = getattr(other.meta.get("val"), "shape", None)
            if found == bits or (found == shape and _is_channels_last(other)):
                return True
    return False


_ROWS_AT: dict[Any, int] = {aten.index_select.default: 0, aten.mm.default: 1}  # position of the weight; 2 in others


def _reorder(graph: fx.Graph, rows: _Rows, known: dict[Any, fx.Node]) -> set[fx.Node]:
    """Let one operator work on rows in memory order; returns the images whose memory order changes by that.

    ``known``: the weights and images that have been brought into that order for earlier operators.
    """
    batch, channels, height, width = rows.shape
    node = rows.node
    with graph.inserting_before(node):
        if rows.columns not in known:
            image = _insert(graph, aten.reshape.default, rows.weight, [-1, channels, height, width])
            image = _insert(graph, aten.permute.default, image, [0, 2, 3, 1])
            image = _insert(graph, aten.clone.default, image, memory_format=torch.contiguous_format)
            known[rows.columns] = _insert(graph, aten.reshape.default, image, [-1, channels * height * width])
        weight = known[rows.columns]
        if node.target is ops.interval_linear and rows.unflattened:
            weight = _insert(graph, aten.t.default, weight)
        for position, image in enumerate(rows.flattened):
            if image not in known:
                lying = _insert(graph, aten.permute.default, image, [0, 2, 3, 1])
                known[image] = _insert(graph, aten.reshape.default, lying, [batch, channels * height * width])
            node.update_arg(position, known[image])
    node.update_arg(_ROWS_AT.get(node.target, 2), weight)
    made = set()
    for view in rows.unflattened:
        with graph.inserting_before(view):
            lying = _insert(graph, aten.reshape.default, view.args[0], [batch, height, width, channels])
            image = _insert(graph, aten.permute.default, lying, [0, 3, 1, 2])
        view.replace_all_uses_with(image)
        made.add(image)
    return made


def _insert(graph: fx.Graph, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    node = graph.call_function(target, args, kwargs)
    node.meta["val"] = _foreseen(node)
    return node


def _foreseen(node: Any) -> Any:
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    return node.target(*args, **kwargs)
