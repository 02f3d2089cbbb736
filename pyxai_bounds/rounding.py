"""How bounds round: to nearest, or outward, so that they are proofs.

Directed rounding without touching the processor's mode. Three tools serve everything above this file:

* ``add_up`` and ``add_down`` find the exact IEEE directed sum by TwoSum (the error of a sum is itself a floating-point
  number, whose sign tells on which side the rounded sum lies);
* ``up`` and ``down`` step past a result that was rounded to nearest, by a relative amount and an underflow unit;
* ``widen`` prepares a radius so that a linear operator applied to it, in any order of summation, also covers what the
  same operator loses on the midpoint.

u is the unit roundoff of a dtype, γ_n = nu / (1 − nu) bounds the relative error of n roundings in a row (Higham,
Accuracy and Stability of Numerical Algorithms, section 3). ``docs/soundness.md`` has the proofs.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
import os
import threading
from collections.abc import Iterator
from enum import IntEnum
from fractions import Fraction
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from pyxai_bounds.errors import on_gpu


class Rounding(IntEnum):
    """What bounds contain: the real-number value but for rounding errors; the real-number value; or that one and every
    value that float32 arithmetic may compute in its place."""

    NEAREST = 0
    OUTWARD = 1
    EVALUATED = 2


Semantics = Literal["real", "float32"]
_mode: contextvars.ContextVar[Rounding] = contextvars.ContextVar("pyxai_bounds_rounding", default=Rounding.NEAREST)


def choose(sound: bool, semantics: str) -> Rounding:
    """The mode behind bound()'s arguments. Raises ValueError for names that do not exist or do not go together."""
    if semantics not in get_args(Semantics):
        raise ValueError(f"semantics={semantics!r} is unknown; choose one of {', '.join(get_args(Semantics))}.")
    if semantics == "float32" and not sound:
        raise ValueError("semantics='float32' is a statement about rounding; it needs sound=True.")
    if not sound:
        return Rounding.NEAREST
    return Rounding.EVALUATED if semantics == "float32" else Rounding.OUTWARD


def check_dtype(dtype: torch.dtype) -> None:
    """Raises TypeError for a dtype in whose arithmetic nothing is proven."""
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"sound=True needs float32 or float64 tensors, not {dtype}; convert the model and the inputs.")


def mode() -> Rounding:
    """The mode in which rules are being applied."""
    return _mode.get()


@contextlib.contextmanager
def use(rounding: Rounding) -> Iterator[None]:
    """Apply rules in this mode inside the ``with`` block."""
    token = _mode.set(rounding)
    try:
        yield
    finally:
        _mode.reset(token)


# --- units ---------------------------------------------------------------------------------------------------


def unit(dtype: torch.dtype) -> float:
    """The unit roundoff u: a result rounded to nearest is off by at most u times itself."""
    return torch.finfo(dtype).eps / 2


def tiny(dtype: torch.dtype) -> float:
    """The underflow unit: no less than what any one product or quotient loses by underflow."""
    return torch.finfo(dtype).tiny


def gamma(n: int, dtype: torch.dtype) -> float:
    """γ_n, rounded up: the relative error of n roundings in a row. Raises ValueError where n is too large for any
    bound.
    """
    nu = n * unit(dtype)
    if nu >= 0.25:
        raise ValueError(
            f"A sum of {n} terms in {dtype} has no useful error bound; convert the model and the inputs to float64."
        )
    return nu / (1 - nu) * (1 + 1e-12)


class Errors(NamedTuple):
    """What a sum of products loses, relative to Σ|w||mid| and to Σ|w|rad, how much its radius' own sum may lose, and
    the least factors of a product that does not underflow.
    """

    on_mid: float
    on_rad: float
    slack: float
    floor: float

    @property
    def of_mid(self) -> float:
        """The factor of |mid| in a widened radius."""
        return self.on_mid * self.slack

    @property
    def of_rad(self) -> float:
        """The factor of rad in a widened radius."""
        return (1 + self.on_rad) * self.slack


