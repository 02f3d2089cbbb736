"""Certificates: does a property of the explanation hold everywhere in the box, and up to which radius?"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from pyxai_bounds.capture import Captured
from pyxai_bounds.certify.branches import Search, run
from pyxai_bounds.certify.differences import Differences
from pyxai_bounds.certify.factor import Divided
from pyxai_bounds.certify.forms import Forms
from pyxai_bounds.certify.pieces import Pieces, Progress, share_of, silent
from pyxai_bounds.certify.properties import Property, TopK, check_property, flat, kept
from pyxai_bounds.interpreter import Interpreter
from pyxai_bounds.interval import Clip, Interval
from pyxai_bounds.parameters import ParameterBox
from pyxai_bounds.program import BoundFunction, bound, captured_graph
from pyxai_bounds.rounding import without_autocast
from pyxai_bounds.rules.registry import Product

CORNERS = 8  # of a box that are tried before bounds of single samples are made sharper


@dataclass(frozen=True)
class Certificate:
    """The verdict for a batch. ``holds`` is a statement about every input in each sample's box.

    holds bool [B]; margin float [B] (positive where it holds, in the property's units; where entries share a factor
    that the property does not see, with that as it is at x); nominal [B, ...] the explanation at x; bounds its Interval
    over the box; rounding "nearest" or "outward" (a proof in floating point);
    refuted bool [B]: an input of the box was met at which the property fails (looked for only on the way to sharper
    bounds: for an attack see :mod:`pyxai_bounds.attack`).
    """

    holds: Tensor
    margin: Tensor
    nominal: Tensor
    bounds: Interval
    rounding: str
    refuted: Tensor

    @property
    def fraction(self) -> float:
        """The share of samples for which it holds."""
        return self.holds.double().mean().item() if len(self.holds) else math.nan

    def __repr__(self) -> str:
        count = f"{int(self.holds.sum())} of {len(self.holds)}"
        refuted = f", refuted for {int(self.refuted.sum())}" if self.refuted.any() else ""
        endless = int((~flat(self.bounds.isfinite()).all(1)).sum()) if len(self.holds) else 0
        without = f", {endless} have no finite bounds" if endless else ""
        return f"Certificate(holds for {count}{refuted}{without}, rounding={self.rounding!r})"


def certify(
    fn: Callable[..., Tensor],
    x: Tensor,
    target: Tensor | None = None,
    *,
    eps: float | Tensor,
    property: Property,
    clip: Clip = None,
    parameters: ParameterBox | None = None,
    sound: bool = True,
    product: Product = "rump",
    sharpen: bool | None = None,
    branches: int = 1,
    batch_size: int | None = None,
    memory_budget: int | None = None,
    on_progress: Progress | None = None,
) -> Certificate:
    """Does ``property`` of ``fn(x, target)`` hold for every input within ``eps`` of x (and inside ``clip``)?

    With ``parameters`` it must hold for every network in that box, too, and ``product`` is as in :func:`bound`.

    Shapes: x [B, ...]; target integer [B], or None to call ``fn(x)``; eps a float, or a tensor that broadcasts to x
    (one radius per feature: [D]); clip two numbers, or two tensors that broadcast to a sample.
    Each sample must be explained independently of the others and of its place among them: large batches are run in
    pieces of equal size, of at most ``batch_size`` samples if that is given, else so that a piece's bounds take at most
    ``memory_budget`` bytes (default: :func:`~pyxai_bounds.certify.pieces.default_budget`). A sample that takes more is
    a piece of its own. Affine forms of a sample may take as much, and a gigabyte in any case.
    ``sound=True`` rounds outward, so that the certificate is a proof about the function in real arithmetic; it needs
    float32 or float64. ``sound=False`` rounds to nearest, and the certificate says so.
    ``sharpen``: what is done for samples for which the bounds that :func:`bound` gives do not prove the property.
    None: bounds of differences of entries (of ``TopK``, where the explanation ends in linear layers, as gradients do),
    and affine forms, which keep track of what moves together, where they take some ten milliseconds a sample. True, and
    with ``branches``: affine forms wherever memory allows, which takes seconds a sample of a few thousand numbers.
    False: nothing; the margin is that of ``bound``'s Intervals. Samples whose property corners of the box refute are
    left as they are. With a box of parameters there are forms alone, in which what the weights' movements add varies
    by itself.
    ``branches``: into how many parts a sample's box may be divided where affine forms do not prove the property, by the
    signs of what ReLUs are applied to (branch and bound). Parts are looked at side by side where a graph keeps samples
    apart, as most do, else each costs what forms cost. Of a network of ReLUs enough of them decide every question: the
    property is proved, or an input is found at which it fails (``refuted``).
    A sample with a bound that is not finite is never certified, nor is any if the model holds a NaN or an infinity.
    ``on_progress`` is called with the fraction done, now and then.
    Raises what :func:`bound` and :meth:`Interval.linf` raise.
    """
    pieces = Pieces(batch_size, memory_budget)
    check = _Check(fn, x, target, property, clip, parameters, sound, product, sharpen, branches, pieces)
    return check.at(eps, on_progress or silent)


def certified_radius(
    fn: Callable[..., Tensor],
    x: Tensor,
    target: Tensor | None = None,
    *,
    property: Property,
    max_eps: float,
    tol: float = 1e-4,
    unit: Tensor | None = None,
    clip: Clip = None,
    parameters: ParameterBox | None = None,
    sound: bool = True,
    product: Product = "rump",
    sharpen: bool | None = None,
    branches: int = 1,
    batch_size: int | None = None,
    memory_budget: int | None = None,
    on_progress: Progress | None = None,
) -> Tensor:
    """For each sample a radius in [0, max_eps] at which ``certify`` holds, within ``tol`` of the largest such: [B].

    ``unit``, a tensor that broadcasts to x, gives features radii of their own: at radius r the box is eps = r · unit.
    With the standard deviations of the features as the unit, r counts these; a feature whose unit is 0 does not move.
    Bisection, on all samples at once; bounds grow with the box, so a property that fails at a radius fails beyond it.
    ``branches`` are asked for above the radius that is reached without them, in steps that double.
    0 where nothing was certified. The arguments are those of :func:`certify`.
    Raises ValueError unless 0 < tol and 0 < max_eps.
    """
    for name, value in (("max_eps", max_eps), ("tol", tol)):
        if not isinstance(value, (int, float)):
            raise TypeError(
                f"certified_radius: {name} must be a number, got {type(value).__name__}; radii of the features' own "
                "are multiples of unit=…, a tensor that broadcasts to x."
            )
    if not (0 < max_eps < math.inf and tol > 0):
        raise ValueError(f"certified_radius needs 0 < max_eps < ∞ and tol > 0, got max_eps={max_eps}, tol={tol}.")
    pieces = Pieces(batch_size, memory_budget)
    check = _Check(fn, x, target, property, clip, parameters, sound, product, sharpen, branches, pieces)
    per_sample = [-1] + [1] * (x.dim() - 1)
    unknown = torch.full((len(x),), max_eps, dtype=x.dtype, device=x.device)
    # What is returned is max_eps as the dtype holds it, which may be a little more.
    most = max(max_eps, torch.tensor(max_eps, dtype=x.dtype, device="cpu").item())
    for_all = torch.full([1] * x.dim(), most, dtype=torch.float64, device=x.device)
    tell = on_progress or silent

    rounds = 1 + max(0, math.ceil(math.log2(max_eps / tol)))

    def search(safe: Tensor, unknown: Tensor, step: float, branches: int, tell: Progress) -> tuple[Tensor, Tensor]:
        """Bisection that begins a ``step`` above what is safe, and doubles this as long as that is safe, too; and the
        least radii at which the property was seen to fail.
        """
        false = unknown
        for done in itertools.count(1):
            middle = ((safe + unknown) / 2).minimum(safe + step)
            open_ = (unknown - safe > tol) & (middle > safe) & (middle < unknown)  # some neighbours have none between
            if not open_.any():
                break
            eps = middle.reshape(per_sample)
            eps = eps if unit is None else _multiple(eps, unit)
            found = check.at(eps, share_of(tell, done / rounds, 1 / rounds), open_, branches)
            safe, unknown = torch.where(found.holds, middle, safe), torch.where(found.holds, unknown, middle)
            false, step = torch.where(found.refuted, middle, false), 2 * step
        return safe, false

    half = tell if branches == 1 else share_of(tell, 0, 0.5)
    eps = most if unit is None else _multiple(for_all, unit)
    holds = check.at(eps, share_of(half, 0, 1 / rounds), None, 1).holds
    safe, false = search(torch.where(holds, unknown, torch.zeros_like(unknown)), unknown, math.inf, 1, half)
    if branches > 1:  # which take longest where they decide least, far above what is safe without them
        safe, _ = search(safe, false, 0.99 * tol, branches, share_of(tell, 0.5, 0.5))
    tell(1.0)
    return safe


def _multiple(radius: Tensor, unit: Tensor) -> Tensor:
    """radius · unit in float64, rounded up; 0 stays 0."""
    product = radius.to(unit.device, torch.float64) * unit.double()
    return torch.where(unit == 0, product, product.nextafter(torch.full_like(product, torch.inf)))


@dataclass
class _Means:
    """What may sharpen the bounds of samples with one captured function."""

    differences: Differences | None = None
    forms: Forms | None = None
    divided: Divided | None = None
    divided_forms: Forms | None = None  # of the explanation without its factor

    def drop(self, forms: Forms) -> None:
        """They failed, and would again."""
        if self.forms is forms:
            self.forms = None
        else:
            self.divided_forms = None


class _Check:
    """One property of one function at one batch, at any radius; what does not depend on the radius is done once."""

    def __init__(
        self,
        fn: Callable[..., Tensor],
        x: Tensor,
        target: Tensor | None,
        property: Property,
        clip: Clip,
        parameters: ParameterBox | None,
        sound: bool,
        product: Product,
        sharpen: bool | None,
        branches: int,
        pieces: Pieces,
    ) -> None:
        check_batch(x, target)
        check_property(property)
        if isinstance(branches, bool) or not isinstance(branches, int) or branches < 1:
            raise ValueError(
                f"branches={branches!r} must be an integer ≥ 1: how many parts of a sample's box may be "
                "bounded. 1, the default, divides nothing; 64 decides most questions about small networks."
            )
        if branches > 1 and sharpen is False:
            raise ValueError(f"branches={branches} divides boxes for affine forms, which sharpen=False leaves out.")
        self.fn, self.x, self.target, self.clip, self.property = fn, usual(x), target, clip, property
        self.bounded: BoundFunction = bound(fn, sound=sound, parameters=parameters, product=product)
        _check_call(self.bounded.fn, (x,) if target is None else (x, target))
        self.rounding = "outward" if sound else "nearest"
        self.pieces = pieces
        self.sharpen = sharpen is not False
        self.parameters = parameters
        self.cheaply = not sharpen and branches == 1
        self.branches = branches
        self._captured: dict[int, Captured | None] = {}  # by the place of a sample
        self._made: dict[int, _Means] = {}  # by the identity of one of these

    @functools.cached_property
    def nominal(self) -> Tensor:
        return self._evaluate(self.x)

    def _evaluate(self, x: Tensor) -> Tensor:
        arguments = [x] if self.target is None else [x, self.target]
        pieces = zip(*(argument.split(self.size) for argument in arguments), strict=True)
        return torch.cat([evaluate(self.fn, *piece) for piece in pieces])

    @functools.cached_property
    def size(self) -> int:
        """Samples per piece."""
        box = Interval.of(self.x, self.x)  # its shape and layout are looked at
        return self.pieces.size(
            len(self.x),
            2 * self.x[:1].numel() * self.x.element_size(),
            lambda size: self.bounded.peak_bytes(*self._arguments(box, 0, size)),
            self.x.device,
        )

    @torch.no_grad()
    def at(
        self, eps: float | Tensor, tell: Progress, sought: Tensor | None = None, branches: int | None = None
    ) -> Certificate:
        """``sought``: samples [B] whose bounds may be sharpened; by default all. ``branches``: by default as given."""
        box = Interval.linf(self.x, eps, self.clip)
        pieces = []
        for i in range(0, max(len(self.x), 1), self.size):
            pieces.append(self._bounds(box, i))
            tell(min(1.0, (i + self.size) / max(len(self.x), 1)) / (2 if self.sharpen else 1))
        bounds = Interval.of(torch.cat([p.mid for p in pieces]), torch.cat([p.rad for p in pieces]))
        if bounds.shape != self.nominal.shape:
            raise ValueError(f"The function returned {list(self.nominal.shape)} but its bounds {list(bounds.shape)}.")
        margin = self.property.margin(self.nominal, bounds)
        usable = flat(bounds.isfinite() & self.nominal.isfinite()).all(1) & ~self._strays(bounds)
        refuted = torch.zeros_like(usable)
        if self.sharpen:
            open_ = usable if sought is None else usable & sought
            margin, bounds, refuted = self._sharpened(
                margin, box, bounds, open_, branches or self.branches, share_of(tell, 0.5, 0.5)
            )
        holds = kept(self.property, margin) & usable & self.bounded.constants_are_finite()
        margin = torch.where(margin.isnan() | ~usable, -torch.inf, margin)
        return Certificate(holds, margin, self.nominal, bounds, self.rounding, refuted)

    def _means(self, place: int) -> _Means:
        """What may sharpen the bounds of one sample; samples with one captured function share it."""
        if place not in self._captured and self.sharpen:
            self._captured[place] = self._alone(place)
        captured = self._captured.get(place)
        if captured is None:
            return _Means()
        if id(captured) not in self._made:
            self._made[id(captured)] = self._means_of(captured, place)
        return self._made[id(captured)]

    def _means_of(self, captured: Captured, place: int) -> _Means:
        differences = divided = None
        if isinstance(self.property, TopK) and self.parameters is None:  # else linear layers are sets
            differences = Differences.of(captured, self._one(place), self.rounding == "outward", self.bounded.product)
        if getattr(self.property, "of_direction", False):
            divided = Divided.of(captured, self._one(place), self.parameters)
        if divided is None and differences is not None and differences.are_all and self.branches == 1:
            return _Means(differences)

        def forms(graph: fx.GraphModule) -> Forms | None:
            memory = self.pieces.budget(self.x.device)
            return Forms.of(graph, self.bounded.rounding, self.bounded.product, self.cheaply, self.parameters, memory)

        return _Means(differences, forms(captured.graph), divided, None if divided is None else forms(divided.graph))

    def _alone(self, place: int) -> Captured | None:
        """The function of one sample; None if that is not explained at x as it is among the others, but for rounding.

        Where the function reads the target, there is a capture for each class.
        """
        nominal, one = self.nominal[place : place + 1], self._one(place)
        try:
            captured = captured_graph(self.bounded.fn, *one)
            value: Any = captured.graph.graph.output_node().all_input_nodes[0].meta["val"]
        except Exception as error:  # whatever the function says of a batch of one: the batches' own bounds stand
            self.sharpen = False
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            warnings.warn(
                "certify leaves out its sharper bounds, and branches, because the function fails for one sample alone "
                f"({reason}). Does it hold a tensor with a row for each sample, such as categories or noise? Pass that "
                "as further columns of target, [B, ...], or share one row between all samples. sharpen=False says that "
                "plain bounds are enough.",
                RuntimeWarning,
                stacklevel=8,
            )
            return None
        if value.shape != nominal.shape:
            return None
        with without_autocast():
            found = Interpreter(captured.graph, None).run_flat(tuple(one), [False] * len(one))
        return None if _outside(nominal, Interval.of(*found)).any() else captured

    def _is_refuted(self, box: Interval) -> Tensor:
        """Samples [B] whose property does not even hold at some corners of the box: nothing can prove it."""
        generator = torch.Generator(self.x.device).manual_seed(0)
        found = torch.zeros(len(self.x), dtype=torch.bool, device=self.x.device)
        lower, upper = map(usual, box.inner_ends())
        for _ in range(CORNERS):
            with torch.inference_mode(False):
                is_upper = torch.zeros_like(self.x).bernoulli_(0.5, generator=generator).bool()
                corner = torch.where(is_upper, upper, lower)
            value = self._evaluate(corner)
            found |= self.property.margin(self.nominal, Interval.of(value, torch.zeros_like(value))) < 0
        return found

    def _one(self, place: int) -> list[Tensor]:
        one = slice(place, place + 1)
        return [self.x[one]] if self.target is None else [self.x[one], self.target[one]]

    def _sharpened(
        self, margin: Tensor, box: Interval, bounds: Interval, usable: Tensor, branches: int, tell: Progress
    ) -> tuple[Tensor, Interval, Tensor]:
        """Margins and bounds; sharper ones of the samples whose bounds do not prove the property, one by one. And where
        it was seen to fail.
        """
        property = self.property
        open_ = usable & ~kept(property, margin) & margin.isfinite()
        margin, bounds = margin.clone(), Interval.of(bounds.mid.clone(), bounds.rad.clone())
        refuted = torch.zeros_like(open_)
        if any(self._means(place) != _Means() for place in open_.nonzero()[:, 0].tolist()):
            refuted = open_ & self._is_refuted(box)
        places = (open_ & ~refuted).nonzero()[:, 0].tolist()
        searches: list[tuple[int, bool, Tensor, _Means, Search]] = []
        for place in places:
            means, one = self._means(place), slice(place, place + 1)
            nominal, arguments = self.nominal[one], self._arguments(box, place, 1)
            if means.differences is not None:
                found = means.differences.margin(property, nominal, bounds[one], arguments)  # type: ignore[arg-type]
                margin[place] = margin[place].clamp(min=found)
            if kept(property, margin[one]):
                continue
            divided = means.divided and means.divided.at(self._one(place), nominal)
            forms = means.divided_forms if divided else means.forms
            if forms is None:
                continue
            more, at_point = divided or ([], nominal)
            known = Interval.of(at_point, torch.full_like(at_point, torch.inf)) if divided else bounds[one]
            count = len(arguments) - 1

            def tried(x: Tensor, *rest: Tensor, count: int = count) -> Tensor:
                return evaluate(self.bounded.fn, x, *rest[:count])

            if isinstance(property, TopK) and not torch.equal(property.top(at_point), property.top(nominal)):
                continue  # ties
            centre = at_point if isinstance(property, TopK) else nominal
            search = Search(forms, (*arguments, *more), property, centre, known, tried, branches)
            searches.append((place, bool(divided), at_point, means, search))
        run([search for *_, search in searches], tell)
        for place, is_divided, at_point, means, search in searches:
            one = slice(place, place + 1)
            if search.failed:
                means.drop(search.forms)
            decision = search.decision()
            if decision is None or _outside(at_point, decision.bounds).any():
                continue
            margin[one] = margin[one].maximum(decision.margin)
            refuted[place] = decision.counterexample is not None
            if not is_divided:
                bounds.mid[one], bounds.rad[one] = decision.bounds.mid, decision.bounds.rad
        tell(1.0)
        return margin.maximum(property.margin(self.nominal, bounds)), bounds, refuted  # a property may know its batch

    def _strays(self, bounds: Interval) -> Tensor:
        """Samples whose own explanation lies outside its bounds by more than rounding: bounds of something else.

        The cheapest test there is that the captured program is still the function that was given.
        """
        strays = _outside(self.nominal, bounds)
        if strays.any():
            warnings.warn(
                f"The explanations of {int(strays.sum())} of {len(strays)} samples lie outside their own bounds; none "
                "of these is certified. Does the function return something else each time, or does its value change by "
                "leaps within rounding error? Where it loses its digits, as 1 − p does at probabilities near 1, "
                "convert the model and x to float64.",
                RuntimeWarning,
                stacklevel=5,
            )
        return strays

    def _bounds(self, box: Interval, start: int) -> Interval:
        """One piece, filled up to the common size so that one compiled program serves all pieces."""
        arguments = self._arguments(box, start, self.size)
        out = self.bounded(*arguments)
        if not isinstance(out, Interval) or out.mid.dim() == 0 or len(out) != len(arguments[0]):
            given = list(out.shape) if isinstance(out, Interval) else type(out).__name__
            raise ValueError(
                "certify needs a function that returns one explanation per sample, a tensor "
                f"[{len(arguments[0])}, ...] for a batch of {len(arguments[0])}, but it returned {given}."
            )
        return out[: min(self.size, len(self.x) - start)]

    def _arguments(self, box: Interval, start: int, size: int) -> tuple[Interval | Tensor, ...]:
        index = torch.arange(start, start + size, device=self.x.device).clamp(max=max(len(self.x) - 1, 0))
        index = index[: len(self.x)]
        return (box[index],) if self.target is None else (box[index], self.target[index])


def _outside(nominal: Tensor, bounds: Interval) -> Tensor:
    """Samples [B] whose explanation lies outside its bounds by more than rounding."""
    gap = flat((nominal - bounds.mid).abs() - bounds.rad)
    scale = flat(bounds.mid.abs() + bounds.rad).amax(1, keepdim=True) if gap.shape[1] else gap
    return (gap > 1e3 * torch.finfo(gap.dtype).eps * scale).any(1)


def check_batch(x: Any, target: Any) -> None:
    """Raise TypeError or ValueError where these are no batch of samples and a class for each, or None."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(
            f"x must be a floating tensor [B, ...], got {kind}; torch.as_tensor or .float() converts it. In the place "
            "of tokens stand their embeddings (docs/transformers.md)."
        )
    if x.dim() == 0:
        raise ValueError("x must be a batch [B, ...], got a tensor without dimensions; use x[None].")
    if target is None:
        return
    if not isinstance(target, Tensor):
        mend = "for one class for all torch.full((len(x),), c)" if isinstance(target, int) else "torch.as_tensor"
        raise TypeError(f"target must be an integer tensor [B] or None, got {type(target).__name__}; {mend} makes one.")
    if target.dim() == 0:
        raise ValueError(
            f"target is a single class, of shape [], and x has shape {list(x.shape)}. A batch comes first: for one "
            "sample pass x.unsqueeze(0) and target.reshape(1)."
        )
    if target.shape[:1] != x.shape[:1]:
        raise ValueError(
            f"x has {len(x)} samples, but target has shape {list(target.shape)}; it must be [{len(x)}]."
            + (" For one sample pass x.unsqueeze(0)." if x.dim() == 1 else "")
        )


def _check_call(fn: Callable[..., Tensor], arguments: tuple[Tensor, ...]) -> None:
    """Raise TypeError where the function's signature does not take these arguments."""
    function = fn.forward if isinstance(fn, nn.Module) else fn
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # a builtin has none
    try:
        signature.bind(*arguments)
    except TypeError as error:
        name = getattr(fn, "__name__", type(fn).__name__)
        call = "fn(x, target)" if len(arguments) == 2 else "fn(x)"
        raise TypeError(
            f"certify calls {call}, but {name} cannot be called like this ({error}). Pass an explanation such as "
            "xb.explain.gradient(model), or a lambda with the missing arguments; without target, fn(x) is called."
        ) from None


def usual(x: Tensor) -> Tensor:
    """``x`` without its history, and usable by autograd even if it was made in inference mode."""
    with torch.inference_mode(False):
        return x.clone() if x.is_inference() else x.detach()


def evaluate(fn: Callable[..., Tensor], *args: Tensor) -> Tensor:
    """``fn`` at points, as it was captured: gradients possible inside it, no autocast; the result is detached."""
    with torch.inference_mode(False), torch.enable_grad(), without_autocast():
        return fn(*args).detach()
