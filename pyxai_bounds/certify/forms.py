"""Sharper bounds of one sample's explanation: sets that remember by what they vary.

An Interval forgets why its elements may move, and what moves together later cannot cancel any more. An affine form
keeps it: centre + Σₖ ξₖ·generatorₖ + e with |ξₖ| ≤ 1 and |e| ≤ slack, elementwise. There is a ξ for each number of the
input that moves, and one for whatever an operator adds: an unstable ReLU, a gate that may be open or shut, a product.
Operators that are linear apply to centre and generators; functions of one number are lines with what is left beside
them (``lines``), products keep all that is linear in either factor. All others take the Intervals, which are kept
beside the forms and cut down to what these allow. So bounds are never wider than those of ``bound``, and take as many
times their work as there are ξ.

Source: affine arithmetic (Stolfi and de Figueiredo, Self-validated numerical methods, 1997); the slope of a ReLU as in
Singh et al., Fast and effective robustness certification, NeurIPS 2018; attention and norms here by what is left of
their first order. The backward pass is part of the program, and every number is rounded outward.
"""

from __future__ import annotations

import contextlib
import functools
import math
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
from pyxai_bounds.ops.smooth import root
from pyxai_bounds.parameters import ParameterBox
from pyxai_bounds.rules import RULES, facts
from pyxai_bounds.rules.registry import (
    Indices,
    Product,
    UnsupportedArgumentsError,
    as_set,
    ends,
    in_float64,
    range_of,
    singleton,
    use_product,
)
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
    """A function of single samples, evaluated with affine forms; its parameters must not change, but in their box."""

    def __init__(
        self, graph: fx.GraphModule, rounding: rd.Rounding, product: Product, most: int, parameters: ParameterBox | None
    ) -> None:
        self.graph, self.rounding, self.product, self.most = graph, rounding, product, most
        self.parameters = parameters

    @classmethod
    def of(
        cls, graph: fx.GraphModule, rounding: rd.Rounding, product: Product, cheaply: bool,
        parameters: ParameterBox | None = None,
    ) -> Forms | None:  # fmt: skip
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
        return cls(graph, rounding, product, most, parameters) if fits else None

    def __call__(self, arguments: Sequence[Interval | Tensor]) -> tuple[Interval, FormRows]:
        """The explanation [1, ...] over a box: its bounds, and what they are the ends of."""
        evaluator = _Evaluator(self.graph, self.most, self.parameters)
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

    joins_terms = False  # each term has a form of its own

    def __init__(self, graph: fx.GraphModule, most: int, parameters: ParameterBox | None) -> None:
        super().__init__(graph, parameters)
        self.most = most  # symbols
        self.symbols = 0
        self.forms: dict[fx.Node, Form] = {}
        self.normal: dict[fx.Node, tuple[Form, Form, Standardised]] = {}  # of a norm, before weight and bias
        self.moving: set[fx.Node] = set()  # what depends on an argument that is a set
        self.done = _last_uses(graph.graph)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "placeholder" and isinstance(result, Interval):
            self.moving |= behind([n])
        # Rounded to nearest, sets of integers are held by integers.
        if n in self.moving and type(result) is Interval and result.dtype.is_floating_point:
            form = self._form(n, result)
            if n.target not in _REARRANGES:  # the set is as it was cut before
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
        known = n.target in _POOL_GRADIENTS or not places
        if known and any(source in self.forms for source in sources):
            if call is not n:
                found = self._one_result(n, call, result)
            elif n.target in _RULES:
                found = _RULES[n.target](self, n, result)
            else:
                found = self._linear(n)
        moved = found is not None and n.target in _REARRANGES
        if found is not None and (moved or bool((found.centre + found.reach).isfinite().all())):
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

    def _lined(self, x: Form, line: Line, known: Interval | None = None, symbols: bool = True) -> Form:
        """A function of numbers by a line beside it; where there is none it lies in what is ``known`` of it."""
        slope, least, most = line.slope, line.least, line.most
        if known is not None:
            lower, upper = ends(in_float64(known))
            beside = slope.isfinite() & least.isfinite() & most.isfinite()
            slope = torch.where(beside, slope, 0.0)
            least, most = torch.where(beside, least, lower), torch.where(beside, most, upper)
        centre, half = _halves(least, most)
        found = _mapped(lambda t: t * slope, lambda t: t * slope.abs(), x, centre, terms=1)
        if not symbols:
            return Form(found.centre, found.generators, _up(found.slack + half, 1))
        return self._fresh(found, half)

    def _curved(self, op: Any, x: Form, lower: Tensor, upper: Tensor, known: Interval | None) -> Form:
        """One of ``_SHAPES``, of a form between these ends."""
        shape, derivative, touch = _SHAPES[op]
        f = lines.Function(lambda t: RULES[op].function(singleton(t)), derivative, touch)
        return self._lined(x, shape(f, lower, upper), known)

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
        if n.target in _REARRANGES:  # nothing is rounded
            move: Any = aten.reshape.default if n.target in VIEWS else n.target
            rest, options = n.args[1:], n.kwargs
            return _moved(lambda t: move(t, *rest, **options), x)
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

    def _one_result(self, n: fx.Node, call: fx.Node, result: Interval) -> Form | None:
        """Of operators with several, the first: gradients of convolutions, norms and theirs, pools."""
        if call.target in _SPLITS:
            return self._linear(n)
        if n.args[1] != 0:
            return Form.box(in_float64(result)) if call.target in _NORMS else None
        if call.target in _NORMS:
            return self._norm(call)
        if call.target in _NORM_GRADIENTS:
            return self._norm_backward(call)
        if call.args[0] not in self.forms:
            return None
        rest: list[Any] = [self.env[arg] if isinstance(arg, fx.Node) else arg for arg in call.args]
        x = self.forms[call.args[0]]  # type: ignore[index]
        if call.target in _POOLS:
            indices = self.env[call][1]
            return self._pool(x, rest[0], indices, n.meta["val"].shape) if isinstance(indices, Indices) else None
        if call.target is aten.convolution_backward.default:
            shape = n.meta["val"].shape
            if not isinstance(rest[2], Interval):
                return _convolution_backward(x, shape, rest[2].double(), rest[3:10])
            weight = self.operand(call.args[2])

            def product(grad: Tensor, weight: Tensor) -> Tensor:
                return _to_input(grad, weight, shape, rest[3:10])

            return self._bilinear(product, x, weight, weight.centre.numel(), rest[0], rest[2])
        if any(isinstance(t, Interval) for t in rest[3:5]):  # statistics
            return None
        if call.target is aten.native_batch_norm.default and not rest[5]:
            moved = _sum(x, Form.box(singleton(-_per_channel(rest[3], x))))
            return self._affine(_scaled(moved, rest[4], rest[7]), call.args[1], call.args[2])
        if call.target is aten.native_batch_norm_backward.default and not rest[7]:
            return self._affine(_scaled(x, rest[4], rest[8]), call.args[2], None)
        return None

    def _affine(self, x: Form, weight: Any, bias: Any, shape: Sequence[int] | None = None) -> Form:
        """Times a weight, plus a bias, of these shapes, by default per channel."""
        shape = shape or [-1] + [1] * (x.centre.dim() - 2)
        weight, bias = (None if t is None else _reshaped(self.operand(t), shape) for t in (weight, bias))
        if weight is not None:
            x = self._product(x, weight)
        return x if bias is None else self._fresh(_sum(x, bias))

    # --- norms of a sample ---------------------------------------------------------------------------------------

    def _normal(self, call: fx.Node) -> tuple[Form, Form, Standardised] | None:
        """Rows standardised, y = d/√(v + eps) with d = x - mean and v the mean of d²; 1/√(v + eps); and what the rule
        knows of both.
        """
        if call not in self.normal:
            known = getattr(self.env[call][2], "state", None)
            if not isinstance(known, Standardised):
                return None
            x = _reshaped(self.operand(call.args[0]), known.value.shape)
            eps = float(call.args[-1])  # type: ignore[arg-type]
            d = _less_mean(x)
            squares = self._lined(d, lines.power(_powers(2.0), 2.0, *d.ends), symbols=False)
            v = self._fresh(
                _sum(_mapped(_mean, _mean, squares), Form.box(singleton(torch.full_like(d.centre[:, :1], eps))))
            )
            least, most = ends(known.inverse)
            lower, upper = v.ends
            lower = torch.fmax(lower, (1 - lines.LOSS) / most.square())
            upper = torch.where(least > 0, torch.fmin(upper, (1 + lines.LOSS) / least.square()), upper)
            inverse = self._curved(aten.rsqrt.default, v, lower, upper, known.inverse)
            self.normal[call] = self._product(d, inverse, None, known.inverse), inverse, known
        return self.normal[call]

    def _norm(self, call: fx.Node) -> Form | None:
        found = self._normal(call)
        if found is None:
            return None
        shape = self.env[call][0].shape
        first = 2 if call.target is aten.native_layer_norm.default else 1
        weight, bias = call.args[first : first + 2]
        return self._affine(_reshaped(found[0], shape), weight, bias, _weight_shape(call, shape))

    def _norm_backward(self, call: fx.Node) -> Form | None:
        """(h - mean h - y·mean(h·y))/σ with h = g·w."""
        layer = call.target is aten.native_layer_norm_backward.default
        inverse: Any = call.args[4] if layer else call.args[3]
        forward = inverse.args[0] if isinstance(inverse, fx.Node) and inverse.target is operator.getitem else None
        if not isinstance(forward, fx.Node) or forward.target not in _NORMS or forward not in self.env:
            return None
        found = self._normal(forward)
        if found is None or inverse.args[1] != 2:
            return None
        normal, scale, known = found
        shape = self.env[call][0].shape
        weight = call.args[5] if layer else call.args[4]
        h = self._affine(self.operand(call.args[0]), weight, None, _weight_shape(call, shape))
        h = _reshaped(h, known.value.shape)

        def inner(a: Tensor, b: Tensor) -> Tensor:
            return _mean(a * b)

        along = self._bilinear(inner, h, normal, h.centre.shape[1], None, known.value)
        across = self._bilinear(torch.mul, normal, along, 1, known.value, symbols=False)
        return _reshaped(self._product(_sum(_less_mean(h), _negative(across)), scale, None, known.inverse), shape)

    # --- the greatest of several -----------------------------------------------------------------------------------

    def _pool(self, x: Form, box: Interval, indices: Indices, shape: Sequence[int]) -> Form | None:
        try:
            places = indices.windows()[1]
        except UnsupportedArgumentsError:
            return None
        rows = x.centre.numel() // places.whole
        first = torch.arange(rows, device=x.centre.device)[:, None] * places.whole
        index = places.index[:, None] + first
        index = torch.where((places.index < places.whole)[:, None], index, -1)
        found = self._greatest(x, box, index.flatten(1))
        return None if found is None else _reshaped(found, shape)

    def _greatest(self, x: Form, box: Interval, index: Tensor) -> Form | None:
        """Of each column of places [P, M] in x flattened, -1 for none: max(a, b) = a + relu(b - a), one by one, from
        that of the greatest lower end on. What lies below that end cannot be the greatest.
        """
        if not bool(box.isfinite().all()):
            return None

        def taken(x: Form, places: Tensor) -> Form:
            return _moved(lambda t: t[places], x)

        flat = _reshaped(x, [-1])
        lower, upper = (t.flatten()[index] for t in self._ends(x, box))
        lower, upper = (torch.where(index < 0, -math.inf, t) for t in (lower, upper))
        order = lower.argsort(0, descending=True)
        index, lower, upper = (t.gather(0, order) for t in (index, lower, upper))
        best = taken(flat, index[0])
        for place, most in zip(index[1:], upper[1:], strict=True):
            open_ = (most > lower[0]).nonzero()[:, 0]
            if len(open_):
                ahead = _sum(taken(flat, place[open_]), _negative(taken(best, open_)))
                least, greatest = ahead.ends
                greatest = torch.fmin(greatest, _up(most[open_] - lower[0, open_], 1))
                greatest = torch.fmax(greatest, least)
                best = _sum(best, _scattered(self._lined(ahead, lines.rectified(least, greatest)), open_, best))
        return best

    def _maximum(self, n: fx.Node, result: Interval) -> Form | None:
        """Over one dimension."""
        x, box = self.operand(n.args[0]), self._value(n.args[0])
        named: Any = n.args[1] if len(n.args) > 1 else None
        dims = [named] if isinstance(named, int) else named
        if not dims or len(dims) != 1 or not isinstance(box, Interval) or x.centre.dim() == 0:
            return None
        places = torch.arange(x.centre.numel(), device=x.centre.device).reshape(x.centre.shape)
        found = self._greatest(x, in_float64(box), places.movedim(dims[0], 0).flatten(1))
        return None if found is None else _reshaped(found, result.shape)

    def _pool_backward(self, n: fx.Node, result: Interval) -> Form | None:
        """Each place of a window gets the gradient times 0, 1, or either; of two that may get it, one does."""
        indices, grad = self.env[n.args[-1]], self.operand(n.args[0])  # type: ignore[index]
        try:
            x, places = indices.windows()
        except (AttributeError, UnsupportedArgumentsError):
            return None
        must, may = (t.to(torch.float64) for t in places.first_maximum(in_float64(x)))
        windows = _reshaped(grad, [must.shape[0], 1, must.shape[2]])
        sure = _mapped(lambda t: t * (must + may) / 2, lambda t: t * (must + may) / 2, windows, terms=1)
        unsure = _up(windows.size * (may - must) / 2, 2) * (may - must)
        two = (may.sum(1, keepdim=True) == 2) & (must.sum(1, keepdim=True) == 0)
        signs = torch.where(may.cumsum(1) > 1, -1.0, 1.0) * unsure * two
        parts = self._fresh(self._shared(sure, signs, 1), torch.where(two, 0.0, unsure))

        def fold(t: Tensor) -> Tensor:
            return places.fold(t)

        return _reshaped(_mapped(fold, fold, parts, terms=len(places.index)), result.shape)

    def _shared(self, form: Form, amounts: Tensor, dim: int) -> Form:
        """``form`` + ξ·amounts, a symbol for all that lie along a dimension; slack where there is no room for them."""
        rows = amounts.movedim(dim, 0).flatten(1)
        wanted = rows.abs().amax(0).nonzero()[:, 0]
        if self.symbols + len(wanted) > self.most:
            return Form(form.centre, form.generators, _up(form.slack + amounts.abs(), 1))
        if not len(wanted):
            return form
        new = rows.new_zeros(len(wanted), *rows.shape)
        new[torch.arange(len(wanted), device=rows.device), :, wanted] = rows[:, wanted].T
        new = new.reshape(len(wanted), amounts.shape[dim], *amounts.movedim(dim, 0).shape[1:]).movedim(1, dim + 1)
        before = _padded(form.generators, self.symbols)
        self.symbols += len(wanted)
        return Form(form.centre, torch.cat([before, new]), form.slack)

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
        x = self.operand(n.args[0])
        return self._curved(n.target, x, *self._ends(x, self.env[n.args[0]]), result)  # type: ignore[index]

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
        if not self._is_set(n.args[1]) or len(n.args) > 2 or n.kwargs:
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
        slope = self._slope(n, slopes) if n.args[1] in self.forms else Form.box(slopes)
        return self._product(self.operand(n.args[0]), slope, args[0], slopes)

    def _slope(self, n: fx.Node, box: Interval) -> Form:
        """A derivative by that of the derivative; as its box where that says more."""
        x, known = self.operand(n.args[1]), self.env[n.args[1]]  # type: ignore[index]
        if n.target in (aten.tanh_backward.default, aten.sigmoid_backward.default):
            is_tanh = n.target is aten.tanh_backward.default
            first = Form.box(singleton(torch.ones_like(x.centre))) if is_tanh else x
            found = _sum(first, _negative(self._to_power(x, known, 2.0)))
        elif n.target in _CURVATURES and not n.kwargs:
            mid = known.mid.double()
            derivative: Any = RULES[n.target].function  # type: ignore[index]
            at_mid = derivative(singleton(torch.ones_like(mid)), singleton(mid))
            found = self._by_mean_value(x, known, at_mid, _CURVATURES[n.target](in_float64(known)))
        else:
            return Form.box(box)
        return _narrower(found, box, 2.0)

    def _by_mean_value(self, x: Form, box: Interval, at_mid: Interval, slopes: Interval) -> Form:
        """g(x) lies in g(m) + D·(x - m), D the derivative over the box, m its midpoint."""
        mid = box.mid.double()
        moved = _sum(x, Form.box(singleton(-mid)))
        distance = Interval.of(torch.zeros_like(mid), box.rad.double())
        return _sum(self._product(moved, Form.box(slopes), distance), Form.box(at_mid))

    def _is_set(self, x: Any) -> bool:
        """Also a number that is not known exactly, or a weight that moves."""
        return isinstance(x, fx.Node) and isinstance(self.env.get(x), Interval)

    def _mul(self, n: fx.Node, result: Interval) -> Form | None:
        if not all(self._is_set(arg) for arg in n.args):
            return self._linear(n)
        if n.args[0] is n.args[1]:
            return self._to_power(self.operand(n.args[0]), self.env[n.args[0]], 2.0, result)  # type: ignore[index]
        x, y = (self.operand(arg) for arg in n.args)
        return self._product(x, y, *(self._value(arg) for arg in n.args))

    def _matrix(self, n: fx.Node, result: Interval) -> Form | None:
        """Products of matrices, where both are sets, or the bias is one."""
        *bias, a, b = n.args
        if not (self._is_set(a) and self._is_set(b)) and not any(map(self._is_set, bias)):
            return self._linear(n)
        if n.kwargs:
            return None
        x, y = self.operand(a), self.operand(b)
        product: Any = torch.bmm if n.target is aten.bmm.default else torch.mm
        found = self._bilinear(product, x, y, x.centre.shape[-1], self._value(a), self._value(b))
        return self._fresh(_sum(found, self.operand(bias[0]))) if bias else found

    def _convolution(self, n: fx.Node, result: Interval) -> Form | None:
        if not self._is_set(n.args[1]) and not self._is_set(n.args[2]):
            return self._linear(n)
        x, weight, options = self.operand(n.args[0]), self.operand(n.args[1]), n.args[3:]

        def product(a: Tensor, b: Tensor) -> Tensor:
            return aten.convolution.default(a, b, None, *options)

        terms = weight.centre.numel()
        found = self._bilinear(product, x, weight, terms, *(self._value(arg) for arg in n.args[:2]))
        return self._affine(found, None, n.args[2])

    def _product(self, x: Form, y: Form, box: Any = None, other: Any = None) -> Form:
        """Elementwise; ``box`` and ``other``: what else is known of x and of y."""
        return self._bilinear(torch.mul, x, y, 1, box, other)

    def _bilinear(
        self, product: Callable[[Tensor, Tensor], Tensor], x: Form, y: Form, terms: int, box: Any = None,
        other: Any = None, symbols: bool = True,
    ) -> Form:  # fmt: skip
        """Any product that is linear in both, with coefficients >= 0, of which each result sums so many terms.

        With x = c + d + e, where d varies by symbols and e within the slack, and y alike, x·y is c·c' + d·c' + c·d' and
        what is left: if y has no symbols, x·e' + e·c'; else no more than the product of both reaches, c·e' and e·c'.
        """
        centre = product(x.centre, y.centre)
        if not len(y.generators):
            left = product(_magnitude(x, box), y.slack) + product(x.slack, y.centre.abs())
        elif not len(x.generators):
            left = product(x.slack, _magnitude(y, other)) + product(x.centre.abs(), y.slack)
        else:
            left = product(x.reach, y.reach) + product(x.centre.abs(), y.slack) + product(x.slack, y.centre.abs())
        count = max(len(x.generators), len(y.generators))
        if product is torch.mul:
            generators = _spread(x, count, centre.shape) * y.centre + _spread(y, count, centre.shape) * x.centre
        else:
            by_x = _each(lambda t: product(t, y.centre), x.generators, centre)
            by_y = _each(lambda t: product(x.centre, t), y.generators, centre)
            generators = _padded(by_x, count) + _padded(by_y, count)
        slack = _up(rounding_loss(terms + 4) * product(x.size, y.size), terms + 4)
        left = _up(left, terms + 6)
        if not symbols:
            return Form(centre, generators, _up(slack + left, 1))
        return self._fresh(Form(centre, generators, slack), left)

    def _smooth(self, n: fx.Node, result: Interval) -> Form | None:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        box = in_float64(args[0])
        slopes = RULES[_DERIVATIVE[n.target]].function(singleton(torch.ones_like(box.mid)), box, *args[1:], **kwargs)
        return self._by_mean_value(self.operand(n.args[0]), box, self._at(n)(box.mid), slopes)

    def _log_softmax(self, n: fx.Node, result: Interval) -> Form | None:
        """log p(x) = log p(m) + y - R with y = z - Σ p(m)·z, z = x - m, and R half the variance of z under weights p at
        some point between m and x: log Σ exp is convex, and this its second derivative.
        """
        x, dim = self.operand(n.args[0]), int(n.args[1])  # type: ignore[arg-type]
        box = in_float64(self.env[n.args[0]])  # type: ignore[index]
        if n.meta["val"].dtype != n.args[0].meta["val"].dtype or not bool(box.isfinite().all()):  # type: ignore[union-attr]
            return None
        softmax, log_softmax = (RULES[op].function for op in (aten._softmax.default, aten._log_softmax.default))
        weights, at_mid = (rule(singleton(box.mid), dim, False) for rule in (softmax, log_softmax))
        moved = _sum(x, Form.box(singleton(-box.mid)))

        def mean(t: Tensor) -> Tensor:
            return (t * weights.mid.abs()).sum(dim, keepdim=True)

        y = _sum(moved, _negative(_mapped(mean, mean, moved)))
        count = x.centre.shape[dim]
        size = torch.fmin(y.size, _up(box.rad + mean(box.rad), count + 2))
        most = ends(softmax(box, dim, False))[1]
        lower, upper = torch.fmax(y.ends[0], -size), torch.fmin(y.ends[1], size)
        spread = _up(upper.amax(dim, keepdim=True) - lower.amin(dim, keepdim=True), 1)
        variance = torch.fmin(spread.square() / 4, (most * size.square()).sum(dim, keepdim=True))
        rest = _up(variance / 2, count + 4)
        off = _up((weights.rad * box.rad).sum(dim, keepdim=True), count + 1)
        shared = Form(-rest / 2, rest.new_empty(0, *rest.shape), torch.zeros_like(rest))
        return _sum(_sum(y, self._fresh(shared, _up(rest / 2 + off, 1))), Form.box(at_mid))

    def _softmax(self, n: fx.Node, result: Interval) -> Form | None:
        logarithm = self._log_softmax(n, result)
        if logarithm is None:
            return None
        box = in_float64(self.env[n.args[0]])  # type: ignore[index]
        known = RULES[aten._log_softmax.default].function(box, n.args[1], False)
        return self._fresh(_narrower(self._exponential(logarithm, known, result), result))

    def _exponential(self, x: Form, box: Any, result: Interval | None = None) -> Form:
        return self._curved(aten.exp.default, x, *self._ends(x, box), result)

    def _softmax_backward(self, n: fx.Node, result: Interval) -> Form:
        """p·(g - Σ g·p); where p sums to 1, a number may be taken from g first."""
        grad, weights = (self.operand(arg) for arg in n.args[:2])
        grads, box, dim = self._value(n.args[0]), self._value(n.args[1]), int(n.args[2])  # type: ignore[arg-type]
        known = facts.of(box)
        if known.convex and known.total is not None and facts.joined(known.total, box.shape) == [dim % len(box.shape)]:
            inner = (grad.centre * box.mid.double()).sum(dim, keepdim=True)
            grad, grads = _sum(grad, Form.box(singleton(-inner))), None

        def inner_product(a: Tensor, b: Tensor) -> Tensor:
            return (a * b).sum(dim, keepdim=True)

        mean = self._bilinear(inner_product, grad, weights, grad.centre.shape[dim], grads, box)
        return self._fresh(_narrower(self._product(weights, _sum(grad, _negative(mean)), box), result))

    def _log_softmax_backward(self, n: fx.Node, result: Interval) -> Form:
        """g - p·Σ g."""
        grad, dim = self.operand(n.args[0]), int(n.args[2])  # type: ignore[arg-type]
        weights = self._exponential(self.operand(n.args[1]), self._value(n.args[1]))
        total = _mapped(lambda t: t.sum(dim, keepdim=True), lambda t: t.sum(dim, keepdim=True), grad)
        return self._fresh(_narrower(_sum(grad, _negative(self._product(weights, total))), result))

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
    generators = _each(function, x.generators, centre)
    terms = terms or x.centre.numel()
    slack = magnitude(_up(x.slack + rounding_loss(terms) * x.size, 2)).abs()
    return Form(centre, generators, _up(slack, terms) + rounding_loss(2) * centre.abs())


