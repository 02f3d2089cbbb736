"""Capture: every way in which a naive capture goes wrong, and that nothing of the user's is changed by it."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyxai_bounds as xb
from pyxai_bounds import capture, program
from tests.networks import Residual, assert_encloses, assert_exact_at_zero_radius, images, mlp, residual, sample

TARGET = torch.tensor([1, 3])


def captures(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by one with every capture."""
    calls: list[int] = []
    real = program.capture

    def counted(*args, **kwargs):
        calls.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(program, "capture", counted)
    return calls


# --- the caller's modes do not matter ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)], ids=str
)
def test_the_callers_mode_does_not_change_the_graph(mode) -> None:
    model = residual()
    expected = xb.bound(xb.explain.gradient(residual()))(xb.Interval.linf(images(2), 1e-3), TARGET)
    with mode():
        bounds = xb.bound(xb.explain.gradient(model))(xb.Interval.linf(images(2), 1e-3), TARGET)
    assert torch.equal(bounds.mid, expected.mid) and torch.equal(bounds.rad, expected.rad)


def test_gradients_work_after_a_capture_under_no_grad() -> None:
    model = mlp()
    bounded = xb.bound(xb.explain.gradient(model))
    box = xb.Interval.linf(images(2, shape=(6,)), 0.1)
    with torch.no_grad():
        bounded(box, TARGET)
    bounded(box, TARGET).width.sum().backward()
    assert model[2].weight.grad is not None and model[2].weight.grad.abs().sum() > 0


def test_channels_last() -> None:
    model = residual()
    x = images(2).to(memory_format=torch.channels_last)
    bounds = xb.bound(xb.explain.gradient(model))(xb.Interval.linf(x, 1e-3), TARGET)
    plain = xb.bound(xb.explain.gradient(model))(xb.Interval.linf(x.contiguous(), 1e-3), TARGET)
    assert (bounds.mid - plain.mid).abs().max() < 1e-12 and (bounds.rad - plain.rad).abs().max() < 1e-12
    # Flattening by view works contiguous only; the program reshapes.
    model.forward = lambda x: Residual.forward(model, x)
    view = xb.bound(lambda x: F.relu(model.conv(model.stem(x))).permute(0, 2, 3, 1).contiguous().view(2, -1))
    assert view(xb.Interval.linf(x, 1e-3)).shape == (2, 512)


# --- what a fixed graph cannot express is refused ------------------------------------------------------------


def test_dropout_in_training_mode_is_refused_and_named() -> None:
    model = residual()
    model.dropout.train()
    with pytest.raises(xb.CaptureError, match=r"Dropout 'dropout' is in training mode.*model\.eval\(\)"):
        xb.bound(lambda x: model(x))(xb.Interval.point(images(2)))


def test_batch_statistics_are_refused_and_named() -> None:
    model = residual()
    model.norm2.train()
    with pytest.raises(xb.CaptureError, match=r"BatchNorm2d 'norm2'.*statistics of the batch"):
        xb.bound(lambda x: model(x))(xb.Interval.point(images(2)))
    untracked = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)).double().eval()
    with pytest.raises(xb.CaptureError, match="track_running_stats"):
        xb.bound(untracked)(xb.Interval.point(images(2)))


def test_modes_are_checked_again_on_every_call() -> None:
    model = residual()
    bounded = xb.bound(lambda x: model(x))
    bounded(xb.Interval.point(images(2)))
    model.train()
    with pytest.raises(xb.CaptureError, match=r"training mode|statistics"):
        bounded(xb.Interval.point(images(2)))
    model.eval()
    bounded(xb.Interval.point(images(2)))


def test_functional_dropout_and_batch_norm_are_refused() -> None:
    with pytest.raises(xb.CaptureError, match="random numbers"):
        xb.bound(lambda x: F.dropout(x, 0.5))(xb.Interval.point(images(2)))
    with pytest.raises(xb.UnsupportedOperatorError, match="statistics of the batch"):
        xb.bound(lambda x: F.batch_norm(x, None, None, training=True))(xb.Interval.point(images(2)))


def test_random_noise_is_refused_and_its_line_is_named() -> None:
    with pytest.raises(xb.CaptureError, match=r"test_capture\.py.*noise outside|randn_like"):
        xb.bound(lambda x: x + torch.randn_like(x))(xb.Interval.point(images(2)))


def test_reading_a_parameter_into_python_is_refused() -> None:
    layer = nn.Linear(6, 4).double()
    with pytest.raises(xb.CaptureError, match="reads a parameter's value"):
        xb.bound(lambda x: layer(x) * layer.bias[0].item())(xb.Interval.point(images(2, shape=(6,))))
    scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    with pytest.raises(xb.CaptureError, match="reads a parameter's value"):
        xb.bound(lambda x: layer(x) * float(scale))(xb.Interval.point(images(2, shape=(6,))))


def test_reading_the_input_into_python_is_refused() -> None:
    with pytest.raises(xb.CaptureError, match="value of a tensor"):
        xb.bound(lambda x: x * 2 if x.sum() > 0 else x)(xb.Interval.point(images(2)))


