"""Linear maps of boxes in integers: float tensors times a power of two, which makes every number of a dtype whole."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SHIFT = {torch.float32: 149, torch.float64: 1074}


def whole(t: Tensor, shift: int | None = None) -> np.ndarray:
    """t · 2^shift as integers; by default the least shift that is enough for the dtype. Not finite: 0."""
    scale = 2 ** (SHIFT[t.dtype] if shift is None else shift)
    values = [int(Fraction(x) * scale) for x in t.double().nan_to_num(0.0, 0.0, 0.0).flatten().tolist()]
    return np.array(values, dtype=object).reshape(t.shape)


def conv2d(x: np.ndarray, w: np.ndarray, stride: Any, padding: Any, dilation: Any, groups: int) -> np.ndarray:
    """[B, C, H, W] * [K, C / groups, kh, kw], in integers."""
    columns, size = _columns(x.shape, w.shape, stride, padding, dilation)
    flat = np.concatenate([x.reshape(len(x), -1), np.zeros((len(x), 1), dtype=object)], 1)
    unfolded = flat[:, columns].reshape(len(x), groups, -1, columns.shape[-1])
    weights = w.reshape(groups, w.shape[0] // groups, -1)
    out = [[weights[g] @ one[g] for g in range(groups)] for one in unfolded]
    return np.array(out, dtype=object).reshape(len(x), w.shape[0], *size)


def conv2d_input(
    grad: np.ndarray, w: np.ndarray, input_size: Any, stride: Any, padding: Any, dilation: Any, groups: int
) -> np.ndarray:
    """Its backward-data pass: the transposed map."""
    columns, _ = _columns(input_size, w.shape, stride, padding, dilation)
    batch, size = input_size[0], int(np.prod(input_size[1:]))
    weights = w.reshape(groups, w.shape[0] // groups, -1)
    rows = grad.reshape(batch, groups, w.shape[0] // groups, columns.shape[-1])
    out = np.zeros((batch, size + 1), dtype=object)
    for b in range(batch):
        parts = np.concatenate([weights[g].T @ rows[b, g] for g in range(groups)])
        np.add.at(out[b], columns, parts)
    return out[:, :-1].reshape(tuple(input_size))


def _columns(x_shape: Any, w_shape: Any, stride: Any, padding: Any, dilation: Any) -> tuple[np.ndarray, list[int]]:
    """Which element of a flat image [C, H, W] each product reads; the one after the last stands for the padding."""
    channels, height, width = x_shape[1:]
    count = channels * height * width
    index = torch.arange(1.0, count + 1, dtype=torch.float64).reshape(1, channels, height, width)
    unfolded = F.unfold(index, w_shape[2:], dilation, padding, stride)[0].long().numpy() - 1
    sizes = zip((height, width), w_shape[2:], stride, padding, dilation, strict=True)
    return np.where(unfolded < 0, count, unfolded), [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes]
