"""How much memory a bound program takes, by the shapes of its values."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import fx

from pyxai_bounds import fuse, ops

# How many tensors of the size of its result an elementwise product holds while it rounds outward in plain PyTorch.
_TEMPORARIES = 12
_AFFINE_BACKWARD = (ops.interval_linear_backward, ops.interval_conv2d_backward)


def peak_bytes(graph: fx.Graph) -> int:
    """How many bytes the values of a program without gradients occupy where most of them are alive.

    A value lives from the operator that makes it to its last reader; a view keeps alive what it shows. What fused
    operators allocate inside counts (|W|, gated and widened copies); arguments, parameters and the buffers of libraries
    do not.
    """
    nodes = list(graph.nodes)
    grows = [0] * (len(nodes) + 1)  # by how many bytes more than one node before
    for storage in _storages(nodes):
        grows[storage.made] += storage.bytes
        grows[storage.last + 1] -= storage.bytes
    return max(alive + _inner_bytes(node) for node, alive in zip(nodes, accumulate(grows), strict=False))


@dataclass
class _Storage:
    """Memory of a value: it is made by the node at one position, and last read by that at another."""

    bytes: int
    made: int
    last: int


def _storages(nodes: list[fx.Node]) -> list[_Storage]:
    found: list[_Storage] = []
    held: dict[fx.Node, list[_Storage]] = {}  # behind each result of a node
    for position, node in enumerate(nodes):
        for source in node.all_input_nodes:
            for storage in held[source]:
                storage.last = position
        first = node.all_input_nodes[0] if node.all_input_nodes else node
        is_part = fuse.is_call(node, operator.getitem)
        if is_part and not is_view(first):
            held[node] = [held[first][node.args[1]]]  # type: ignore[index]
        elif is_part or is_view(node):
            held[node] = held[first]
        elif node.op == "call_function" and "val" in node.meta:
            held[node] = [_Storage(bytes_of(value), position, position) for value in results(node)]
            found += held[node]
        else:
            held[node] = []
    return found


def results(node: fx.Node) -> Sequence[Any]:
    """What a node returns, as the trace saw it: several values or one."""
    values = node.meta.get("val")
    return values if isinstance(values, (list, tuple)) else [values]


def is_view(node: fx.Node) -> bool:
    """Do its results show what its first argument holds?"""
    if not (node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload) and node.all_input_nodes):
        return False
    return any(result.alias_info is not None for result in node.target._schema.returns)


def bytes_of(value: Any) -> int:
    return value.numel() * value.dtype.itemsize if isinstance(value, torch.Tensor) else 0


def _inner_bytes(node: fx.Node) -> int:
    """The most that a fused operator allocates besides its results: |W| and the gated box.

    Rounded outward, also the widened radius and sums in float64, and the factors of a linear layer in float64; for an
    elementwise product, its terms.
    """
    if node.target in (ops.interval_mul, ops.interval_scale_shift) and any(node.args[4:]):
        result = node.meta["val"][0]
        return 0 if result.device.type == "cpu" and ops.native.available() else _TEMPORARIES * bytes_of(result)
    if node.target is ops.interval_conv2d_backward_relu:
        return bytes_of(node.args[2].meta["val"])  # type: ignore[union-attr]
    rounding_at = fuse.ROUNDING.get(node.target)
    if rounding_at is None:
        return 0
    mid, rad, weight, third = (n.meta["val"] if isinstance(n, fx.Node) else None for n in node.args[:4])
    inner = bytes_of(weight)
    if node.target in _AFFINE_BACKWARD and third is not None:
        inner += bytes_of(mid) + bytes_of(rad)
    if any(node.args[rounding_at:]):
        wide = bytes_of(node.meta["val"][0])
        if node.target in (ops.interval_linear, ops.interval_linear_backward):
            wide += bytes_of(mid) + bytes_of(weight)
        inner += bytes_of(rad) + 2 * wide
    return inner
