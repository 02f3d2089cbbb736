"""certify and certified_radius: verdicts, padding, radii, and what must never be certified."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pyxai_bounds as xb
from tests.networks import images, mlp, residual

X = images(7, shape=(6,))
TARGET = torch.arange(7) % 4


def test_a_linear_model_is_certified_at_any_radius() -> None:
    certificate = xb.certify(xb.explain.gradient(nn.Linear(6, 4).double()), X, TARGET, eps=10.0, property=xb.TopK(2))
    assert certificate.holds.all() and certificate.fraction == 1.0
    assert certificate.rounding == "outward"
    assert "7 of 7" in repr(certificate)


def test_pieces_and_padding_change_nothing() -> None:
    fn = xb.explain.gradient(mlp())
    whole = xb.certify(fn, X, TARGET, eps=0.05, property=xb.TopK(2))
    pieces = xb.certify(fn, X, TARGET, eps=0.05, property=xb.TopK(2), batch_size=3)
    assert torch.equal(whole.holds, pieces.holds)
    assert torch.allclose(whole.margin, pieces.margin) and torch.allclose(whole.bounds.rad, pieces.bounds.rad)
    assert torch.allclose(whole.nominal, pieces.nominal)
    assert whole.holds.any() and not whole.holds.all()


def test_verdicts_per_sample_radius_and_clip() -> None:
    fn = xb.explain.gradient(mlp())
    eps = torch.linspace(0, 0.3, 7, dtype=torch.float64).reshape(7, 1)
    mixed = xb.certify(fn, X, TARGET, eps=eps, property=xb.TopK(2), clip=(0.0, 1.0))
    for i in range(7):
        one = xb.certify(fn, X[i : i + 1], TARGET[i : i + 1], eps=eps[i].item(), property=xb.TopK(2), clip=(0.0, 1.0))
        assert one.holds[0] == mixed.holds[i]
    assert mixed.holds[0]
    clipped = xb.certify(fn, X, TARGET, eps=0.3, property=xb.TopK(2), clip=(0.0, 1.0))
    free = xb.certify(fn, X, TARGET, eps=0.3, property=xb.TopK(2))
    assert (clipped.bounds.rad <= free.bounds.rad + 1e-12).all()


def test_empty_batch() -> None:
    fn = xb.explain.gradient(mlp())
    certificate = xb.certify(fn, X[:0], TARGET[:0], eps=0.1, property=xb.TopK(2))
    assert certificate.holds.shape == (0,) and certificate.bounds.shape == (0, 6)
    assert xb.certified_radius(fn, X[:0], TARGET[:0], property=xb.TopK(2), max_eps=0.1).shape == (0,)


def test_certified_radius_brackets_the_verdict() -> None:
    fn = xb.explain.gradient(mlp())
    tol = 1e-4
    radius = xb.certified_radius(fn, X, TARGET, property=xb.TopK(2), max_eps=0.5, tol=tol)
    assert (radius > 0).any() and (radius < 0.5).any()
    at = xb.certify(fn, X, TARGET, eps=radius[:, None], property=xb.TopK(2))
    assert at.holds[radius > 0].all()
    beyond = xb.certify(fn, X, TARGET, eps=(radius + 2 * tol)[:, None], property=xb.TopK(2))
    assert not beyond.holds[radius < 0.5].any()
    everywhere = xb.certified_radius(nn.Linear(6, 4).double(), X, property=xb.Sign(k=1), max_eps=0.0625, tol=1e-3)
    assert (everywhere >= 0).all()
    constant = xb.explain.gradient(nn.Linear(6, 4).double())
    assert (xb.certified_radius(constant, X, TARGET, property=xb.TopK(2), max_eps=0.25) == 0.25).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"])
def test_a_model_with_a_nan_or_an_infinity_is_never_certified(name: str, value: float) -> None:
    model = mlp()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[1] = value
    for property in (xb.TopK(2), xb.TopK(6), xb.Sign(k=1), xb.L2(1e9), xb.Cosine(-1.0)):
        certificate = xb.certify(xb.explain.gradient(model), X, TARGET, eps=1e-3, property=property)
        assert not certificate.holds.any(), property


def test_a_nan_buffer_and_an_overflow_are_never_certified() -> None:
    model = residual()
    model.norm1.running_var[2] = float("nan")
    x, y = images(2), torch.tensor([0, 1])
    assert not xb.certify(xb.explain.gradient(model), x, y, eps=0.0, property=xb.TopK(500)).holds.any()
    huge = mlp().float()
    with torch.no_grad():
        for parameter in huge.parameters():
            parameter.mul_(1e20)
    certificate = xb.certify(xb.explain.gradient(huge), X.float(), TARGET, eps=0.1, property=xb.L2(1e30))
    assert not certificate.holds.any()


def test_a_function_that_changes_between_calls_is_never_certified() -> None:
    """The bounds cannot contain an explanation that is another one each time."""
    state = iter(range(1000))

    def fn(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x * 0 + float(next(state)) + torch.arange(6.0)

    with pytest.warns(RuntimeWarning, match="7 of 7 samples lie outside their own bounds"):
        assert not xb.certify(fn, X, TARGET, eps=0.1, property=xb.TopK(2)).holds.any()


def test_probabilities_near_1_leave_float32_no_digits_and_the_warning_says_what_helps() -> None:
    """The gradient of p is p(1 − p) times the logits': where 1 − p is some 1e-7, float32 computes another number."""
    model = nn.Linear(6, 2).double()
    with torch.no_grad():
        model.weight.copy_(torch.stack([torch.arange(1.0, 7), torch.zeros(6)]))
        model.bias.copy_(torch.tensor([13.0, 0]) - model.weight.sum(1) * 0.5)
    x, target = 0.5 + torch.linspace(-0.1, 0.1, 7).double()[:, None].expand(7, 6), torch.zeros(7).long()
    exact = xb.certify(xb.explain.gradient(model, "probability"), x, target, eps=1e-3, property=xb.TopK(2))
    assert exact.holds.all()
    fn = xb.explain.gradient(model.float(), "probability")
    with pytest.warns(RuntimeWarning, match="convert the model and x to float64"):
        found = xb.certify(fn, x.float(), target, eps=1e-6, property=xb.TopK(2))
    assert not found.holds.all() and (found.bounds.mid.double() - exact.nominal).abs().max() < 1e-9


