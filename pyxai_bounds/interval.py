"""Interval: a set of tensors, stored as a midpoint and a radius. Everything the engine passes is one."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyxai_bounds import rounding
from pyxai_bounds.errors import any_wrong, capturing

Clip = tuple[float, float] | tuple[Tensor, Tensor] | None


class Interval:
    """The set of all tensors t with ``lower <= t <= upper``, elementwise.

    It is stored as (mid, rad) with rad ≥ 0, which keeps tiny radii exact and makes every affine
    operator two matrix products. The conversions from and to end points round outward: the stored
    set always contains the requested one, and is equal to it where rad = 0.

    Shapes: lower, upper [...] (equal); dtype: any floating dtype.
    Raises TypeError for anything but floating tensors; ValueError if the shapes, dtypes or devices
    disagree, if lower > upper anywhere, or if an end point is NaN or infinite.
    """

    __slots__ = ("facts", "mid", "rad", "state")

    mid: Tensor
    rad: Tensor
    state: Any  # packed ReLU state left behind by the rule that made this value, or None
    facts: Any  # what rules know of the set besides (``rules.facts``), or None

    def __init__(self, lower: Tensor, upper: Tensor) -> None:
        _check_floating("lower", lower)
        _check_floating("upper", upper)
        for what in ("shape", "dtype", "device"):
            given = getattr(lower, what), getattr(upper, what)
            if given[0] != given[1]:
                raise ValueError(f"Interval: lower and upper have different {what}s, {given[0]} and {given[1]}.")
        _check_finite("lower", lower)
        _check_finite("upper", upper)
        wrong = lower > upper
        if any_wrong(wrong, "Interval: lower > upper."):
            index = tuple(wrong.nonzero()[0].tolist())
            raise ValueError(
                f"Interval: lower > upper at {int(wrong.sum())} of {wrong.numel()} elements, first at index "
                f"{index}: {lower[index].item()} > {upper[index].item()}. Swap the arguments, or sort them "
                "with torch.minimum and torch.maximum."
            )
        self.mid, self.rad = _mid_rad(lower, upper)
        self.state = self.facts = None

    @classmethod
    def of(cls, mid: Tensor, rad: Tensor, state: Any = None) -> Interval:
        """Wrap a midpoint and a radius as they are, without any check: for rules and tests."""
        self = cls.__new__(cls)
        self.mid, self.rad, self.state, self.facts = mid, rad, state, None
        return self

    @classmethod
    def point(cls, x: Tensor) -> Interval:
        """The set that holds ``x`` alone, whose numbers must be finite: a NaN lies in no set."""
        _check_floating("x", x)
        _check_finite("x", x)
        return cls.of(x, torch.zeros_like(x))

    @classmethod
    def linf(cls, x: Tensor, eps: float | Tensor, clip: Clip = None) -> Interval:
        """All tensors within ``eps`` of ``x`` in every component, and inside ``clip`` if given.

        Shapes: x [B, ...]; eps a float, or a tensor that broadcasts to x (one radius per sample:
        shape [B, 1, ...]; one per feature: [D] or [1, D]); clip (low, high) in the units of x, two numbers, or two
        tensors that broadcast to a sample, x.shape[1:]. An eps and limits that the dtype cannot represent are rounded
        outward, so the box never shrinks.
        Raises ValueError if eps is negative, NaN or infinite, if x leaves ``clip``, or if eps [N] could be one radius
        per sample as well as one per entry of the last dimension, because both are N.
        """
        _check_floating("x", x)
        _check_finite("x", x)
        rad = _radius(x, eps)
        if clip is None:
            return cls.of(x, rad)
        low, high = _ends(clip, x)
        outside = (x < low) | (x > high)
        if any_wrong(outside, "Interval.linf: x lies outside clip."):
            index = tuple(outside.nonzero()[0].tolist())
            limits = "its limits in clip" if isinstance(low, Tensor) else f"clip={clip}"
            raise ValueError(
                f"Interval.linf: x lies outside {limits} at {int(outside.sum())} elements, first at "
                f"index {index}: {x[index].item()}. Scale the data into the range, or pass the range it has."
            )
        lower, upper = rounding.add_down(x, -rad), rounding.add_up(x, rad)
        mid, clipped_rad = _mid_rad(lower.clamp(min=low), upper.clamp(max=high))
        clipped = (lower < low) | (upper > high)
        return cls.of(torch.where(clipped, mid, x), torch.where(clipped, clipped_rad, rad))

    @property
    def lower(self) -> Tensor:
        """The lower end points, rounded down; exact where rad = 0."""
        return rounding.add_down(self.mid, -self.rad)

    @property
    def upper(self) -> Tensor:
        """The upper end points, rounded up; exact where rad = 0."""
        return rounding.add_up(self.mid, self.rad)

    def inner_ends(self) -> tuple[Tensor, Tensor]:
        """The least and the greatest numbers of the dtype that lie in the set: its ends, rounded towards the middle."""
        return rounding.add_up(self.mid, -self.rad), rounding.add_down(self.mid, self.rad)

    @property
    def width(self) -> Tensor:
        """``upper - lower`` = 2·rad."""
        return 2 * self.rad

    @property
    def shape(self) -> torch.Size:
        return self.mid.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.mid.dtype

    @property
    def device(self) -> torch.device:
        return self.mid.device

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        raise TypeError(
            f"torch's {name} takes tensors, but was given an Interval. Put what you compute into a function and bound "
            "it: xb.bound(fn)(box)."
        )

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("An Interval is no array: take its .lower, .upper, .mid or .width, with .detach().numpy().")

    def __len__(self) -> int:
        return len(self.mid)

    def __getitem__(self, index: Any) -> Interval:
        return Interval.of(self.mid[index], self.rad[index])

    def contains(self, t: Tensor) -> Tensor:
        """Elementwise: does ``t`` lie in the set? Bool, of the broadcast shape. NaN lies nowhere.

        Raises TypeError if ``t`` is no tensor, ValueError if its shape does not broadcast with the set's.
        """
        if not isinstance(t, Tensor):
            raise TypeError(
                f"Interval.contains takes a tensor, got {type(t).__name__}; convert with torch.tensor(...)."
            )
        try:
            torch.broadcast_shapes(t.shape, self.shape)
        except RuntimeError:
            raise ValueError(
                f"Interval.contains: a tensor of shape {list(t.shape)} cannot be compared with a set of shape "
                f"{list(self.shape)}; give it that shape, or one that broadcasts to it."
            ) from None
        if t.device != self.device and t.dim() > 0:
            raise ValueError(f"Interval.contains: the tensor is on {t.device} but the set on {self.device}; move one.")
        return (self.lower <= t) & (t <= self.upper)

    def isfinite(self) -> Tensor:
        """Elementwise: are both end points finite numbers? Bool, of this shape."""
        return self.mid.isfinite() & self.rad.isfinite()

    def detach(self) -> Interval:
        return Interval.of(self.mid.detach(), self.rad.detach())

    def to(self, *args: Any, **kwargs: Any) -> Interval:
        """Move or convert as ``Tensor.to``; a conversion that rounds widens the set accordingly."""
        mid = self.mid.to(*args, **kwargs)
        if not mid.is_floating_point():
            raise TypeError(f"Interval.to: {mid.dtype} is not a floating dtype.")
        rad = self.rad.to(*args, **kwargs)
        old, new = torch.finfo(self.dtype), torch.finfo(mid.dtype)
        if new.eps <= old.eps and new.tiny <= old.tiny and new.max >= old.max:
            return Interval.of(mid, rad)  # every number of the old type is one of the new
        # Both numbers were rounded; each is off by at most one step towards its neighbour.
        inf = torch.full_like(mid, torch.inf)
        exact_mid, exact_rad = (part.to(mid.device, torch.float64) for part in (self.mid, self.rad))
        step = torch.nextafter(mid.abs(), inf) - mid.abs()
        moved = torch.where(mid.to(torch.float64) == exact_mid, 0, step)
        rad = torch.where(rad.to(torch.float64) < exact_rad, torch.nextafter(rad, inf), rad)
        return Interval.of(mid, rounding.add_up(rad, moved))

    def __repr__(self) -> str:
        width = f"widest {float(self.width.detach().max()):.3g}" if self.mid.numel() else "empty"
        return f"Interval(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}, {width})"


def _mid_rad(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Midpoint and radius whose set contains [lower, upper]; exact where the ends are equal."""
    # Halving first cannot overflow; where the halves underflow the radius still covers both ends.
    mid = torch.where(lower == upper, lower, lower / 2 + upper / 2)
    rad = torch.maximum(rounding.add_up(upper, -mid), rounding.add_up(mid, -lower))
    return mid, rad