def _each(function: Callable[[Tensor], Tensor], generators: Tensor, like: Tensor) -> Tensor:
    """Of every generator, the result, which is shaped as another one."""
    return torch.func.vmap(function)(generators) if len(generators) else like.new_empty(0, *like.shape)


def _moved(move: Callable[[Tensor], Tensor], x: Form) -> Form:
    """What only moves numbers, and rounds none."""
    centre = move(x.centre)
    return Form(centre, _each(move, x.generators, centre), move(x.slack))


def _reshaped(x: Form, shape: Sequence[int]) -> Form:
    sizes = list(shape)
    return _moved(lambda t: t.reshape(sizes), x)


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


def _mean(t: Tensor) -> Tensor:
    return t.mean(1, keepdim=True)


def _less_mean(x: Form) -> Form:
    """Rows less their mean."""
    return _sum(x, _negative(_mapped(_mean, _mean, x, terms=x.centre.shape[1])))


def _weight_shape(call: fx.Node, shape: Sequence[int]) -> list[int]:
    """In which a norm's weight and bias spread over values of this shape."""
    if call.target in (aten.native_layer_norm.default, aten.native_layer_norm_backward.default):
        place = 1 if call.target is aten.native_layer_norm.default else 2
        sizes: Any = call.args[place]
        return list(sizes)
    return [1, -1] + [1] * (len(shape) - 2)


