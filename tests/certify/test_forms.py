"""Affine forms: they hold for every input with the symbols that they claim, cut bounds down, and certify more."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pyxai_bounds as xb
from pyxai_bounds import rounding as rd
from pyxai_bounds.certify import certificate, forms
from pyxai_bounds.certify.affine import Evaluator, linear
from pyxai_bounds.certify.affine import form as arithmetic
from pyxai_bounds.certify.forms import Forms
from pyxai_bounds.program import captured_graph
from tests.certify.test_differences import NETWORKS
from tests.networks import images, mlp, sample


def evaluated(fn, box: xb.Interval, *arguments: Tensor, sound: bool = True) -> tuple[xb.Interval, forms.Form]:
    """Bounds of one sample by forms, and the form of its explanation."""
    mode = rd.choose(sound, "real")
    found = Forms.of(captured_graph(fn, box.mid, *arguments).graph, mode, "rump", cheaply=False)
    return found(box, [arguments])


def assert_holds(fn, box: xb.Interval, *arguments: Tensor, points: int = 30, slack: float = 1e-12) -> float:
    """At points of the box: what the symbols of the input do not explain, the others and the slack must allow.

    ``fn`` works in float64. Returns how much of the reach the symbols of the input explain.
    """
    bounds, form = evaluated(fn, box, *arguments)
    plain = xb.bound(fn, sound=True)(box, *arguments)
    assert (bounds.rad <= plain.rad * (1 + 1e-12)).all()
    inputs = int((box.rad > 0).sum())
    known, others = form.generators[:inputs], form.generators[inputs:]
    known = torch.cat([known, known.new_zeros(inputs - len(known), *bounds.shape)])
    room = others.abs().sum(0) + form.slack
    for n in range(points):
        x = sample(box, n, corners=n % 2 == 0)
        value = fn(x, *arguments).detach()
        lost = slack * (1 + value.abs().max())
        assert (bounds.lower - lost <= value).all() and (value <= bounds.upper + lost).all()
        symbols = ((x - box.mid) / box.rad).flatten()[box.rad.flatten() > 0]
        left = value - form.centre - (symbols.reshape(-1, *[1] * value.dim()) * known).sum(0)
        assert (left.abs() <= room + lost).all()
    return float(known.abs().sum() / form.reach.sum().clamp(min=1e-30))


W = torch.linspace(-1, 1, 30, dtype=torch.float64).reshape(5, 6)
K = torch.linspace(-1, 1, 2 * 3 * 9, dtype=torch.float64).reshape(2, 3, 3, 3)

# Functions of x [1, 6], and whether nothing but symbols of the input is left of them.
LINEAR = {
    "mm": lambda x: x @ W.T,
    "addmm": lambda x: torch.addmm(W[0, :5], x, W.T),
    "second factor": lambda x: W @ x.T,
    "bmm": lambda x: torch.bmm(W[None].expand(2, 5, 6), x[..., None].expand(2, 6, 1)),
    "mul": lambda x: x * W[1] * -2.0,
    "div": lambda x: x / W[1] / 2,
    "sub": lambda x: torch.sub(x, x[:, :1], alpha=3) - W[2],
    "from a number": lambda x: 1.5 - x,
    "neg": lambda x: -x,
    "views": lambda x: x.reshape(2, 3).t().unsqueeze(0).transpose(1, 2).expand(4, 2, 3)[:, 1],
    "cat": lambda x: torch.cat([x, W[:1], 2 * x], 1),
    "stack": lambda x: torch.stack([x, x - 1], -1),
    "split": lambda x: x.split(2, 1)[1] - x.split([1, 2, 3], 1)[1] + x.unbind(1)[3],
    "sum": lambda x: x.sum(1, keepdim=True) + x.mean(1, keepdim=True),
    "pad": lambda x: F.pad(x, (1, 2)),
    "convolution": lambda x: F.conv2d(x[:, :3].reshape(1, 3, 1, 1).expand(1, 3, 3, 3), K, W[0, :2]),
    "transposed convolution": lambda x: F.conv_transpose2d(x.reshape(1, 2, 3, 1), K, W[0, :3], stride=2),
    "pool": lambda x: F.avg_pool2d(x.reshape(1, 1, 2, 3), (2, 2), 1),
    "pool of volumes": lambda x: F.avg_pool3d(x.reshape(1, 1, 1, 2, 3), (1, 2, 2), 1, (0, 1, 0)),
    "adaptive pool": lambda x: F.adaptive_avg_pool2d(x.reshape(1, 1, 2, 3), (1, 2)),
    "gradient of a pool": lambda x: torch.ops.aten.avg_pool2d_backward(
        x[:, :2].reshape(1, 1, 1, 2), x.reshape(1, 1, 2, 3), [2, 2], [1, 1], [0, 0], False, True, None
    ),
    "gradient of a pool of volumes": lambda x: torch.ops.aten.avg_pool3d_backward(
        x[:, :2].reshape(1, 1, 1, 1, 2), x.reshape(1, 1, 1, 2, 3), [1, 2, 2], [1, 1, 1], [0, 0, 0], False, True, None
    ),
    "gradient of an adaptive pool": lambda x: torch.ops.aten._adaptive_avg_pool2d_backward(
        x[:, :2].reshape(1, 1, 1, 2), x.reshape(1, 1, 2, 3)
    ),
    "copies": lambda x: x.t().contiguous().clone().t().detach(),
}
OTHERS = {
    "scaled addmm": lambda x: torch.addmm(W[0, :5], x, W.T, beta=2.0, alpha=3.0),
    "pad with a number": lambda x: F.pad(x, (1, 2), value=3.0),
    "relu": lambda x: F.relu(x @ W.T) @ W,
    "product": lambda x: (x @ W.T) * (x[:, :5] + 1),
    "square": lambda x: x * x,
    "product of unlike shapes": lambda x: x[:, :, None] * x[:, None, :],
    "attention": lambda x: (x.reshape(1, 2, 3) @ x.reshape(1, 3, 2)).softmax(-1) @ x.reshape(1, 2, 3),
    "matrix of itself": lambda x: x.T @ x @ W.T @ W,
    "moving bias": lambda x: torch.addmm(x[0, :5], x, W.T) + torch.addmm(x[0, :1], x, x.T),
    "moving kernel": lambda x: F.conv2d(x.reshape(1, 1, 2, 3), x[:, :4].reshape(2, 1, 1, 2), x[0, :2], padding=1),
    "maximum": lambda x: x.amax(1) - x,
    "maximum of rows": lambda x: (x @ W.T @ W).reshape(2, 3).amax(1, keepdim=True) @ W[:1, :1],
    "max pool": lambda x: F.max_pool2d(x.reshape(1, 1, 2, 3), 2, 1),
    "max pool with a margin": lambda x: F.max_pool2d((x @ W.T @ W).reshape(1, 1, 2, 3), 2, 1, padding=1) * 2,
    "max pool of volumes": lambda x: F.max_pool3d(x.reshape(1, 1, 1, 2, 3), (1, 2, 2), (1, 1, 1)),
    "adaptive max pool": lambda x: F.adaptive_max_pool2d((x @ W.T @ W).reshape(1, 2, 1, 3), (1, 2)),
    "ties": lambda x: F.max_pool2d((x[:, [0, 0, 0, 1, 1, 1]] * 1.0).reshape(1, 1, 2, 3), 2, 1),
    "layer norm of constants": lambda x: F.layer_norm(x * 1e-9 + 0.3, (6,)),
    "affine layer norm": lambda x: F.layer_norm((x @ W.T @ W).reshape(2, 3), (3,), W[0, :3], W[1, :3]) @ W[:3],
    "group norm": lambda x: F.group_norm((x @ W.T @ W).reshape(1, 2, 3), 1, W[0, :2], W[1, :2]),
    "tanh": lambda x: x.tanh() @ W.T,
    "sigmoid": lambda x: x.sigmoid() @ W.T,
    "gelu": lambda x: F.gelu(x) @ W.T,
    "gelu by tanh": lambda x: F.gelu(x, approximate="tanh") @ W.T,
    "silu": lambda x: F.silu(x) @ W.T,
    "exp and log": lambda x: x.exp() - (x + 2).log(),
    "roots": lambda x: (x + 2).sqrt() - (x + 2).rsqrt(),
    "powers": lambda x: x**2 - x**3 + (x + 2) ** 1.5 + (x + 2) ** -2,
    "quotient": lambda x: x / (x[:, :1] + 2) + 1 / (x - 4) + (x + 3).reciprocal(),
    "quotient of unlike shapes": lambda x: x[:, :, None] / (x[:, None, :] + 3),
    "magnitude": lambda x: x.abs() @ W.T,
    "clamps": lambda x: x.clamp(0.2, 1.0) + F.relu6(4 * x) + F.hardtanh(x) + x.clamp(min=0.3) + x.clamp(max=0.4),
    "elu": lambda x: (F.elu(x - 0.5) + F.elu(x - 0.5, 0.3) + F.elu(x, 2.0) + F.celu(x - 0.4, 0.7)) @ W.T,
    "softplus": lambda x: (F.softplus(x) + F.softplus(x, 2.0) + F.softplus(9 * x, 1.0, 5)) @ W.T,
    "leaky relu": lambda x: F.leaky_relu(x, 0.2) @ W.T,
    "softmax": lambda x: (3 * x @ W.T).softmax(1) @ W,
    "softmax of columns": lambda x: (5 * x.reshape(3, 2)).softmax(0).reshape(1, 6),
    "softmax of one": lambda x: x.reshape(6, 1).softmax(1) + x.reshape(6, 1),
    "log softmax": lambda x: (3 * x @ W.T).log_softmax(-1),
    "far apart": lambda x: (300 * x @ W.T).softmax(1) + (300 * x @ W.T).log_softmax(1),
    "masked softmax": lambda x: x.masked_fill(torch.arange(6) > 3, -math.inf).softmax(1),
    "comparison": lambda x: torch.where(x > 0.5, x, -x),
    "norm": lambda x: F.layer_norm(x, (6,)) @ W.T,
}


@pytest.mark.parametrize("name", [*LINEAR, *OTHERS])
def test_of_operators_they_hold_with_the_symbols_of_the_input(name: str) -> None:
    for eps in (1e-6, 0.05, 0.7):
        explained = assert_holds({**LINEAR, **OTHERS}[name], xb.Interval.linf(images(1, 3, (6,)) * 2 - 0.5, eps))
        if name in LINEAR:
            assert explained > 1 - 1e-11 / eps


@pytest.mark.parametrize(
    "activation",
    [
        nn.ReLU(),
        nn.Tanh(),
        nn.Sigmoid(),
        nn.GELU(),
        nn.SiLU(),
        nn.LeakyReLU(0.2),
        nn.ELU(),
        nn.Softplus(),
        nn.Hardtanh(),
    ],
    ids=lambda module: type(module).__name__,
)
@pytest.mark.parametrize("of", ["logit", "probability", "loss"])
def test_of_gradients_they_hold(activation: nn.Module, of) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 9), activation, nn.Linear(9, 7), activation, nn.Linear(7, 4)).double()
    for eps in (1e-6, 0.02, 0.3):
        assert_holds(xb.explain.gradient(model, of=of), xb.Interval.linf(images(1, 2, (6,)), eps), torch.tensor([1]))


def pooling(x: Tensor) -> Tensor:
    """Overlapping windows, and ties of windows of zeros."""
    y = F.max_pool2d(F.relu(F.conv2d(x.reshape(1, 1, 6, 6), K[:, :1], padding=1) - 0.4), 3, 2, padding=1)
    return F.max_pool2d(F.conv2d(y, K[:, :2]).tanh(), 1).flatten(1)


def attention(x: Tensor) -> Tensor:
    y = F.layer_norm(x.reshape(2, 3, 6), (6,), W[0] + 2, W[1])
    q, k, v = y @ W.T, y @ W.T.flip(0), y @ W.T.flip(1)
    return F.layer_norm((q @ k.mT).softmax(-1) @ v + q, (5,)).mean(1).sum(0, keepdim=True)


def normed(x: Tensor) -> Tensor:
    y = F.group_norm(x.reshape(1, 4, 3, 3), 2, W[0, :4] + 2, W[1, :4])
    return F.instance_norm(F.gelu(y)).flatten(2).mean(-1) + y.flatten(2).amax(-1)


@pytest.mark.parametrize("fn", [pooling, attention, normed])
@pytest.mark.parametrize("of", ["logit", "probability"])
def test_of_gradients_through_pools_products_and_norms_they_hold(fn, of) -> None:
    for eps in (1e-6, 0.003, 0.1):
        box = xb.Interval.linf(images(1, 5, (36,)) * (images(1, 6, (36,)) > 0.3), eps)
        assert_holds(xb.explain.gradient(fn, of=of), box, torch.tensor([1]), points=16)


def test_the_certain_winner_of_a_pool_is_copied_and_of_two_one_gets_the_gradient() -> None:
    x = torch.tensor([[[[0.0, 5.0], [1.0, 2.0]]]]).double()
    form = evaluated(lambda x: F.max_pool2d(x, 2), xb.Interval.linf(x, 0.5))[1]
    assert torch.equal(form.generators.flatten(), torch.tensor([0.0, 0.5, 0.0, 0.0]).double())
    assert float(form.centre) == 5 and float(form.slack) < 1e-13

    def gradient(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(F.max_pool2d(x, 2).sum() * 3, x, create_graph=True)[0].sum((2, 3))

    tied = xb.Interval.linf(x + torch.tensor([[4.8, 0.0], [0.0, 0.0]]).double(), 0.5)
    assert float(evaluated(gradient, tied)[0].rad) < 1e-12 and float(xb.bound(gradient)(tied).rad) > 1


SMOOTH = {
    "exp": lambda x: x.exp(),
    "log": lambda x: (x + 2).log(),
    "rsqrt": lambda x: (x + 2).rsqrt(),
    "power": lambda x: (x + 2) ** 1.5,
    "quotient": lambda x: x / (x[:, :1] + 2),
    "tanh": lambda x: x.tanh(),
    "sigmoid": lambda x: x.sigmoid(),
    "softmax": lambda x: (3 * x @ W.T).softmax(1),
    "log softmax": lambda x: (3 * x @ W.T).log_softmax(1),
    "attention": lambda x: (x.reshape(1, 2, 3) @ x.reshape(1, 3, 2)).softmax(-1) @ x.reshape(1, 2, 3),
    "norm": lambda x: F.layer_norm(x, (6,)) @ W.T,
    **{
        f"gradient through {name} of {of}": lambda x, name=name, of=of: xb.explain.gradient(
            lambda x: getattr(F, name)(x @ W.T) @ W[:, :3], of=of
        )(x, torch.tensor([1]))
        for name in ("tanh", "sigmoid", "gelu", "silu", "softplus")
        for of in ("logit", "probability", "loss")
    },
}


@pytest.mark.parametrize("name", SMOOTH)
def test_of_smooth_functions_all_but_the_square_of_the_radius_is_explained(name: str) -> None:
    """Symbols of the input leave a share that falls with the radius: they hold the derivative."""
    x, left = images(1, 3, (6,)) * 2 - 0.5, []
    for eps in (1e-2, 1e-3):
        form = evaluated(SMOOTH[name], xb.Interval.linf(x, eps))[1]
        left.append(1 - float(form.generators[:6].abs().sum() / form.reach.sum()))
    assert left[0] < 0.5 and left[1] < 0.15 * left[0]


def test_integrated_gradients_of_probabilities_and_losses_hold() -> None:
    for of in ("probability", "loss"):
        fn = xb.explain.integrated_gradients(mlp(), steps=3, of=of)
        for eps in (1e-6, 0.03):
            assert_holds(fn, xb.Interval.linf(images(1, 2, (6,)), eps), torch.tensor([1]), points=10)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("explanation", [xb.explain.gradient, xb.explain.gradient_x_input, xb.explain.saliency])
def test_of_networks_they_hold(name: str, explanation) -> None:
    make, shape = NETWORKS[name]
    for seed, eps in ((0, 0.002), (1, 0.1)):
        box = xb.Interval.linf(images(1, seed, shape), eps, clip=(0.0, 1.0))
        assert_holds(explanation(make(seed)), box, torch.tensor([seed]), points=10)


def test_what_cancels_is_exactly_zero_but_for_rounding() -> None:
    box = xb.Interval.linf(images(1, 0, (6,)), 0.3)

    def nothing(x: Tensor) -> Tensor:
        y = x @ W.T
        return y @ W - (y + 1) @ W + W.sum(0)

    assert float(evaluated(nothing, box)[0].rad.max()) < 1e-11 < float(xb.bound(nothing)(box).rad.min())


def test_numbers_with_symbols_keep_to_the_same_input() -> None:
    """x₀ - x₀² at x₀ in [0, 1] needs what moves together: its range is [0, 1/4]."""
    box = xb.Interval(torch.zeros(1, 1).double(), torch.ones(1, 1).double())
    bounds = evaluated(lambda x: x - x * x, box)[0]
    assert float(bounds.rad) <= 0.25 + 1e-12 and float(xb.bound(lambda x: x - x * x)(box).rad) >= 0.75


def exactly(t: Tensor) -> np.ndarray:
    """As fractions."""
    return np.vectorize(Fraction, otypes=[object])(t.double().numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_is_covered_in_exact_arithmetic(dtype: torch.dtype) -> None:
    """Sums that cancel to 1e-16 of their terms and less, at corners, in fractions."""
    torch.manual_seed(0)
    for scale in (1.0, 1e8, 1e-150 if dtype == torch.float64 else 1e-18):
        a, b, x = (torch.randn(*s, dtype=dtype) for s in ((4, 6), (5, 4), (1, 6)))
        a[:, 3:] = -a[:, :3] * (1 + 1e-7)
        a = a * scale
        box = xb.Interval.of(x, x.abs() * 1e-6)

        def fn(x: Tensor, a: Tensor = a, b: Tensor = b) -> Tensor:
            y = x @ a.T
            return (y @ b.T - 3 * y[:, :1]) * y[:, 1:2]

        bounds, form = evaluated(fn, box)
        for _ in range(8):
            signs = torch.randn(6).sign().to(dtype)
            point = exactly(box.mid[0]) + signs.tolist() * exactly(box.rad[0])
            y = exactly(a) @ point
            z = (exactly(b) @ y - 3 * y[0]) * y[1]
            assert (exactly(bounds.lower[0]) <= z).all() and (z <= exactly(bounds.upper[0])).all()
            explained = sum(s * g for s, g in zip(signs.tolist(), exactly(form.generators[:6, 0]), strict=True))
            room = abs(exactly(form.generators[6:, 0])).sum(0) + exactly(form.slack[0])
            assert (abs(z - exactly(form.centre[0]) - explained) <= room).all()


def small_cnn(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(54, 8), nn.ReLU(), nn.Linear(8, 4)),
    )


PROPERTIES = [xb.TopK(3), xb.TopK(2, "signed"), xb.Sign(4), xb.Cosine(0.9), xb.L2(0.05), xb.Linf(0.02)]


@pytest.mark.parametrize("property", PROPERTIES, ids=str)
def test_certificates_are_sharper_and_no_attack_breaks_them(property) -> None:
    x, target = images(6, 1, (1, 8, 8)).float(), torch.arange(6) % 4
    fn = xb.explain.gradient(small_cnn())
    more = 0.0
    for eps in (0.003, 0.01, 0.03):
        options = dict(eps=eps, property=property, clip=(0.0, 1.0))
        plain, sharp = (xb.certify(fn, x, target, sharpen=by, **options) for by in (False, None))
        assert (sharp.holds >= plain.holds).all() and (sharp.margin >= plain.margin).all()
        assert (sharp.bounds.rad <= plain.bounds.rad).all()
        more += float((sharp.margin - plain.margin).sum())
        attack = xb.attack.pgd(fn, x, target, **options)
        assert not (sharp.holds & attack.broken).any()
        double = xb.explain.gradient(copy.deepcopy(small_cnn()).double())
        box = xb.Interval.linf(x, eps, clip=(0.0, 1.0))
        box = xb.Interval.of(box.mid.double(), box.rad.double())
        for n in range(10):
            values = double(sample(box, n, corners=n % 2 == 0).clamp(0, 1), target).detach()
            seen = property.margin(sharp.nominal.double(), xb.Interval.of(values, torch.zeros_like(values)))
            assert (sharp.margin.double() <= seen + 1e-7).all()
    assert more > 0


def test_radii_grow() -> None:
    fn, x, target = xb.explain.gradient(small_cnn()), images(3, 1, (1, 8, 8)).float(), torch.arange(3)
    options = dict(property=xb.TopK(3), max_eps=0.1, tol=1e-3, clip=(0.0, 1.0))
    plain, sharp = (xb.certified_radius(fn, x, target, sharpen=by, **options) for by in (False, None))
    assert (sharp >= plain).all() and (sharp > 1.2 * plain).any()


def test_what_holds_at_the_greatest_radius_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fn, x, target = xb.explain.gradient(small_cnn()), images(3, 1, (1, 8, 8)).float(), torch.arange(3)
    options = dict(property=xb.TopK(3), clip=(0.0, 1.0))
    seen, of_class = [], Forms.__call__

    def noted(self: Forms, box: xb.Interval, points: list, *more: object) -> tuple:
        seen.extend(int(target) for (target,) in points)
        return of_class(self, box, points, *more)

    monkeypatch.setattr(Forms, "__call__", noted)
    last = float(xb.certified_radius(fn, x, target, max_eps=0.1, **options).sort().values[1])
    seen.clear()
    radius = xb.certified_radius(fn, x, target, max_eps=last, tol=last / 100, **options)
    held = radius >= last * (1 - 1e-6)
    assert 0 < held.sum() < 3
    assert max(seen.count(place) for place in range(3) if held[place]) == 1
    assert max(seen.count(place) for place in range(3) if not held[place]) > 1


def test_what_takes_too_much_is_left_and_true_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fn, x, target = xb.explain.gradient(small_cnn()), images(2, 1, (1, 8, 8)).float(), torch.arange(2)

    def margins(sharpen: bool | None, memory: int = 1) -> Tensor:
        options = dict(eps=0.01, property=xb.Sign(), memory_budget=memory)
        return xb.certify(fn, x, target, sharpen=sharpen, **options).margin

    plain, sharp = margins(False), margins(None)
    assert (sharp > plain).any()
    monkeypatch.setattr(forms, "CHEAP", 2**16)
    assert torch.equal(margins(None), plain) and torch.equal(margins(True), sharp)
    monkeypatch.setattr(forms, "LARGEST", 2**14)
    with pytest.warns(RuntimeWarning, match="1 MiB for a sample.* memory_budget="):
        assert torch.equal(margins(True), plain)
    assert torch.equal(margins(True, 2**25), sharp)


def test_what_corners_refute_could_not_be_certified(monkeypatch: pytest.MonkeyPatch) -> None:
    fn, x, target = xb.explain.gradient(small_cnn()), images(8, 1, (1, 8, 8)).float(), torch.arange(8) % 4
    options = dict(eps=0.01, property=xb.TopK(1), clip=(0.0, 1.0))
    some = xb.certify(fn, x, target, **options)
    monkeypatch.setattr(certificate, "CORNERS", 0)
    all_ = xb.certify(fn, x, target, **options)
    assert torch.equal(some.holds, all_.holds) and (some.margin < all_.margin).any()
    assert (all_.margin[some.margin < all_.margin] < 0).all()


def test_where_symbols_run_out_what_is_left_is_slack(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    fn, box = xb.explain.gradient(model), xb.Interval.linf(images(1, 0, (6,)), 0.3)
    full = evaluated(fn, box, torch.tensor([1]))
    monkeypatch.setattr(forms, "LARGEST", 9 * 13)
    assert_holds(fn, box, torch.tensor([1]))
    few = evaluated(fn, box, torch.tensor([1]))
    assert len(few[1].generators) <= 13 < len(full[1].generators)
    assert (full[0].rad.sum() < few[0].rad.sum()).all()


def test_rounding_of_constants_gets_no_symbols() -> None:
    """The last layer's gradient is a constant, which float32 rounds: symbols are those of the input and of ReLUs."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    )
    box = xb.Interval.linf(images(1, 0, (1, 8, 8)).float(), 0.01)
    unstable = sum(int((t.lower < 0).logical_and(t.upper > 0).sum()) for t in (
        xb.bound(lambda x, n=n: model[:n](x))(box) for n in (1, 3)))  # fmt: skip
    form = evaluated(xb.explain.gradient(model), box, torch.tensor([1]))[1]
    assert 0 < unstable < 100 and 64 < len(form.generators) <= 64 + 2 * unstable
    # However small a radius is, the input has its symbols.
    assert len(evaluated(lambda x: x * 2, xb.Interval.linf(torch.ones(1, 5), 1e-7))[1].generators) == 5


