"""Operators that are captured in their parts, for which there are rules: what the tracer puts in their place.

Each is what PyTorch computes, in other words; NotImplemented leaves the operator as it is.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._decomp import get_decompositions

aten = torch.ops.aten


def _adaptive_max_pool2d(x: Tensor, size: list[int]) -> Any:
    """Windows of equal size, as for global max pooling, are those of an ordinary pool."""
    window = _equal_windows(x, size)
    return NotImplemented if window is None else aten.max_pool2d_with_indices.default(x, window, window)


def _adaptive_max_pool2d_backward(grad: Tensor, x: Tensor, indices: Tensor) -> Any:
    window = _equal_windows(x, grad.shape[-2:])
    if window is None:
        return NotImplemented
    return aten.max_pool2d_with_indices_backward.default(grad, x, window, window, [0, 0], [1, 1], False, indices)


def _equal_windows(x: Tensor, size: Sequence[int]) -> list[int] | None:
    if not all(size) or any(n % m for n, m in zip(x.shape[-2:], size, strict=True)):
        return None
    return [n // m for n, m in zip(x.shape[-2:], size, strict=True)]


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    """The parametrization's norm over all dimensions but one, in operators that have rules."""
    norm = v.square().sum([i for i in range(v.dim()) if i != dim], keepdim=True).sqrt()
    return v * (g / norm), norm