# --- live parameters, stale graphs ------------------------------------------------------------------------------


def test_an_optimiser_step_and_load_state_dict_need_no_new_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = mlp(), mlp(seed=1)
    calls = captures(monkeypatch)
    box = xb.Interval.linf(images(2, shape=(6,)), 0.05)
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        bounds = xb.bound(xb.explain.gradient(model))(box, TARGET)  # a new explanation every step
        assert_encloses(bounds, xb.explain.gradient(model)(box.mid, TARGET).detach())
        optimiser.zero_grad()
        bounds.width.square().sum().backward()
        optimiser.step()
    model.load_state_dict(other.state_dict())
    bounds = xb.bound(xb.explain.gradient(model))(box, TARGET)
    expected = xb.bound(xb.explain.gradient(other))(box, TARGET)
    assert torch.equal(bounds.mid, expected.mid)
    assert len(calls) == 2


@pytest.mark.parametrize("change", ["assign", "parameter", "buffer", "dtype", "layout", "module"])
def test_replacing_what_the_graph_holds_captures_again(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = residual(), residual(seed=1)
    bounded = xb.bound(lambda x, y: xb.explain.gradient(model)(x, y))
    x = images(2)
    bounded(xb.Interval.linf(x, 1e-3), TARGET)
    calls = captures(monkeypatch)
    if change == "assign":
        model.load_state_dict(other.state_dict(), assign=True)
    elif change == "parameter":
        model.conv.weight = nn.Parameter(other.conv.weight.detach().clone())
    elif change == "buffer":
        model.norm1.running_mean = other.norm1.running_mean.clone()
    elif change == "dtype":
        model.float()
        x = x.float()
    elif change == "layout":
        model.to(memory_format=torch.channels_last)
    else:
        model.norm2 = other.norm2
    bounds = bounded(xb.Interval.linf(x, 1e-3), TARGET)
    assert calls
    assert_encloses(bounds, xb.explain.gradient(model)(x, TARGET), slack=1e-6 if change == "dtype" else 1e-9)


def test_rebinding_a_closure_or_a_global_makes_another_function() -> None:
    model = mlp()
    x = images(2, shape=(6,))

    def fn(x: Tensor) -> Tensor:
        return model(x)

    bounded = xb.bound(fn)
    bounded(xb.Interval.point(x))
    model = mlp(seed=5)
    assert torch.allclose(bounded(xb.Interval.point(x)).mid, model(x))


def test_equal_functions_share_captures_and_unequal_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = captures(monkeypatch)
    model = mlp()
    box = xb.Interval.linf(images(2, shape=(6,)), 0.05)
    for _ in range(3):
        xb.bound(lambda x: model(x) * 2)(box)  # a fresh lambda over the same objects
        xb.bound(xb.explain.gradient(model))(box, TARGET)
    assert len(calls) == 2
    xb.bound(xb.explain.gradient(model, of="loss"))(box, TARGET)
    xb.bound(xb.explain.integrated_gradients(model, steps=2))(box, TARGET)
    xb.bound(xb.explain.integrated_gradients(model, steps=3))(box, TARGET)
    assert len(calls) == 5


def test_the_cache_neither_keeps_models_alive_nor_grows_without_limit() -> None:
    model = mlp()
    gone = weakref.ref(model)
    xb.bound(xb.explain.gradient(model))(xb.Interval.point(images(2, shape=(6,))), TARGET)
    entries = len(program._cache)
    del model
    gc.collect()
    assert gone() is None and len(program._cache) < entries
    model = mlp()
    for batch in range(program.CACHE_SIZE + 5):
        xb.bound(model)(xb.Interval.point(images(batch + 1, shape=(6,))))
    assert len(program._captures_of(model).values()) == program.CACHE_SIZE


def test_a_single_integer_target_is_not_baked_in() -> None:
    """Explanations that test ``target.item()``, as Captum does, need one capture per value."""
    model = mlp()

    def fn(x: Tensor, y: Tensor) -> Tensor:
        return model(x)[:, y.item()]

    x = images(1, shape=(6,))
    bounded = xb.bound(fn)
    for label in (0, 3, 0, 2):
        bounds = bounded(xb.Interval.point(x), torch.tensor([label]))
        assert torch.allclose(bounds.mid, model(x)[:, label])


# --- in-place operators, writes into arguments -------------------------------------------------------------------


def test_in_place_operators_and_writes_into_the_argument() -> None:
    def fn(x: Tensor) -> Tensor:
        x.mul_(2).add_(1)
        y = F.relu_(x - 2)
        y[:, 0] = 0.25
        return F.hardtanh_(y * 3, -1, 1)

    x = images(2, shape=(6,))
    before = x.clone()
    bounds = xb.bound(fn)(xb.Interval.linf(x, 0.05))
    assert torch.equal(x, before)
    assert_encloses(bounds, fn(x.clone()))


# --- wrappers -----------------------------------------------------------------------------------------------------


def test_data_parallel_compiled_and_distributed_models_are_unwrapped() -> None:
    model = mlp()
    x = images(2, shape=(6,))
    expected = xb.bound(model)(xb.Interval.linf(x, 0.1))
    for wrapped in (nn.DataParallel(model), torch.compile(model), torch.compile(lambda t: model(t))):
        for fn in (wrapped, lambda t, wrapped=wrapped: wrapped(t)):
            bounds = xb.bound(fn)(xb.Interval.linf(x, 0.1))
            assert torch.equal(bounds.mid, expected.mid)
    gradient = xb.bound(xb.explain.gradient(torch.compile(model)))(xb.Interval.point(x), TARGET)
    assert torch.allclose(gradient.mid, xb.explain.gradient(model)(x, TARGET))


def test_distributed_data_parallel(tmp_path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model = mlp()
        wrapped = nn.parallel.DistributedDataParallel(model)
        x = images(2, shape=(6,))
        expected = xb.bound(model)(xb.Interval.linf(x, 0.1))
        for fn in (wrapped, lambda t: wrapped(t)):
            assert torch.equal(xb.bound(fn)(xb.Interval.linf(x, 0.1)).mid, expected.mid)
    finally:
        torch.distributed.destroy_process_group()


# --- the model is left as it was --------------------------------------------------------------------------------


class Misbehaving(nn.Module):
    """Counts its calls, keeps activations, replaces a buffer and writes into another one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)
        self.calls = 0
        self.history: list[Tensor] = []
        self.last: Tensor | None = None
        self.register_buffer("average", torch.zeros(4))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        self.calls += 1
        self.history.append(out)
        self.last = out
        self.fresh = out
        self.average = 0.9 * self.average + 0.1 * out.mean(0)
        self.count.add_(1)
        return F.relu(out)


def test_capturing_a_misbehaving_model_leaves_no_trace() -> None:
    model = Misbehaving().double()
    model(images(2, shape=(6,))).sum().backward()
    grads = [parameter.grad for parameter in model.parameters()]
    values = [grad.clone() for grad in grads]
    before = dict(model.__dict__), list(model.history), copy.deepcopy(model.state_dict())
    average, count = model.average, model.count

    def fn(x: Tensor) -> Tensor:
        model.zero_grad()
        x = x.clone().requires_grad_()
        model(x).sum().backward()
        return x.grad

    bounds = xb.bound(fn)(xb.Interval.linf(images(3, shape=(6,)), 0.1))
    assert bounds.shape == (3, 6)
    assert model.__dict__.keys() == before[0].keys()
    assert model.calls == 1 and model.last is before[0]["last"]
    assert len(model.history) == 1 and model.history[0] is before[1][0]
    assert model.average is average and model.count is count
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[2][name]), name
    for parameter, grad, value in zip(model.parameters(), grads, values, strict=True):
        assert parameter.grad is grad and torch.equal(grad, value)


def test_a_failing_capture_leaves_no_trace_either() -> None:
    model = Misbehaving().double()
    hooks = len(nn.modules.module._global_forward_pre_hooks)

    def fn(x: Tensor) -> Tensor:
        model(x)
        raise RuntimeError("the user's own error")

    with pytest.raises(RuntimeError, match="the user's own error"):
        xb.bound(fn)(xb.Interval.point(images(2, shape=(6,))))
    assert model.calls == 0 and not model.history and not hasattr(model, "fresh")
    assert len(nn.modules.module._global_forward_pre_hooks) == hooks


def test_four_threads_capture_at_once() -> None:
    models = [residual(seed) for seed in range(4)]
    results: list = [None] * 4

    def work(i: int) -> None:
        box = xb.Interval.linf(images(2, seed=i), 1e-3)
        results[i] = xb.bound(xb.explain.gradient(models[i]))(box, TARGET).detach()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, model in enumerate(models):
        box = xb.Interval.linf(images(2, seed=i), 1e-3)
        value = xb.explain.gradient(model)(sample(box, i, corners=True), TARGET).detach()
        assert results[i] is not None
        assert_encloses(results[i], value)


def test_source_lines_are_found() -> None:
    model = mlp()
    captured = program.captured_graph(lambda x: torch.tanh(model(x)), images(2, shape=(6,)))
    node = next(n for n in captured.graph.graph.nodes if n.target is torch.ops.aten.tanh.default)
    assert "test_capture.py" in capture.source_of(node)


def test_constant_outputs_and_structures() -> None:
    model = mlp()
    bounds = xb.bound(lambda x: {"out": model(x), "pair": (x, 3), "fixed": torch.ones(2)})(
        xb.Interval.linf(images(2, shape=(6,)), 0.1)
    )
    assert set(bounds) == {"out", "pair", "fixed"}
    assert bounds["pair"][1] == 3 and bounds["pair"][0].rad.min() == 0.1
    assert torch.equal(bounds["fixed"].mid, torch.ones(2)) and bounds["fixed"].rad.max() == 0


def test_radius_zero_of_every_explanation() -> None:
    model = residual()
    for of in ("logit", "probability", "loss"):
        assert_exact_at_zero_radius(xb.explain.gradient(model, of=of), images(2), TARGET)