def test_blocks_of_generators_are_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    fn = xb.explain.gradient(small_cnn().double())
    box = xb.Interval.linf(images(1, 0, (1, 8, 8)), 0.02)
    whole = evaluated(fn, box, torch.tensor([2]))
    for module in (arithmetic, linear):
        monkeypatch.setattr(module, "BLOCK", 7 * 4 * 8 * 8)
    assert_holds(fn, box, torch.tensor([2]))
    bounds, form = evaluated(fn, box, torch.tensor([2]))
    torch.testing.assert_close(form.generators, whole[1].generators, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(bounds.rad, whole[0].rad, rtol=1e-9, atol=0.0)


def test_forms_are_kept_for_those_who_read_them() -> None:
    """Gates read Intervals: in the backward pass no form of the forward pass takes memory."""
    held: list[bool] = []

    class Watching(Evaluator):
        def _form(self, n, result):
            if n.target is torch.ops.aten.threshold_backward.default:
                held.append(n.args[1] in self.forms)
            return super()._form(n, result)

    box, target = xb.Interval.linf(images(1, 0, (6,)), 0.3), torch.tensor([1])
    graph = captured_graph(xb.explain.gradient(mlp()), box.mid, target).graph
    found = Forms.of(graph, rd.choose(True, "real"), "rump", cheaply=False)
    run = Watching(found.graph, found.most, None)
    bounds = found(box, [[target]], run)[0]
    assert held and not any(held) and len(run.forms) == 1
    assert torch.equal(bounds.rad, evaluated(xb.explain.gradient(mlp()), box, target)[0].rad)


@pytest.mark.parametrize("product", ["rump", "exact"])
def test_movements_of_weights_are_followed(product) -> None:
    """Of layers, kernels and batch norm; at corners of the weights' box and between them bounds hold."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 7), nn.Tanh(), nn.Linear(7, 3)),
    )
    with torch.no_grad():
        nn.init.uniform_(model[1].running_var, 0.5, 2.0)
        nn.init.uniform_(model[1].bias)
    model.eval()
    x, target = images(3, 1, (1, 6, 6)).float(), torch.arange(3)
    fn, parameters = xb.explain.gradient(model), xb.parameter_box(model, relative=0.003)
    for eps in (0.0, 0.004):
        options = dict(eps=eps, parameters=parameters, product=product)
        plain, sharp = (xb.certify(fn, x, target, property=xb.TopK(3), sharpen=by, **options) for by in (False, None))
        # As long as the ranking does not hold, its bounds are made sharper.
        assert (sharp.bounds.rad <= plain.bounds.rad).all() and (sharp.margin >= plain.margin).all()
        assert (sharp.margin > plain.margin).any() and sharp.bounds.rad.sum() < 0.9 * plain.bounds.rad.sum()
        double = copy.deepcopy(model).double()
        box = xb.Interval.linf(x, eps)
        for n in range(20):
            with torch.no_grad():
                for moved, p in zip(double.parameters(), model.parameters(), strict=True):
                    steps = torch.rand(p.shape, generator=torch.Generator().manual_seed(n)).double() * 2 - 1
                    p = p.double()
                    moved.copy_(p + 0.003 * p.abs() * (steps.sign() if n % 2 else steps))
            point = sample(xb.Interval.of(box.mid.double(), box.rad.double()), n, corners=n % 4 < 2)
            value = xb.explain.gradient(double)(point, target).detach()
            lost = 1e-12 * value.abs().max()
            assert (sharp.bounds.lower - lost <= value).all() and (value <= sharp.bounds.upper + lost).all()


def test_functions_that_are_not_of_one_sample_are_left() -> None:
    model, x, target = mlp(), images(4, shape=(6,)), torch.arange(4)

    def mixed(x: Tensor, y: Tensor) -> Tensor:
        return xb.explain.gradient(model)(x, y) * (1.0 if len(x) > 1 else 2.0)

    noise = 0.05 * images(3, 1, (4, 6))

    def noisy(x: Tensor, y: Tensor) -> Tensor:
        return xb.explain.smoothgrad(model)(x, y, noise)

    for fn in (mixed, noisy):
        plain = xb.certify(fn, x, target, eps=0.1, property=xb.Sign(), sharpen=False)
        told = pytest.warns(RuntimeWarning, match=r"fails for one sample alone \(ValueError: noise must have shape")
        with told if fn is noisy else nullcontext():
            sharp = xb.certify(fn, x, target, eps=0.1, property=xb.Sign(), branches=4)
        assert torch.equal(plain.margin, sharp.margin) and torch.equal(plain.bounds.rad, sharp.bounds.rad)


def test_what_belongs_to_a_sample_comes_along_in_target() -> None:
    model, x, rows = mlp((9, 12, 12, 4)), images(6, shape=(6,)), F.one_hot(torch.arange(6) % 3, 3)
    target = torch.cat((torch.arange(6).unsqueeze(1) % 4, rows), 1)

    def fn(x: Tensor, target: Tensor) -> Tensor:
        return xb.explain.gradient(lambda x: model(torch.cat((x, target[:, 1:].to(x)), 1)))(x, target[:, 0])

    plain, sharp = (xb.certify(fn, x, target, eps=0.1, property=xb.Sign(), sharpen=by) for by in (False, True))
    assert (sharp.margin >= plain.margin).all() and (sharp.margin > plain.margin).any()
    assert not (sharp.holds & xb.attack.pgd(fn, x, target, eps=0.1, property=xb.Sign()).broken).any()


MASK = torch.tensor([True, False, True, True, False, True])


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x + 0.1,
        lambda x: 0.1 - x,
        lambda x: torch.sub(x, 0.3, alpha=0.7),
        lambda x: x * 1e-45 + 1e-50,
        lambda x: x * MASK + MASK,
        lambda x: torch.cat([torch.zeros(0, dtype=x.dtype), x]) - x,
        lambda x: x + F.relu(x[:, :0]).sum(1, keepdim=True),
        lambda x: (x * 5).sum(1, keepdim=True, dtype=torch.int64) * 0.1 - x,
        lambda x: torch.ones_like(x),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_truths_and_empty_tensors_are_what_they_are(fn, dtype: torch.dtype) -> None:
    x = images(1, 3, (6,)).to(dtype)
    for eps, sound in ((1e-6, True), (1e-6, False), (0.01, True)):
        box = xb.Interval.linf(x, eps)
        bounds = evaluated(fn, box, sound=sound)[0]
        assert isinstance(bounds, xb.Interval)
        if sound:
            for n in range(6):
                value = fn(sample(xb.Interval.of(box.mid.double(), box.rad.double()), n, corners=n % 2 == 0)).double()
                lost = 1e-15 * value.abs()
                assert (bounds.lower - lost <= value).all() and (value <= bounds.upper + lost).all()


def test_what_reads_a_single_target_is_bounded_for_that_one() -> None:
    """As Captum does: then the function of one sample is captured for its class."""
    model, x, target = mlp(), images(4, 1, (6,)), torch.arange(4)

    def reads(x: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            scores = model(x)
            score = scores[:, y.item()] if y.numel() == 1 else scores.gather(1, y[:, None])
            return torch.autograd.grad(score.sum(), x, create_graph=True)[0]

    for property in (xb.Linf(0.0), xb.TopK(1), xb.Sign(1)):
        for eps in (0.2, 1.0):
            options = dict(eps=eps, property=property)
            plain = xb.certify(xb.explain.gradient(model), x, target, **options)
            read = xb.certify(reads, x, target, **options)
            assert torch.allclose(plain.margin, read.margin, rtol=0, atol=1e-9)


def test_another_function_of_one_sample_is_left_even_if_its_bounds_hold_the_explanation() -> None:
    model, x, target = mlp(), images(4, 1, (6,)), torch.arange(4)

    def halved(x: Tensor, y: Tensor) -> Tensor:
        return xb.explain.gradient(model)(x, y) * (1.0 if len(x) > 1 else 0.5)

    for property in (xb.Linf(0.05), xb.TopK(1)):
        plain, sharp = (xb.certify(halved, x, target, eps=1.0, property=property, sharpen=by) for by in (False, None))
        assert torch.equal(plain.margin, sharp.margin) and torch.equal(plain.bounds.rad, sharp.bounds.rad)


def test_a_property_may_know_its_batch() -> None:
    class Widest:
        strict = True

        def margin(self, nominal: Tensor, bounds: xb.Interval) -> Tensor:
            return torch.tensor([0.1, 0.2, 0.3]).double() - bounds.rad.flatten(1).amax(1)

    fn, x = xb.explain.gradient(mlp()), images(3, 1, (6,))
    plain, sharp = (
        xb.certify(fn, x, torch.arange(3), eps=0.3, property=Widest(), sharpen=by).margin for by in (False, None)
    )
    assert (sharp >= plain).all() and (sharp > plain).any()


def test_what_forms_cannot_do_leaves_the_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self, *arguments):
        raise MemoryError

    fn, x = xb.explain.gradient(mlp()), images(3, 1, (6,))
    options = dict(eps=0.3, property=xb.Linf(0.0))
    plain = xb.certify(fn, x, torch.arange(3), sharpen=False, **options)
    monkeypatch.setattr(Forms, "__call__", fails)
    assert torch.equal(plain.margin, xb.certify(fn, x, torch.arange(3), **options).margin)


def test_many_operators_are_not_cheap() -> None:
    """Neither elementwise ones of many numbers, nor many of few."""

    def elementwise(x: Tensor) -> Tensor:
        return (((x * x).tanh() * x).sigmoid() * x * x).tanh() * x

    def long(x: Tensor) -> Tensor:
        for _ in range(100):
            x = (x + 0.1).tanh()
        return x

    mode = rd.choose(True, "real")
    for fn, x in ((elementwise, torch.zeros(1, 3000)), (long, torch.zeros(1, 2))):
        graph = captured_graph(fn, x).graph
        assert Forms.of(graph, mode, "rump", cheaply=True) is None
        assert Forms.of(graph, mode, "rump", cheaply=False) is not None


def test_what_norms_know_of_their_scales_is_kept() -> None:
    """Their backward pass is bounded by it."""
    for seed in range(3):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 3), nn.LayerNorm(3), nn.ReLU(), nn.Linear(3, 3)).double()
        assert_holds(xb.explain.gradient(model), xb.Interval.linf(images(1, seed, (6,)), 0.01), torch.tensor([1]))