def _scattered(x: Form, places: Tensor, like: Form) -> Form:
    """A vector as long as another, 0 but for these places."""
    centre, slack = (torch.zeros_like(like.centre).index_copy(0, places, t) for t in (x.centre, x.slack))
    generators = x.generators.new_zeros(len(x.generators), len(centre))
    generators[:, places] = x.generators
    return Form(centre, generators, slack)


def _to_input(grad: Tensor, weight: Tensor, shape: torch.Size, options: list[Any]) -> Tensor:
    """The gradient of a convolution's input."""
    nothing, mask = weight.new_empty(1).expand(shape), [True, False, False]
    return aten.convolution_backward.default(grad, nothing, weight, None, *options[1:], mask)[0]


def _convolution_backward(grad: Form, shape: torch.Size, weight: Tensor, options: list[Any]) -> Form:
    size = weight.abs()
    return _mapped(lambda t: _to_input(t, weight, shape, options), lambda t: _to_input(t, size, shape, options), grad)


def _per_channel(t: Tensor, x: Form) -> Tensor:
    return t.double().reshape(-1, *[1] * (x.centre.dim() - 2))


def _scaled(x: Form, var: Tensor, eps: float) -> Form:
    """Times 1/√(var + eps), per channel."""
    scale = (_per_channel(var, x) + eps).rsqrt()
    return _mapped(lambda t: t * scale, lambda t: t * scale.abs(), x, terms=1)


