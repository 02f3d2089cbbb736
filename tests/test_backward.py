"""The gradients of bounds: a program without the dispatcher, checkpointed or not, against the one through it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pyxai_bounds as xb
from pyxai_bounds import program
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
Bounded = Callable[[xb.Interval], xb.Interval]

PATHS = ["direct", "checkpointed"]
every_path = pytest.mark.parametrize("path", PATHS)


def case(name: str, of: str = "logit", **options: Any) -> tuple[nn.Module, xb.Interval, dict[str, Bounded]]:
    """A network, a box whose halves require gradients, and the bounds of the network's gradient over it, by path.

    The paths share one capture; in "dispatched", to which the others are compared, the dispatcher calls each operator.
    """
    make, shape = NETWORKS[name]
    model = make()
    if options.pop("parameters", False):
        options["parameters"] = xb.parameter_box(model, relative=0.01)
    box = xb.Interval.of(images(2, shape=shape).requires_grad_(), torch.full((2, *shape), 0.01).double())
    box.rad.requires_grad_()
    explanation = xb.explain.gradient(model, of=of)  # type: ignore[arg-type]
    direct, checkpointed = (xb.bound(explanation, checkpoint=checkpoint, **options) for checkpoint in (False, True))
    return model, box, {
        "direct": lambda box: direct(box, TARGET),
        "checkpointed": lambda box: checkpointed(box, TARGET),
        "dispatched": lambda box: xb.Interval.of(*direct.graph(box, TARGET)(box.mid, box.rad, TARGET)),
    }  # fmt: skip


def leaves(model: nn.Module, box: xb.Interval) -> list[Tensor]:
    return [box.mid, box.rad, *model.parameters()]


def gradients(
    model: nn.Module, box: xb.Interval, bounded: Bounded, loss: Callable[[xb.Interval], Tensor]
) -> list[Tensor | None]:
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
def test_all_paths_give_the_same_gradients(name: str, of: str, backend: str) -> None:
    model, box, bounded = case(name, of)
    with xb.backend(backend):
        for loss in LOSSES.values():
            expected = gradients(model, box, bounded["dispatched"], loss)
            for path in PATHS:
                assert_same(gradients(model, box, bounded[path], loss), expected)


@pytest.mark.parametrize("options", [{"sound": True}, {"parameters": True}, {"parameters": True, "product": "exact"}])
@pytest.mark.parametrize("name", NETWORKS)
def test_proofs_and_boxes_of_parameters(name: str, options: dict[str, Any]) -> None:
    model, box, bounded = case(name, **options)
    expected = gradients(model, box, bounded["dispatched"], LOSSES["both"])
    for path in PATHS:
        assert_same(gradients(model, box, bounded[path], LOSSES["both"]), expected)


@pytest.mark.parametrize("frozen", ["all but one", "every other", "the box"])
@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_frozen_gets_no_gradient(name: str, frozen: str) -> None:
    model, box, bounded = case(name)
    all_leaves = leaves(model, box)
    for index, leaf in enumerate(all_leaves):
        keep = {"all but one": index == 2, "every other": index % 2 == 0, "the box": index > 1}[frozen]
        leaf.requires_grad_(keep)
    outcomes = {path: gradients(model, box, one, LOSSES["both"]) for path, one in bounded.items()}
    for found in outcomes.values():
        assert all(g is None or leaf.requires_grad for g, leaf in zip(found, all_leaves, strict=True))
        assert_same(found, outcomes["dispatched"])


def test_a_frozen_model_records_nothing() -> None:
    model, box, bounded = case("residual")
    model.requires_grad_(False)
    for path in PATHS:
        assert not bounded[path](box.detach()).rad.requires_grad


@pytest.mark.parametrize("name", NETWORKS)
def test_a_graph_that_is_retained_differentiates_again(name: str) -> None:
    model, box, bounded = case(name)
    for path in PATHS:
        total = LOSSES["both"](bounded[path](box))
        first = torch.autograd.grad(total, leaves(model, box), retain_graph=True, allow_unused=True)
        second = torch.autograd.grad(total, leaves(model, box), allow_unused=True)
        assert_same(list(second), list(first))
        with pytest.raises(RuntimeError, match="second time"):
            total.backward()


@pytest.mark.parametrize("name", NETWORKS)
def test_second_derivatives(name: str) -> None:
    """A penalty on the gradient of a width: Hessian-vector products along all paths."""
    model, box, bounded = case(name)
    weights = [p for p in model.parameters() if p.dim() > 1]
    outcomes = {}
    for path, one in bounded.items():
        first = torch.autograd.grad(LOSSES["both"](one(box)), weights, create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        outcomes[path] = list(torch.autograd.grad(penalty, weights, allow_unused=True))
    for path in PATHS:
        assert_same(outcomes[path], outcomes["dispatched"])


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_that_change_before_the_backward_pass_are_noticed(name: str) -> None:
    model, box, bounded = case(name)
    for path in PATHS:
        total = LOSSES["width"](bounded[path](box))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            total.backward()


@every_path
def test_hooks_and_accumulation(path: str) -> None:
    model, box, bounded = case("cnn")
    twin = copy.deepcopy(model)
    seen = []
    weight = next(model.parameters())
    weight.register_hook(lambda grad: seen.append(grad) or 2 * grad)  # type: ignore[func-returns-value]
    weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad))  # type: ignore[arg-type]
    for _ in range(2):
        LOSSES["width"](bounded[path](box)).backward()
    LOSSES["width"](xb.bound(xb.explain.gradient(twin))(box, TARGET)).backward()
    single = next(twin.parameters()).grad
    assert len(seen) == 4 and weight.grad is not None and single is not None
    assert torch.allclose(weight.grad, 4 * single)


@needs_native
@every_path
def test_the_backward_pass_runs_on_the_backend_of_the_forward_pass(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyxai_bounds.ops import native

    model, box, bounded = case("mlp")
    with xb.backend("reference"):
        total = LOSSES["both"](bounded[path](box))
    monkeypatch.setattr(native, "module", lambda: pytest.fail("the native backend ran"))
    total.backward()
    assert next(model.parameters()).grad is not None


# --- checkpointed programs ------------------------------------------------------------------------------------


def recorded_nodes(t: Tensor) -> list[str]:
    """The names of what autograd has recorded behind a tensor."""
    names, seen, pending = [], set(), [t.grad_fn]
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names.append(type(node).__name__)
            pending += [parent for parent, _ in node.next_functions]
    return names


def deep(blocks: int = 12) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(blocks):
        layers += [nn.Linear(16, 16), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(16, 3)).double()


@pytest.mark.parametrize("of", OF)
def test_a_checkpointed_program_gives_the_same_bounds_and_saves_less(of: str) -> None:
    model, x = deep(), images(2, shape=(16,))
    box, sizes, results = xb.Interval.linf(x, 1e-3), [], []
    for checkpoint in (False, True):
        bounded = xb.bound(xb.explain.gradient(model, of=of), checkpoint=checkpoint)  # type: ignore[arg-type]
        bounded(box, TARGET % 3)
        saved: dict[int, Tensor] = {p.data_ptr(): p for p in model.parameters()}
        note = functools.partial(lambda saved, t: saved.setdefault(t.data_ptr(), t), saved)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            results.append(bounded(box, TARGET % 3))
        assert ("_RecomputedBackward" in recorded_nodes(results[-1].rad)) == checkpoint
        sizes.append(sum(t.numel() * t.element_size() for t in saved.values() if not isinstance(t, nn.Parameter)))
    assert torch.equal(results[0].mid, results[1].mid) and torch.equal(results[0].rad, results[1].rad)
    assert sizes[1] < 0.6 * sizes[0]


def test_gradients_of_a_deep_checkpointed_program() -> None:
    model, x = deep(), images(2, shape=(16,))
    grads = []
    for checkpoint in (False, True):
        bounded = xb.bound(xb.explain.gradient(model, "probability"), checkpoint=checkpoint)
        bounds = bounded(xb.Interval.linf(x, 1e-3), TARGET % 3)
        grads.append(torch.autograd.grad(bounds.width.sum() + bounds.mid.sum(), list(model.parameters())))
    assert_same(list(grads[1]), list(grads[0]))


def test_checkpointing_needs_no_second_capture() -> None:
    model = deep(2)
    box = xb.Interval.linf(images(2, shape=(16,)), 1e-3)
    with torch.no_grad():
        xb.bound(model)(box)
        xb.bound(model, checkpoint=True)(box)
    (captured,) = program._captures_of(model).values()
    assert len(captured.derived) == 1