def errors(
    terms: int,
    dtype: torch.dtype,
    rounding: Rounding | int | None = None,
    *,
    summed: int | None = None,
    computed: torch.dtype | None = None,
) -> Errors:
    """The errors of a sum of ``terms`` products in ``dtype``, whatever its order.

    summed: how many roundings in a row the midpoint's sum really has, where that is known to be less; computed: the
    wider dtype that it is computed in before it is rounded to ``dtype``. If float32 evaluations at any x in the box
    must be covered too, these lose another γ of Σ|w|(|mid| + rad). The radius' own sum, of which no term is negative,
    is divided by what it may lose. Four roundings are added to each count, for bias, scale factors and conversions.
    """
    own = gamma((terms if summed is None else summed) + 4, computed or dtype)
    if computed not in (None, dtype):
        own += 2 * unit(dtype)
    slack = 1 / (1 - gamma(terms + 4, dtype)) * (1 + 1e-12)
    if (mode() if rounding is None else rounding) != Rounding.EVALUATED:
        return Errors(own, 0.0, slack, floor(dtype))
    evaluated = gamma(terms + 4, torch.float32)
    return Errors(own + evaluated, evaluated, slack, floor(torch.float32))


# --- stepping outward ----------------------------------------------------------------------------------------


def up(x: Tensor, underflows: bool = False) -> Tensor:
    """No less than the real number whose rounding to nearest ``x`` is; 0 stays 0 unless the operation can underflow.

    Sums and differences never underflow: where they are that small they are exact.
    """
    return x + _step(x, underflows)


def down(x: Tensor, underflows: bool = False) -> Tensor:
    """No more than the real number whose rounding to nearest ``x`` is; the mirror image of :func:`up`."""
    return x - _step(x, underflows)


def _step(x: Tensor, underflows: bool) -> Tensor:
    # 4u|x| is at least two units in the last place of x, so that the sum, rounded to nearest, moves by at least one.
    step = x.detach().abs() * (4 * unit(x.dtype))
    return step + tiny(x.dtype) if underflows else step


def widen(mid: Tensor, rad: Tensor | None, lost: Errors) -> Tensor:
    """The radius r′ to feed to a linear operator with non-negative terms; ``rad=None`` stands for radius 0.

    |W| applied to r′, in any order of summation in the same dtype, is at least |W|·rad and what W·mid loses to
    rounding. Where both midpoint and radius are 0, nothing is added. Elsewhere the ``floor`` keeps every product of
    r′ with a
    ``magnitude`` above the underflow threshold, so that it also covers a product that underflows at the midpoint.
    """
    size = mid.detach().abs()
    spread = size * lost.of_mid
    some = size != 0
    if rad is not None:
        spread = rad * lost.of_rad + spread
        some = some | (rad != 0)
    return spread * (1 + 16 * unit(mid.dtype)) + some.to(mid.dtype) * (2 * lost.floor)


def bias_error(bias: Tensor | None, lost: Errors) -> Tensor | None:
    """What adding the bias may lose: the bias of the radius."""
    if bias is None:
        return None
    size = bias.detach().abs()
    return size * (lost.of_mid * (1 + 16 * unit(bias.dtype))) + (size != 0).to(bias.dtype) * lost.floor**2


def magnitude(weight: Tensor, lost: Errors | None = None) -> Tensor:
    """|weight|, the partner of a radius made by :func:`widen`: where it is not 0 it is at least ``floor``."""
    size = weight.abs()
    return torch.where(size == 0, size, size.clamp(min=floor(weight.dtype) if lost is None else lost.floor))


