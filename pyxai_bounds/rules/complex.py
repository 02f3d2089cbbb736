"""Sets of complex numbers, as real and imaginary parts: discrete Fourier transforms, and what is done between them.

A transform is a linear map of both parts, bounded by its matrix of cosines and sines: over one dimension exactly. It
takes n² products for n numbers, where a fast transform would lose the proof, and bounds on bounds of its stages the
width. What moves numbers or adds them does so with either part; the interpreter calls ``bounded`` for all of these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._ops import OpOverload

from pyxai_bounds import rounding as rd
from pyxai_bounds.interval import Interval
from pyxai_bounds.rules.elementwise import div
from pyxai_bounds.rules.linear import bmm, mm
from pyxai_bounds.rules.reduce import normalised, vector_norm
from pyxai_bounds.rules.registry import (
    LINEAR,
    RULES,
    UnsupportedArgumentsError,
    Value,
    as_set,
    bilinear,
    in_float64,
    minus,
    multiply,
    narrow,
    outward,
    plus,
    singleton,
)

aten = torch.ops.aten


class Complex(Interval):
    """A set of complex numbers: what their real and their imaginary parts lie in. It has no single midpoint."""

    __slots__ = ("imag", "real")

    def __init__(self, real: Interval, imag: Interval) -> None:
        self.real, self.imag = real, imag
        self.facts = self.state = None

    @property
    def mid(self) -> Tensor:  # type: ignore[override]
        raise UnsupportedArgumentsError(REFUSAL)

    rad = mid


REFUSAL = "computes with a set of complex numbers; take real and imaginary parts (torch.view_as_real), or their abs()"


def is_complex(x: Any) -> bool:
    return isinstance(x, Complex) or (isinstance(x, Tensor) and x.is_complex())


def bounded(op: OpOverload, args: tuple, kwargs: dict, dtype: torch.dtype) -> Any:
    """The operator's result on sets; in ``dtype`` if it is real. Points are sets of one point."""
    if rd.mode() == rd.Rounding.EVALUATED:
        raise UnsupportedArgumentsError("computes with complex numbers, for which float32 evaluations are not bounded")
    if outward():
        args = pytree.tree_map(_wide, args)
    if not any(isinstance(leaf, Interval) for leaf in pytree.tree_leaves(args)):
        args = pytree.tree_map(_as_set, args)
    if op in _RULES:
        result = _RULES[op](*args, **kwargs)
    elif op in LINEAR or op in _OF_PARTS:
        result = _by_parts(op, args, kwargs)
    else:
        raise UnsupportedArgumentsError(REFUSAL)
    return narrow(result, dtype) if isinstance(result, Interval) and not isinstance(result, Complex) else result


_RULES: dict[OpOverload, Callable[..., Any]] = {}
_OF_PARTS = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.neg.default, aten.add.Tensor,
    aten.sub.Tensor, aten.where.self,
}  # fmt: skip


def _rule(*operators: OpOverload) -> Callable[[Callable], Callable]:
    def register(function: Callable) -> Callable:
        _RULES.update(dict.fromkeys(operators, function))
        return function

    return register


def _wide(x: Any) -> Any:
    if isinstance(x, Complex):
        return x  # its parts are wide already
    return x.to(torch.complex128) if is_complex(x) else in_float64(x)


def _as_set(x: Any) -> Any:
    if not isinstance(x, Tensor) or not (x.is_complex() or x.is_floating_point()):
        return x
    return Complex(singleton(x.real), singleton(x.imag)) if x.is_complex() else singleton(x)


def _parts(x: Any) -> tuple[Any, Any]:
    """Real and imaginary part; the latter is None for what is real."""
    return (x.real, x.imag) if is_complex(x) or isinstance(x, complex) else (x, None)