def _sum(x: Form, y: Form) -> Form:
    count = max(len(x.generators), len(y.generators))
    shape = torch.broadcast_shapes(x.centre.shape, y.centre.shape)
    generators = _spread(x, count, shape) + _spread(y, count, shape)
    slack = x.slack + y.slack + rounding_loss(2) * (x.size + y.size)
    return Form(x.centre + y.centre, generators, _up(slack, 4))


def _negative(x: Form) -> Form:
    return Form(-x.centre, -x.generators, x.slack)


def _narrower(x: Form, box: Interval, times: float = 1.1) -> Form:
    """Element by element the box, where the form reaches so many times as far: what varies by symbols may cancel."""
    mid, rad = box.mid.double(), box.rad.double()
    worse = times * rad < x.reach
    return Form(torch.where(worse, mid, x.centre), x.generators * ~worse, torch.where(worse, rad, x.slack))


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
    if isinstance(box, Interval):
        box = _up(box.mid.double().abs() + box.rad.double(), 1)
    return x.size if box is None else torch.fmin(x.size, box.double().abs())


def _within(x: Interval, form: Form) -> Interval:
    """The set cut down to the ends of a form, where these are narrower."""
    if isinstance(x.state, Standardised):
        return x
    (lower, upper), (least, greatest) = form.ends, ends(in_float64(x))
    lower, upper = torch.fmax(lower, least), torch.fmin(upper, greatest)
    # What is known besides may be about this midpoint.
    mid = x.mid if x.facts is not None else (lower / 2 + upper / 2).to(x.dtype)
    exact = mid.double()
    steps = torch.finfo(x.dtype)
    rad = torch.maximum(upper - exact, exact - lower) * (1 + 2 * steps.eps) + 2 * steps.smallest_normal * steps.eps
    rad = rad.to(x.dtype)
    better = (lower <= upper) & (rad < x.rad)
    return facts.kept(Interval.of(torch.where(better, mid, x.mid), torch.where(better, rad, x.rad)), x)


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
_REARRANGES = frozenset(
    (*_COPIES, *VIEWS, aten.t.default, aten.permute.default, aten.transpose.int, aten.unsqueeze.default,
     aten.squeeze.dim)
)  # fmt: skip
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


