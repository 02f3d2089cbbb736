"""Chains: affine operators of a bound program that follow one another become one call of the native backend.

Stands between ``fuse``, which makes these operators, and ``recompute``. A chain takes linear layers, convolutions,
their backward passes, and views that flatten images between them. Its derivative is one call, too.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from pyxai_bounds import fuse, ops
from pyxai_bounds.ops import chain as calls
from pyxai_bounds.ops.chain import Kernel, Kind, Step
from pyxai_bounds.ops.layout import memory_format, order_of, state_size

aten = torch.ops.aten

_BACKWARD = {ops.interval_linear: False, ops.interval_linear_backward: True,
             ops.interval_conv2d: False, ops.interval_conv2d_backward: True}  # fmt: skip
_LINEAR = (ops.interval_linear, ops.interval_linear_backward)
_VIEWS = (aten.clone.default, aten.reshape.default)
_Taken = tuple[Kernel, tuple[int, ...]]  # of a step


class Chain:
    """A function of the ``given`` tensors that returns the values ``taken``: see ``ops.chain.Chain``. No gradients.

    Where another backend is chosen, or a tensor has another layout than expected, the operators run one by one.
    """

    __name__ = "chain"  # fx needs a name for every function

    def __init__(self, steps: list[Step], values: list[Kind], given: int, taken: list[int]) -> None:
        self.steps, self.taken, self._kinds = steps, taken, values
        alive = [step for step in steps if step.differentiable]
        self.made = {number for step in alive for number in (step.out_mid, step.out_rad)}  # with a gradient
        # The derivative reads what its kernels read. If the steps must run again instead, they start from that, too.
        read = {number for step in alive for number in step.reads() if number not in self.made or not step.moves}
        read |= {step.state for step in alive if step.state is not None}
        self.together = calls.Chain(steps, values, given, taken, read)
        # For each result, the given values on which it depends differentiably.
        sources: dict[int | None, set[int]] = {number: {number} for number in range(given)}
        for step in steps:
            through = step.reads()[: 3 if step.backward else 4] if step.differentiable else []
            for made in (step.out_mid, step.out_rad):
                sources[made] = set().union(*(sources.get(number, set()) for number in through))
        self.sources = [sources.get(number, set()) for number in taken]

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        addresses = self.addresses(tensors)
        if addresses is not None:
            return self.together.run(addresses)
        values = dict(enumerate(tensors))
        self.run_each(values, self.steps, ops.undispatched)
        return [values[number] for number in self.taken]

    def addresses(self, tensors: tuple[Tensor, ...]) -> list[int] | None:
        """The addresses that ``together`` needs; None if it cannot run these tensors."""
        return self.together.addresses(tensors) if ops.forced() in ("auto", "native") else None

    def with_gradients(self, *tensors: Tensor) -> list[Tensor]:
        """Each operator by itself, and recorded by autograd where it is differentiable."""
        values = dict(enumerate(tensors))
        for step in self.steps:
            with torch.set_grad_enabled(step.differentiable):
                self.run_each(values, [step], ops.recorded if step.differentiable else ops.undispatched)
        return [values[number] for number in self.taken]

    def run_each(self, values: dict[int, Tensor], steps: Iterable[Step], operators: dict[Any, Any]) -> None:
        """Add the results of the steps to the values."""
        for step in steps:
            if step.moves:
                values[step.out_mid] = values[step.mid].reshape(self._kinds[step.out_mid].shape)
                continue
            assert step.rad is not None and step.weight is not None and step.out_rad is not None
            third = None if step.third is None else values[step.third]
            box = values[step.mid], values[step.rad], values[step.weight], third
            convolves = step.kernel is Kernel.CONV2D
            if step.backward:
                run = operators[ops.interval_conv2d_backward if convolves else ops.interval_linear_backward]
                values[step.out_mid], values[step.out_rad] = run(*box, *step.rest)
            else:
                run = operators[ops.interval_conv2d if convolves else ops.interval_linear]
                *out, state = run(*box, *step.rest, step.state is not None)
                values[step.out_mid], values[step.out_rad] = out
                if step.state is not None:
                    values[step.state] = state


def chain(graph: fx.Graph, grads: bool = False) -> None:
    """Replace operators in a row by one call.

    ``grads``: the program has marks that switch autograd on and off, which are set anew. Inputs need ``meta["val"]``.
    """
    alive = fuse.with_gradients(graph) if grads else set()
    kernels = {node: taken for node in graph.nodes if (taken := _kernel(node, node in alive)) is not None}
    refused: set[fx.Node] = set()
    while True:
        runs = _runs(graph, kernels, refused)
        # Views that something outside of the chain reads must stay outside, too: their layout is then the usual one.
        seen = {node for run in runs for node in run.nodes if _is_view(node) and set(node.users) - run.nodes.keys()}
        if not seen:
            break
        refused |= seen
    runs = [run for run in runs if sum(taken is not None for taken in run.nodes.values()) > 1]
    if not runs:
        return
    for run in runs:
        _replace(graph, run, alive)
    if grads:
        for mark in graph.find_nodes(op="call_function", target=torch._C._set_grad_enabled):
            graph.erase_node(mark)
        fuse.mark_dead_gradients(graph)


def _is_view(node: Any) -> bool:
    """Does it copy or reshape into PyTorch's contiguous order?"""
    order = node.kwargs.get("memory_format", torch.contiguous_format)
    return node.op == "call_function" and node.target in _VIEWS and order is torch.contiguous_format


