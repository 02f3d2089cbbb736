"""Other ways to evaluate a program in float32: sums in another order or in chunks, other algebra."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from pyxai_bounds.fuse import VIEWS

aten = torch.ops.aten


class Evaluation(fx.Interpreter):
    """Runs a captured float32 program with every sum permuted and chunked, and batch norm in one of four forms."""

    def __init__(self, module: fx.GraphModule, seed: int, chunk: int) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self.generator = torch.Generator().manual_seed(seed)
        self.chunk = chunk
        self.form = seed % 4

    def run_node(self, n: fx.Node) -> Any:
        other: Callable | None = _OTHER.get(n.target) if n.op == "call_function" else None  # type: ignore[arg-type]
        if n.target in VIEWS:  # another algorithm leaves its result in another memory order
            args, _ = self.fetch_args_kwargs_from_env(n)
            return args[0].reshape(args[1])
        if other is None:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        result = other(self, *args, **kwargs)
        return super().run_node(n) if result is NotImplemented else result

    def total(self, terms: Tensor, dim: int) -> Tensor:
        """Σ over a dimension: permuted, in chunks, one chunk's sum added to the next."""
        order = torch.randperm(terms.shape[dim], generator=self.generator)
        out: Tensor | None = None
        for part in terms.index_select(dim, order).split(self.chunk, dim):
            summed = part.unbind(dim)[0]
            for term in part.unbind(dim)[1:]:
                summed = summed + term
            out = summed if out is None else out + summed
        return terms.sum(dim) if out is None else out

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return self.total(a.unsqueeze(-1) * b.unsqueeze(-3), -2)


def _mm(run: Evaluation, a: Tensor, b: Tensor) -> Tensor:
    return run.product(a, b)


def _addmm(run: Evaluation, bias: Tensor, a: Tensor, b: Tensor, **kwargs: Any) -> Any:
    return NotImplemented if kwargs else run.product(a, b) + bias


def _convolution(
    run: Evaluation, x: Tensor, w: Tensor, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool,
    output_padding: Any, groups: int,
) -> Any:  # fmt: skip
    """By blocks of input channels in any order."""
    if groups != 1:
        return NotImplemented
    geometry = (stride, padding, dilation, transposed, output_padding, groups)
    out = None
    order = torch.randperm(x.shape[1], generator=run.generator)
    for part in order.split(max(1, run.chunk % 4)):
        weight = w.index_select(0 if transposed else 1, part)
        term = aten.convolution(x.index_select(1, part), weight, None, *geometry)
        out = term if out is None else out + term
    return out if bias is None else out + bias.reshape(1, -1, *[1] * (x.dim() - 2))


def _sum(run: Evaluation, x: Tensor, dims: Any, keepdim: bool = False, **kwargs: Any) -> Any:
    if not x.is_floating_point() or not dims:
        return NotImplemented
    for dim in sorted((d % x.dim() for d in dims), reverse=True):
        x = run.total(x, dim).unsqueeze(dim) if keepdim else run.total(x, dim)
    return x


def _mean(run: Evaluation, x: Tensor, dims: Any, keepdim: bool = False, **kwargs: Any) -> Any:
    count = 1
    for d in dims:
        count *= x.shape[d]
    total = _sum(run, x, dims, keepdim)
    return total / count if run.form % 2 else total * torch.tensor(1 / count)


def _batch_norm(
    run: Evaluation, x: Tensor, w: Any, b: Any, mean: Tensor, var: Tensor, training: bool, momentum: float, eps: float
) -> Any:
    shape = [1, -1] + [1] * (x.dim() - 2)
    w = torch.ones_like(mean) if w is None else w
    b = torch.zeros_like(mean) if b is None else b
    x0, w, b, m = x, w.reshape(shape), b.reshape(shape), mean.reshape(shape)
    root, inverse = torch.sqrt(var + eps).reshape(shape), torch.rsqrt(var + eps).reshape(shape)
    out = (
        lambda: (x0 - m) / root * w + b,
        lambda: (x0 - m) * inverse * w + b,
        lambda: x0 * (w * inverse) + (b - m * (w * inverse)),
        lambda: (x0 - m) * (w * (1 / root)) + b,
    )[run.form]()
    return out, x.new_empty(0), x.new_empty(0)


def _softmax(run: Evaluation, x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    powers = torch.exp(x - x.amax(dim, keepdim=True))
    return powers / run.total(powers, dim).unsqueeze(dim)


def _log_softmax(run: Evaluation, x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    shifted = x - x.amax(dim, keepdim=True)
    return shifted - torch.log(run.total(torch.exp(shifted), dim).unsqueeze(dim))


def _sigmoid(run: Evaluation, x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x)) if run.form % 2 else torch.sigmoid(x)


def _rsqrt(run: Evaluation, x: Tensor) -> Tensor:
    return 1 / torch.sqrt(x) if run.form % 2 else torch.rsqrt(x)


_OTHER: dict[Any, Callable] = {
    aten.mm.default: _mm,
    aten.bmm.default: _mm,
    aten.addmm.default: _addmm,
    aten.convolution.default: _convolution,
    aten.sum.dim_IntList: _sum,
    aten.mean.dim: _mean,
    aten.native_batch_norm.default: _batch_norm,
    aten._softmax.default: _softmax,
    aten._log_softmax.default: _log_softmax,
    aten.sigmoid.default: _sigmoid,
    aten.rsqrt.default: _rsqrt,
}
