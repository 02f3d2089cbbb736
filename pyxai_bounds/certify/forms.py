"""Sharper bounds of one sample's explanation: sets that remember by what they vary.

An Interval forgets why its elements may move, and what moves together later cannot cancel any more. An affine form
keeps it: centre + Σₖ ξₖ·generatorₖ + e with |ξₖ| ≤ 1 and |e| ≤ slack, elementwise. There is a ξ for each number of the
input that moves, and one for whatever an operator adds: an unstable ReLU, a gate that may be open or shut, a product.
Operators that are linear apply to centre and generators; all others take the Intervals, which are kept beside the forms
and cut down to what these allow. So bounds are never wider than those of ``bound``, and take as many times their work
as there are ξ.

Source: affine arithmetic (Stolfi and de Figueiredo, Self-validated numerical methods, 1997); the slope of a ReLU as in
Singh et al., Fast and effective robustness certification, NeurIPS 2018. Here the backward pass is part of the program,
and every number is rounded outward.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from pyxai_bounds import rounding as rd
from pyxai_bounds.certify import lines
from pyxai_bounds.certify.differences import LINEAR_AT, TINY, Box, behind
from pyxai_bounds.certify.lines import Line
from pyxai_bounds.certify.properties import rounding_loss
from pyxai_bounds.errors import UnsupportedOperatorError
from pyxai_bounds.fuse import VIEWS
from pyxai_bounds.interpreter import Interpreter, applied
from pyxai_bounds.interval import Interval
from pyxai_bounds.rules import RULES
from pyxai_bounds.rules.registry import Indices, Product, as_set, ends, in_float64, singleton, use_product
from pyxai_bounds.rules.standardise import Standardised

aten = torch.ops.aten

LARGEST = 2**25  # numbers of the generators of one value, 256 MiB
CHEAP = 2**28  # multiplications, of which a core does some 1e10 a second
PASSES = 16  # as many multiplications as an operator takes the time of for each number, moving it through memory
CHEAP_NODES = 150  # operators, each of which takes some 0.3 ms however small it is
NEGLIGIBLE = 1e-9  # of a value's size: what rounding adds gets no symbols


@dataclass(frozen=True)
class Form:
    """{centre + Σ ξₖ·generators[k] + e: |ξ| ≤ 1, |e| ≤ slack}, in float64; generators [K, ...].

    Symbols are numbered throughout a program: a form with fewer generators than another does not depend on the rest.
    """

    centre: Tensor
    generators: Tensor
    slack: Tensor

    @classmethod
    def box(cls, x: Interval) -> Form:
        return cls(x.mid.double(), x.mid.double().new_empty(0, *x.shape), x.rad.double())

    @functools.cached_property
    def reach(self) -> Tensor:
        """The greatest distance from the centre, rounded up."""
        spread = torch.linalg.vector_norm(self.generators, ord=1, dim=0)
        return _up(spread + self.slack, len(self.generators) + 1)

    @functools.cached_property
    def size(self) -> Tensor:
        """The greatest magnitude, rounded up."""
        return _up(self.centre.abs() + self.reach, 1)

    @property
    def ends(self) -> tuple[Tensor, Tensor]:
        reach = _up(self.reach + rounding_loss(1) * self.centre.abs(), 2)
        return self.centre - reach, self.centre + reach


def _up(t: Tensor, terms: int) -> Tensor:
    """At least what a sum of so many terms ≥ 0 is, that was computed in float64."""
    return t * (1 + rounding_loss(terms)) + TINY


class Forms:
    """A function of single samples, evaluated with affine forms; its parameters must not change."""

    def __init__(self, graph: fx.GraphModule, rounding: rd.Rounding, product: Product, most: int) -> None:
        self.graph, self.rounding, self.product, self.most = graph, rounding, product, most

    @classmethod
    def of(cls, graph: fx.GraphModule, rounding: rd.Rounding, product: Product, cheaply: bool) -> Forms | None:
        """``graph``: the captured function of a single sample [1, ...]. None where forms would take too much memory
        (or, if they are to be cheap, work).
        """
        placeholders = graph.graph.find_nodes(op="placeholder")
        moving = behind(placeholders)
        values = [t for t in pytree.tree_leaves([node.meta.get("val") for node in moving]) if isinstance(t, Tensor)]
        most = LARGEST // max(1, *(t.numel() for t in values))
        if cheaply:
            if len(moving) > CHEAP_NODES:
                return None
            work = sum(map(_work, moving)) + PASSES * sum(t.numel() for t in values)
            most = min(most, CHEAP // max(1, work))
        inputs = [node.meta["val"] for node in placeholders]
        fits = 2 * sum(t.numel() for t in inputs if t.is_floating_point()) <= most
        return cls(graph, rounding, product, most) if fits else None

    def __call__(self, arguments: Sequence[Interval | Tensor]) -> tuple[Interval, FormRows]:
        """The explanation [1, ...] over a box: its bounds, and what they are the ends of."""
        evaluator = _Evaluator(self.graph, self.most)
        with contextlib.ExitStack() as stack:
            # Without cuDNN, whose convolutions may be Fourier transforms, which lose more than sums do.
            exact = torch.no_grad(), torch.backends.cudnn.flags(enabled=False), rd.without_autocast()
            for context in (*exact, rd.ieee_arithmetic(), rd.use(self.rounding), use_product(self.product)):
                stack.enter_context(context)
            bounds = as_set(evaluator.run(*arguments, enable_io_processing=False)[0])
        if evaluator.unsupported:
            raise UnsupportedOperatorError(list(dict.fromkeys(evaluator.unsupported)))
        return bounds, FormRows(evaluator.operand(self.graph.graph.output_node().all_input_nodes[0]))


class FormRows:
    """A form as rows, one for each element, by which the box of its symbols is multiplied, and a 1 the centre."""

    at_once: int | None = None

    def __init__(self, form: Form) -> None:
        symbols = len(form.generators)
        self.numbers = symbols + 1
        self._form = form
        ones, zero = form.slack.new_ones(symbols), form.slack.new_zeros(1)
        self.box = Box(torch.cat([0 * ones, zero + 1]), torch.cat([ones, zero]))

    def rows(self, entries: Tensor) -> tuple[Tensor, Tensor]:
        generators = self._form.generators.flatten(1)[:, entries].T
        centre, slack = (t.flatten()[entries, None] for t in (self._form.centre, self._form.slack))
        return torch.cat([generators, centre], 1), torch.cat([torch.zeros_like(generators), slack], 1)


class _Evaluator(Interpreter):
    """Runs a captured graph on Intervals, and on forms where it can, which cut the Intervals down."""

    def __init__(self, graph: fx.GraphModule, most: int) -> None:
        super().__init__(graph, None)
        self.most = most  # symbols
        self.symbols = 0
        self.forms: dict[fx.Node, Form] = {}
        self.moving: set[fx.Node] = set()  # what depends on a set
        self.done = _last_uses(graph.graph)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "placeholder" and isinstance(result, Interval):
            self.moving |= behind([n])
        # Rounded to nearest, sets of integers are held by integers.
        if n in self.moving and type(result) is Interval and result.dtype.is_floating_point:
            form = self._form(n, result)
            result = _within(result, form)
            self.forms[n] = form
        for node in self.done.get(n, ()):
            self.forms.pop(node, None)
        return result

    def operand(self, x: Any) -> Form:
        """What an argument varies by; a box, where that is not known."""
        if isinstance(x, fx.Node):
            if x in self.forms:
                return self.forms[x]
            x = self.env[x]
        box = x if isinstance(x, Interval) else singleton(torch.as_tensor(x, dtype=torch.float64))
        # Numbers, and tensors without dimensions, may lie elsewhere.
        device = next((form.centre.device for form in self.forms.values()), box.device)
        return Form.box(Interval.of(box.mid.to(device), box.rad.to(device)))

    def _form(self, n: fx.Node, result: Interval) -> Form:
        found = None
        call: Any = n.args[0] if n.target is operator.getitem else n
        sources = call.all_input_nodes
        places = any(isinstance(self.env.get(source), Indices) for source in sources)
        if not places and any(source in self.forms for source in sources):
            if call is not n:
                found = self._first_result(n, call)
            elif n.target in _RULES:
                found = _RULES[n.target](self, n, result)
            else:
                found = self._linear(n)
        if found is not None and bool((found.centre + found.reach).isfinite().all()):
            return found
        return self._fresh(Form.box(result))

    def _fresh(self, form: Form, amounts: Tensor | None = None) -> Form:
        """``form`` + [-amounts, amounts], each of which becomes a symbol of its own where there is room for it.

        Without amounts it is the slack that does.
        """
        if amounts is None:
            form, amounts = Form(form.centre, form.generators, torch.zeros_like(form.slack)), form.slack
        size = (form.centre.abs() + amounts).amax() if amounts.numel() else 0.0
        wanted = (amounts.flatten() > NEGLIGIBLE * size).nonzero()[:, 0]
        room = self.most - self.symbols
        if len(wanted) > room:
            wanted = wanted[amounts.flatten()[wanted].topk(room).indices]
        new = amounts.new_zeros(len(wanted), amounts.numel())
        new[torch.arange(len(wanted), device=new.device), wanted] = amounts.flatten()[wanted]
        left = amounts.flatten().index_fill(0, wanted, 0.0).reshape(amounts.shape)
        before = _padded(form.generators, self.symbols) if len(wanted) else form.generators
        self.symbols += len(wanted)
        generators = torch.cat([before, new.reshape(len(wanted), *amounts.shape)])
        return Form(form.centre, generators, _up(form.slack + left, 1))

    def _lined(self, x: Form, line: Line, known: Interval | None = None) -> Form:
        """A function of numbers by a line beside it; where there is none it lies in what is ``known`` of it."""
        slope, least, most = line.slope, line.least, line.most
        if known is not None:
            lower, upper = ends(in_float64(known))
            beside = slope.isfinite() & least.isfinite() & most.isfinite()
            slope = torch.where(beside, slope, 0.0)
            least, most = torch.where(beside, least, lower), torch.where(beside, most, upper)
        centre, half = _halves(least, most)
        found = _mapped(lambda t: t * slope, lambda t: t * slope.abs(), x, centre, terms=1)
        return self._fresh(found, half)

    def _ends(self, x: Form, box: Any) -> tuple[Tensor, Tensor]:
        """The ends of a form, and those that are known besides."""
        lower, upper = x.ends
        if not isinstance(box, Interval):
            return lower, upper
        least, greatest = ends(in_float64(box))
        lower, upper = torch.fmax(lower, least), torch.fmin(upper, greatest)
        meet = lower <= upper
        return torch.where(meet, lower, least), torch.where(meet, upper, greatest)

    def _linear(self, n: fx.Node) -> Form | None:
        """An operator that is linear, or affine, in one argument, all others being numbers."""
        call: Any = n.args[0] if n.target is operator.getitem else n
        place = next((i for i in _AFFINE_AT.get(call.target, ()) if call.args[i] in self.forms), None)
        if place is None or call.args.count(call.args[place]) != 1:
            return None
        x = self.forms[call.args[place]]
        if call.target in _COPIES:
            return x
        values = [self.env[arg] if isinstance(arg, fx.Node) else arg for arg in call.args]
        if any(isinstance(v, Interval) for i, v in enumerate(values) if i != place):
            return None
        if any(values[2:]) if call.target is aten.constant_pad_nd.default else {"alpha", "beta"} & call.kwargs.keys():
            return None
        if not (call.kwargs.get("dtype") or torch.float64).is_floating_point:  # terms are cut down to integers
            return None
        target: Any = aten.reshape.default if call.target in VIEWS else call.target
        values = [v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in values]
        kwargs = {key: torch.float64 if isinstance(v, torch.dtype) else v for key, v in call.kwargs.items()}
        added, bias_at = None, _BIAS_AT.get(n.target)
        if bias_at is not None and values[bias_at] is not None:
            added = values[bias_at]
            added = added if n.target is aten.addmm.default else added.reshape(-1, *[1] * (n.meta["val"].dim() - 2))
            values[bias_at] = torch.zeros_like(values[bias_at]) if n.target is aten.addmm.default else None
        coefficients = (Tensor, float, int) if call.target in _SCALING else Tensor
        truths = bool, torch.bool
        sizes = [
            abs(v) if isinstance(v, coefficients) and getattr(v, "dtype", type(v)) not in truths else v for v in values
        ]

        def function(t: Tensor, values: list[Any] = values) -> Tensor:
            found = target(*values[:place], t, *values[place + 1 :], **kwargs)
            return found if call is n else found[n.args[1]]

        return _mapped(function, lambda t: function(t, sizes), x, added)

    def _first_result(self, n: fx.Node, call: fx.Node) -> Form | None:
        """Of operators with several results: gradients of convolutions and of batch norm, and batch norm."""
        if call.target in _SPLITS:
            return self._linear(n)
        if n.args[1] != 0 or call.args[0] not in self.forms:
            return None
        rest: list[Any] = [self.env[arg] if isinstance(arg, fx.Node) else arg for arg in call.args]
        x = self.forms[call.args[0]]  # type: ignore[index]
        if call.target is aten.convolution_backward.default and not isinstance(rest[2], Interval):
            return _convolution_backward(x, n.meta["val"].shape, rest[2].double(), rest[3:10])
        if call.target is aten.native_batch_norm.default and not rest[5]:
            weight, bias, mean, var = rest[1:5]
            if not any(isinstance(t, Interval) for t in rest[1:]):
                moved = _sum(x, Form.box(singleton(-_per_channel(mean, x))))
                scaled = _scaled(moved, weight, var, rest[7])
                return scaled if bias is None else _sum(scaled, Form.box(singleton(_per_channel(bias, x))))
        if call.target is aten.native_batch_norm_backward.default and not rest[7]:
            weight, mean, var = rest[2], rest[3], rest[4]
            if not any(isinstance(t, Interval) for t in rest[2:5]):
                return _scaled(x, weight, var, rest[8])
        return None

    def _rectified(self, n: fx.Node, result: Interval) -> Form | None:
        """Leaky ReLUs, and |x|, which is -x below 0."""
        below = {aten.relu.default: 0.0, aten.abs.default: -1.0}.get(n.target)  # type: ignore[call-overload]
        if below is None:
            below = float(n.args[1]) if len(n.args) > 1 else 0.01  # type: ignore[arg-type]
        if not -1 <= below < 1:
            return None
        x = self.operand(n.args[0])
        return self._lined(x, lines.rectified(*self._ends(x, self.env[n.args[0]]), below))  # type: ignore[index]

    def _function(self, n: fx.Node, result: Interval) -> Form:
        """A function that is convex, concave, or shaped like an S."""
        shape, derivative, touch = _SHAPES[n.target]
        x = self.operand(n.args[0])
        f = lines.Function(self._at(n), derivative, touch)
        return self._lined(x, shape(f, *self._ends(x, self.env[n.args[0]])), result)  # type: ignore[index]

    def _at(self, n: fx.Node) -> Callable[[Tensor], Interval]:
        """Enclosures of a function's values at points, in float64."""
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        return lambda t: RULES[n.target].function(singleton(t), *args[1:], **kwargs)  # type: ignore[index]

    def _power(self, n: fx.Node, result: Interval) -> Form:
        return self._to_power(self.operand(n.args[0]), self.env[n.args[0]], float(n.args[1]), result)  # type: ignore

    def _to_power(self, x: Form, box: Any, exponent: float, known: Interval | None = None) -> Form:
        f = _powers(exponent)
        return self._lined(x, lines.power(f, exponent, *self._ends(x, box)), known)

    def _quotient(self, n: fx.Node, result: Interval) -> Form | None:
        x, y = (self.operand(arg) for arg in n.args[:2])
        if n.args[1] not in self.moving or len(n.args) > 2 or n.kwargs:
            return self._linear(n)
        box = self.env[n.args[1]]  # type: ignore[index]
        inverse = self._to_power(y, box, -1.0)
        return self._product(x, inverse, self._value(n.args[0]))

    def _value(self, x: Any) -> Any:
        return self.env[x] if isinstance(x, fx.Node) else None

    def _gate(self, n: fx.Node, result: Interval) -> Form:
        """An elementwise derivative times the gradient, its first argument: the derivative is what it makes of 1."""
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        given = args[0].mid if isinstance(args[0], Interval) else args[0]
        slopes = applied(RULES[n.target], n, (singleton(torch.ones_like(given)), *args[1:]), kwargs)  # type: ignore[index]
        return self._product(self.operand(n.args[0]), Form.box(slopes), args[0])

    def _mul(self, n: fx.Node, result: Interval) -> Form | None:
        if not all(isinstance(arg, fx.Node) and arg in self.moving for arg in n.args):
            return self._linear(n)
        if n.args[0] is n.args[1]:
            return self._to_power(self.operand(n.args[0]), self.env[n.args[0]], 2.0, result)  # type: ignore[index]
        x, y = (self.operand(arg) for arg in n.args)
        return self._product(x, y, self.env[n.args[0]])  # type: ignore[index]

    def _product(self, x: Form, y: Form, box: Any) -> Form:
        """``box``: what else is known of x."""
        count = max(len(x.generators), len(y.generators))
        shape = torch.broadcast_shapes(x.centre.shape, y.centre.shape)
        generators = _spread(x, count, shape) * y.centre + _spread(y, count, shape) * x.centre
        reach = x.reach * y.reach + x.centre.abs() * y.slack + y.centre.abs() * x.slack
        if not len(y.generators):
            reach = torch.minimum(reach, _magnitude(x, box) * y.slack + y.centre.abs() * x.slack)
        slack = _up(rounding_loss(4) * x.size * y.size, 4)
        return self._fresh(Form(x.centre * y.centre, generators, slack), _up(reach, 6))

    def _smooth(self, n: fx.Node, result: Interval) -> Form | None:
        """By the mean value theorem: g(x) lies in g(m) + D·(x - m), D the derivative over the box, m a member of it."""
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        box = in_float64(args[0])
        slopes = RULES[_DERIVATIVE[n.target]].function(singleton(torch.ones_like(box.mid)), box, *args[1:], **kwargs)
        at_mid = self._at(n)(box.mid)
        moved = _sum(self.operand(n.args[0]), Form.box(singleton(-box.mid)))
        distance = Interval.of(torch.zeros_like(box.mid), box.rad)
        return _sum(self._product(moved, Form.box(slopes), distance), Form.box(at_mid))

    def _add(self, n: fx.Node, result: Interval) -> Form:
        factor = float(n.kwargs.get("alpha", n.args[2] if len(n.args) > 2 else 1))  # type: ignore[arg-type]
        x, y = (self.operand(arg) for arg in n.args[:2])
        if n.target in _RSUB:
            x, y = y, x
        if n.target not in _ADDS:
            factor = -factor
        if factor != 1:
            y = _mapped(lambda t: t * factor, lambda t: t * abs(factor), y)
        return _sum(x, y)

    def _joined(self, n: fx.Node, result: Interval) -> Form:
        parts: Any = [self.operand(arg) for arg in n.args[0]]  # type: ignore[union-attr]
        if n.target is aten.cat.default:  # which passes over tensors of shape [0], whatever the others have
            parts = [part for part in parts if part.centre.shape != (0,)] or parts
        dim = int(n.args[1]) if len(n.args) > 1 else 0  # type: ignore[arg-type]
        dim %= len(n.meta["val"].shape)
        join: Any = torch.cat if n.target is aten.cat.default else torch.stack
        count = max(len(part.generators) for part in parts)
        generators = join([_padded(part.generators, count) for part in parts], dim + 1)
        return Form(join([part.centre for part in parts], dim), generators, join([part.slack for part in parts], dim))