def _by_parts(op: OpOverload, args: tuple, kwargs: dict) -> Any:
    """Of an operator that is linear, with real coefficients, in all its floating arguments together."""
    real, imag = (
        RULES[op].function(*pytree.tree_map(part, args), **kwargs) for part in (lambda x: _parts(x)[0], _imaginary)
    )
    if isinstance(real, Interval):
        return Complex(real, imag)
    return [Complex(*both) for both in zip(real, imag, strict=True)]


def _imaginary(x: Any) -> Any:
    return x.imag if is_complex(x) or isinstance(x, complex) else _zero(x)


def _zero(x: Any) -> Any:
    """Of a real operand the imaginary part; integers and truth values are places and choices, numbers sizes."""
    if isinstance(x, Interval):
        return singleton(torch.zeros_like(x.mid))
    return torch.zeros_like(x) if isinstance(x, Tensor) and x.is_floating_point() else x


def _product(function: Callable[[Any, Any], Interval]) -> Callable[[Any, Any], Complex]:
    def product(a: Any, b: Any) -> Complex:
        (a, ai), (b, bi) = _parts(a), _parts(b)
        real = function(a, b)
        if ai is not None and bi is not None:
            real = minus(real, function(ai, bi))
        crossed = [function(x, y) for x, y in ((a, bi), (ai, b)) if x is not None and y is not None]
        return Complex(real, crossed[0] if len(crossed) == 1 else plus(*crossed))

    return product


for _op, _function in (
    (aten.mul.Tensor, multiply),
    (aten.mul.Scalar, multiply),
    (aten.bmm.default, bmm),
    (aten.mm.default, mm),
):
    _RULES[_op] = _product(_function)


@_rule(aten.div.Tensor, aten.div.Scalar)
def _quotient(a: Any, b: Any) -> Complex:
    if is_complex(b) or isinstance(b, complex):
        raise UnsupportedArgumentsError("divides by complex numbers; multiply by conj() / abs()² instead")
    return Complex(*(div(as_set(part), b) for part in _parts(a)))


@_rule(aten._conj.default, aten._conj_physical.default)
def _conj(x: Complex) -> Complex:
    return Complex(x.real, Interval.of(-x.imag.mid, x.imag.rad))


@_rule(aten._to_copy.default)
def _to_copy(x: Any, *, dtype: torch.dtype | None = None, **kwargs: Any) -> Complex:
    real, imag = _parts(x)
    if dtype is None or not dtype.is_complex:
        raise UnsupportedArgumentsError(REFUSAL)
    held = torch.float64 if outward() else dtype.to_real()
    return Complex(*(narrow(part, held) for part in (real, _zero(real) if imag is None else imag)))


@_rule(aten.view_as_real.default)
def _view_as_real(x: Complex) -> Interval:
    return Interval.of(*(torch.stack(part, -1) for part in ((x.real.mid, x.imag.mid), (x.real.rad, x.imag.rad))))


@_rule(aten.view_as_complex.default)
def _view_as_complex(x: Interval) -> Complex:
    return Complex(*(Interval.of(x.mid.select(-1, i), x.rad.select(-1, i)) for i in (0, 1)))


@_rule(aten.complex.default)
def _complex(real: Value, imag: Value) -> Complex:
    return Complex(as_set(real), as_set(imag))


@_rule(aten.abs.default)
def _abs(x: Complex) -> Interval:
    return vector_norm(_view_as_real(x), 2, [-1])


@_rule(aten.sgn.default)
def _sgn(x: Complex) -> Complex:
    """z/|z|, which is 0 at 0; where |z| is tiny, anything up to 1."""
    pair = _view_as_real(x)
    out = normalised(pair, [-1], lambda norm: norm.clamp(min=_TINY))
    nearest = ((pair.mid.abs() - pair.rad).clamp(min=0)).amax(-1, keepdim=True)
    zero = ((pair.mid == 0) & (pair.rad == 0)).all(-1, keepdim=True)
    any_ = (nearest <= 2 * _TINY) & ~zero
    return _view_as_complex(Interval.of(torch.where(any_, 0.0, out.mid), torch.where(any_, 1.0, out.rad)))


