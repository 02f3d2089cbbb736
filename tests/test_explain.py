"""The explanations against their definitions, and their bounds."""

from __future__ import annotations

import pytest
import torch
from captum.attr import IntegratedGradients

import pyxai_bounds as xb
from tests.networks import assert_encloses_samples, assert_exact_at_zero_radius, images, mlp, residual

TARGET = torch.tensor([1, 3])
X = images(2, shape=(6,))


def test_gradients_of_logit_probability_and_loss() -> None:
    model = mlp()
    x = X.clone().requires_grad_()
    logits = model(x)
    scores = {
        "logit": logits[range(2), TARGET],
        "probability": logits.softmax(1)[range(2), TARGET],
        "loss": torch.nn.functional.cross_entropy(logits, TARGET, reduction="none"),
    }
    for of, score in scores.items():
        expected = torch.autograd.grad(score.sum(), x, retain_graph=True)[0]
        assert torch.allclose(xb.explain.gradient(model, of=of)(X, TARGET), expected)
        assert torch.allclose(xb.explain.gradient_x_input(model, of=of)(X, TARGET), X * expected)


def test_integrated_gradients() -> None:
    model = mlp()
    ours = xb.explain.integrated_gradients(model, steps=7, baseline=0.2)(X, TARGET)
    theirs = IntegratedGradients(model).attribute(
        X.clone().requires_grad_(), torch.full_like(X, 0.2), target=TARGET, n_steps=7, method="riemann_right"
    )
    assert torch.allclose(ours, theirs)
    # Completeness: with many steps the attributions add up to the difference of the logits.
    many = xb.explain.integrated_gradients(model, steps=4000)(X, TARGET)
    difference = model(X)[range(2), TARGET] - model(torch.zeros_like(X))[range(2), TARGET]
    assert torch.allclose(many.sum(1), difference, atol=2e-3)


def test_integrated_gradients_from_one_input_to_another() -> None:
    """RAR's IG of the loss: the baseline is an argument, one per sample."""
    model = mlp()
    start = images(2, seed=1, shape=(6,))
    fn = xb.explain.integrated_gradients(model, "loss", steps=4)
    slopes = [
        xb.explain.gradient(model, "loss")(start + k / 4 * (X - start), TARGET) for k in (1, 2, 3, 4)
    ]  # fmt: skip
    assert torch.allclose(fn(X, TARGET, start), (X - start) / 4 * sum(slopes))
    assert torch.equal(fn(X, TARGET, X), torch.zeros_like(X))
    box = xb.Interval.linf(X, 0.02)
    assert_encloses_samples(fn, box, TARGET, start)


def test_saliency_sums_the_channels_of_images_and_leaves_tables() -> None:
    table, image = mlp(), residual()
    gradient = xb.explain.gradient(table, "loss")(X, TARGET)
    assert torch.equal(xb.explain.saliency(table)(X, TARGET), gradient.abs())
    pictures = images(2)
    gradient = xb.explain.gradient(image, "logit")(pictures, TARGET)
    assert torch.allclose(xb.explain.saliency(image, "logit")(pictures, TARGET), gradient.abs().sum(1))
    assert torch.equal(xb.explain.saliency(image, "logit", "none")(pictures, TARGET), gradient.abs())
    for fn in (xb.explain.saliency(image), xb.explain.saliency(image, "logit")):
        assert_encloses_samples(fn, xb.Interval.linf(pictures, 2e-3), TARGET, samples=10)
        assert_exact_at_zero_radius(fn, pictures, TARGET)
    with pytest.raises(ValueError, match="channels='mean' is unknown"):
        xb.explain.saliency(table, channels="mean")  # type: ignore[arg-type]


def test_smoothgrad_is_the_mean_over_the_noise() -> None:
    model = mlp()
    noise = 0.1 * torch.randn(5, *X.shape, generator=torch.Generator().manual_seed(0), dtype=X.dtype)
    expected = torch.stack([xb.explain.gradient(model)(X + n, TARGET) for n in noise]).mean(0)
    assert torch.allclose(xb.explain.smoothgrad(model)(X, TARGET, noise), expected)
    shared = noise[:, :1]
    smooth = xb.explain.smoothgrad(model)
    assert torch.equal(smooth(X, TARGET, shared), smooth(X, TARGET, shared.expand_as(noise)))
    with pytest.raises(ValueError, match=r"noise must have shape .*\[S, 2, 6\], or \[S, 1, 6\] for the same"):
        smooth(X, TARGET, noise[0])