def _gelu_curvature(t: Tensor) -> Tensor:
    return torch.exp(-t.square() / 2) * (2 - t.square()) / math.sqrt(2 * math.pi)


def _silu_curvature(t: Tensor) -> Tensor:
    s, rest = t.sigmoid(), (-t).sigmoid()
    return s * rest * (2 + t * (rest - s))


def _silu_third(t: float) -> float:
    s, rest = 1 / (1 + math.exp(-t)), 1 / (1 + math.exp(t))
    return 3 * (rest - s) + t * (1 - 6 * s * rest)


_LAST = root(_silu_third, 2.0, 4.0)


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


def _curvature(function: Callable[[Tensor], Tensor], extrema: Sequence[float]) -> Callable[[Interval], Interval]:
    values = [(at, float(function(torch.tensor(at, dtype=torch.float64)))) for at in extrema]
    return lambda x: range_of(function, x, values, ulps=64, absolute=64)


# And by how much that derivative changes: φ(x)(2 - x²), and σ′(2 + x(1 - 2σ)), with all their extrema.
_CURVATURES: dict[Any, Callable[[Interval], Interval]] = {
    aten.gelu_backward.default: _curvature(_gelu_curvature, (-2.0, 0.0, 2.0)),
    aten.silu_backward.default: _curvature(_silu_curvature, (-_LAST, 0.0, _LAST)),
}
_GATES = (
    *(aten.threshold_backward.default, aten.leaky_relu_backward.default, aten.softplus_backward.default),
    *(aten.elu_backward.default, aten.hardtanh_backward.default, *_DERIVATIVE.values()),
    *(aten.tanh_backward.default, aten.sigmoid_backward.default),
)