def test_explanations_of_one_number_and_hand_written_gradients() -> None:
    model = mlp()
    one = xb.certify(lambda x: model(x)[:, 0], X, eps=1e-3, property=xb.Sign())
    assert one.holds.shape == (7,)

    def by_hand(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(model(x).gather(1, y[:, None]).sum(), x)[0]

    with torch.inference_mode():
        inside = X.clone()
        certificate = xb.certify(by_hand, inside, TARGET, eps=0.05, property=xb.TopK(2))
        xb.attack.pgd(by_hand, inside, TARGET, eps=0.05, property=xb.TopK(2), steps=2)
    expected = xb.certify(xb.explain.gradient(model), X, TARGET, eps=0.05, property=xb.TopK(2))
    assert torch.equal(certificate.holds, expected.holds)


def test_bad_arguments() -> None:
    fn = xb.explain.gradient(mlp())
    with pytest.raises(ValueError, match="x has 7 samples, but target has shape"):
        xb.certify(fn, X, TARGET[:3], eps=0.1, property=xb.TopK(2))
    for arguments, message in (
        ({"x": X.numpy()}, "x must be a floating tensor"),
        ({"target": [0, 1]}, "target must be an integer tensor"),
        ({"property": "topk"}, "property must be one such as"),
    ):
        with pytest.raises(TypeError, match=message):
            xb.certify(fn, **{"x": X, "target": TARGET, "eps": 0.1, "property": xb.TopK(2), **arguments})
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        xb.certify(fn, X, TARGET, eps=0.1, property=xb.TopK(2), batch_size=0)
    with pytest.raises(ValueError, match="x lies outside clip"):
        xb.certify(fn, X + 5, TARGET, eps=0.1, property=xb.TopK(2), clip=(0.0, 1.0))
    with pytest.raises(TypeError, match="float32 or float64"):
        half = mlp().bfloat16()
        xb.certify(xb.explain.gradient(half), X.bfloat16(), TARGET, eps=0.1, property=xb.TopK(2))
    with pytest.raises(ValueError, match="max_eps"):
        xb.certified_radius(fn, X, TARGET, property=xb.TopK(2), max_eps=0.0)


def test_what_certify_cannot_call_or_count() -> None:
    model = mlp()
    fn = xb.explain.gradient(model)
    with pytest.raises(TypeError, match=r"fn\(x, target\), but Sequential.*explain.gradient"):
        xb.certify(model, X, TARGET, eps=0.1, property=xb.TopK(2))
    with pytest.raises(TypeError, match="missing a required argument: 'noise'"):
        xb.certify(xb.explain.smoothgrad(model), X, TARGET, eps=0.1, property=xb.TopK(2))
    with pytest.raises(TypeError, match="property must be one such as"):
        xb.certify(fn, X, TARGET, eps=0.1, property=xb.TopK)
    with pytest.raises(TypeError, match="max_eps must be a number"):
        xb.certified_radius(fn, X, TARGET, property=xb.TopK(2), max_eps=torch.ones(len(X)))
    for make in (xb.TopK, xb.Sign):
        with pytest.raises(TypeError, match="k must be a whole number"):
            make(2.5)


def test_limits_and_units_of_each_feature() -> None:
    """clip and unit as tensors: the box is what they say, and a feature whose unit is 0 stays a point."""
    model = mlp()
    fn, unit = xb.explain.gradient(model), torch.rand(X.shape[1], dtype=X.dtype)
    unit[0] = 0
    low, high = X.amin(0), X.amax(0)
    box = xb.Interval.linf(X, 0.3 * unit, (low, high))
    assert (box.rad[:, 0] == 0).all() and (box.rad[:, 1:].amax(0) > 0).all()
    corners = (X - 0.3 * unit).maximum(low), (X + 0.3 * unit).minimum(high)
    assert all(box.contains(corner).all() for corner in corners)
    assert torch.allclose(box.width, corners[1] - corners[0], atol=1e-6)
    radius = xb.certified_radius(fn, X, TARGET, property=xb.TopK(2), max_eps=1.0, tol=1e-3, unit=unit)
    scaled = xb.certify(fn, X, TARGET, property=xb.TopK(2), eps=radius[:, None] * unit * (1 - 1e-6))
    assert ((radius > 0) & (radius < 1)).any() and scaled.holds[radius > 0].all()
    square = [t[: X.shape[1]] for t in (X, TARGET)]  # as many samples as features
    assert torch.equal(
        xb.certified_radius(fn, *square, property=xb.TopK(2), max_eps=1.0, tol=1e-3, unit=unit), radius[: X.shape[1]]
    )
    with pytest.raises(ValueError, match="do not broadcast to a sample"):
        xb.Interval.linf(X, 0.1, (low[:-1], high[:-1]))
    with pytest.raises(ValueError, match="is empty for some features"):
        xb.Interval.linf(X, 0.1, (high, low))
    with pytest.raises(ValueError, match="outside its limits in clip"):
        xb.Interval.linf(X + 1, 0.1, (low, high))
    with pytest.raises(ValueError, match="A batch comes first"):
        xb.certify(fn, X[0], TARGET[0], eps=0.1, property=xb.TopK(2))


def test_the_greatest_radius_was_itself_certified() -> None:
    """0.1 in float32 is a little more than 0.1: what is returned is what was looked at."""

    class Widest:
        strict, seen = False, torch.empty(0)

        def margin(self, nominal: torch.Tensor, bounds: xb.Interval) -> torch.Tensor:
            self.seen = bounds.rad.double()
            return torch.ones(len(nominal))

    x, widest = torch.zeros(2, 100), Widest()
    for unit in (None, torch.linspace(1, 2, 100)):
        radius = xb.certified_radius(lambda x: x, x, property=widest, max_eps=0.1, unit=unit)
        assert (radius.double()[:, None] * (1.0 if unit is None else unit) <= widest.seen).all()


@pytest.mark.parametrize("sharpen", [None, False])
def test_progress_is_told_up_to_the_end(sharpen: bool | None) -> None:
    fn, options = xb.explain.gradient(mlp()), {"property": xb.TopK(2), "batch_size": 3, "sharpen": sharpen}
    told: list[float] = []
    xb.certify(fn, X, TARGET, eps=0.1, on_progress=told.append, **options)
    assert told == sorted(told) and told[-1] == 1.0 and len(told) >= 3
    assert len(set(told)) >= 4 if sharpen is None else told == [3 / 7, 6 / 7, 1.0]
    told.clear()
    xb.certified_radius(fn, X, TARGET, max_eps=0.5, tol=0.1, on_progress=told.append, **options)
    assert told == sorted(told) and told[-1] == 1.0 and len({int(4 * fraction) for fraction in told}) == 5


def test_a_sample_alone_is_no_batch() -> None:
    fn = xb.explain.gradient(mlp())
    for call in (
        lambda: xb.certify(fn, X[0, 0], TARGET, eps=0.1, property=xb.TopK(2)),
        lambda: xb.certified_radius(fn, X[0, 0], TARGET, max_eps=0.1, property=xb.TopK(2)),
    ):
        with pytest.raises(ValueError, match=r"x must be a batch \[B, ...\].*use x\[None\]"):
            call()


@pytest.mark.parametrize("fn", [lambda x: (x, x), lambda x: x.sum(), lambda x: None, lambda x: x[:1]])
def test_what_is_no_explanation_of_a_batch(fn) -> None:
    with pytest.raises(ValueError, match="one explanation per sample"):
        xb.certify(fn, X, eps=0.1, property=xb.Linf(1.0), sound=False)


@pytest.mark.parametrize("property", [xb.TopK(2), xb.Sign(), xb.L1(1.0), xb.Cosine(0.5)])
def test_an_explanation_and_bounds_of_something_else(property) -> None:
    with pytest.raises(ValueError, match=r"one shape \[B, ...\], got \[7, 5\] and \[7, 6\]"):
        property.margin(X[:, :5], xb.Interval.linf(X, 0.1))
    with pytest.raises(TypeError, match="got Tensor and Tensor"):
        property.margin(X, X)


def test_explanations_that_are_no_numbers_are_never_certified() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        return x / (x - x)

    for property in (xb.TopK(2), xb.Sign(), xb.Linf(1e9), xb.Cosine(-1.0)):
        certificate = xb.certify(fn, X, eps=0.0, property=property)
        assert not certificate.holds.any() and (certificate.margin == -torch.inf).all()


@pytest.mark.parametrize("make", [lambda: xb.Linf("1"), lambda: xb.Cosine("1"), lambda: xb.MeanSquare(None)])
def test_properties_take_numbers(make) -> None:
    with pytest.raises(TypeError, match="must be a number"):
        make()


def test_corners_that_refute_lie_inside_the_box() -> None:
    """1 + 8e-8 rounds to 1 + 1.2e-7, which is no input of the box."""
    x = torch.ones(4, 3)
    found = xb.certify(lambda x: (x - 1) * 1e7, x, eps=8e-8, property=xb.Linf(0.7), sharpen=True)
    assert not found.holds.any() and not found.refuted.any()
    assert xb.certify(lambda x: (x - 1) * 1e7, x, eps=2e-7, property=xb.Linf(0.7), sharpen=True).refuted.all()