@dataclass
class _Run:
    """Operators in a row, and the nodes between them that can move behind the last operator."""

    nodes: dict[fx.Node, _Taken | None] = field(default_factory=dict)  # the operators with their kernels; None: a view
    parts: set[fx.Node] = field(default_factory=set)  # the nodes of their results
    late: list[fx.Node] = field(default_factory=list)  # other nodes that depend on results, in order
    between: int = 0  # how many of these stand before the last operator
    waiting: set[fx.Node] = field(default_factory=set)  # those of them that are not just results
    dtype: torch.dtype | None = None  # of all its boxes

    def takes(self, node: fx.Node) -> bool:
        """May the node, an operator or a view, be the next?"""
        if any(n in self.waiting for n in node.all_input_nodes):
            return False
        if _is_view(node):
            return node.args[0] in self.parts
        # A weight must come from outside.
        return self.dtype in (None, _dtype(node)) and node.args[2] not in self.parts

    def add(self, node: fx.Node, taken: _Taken | None) -> None:
        self.nodes[node] = taken
        self.between = len(self.late)
        self.dtype = self.dtype or _dtype(node)
        if _is_view(node):
            self.parts.add(node)


def _dtype(node: Any) -> torch.dtype:
    return node.args[0].meta["val"].dtype


def _runs(graph: fx.Graph, kernels: dict[fx.Node, _Taken], refused: set[fx.Node]) -> list[_Run]:
    runs = [_Run()]
    for node in graph.nodes:
        run, taken = runs[-1], kernels.get(node)
        fits = (taken is not None or (_is_view(node) and node not in refused)) and run.takes(node)
        if fits or taken is not None:
            if not fits:
                run = _Run()
                runs.append(run)
            run.add(node, taken)
        elif fuse.is_call(node, operator.getitem) and node.args[0] in run.nodes:
            run.parts.add(node)
            run.late.append(node)
        elif any(n in run.waiting or n in run.parts for n in node.all_input_nodes):
            run.waiting.add(node)
            run.late.append(node)
    return runs


def _kernel(node: Any, differentiable: bool) -> _Taken | None:
    """The kernel that a chain runs for an affine operator; None if it cannot take the operator."""
    if node.op != "call_function" or node.target not in _BACKWARD:
        return None
    mid, rad, weight, third, *rest = node.args
    backward = _BACKWARD[node.target]
    if any(node.args[fuse.ROUNDING[node.target] :]) or not isinstance(weight, fx.Node):
        return None  # chains round to nearest
    mid, rad, weight = (n.meta["val"] for n in (mid, rad, weight))
    third = third.meta["val"] if isinstance(third, fx.Node) else None
    if node.target in _LINEAR:
        return calls.kernel_of(mid, rad, weight, third, backward, (), differentiable)
    if not _is_dense(weight) or mid.dim() != 4:
        return None
    if third is not None and backward and order_of(third) is torch.channels_last:  # as the bits say
        mid, rad = (t.contiguous(memory_format=torch.channels_last) for t in (mid, rad))
    geometry = rest[:5] if backward else (mid.shape, *rest[:4])
    return calls.kernel_of(mid, rad, weight, third, backward, tuple(geometry), differentiable)


def _is_dense(t: Tensor) -> bool:
    return t.is_contiguous(memory_format=memory_format(t))


