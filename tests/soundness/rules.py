"""Every rule on its own: each operator of the rules' test cases, applied to boxes around many values of many scales.

Bounding one operator at a time leaves no slack from its neighbours to hide a rounding error behind.
"""

from __future__ import annotations

import importlib
import operator
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

import pyxai_bounds as xb
from pyxai_bounds.rules import RULES
from tests.rules.cases import MODULES, Case
from tests.soundness.programs import Twins, outside, twins

aten = torch.ops.aten

COLUMNS = ["rule", "eps", "components", "violations_sound", "violations_nearest"]
SCALES = (1.0, 1.0, 1.0, 0.03, 30.0, 1e-12, 1e-20, 1e9)
LARGE = 4096  # elements of the arguments of an elementwise operator

# The indices, or what else the forward side kept, belong to the very input that they came from: no pair to take apart.
_TOGETHER = {
    aten.max_pool2d_with_indices_backward.default,
    aten.max_pool3d_with_indices_backward.default,
    aten.adaptive_max_pool2d_backward.default,
    aten.adaptive_max_pool3d_backward.default,
    aten.max_unpool2d.default,
    aten.max_unpool3d.default,
    aten.log_sigmoid_backward.default,
}
_NO_VALUES = {aten.empty_like.default, aten.new_empty.default, aten.new_empty_strided.default}


@dataclass
class One:
    """One operator as a program of its floating-point arguments, in both precisions."""

    name: str
    narrow: nn.Module
    wide: nn.Module
    values: list[Tensor]  # of those arguments, float64
    elementwise: bool

    def draw(self, generator: torch.Generator) -> list[Tensor]:
        """New arguments near the old ones, in another order and of another scale, as float32 numbers."""
        scale = SCALES[int(torch.randint(len(SCALES), (), generator=generator))]
        values = self.values
        if self.elementwise:
            chosen = torch.randint(values[0].numel(), (LARGE,), generator=generator)
            values = [v.flatten()[chosen] for v in values]
        return [
            (scale * v * (0.5 + torch.rand(v.shape, generator=generator, dtype=torch.float64))).float() for v in values
        ]


def ones(per_rule: int = 3, copies: int = 1) -> Iterator[One]:
    """The operators of all cases, up to so many of a kind, on so many copies of the case's input side by side."""
    count: dict[Any, int] = {}
    for name in MODULES:
        for case in importlib.import_module(f"tests.rules.test_{name}").CASES:
            pair, x = _captured(case, copies)
            if pair is None:
                continue
            seen = _Seen(pair.wide)
            seen.run(x)
            for narrow, wide in zip(pair.narrow.graph.nodes, pair.wide.graph.nodes, strict=True):
                if wide.op != "call_function" or wide.target not in RULES or wide.target in _TOGETHER | _NO_VALUES:
                    continue
                kind = (wide.target, wide.name.rstrip("0123456789_"))
                if count.get(kind, 0) >= per_rule or not _floating(seen.values[wide]):
                    continue
                inputs = [n for n in wide.all_input_nodes if n.op != "get_attr" and _floating(seen.values[n])]
                inputs = [n for n in inputs if isinstance(seen.values[n], Tensor) and _is_value(n)]
                if not inputs:
                    continue
                count[kind] = count.get(kind, 0) + 1
                values = [seen.values[n] for n in inputs]
                like = seen.values[wide]
                elementwise = (
                    (all(v.shape == like.shape for v in values) if isinstance(like, Tensor) else False)
                    and all(n in inputs for n in wide.all_input_nodes)
                    and wide.target in _ELEMENTWISE
                )
                names = [n.name for n in inputs]
                yield One(
                    wide.target.name(), _alone(narrow, pair.narrow, names, seen, torch.float32),
                    _alone(wide, pair.wide, names, seen, torch.float64), values, elementwise,
                )  # fmt: skip