_NORMS = (aten.native_layer_norm.default, aten.native_group_norm.default)
_NORM_GRADIENTS = (aten.native_layer_norm_backward.default, aten.native_group_norm_backward.default)
_POOLS = (
    *(aten.max_pool2d_with_indices.default, aten.max_pool3d_with_indices.default),
    *(aten.adaptive_max_pool2d.default, aten.adaptive_max_pool3d.default),
)
_POOL_GRADIENTS = (
    *(aten.max_pool2d_with_indices_backward.default, aten.max_pool3d_with_indices_backward.default),
    *(aten.adaptive_max_pool2d_backward.default, aten.adaptive_max_pool3d_backward.default),
)
_ADDS = (aten.add.Tensor, aten.add.Scalar)
_RSUB = (aten.rsub.Scalar, aten.rsub.Tensor)
_RULES: dict[Any, Callable[[_Evaluator, fx.Node, Interval], Form | None]] = {
    **dict.fromkeys((aten.relu.default, aten.leaky_relu.default, aten.abs.default), _Evaluator._rectified),
    **dict.fromkeys(_SHAPES, _Evaluator._function),
    aten.pow.Tensor_Scalar: _Evaluator._power,
    **dict.fromkeys((aten._softmax.default, aten._safe_softmax.default), _Evaluator._softmax),
    aten._log_softmax.default: _Evaluator._log_softmax,
    aten._softmax_backward_data.default: _Evaluator._softmax_backward,
    aten._log_softmax_backward_data.default: _Evaluator._log_softmax_backward,
    **dict.fromkeys((aten.div.Tensor, aten.div.Scalar), _Evaluator._quotient),
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar), _Evaluator._mul),
    **dict.fromkeys((*_ADDS, aten.sub.Tensor, aten.sub.Scalar, *_RSUB), _Evaluator._add),
    aten.cat.default: _Evaluator._joined,
    aten.stack.default: _Evaluator._joined,
    **dict.fromkeys((aten.mm.default, aten.bmm.default, aten.addmm.default), _Evaluator._matrix),
    aten.convolution.default: _Evaluator._convolution,
    **dict.fromkeys((aten.amax.default,), _Evaluator._maximum),
    **dict.fromkeys(_POOL_GRADIENTS, _Evaluator._pool_backward),
    **dict.fromkeys(_GATES, _Evaluator._gate),
    **dict.fromkeys(_DERIVATIVE, _Evaluator._smooth),
}