def test_an_explanation_is_computed_in_inference_mode_too() -> None:
    model, noise = mlp(), torch.full((3, 1, 6), 0.1, dtype=X.dtype)
    for fn in (
        xb.explain.saliency(model),
        xb.explain.integrated_gradients(model, steps=2),
        lambda x, y: xb.explain.smoothgrad(model)(x, y, noise),
    ):
        with torch.inference_mode():
            found = fn(X.clone(), TARGET.clone())
        assert torch.equal(found, fn(X, TARGET)) and not found.requires_grad


def test_a_model_with_one_output_says_what_can_be_explained() -> None:
    model = mlp((6, 4, 1))
    with pytest.raises(ValueError, match="explain the output, of='logit'"):
        xb.explain.saliency(model)(X)
    assert xb.explain.saliency(model, "logit")(X).shape == X.shape


@pytest.mark.parametrize("of", ["logit", "probability", "loss"])
def test_bounds_of_every_explanation(of: str) -> None:
    model = residual()
    box = xb.Interval.linf(images(2), 2e-3)
    noise = 0.05 * torch.randn(3, *box.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for explanation, extra in (
        (xb.explain.gradient(model, of=of), ()),
        (xb.explain.gradient_x_input(model, of=of), ()),
        (xb.explain.integrated_gradients(model, of=of, steps=3), ()),
        (xb.explain.smoothgrad(model, of=of), (noise,)),
    ):
        assert_encloses_samples(explanation, box, TARGET, *extra, samples=10)
        assert_exact_at_zero_radius(explanation, box.mid, TARGET, *extra)


def test_an_explanation_is_differentiable_where_gradients_are_enabled() -> None:
    model = mlp((6, 9, 4))
    model[1] = torch.nn.Tanh()
    x = X.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: xb.explain.gradient(model)(x, TARGET), (x,))
    with torch.no_grad():
        assert not xb.explain.gradient(model)(X, TARGET).requires_grad


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="choose 'logit', 'probability' or 'loss'"):
        xb.explain.gradient(mlp(), of="odds")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one step"):
        xb.explain.integrated_gradients(mlp(), steps=0)


@pytest.mark.parametrize(
    "given, target, error, message",
    [
        (X[0], TARGET[:1], ValueError, r"returns \[4\]. A batch comes first: for one sample pass x.unsqueeze\(0\)"),
        (X, TARGET.double(), TypeError, r"got torch.float64: target.long\(\) converts"),
        (
            X,
            torch.nn.functional.one_hot(TARGET, 4),
            ValueError,
            r"shape \[2, 4\].*argmax\(1\) makes it of one-hot rows",
        ),
        (X, 1, TypeError, r"got int: .*torch.full\(\(len\(x\),\), c\) is one class for all"),
    ],
)
def test_a_wrong_target_is_told_how_to_be_mended(given, target, error, message) -> None:
    with pytest.raises(error, match=message):
        xb.explain.gradient(mlp())(given, target)


MODEL = mlp()


@pytest.mark.parametrize(
    "cut", [lambda x: MODEL(x).detach(), lambda x: MODEL(x.detach()), lambda x: MODEL(x).round().long()]
)
def test_a_model_without_a_gradient_is_named(cut) -> None:
    for call in (
        xb.explain.gradient(cut),
        lambda x, y: xb.bound(xb.explain.gradient(cut))(xb.Interval.linf(x, 0.1), y),
    ):
        with pytest.raises(ValueError, match="no gradient by x: something in it, such as detach"):
            call(X, TARGET)


def test_a_baseline_is_a_number_or_a_tensor() -> None:
    with pytest.raises(TypeError, match="baseline must be a number or a tensor, got ndarray"):
        xb.explain.integrated_gradients(mlp(), steps=2)(X, TARGET, X.numpy())  # type: ignore[arg-type]
