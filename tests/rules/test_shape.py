"""Rearrangements, indexing, padding, resampling: every element goes where it goes, and radii go with it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pyxai_bounds as xb
from tests.networks import sample
from tests.rules.cases import Case, Direct, case_id, check, check_direct, rand

aten = torch.ops.aten

X = rand(3, 4)
CUBE = rand(2, 3, 4)
IMAGE = rand(2, 4, 4, 5)
VOLUME = rand(1, 1, 2, 3, 3)
OTHER = rand(3, 4, seed=1)
WHOLE = torch.tensor([[3, -4, 5, -6]] * 3)
INDEX = torch.tensor([[0, 2, 2, 3], [1, 1, 0, 0], [3, 2, 1, 0]])
ROWS = torch.tensor([2, 0, 2])
KEEP = torch.tensor([[True, False, True, True]] * 3)
SQUARE = rand(2, 4, 4, 4).contiguous(memory_format=torch.channels_last)
GREY = rand(2, 4, 4, 1).permute(0, 3, 1, 2)  # in either order, by its strides
LAST = IMAGE.contiguous(memory_format=torch.channels_last)


GRID = 1.2 * rand(2, 3, 5, 2, seed=3).tanh()


def resized(**options: object) -> Callable[[Tensor], Tensor]:
    return lambda x: F.interpolate(x, **options)  # type: ignore[arg-type]


CASES = [
    Case("view", lambda x: x.view(2, 6), X),
    Case("reshape of a transpose", lambda x: x.t().reshape(6, 2), X),
    Case("flatten", lambda x: x.flatten(1), CUBE),
    Case("permute", lambda x: x.permute(2, 0, 1), CUBE),
    Case("transpose", lambda x: x.transpose(0, 2), CUBE),
    Case("t", lambda x: x.t(), X),
    Case("expand", lambda x: x.unsqueeze(0).expand(5, 3, 4), X),
    Case("expand of size 1", lambda x: x[:, :1].expand(3, 4), X),
    Case("squeeze", lambda x: x.unsqueeze(0).unsqueeze(2).squeeze(), X),
    Case("squeeze a dimension", lambda x: x.unsqueeze(1).squeeze(1), X),
    Case("squeeze dimensions", lambda x: x.unsqueeze(0).unsqueeze(2).squeeze((0, 2)), X),
    Case("select", lambda x: x[:, 1], X),
    Case("slice", lambda x: x[1:, ::2], X),
    Case("split", lambda x: torch.cat(x.split(3, 1)[::-1], 1) * 2, X),
    Case("unsafe split", lambda x: torch.cat(torch.unsafe_split(x, 3, 1)[::-1], 1) * 2, X),
    Case("unsafe split with sizes", lambda x: aten.unsafe_split_with_sizes(x, [1, 3], 1)[1], X),
    Case("embedding", lambda x: F.embedding(ROWS, x), X, gradient=False),
    Case("split with sizes", lambda x: x.split([1, 3], 1)[1], X),
    Case("chunk", lambda x: x.chunk(2, 1)[0] - x.chunk(2, 1)[1], X),
    Case("unbind", lambda x: x.unbind(0)[1] - x.unbind(0)[0], X),
    Case("cat", lambda x: torch.cat([x, OTHER, 2 * x], 1), X),
    Case("cat with integers", lambda x: torch.cat([x, WHOLE], 1), X),
    Case("stack", lambda x: torch.stack([OTHER, x, x]), X),
    Case("repeat", lambda x: x.repeat(2, 3), X),
    Case("repeat_interleave", lambda x: x.repeat_interleave(2, 1), X),
    Case("flip", lambda x: x.flip(0, 1), X),
    Case("roll", lambda x: x.roll((1, -2), (0, 1)), X),
    Case("unfold", lambda x: x.unfold(1, 3, 1), X),
    Case("diagonal", lambda x: x.diagonal(1), X),
    Case("tril", lambda x: x.tril(), X),
    Case("triu", lambda x: x.triu(1), X),
    Case("gather", lambda x: x.gather(1, INDEX), X),
    Case("index_select", lambda x: x.index_select(0, ROWS), X),
    Case("index", lambda x: x[ROWS, ROWS], X),
    Case("index_put", lambda x: OTHER.index_put((ROWS[:2],), x[:2]), X),
    Case("index_put, added", lambda x: x.index_put((ROWS,), OTHER, accumulate=True), X),
    Case("index_add", lambda x: OTHER.index_add(0, ROWS, x), X),
    Case("index_add, negative alpha", lambda x: OTHER.index_add(0, ROWS, x, alpha=-2), X),
    Case("index_copy", lambda x: OTHER.index_copy(0, ROWS[:2], x[:2]), X),
    Case("scatter", lambda x: OTHER.scatter(0, ROWS[:2].unsqueeze(1).expand(2, 4), x[:2]), X),
    Case("scatter a number", lambda x: x.scatter(1, INDEX[:, :1], -2.5), X),
    Case("scatter_add", lambda x: OTHER.scatter_add(1, INDEX, x), X),
    Case("where", lambda x: torch.where(KEEP, x, OTHER), X),
    Case("where, a number", lambda x: torch.where(KEEP, x, -1.5), X),
    Case("where, whole numbers", lambda x: torch.where(KEEP, x, WHOLE), X),
    Case("masked_fill", lambda x: x.masked_fill(KEEP, -2.5), X),
    Case("masked_fill by a set", lambda x: OTHER.masked_fill(KEEP, x[0, 0]), X),
    Case("select_scatter", lambda x: torch.select_scatter(OTHER, x[0], 0, 1), X),
    Case("slice_scatter", lambda x: torch.slice_scatter(OTHER, x[:2], 0, 1, 3), X),
    Case("assignment", lambda x: assigned(x), X),
    Case("fill", lambda x: torch.zeros_like(x).fill_(x[1, 1]), X),
    Case("copy", lambda x: torch.empty_like(x).copy_(x[0]), X),
    Case("constant pad", lambda x: F.pad(x, (1, 2, 0, 1), value=-1.5), X),
    Case("negative pad", lambda x: F.pad(x, (-1, 1)), X),
    Case("reflection pad 1d", lambda x: F.pad(x, (2, 1), mode="reflect"), CUBE),
    Case("reflection pad 2d", lambda x: F.pad(x, (1, 2, 0, 3), mode="reflect"), IMAGE),
    Case("replication pad 1d", lambda x: F.pad(x, (2, 1), mode="replicate"), CUBE),
    Case("replication pad 2d", lambda x: F.pad(x, (1, 2, 0, 3), mode="replicate"), IMAGE),
    Case("reflection pad 3d", lambda x: F.pad(x, (1, 2, 0, 1, 1, 0), mode="reflect"), VOLUME),
    Case("replication pad 3d", lambda x: F.pad(x, (1, 2, 0, 1, 1, 0), mode="replicate"), VOLUME),
    Case("circular pad", lambda x: F.pad(x, (1, 2, 0, 3), mode="circular"), IMAGE),
    Case("nearest", resized(scale_factor=2), IMAGE),
    Case("nearest, odd size", resized(size=(3, 7)), IMAGE),
    Case("nearest, channels-last", resized(scale_factor=2), LAST),
    Case("bilinear", resized(size=(7, 3), mode="bilinear"), IMAGE),
    Case("bilinear, aligned", resized(scale_factor=1.5, mode="bilinear", align_corners=True), IMAGE),
    Case(
        "bilinear then ReLU, channels-last", lambda x: F.relu(F.interpolate(x, scale_factor=2, mode="bilinear")), LAST
    ),
    Case("pixel shuffle", lambda x: F.pixel_shuffle(x, 2), IMAGE),
    Case("pixel unshuffle", lambda x: F.pixel_unshuffle(x[..., :4], 2), IMAGE),
    Case("ReLU of pixel unshuffle, channels-last", lambda x: F.relu(F.pixel_unshuffle(x, 2)).flatten(1), SQUARE),
    Case("ReLU of pixel unshuffle, one channel", lambda x: F.relu(F.pixel_unshuffle(x, 2)).flatten(1), GREY),
    Case(
        "ReLU between pixel shuffles", lambda x: F.pixel_unshuffle(F.relu(F.pixel_shuffle(x, 2)), 2).flatten(1), SQUARE
    ),
    Case("pixel unshuffle of ReLU, channels-last", lambda x: F.pixel_unshuffle(F.relu(x), 2), SQUARE),
    Case("ReLU of a pixel shuffle, channels-last", lambda x: F.relu(F.pixel_shuffle(F.relu(x), 2)), LAST),
    Case("reflection pad of ReLU, channels-last", lambda x: F.pad(F.relu(x), (1, 2, 0, 3), mode="reflect"), LAST),
    Case("nearest 1d", resized(size=9), CUBE),
    Case("nearest 3d", resized(scale_factor=2), VOLUME),
    Case("nearest, exact 1d", resized(size=7, mode="nearest-exact"), CUBE),
    Case("nearest, exact", resized(size=(3, 7), mode="nearest-exact"), IMAGE),
    Case("nearest, exact 3d", resized(size=(3, 2, 4), mode="nearest-exact"), VOLUME),
    Case("linear", resized(size=7, mode="linear"), CUBE),
    Case("trilinear", resized(scale_factor=1.5, mode="trilinear", align_corners=True), VOLUME),
    Case("bicubic", resized(size=(7, 3), mode="bicubic"), IMAGE),
    Case("bicubic, aligned", resized(scale_factor=1.5, mode="bicubic", align_corners=True), IMAGE),
    Case("bicubic, scaled", resized(scale_factor=(1.7, 0.6), mode="bicubic"), IMAGE),
    Case("bilinear, antialiased", resized(size=(2, 3), mode="bilinear", antialias=True), IMAGE),
    Case("take", lambda x: x.take(INDEX), X),
    Case("put", lambda x: OTHER.put(torch.tensor([3, 1, 7]), x[0, :3]), X),
    Case("put, added", lambda x: x.put(torch.tensor([3, 3, 7]), OTHER[0, :3], accumulate=True), X),
    Case("diagonal of a vector", lambda x: x[0].diag(1), X),
    Case("diag_embed", lambda x: x.diag_embed(-1), X),
    Case("diag", lambda x: x.diag(), X),
    Case("diagonal_scatter", lambda x: torch.diagonal_scatter(OTHER, x[:, 0]), X),
    Case("trace", lambda x: x.trace(), X),
    Case("rot90", lambda x: x.rot90(), X),
    Case("block_diag", lambda x: torch.block_diag(x, OTHER), X),
    Case("channel shuffle", lambda x: F.channel_shuffle(x, 2), IMAGE),
    Case("masked_scatter", lambda x: OTHER.masked_scatter(KEEP, x), X),
    Case("index_fill", lambda x: x.index_fill(0, ROWS[:2], -1.5), X),
    Case("index_fill by a set", lambda x: x.index_fill(1, ROWS[:2], x[0, 0]), X),
    *(
        Case(
            f"grid_sample, {padding}",
            lambda x, padding=padding: F.grid_sample(x, GRID, padding_mode=padding, align_corners=padding == "border"),
            IMAGE,
        )
        for padding in ("zeros", "border", "reflection")
    ),
    Case("grid_sample, nearest", lambda x: F.grid_sample(x, GRID, "nearest", align_corners=False), IMAGE),
    Case(
        "grid_sample 3d",
        lambda x: F.grid_sample(x, GRID.new_tensor([[[[[0.3, -0.2, 0.9]]]]]), align_corners=True),
        VOLUME,
    ),
    Case("affine_grid", lambda x: F.affine_grid(x, (2, 1, 3, 4), align_corners=False), rand(2, 2, 3)),
    Case("im2col", lambda x: F.unfold(x, (2, 3), padding=1), IMAGE),
    Case("col2im", lambda x: F.fold(x, (3, 4), (2, 2)), rand(1, 8, 6)),
]


def assigned(x: Tensor) -> Tensor:
    out = x * OTHER
    out[1:, 2] = x[1:, 0]
    return out


BOX = xb.Interval.linf(X, 0.3)
DIRECT = [
    Direct(aten.embedding_dense_backward.default, (BOX, ROWS, 3, -1, False)),
    Direct(aten.fill.Tensor, (OTHER, BOX[0, 0])),
    Direct(aten.copy.default, (OTHER, BOX)),
    Direct(aten.reshape.default, (BOX, [2, 6])),
    Direct(aten._unsafe_view.default, (BOX, [2, 6])),
    Direct(aten.index_put.default, (BOX, [ROWS], BOX)),
    Direct(aten.fill.Scalar, (BOX, 2.0)),
    *(
        Direct(op, (BOX,))
        for op in (aten.zeros_like.default, aten.ones_like.default, aten.empty_like.default)
    ),
    Direct(aten.full_like.default, (BOX, 2.0)),
    *(
        Direct(op, (BOX, [2, 3]))
        for op in (aten.new_zeros.default, aten.new_ones.default, aten.new_empty.default)
    ),
    Direct(aten.new_full.default, (BOX, [2, 3], 2.0)),
    Direct(aten.new_empty_strided.default, (BOX, [2, 3], [3, 1])),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_against_autograd(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", DIRECT, ids=case_id)
def test_rules_that_tracing_does_not_reach(case: Direct) -> None:
    check_direct(case)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_linear_rearrangements_are_exact(case: Case) -> None:
    """Some corner attains each bound: the signs of the output's gradient say which."""
    bounds = xb.bound(case.explained)(xb.Interval.linf(case.x, case.eps))[0]
    x = case.x.clone().requires_grad_()
    value = case.fn(x).flatten()
    for element in () if "ReLU" in case.name else (0, value.numel() // 2, value.numel() - 1):
        (signs,) = torch.autograd.grad(value[element], x, retain_graph=True, allow_unused=True, materialize_grads=True)
        corner = case.fn(case.x + case.eps * signs.sign()).flatten()[element]
        assert abs(corner - bounds.upper.flatten()[element]) < 1e-10


@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("align", [False, True])
def test_a_grid_in_a_box(padding: str, align: bool) -> None:
    """A spatial transformer: the image is read at places that move with the box."""
    theta = torch.tensor([[[0.8, 0.1, 0.1], [-0.2, 0.9, -0.1]]] * 2, dtype=torch.float64)

    def transformed(image: Tensor, theta: Tensor) -> Tensor:
        grid = F.affine_grid(theta, (2, 4, 3, 3), align_corners=align)
        return F.grid_sample(image, grid, padding_mode=padding, align_corners=align)

    previous = None
    for eps in (0.0, 1e-3, 0.05):
        boxes = xb.Interval.linf(IMAGE, eps), xb.Interval.linf(theta, eps)
        bounds = xb.bound(transformed)(*boxes)
        for seed in range(20):
            value = transformed(*(sample(box, seed, corners=seed % 2 == 0) for box in boxes))
            assert ((bounds.lower - 1e-12 <= value) & (value <= bounds.upper + 1e-12)).all()
        assert eps or bounds.rad.max() < 1e-12
        assert previous is None or (bounds.rad > previous).all()
        previous = bounds.rad
    with pytest.raises(xb.UnsupportedOperatorError, match="gradient through its grid"):
        xb.bound(lambda t: torch.autograd.grad(transformed(IMAGE, t.requires_grad_()).sum(), t)[0])(boxes[1])


@pytest.mark.parametrize(("mode", "sound"), [("bicubic", False), ("nearest", True)])
def test_sampling_that_is_refused(mode: str, sound: bool) -> None:
    with pytest.raises(xb.UnsupportedOperatorError, match="use mode='bilinear'"):
        xb.bound(lambda x: F.grid_sample(x, GRID, mode, align_corners=False), sound=sound)(xb.Interval.linf(IMAGE, 0.1))


def test_embeddings_in_a_box_have_gradients() -> None:
    def gradient(table: Tensor) -> Tensor:
        table = table.detach().requires_grad_()
        return torch.autograd.grad(F.embedding(ROWS, table).tanh().sum(), table)[0]

    box = xb.Interval.linf(X, 0.1)
    bounds = xb.bound(gradient)(box)
    for seed in range(10):
        value = gradient(sample(box, seed, corners=True))
        assert ((bounds.lower - 1e-12 <= value) & (value <= bounds.upper + 1e-12)).all()


def test_conversions_to_another_precision() -> None:
    """To nearest for now: off by the rounding of the narrower type."""
    for fn in (lambda x: x.float(), lambda x: x.float().double() * 2):
        bounds, value = xb.bound(fn)(BOX), fn(X)
        assert bounds.dtype == bounds.rad.dtype == value.dtype
        assert (bounds.mid - value).abs().max() < 1e-6 and (bounds.rad - 0.3).min() > -1e-6


def test_sets_become_whole_numbers_and_truth_values() -> None:
    """A number is cut off towards 0; beyond the range, and in the small integer types, it would wrap around."""
    wide = xb.Interval.of(torch.tensor([-2.5, 0.2, 3.9, 1e20]), torch.tensor([1.0, 0.5, 0.05, 0.0]))
    whole = xb.bound(lambda x: x.long() * 1.0)(wide)
    assert whole.lower[:3].tolist() == [-3, 0, 3] and whole.upper[:3].tolist() == [-1, 0, 3]
    assert whole.rad[3].isinf()
    truth = xb.bound(lambda x: x.to(torch.bool) * 1.0)(wide)
    assert truth.lower.tolist() == [1, 0, 1, 1] and truth.upper.tolist() == [1, 1, 1, 1]
    count = xb.bound(lambda x: (x > 0).long().sum() * 1.0)(wide)
    assert (count.lower.item(), count.upper.item()) == (2, 3)
    for fn in (lambda x: x.to(torch.uint8), lambda x: torch.zeros(3, 4, dtype=torch.int64).copy_(x)):
        with pytest.raises(xb.UnsupportedOperatorError):
            xb.bound(fn)(BOX)