def _replace(graph: fx.Graph, run: _Run, alive: set[fx.Node]) -> None:
    """One call in place of a run."""
    *_, last = run.nodes
    after = last
    for node in run.late[: run.between]:
        after.append(node)
        after = node
    results = [part for node in run.nodes for part in fuse.parts(node).values()]
    values = _Values(run, results)
    for node, kernel in run.nodes.items():
        values.add(node, kernel, node in alive)
    taken = [part for part in results if any(user not in run.nodes for user in part.users)]
    numbers = [values.numbers[part] for part in taken]
    function = Chain(values.steps, values.kinds, len(values.given), numbers)
    with graph.inserting_after(last):
        call = graph.call_function(function, tuple(values.given))
    call.meta["val"] = [part.meta["val"] for part in taken]
    call.meta["differentiable"] = [values.given[number] for number in sorted(set().union(*function.sources))]
    for position, part in enumerate(taken):
        with graph.inserting_after(call):
            result = graph.call_function(operator.getitem, (call, position))
        result.meta = part.meta
        part.replace_all_uses_with(result)
    for node in reversed(run.nodes):
        for part in list(node.users):
            graph.erase_node(part)
        graph.erase_node(node)


class _Values:
    """Numbers the values of a run, given ones first, and turns its operators into steps."""

    def __init__(self, run: _Run, results: list[fx.Node]) -> None:
        inputs = (n for node in run.nodes for n in node.all_input_nodes)
        made = {*results, *run.nodes}
        self.given = list(dict.fromkeys(n for n in inputs if n not in made))
        self.kinds = [_kind(node.meta["val"]) for node in self.given]
        self.numbers: dict[fx.Node, int] = {node: number for number, node in enumerate(self.given)}
        self.steps: list[Step] = []
        self._in_order: dict[tuple[int, torch.memory_format, bool], int] = {}

    def add(self, node: Any, taken: _Taken | None, differentiable: bool) -> None:
        if taken is None:
            source = self._ordered(self.numbers[node.args[0]], torch.contiguous_format, differentiable)
            self.numbers[node] = self._new(node.meta["val"].shape, self.kinds[source], torch.contiguous_format)
            self._move(Kernel.VIEW, source, self.numbers[node], (), differentiable)
            return
        kernel, shape = taken
        backward = _BACKWARD[node.target]
        mid, rad, weight, third = (self.numbers[n] if isinstance(n, fx.Node) else None for n in node.args[:4])
        assert mid is not None and rad is not None
        order = torch.contiguous_format
        if kernel is Kernel.CONV2D:
            order = torch.channels_last
            mid, rad = (self._ordered(number, order, differentiable) for number in (mid, rad))
        outputs: list[int | None] = [None] * 3
        made = node.meta["val"][: 3 if not backward and node.args[fuse.RELU[node.target]] else 2]
        for position, value in enumerate(made):
            outputs[position] = len(self.kinds)
            if position < 2:
                self.kinds.append(Kind(tuple(value.shape), value.dtype, order))
            else:  # in the order that the kernel writes, which may differ from the trace's
                bits = state_size(torch.empty(made[0].shape, device="meta").contiguous(memory_format=order))
                self.kinds.append(Kind(bits, torch.uint8, torch.contiguous_format))
        for position, part in fuse.parts(node).items():
            if position < len(made):
                self.numbers[part] = outputs[position]  # type: ignore[assignment]
        rest = () if kernel is not Kernel.CONV2D else node.args[4 : 9 if backward else 8]
        out_mid, out_rad, state = outputs
        assert out_mid is not None
        self.steps.append(
            Step(kernel, backward, differentiable, mid, rad, weight, third, out_mid, out_rad, state, shape, rest)
        )

    def _ordered(self, number: int, order: torch.memory_format, differentiable: bool) -> int:
        """The number of an image in this memory order; transposed at most once with gradients and once without."""
        kind, key = self.kinds[number], (number, order, differentiable)
        if kind.order is order:
            return number
        if key not in self._in_order:
            batch, channels, height, width = kind.shape
            sides = channels, height * width
            self._in_order[key] = made = self._new(kind.shape, kind, order)
            shape = (batch, *(sides if order is torch.channels_last else sides[::-1]))
            self._move(Kernel.TRANSPOSE, number, made, shape, differentiable)
        return self._in_order[key]

    def _new(self, shape: Iterable[int], like: Kind, order: torch.memory_format) -> int:
        self.kinds.append(Kind(tuple(shape), like.dtype, order))
        return len(self.kinds) - 1

    def _move(self, kernel: Kernel, source: int, made: int, shape: tuple[int, ...], differentiable: bool) -> None:
        self.steps.append(Step(kernel, False, differentiable, source, None, None, None, made, None, None, shape))


def _kind(t: Tensor) -> Kind:
    return Kind(tuple(t.shape), t.dtype, memory_format(t))
