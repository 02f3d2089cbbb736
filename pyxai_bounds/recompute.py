"""How programs run in training: without PyTorch's dispatcher and, on request, in segments that save memory.

Stands between ``chain`` and ``program``. Of a program in segments only the values that cross from one segment to the
next are kept. What autograd would save inside of a segment is computed again in the backward pass, on the same backend
and with the same arithmetic.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import Parameter

from pyxai_bounds import memory, ops
from pyxai_bounds.chain import Chain
from pyxai_bounds.rounding import without_autocast

Circumstances = Callable[[], contextlib.AbstractContextManager[Any]]


def direct(graph: fx.Graph, grads: bool) -> Callable[..., Any]:
    """A graph without constants as a function that calls the fused operators without PyTorch's dispatcher."""
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is torch._C._set_grad_enabled:
            grads = node.args[0]
        elif isinstance(node.target, Chain):
            node.target = _recorded_chain(node.target) if grads else node.target
        else:
            node.target = (ops.recorded if grads else ops.undispatched).get(node.target, node.target)
    return fx.GraphModule(torch.nn.Module(), graph).forward


def constants_last(program: fx.GraphModule) -> tuple[fx.Graph, list[fx.Node], list[Tensor]] | None:
    """The program's graph with its constants as further arguments, the nodes of these, and the constants.

    To look a constant up in a module takes as long as a small operator. None where a constant is of a subclass of
    Tensor, which needs the dispatcher.
    """
    nodes = program.graph.find_nodes(op="get_attr")
    constants = [operator.attrgetter(str(node.target))(program) for node in nodes]
    if not all(type(t) in (Tensor, Parameter) for t in constants):
        return None
    graph, new = fx.Graph(), {}
    for node in (*program.graph.find_nodes(op="placeholder"), *nodes):
        new[node] = graph.placeholder(node.name)
        new[node].meta = node.meta
    for node, constant in zip(nodes, constants, strict=True):
        new[node].meta = {"val": constant}
    graph.output(graph.graph_copy(program.graph, new))
    return graph, [new[node] for node in nodes], constants


def checkpointed(graph: fx.Graph, constants: list[fx.Node], circumstances: Circumstances) -> Callable[..., Any]:
    """The marked program ``graph``, in which ``constants`` are placeholders, too, as a function that saves memory.

    What runs without autograd, and what depends on constants alone (weights with batch norm folded in), comes first
    and runs once; only packed bits and weights of it are kept. The rest is cut into segments where few values cross.
    The last segment is not computed again, because the backward pass begins there.
    """
    first, rest = _order(_steps(graph), graph.find_nodes(op="placeholder"), constants)
    *segments, last = _cut(rest)
    new = fx.Graph()
    known = {node: new.placeholder(node.name) for node in graph.find_nodes(op="placeholder")}
    _copy(first, new, known, marked=True)
    for steps in segments:
        inputs, outputs = _ends(steps)
        compute, record = (_function(steps, inputs, outputs, marked) for marked in (False, True))
        segment = _Segment(compute, record, _sources(steps, inputs, outputs), circumstances)
        call = new.call_function(segment.function(), tuple(known[n] for n in inputs))
        for place, value in enumerate(outputs):
            known[value] = new.call_function(operator.getitem, (call, place))
    _copy(last, new, known, marked=True)
    new.output(fx.map_arg(graph.output_node().args[0], known.__getitem__))
    return direct(new, grads=True)


@dataclass(frozen=True)
class _Segment:
    compute: Callable[..., tuple[Tensor, ...]]  # without gradients
    record: Callable[..., tuple[Tensor, ...]]  # for autograd
    sources: list[list[int]]  # for each result, the arguments on which it depends differentiably
    circumstances: Circumstances

    def function(self) -> Callable[..., tuple[Tensor, ...]]:
        def segment(*inputs: Tensor) -> tuple[Tensor, ...]:
            return _Recomputed.apply(self, *inputs)

        return segment