@dataclass
class Chain:
    """Operators behind each other, where a rule uses what another one found out (``rules.facts``)."""

    name: str
    fn: Callable[..., Tensor]
    shapes: list[tuple[int, ...]]
    weights: list[tuple[int, ...]]

    def one(self) -> One:
        """The value and its gradients, on points of their own kind."""
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(shape, generator=generator) for shape in self.weights]
        values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in self.shapes]
        modules = [_Chained(self.fn, [w.to(dtype) for w in weights]) for dtype in (torch.float32, torch.float64)]
        return One(f"chain: {self.name}", *modules, values, False)


class _Chained(nn.Module):
    def __init__(self, fn: Callable[..., Tensor], weights: list[Tensor]) -> None:
        super().__init__()
        self.fn = fn
        for i, w in enumerate(weights):
            self.register_buffer(f"w{i}", w)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            inputs = tuple(x.detach().requires_grad_() for x in inputs)
            value = self.fn(*inputs, *self.buffers())
            gradients = torch.autograd.grad((value * torch.ones_like(value)).tanh().sum(), inputs)
        return (value.detach(), *gradients)


def _causal(scores: Tensor) -> Tensor:
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return (3 * scores.tanh()).masked_fill(hidden, float("-inf")).softmax(-1)


def _heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, -1)).transpose(-2, -3)