def narrow_up(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` ≥ 0 in a narrower dtype, rounded up; 0 stays 0."""
    narrow = x.to(dtype)
    return up(narrow) + (x != 0).to(dtype) * tiny(dtype)


def floor(dtype: torch.dtype) -> float:
    """The square root of the underflow unit: the product of two numbers that are no smaller does not underflow."""
    return math.sqrt(tiny(dtype))


# --- exact directed sums -------------------------------------------------------------------------------------


def _two_sum_error(a: Tensor, b: Tensor, total: Tensor) -> Tensor:
    """The exact value of ``a + b - total``, where ``total`` is the sum rounded to nearest."""
    b_part = total - a
    a_part = total - b_part
    return (a - a_part) + (b - b_part)


def _add(a: Tensor, b: Tensor, direction: float) -> Tensor:
    total = a + b
    with torch.no_grad():
        error = _two_sum_error(a, b, total)
        # A NaN error means that an operand or the sum is infinite; there is nothing to correct.
        missed = error > 0 if direction > 0 else error < 0
        # A GPU is not asked: waiting for its answer takes longer than what it would save.
        if not on_gpu(total) and not missed.any():
            return total
        neighbour = torch.nextafter(total, torch.full_like(total, direction))
        step = torch.where(missed, neighbour - total, torch.zeros_like(total))
    # neighbour - total is exact, and so is adding it back: this keeps the sum differentiable.
    return total + step


def add_up(a: Tensor, b: Tensor) -> Tensor:
    """``a + b`` rounded towards +∞; differentiable as ``a + b``."""
    return _add(a, b, math.inf)


def add_down(a: Tensor, b: Tensor) -> Tensor:
    """``a + b`` rounded towards −∞; differentiable as ``a + b``."""
    return _add(a, b, -math.inf)


@functools.lru_cache(maxsize=64)
def scalar_up(value: float, dtype: torch.dtype) -> float:
    """The smallest number of ``dtype`` that is at least ``value``."""
    rounded = torch.tensor(value, dtype=dtype, device="cpu")
    if rounded.item() < value:
        rounded = torch.nextafter(rounded, torch.full_like(rounded, math.inf))
    return float(rounded.item())


def stored(value: float | Fraction, dtype: torch.dtype) -> tuple[float, float]:
    """A number as ``dtype`` holds it, and no less than what that moves it by (∞ where it overflows); exactly computed.

    Where float32 evaluations must be covered too, they may hold the number as float32 does.
    """
    held = torch.tensor(float(value), dtype=dtype, device="cpu").item()
    if math.isnan(value) or math.isinf(value):
        return held, 0.0
    values = [held]
    if mode() == Rounding.EVALUATED:
        values.append(torch.tensor(float(value), dtype=torch.float32, device="cpu").item())
    if not all(map(math.isfinite, values)):
        return held, math.inf
    exact = Fraction(value)
    moved = max(abs(exact - Fraction(held)), *(abs(Fraction(v) - Fraction(held)) for v in values))
    if moved == 0:
        return held, 0.0
    return held, scalar_up(max(float(moved) * (1 + 1e-12), 5e-324), dtype)


# --- the arithmetic that proofs rely on ------------------------------------------------------------------------


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """What a captured program and its derivative assume: no autocast, whose precision the bounds would not cover."""
    if not torch._C._is_any_autocast_enabled():
        yield
        return
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


@contextlib.contextmanager
def ieee_arithmetic() -> Iterator[None]:
    """No reduced precision inside the ``with`` block: neither tf32 nor bfloat16 behind float32 products, nor Winograd.

    Raises RuntimeError if PyTorch was told to flush subnormal numbers to 0, or oneDNN to multiply in less than float32:
    the error bounds cover neither.
    """
    smallest = torch.tensor(5e-324, dtype=torch.float64, device="cpu")
    if (smallest + 0.0).item() == 0.0:
        raise RuntimeError(
            "sound=True needs subnormal numbers, which this thread flushes to 0: call torch.set_flush_denormal(False)."
        )
    for name in ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"):  # oneDNN reads either
        if os.environ.get(name, "STRICT").upper() != "STRICT":
            raise RuntimeError(f"sound=True needs full float32 products, but {name} allows narrower ones: unset it.")
    _exact.enter()
    try:
        yield
    finally:
        _exact.leave()


class _Exact:
    """The settings belong to the process: the first thread that needs exact ones keeps the user's, the last one puts
    them back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._before: list[Any] = []
        self._nnpack = True

    def enter(self) -> None:
        with self._lock:
            if self._users == 0:
                self._before = [getattr(owner, name) for owner, name, _ in _PRECISION]
                self._nnpack = torch._C._get_nnpack_enabled()
            self._users += 1
            torch._C._set_nnpack_enabled(False)  # it convolves by Winograd's method wherever oneDNN is switched off
            for owner, name, exact in _PRECISION:
                setattr(owner, name, exact)

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                torch._C._set_nnpack_enabled(self._nnpack)
                for (owner, name, _), value in zip(_PRECISION, self._before, strict=True):
                    setattr(owner, name, value)


_exact = _Exact()

# (owner, setting, its exact value). The oneDNN settings exist in newer versions of PyTorch only.
_PRECISION: list[tuple[Any, str, Any]] = [
    (owner, "fp32_precision", "ieee")
    for owner in (
        torch.backends.cuda.matmul,
        getattr(torch.backends.cudnn, "conv", None),
        getattr(torch.backends.mkldnn, "matmul", None),
        getattr(torch.backends.mkldnn, "conv", None),
    )
    if owner is not None and hasattr(owner, "fp32_precision")
]