_TINY = 1e-18  # whose square is no subnormal number of float32


# --- discrete Fourier transforms: X_k = Σ_t x_t·exp(∓2πi·kt/n) ----------------------------------------------------


def _waves(n: int, into: int, like: Tensor, scale: float, once: bool = True) -> tuple[Value, Value]:
    """scale·cos and scale·sin of 2πkt/n, [n, into]; else [k, n] with all but the first and the middle k twice.

    The angle is off by 3 u of at most 2π, in float64. Where cosine or sine are 0, they are made so.
    """
    t, k = torch.arange(n, device=like.device), torch.arange(into, device=like.device)
    turns = (t.unsqueeze(1) * k if once else k.unsqueeze(1) * t) % n
    angle = turns.double() * (2 * math.pi / n)
    half, quarter = 2 * turns % n == 0, 4 * turns % n == 0
    waves = [torch.where(quarter & ~half, 0.0, angle.cos()), torch.where(half, 0.0, angle.sin())]
    if not once:
        waves = [w * torch.where(2 * k % n == 0, 1.0, 2.0).unsqueeze(1) for w in waves]
    waves = [(w * scale).to(like.dtype) for w in waves]
    if not outward():
        return waves[0], waves[1]
    off = 64 * scale * rd.unit(torch.float64)
    return tuple(Interval.of(w, torch.where(w == 0, 0.0, off)) for w in waves)  # type: ignore[return-value]


def _through(x: Interval, dim: int, waves: Value) -> Interval:
    def product(a: Tensor, b: Tensor) -> Tensor:
        return (a.movedim(dim, -1) @ b).movedim(-1, dim)

    return bilinear(product, x, waves, x.shape[dim])


def _scale(sizes: Sequence[int], normalisation: int) -> float:
    count = math.prod(sizes)
    return (1.0, 1 / math.sqrt(count), 1 / count)[normalisation]


@_rule(aten._fft_c2c.default)
def _c2c(x: Complex, dim: list[int], normalisation: int, forward: bool) -> Complex:
    scale = _scale([x.real.shape[d] for d in dim], normalisation)
    for d in dim:
        n = x.real.shape[d]
        cosines, sines = _waves(n, n, x.real.mid, scale)
        scale = 1.0
        turned = [(_through(part, d, cosines), _through(part, d, sines)) for part in (x.real, x.imag)]
        (rc, rs), (ic, is_) = turned
        x = Complex(plus(rc, is_), minus(ic, rs)) if forward else Complex(minus(rc, is_), plus(ic, rs))
    return x


@_rule(aten._fft_r2c.default)
def _r2c(x: Interval, dim: list[int], normalisation: int, onesided: bool) -> Complex:
    scale = _scale([x.shape[d] for d in dim], normalisation)
    n = x.shape[dim[-1]]
    cosines, sines = _waves(n, n // 2 + 1 if onesided else n, x.mid, scale)
    imag = _through(x, dim[-1], sines)
    out = Complex(_through(x, dim[-1], cosines), Interval.of(-imag.mid, imag.rad))
    return _c2c(out, dim[:-1], 0, True)


@_rule(aten._fft_c2r.default)
def _c2r(x: Complex, dim: list[int], normalisation: int, last_dim_size: int) -> Interval:
    """Of half the frequencies; the others are their conjugates."""
    scale = _scale([*(x.real.shape[d] for d in dim[:-1]), last_dim_size], normalisation)
    x, last, into = _c2c(x, dim[:-1], 0, False), dim[-1], last_dim_size // 2 + 1
    cosines, sines = _waves(last_dim_size, into, x.real.mid, scale, once=False)
    real, imag = (
        Interval.of(part.mid.narrow(last, 0, into), part.rad.narrow(last, 0, into)) for part in (x.real, x.imag)
    )
    return minus(_through(real, last, cosines), _through(imag, last, sines))