def _block(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """Attention with a residual: all ways that facts travel through a transformer's block."""
    q, k, u = (_heads(part) for part in (nn.functional.layer_norm(x, (6,)) @ w).chunk(3, -1))
    mixed = nn.functional.scaled_dot_product_attention(q, k, u).transpose(-2, -3).flatten(-2)
    x = x + mixed @ v
    return x + nn.functional.gelu(nn.functional.layer_norm(x, (6,)) @ w) @ w.t()


def _softmax(scores: Tensor) -> Tensor:
    """Of moderate scores: where a probability is 1 but for 1e-10, PyTorch's own backward side keeps no digit."""
    return (3 * scores.tanh()).softmax(-1)


_SCORES, _VALUES, _ROWS = (4, 6, 5), (4, 5, 3), (4, 5, 6)
CHAINS = [
    Chain("softmax, product", lambda s, v: _softmax(s) @ v, [_SCORES, _VALUES], []),
    Chain("softmax, product from the left", lambda s, v: v.mT @ _softmax(s).mT, [_SCORES, _VALUES], []),
    Chain("softmax, product with a point", lambda s, v: _softmax(s) @ v, [_SCORES], [_VALUES]),
    Chain("causal softmax, product", lambda s, v: _causal(s) @ v, [(4, 5, 5), _VALUES], []),
    Chain("attention", lambda q, k, v: nn.functional.scaled_dot_product_attention(q.tanh(), 3 * k.tanh(), v),
          [_ROWS, _ROWS, _ROWS], []),
    Chain("layer norm, two linear layers", lambda x, w, v: nn.functional.layer_norm(x, (6,)) @ w @ v, [(9, 6)],
          [(6, 8), (8, 5)]),
    Chain("layer norm, GELU between linear layers", lambda x, w, v: x + nn.functional.gelu(
        nn.functional.layer_norm(x, (6,)) @ w) @ v, [(9, 6)], [(6, 8), (8, 6)]),
    Chain("layer norm, SiLU, tanh, scale", lambda x, w, v, g: (nn.functional.silu(nn.functional.layer_norm(
        x, (6,), g) @ w) @ v).tanh() * 0.3 - x, [(9, 6)], [(6, 8), (8, 6), (6,)]),
    Chain("transformer block", _block, [_ROWS], [(6, 18), (6, 6)]),
]  # fmt: skip


def _captured(case: Case, copies: int) -> tuple[Twins | None, Tensor]:
    """The case's program and its input: of many copies, unless the case is made for the one shape that it has."""
    for count in sorted({copies, 1}, reverse=True):
        x = case.x.repeat(count, *[1] * (case.x.dim() - 1)) if case.x.dim() else case.x
        try:
            pair = twins(case.explained, x)
            pair.wide(x)
        except (RuntimeError, ValueError, IndexError):
            continue  # the case holds tensors of that shape; or runs on the layout it was captured with alone
        return pair, x
    return None, case.x


_SPLIT = {aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int, aten.convolution_backward.default}
_NAMES = frozenset(
    """relu threshold_backward leaky_relu leaky_relu_backward hardtanh hardtanh_backward hardsigmoid
    hardsigmoid_backward hardswish hardswish_backward tanh tanh_backward sigmoid sigmoid_backward softplus
    softplus_backward elu elu_backward celu gelu gelu_backward silu silu_backward mish mish_backward
    log_sigmoid_forward sin cos atan exp2 log2 log10 add sub rsub neg mul div
    reciprocal abs sign sgn pow sqrt rsqrt exp expm1 log log1p erf clamp clamp_min clamp_max maximum minimum""".split()  # noqa: SIM905
)
_ELEMENTWISE = {op for op in RULES if op.name().split("::")[1].split(".")[0] in _NAMES}


def _log_softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    """Without the cancellation near 0, where PyTorch's own keeps no digit: −log(1 + Σ_{k≠j} exp(x_k − x_j))."""
    x = x.movedim(dim, -1)
    differences = x.unsqueeze(-2) - x.unsqueeze(-1)
    others = differences.masked_fill(torch.eye(x.shape[-1], dtype=torch.bool), float("-inf")).logsumexp(-1)
    return -(others.clamp(min=0) + torch.log1p(torch.exp(-others.abs()))).movedim(-1, dim)


_ACCURATE: dict[Any, Any] = {aten._log_softmax.default: _log_softmax}


class _Seen(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[fx.Node, Any] = {}
        self.by_name: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.values[n] = self.by_name[n.name] = value.detach() if isinstance(value, Tensor) else value
        return value


def _floating(value: Any) -> bool:
    value = value[0] if isinstance(value, (tuple, list)) else value
    return isinstance(value, Tensor) and value.is_floating_point()


def _is_value(node: fx.Node) -> bool:
    """Not the count that comes with a loss, which is no function of the input."""
    return not (node.op == "call_function" and node.args[:1] and getattr(node.args[0], "target", None)
                in (aten.nll_loss_forward.default, aten.native_batch_norm.default) and node.args[1] != 0)  # fmt: skip


def _alone(node: fx.Node, module: fx.GraphModule, inputs: list[str], seen: _Seen, dtype: torch.dtype) -> nn.Module:
    graph, holder = fx.Graph(), nn.Module()
    new = {name: graph.placeholder(name) for name in inputs}

    def argument(n: fx.Node) -> fx.Node:
        if n.name not in new:
            value = getattr(module, n.target) if n.op == "get_attr" else seen.by_name[n.name]
            holder.register_buffer(n.name, value.float().to(dtype) if value.is_floating_point() else value)
            new[n.name] = graph.get_attr(n.name)
        return new[n.name]

    target = node.target if dtype == torch.float32 else _ACCURATE.get(node.target, node.target)
    result = graph.call_function(target, *fx.map_arg((node.args, node.kwargs), argument))
    if isinstance(seen.by_name[node.name], (tuple, list)) and node.target not in _SPLIT:
        result = graph.call_function(operator.getitem, (result, 0))  # the others are indices, or unused statistics
    graph.output(result)
    return fx.GraphModule(holder, graph)


def _tensors(result: Any) -> list[Any]:
    results = list(result) if isinstance(result, (tuple, list)) else [result]
    return [r for r in results if isinstance(r, xb.Interval) or (isinstance(r, Tensor) and r.is_floating_point())]


def check(one: One, eps: float, seed: int, semantics: str = "real") -> tuple[int, int, int]:
    """Components checked, violations of the sound bounds, and of the ones that are rounded to nearest, of one draw."""
    generator = torch.Generator().manual_seed(seed)
    boxes = [xb.Interval.linf(v, eps * v.abs().max().clamp(min=1e-30)) for v in one.draw(generator)]
    sound = _tensors(xb.bound(one.narrow, sound=True, semantics=semantics)(*boxes))
    nearest = _tensors(xb.bound(one.narrow)(*boxes))
    found = [0, 0, 0]
    for values in _values(one, boxes, generator):
        for s, n, v in zip(sound, nearest, values, strict=False):
            if isinstance(s, xb.Interval) and isinstance(n, xb.Interval):
                found[0] += v.numel()
                found[1] += int(outside(s, v).sum())
                found[2] += int(outside(n, v).sum())
    return found[0], found[1], found[2]


def _values(one: One, boxes: list[xb.Interval], generator: torch.Generator) -> Iterator[list[Tensor]]:
    """The results in float64: at the midpoint, where a gradient points to, and of many points of each box at once.

    The fewer components there are, the more points, so that a sum is checked about as often as what it sums.
    """
    mids, rads = [b.mid.double() for b in boxes], [b.rad.double() for b in boxes]

    def at(positions: list[Tensor]) -> list[Tensor]:
        return _tensors(one.wide(*(m + r * p for m, r, p in zip(mids, rads, positions, strict=True))))

    middle = at([torch.zeros_like(m) for m in mids])
    yield middle
    if not any(bool(r.any()) for r in rads):
        return
    for extreme in _extremes(at, mids, generator):
        yield at(extreme)
    count = max(2, min(1024, 4096 // max(1, sum(v.numel() for v in middle))))
    positions = [2 * torch.rand(count, *m.shape, generator=generator, dtype=torch.float64) - 1 for m in mids]
    positions = [torch.cat([p[: count // 2].sign(), p[count // 2 :]]) for p in positions]
    if count > 4:
        try:
            yield list(torch.vmap(lambda *p: tuple(at(list(p))))(*positions))
            return
        except (RuntimeError, ValueError):
            positions = [p[-8:] for p in positions]  # not an operator that runs on many points at once
    for point in zip(*positions, strict=True):
        yield at(list(point))


def _extremes(
    at: Callable[[list[Tensor]], list[Tensor]], mids: list[Tensor], generator: torch.Generator
) -> Iterator[list[Tensor]]:
    """The two corners that the gradient of the results, with random signs, points to and away from."""
    positions = [torch.zeros_like(m).requires_grad_() for m in mids]
    try:
        score = sum((torch.randn(v.shape, generator=generator, dtype=v.dtype).sign() * v).sum() for v in at(positions))
        slopes = torch.autograd.grad(score, positions, allow_unused=True, materialize_grads=True)  # type: ignore[arg-type]
    except RuntimeError:
        return  # no derivative
    for sign in (1.0, -1.0):
        yield [sign * slope.nan_to_num().sign() for slope in slopes]


def table(
    components: int, epsilons: tuple[float, ...], seed: int = 0, seconds: float = 60.0
) -> Iterator[dict[str, Any]]:
    """Per rule and eps: components checked (or as many as so many seconds allow), and violations."""
    by_rule: dict[str, list[One]] = {}
    for one in (*ones(copies=24), *(chain.one() for chain in CHAINS)):
        by_rule.setdefault(one.name, []).append(one)
    for name, group in sorted(by_rule.items()):
        for eps in epsilons:
            row = dict.fromkeys(COLUMNS, 0) | {"rule": name, "eps": eps}
            started, draw = time.time(), 0
            while row["components"] < components and time.time() - started < seconds:
                try:
                    found = check(group[draw % len(group)], eps, seed + draw)
                except (RuntimeError, ValueError, TypeError) as error:
                    raise RuntimeError(f"the rule of {name} fails: {error}") from error
                for column, number in zip(COLUMNS[2:], found, strict=True):
                    row[column] += number
                draw += 1
            yield row