def _zeros(size: list[int], *, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
    """A forward derivative's tangent of what has none, which the tracer would put on no device."""
    return torch.zeros(size, dtype=dtype, device=device)


def _vdot(a: Tensor, b: Tensor) -> Any:
    """Spectral norm's."""
    return NotImplemented if a.is_complex() else aten.dot.default(a, b)


def _rrelu(
    x: Tensor, noise: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, *_: Any
) -> Any:
    """At inference the slope is fixed."""
    return NotImplemented if training else aten.leaky_relu.default(x, (lower + upper) / 2)


def _rrelu_backward(
    grad: Tensor, x: Tensor, noise: Tensor, lower: float, upper: float, training: bool, is_result: bool
) -> Any:
    return NotImplemented if training else aten.leaky_relu_backward.default(grad, x, (lower + upper) / 2, is_result)


def _addr(x: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    outer = a.unsqueeze(1) * b
    outer = outer if alpha == 1 else outer * alpha
    return outer.clone() if beta == 0 else x * beta + outer


def _addbmm(x: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """The sum over the batch is one long product."""
    product = a.transpose(0, 1).flatten(1) @ b.flatten(0, 1)
    product = product if alpha == 1 else product * alpha
    return product if beta == 0 else x * beta + product


def _cross(a: Tensor, b: Tensor, *, dim: int = -1) -> Tensor:
    a, b = torch.broadcast_tensors(a, b)
    return a.roll(-1, dim) * b.roll(-2, dim) - a.roll(-2, dim) * b.roll(-1, dim)


def _norm(x: Tensor, p: float | None = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    return torch.linalg.vector_norm(x, 2 if p is None else p, dim or None, keepdim, dtype=dtype)


def _aminmax(x: Tensor, *, dim: int | None = None, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    dims = list(range(x.dim())) if dim is None else [dim]
    return x.amin(dims, keepdim), x.amax(dims, keepdim)


def _std_mean(x: Tensor, dim: Any = None, *, correction: float | None = None, keepdim: bool = False) -> Any:
    dims = list(range(x.dim())) if dim is None else dim
    deviation = torch.std(x, dims, correction=1 if correction is None else correction, keepdim=keepdim)
    return deviation, x.mean(dims, keepdim)


def _cdist(a: Tensor, b: Tensor, p: float, compute_mode: int | None) -> Tensor:
    return torch.linalg.vector_norm(a.unsqueeze(-2) - b.unsqueeze(-3), p, -1)


def _cdist_backward(grad: Tensor, a: Tensor, b: Tensor, p: float, distance: Tensor) -> Any:
    if p not in (1, 2):
        return NotImplemented
    difference = a.unsqueeze(-2) - b.unsqueeze(-3)
    if p == 1:
        return (grad.unsqueeze(-1) * difference.sign()).sum(-2)
    slope = (difference / distance.unsqueeze(-1)).masked_fill((distance == 0).unsqueeze(-1), 0.0)
    return (grad.unsqueeze(-1) * slope).sum(-2)


def _quantile(
    x: Tensor, q: float | Tensor, dim: int | None = None, keepdim: bool = False, *, interpolation: str = "linear"
) -> Tensor:
    """Sorted values at fixed ranks; PyTorch's own looks for NaN first, which makes the ranks depend on the set."""
    shape = [1] * x.dim() if dim is None else None
    x, dim = (x.flatten(), 0) if dim is None else (x, dim % x.dim())
    rows, last = x.sort(dim).values, x.shape[dim] - 1
    several = isinstance(q, Tensor) and q.dim() > 0
    out = _at_ranks(rows, q * last, dim, interpolation) if isinstance(q, Tensor) else _at_rank(
        rows, _rounded(_rounded(q, x.dtype) * last, x.dtype), dim, interpolation
    )  # fmt: skip
    out = out.masked_fill(x.isnan().any(dim), math.nan)
    if shape is not None and keepdim:
        out = out.reshape(-1, *shape)
    elif keepdim:
        out = out.unsqueeze(dim + 1)
    return out if several else out.squeeze(0)


def _at_rank(rows: Tensor, rank: float, dim: int, interpolation: str) -> Tensor:
    """A rank that is a number stays one: proofs need to know the place, and products of tensors are rounded."""
    below, above = math.floor(rank), math.ceil(rank)
    if interpolation == "nearest":
        below = above = round(rank)
    low, high = rows.select(dim, below), rows.select(dim, above)
    weight = {"lower": 0.0, "higher": 1.0, "midpoint": 0.5}.get(interpolation, rank - below)
    if weight in (0.0, 1.0):
        return (high if weight else low).unsqueeze(0)
    return torch.lerp(low, high, weight).unsqueeze(0)


def _at_ranks(rows: Tensor, ranks: Tensor, dim: int, interpolation: str) -> Tensor:
    below, above = ranks.floor(), ranks.ceil()
    if interpolation == "nearest":
        below = above = ranks.round()
    elif interpolation != "linear":
        ranks = below + {"lower": 0.0, "higher": 1.0, "midpoint": 0.5}[interpolation] * (above - below)
    low, high = (rows.index_select(dim, place.long().reshape(-1)).movedim(dim, 0) for place in (below, above))
    weight = (ranks - below).reshape(-1, *[1] * (rows.dim() - 1))
    return torch.lerp(low, high, weight.expand_as(low))


def _rounded(value: float, dtype: torch.dtype) -> float:
    """The number as PyTorch holds it in a tensor of float64 or float32."""
    return value if dtype == torch.float64 else struct.unpack("f", struct.pack("f", value))[0]


def _cumprod(x: Tensor, dim: int, *, dtype: Any = None, out: Any = None) -> Tensor:
    """Products of the last 2, 4, 8, … elements; PyTorch's own derivative looks for zeros first."""
    if dtype is not None or not x.is_floating_point():
        x = x.to(torch.int64 if dtype is None else dtype)
    step, count = 1, x.shape[dim] if x.dim() else 1
    while step < count:
        product = x.narrow(dim, step, count - step) * x.narrow(dim, 0, count - step)
        x = torch.cat((x.narrow(dim, 0, step), product), dim)
        step *= 2
    return x.clone() if out is None else out.copy_(x)


class _LogCumSumExp(torch.autograd.Function):
    """∂y_j/∂x_i = exp(x_i − y_j) for i ≤ j; PyTorch's own takes the logarithms of gradients of either sign."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, dim: int) -> Tensor:
        return aten.logcumsumexp.default(x, dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        x, ctx.dim = inputs
        ctx.save_for_backward(x, output)
        ctx.save_for_forward(x, output)

    @staticmethod
    def slopes(ctx: Any) -> Tensor:
        """[…, i, j]"""
        x, y = (t.movedim(ctx.dim, -1) for t in ctx.saved_tensors)
        return (x.unsqueeze(-1) - y.unsqueeze(-2)).triu().exp().triu()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        terms = _LogCumSumExp.slopes(ctx) * grad.movedim(ctx.dim, -1).unsqueeze(-2)
        return terms.sum(-1).movedim(-1, ctx.dim), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        terms = _LogCumSumExp.slopes(ctx) * tangent.movedim(ctx.dim, -1).unsqueeze(-1)
        return terms.sum(-2).movedim(-1, ctx.dim)


def _logcumsumexp(x: Tensor, dim: int, *, out: Any = None) -> Tensor:
    if out is not None or not x.dim() or not x.is_floating_point():
        return torch.logcumsumexp(x, dim, out=out)
    return _LogCumSumExp.apply(x, dim)


def _lstsq(a: Tensor, b: Tensor, rcond: float | None = None, *, driver: str | None = None, out: Any = None) -> Any:
    """Of matrices of full rank, as the rule of ``pinv`` makes sure; PyTorch's own looks for the rank."""
    vector = b.dim() == 1 or (a.dim() - 1 == b.dim() and b.shape == a.shape[:-1])
    b = b.unsqueeze(-1) if vector else b
    x = torch.linalg.pinv(a, rtol=rcond) @ b
    m, n = a.shape[-2:]
    off = (a @ x - b).square().sum(-2) if m > n else a.new_empty(0)
    rank = torch.full(a.shape[:-2], min(m, n), dtype=torch.int64, device=a.device)
    return torch.return_types.linalg_lstsq((x.squeeze(-1) if vector else x, off, rank, a.new_empty(0)))  # type: ignore[attr-defined]


def _recurrent(step: Callable[..., Any], whole: Callable[..., Any]) -> Callable[..., Any]:
    """A recurrent network step by step, in the operators that PyTorch itself takes on the CPU: of an LSTM oneDNN has an
    operator for a layer, cuDNN one for all layers, and on a GPU a step of an LSTM or a GRU is one operator, too.
    """

    def run(
        input: Tensor, hx: Any, params: Any, has_biases: Any, num_layers: int, dropout: float, train: bool,
        bidirectional: bool, batch_first: bool = False,
    ) -> Any:  # fmt: skip
        if isinstance(has_biases, (list, tuple)):  # packed sequences: their lengths come second
            return whole(input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first)
        starts = [h.unbind(0) for h in ((hx,) if isinstance(hx, Tensor) else hx)]
        directions = 1 + bool(bidirectional)
        count = len(params) // (num_layers * directions)
        x, ends = input.transpose(0, 1) if batch_first else input, []
        for layer in range(num_layers):
            if layer and dropout and train:
                x = torch.dropout(x, dropout, True)
            outputs = []
            for i in range(directions * layer, directions * (layer + 1)):
                weights, start = params[count * i : count * (i + 1)], tuple(h[i] for h in starts)
                output, end = _one_direction(step, x, start, weights, has_biases, i % directions == 1)
                outputs.append(output)
                ends.append(end)
            x = torch.cat(outputs, -1) if bidirectional else outputs[0]
        return x.transpose(0, 1) if batch_first else x, *(torch.stack(end) for end in zip(*ends, strict=True))

    return run


def _one_direction(
    step: Callable[..., tuple[Tensor, ...]],
    x: Tensor,
    state: tuple[Tensor, ...],
    weights: Any,
    biases: bool,
    back: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    of_input, of_hidden, *others = weights
    bias, hidden_bias = others[:2] if biases else (None, None)
    projection = others[2 * biases :]
    inputs, outputs = F.linear(x, of_input, bias).unbind(0), []
    for now in reversed(inputs) if back else inputs:
        state = step(now, F.linear(state[0], of_hidden, hidden_bias), *state, *projection)
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if back else outputs), state


def _lstm_step(x: Tensor, hidden: Tensor, h: Tensor, c: Tensor, projection: Tensor | None = None) -> tuple[Tensor, ...]:
    i, f, g, o = (hidden + x).unsafe_chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return h if projection is None else h @ projection.t(), c


def _gru_step(x: Tensor, hidden: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    (xr, xz, xn), (hr, hz, hn) = x.unsafe_chunk(3, 1), hidden.unsafe_chunk(3, 1)
    r, z = (hr + xr).sigmoid(), (hz + xz).sigmoid()
    n = (xn + hn * r).tanh()
    return ((h - n) * z + n,)


def _lstm_cell(input: Tensor, hx: Any, w_ih: Tensor, w_hh: Tensor, b_ih: Any = None, b_hh: Any = None) -> Any:
    return _lstm_step(F.linear(input, w_ih, b_ih), F.linear(hx[0], w_hh, b_hh), *hx)


def _gru_cell(input: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Any = None, b_hh: Any = None) -> Tensor:
    return _gru_step(F.linear(input, w_ih, b_ih), F.linear(hx, w_hh, b_hh), hx)[0]


def _rms_norm(x: Tensor, normalized_shape: list[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """As PyTorch takes it apart on the CPU; on a GPU it is one operator."""
    shape = tuple(normalized_shape)
    if not shape or x.shape[-len(shape) :] != shape or (weight is not None and weight.shape != shape):
        return torch.rms_norm(x, normalized_shape, weight, eps)  # says what does not fit
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    square = x.pow(2).mean(list(range(x.dim() - len(shape), x.dim())), keepdim=True)
    out = x * aten.add.Scalar(square, eps).rsqrt()
    return out if weight is None else out * weight


def _mean_or_sum(x: Tensor, reduction: int) -> Tensor:
    return (x.mean() if reduction == 1 else x.sum()) if reduction else x


def _share(grad: Tensor, x: Tensor, reduction: int) -> Tensor:
    """What of a loss's gradient an element gets."""
    return grad / x.numel() if reduction == 1 else grad


def _huber(x: Tensor, y: Tensor, reduction: int = 1, delta: float = 1.0) -> Tensor:
    z = x - y
    size = z.abs()
    return _mean_or_sum(torch.where(size <= delta, z.square() * 0.5, (size - 0.5 * delta) * delta), reduction)


def _smooth_l1(x: Tensor, y: Tensor, reduction: int = 1, beta: float = 1.0) -> Tensor:
    z = x - y
    size = z.abs()
    return _mean_or_sum(torch.where(size < beta, z.square() / (2 * beta), size - 0.5 * beta), reduction)


def _bce(x: Tensor, y: Tensor, weight: Tensor | None = None, reduction: int = 1) -> Tensor:
    loss = (y - 1) * (-x).log1p().clamp(min=-100) - y * x.log().clamp(min=-100)
    return _mean_or_sum(loss if weight is None else loss * weight, reduction)


def _bce_backward(grad: Tensor, x: Tensor, y: Tensor, weight: Tensor | None = None, reduction: int = 1) -> Tensor:
    slope = (x - y) / ((1 - x) * x).clamp(min=1e-12)
    return _share(grad, x, reduction) * (slope if weight is None else slope * weight)


def _nll(x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int) -> Any:
    """The mean with weights is a sum, divided by the weights of the targets."""
    if weight is None or reduction != 1:
        return NotImplemented
    kept = target != ignore_index
    total = torch.where(kept, weight[torch.where(kept, target, 0)], 0.0).sum()
    return aten.nll_loss_forward.default(x, target, weight, 2, ignore_index)[0] / total, total


def _nll_backward(
    grad: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int, total: Tensor
) -> Any:
    if weight is None or reduction != 1:
        return NotImplemented
    return aten.nll_loss_backward.default(grad / total, x, target, weight, 2, ignore_index, total)


def _rows(x: Tensor) -> Tensor:
    """A row of classes for each pixel of [B, C, H, W]."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def _nll2d(x: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    loss, total = aten.nll_loss_forward(_rows(x), target.flatten(), *options)
    return loss.reshape(target.shape) if loss.dim() else loss, total


def _nll2d_backward(grad: Tensor, x: Tensor, target: Tensor, *options: Any) -> Tensor:
    rows = aten.nll_loss_backward(grad.flatten() if grad.dim() else grad, _rows(x), target.flatten(), *options)
    return rows.unflatten(0, target.shape).permute(0, 3, 1, 2)


def _gaussian_nll(
    input: Tensor, target: Tensor, var: Tensor | float, full: bool = False, eps: float = 1e-6, reduction: str = "mean"
) -> Tensor:
    """Without a look at the variances; they are limited from below, their gradients are not."""
    var = var * torch.ones_like(input) if isinstance(var, float) else var.clone()
    if var.shape == input.shape[:-1]:
        var = var.unsqueeze(-1)
    with torch.no_grad():
        var.clamp_(min=eps)
    loss = (var.log() + (input - target) ** 2 / var) * 0.5
    return _mean_or_sum(loss + 0.5 * math.log(2 * math.pi) if full else loss, {"none": 0, "mean": 1}.get(reduction, 2))


def _stft(
    input: Tensor, n_fft: int, hop_length: int | None = None, win_length: int | None = None,
    window: Tensor | None = None, center: bool = True, pad_mode: str = "reflect", normalized: bool = False,
    onesided: bool | None = None, return_complex: bool | None = None, align_to_window: bool | None = None,
) -> Tensor:  # fmt: skip
    """Frames as windows that slide; PyTorch's own are a strided view of the signal's memory."""
    if input.is_complex() or align_to_window is not None or (window is not None and window.is_complex()):
        return torch.stft(
            input, n_fft, hop_length, win_length, window, center, pad_mode, normalized, onesided, return_complex,
            align_to_window,
        )  # fmt: skip
    signal = input if input.dim() == 2 else input.unsqueeze(0)
    if center:
        signal = F.pad(signal, [n_fft // 2] * 2, mode=pad_mode)
    frames = signal.unfold(-1, n_fft, n_fft // 4 if hop_length is None else hop_length)
    length = n_fft if win_length is None else win_length
    window = input.new_ones(length) if window is None else window
    if length < n_fft:
        before = (n_fft - length) // 2
        window = F.pad(window, [before, n_fft - length - before])
    transform = torch.fft.fft if onesided is False else torch.fft.rfft
    out = transform(frames * window, norm="ortho" if normalized else "backward").transpose(1, 2)
    out = out if input.dim() == 2 else out.squeeze(0)
    return out if return_complex else torch.view_as_real(out)


def _write(x: Tensor, place: Any, value: Any) -> None:
    """``x[mask] = value`` with one value: PyTorch's derivative by it collects the chosen entries, and may be one of
    whatever size.
    """
    *before, mask = place if isinstance(place, tuple) and place else (place,)
    is_one = isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)
    by_mask = isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.dim() > 0
    if not (is_one and by_mask and all(isinstance(part, slice) and part == slice(None) for part in before)):
        return Tensor.__setitem__(x, place, value)
    dims = [1] * len(before) + list(mask.shape)
    if len(dims) > x.dim() or any(n != size for n, size in zip(mask.shape, x.shape[len(before) :], strict=False)):
        return Tensor.__setitem__(x, place, value)  # says what does not fit
    mask = mask.reshape(dims + [1] * (x.dim() - len(dims))).to(x.device)
    x.masked_fill_(mask, value.reshape(()).to(x.dtype) if isinstance(value, Tensor) else value)
    return None


# Functions that PyTorch takes apart before the tracer sees them, in a way that rules cannot follow.
REWRITTEN: dict[Callable, Callable[..., Any]] = {
    torch.quantile: _quantile,
    torch.nanquantile: _quantile,
    Tensor.quantile: _quantile,
    Tensor.nanquantile: _quantile,
    torch.lstm: _recurrent(_lstm_step, torch.lstm),
    torch.gru: _recurrent(_gru_step, torch.gru),
    torch.rnn_tanh: _recurrent(lambda x, hidden, h: ((hidden + x).tanh(),), torch.rnn_tanh),
    torch.rnn_relu: _recurrent(lambda x, hidden, h: ((hidden + x).relu(),), torch.rnn_relu),
    torch.lstm_cell: _lstm_cell,
    torch.gru_cell: _gru_cell,
    torch.rms_norm: _rms_norm,
    F.rms_norm: _rms_norm,
    F.gaussian_nll_loss: _gaussian_nll,
    torch.linalg.lstsq: _lstsq,
    Tensor.__setitem__: _write,
    torch.cumprod: _cumprod,
    Tensor.cumprod: _cumprod,
    torch.stft: _stft,
    Tensor.stft: _stft,
    torch.logcumsumexp: _logcumsumexp,
    Tensor.logcumsumexp: _logcumsumexp,
}

DECOMPOSED: dict[Any, Callable[..., Any]] = {
    aten._weight_norm_interface.default: _weight_norm,
    aten._efficientzerotensor.default: _zeros,
    aten.vdot.default: _vdot,
    aten.adaptive_max_pool2d.default: _adaptive_max_pool2d,
    aten.adaptive_max_pool2d_backward.default: _adaptive_max_pool2d_backward,
    aten.rrelu_with_noise.default: _rrelu,
    aten.rrelu_with_noise_backward.default: _rrelu_backward,
    aten.addr.default: _addr,
    aten.addbmm.default: _addbmm,
    aten.linalg_cross.default: _cross,
    aten.norm.Scalar: _norm,
    aten.norm.ScalarOpt_dim: _norm,
    aten.dist.default: lambda a, b, p=2: torch.linalg.vector_norm(a - b, p),
    aten.aminmax.default: _aminmax,
    aten.std_mean.correction: _std_mean,
    aten._cdist_forward.default: _cdist,
    aten._cdist_backward.default: _cdist_backward,
    aten.polar.default: lambda size, angle: torch.complex(size * angle.cos(), size * angle.sin()),
    aten.deg2rad.default: lambda x: x * (torch.pi / 180),
    aten.rad2deg.default: lambda x: x * (180 / torch.pi),
    aten.ldexp.Tensor: lambda x, exponent: x * torch.pow(2.0, exponent),
    aten.mse_loss.default: lambda x, y, reduction=1: _mean_or_sum((x - y).square(), reduction),
    aten.mse_loss_backward.default: lambda grad, x, y, reduction: _share(grad, x, reduction) * ((x - y) * 2),
    aten.huber_loss.default: _huber,
    aten.huber_loss_backward.default: lambda grad, x, y, reduction, delta: (
        _share(grad, x, reduction) * (x - y).clamp(-delta, delta)
    ),
    aten.smooth_l1_loss.default: _smooth_l1,
    aten.smooth_l1_loss_backward.default: lambda grad, x, y, reduction, beta: (
        _share(grad, x, reduction) * ((x - y) / beta).clamp(-1, 1)
    ),
    aten.soft_margin_loss.default: lambda x, y, reduction=1: _mean_or_sum((-x * y).exp().log1p(), reduction),
    aten.soft_margin_loss_backward.default: lambda grad, x, y, reduction: (
        _share(grad, x, reduction) * (-y * (-x * y).sigmoid())
    ),
    aten.binary_cross_entropy.default: _bce,
    aten.binary_cross_entropy_backward.default: _bce_backward,
    aten.nll_loss_forward.default: _nll,
    aten.nll_loss_backward.default: _nll_backward,
    aten.nll_loss2d_forward.default: _nll2d,
    aten.nll_loss2d_backward.default: _nll2d_backward,
    **get_decompositions([aten.affine_grid_generator]),
}