def _ends(clip: tuple[Any, Any], x: Tensor) -> tuple[float, float] | tuple[Tensor, Tensor]:
    if isinstance(clip, tuple) and len(clip) == 2 and all(isinstance(end, Tensor) and end.dim() for end in clip):
        return _ends_of_features(clip[0], clip[1], x)
    try:
        low, high = (float(end) for end in clip)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"Interval.linf: clip must be two numbers (low, high), the same for every element, or two tensors that "
            f"broadcast to a sample, got {clip!r}. A side without a limit is -math.inf or math.inf; for other sets use "
            "xb.Interval(lower, upper)."
        ) from None
    if not low < high:
        raise ValueError(f"Interval.linf: clip=({low}, {high}) is empty; give (low, high) with low < high.")
    return -rounding.scalar_up(-low, x.dtype), rounding.scalar_up(high, x.dtype)


def _ends_of_features(low: Tensor, high: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Limits of each feature's own; low = high holds a feature fixed."""
    if low.device != x.device or high.device != x.device:
        raise ValueError(f"Interval.linf: clip is on {low.device}, {high.device} but x on {x.device}; move it there.")
    try:
        torch.broadcast_to(low, x.shape[1:]), torch.broadcast_to(high, x.shape[1:])
    except RuntimeError:
        raise ValueError(
            f"Interval.linf: limits of shapes {tuple(low.shape)} and {tuple(high.shape)} in clip do not broadcast to a "
            f"sample of x, {tuple(x.shape[1:])}."
        ) from None
    low, high = -_at_least(-low, x.dtype), _at_least(high, x.dtype)
    if any_wrong(~(low <= high), "Interval.linf: clip=(low, high) is empty for some features."):
        raise ValueError("Interval.linf: clip=(low, high) is empty for some features; give low ≤ high.")
    return low, high


def _at_least(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype, rounded up."""
    if exact.dtype == dtype:
        return exact
    held = exact.to(dtype)
    return torch.where(held.double() < exact.double(), held.nextafter(torch.full_like(held, torch.inf)), held)


def _radius(x: Tensor, eps: float | Tensor) -> Tensor:
    if isinstance(eps, Tensor):
        if eps.device != x.device and eps.dim() > 0:
            raise ValueError(f"Interval.linf: eps is on {eps.device} but x on {x.device}; move one of them.")
        bad = ~(eps.isfinite() & (eps >= 0))
        if any_wrong(bad, "Interval.linf: eps must be finite and ≥ 0."):
            raise ValueError(
                f"Interval.linf: eps must be finite and ≥ 0; {int(bad.sum())} of {eps.numel()} entries are not."
            )
        rad = _at_least(eps.to(device=x.device), x.dtype)
        if rad.dim() == 1 < x.dim() and 1 < len(rad) == x.shape[0] == x.shape[-1]:
            raise ValueError(
                f"Interval.linf: eps of shape {list(rad.shape)} may be one radius per sample or one per entry of the "
                f"last dimension of x, of shape {list(x.shape)}. Write eps.reshape({[-1] + [1] * (x.dim() - 1)}) for "
                "one per sample, eps[None] for one per entry."
            )
        try:
            return rad.expand_as(x)
        except RuntimeError:
            raise ValueError(
                f"Interval.linf: eps of shape {tuple(eps.shape)} does not broadcast to x of shape "
                f"{tuple(x.shape)}; for one radius per sample give it shape [B, 1, ...]."
            ) from None
    if not isinstance(eps, (int, float)) or isinstance(eps, bool):
        raise TypeError(
            f"Interval.linf: eps must be a number or a tensor, got {type(eps).__name__}; torch.as_tensor converts it."
        )
    value = float(eps)
    if not 0 <= value < float("inf"):
        raise ValueError(f"Interval.linf: eps must be finite and ≥ 0, got {value}.")
    return torch.full_like(x, rounding.scalar_up(value, x.dtype))


def _check_floating(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"Interval: {name} must be a tensor, got {type(value).__name__}; torch.as_tensor(…, dtype=torch.float32) "
            "converts it."
        )
    if not value.is_floating_point():
        raise TypeError(
            f"Interval: {name} must have a floating dtype, got {value.dtype}; convert with .float(). In the place of "
            "tokens stand their embeddings (docs/transformers.md)."
        )


def _check_finite(name: str, value: Tensor) -> None:
    if value.is_meta:
        raise ValueError(f"Interval: {name} is on the meta device, which holds no values: give it those of the data.")
    # One pass over memory instead of several; a sum may overflow, but it never hides a NaN or infinity.
    if not capturing(value) and math.isfinite(value.sum().item()):
        return
    bad = ~value.isfinite()
    if any_wrong(bad, f"Interval: {name} is NaN or infinite."):
        index = tuple(bad.nonzero()[0].tolist())
        raise ValueError(
            f"Interval: {name} is NaN or infinite at {int(bad.sum())} of {value.numel()} elements, first at index "
            f"{index}: {value[index].item()}. Clean the data first."
        )