class _Recomputed(torch.autograd.Function):
    """A segment. It saves its arguments by autograd's own means, so that it is noticed if they are overwritten."""

    @staticmethod
    def forward(ctx: Any, segment: _Segment, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.segment, ctx.backend = segment, ops.forced()
        ctx.save_for_backward(*inputs)
        outputs = segment.compute(*inputs)
        needs = ctx.needs_input_grad[1:]
        fixed = [not any(needs[place] for place in places) for places in segment.sources]
        ctx.mark_non_differentiable(*(out for out, is_fixed in zip(outputs, fixed, strict=True) if is_fixed))
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        with ops.backend(ctx.backend), ctx.segment.circumstances():
            return None, *differentiate_again(ctx.segment.record, ctx.saved_tensors, ctx.needs_input_grad[1:], grads)


def differentiate_again(
    record: Callable[..., Iterable[Tensor]],
    saved: Sequence[Tensor],
    needs: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients of ``record`` in the saved arguments that need them, computed by running it again."""
    second = torch.is_grad_enabled()  # a derivative of this derivative may be asked for
    # Views, because one argument may depend on another, whose gradient must not include what passes through the first.
    pairs = zip(saved, needs, strict=True)
    inputs = [t.view_as(t) if second else t.detach().requires_grad_(need) for t, need in pairs]
    with torch.enable_grad():
        end = _Given.apply(grads, *record(*inputs))
    if not end.requires_grad:
        return [None] * len(needs)
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
    found = iter(torch.autograd.grad(end, wanted, create_graph=second, allow_unused=True))
    return [next(found) if need else None for need in needs]


def _recorded_chain(chain: Chain) -> Callable[..., Sequence[Tensor]]:
    """A chain as one node of autograd."""

    def run(*tensors: Tensor) -> Sequence[Tensor]:
        addresses = chain.addresses(tensors)
        if addresses is None or 0 in addresses:  # an empty tensor has no address, which would mean that there is none
            return chain.with_gradients(*tensors)
        return _Chained.apply(chain, addresses, *tensors)

    return run


class _Chained(torch.autograd.Function):
    """Its derivative is one native call, too. For a second derivative the operators run and are recorded one by one."""

    @staticmethod
    def forward(ctx: Any, chain: Chain, addresses: list[int], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.chain, ctx.backend = chain, ops.forced()
        together = chain.together
        results, block = together.run_and_keep(addresses)
        saved = *(tensors[n] for n in together.read_given), *(results[n] for n in together.read_taken)
        ctx.save_for_backward(*saved, block)
        needs = ctx.needs_input_grad[2:]
        fixed = [not any(needs[place] for place in places) for places in chain.sources]
        ctx.mark_non_differentiable(*(out for out, is_fixed in zip(results, fixed, strict=True) if is_fixed))
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        chain, needs = ctx.chain, ctx.needs_input_grad[2:]
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        *saved, block = ctx.saved_tensors
        together = chain.together
        given, count = together.read_given, len(together.read_given)
        known = dict(zip((*given, *(chain.taken[n] for n in together.read_taken)), saved, strict=True))
        if not torch.is_grad_enabled() and not ops.needs_dispatcher(*(grad for grad in grads if grad is not None)):
            overwrite = not torch._C._autograd._get_current_graph_task_keep_graph()
            if overwrite:
                torch.autograd.graph.increment_version(block)  # so that autograd refuses to read the block again
            return None, None, *together.adjoint(known, block, overwrite, grads, needs)
        fixed = {n: value for n, value in known.items() if n not in chain.made}
        fixed |= {n: together.kept(block, n) for n in together.read_kept if n not in chain.made}
        ends = [(n, grad) for n, grad in zip(chain.taken, grads, strict=True) if grad is not None]

        def record(*inputs: Tensor) -> list[Tensor]:
            values = fixed | dict(zip(given, inputs, strict=True))
            chain.run_each(values, [step for step in chain.steps if step.differentiable], ops.recorded)
            return [values[n] for n, _ in ends]

        wanted = [needs[n] for n in given]
        with ops.backend(ctx.backend), without_autocast():
            found = differentiate_again(record, saved[:count], wanted, [grad for _, grad in ends])
        gradients = dict(zip(given, found, strict=True))
        return None, None, *(gradients.get(n) for n in range(len(needs)))


class _Given(torch.autograd.Function):
    """A number whose derivatives are the given gradients. One that is None stays None, instead of becoming zeros."""

    @staticmethod
    def forward(ctx: Any, grads: tuple[Tensor | None, ...], *outputs: Tensor) -> Tensor:
        ctx.grads = grads
        return outputs[0].new_zeros((), dtype=torch.float64)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.grads


# --- cutting --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Step:
    """An operator of a program with the nodes of its results."""

    node: fx.Node
    values: list[fx.Node]
    alive: bool  # does it run with autograd?

    def bytes_of(self, value: fx.Node) -> int:
        """What it takes to keep a result; nothing where it shares memory with an argument."""
        return 0 if memory.is_view(self.node) else memory.bytes_of(value.meta.get("val"))


def _steps(graph: fx.Graph) -> list[_Step]:
    steps, alive = [], True
    for node in graph.nodes:
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        if node.target is torch._C._set_grad_enabled:
            alive = node.args[0]
        else:
            parts = [user for user in node.users if user.target is operator.getitem]
            steps.append(_Step(node, parts or [node], alive))
    return steps


def _order(
    steps: list[_Step], arguments: Iterable[fx.Node], constants: Iterable[fx.Node]
) -> tuple[list[_Step], list[_Step]]:
    """The steps that run once, and those that may be computed again."""
    early, fixed = set(arguments), set(constants)
    first, rest = [], []
    for step in steps:
        inputs = set(step.node.all_input_nodes)
        if inputs <= fixed:
            fixed.update(step.values)
        elif step.alive or not inputs <= early:
            rest.append(step)
            continue
        early.update(step.values)
        first.append(step)
    return first, rest


def _cut(steps: list[_Step]) -> list[list[_Step]]:
    """Segments such that the values that cross between them and the inside of the largest take the least memory."""
    last_use = {value: place for place, step in enumerate(steps) for value in step.node.all_input_nodes}
    results = [[(step.bytes_of(value), last_use.get(value, -1)) for value in step.values] for step in steps]
    sizes = [sum(size for size, _ in values) for values in results]
    best, ends, pieces = math.inf, [len(steps)], 1
    while pieces <= 4 * math.sqrt(len(steps)):
        limit = max(sum(sizes) / pieces, *sizes)
        crossing, found = _cut_within(limit, results, sizes)
        if crossing + limit < best:
            best, ends = crossing + limit, found
        pieces += max(1, pieces // 3)
    return [steps[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _cut_within(limit: float, results: list[list[tuple[int, int]]], sizes: list[int]) -> tuple[float, list[int]]:
    """The best cut into segments of at most ``limit`` bytes: (bytes that cross, where the segments end).

    A value that crosses counts once, for the segment that makes it.
    """
    count = len(sizes)
    crossing, start_of = [0.0] + [math.inf] * count, [0] * (count + 1)
    for end in range(1, count + 1):
        inside = leaving = 0
        for start in range(end - 1, -1, -1):
            inside += sizes[start]
            if inside > limit:
                break
            leaving += sum(size for size, last in results[start] if last >= end)
            if crossing[start] + leaving < crossing[end]:
                crossing[end], start_of[end] = crossing[start] + leaving, start
    ends, end = [], count
    while end:
        ends.append(end)
        end = start_of[end]
    return crossing[count], ends[::-1]


# --- building -------------------------------------------------------------------------------------------------


def _ends(steps: list[_Step]) -> tuple[list[fx.Node], list[fx.Node]]:
    """The values that a segment reads from outside, and those of its own that are read outside."""
    made = [value for step in steps for value in step.values]
    inside = {*made, *(step.node for step in steps)}
    inputs = dict.fromkeys(value for step in steps for value in step.node.all_input_nodes if value not in inside)
    return list(inputs), [value for value in made if any(user not in inside for user in value.users)]


def _sources(steps: list[_Step], inputs: list[fx.Node], outputs: list[fx.Node]) -> list[list[int]]:
    reached = {node: {place} for place, node in enumerate(inputs)}
    for step in steps:
        places = set().union(*(reached[node] for node in step.node.all_input_nodes)) if step.alive else set()
        for value in step.values:
            reached[value] = places
    return [sorted(reached[node]) for node in outputs]


def _function(
    steps: list[_Step], inputs: list[fx.Node], outputs: list[fx.Node], marked: bool
) -> Callable[..., tuple[Tensor, ...]]:
    graph = fx.Graph()
    known = {node: graph.placeholder(node.name) for node in inputs}
    _copy(steps, graph, known, marked)
    graph.output(tuple(known[node] for node in outputs))
    return direct(graph, grads=marked)


def _copy(steps: list[_Step], graph: fx.Graph, known: dict[fx.Node, fx.Node], marked: bool) -> None:
    """Append the steps. ``marked``: with marks that switch autograd off and on, and on again at the end."""
    enabled = True
    for step in steps:
        if marked and step.alive != enabled:
            enabled = step.alive
            graph.call_function(torch._C._set_grad_enabled, (enabled,))
        for node in dict.fromkeys((step.node, *step.values)):
            known[node] = graph.node_copy(node, known.__getitem__)
    if not enabled:
        graph.call_function(torch._C._set_grad_enabled, (True,))
