"""Two-dimensional convolutions of a box with a box, and their two backward passes, on top of ``interval_matmul``.

Every output of the three is a sum of products of one entry of each factor, so im2col makes them matrix products, and
``exact`` remains the exact range of every such product, summed. Samples are taken a chunk at a time, which bounds
the memory that unfolded images take; where gradients are wanted, autograd keeps those of all chunks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from pyxai_bounds.ops import interval_matmul
from pyxai_bounds.ops.checks import output_size

# Elements of an unfolded chunk, unless one sample has more: 16 MiB each for midpoint and radius in float32.
CHUNK = 2**22


def conv2d_product(
    a_mid: Tensor,
    a_rad: Tensor,
    w_mid: Tensor,
    w_rad: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    exact: bool,
) -> tuple[Tensor, Tensor]:
    """Convolution of the box (a_mid, a_rad) with the weight box (w_mid, w_rad), without bias.

    Shapes: a [B, C, H, W]; w [K, C / groups, kh, kw]; returns mid, rad [B, K, H', W'].
    Rounding: to nearest; the error bound of ``interval_matmul`` holds with k = C / groups · kh · kw.
    Raises ValueError if the channels do not fit.
    """
    kernel = w_mid.shape[2:]
    size = _output_size(a_mid.shape, w_mid.shape, stride, padding, dilation, groups)
    weights = [w.reshape(groups, w.shape[0] // groups, -1) for w in (w_mid, w_rad)]
    parts = []
    for boxes in _chunks(a_mid.shape[1] * prod(kernel) * prod(size), a_mid, a_rad):
        columns = [_unfold(x, kernel, stride, padding, dilation, groups) for x in boxes]
        out = interval_matmul(*weights, *columns, exact)
        parts.append([_to_images(x, len(boxes[0]), size) for x in out])
    return _joined(parts)


def conv2d_product_input(
    grad_mid: Tensor,
    grad_rad: Tensor,
    w_mid: Tensor,
    w_rad: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    exact: bool,
) -> tuple[Tensor, Tensor]:
    """The backward-data pass: boxes of the output's gradient and of the weight to one of the input's gradient.

    Shapes: grad [B, K, H', W']; w [K, C / groups, kh, kw]; input_size (B, C, H, W); returns mid, rad [B, C, H, W].
    Rounding: to nearest. Every one of the kh · kw taps is an ``interval_matmul`` with k = K / groups, and the taps are
    then summed: its error bound holds with γ of index 2k + 2 + kh · kw, and its underflow once per tap.
    Raises ValueError if the sizes do not fit.
    """
    kernel = w_mid.shape[2:]
    size = _output_size(input_size, w_mid.shape, stride, padding, dilation, groups)
    _check_output(grad_mid, input_size, w_mid.shape, size)
    weights = [w.reshape(groups, w.shape[0] // groups, -1).mT for w in (w_mid, w_rad)]
    geometry = (tuple(input_size[2:]), tuple(kernel), tuple(dilation), tuple(padding), tuple(stride))
    parts = []
    for boxes in _chunks(int(input_size[1]) * prod(kernel) * prod(size), grad_mid, grad_rad):
        out = interval_matmul(*weights, *(_from_images(x, groups) for x in boxes), exact)
        samples = len(boxes[0])
        taps = [x.unflatten(2, (samples, prod(size))).permute(2, 0, 1, 3).flatten(1, 2) for x in out]
        parts.append([F.fold(x, *geometry) for x in taps])
    return _joined(parts)


def conv2d_product_weight(
    grad_mid: Tensor,
    grad_rad: Tensor,
    a_mid: Tensor,
    a_rad: Tensor,
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    exact: bool,
) -> tuple[Tensor, Tensor]:
    """The weight's gradient: boxes of the output's gradient and of the input to one of ``weight_size``.

    Shapes: grad [B, K, H', W']; a [B, C, H, W]; weight_size (K, C / groups, kh, kw); returns mid, rad of that size.
    Rounding: to nearest; the error bound of ``interval_matmul`` holds with k = B · H' · W'.
    Raises ValueError if the sizes do not fit.
    """
    kernel = weight_size[2:]
    size = _output_size(a_mid.shape, weight_size, stride, padding, dilation, groups)
    _check_output(grad_mid, a_mid.shape, weight_size, size)
    mid, rad = (grad_mid.new_zeros(tuple(weight_size)) for _ in range(2))
    for boxes in _chunks(a_mid.shape[1] * prod(kernel) * prod(size), grad_mid, grad_rad, a_mid, a_rad):
        rows = [_from_images(x, groups) for x in boxes[:2]]
        columns = [_unfold(x, kernel, stride, padding, dilation, groups).mT for x in boxes[2:]]
        one_mid, one_rad = interval_matmul(*rows, *columns, exact)
        mid, rad = mid + one_mid.reshape(mid.shape), rad + one_rad.reshape(rad.shape)
    return mid, rad


def _output_size(
    input_size: Sequence[int],
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[int, ...]:
    """(H', W')."""
    if input_size[1] != weight_size[1] * groups or weight_size[0] % groups:
        raise ValueError(
            f"A weight {list(weight_size)} in {groups} groups takes {weight_size[1] * groups} channels and must have a "
            f"multiple of {groups} outputs; the input is {list(input_size)}."
        )
    return tuple(output_size(input_size[2:], weight_size[2:], stride, padding, dilation))


def _check_output(grad: Tensor, input_size: Sequence[int], weight_size: Sequence[int], size: tuple[int, ...]) -> None:
    expected = [input_size[0], weight_size[0], *size]
    if list(grad.shape) != expected:
        raise ValueError(
            f"An input {list(input_size)} and a weight {list(weight_size)} have an output {expected}; its gradient "
            f"cannot be {list(grad.shape)}."
        )


def _chunks(unfolded: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors, as many samples at a time as CHUNK allows when each unfolds to so many elements; at least once."""
    step = max(1, CHUNK // max(1, unfolded))
    for first in range(0, max(1, len(tensors[0])), step):
        yield tuple(t[first : first + step] for t in tensors)


def _unfold(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """[B, C, H, W] to [groups, C / groups · kh · kw, B · H' · W']."""
    columns = F.unfold(x, tuple(kernel), tuple(dilation), tuple(padding), tuple(stride))
    return columns.unflatten(1, (groups, -1)).permute(1, 2, 0, 3).flatten(2)


def _from_images(x: Tensor, groups: int) -> Tensor:
    """[B, K, H', W'] to [groups, K / groups, B · H' · W']."""
    return x.flatten(2).unflatten(1, (groups, -1)).permute(1, 2, 0, 3).flatten(2)


def _to_images(x: Tensor, samples: int, size: tuple[int, ...]) -> Tensor:
    """[groups, K / groups, B · H' · W'] to [B, K, H', W']."""
    return x.unflatten(2, (samples, *size)).permute(2, 0, 1, 3, 4).flatten(1, 2)


def _joined(parts: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
    mid, rad = (torch.cat(part) for part in zip(*parts, strict=True))
    return mid, rad
