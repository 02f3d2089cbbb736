"""Normalisation: with running statistics, and with a sample's own (layer, group, instance norm); variances."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyxai_bounds as xb
from pyxai_bounds import rounding
from pyxai_bounds.rules import standardise
from tests.networks import sample
from tests.rules.cases import Case, case_id, check, rand

aten = torch.ops.aten

MEAN, SCALE, SHIFT = rand(3, seed=1), rand(3, seed=2), rand(3, seed=3)
VARIANCE = rand(3, seed=4).square() + 0.1
WEIGHT = rand(3, 3, 3, 3, seed=5)
VOLUME = rand(1, 3, 2, 3, 2)
GAIN, OFFSET, MIX = rand(6, seed=6), rand(6, seed=7), rand(6, 6, seed=8)


def scale_gradient(x: Tensor) -> Tensor:
    with torch.enable_grad():
        scale = SCALE.clone().requires_grad_()
        loss = F.batch_norm(x, MEAN, VARIANCE, scale, SHIFT).tanh().sum()
        return torch.autograd.grad(loss, scale, create_graph=True)[0]


def root_mean_square(x: Tensor) -> Tensor:
    """As the transformers library writes it."""
    return GAIN * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def layer_norm(x: Tensor) -> Tensor:
    """As it is written by hand, with the mean taken off twice."""
    variance = (x - x.mean(-1, keepdim=True)).pow(2).mean(-1, keepdim=True)
    return GAIN * (x - x.mean(-1, keepdim=True)) / torch.sqrt(variance + 1e-6) + OFFSET


def batch_norm(x: Tensor) -> Tensor:
    return F.batch_norm(x, MEAN, VARIANCE, SCALE, SHIFT)


def module(dimensions: int, affine: bool) -> nn.Module:
    """A module whose parameters need gradients, as in a network."""
    kind = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dimensions]
    norm = kind(3, affine=affine).double().eval()
    norm.running_mean.copy_(MEAN)
    norm.running_var.copy_(VARIANCE)
    if affine:
        norm.weight.data.copy_(SCALE)
        norm.bias.data.copy_(SHIFT)
    return norm


CASES = [
    Case("gradient of the scale", lambda x: scale_gradient(x), rand(2, 3, 4, 5), eps=0.1, gradient=False),
    Case("functional", batch_norm, rand(2, 3, 4, 5)),
    Case("no affine", lambda x: F.batch_norm(x, MEAN, VARIANCE), rand(2, 3, 4, 5)),
    Case("scale without shift", lambda x: F.batch_norm(x, MEAN, VARIANCE, SCALE), rand(2, 3, 4, 5)),
    Case("shift without scale", lambda x: F.batch_norm(x, MEAN, VARIANCE, None, SHIFT), rand(2, 3, 4, 5)),
    Case("large eps", lambda x: F.batch_norm(x, MEAN, VARIANCE, SCALE, SHIFT, eps=0.5), rand(2, 3, 4, 5)),
    Case("matrix", batch_norm, rand(4, 3)),
    Case("1d", batch_norm, rand(2, 3, 5)),
    Case("3d", batch_norm, VOLUME),
    Case("channels-last", batch_norm, rand(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)),
    Case("channels-last 3d", batch_norm, VOLUME.contiguous(memory_format=torch.channels_last_3d)),
    Case("permuted", lambda x: batch_norm(x.permute(0, 3, 1, 2)), rand(2, 4, 5, 3)),
    Case("after a convolution", lambda x: batch_norm(F.conv2d(x, WEIGHT, SHIFT)), rand(2, 3, 4, 5)),
    Case("between convolutions", lambda x: F.conv2d(batch_norm(F.conv2d(x, WEIGHT)), WEIGHT), rand(1, 3, 6, 6)),
    Case("after a linear layer", lambda x: batch_norm(F.linear(x, WEIGHT[0, 0], SHIFT)), rand(4, 3)),
    Case("then ReLU", lambda x: F.relu(batch_norm(F.conv2d(x, WEIGHT))), rand(2, 3, 4, 5)),
    Case("without the training flag", lambda x: aten._native_batch_norm_legit_no_training(
        x, SCALE, SHIFT, MEAN, VARIANCE, 0.1, 1e-5)[0], rand(2, 3, 4, 5)),
    *(
        Case(f"module {dimensions}d, affine={affine}", module(dimensions, affine), rand(2, 3, *[3] * dimensions))
        for dimensions in (1, 2, 3)
        for affine in (True, False)
    ),
    Case("layer norm", lambda x: F.layer_norm(x, (6,), GAIN, OFFSET), rand(3, 6), eps=0.1),
    Case("layer norm without weights", lambda x: F.layer_norm(x, (6,)), rand(2, 2, 6), eps=0.02),
    Case("layer norm, scale without shift", lambda x: F.layer_norm(x, (6,), GAIN), rand(3, 6), eps=0.1),
    Case("layer norm over two dimensions", lambda x: F.layer_norm(x, (3, 2), GAIN.view(3, 2)), rand(2, 3, 2)),
    Case("layer norm of everything", lambda x: F.layer_norm(x, (3, 2)), rand(3, 2)),
    Case("layer norm of one number", lambda x: F.layer_norm(x, (1,), GAIN[:1], OFFSET[:1]), rand(3, 1)),
    Case("layer norm of two numbers", lambda x: F.layer_norm(x, (2,)), rand(5, 2)),
    Case("layer norm, large eps", lambda x: F.layer_norm(x, (6,), GAIN, eps=0.5), rand(3, 6)),
    Case("layer norm of channels", lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (6,), GAIN, OFFSET).permute(
        0, 3, 1, 2), rand(2, 6, 2, 2), eps=0.1),
    Case("layer norm, module", nn.LayerNorm(6).double(), rand(3, 6), eps=0.1),
    Case("layer norm between layers", lambda x: F.linear(F.layer_norm(F.linear(x, MIX), (6,), GAIN, OFFSET), MIX),
         rand(3, 6), eps=0.05),
    Case("layer norm, residual", lambda x: x + F.layer_norm(x, (6,), GAIN), rand(3, 6), eps=0.05),
    Case("group norm", lambda x: F.group_norm(x, 2, GAIN, OFFSET), rand(2, 6, 2, 3), eps=0.1),
    Case("group norm without weights", lambda x: F.group_norm(x, 3), rand(2, 6, 4), eps=0.1),
    Case("group norm of one group", lambda x: F.group_norm(x, 1, GAIN), rand(2, 6, 2, 2), eps=0.1),
    Case("group norm of pairs", lambda x: F.group_norm(x, 3, GAIN), rand(4, 6)),
    Case("instance norm", lambda x: F.instance_norm(x, weight=SCALE, bias=SHIFT), rand(2, 3, 3, 2), eps=0.1),
    Case("instance norm, 1d", nn.InstanceNorm1d(3).double().eval(), rand(2, 3, 5), eps=0.1),
    Case("instance norm, module", nn.InstanceNorm2d(3, affine=True).double().eval(), rand(1, 3, 3, 2), eps=0.1),
    Case("instance norm, running statistics", nn.InstanceNorm2d(3, track_running_stats=True).double().eval(),
         rand(2, 3, 2, 2)),
    Case("rms norm", lambda x: F.rms_norm(x, (6,), GAIN), rand(3, 6), eps=0.1),
    Case("rms norm over two dimensions", lambda x: F.rms_norm(x, (3, 2), eps=0.1), rand(2, 3, 2), eps=0.5),
    Case("rms norm by hand, residual", lambda x: x + F.linear(root_mean_square(F.linear(x, MIX)), MIX), rand(3, 6),
         eps=0.1),
    Case("rms norm, used twice", lambda x: x * root_mean_square(x) + root_mean_square(x * x), rand(3, 6), eps=0.1),
    Case("rms norm of products", lambda x: x * torch.rsqrt((x * x).mean((0, 1), True) + 1e-3), rand(3, 6), eps=0.1),
    Case("layer norm by hand", lambda x: layer_norm(x) @ MIX, rand(3, 6), eps=0.1),
    Case("less the mean", lambda x: x - x.mean((1, 2), keepdim=True), rand(2, 3, 2)),
    Case("variance", lambda x: x.var(1), rand(3, 6)),
    Case("variance of everything", lambda x: x.var(correction=0), rand(3, 6)),
    Case("variance over dimensions, kept", lambda x: x.var((0, 2), keepdim=True), rand(2, 3, 4)),
    Case("standard deviation", lambda x: x.std(-1, keepdim=True), rand(3, 6), kinks=False, finite=False, eps=0.1),
    Case("variance and mean", lambda x: sum(torch.var_mean(x, 1, correction=0)), rand(3, 6)),
]  # fmt: skip

# x is used twice, or the rows are ±1 but for eps, whose slope vanishes beside the second order.
_NOT_FIRST_ORDER = (
    "layer norm between layers", "layer norm, residual", "variance and mean", "layer norm of two numbers",
    "group norm of pairs", "rms norm by hand, residual", "rms norm, used twice", "rms norm of products",
    "layer norm by hand",
)  # fmt: skip
OWN = CASES[[case.name for case in CASES].index("layer norm") :]
FIRST_ORDER = [case for case in OWN if case.name not in _NOT_FIRST_ORDER]


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_against_autograd(case: Case) -> None:
    check(case)


def test_bounds_are_exact() -> None:
    """One factor per channel: the ends of the box become the ends of the image."""
    box = xb.Interval.linf(rand(2, 3, 4, 5), 0.3)
    bounds = xb.bound(batch_norm)(box)
    ends = torch.stack((batch_norm(box.lower), batch_norm(box.upper)))
    assert torch.allclose(bounds.lower, ends.min(0).values, atol=1e-12, rtol=0)
    assert torch.allclose(bounds.upper, ends.max(0).values, atol=1e-12, rtol=0)


@pytest.mark.parametrize("argument", range(4))
def test_nan_in_the_parameters_never_gives_finite_bounds(argument: int) -> None:
    parameters = [MEAN.clone(), VARIANCE.clone(), SCALE.clone(), SHIFT.clone()]
    parameters[argument][1] = float("nan")
    bounds = xb.bound(lambda x: F.batch_norm(x, *parameters))(xb.Interval.linf(rand(2, 3, 4), 0.1))
    assert not bounds.isfinite()[:, 1].any() and bounds.isfinite()[:, [0, 2]].all()


# --- a sample's own statistics ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FIRST_ORDER, ids=case_id)
def test_narrow_boxes_are_bounded_to_first_order(case: Case) -> None:
    """As the box shrinks, the width tends to Σ|∂y/∂x|·r: no bound that is sound for all small boxes is narrower."""
    radius = 1e-6 * rand(*case.x.shape, seed=9).abs()
    bounds = xb.bound(case.fn)(xb.Interval.of(case.x, radius))
    jacobian = torch.autograd.functional.jacobian(case.fn, case.x).reshape(bounds.mid.numel(), -1)
    exact = (jacobian.abs() @ radius.flatten()).reshape(bounds.shape)
    assert (bounds.rad <= 1.001 * exact + 1e-12).all()
    assert (bounds.rad >= exact * (1 - 1e-3) - 1e-12).all()


@pytest.mark.parametrize("count", [2, 3, 5, 40])
def test_standardised_rows_never_leave_what_any_row_can_reach(count: int) -> None:
    """|y| ≤ √(N − 1), whatever the box; and boxes that leave no doubt about the spread are not clipped there."""
    x = rand(4, count)
    for eps in (1e-3, 0.1, 1.0, 1e3, 1e9):
        bounds = xb.bound(lambda x: F.layer_norm(x, (count,)))(xb.Interval.linf(x, eps))
        assert (bounds.upper.maximum(-bounds.lower) <= (count - 1) ** 0.5 * (1 + 1e-12)).all()
        if eps < 0.1:
            assert bounds.rad.max() < 0.2 * (count - 1) ** 0.5


def test_by_brute_force_the_bounds_of_wide_boxes_are_not_far_off() -> None:
    """Against the best of many attacked points: within a factor of two, where quotients of ranges are at five."""
    x = rand(1, 6)
    for eps in (0.05, 0.2, 0.5):
        box = xb.Interval.linf(x, eps)
        bounds = xb.bound(lambda x: F.layer_norm(x, (6,)))(box)
        corners = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)] * 6)
        values = F.layer_norm(x + eps * corners, (6,))
        width = values.max(0).values - values.min(0).values
        assert (bounds.width[0] >= width).all()
        assert (bounds.width[0] <= 2 * width).all()


@pytest.mark.parametrize("seed", range(5))
def test_the_backward_side_of_wide_boxes(seed: int) -> None:
    """A set of gradients through a set of rows, of many widths, against samples and corners."""

    def fn(x: Tensor, g: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad((F.layer_norm(x, (5,), GAIN[:5]) * g).sum(), x)[0]

    x, g = (
        xb.Interval.linf(rand(4, 5, seed=seed), 10.0 ** -(seed - 1)),
        xb.Interval.linf(rand(4, 5, seed=9), 0.1 * seed),
    )
    bounds = xb.bound(fn)(x, g)
    for draw in range(200):
        value = fn(sample(x, draw, draw % 2 == 0), sample(g, draw + 1, draw % 3 == 0))
        assert (bounds.lower <= value + 1e-12).all() and (bounds.upper >= value - 1e-12).all()
    norm = (GAIN[:5] * (g.mid.abs() + g.rad)).norm(dim=1, keepdim=True) / 1e-5**0.5
    assert (bounds.rad <= norm * (1 + 1e-9)).all()


@pytest.mark.parametrize("sound", [False, True])
def test_the_backward_side_lies_in_the_slopes_bound_and_in_the_gradients_length_both(sound: bool) -> None:
    """Whichever of two bounds is narrower, an end of the other may cut it: a part of a set then had wider bounds."""
    with rounding.use(rounding.choose(sound, "real")):
        for seed in range(20):
            x, c = rand(3, 6, seed=seed), rand(3, 6, seed=seed + 50)
            rad, spread = 0.3 * rand(3, 6, seed=seed + 100).abs(), 0.3 * rand(3, 6, seed=seed + 150).abs()
            rows = standardise.standardised(xb.Interval.of(x, rad), 1e-5)
            found = [
                standardise.standardised_backward(xb.Interval.of(c, share * spread), rows.value, rows.inverse, True)
                for share in (1.0, 0.9, 0.5, 0.0)
            ]
            for wide, part in itertools.pairwise(found):
                tolerance = 1e-9 * (wide.mid.abs() + wide.rad)
                assert (part.lower >= wide.lower - tolerance).all() and (part.upper <= wide.upper + tolerance).all()


@pytest.mark.filterwarnings("error")
def test_rows_in_any_memory_order_are_sorted_without_a_warning() -> None:
    """Torch warns of a copy that it makes itself, once a process unless told otherwise."""
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        rows = xb.Interval.of(rand(6, 4).T, rand(6, 4, seed=1).abs().T)
        done = standardise.standardised(rows, 1e-5)
        standardise.standardised_backward(rows, done.value, done.inverse, True)
    finally:
        torch.set_warn_always(always)


@pytest.mark.parametrize("sound", [False, True])
def test_an_rms_norm_is_one_function_of_its_rows(sound: bool) -> None:
    """Whatever the box: rows no longer than √N, whose gradients are the upstream's divided by √eps at most. So stacks
    of such layers (T5, Llama) have bounds where quotients of ranges overflow; both terms of a gradient are one set.
    """

    def fn(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            out = root_mean_square(x)
            return out, x + torch.autograd.grad((out * g).sum(), x)[0]

    for eps in (1e-3, 0.2, 3.0, 1e4):
        x, g = xb.Interval.linf(rand(4, 6), eps), xb.Interval.linf(rand(4, 6, seed=1), 0.1)
        bounds = xb.bound(fn, sound=sound)(x, g)
        for draw in range(100):
            found = fn(sample(x, draw, draw % 2 == 0), sample(g, draw + 1, draw % 3 == 0))
            for b, value in zip(bounds, found, strict=True):
                assert (b.lower <= value + 1e-12).all() and (b.upper >= value - 1e-12).all()
        out, gradient = bounds
        assert (out.mid.abs() + out.rad <= GAIN.abs() * 6**0.5 * (1 + 1e-12)).all()
        steepest = (GAIN * (g.mid.abs() + g.rad)).norm(dim=1, keepdim=True) * 1e3
        assert (gradient.rad <= x.rad + steepest * (1 + 1e-9)).all()
        if eps == 1e-3:
            jacobian = torch.func.vmap(torch.func.jacrev(root_mean_square))(x.mid).abs()
            assert (out.rad <= 1.02 * eps * jacobian.sum(2)).all()


@pytest.mark.parametrize("sound", [False, True])
@pytest.mark.parametrize("count", [1, 4])
def test_without_eps_a_row_that_may_be_constant_has_no_bound(count: int, sound: bool) -> None:
    """0/0 is no number. A row that cannot be constant keeps its bounds."""
    x = torch.stack((torch.ones(count), torch.linspace(-3, 3, count))).double()
    bounds = xb.bound(lambda x: F.layer_norm(x, (count,), eps=0.0), sound=sound)(xb.Interval.linf(x, 0.1))
    assert not bounds.isfinite()[0].any() and (count == 1 or bounds.isfinite()[1].all())


def test_gradients_of_weight_and_bias() -> None:
    layers = [nn.LayerNorm(6).double(), nn.GroupNorm(2, 6).double()]
    for layer, x in zip(layers, (rand(3, 6), rand(2, 6, 4)), strict=True):

        def fn(x: Tensor, layer: nn.Module = layer) -> tuple[Tensor, ...]:
            return torch.autograd.grad(layer(x).tanh().sum(), list(layer.parameters()))

        box = xb.Interval.linf(x, 0.05)
        bounds = xb.bound(fn)(box)
        for seed in range(30):
            for b, value in zip(bounds, fn(sample(box, seed, corners=seed % 2 == 0)), strict=True):
                assert b.contains(value).all()
        for b, value in zip(xb.bound(fn)(xb.Interval.point(x)), fn(x), strict=True):
            assert (b.mid - value).abs().max() < 1e-12 and b.rad.max() < 1e-12


def test_boxes_of_weights_too() -> None:
    layer = nn.LayerNorm(6).double()
    box = xb.Interval.linf(rand(3, 6), 0.05)
    bounds = xb.bound(layer, parameters=xb.parameter_box(layer, absolute=0.1, include="*"))(box)
    for seed in range(30):
        weight, bias = (p + 0.1 * rand(6, seed=seed).sign() for p in (layer.weight, layer.bias))
        assert bounds.contains(F.layer_norm(sample(box, seed, corners=True), (6,), weight, bias)).all()


def test_variance_needs_more_numbers_than_its_correction() -> None:
    with pytest.raises(xb.UnsupportedOperatorError, match="divides by 0"):
        xb.bound(lambda x: x.var(1))(xb.Interval.linf(rand(3, 1), 0.1))


def test_statistics_of_a_sample_as_float32_computes_them_are_refused() -> None:
    bounded = xb.bound(F.instance_norm, sound=True, semantics="float32")
    with pytest.raises(xb.UnsupportedOperatorError, match="float32 evaluations"):
        bounded(xb.Interval.point(torch.rand(1, 4, 5, 5)))


def test_second_derivatives_of_a_layer_norms_bounds() -> None:
    """A midpoint that is the centre's own lies 0 away from it: of a norm of 0 PyTorch's second derivative is NaN."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.LayerNorm(6), nn.Linear(6, 3)).double()
    box = xb.Interval.linf(torch.randn(2, 4, dtype=torch.float64), 0.02)
    bounded = xb.bound(xb.explain.gradient(model))
    weight = model[0].weight
    direction = torch.randn_like(weight)

    def slope() -> torch.Tensor:
        bounds = bounded(box, torch.tensor([0, 2]))
        (first,) = torch.autograd.grad((bounds.mid + bounds.rad).square().sum(), weight, create_graph=True)
        return first.square().sum()

    (second,) = torch.autograd.grad(slope(), weight)
    values = []
    for step in (1e-6, -2e-6):
        with torch.no_grad():
            weight += step * direction
        values.append(slope().item())
    difference = (values[0] - values[1]) / 2e-6
    assert (second * direction).sum().item() == pytest.approx(difference, rel=1e-4)


def test_running_statistics_that_the_program_computes_are_refused() -> None:
    """In proofs they are sets, by what computing them rounds."""
    v, box = torch.ones(3, dtype=torch.float64), xb.Interval.linf(rand(2, 3, 4, 4, seed=9), 0.1)

    def normal(x: Tensor) -> Tensor:
        return F.batch_norm(x, torch.zeros_like(v), v.abs() + 0.1)

    assert xb.bound(normal)(box).isfinite().all()
    with pytest.raises(xb.UnsupportedOperatorError, match="running statistics that the program computes"):
        xb.bound(normal, sound=True)(box)