def _mapped(
    function: Callable[[Tensor], Tensor],
    magnitude: Callable[[Tensor], Tensor],
    x: Form,
    added: Tensor | None = None,
    terms: int | None = None,
) -> Form:
    """A linear function of a form, and what it loses; ``magnitude``: with the magnitudes of its coefficients.

    Each result is a sum of at most so many ``terms``, by default as many as ``x`` has numbers, and each coefficient
    within a few u.
    """
    centre = function(x.centre)
    if added is not None:
        centre = centre + added
    if len(x.generators):
        generators = torch.func.vmap(function)(x.generators)
    else:
        generators = centre.new_empty(0, *centre.shape)
    terms = terms or x.centre.numel()
    slack = magnitude(_up(x.slack + rounding_loss(terms) * x.size, 2)).abs()
    return Form(centre, generators, _up(slack, terms) + rounding_loss(2) * centre.abs())


def _halves(least: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
    """The middle of [least, most], and how far from it its ends lie, rounded up; 0 where they are one number."""
    centre = least / 2 + most / 2
    centre = torch.where(least == most, least, centre)
    half = torch.maximum(most - centre, centre - least)
    return centre, torch.where(half == 0, half, _up(half, 1))


def _powers(exponent: float) -> lines.Function:
    op = aten.pow.Tensor_Scalar
    value = RULES[op].function
    return lines.Function(
        lambda t: value(singleton(t), exponent),
        lambda t: exponent * t.pow(exponent - 1),
        lambda slope: (slope / exponent).pow(1 / (exponent - 1)) if exponent != 1 else slope,
    )


def _convolution_backward(grad: Form, shape: torch.Size, weight: Tensor, options: list[Any]) -> Form:
    nothing, mask = weight.new_empty(1).expand(shape), [True, False, False]

    def function(t: Tensor, weight: Tensor = weight) -> Tensor:
        return aten.convolution_backward.default(t, nothing, weight, None, *options[1:], mask)[0]

    return _mapped(function, lambda t: function(t, weight.abs()), grad)


def _per_channel(t: Tensor, x: Form) -> Tensor:
    return t.double().reshape(-1, *[1] * (x.centre.dim() - 2))


def _scaled(x: Form, weight: Tensor | None, var: Tensor, eps: float) -> Form:
    """Times weight/√(var + eps), per channel."""
    scale = (_per_channel(var, x) + eps).rsqrt()
    if weight is not None:
        scale = scale * _per_channel(weight, x)
    return _mapped(lambda t: t * scale, lambda t: t * scale.abs(), x)


def _sum(x: Form, y: Form) -> Form:
    count = max(len(x.generators), len(y.generators))
    shape = torch.broadcast_shapes(x.centre.shape, y.centre.shape)
    generators = _spread(x, count, shape) + _spread(y, count, shape)
    slack = x.slack + y.slack + rounding_loss(2) * (x.size + y.size)
    return Form(x.centre + y.centre, generators, _up(slack, 4))


def _padded(generators: Tensor, count: int) -> Tensor:
    """With zeros for symbols that it does not depend on."""
    missing = count - len(generators)
    return torch.cat([generators, generators.new_zeros(missing, *generators.shape[1:])]) if missing else generators


def _spread(x: Form, count: int, shape: torch.Size) -> Tensor:
    """Generators for so many symbols, of an element of which a larger tensor is made by broadcasting."""
    missing = [1] * (len(shape) - x.centre.dim())
    return _padded(x.generators, count).reshape(count, *missing, *x.centre.shape)


def _magnitude(x: Form, box: Any) -> Tensor:
    """The greatest magnitude, by the form and by its box."""
    known = _up(box.mid.double().abs() + box.rad.double(), 1) if isinstance(box, Interval) else box.double().abs()
    return torch.fmin(x.size, known)


def _within(x: Interval, form: Form) -> Interval:
    """The set cut down to the ends of a form, where these are narrower."""
    if x.facts is not None or isinstance(x.state, Standardised):
        return x  # what is known besides holds about this midpoint, and says more
    (lower, upper), (least, greatest) = form.ends, ends(in_float64(x))
    lower, upper = torch.fmax(lower, least), torch.fmin(upper, greatest)
    mid = (lower / 2 + upper / 2).to(x.dtype)
    exact = mid.double()
    steps = torch.finfo(x.dtype)
    rad = torch.maximum(upper - exact, exact - lower) * (1 + 2 * steps.eps) + 2 * steps.smallest_normal * steps.eps
    rad = rad.to(x.dtype)
    better = (lower <= upper) & (rad < x.rad)
    return Interval.of(torch.where(better, mid, x.mid), torch.where(better, rad, x.rad))


def _work(node: fx.Node) -> int:
    """Multiplications of a product or a convolution, by its weight: each number of it counts for each place."""
    shapes = {arg: arg.meta["val"].shape for arg in node.all_input_nodes if isinstance(arg.meta.get("val"), Tensor)}
    if node.target is aten.convolution.default:
        return shapes[node.args[1]].numel() * node.meta["val"].shape[2:].numel()  # type: ignore[index]
    if node.target is aten.convolution_backward.default:
        return shapes[node.args[2]].numel() * shapes[node.args[0]][2:].numel()  # type: ignore[index]
    if node.target in (aten.mm.default, aten.bmm.default, aten.addmm.default):
        return node.meta["val"].numel() * shapes[node.args[-1]][-2]  # type: ignore[index]
    return 0


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Whose forms nobody reads after a node; those of operators with several results are read with these."""
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op != "output":
            for source in node.all_input_nodes:
                last[source] = node
                if node.target is operator.getitem:
                    last.update(dict.fromkeys(source.all_input_nodes, node))
    found: dict[fx.Node, list[fx.Node]] = {}
    kept = set(graph.output_node().all_input_nodes)
    for source, node in last.items():
        if source not in kept:
            found.setdefault(node, []).append(source)
    return found


# What is linear in an argument, all others being numbers: as where rankings are cut, and affine operators.
_COPIES = (aten.clone.default, aten.alias.default, aten.detach.default)
_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int)
_MOVES = (
    *(aten.select_backward.default, aten.slice_backward.default, aten.gather.default, aten.index_select.default),
    *(aten.flip.default, aten.repeat.default, aten.mean.default, aten.sum.default),
)
_AFFINE_AT = {
    **LINEAR_AT,
    **dict.fromkeys((aten.avg_pool2d.default, aten.constant_pad_nd.default, *_SPLITS, *_MOVES), (0,)),
    **dict.fromkeys((aten.mul.Scalar, aten.div.Scalar), (0,)),
    aten.addmm.default: (1,),
}
# Of which other arguments are coefficients.
_SCALING = (
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.div.Tensor,
    aten.div.Scalar,
    aten.mm.default,
    aten.bmm.default,
    aten.addmm.default,
)
_BIAS_AT: dict[Any, int] = {aten.convolution.default: 2, aten.addmm.default: 0}


def _logit(slope: Tensor) -> Tensor:
    """Where sigmoid has this slope."""
    return torch.logit((1 + (1 - 4 * slope).sqrt()) / 2)


# Functions with a line beside them: its kind, the derivative without cancellation, and where that is a slope.
_SHAPES: dict[Any, tuple[Any, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor] | None]] = {
    aten.exp.default: (lines.convex, torch.exp, torch.log),
    aten.log.default: (lines.concave, torch.reciprocal, torch.reciprocal),
    aten.sqrt.default: (lines.concave, lambda t: 0.5 / t.sqrt(), lambda slope: 0.25 / slope.square()),
    aten.rsqrt.default: (lines.convex, lambda t: -0.5 * t.rsqrt() / t, lambda slope: (-2 * slope).pow(-2 / 3)),
    aten.sigmoid.default: (lines.sigmoidal, lambda t: t.sigmoid() * (-t).sigmoid(), _logit),
    aten.tanh.default: (
        lines.sigmoidal,
        lambda t: 4 * (2 * t).sigmoid() * (-2 * t).sigmoid(),
        lambda slope: (1 - slope).sqrt().atanh(),
    ),
}

# Elementwise functions, and the operator that multiplies a gradient by their derivatives at x, or at results.
_DERIVATIVE: dict[Any, Any] = {
    aten.gelu.default: aten.gelu_backward.default,
    aten.silu.default: aten.silu_backward.default,
}
_GATES = (aten.threshold_backward.default, aten.leaky_relu_backward.default, aten.softplus_backward.default)
_GATES = (*_GATES, aten.elu_backward.default, aten.hardtanh_backward.default, *_DERIVATIVE.values())
_GATES = (*_GATES, aten.tanh_backward.default, aten.sigmoid_backward.default)

_ADDS = (aten.add.Tensor, aten.add.Scalar)
_RSUB = (aten.rsub.Scalar, aten.rsub.Tensor)
_RULES: dict[Any, Callable[[_Evaluator, fx.Node, Interval], Form | None]] = {
    **dict.fromkeys((aten.relu.default, aten.leaky_relu.default, aten.abs.default), _Evaluator._rectified),
    **dict.fromkeys(_SHAPES, _Evaluator._function),
    aten.pow.Tensor_Scalar: _Evaluator._power,
    **dict.fromkeys((aten.div.Tensor, aten.div.Scalar), _Evaluator._quotient),
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar), _Evaluator._mul),
    **dict.fromkeys((*_ADDS, aten.sub.Tensor, aten.sub.Scalar, *_RSUB), _Evaluator._add),
    aten.cat.default: _Evaluator._joined,
    aten.stack.default: _Evaluator._joined,
    **dict.fromkeys(_GATES, _Evaluator._gate),
    **dict.fromkeys(_DERIVATIVE, _Evaluator._smooth),
}
