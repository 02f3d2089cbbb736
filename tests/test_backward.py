"""The gradients of bounds: a program without the dispatcher against the same program through it, whatever is asked."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pyxai_bounds as xb
from tests.networks import images, mlp, residual
from tests.ops.cases import needs_native


def cnn() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, stride=2),
        nn.SiLU(), nn.Flatten(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 4),
    ).double().eval()  # fmt: skip


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (6,)), "cnn": (cnn, (3, 8, 8)), "residual": (residual, (3, 8, 8))
}  # fmt: skip
TARGET = torch.tensor([1, 3])
LOSSES: dict[str, Callable[[xb.Interval], Tensor]] = {
    "width": lambda b: b.width.square().sum(),
    "mid": lambda b: b.mid.square().sum(),
    "both": lambda b: (b.mid * b.rad).sum(),
    "lower": lambda b: b.lower.relu().square().sum(),
    "upper": lambda b: b.upper.sin().sum(),
}
BACKENDS = ["reference", pytest.param("native", marks=needs_native)]
OF = ["logit", "probability"]
Step = tuple[nn.Module, xb.Interval, Callable[..., Any]]


def case(name: str, dispatched: bool, of: str = "logit", **options: Any) -> Step:
    """A network, a box whose halves require gradients, and the bounds of the network's gradient over it."""
    make, shape = NETWORKS[name]
    model = make()
    if options.pop("parameters", False):
        options["parameters"] = xb.parameter_box(model, relative=0.01)
    box = xb.Interval.of(images(2, shape=shape).requires_grad_(), torch.full((2, *shape), 0.01).double())
    box.rad.requires_grad_()
    bounded = xb.bound(xb.explain.gradient(model, of=of), **options)  # type: ignore[arg-type]
    if dispatched:
        return model, box, lambda box: xb.Interval.of(*bounded.graph(box, TARGET)(box.mid, box.rad, TARGET))
    return model, box, lambda box: bounded(box, TARGET)


def leaves(model: nn.Module, box: xb.Interval) -> list[Tensor]:
    return [box.mid, box.rad, *model.parameters()]


def gradients(step: Step, loss: Callable[[xb.Interval], Tensor]) -> list[Tensor | None]:
    model, box, bounded = step
    for leaf in leaves(model, box):
        leaf.grad = None
    total = loss(bounded(box))
    if total.requires_grad:
        total.backward()
    return [leaf.grad for leaf in leaves(model, box)]


def assert_same(found: list[Tensor | None], expected: list[Tensor | None]) -> None:
    assert any(e is not None and bool(e.any()) for e in expected)
    for f, e in zip(found, expected, strict=True):
        assert (f is None) == (e is None)
        if f is not None and e is not None:
            assert torch.allclose(f, e, rtol=1e-10, atol=1e-12 * float(e.abs().max()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("of", OF)
@pytest.mark.parametrize("name", NETWORKS)
def test_both_paths_give_the_same_gradients(name: str, of: str, backend: str) -> None:
    found, expected = (case(name, dispatched, of) for dispatched in (False, True))
    with xb.backend(backend):
        for loss in LOSSES.values():
            assert_same(gradients(found, loss), gradients(expected, loss))


@pytest.mark.parametrize("options", [{"sound": True}, {"parameters": True}, {"parameters": True, "product": "exact"}])
@pytest.mark.parametrize("name", NETWORKS)
def test_proofs_and_boxes_of_parameters(name: str, options: dict[str, Any]) -> None:
    found, expected = (gradients(case(name, dispatched, **options), LOSSES["both"]) for dispatched in (False, True))
    assert_same(found, expected)


@pytest.mark.parametrize("frozen", ["all but one", "every other", "the box"])
@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_frozen_gets_no_gradient(name: str, frozen: str) -> None:
    outcomes = []
    for dispatched in (False, True):
        step = case(name, dispatched)
        all_leaves = leaves(*step[:2])
        for index, leaf in enumerate(all_leaves):
            keep = {"all but one": index == 2, "every other": index % 2 == 0, "the box": index > 1}[frozen]
            leaf.requires_grad_(keep)
        found = gradients(step, LOSSES["both"])
        assert all(g is None or leaf.requires_grad for g, leaf in zip(found, all_leaves, strict=True))
        outcomes.append(found)
    assert_same(*outcomes)


def test_a_frozen_model_records_nothing() -> None:
    model, box, bounded = case("residual", dispatched=False)
    model.requires_grad_(False)
    assert not bounded(box.detach()).rad.requires_grad


@pytest.mark.parametrize("name", NETWORKS)
def test_a_graph_that_is_retained_differentiates_again(name: str) -> None:
    model, box, bounded = case(name, dispatched=False)
    total = LOSSES["both"](bounded(box))
    first = torch.autograd.grad(total, leaves(model, box), retain_graph=True, allow_unused=True)
    second = torch.autograd.grad(total, leaves(model, box), allow_unused=True)
    assert_same(list(second), list(first))
    with pytest.raises(RuntimeError, match="second time"):
        total.backward()


@pytest.mark.parametrize("name", ["mlp", "residual"])
def test_second_derivatives(name: str) -> None:
    """A penalty on the gradient of a width: Hessian-vector products along both paths."""
    outcomes = []
    for dispatched in (False, True):
        model, box, bounded = case(name, dispatched)
        weights = [p for p in model.parameters() if p.dim() > 1]
        first = torch.autograd.grad(LOSSES["both"](bounded(box)), weights, create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        outcomes.append(list(torch.autograd.grad(penalty, weights, allow_unused=True)))
    assert_same(*outcomes)


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_that_change_before_the_backward_pass_are_noticed(name: str) -> None:
    model, box, bounded = case(name, dispatched=False)
    total = LOSSES["width"](bounded(box))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_hooks_and_accumulation() -> None:
    model, box, bounded = case("cnn", dispatched=False)
    twin = copy.deepcopy(model)
    seen = []
    weight = next(model.parameters())
    weight.register_hook(lambda grad: seen.append(grad) or 2 * grad)  # type: ignore[func-returns-value]
    weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad))  # type: ignore[arg-type]
    for _ in range(2):
        LOSSES["width"](bounded(box)).backward()
    LOSSES["width"](xb.bound(xb.explain.gradient(twin))(box, TARGET)).backward()
    single = next(twin.parameters()).grad
    assert len(seen) == 4 and weight.grad is not None and single is not None
    assert torch.allclose(weight.grad, 4 * single)


@needs_native
def test_the_backward_pass_runs_on_the_backend_of_the_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyxai_bounds.ops import native

    model, box, bounded = case("mlp", dispatched=False)
    with xb.backend("reference"):
        total = LOSSES["both"](bounded(box))
    monkeypatch.setattr(native, "_module", lambda: pytest.fail("the native backend ran"))
    total.backward()
    assert next(model.parameters()).grad is not None
