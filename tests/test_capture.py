"""Capture: every way in which a naive capture goes wrong, and that nothing of the user's is changed by it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import operator
import threading
import types
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import pyxai_bounds as xb
from pyxai_bounds import capture, decompose, program, watch
from pyxai_bounds.ops import native
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


# --- the device does not matter ----------------------------------------------------------------------------


def operators(fn, *args: Tensor) -> Counter:
    graph = program.captured_graph(fn, *args).graph.graph
    return Counter(str(node.target) for node in graph.nodes if node.op == "call_function")


FUSED_ON_A_GPU = {
    "LSTM": lambda: nn.LSTM(4, 3, 2, batch_first=True, bias=False),
    "LSTM, projected": lambda: nn.LSTM(4, 6, bidirectional=True, proj_size=3),
    "GRU": lambda: nn.GRU(4, 3, 2, bidirectional=True),
    "RNN": lambda: nn.RNN(4, 3, 2),
    "RNN, relu": lambda: nn.RNN(4, 3, nonlinearity="relu", bias=False),
    "LSTM cell": lambda: nn.LSTMCell(4, 3),
    "GRU cell": lambda: nn.GRUCell(4, 3, bias=False),
    "RMS norm": lambda: nn.RMSNorm(4),
    "RMS norm of two dimensions": lambda: nn.RMSNorm((2, 4), eps=1e-3, elementwise_affine=False),
}


@pytest.mark.parametrize("name", FUSED_ON_A_GPU)
def test_what_a_gpu_fuses_is_taken_apart_as_on_the_cpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch is never asked for what it fuses on a GPU, and the parts are those that it takes itself on the CPU."""
    torch.manual_seed(0)
    layer = FUSED_ON_A_GPU[name]().double()
    x = torch.randn((2, 4) if "cell" in name else (3, 2, 4), dtype=torch.float64)

    def gradient(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        out = layer(x)
        y = out if isinstance(out, Tensor) else torch.cat([t.flatten() for t in pytree.tree_leaves(out)])
        return y, torch.autograd.grad(y.square().sum(), x)[0]

    called = set()

    class Calls(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            called.add(func)
            return func(*args, **(kwargs or {}))

    with Calls():
        ours = operators(gradient, x)
    fused = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu, torch.lstm_cell, torch.gru_cell, torch.rms_norm}
    assert called and not called & (fused | {F.rms_norm})
    for bound, value in zip(xb.bound(gradient)(xb.Interval.point(x)), gradient(x), strict=True):
        assert torch.allclose(bound.mid, value, rtol=1e-12, atol=1e-12) and bound.rad.max() <= 1e-12
    box = xb.Interval.linf(x, 0.01)
    bounds = xb.bound(gradient)(box)
    xb.bound(gradient).recapture()
    for function in (*fused, F.rms_norm):
        monkeypatch.delitem(decompose.REWRITTEN, function, raising=False)
    assert ours == operators(gradient, x)
    for a, b in zip(bounds, xb.bound(gradient)(box), strict=True):
        assert torch.equal(a.mid, b.mid) and torch.equal(a.rad, b.rad)


def test_a_recurrent_layer_with_dropout_is_refused_in_training_mode() -> None:
    layer = nn.GRU(4, 3, 2, dropout=0.5)
    box = xb.Interval.point(torch.randn(5, 2, 4))
    with pytest.raises(xb.CaptureError, match="random"):
        xb.bound(lambda x: layer(x)[0])(box)
    xb.bound(lambda x: layer.eval()(x)[0])(box)


def test_rms_norm_of_another_shape_is_refused() -> None:
    with pytest.raises(RuntimeError, match="normalized_shape"):
        xb.bound(lambda x: F.rms_norm(x, [3]))(xb.Interval.point(torch.ones(2, 4)))


def test_cudnn_is_off_while_a_function_is_captured_and_on_again_afterwards() -> None:
    """On a GPU it has operators of its own: batch norm, recurrent layers, grids."""
    seen = []

    def look(x: Tensor, fail: bool) -> Tensor:
        seen.append(torch.backends.cudnn.enabled)
        if fail:
            raise KeyError("the function's own error")
        return 2 * x

    before, box = torch.backends.cudnn.enabled, xb.Interval.point(torch.ones(2))
    xb.bound(look)(box, False)
    with pytest.raises(KeyError, match="own error"):
        xb.bound(look)(box, True)
    assert seen and not any(seen)
    assert torch.backends.cudnn.enabled == before


# --- the caller's modes do not matter ----------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
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


def check_follows(fn, change, x: Tensor) -> None:
    """Bound, change something, bound again: the bounds are those of the function as it is now."""
    bounded = xb.bound(fn)
    for _ in range(3):  # what was compared once is compared sooner after that
        before = bounded(xb.Interval.point(x)).mid.detach()
    change()
    after = bounded(xb.Interval.point(x)).mid.detach()
    with torch.enable_grad():
        expected = fn(x).detach()
    assert torch.allclose(after, expected), "stale"
    assert not torch.allclose(before, after), "the change changes nothing: the test is blind"


class Bent(nn.Module):
    """A module whose attributes, children, hooks and forward a user may change at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 6), nn.LeakyReLU(0.1), nn.Linear(6, 4))
        self.scale, self.options = 2.0, {"shift": 0.0}
        self.extra: list[nn.Module] = []
        self.powers, self.nested = [1, 2], {"factors": [1.0]}
        self.by_name: OrderedDict[str, float] = OrderedDict(a=1.0, b=2.0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x) * self.scale + self.options["shift"]
        y = y ** self.powers[0] * self.nested["factors"][0]
        return y * next(iter(self.by_name.values()))

    def features(self, x: Tensor) -> Tensor:
        return self.layers[0].forward(x) * self.scale


X6 = images(3, shape=(6,)) - 0.5
TEMPERATURE = 2.0
SHIFT = torch.ones(6, dtype=torch.float64)
SETTINGS = types.ModuleType("settings")


def tempered(x: Tensor) -> Tensor:
    return x.square() * TEMPERATURE


class Global(nn.Module):
    """A module that computes with globals: a number behind a method and a function, a tensor, and another file's."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(self.layer(x) + SHIFT) * SETTINGS.FACTOR

    def scaled(self, x: Tensor) -> Tensor:
        return tempered(x)


GLOBALS = {"TEMPERATURE": 3.0, "SHIFT": torch.zeros(6, dtype=torch.float64), "tempered": torch.sin, "FACTOR": 5.0}


@pytest.mark.parametrize("name", GLOBALS)
@pytest.mark.parametrize("through", ["module", "lambda", "explanation"])
def test_globals_that_a_module_computes_with_are_watched(
    name: str, through: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = types.ModuleType("settings")
    settings.__file__, settings.FACTOR = "settings.py", 1.0
    monkeypatch.setitem(globals(), "SETTINGS", settings)
    model = nn.Sequential(Global(), nn.Softplus()).double()
    functions = {"module": model, "lambda": lambda x: model(x), "explanation": lambda x: explained(x, TARGET3)}
    explained = xb.explain.gradient(model)

    def change() -> None:
        if name == "FACTOR":
            settings.FACTOR = GLOBALS[name]
        else:
            monkeypatch.setitem(globals(), name, GLOBALS[name])

    check_follows(functions[through], change, X6)


def test_an_attribute_of_another_file_is_watched() -> None:
    settings = types.ModuleType("settings")
    settings.__file__, settings.FACTOR, settings.unused = "settings.py", 1.0, 0
    check_follows(lambda x: x * settings.FACTOR, lambda: setattr(settings, "FACTOR", 2.0), X6)


TARGET3 = torch.tensor([0, 1, 2])
CHANGES = {
    "attribute": lambda m: setattr(m, "scale", 3.0),
    "option in a dict": lambda m: m.options.update(shift=1.0),
    "element of a list": lambda m: m.powers.__setitem__(0, 3),
    "element of a list in a dict": lambda m: m.nested["factors"].__setitem__(0, 3.0),
    "order of an OrderedDict": lambda m: m.by_name.move_to_end("a"),
    "order of the children": lambda m: m.layers._modules.update({"1": m.layers._modules.pop("1")}),
    "attribute of a child": lambda m: setattr(m.layers[1], "negative_slope", 0.9),
    "child": lambda m: m.extra.append(m.layers[2]) or m.layers.__setitem__(2, nn.Linear(6, 4).double()),
    "other activation": lambda m: m.extra.append(m.layers[1]) or m.layers.__setitem__(1, nn.Tanh()),
    "appended child": lambda m: m.layers.append(nn.ReLU()),
    "hook": lambda m: m.layers[0].register_forward_hook(lambda module, args, out: out * 2) and None,
    "forward": lambda m: setattr(m, "forward", lambda x: m.layers(x) * 7),
    "class": lambda m: setattr(m.layers[1], "__class__", nn.Identity),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("through", ["module", "lambda", "explanation"])
def test_changing_a_module_is_noticed(change: str, through: str) -> None:
    torch.manual_seed(0)
    model = Bent().double()
    targets = torch.tensor([0, 1, 2])
    fn = {
        "module": model,
        "lambda": lambda x: model(x),
        "explanation": lambda x: xb.explain.gradient_x_input(model, of="loss")(x, targets) + model(x).sum(),
    }[through]
    check_follows(fn, lambda: CHANGES[change](model), X6)


def test_a_hook_in_the_place_of_another_is_noticed() -> None:
    """Also if it lies at the address of the other, as new objects of the size of one that is gone do."""
    model = Bent().double()

    def scale(factor: float) -> torch.utils.hooks.RemovableHandle:
        return model.layers[0].register_forward_hook(lambda module, args, out: out * factor)

    hook = scale(1.0)
    bounded = xb.bound(model)
    for factor in (2.0, 3.0, 4.0):
        assert torch.allclose(bounded(xb.Interval.point(X6)).mid, model(X6))
        hook.remove()
        hook = scale(factor)
    assert torch.allclose(bounded(xb.Interval.point(X6)).mid, model(X6))


@pytest.mark.parametrize("through", ["module", "explanation"])
def test_a_hook_of_all_modules_is_noticed(through: str) -> None:
    model = Bent().double()
    fn = model if through == "module" else lambda x: xb.explain.gradient(model)(x, torch.tensor([0, 1, 2]))
    hooks = []

    def change() -> None:
        hooks.append(nn.modules.module.register_module_forward_hook(lambda module, args, out: out * 2))

    try:
        check_follows(fn, change, X6)
        with_hook = xb.bound(fn)(xb.Interval.point(X6)).mid
    finally:
        hooks[0].remove()
    check = fn(X6)
    assert torch.allclose(xb.bound(fn)(xb.Interval.point(X6)).mid, check) and not torch.allclose(with_hook, check)


def test_another_default_dtype_is_noticed() -> None:
    """torch.full then makes another tenth."""
    x = torch.ones(4, dtype=torch.float64)
    bounded = xb.bound(lambda x: x + torch.full((4,), 0.1))
    assert bounded(xb.Interval.point(x)).mid[0] != 1.1
    try:
        torch.set_default_dtype(torch.float64)
        assert bounded(xb.Interval.point(x)).mid[0] == 1.1
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("through", ["closure", "attribute"])
def test_numbers_read_from_an_array_are_noticed(through: str) -> None:
    array = np.ones(3)
    layer = nn.Identity()
    layer.scale = array  # type: ignore[assignment]
    fn = {
        "closure": lambda x: x * float(array[0]),
        "attribute": lambda x: layer(x) * torch.as_tensor(layer.scale.tolist()[0]),  # type: ignore[operator]
    }[through]
    check_follows(fn, lambda: array.__setitem__(0, 3.0), X6)


def test_what_a_tensor_of_the_closure_is_like_is_noticed() -> None:
    weight = nn.Parameter(torch.ones(6, dtype=torch.float64))
    check_follows(lambda x: x * (2 if weight.requires_grad else 3), lambda: weight.requires_grad_(False), X6)


@pytest.mark.skipif(not native.available(), reason="no native module")
@pytest.mark.parametrize("name", ["mlp", "convolutions"])
def test_a_model_compared_once_is_recognised_at_a_glance(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = (mlp(), images(2, shape=(6,))) if name == "mlp" else (residual(), images(2))
    bounded = xb.bound(xb.explain.gradient(model))
    for _ in range(2):
        before = bounded(xb.Interval.point(x), TARGET).mid
    monkeypatch.setattr(watch._Watched, "unchanged", lambda self: pytest.fail("looked at again"))
    assert torch.equal(bounded(xb.Interval.point(x), TARGET).mid, before)


def test_a_parameter_of_another_shape_with_the_same_strides_is_noticed() -> None:
    layer = nn.Linear(6, 4).double()
    bounded = xb.bound(lambda x: layer(x).sum(1))
    for _ in range(3):
        bounded(xb.Interval.point(X6))
    layer.weight.data, layer.bias.data = layer.weight.data[:2], layer.bias.data[:2]
    assert torch.allclose(bounded(xb.Interval.point(X6)).mid, layer(X6).sum(1))


def test_being_watched_keeps_no_model_alive() -> None:
    model = Bent().double()
    bounded = xb.bound(model)
    for _ in range(3):
        bounded(xb.Interval.point(X6))
    alive = weakref.ref(model)
    del model, bounded
    gc.collect()
    assert alive() is None


def test_parts_of_a_model_that_are_not_called_are_watched_too() -> None:
    model = Bent().double()

    def replace() -> None:
        model.layers[0].weight = nn.Parameter(torch.rand(6, 6, dtype=torch.float64))

    check_follows(model.features, replace, X6)
    check_follows(lambda x: x @ model.layers[0].weight.T, replace, X6)
    dropping = nn.Dropout(0.5).eval()
    bounded = xb.bound(lambda x: F.dropout(x, 0.5, dropping.training))
    bounded(xb.Interval.point(X6))
    dropping.train()
    with pytest.raises(xb.CaptureError, match="random"):
        bounded(xb.Interval.point(X6))


SCALE = torch.tensor(2.0, dtype=torch.float64)
FACTORS = [1.0]


def helper(x: Tensor) -> Tensor:
    return sum(x * SCALE * factor for factor in FACTORS)


def test_everything_a_function_refers_to_is_watched() -> None:
    global SCALE
    weight, options = torch.tensor(2.0, dtype=torch.float64), {"s": [1.0]}

    class Callable:
        def __init__(self) -> None:
            self.factor = 2.0

        def __call__(self, x: Tensor) -> Tensor:
            return x * self.factor

        def method(self, x: Tensor) -> Tensor:
            return x * self.factor

    def rebind() -> None:
        nonlocal weight
        weight = weight + 1

    def rebind_global() -> None:
        global SCALE
        SCALE = SCALE + 1

    def keyword(x: Tensor, *, a: float = 2.0, b: float = 3.0) -> Tensor:
        return x * a + b

    thing, inner = Callable(), lambda x: x * weight
    for fn, change in (
        (lambda x: x * weight * len(FACTORS), rebind),
        (lambda x: x * options["s"][0], lambda: options["s"].__setitem__(0, 5.0)),
        (lambda x: helper(x), rebind_global),
        (functools.partial(helper), rebind_global),
        (lambda x: helper(x), lambda: FACTORS.append(2.0)),
        (lambda x: inner(x), rebind),
        (lambda x: sum(x * SCALE for _ in range(2)), rebind_global),
        (thing, lambda: setattr(thing, "factor", 3.0)),
        (thing.method, lambda: setattr(thing, "factor", 4.0)),
        (keyword, lambda: setattr(keyword, "__kwdefaults__", {"b": 2.0, "a": 3.0})),
    ):
        check_follows(fn, change, X6)
    explanation = xb.explain.gradient(lambda x: (x * weight).square())
    targets = torch.tensor([0, 1, 2])
    before = xb.bound(explanation)(xb.Interval.point(X6), targets).mid
    rebind()
    assert not torch.allclose(before, xb.bound(explanation)(xb.Interval.point(X6), targets).mid)


def test_one_code_on_objects_of_two_classes() -> None:
    class First:
        factor = 2.0

        def apply(self, x: Tensor) -> Tensor:
            return x * self.factor

    class Second:
        def __init__(self) -> None:
            self.other = 3.0

        def apply(self, x: Tensor) -> Tensor:
            return x * self.other

    def explained_by(thing):
        return lambda x: thing.apply(x)

    first, second = First(), Second()
    check_follows(explained_by(first), lambda: setattr(first, "factor", 5.0), X6)
    check_follows(explained_by(second), lambda: setattr(second, "other", 5.0), X6)


@dataclasses.dataclass
class Options:
    scale: float = 2.0


@dataclasses.dataclass(slots=True)
class Slots:
    scale: float = 2.0


def decorated(function: Callable) -> Callable:
    def call(*args):
        return function(*args)

    return call


class Scale:
    """Methods that no code mentions by their names, or that are found behind others."""

    def __init__(self) -> None:
        self.scale = 2.0

    def __mul__(self, x: Tensor) -> Tensor:
        return x * self.scale

    def __getitem__(self, _: int) -> float:
        return self.scale

    @decorated
    def times(self, x: Tensor) -> Tensor:
        return x * self.scale

    @torch.no_grad()
    def without_gradients(self, x: Tensor) -> Tensor:
        return x * self.scale

    again = functools.partialmethod(times)

    def hot(self, x: Tensor) -> Tensor:
        return x * TEMPERATURE


class User:
    """Reads an object that it is given."""

    shift = 1.0

    def __init__(self, options: Options) -> None:
        self.options = options

    def apply(self, x: Tensor) -> Tensor:
        return x * self.options.scale + self.shift


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x * TEMPERATURE


def matched(x: Tensor, options: Options) -> Tensor:
    match options:
        case Options(scale=factor):
            return x * factor
    raise AssertionError


def scaled(x: Tensor, scale: float) -> Tensor:
    return x * scale


read_scale = operator.attrgetter("scale")
HIDDEN: dict[str, tuple[type, Callable]] = {
    "an operator of its class": (Scale, lambda it, x: it * x),
    "an item": (Scale, lambda it, x: it[0] * x),
    "a decorated method": (Scale, lambda it, x: it.times(x)),
    "a method without gradients": (Scale, lambda it, x: it.without_gradients(x)),
    "a partial method": (Scale, lambda it, x: it.again(x)),
    "as a dictionary": (Options, lambda it, x: x * dataclasses.asdict(it)["scale"]),
    "as keywords": (Options, lambda it, x: scaled(x, **vars(it))),
    "by a string": (Options, lambda it, x: x * getattr(it, "sca" + "le")),
    "by a getter": (Options, lambda it, x: x * read_scale(it)),
    "by a pattern": (Options, lambda it, x: matched(x, it)),
    "in a slot": (Slots, lambda it, x: x * it.scale),
    "by an object that is made": (Options, lambda it, x: User(it).apply(x)),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_attributes_that_are_read_without_being_named_are_watched(name: str) -> None:
    kind, read = HIDDEN[name]
    held = kind()
    check_follows(lambda x: read(held, x), lambda: setattr(held, "scale", 3.0), X6)


def test_a_class_that_comes_later_is_watched_too() -> None:
    """Below what the function refers to itself: names are looked up again where another class or function is met."""

    class Second:
        def __init__(self) -> None:
            self.other = 3.0

        def times(self, x: Tensor) -> Tensor:
            return x * self.other

    holder = types.SimpleNamespace(thing=Scale(), run=lambda x, options: x)
    options = Options()

    def fn(x: Tensor) -> Tensor:
        return holder.run(holder.thing.times(x), options)

    check_follows(fn, lambda: setattr(holder, "thing", Second()), X6)
    check_follows(fn, lambda: setattr(holder.thing, "other", 5.0), X6)
    check_follows(fn, lambda: setattr(holder, "run", lambda x, options: x * options.scale), X6)
    check_follows(fn, lambda: setattr(options, "scale", 5.0), X6)


def test_what_classes_hold_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    thing = Scale()
    hotter = iter((3.0, 4.0))

    def heat() -> None:
        monkeypatch.setitem(globals(), "TEMPERATURE", next(hotter))

    for fn, change in (
        (lambda x: thing.hot(x), heat),
        (lambda x: Straight.apply(x), heat),
        (lambda x: User(Options()).apply(x), lambda: monkeypatch.setattr(User, "shift", 7.0)),
        (lambda x: User(Options()).apply(x), lambda: monkeypatch.setattr(User, "apply", lambda self, x: x * 9)),
    ):
        check_follows(fn, change, X6)


LAYER = nn.Linear(6, 6).double()


class Reads:
    __slots__ = ()

    def __call__(self, x: Tensor) -> Tensor:
        return x @ LAYER.weight.T


class ReadsInside(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Reads()(x)


@pytest.mark.parametrize("fn", [Reads(), ReadsInside(), lambda x: Reads()(x)])
def test_modules_that_are_read_and_never_called_are_watched(fn: Callable) -> None:
    check_follows(fn, lambda: setattr(LAYER, "weight", nn.Parameter(LAYER.weight.detach() * 3)), X6)


def warm(x: Tensor) -> Tensor:
    return x * TEMPERATURE


def test_objects_among_the_arguments_are_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, thing = nn.Linear(6, 6).double(), Scale()
    layer.scale = 2.0  # type: ignore[assignment]
    hotter = iter((3.0, 4.0))

    def replace() -> None:
        layer.weight = nn.Parameter(layer.weight.detach() * 3)

    def heat() -> None:
        monkeypatch.setitem(globals(), "TEMPERATURE", next(hotter))

    for fn, given, change in (
        (lambda x, m: x @ m.weight.T, layer, replace),
        (lambda x, m: x * m.scale, layer, lambda: setattr(layer, "scale", 3.0)),
        (lambda x, c: x @ c.m.weight.T, types.SimpleNamespace(m=layer), replace),
        (lambda x, c: c(x), layer.forward, replace),
        (lambda x, c: c(x), thing.times, lambda: setattr(thing, "scale", 3.0)),
        (lambda x, c: c(x), warm, heat),
        (lambda x, c: c.hot(x), thing, heat),
    ):
        bounded = xb.bound(fn)
        for _ in range(3):
            bounded(xb.Interval.point(X6), given)
        change()
        assert torch.allclose(bounded(xb.Interval.point(X6), given).mid, fn(X6, given))


FACTOR_OF: dict[str, float] = {"a": 2.0}
FACTOR_PARTIAL = functools.partial(pow, 2.0)
FACTOR_OBJECT = Options()


class Base(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(x)

    def scaled(self, x: Tensor) -> Tensor:
        return x * TEMPERATURE * FACTOR_OF["a"] * FACTOR_PARTIAL(3) * FACTOR_OBJECT.scale


class Derived(Base):
    """Its globals are behind a decorator, ``super()``, a method that is stored, a hook and an attribute's closure."""

    power = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.hook, self.inside = 1.0, {"factor": 1.0}
        self.stored, inside = self.by_hook, self.inside
        self.activation = lambda x: x * inside["factor"]
        self.register_forward_hook(lambda module, args, out: out * HOOKED)

    @decorated
    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.stored(super().forward(x)) ** self.power)

    def by_hook(self, x: Tensor) -> Tensor:
        return x * STORED


HOOKED = STORED = 1.0
BEHIND = {
    "super": lambda patch, model: patch.setitem(globals(), "TEMPERATURE", 3.0),
    "container": lambda patch, model: patch.setitem(FACTOR_OF, "a", 3.0),
    "partial": lambda patch, model: patch.setitem(globals(), "FACTOR_PARTIAL", functools.partial(pow, 3.0)),
    "object": lambda patch, model: patch.setattr(FACTOR_OBJECT, "scale", 3.0),
    "hook": lambda patch, model: patch.setitem(globals(), "HOOKED", 3.0),
    "stored method": lambda patch, model: patch.setitem(globals(), "STORED", 3.0),
    "closure": lambda patch, model: patch.setitem(model.inside, "factor", 3.0),
    "class attribute": lambda patch, model: patch.setattr(Derived, "power", 2.0),
    "method": lambda patch, model: patch.setattr(Base, "scaled", lambda self, x: x.square()),
    "forward": lambda patch, model: patch.setattr(Derived, "forward", lambda self, x: x.square()),
}


@pytest.mark.parametrize("name", BEHIND)
@pytest.mark.parametrize("through", ["module", "lambda"])
def test_what_a_module_computes_with_is_watched_wherever_it_stands(
    name: str, through: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Derived()
    fn = model if through == "module" else lambda x: model(x)
    check_follows(fn, lambda: BEHIND[name](monkeypatch, model), X6)


def test_what_a_function_does_not_look_at_needs_no_new_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer counts its steps and keeps its losses beside the model that it explains."""

    class Trainer:
        def __init__(self) -> None:
            self.model, self.options = mlp(), {"scale": 2.0}
            self.steps, self.losses = 0, [0.0]

        def explain(self, x: Tensor) -> Tensor:
            return self.scaled(x)

        def scaled(self, x: Tensor) -> Tensor:
            return self.model(x) * self.options["scale"]

        def step(self) -> None:
            self.steps += 1
            self.losses.append(float(self.steps))

    trainer = Trainer()
    calls = captures(monkeypatch)
    for _ in range(3):
        xb.bound(trainer.explain)(xb.Interval.point(X6))
        xb.bound(lambda x: trainer.explain(x))(xb.Interval.point(X6))
        trainer.step()
    assert len(calls) == 2
    trainer.options["scale"] = 3.0
    assert torch.allclose(xb.bound(trainer.explain)(xb.Interval.point(X6)).mid, trainer.explain(X6))


def test_an_option_object_changed_in_place_is_another_argument() -> None:
    config = types.SimpleNamespace(scale=2.0)
    bounded = xb.bound(lambda x, c: x * c.scale)
    bounded(xb.Interval.point(X6), config)
    config.scale = 5.0
    assert torch.allclose(bounded(xb.Interval.point(X6), config).mid, 5 * X6)


def test_values_of_live_tensors_are_never_baked_in() -> None:
    flag, index = torch.tensor(True), torch.tensor([0, 2])
    model = nn.Module()
    model.register_buffer("temperature", torch.tensor(2.0))
    for fn in (
        lambda x: x * float(model.temperature),
        lambda x: x if flag else -x,
        lambda x: x[:, index.tolist()],
        lambda x: x[:, list(index.numpy())],
    ):
        with pytest.raises(xb.CaptureError, match=r"reads a parameter's value|reads the value"):
            xb.bound(fn)(xb.Interval.point(X6))
    buffer = torch.zeros(6, dtype=torch.float64)
    before = buffer.clone()
    for fn in (
        lambda x: x * buffer.add_(1.0),
        lambda x: x + buffer.normal_(),
        lambda x: buffer[0].copy_(x.mean()) + x + buffer,
    ):
        with pytest.raises(xb.CaptureError, match=r"writes|random"):
            xb.bound(fn)(xb.Interval.point(X6))
        assert torch.equal(buffer, before)
    part = buffer[1:]

    def reads_another_view(x: Tensor) -> Tensor:
        buffer.copy_(x.mean(0))
        return x[:, 1:] + part

    with pytest.raises(xb.CaptureError, match="writes"):
        xb.bound(reads_another_view)(xb.Interval.point(X6))


def test_what_is_written_before_it_is_read_needs_no_value_before() -> None:
    """Nor does what is computed from constants alone, in place, as networks of positions are."""
    buffer, layer = torch.zeros(6, dtype=torch.float64), nn.Linear(2, 6).double()
    table = torch.rand(3, 2, 2, dtype=torch.float64)

    def fn(x: Tensor) -> Tensor:
        buffer.copy_(x.mean(0))
        places = F.relu(layer(table).view(-1, 6), inplace=True)
        matrix = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=x.dtype)
        matrix[0] = layer.bias[:2]
        return (buffer + x) @ places.t() + matrix.sum()

    bounds = xb.bound(fn, sound=True)(xb.Interval.point(X6))
    assert not buffer.any()
    layer.bias.data += 1.0  # the live tensors, not what they were
    bounds = xb.bound(fn, sound=True)(xb.Interval.point(X6))
    assert bounds.contains(fn(X6).detach()).all() and bounds.rad.max() < 1e-12


def test_backward_inside_a_function_works_on_a_model_that_has_gradients() -> None:
    model = mlp()
    model(X6).sum().backward()
    grads = [p.grad for p in model.parameters()]

    def fn(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        model(x).sum().backward()
        return x.grad

    bounds = xb.bound(fn)(xb.Interval.linf(X6, 0.05))
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))
    assert_encloses(bounds, fn(X6))


def test_no_fake_tensor_is_left_behind_in_the_users_objects() -> None:
    holder = types.SimpleNamespace(last=None, all=[])
    leaf = torch.ones(6, dtype=torch.float64, requires_grad=True)

    def fn(x: Tensor) -> Tensor:
        out = x * leaf
        holder.last = out
        holder.all.append(out)
        out.sum().backward()
        return out

    xb.bound(fn)(xb.Interval.point(X6))
    assert holder.last is None and holder.all == [] and leaf.grad is None


@functools.lru_cache
def kept_mask(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.float64).tril()


MASKS: dict[int, Tensor] = {}


def filled_mask(n: int) -> Tensor:
    return MASKS.setdefault(n, torch.ones(n, n, dtype=torch.float64).tril())


class Masked(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x @ kept_mask(6) + x @ filled_mask(6)


@pytest.mark.parametrize("fn", [Masked(), lambda x: x @ kept_mask(6), lambda x: x @ filled_mask(6)])
def test_caches_of_functions_keep_nothing_of_the_recording(fn: Callable) -> None:
    kept_mask.cache_clear()
    MASKS.clear()
    for scale in (1.0, 2.0):
        bounds = xb.bound(lambda x, scale: fn(scale * x))(xb.Interval.linf(X6, 0.01), scale)
        assert type(kept_mask(6)) is type(filled_mask(6)) is Tensor
        assert_encloses(bounds, fn(scale * X6))
        kept_mask.cache_clear()
        MASKS.clear()


@pytest.mark.parametrize("layout", ["channels-last", "transposed", "expanded"])
def test_layouts_through_an_average_pool_and_a_flatten(layout: str) -> None:
    """What every ResNet ends with; channels-last it is captured with strided views."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4),
    ).double()  # fmt: skip
    x = images(2)
    x = {
        "channels-last": x.to(memory_format=torch.channels_last),
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "expanded": x[:, :, :1].expand(-1, -1, 8, -1),
    }[layout]
    for fn in (model, lambda x: xb.explain.gradient(model, of="probability")(x, TARGET)):
        bounds = xb.bound(fn)(xb.Interval.linf(x, 1e-3)).detach()
        with torch.enable_grad():
            assert_encloses(bounds, fn(x).detach())
        assert bounds.mid.abs().max() > 0


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


def test_the_cache_neither_keeps_models_alive_nor_grows_without_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "CACHE_SIZE", 4)
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


def test_integers_that_are_read_are_constants_of_one_capture_each() -> None:
    """Loops over targets, masks of groups of features, lengths."""
    model = mlp()

    def fn(x: Tensor, y: Tensor, groups: Tensor) -> Tensor:
        rows = [model(x)[i, y[i]] for i in range(len(x))]
        left_out = [model(x * (groups != group)).gather(1, y[:, None])[:, 0] for group in torch.unique(groups).tolist()]
        counted = torch.arange(3)
        return torch.stack([*rows, *torch.stack(left_out).flatten()]) * int(counted.max())

    x, bounded = images(2, shape=(6,)), xb.bound(fn)
    for targets, groups in (([0, 3], [0, 0, 1, 1, 2, 2]), ([2, 3], [0, 1, 1, 1, 1, 0]), ([0, 3], [0, 0, 1, 1, 2, 2])):
        y, mask = torch.tensor(targets), torch.tensor(groups)
        bounds = bounded(xb.Interval.linf(x, 0.01), y, mask)
        assert_encloses(bounds, fn(sample(xb.Interval.linf(x, 0.01), 1, corners=True), y, mask))
        assert y.tolist() == targets and mask.tolist() == groups
    with pytest.raises(xb.CaptureError, match="draws random numbers"):
        xb.bound(lambda x, y: x[torch.randint_like(y, 2)] if y[0] else x)(
            xb.Interval.linf(x, 0.01), torch.tensor([1, 0])
        )


def steps_of_a_rule(x: Tensor) -> Tensor:
    """Numbers are written into tensors, shown in part and read again, as Captum's rules of integration do."""
    nodes = torch.linspace(0.1, 1.0, 3)
    first, *others = torch.tensor([0.25, 0.5, 2.0]).unbind()
    scaled = torch.stack([x * node for node in nodes.tolist()] + [x * float(node) for node in others])
    return scaled.sum(0) * nodes[2].item() if first else x


def offsets_by_their_type(x: Tensor) -> Tensor:
    ends = torch.cumsum(torch.IntTensor([0, 2, 4]), 0)
    return torch.cat([x[:, ends[1] : int(ends[2])], x[:, ends[0]].unsqueeze(1)], 1)


def masks_that_are_added(x: Tensor) -> Tensor:
    """Whole numbers become numbers that are added to scores, and truth values again, which the function looks at."""
    mask = torch.tensor([1, 1, 1, 1, 0, 0])
    added = (torch.ones(2, 6) - mask.float()) * -1e9
    hidden = added < 0
    return (x + added).softmax(1) if hidden.any().item() and not bool(hidden.all()) else x


@pytest.mark.parametrize("fn", [steps_of_a_rule, offsets_by_their_type, masks_that_are_added])
def test_numbers_that_the_function_wrote_itself_may_be_read(fn: Callable) -> None:
    x = images(2, shape=(6,))
    assert_exact_at_zero_radius(fn, x)
    assert_encloses(xb.bound(fn)(xb.Interval.linf(x, 0.1)), fn(sample(xb.Interval.linf(x, 0.1), 1, corners=True)))


def test_whole_numbers_that_are_written_into_are_followed() -> None:
    def fn(x: Tensor, y: Tensor) -> Tensor:
        counts, mask = torch.zeros(6, dtype=torch.long), torch.ones(6, dtype=torch.long)
        part = mask[4:]
        part.zero_()
        mask[:2] = 3
        counts.add_(1).add_(mask)
        counts[int(y[0])] += 7
        return x * counts * mask.float()

    x, y = images(2, shape=(6,)), torch.tensor([2, 1])
    assert_exact_at_zero_radius(fn, x, y)


def test_numbers_that_were_changed_since_may_not_be_read() -> None:
    def fn(x: Tensor) -> Tensor:
        nodes = torch.linspace(0.1, 1.0, 3)
        part = nodes[1:]
        part.mul_(2.0)
        return x * nodes[1].item()

    with pytest.raises(xb.CaptureError, match="reads the value of a tensor into Python"):
        xb.bound(fn)(xb.Interval.linf(images(2, shape=(6,)), 0.1))
    with pytest.raises(xb.CaptureError, match="draws random numbers"):
        xb.bound(lambda x: x * torch.rand_like(torch.ones(3)).max().item())(xb.Interval.linf(images(1), 0.1))


def assigned(y: Tensor, x: Tensor) -> Tensor:
    y.data = x * 3
    return y


def in_another_thread(fn: Callable) -> Tensor:
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(fn()))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda x: assigned(x * 2, x), "assigns to .data"),
        (lambda x: in_another_thread(lambda: x * 2) + x, "where recording could not see it, in another thread"),
        (lambda x: x * torch.randperm(3).tolist()[0], "draws random numbers .aten::randperm"),
        (lambda x: x * x.sum().item(), "reads the value of a tensor into Python"),
        (
            lambda x: nn.utils.rnn.pack_padded_sequence(x[None], [2], batch_first=True).data,
            "packs sequences of different lengths.*output.torch.arange.B., lengths - 1.",
        ),
    ],
)
def test_what_a_fixed_program_cannot_hold_is_named(fn: Callable, message: str) -> None:
    with pytest.raises(xb.CaptureError, match=message) as caught:
        xb.bound(fn)(xb.Interval.linf(images(2, shape=(6,)), 0.01))
    assert "test_capture.py:" in str(caught.value)


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


def test_attributes_that_change_places_are_noticed() -> None:
    """The same objects under other names are another module."""

    class Affine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = 2.0, 3.0

        def forward(self, x: Tensor) -> Tensor:
            return x * self.a + self.b

    model = Affine()
    bounded, x = xb.bound(model), torch.tensor([2.0])
    assert bounded(xb.Interval.point(x)).mid.item() == 7.0
    a, b = model.a, model.b
    del model.a, model.b
    model.b, model.a = a, b
    assert bounded(xb.Interval.point(x)).mid.item() == 8.0


# --- what a user's own networks and functions bring ---------------------------------------------------------


@dataclasses.dataclass
class _Logits:
    logits: Tensor


def test_results_that_cannot_be_seen_are_refused() -> None:
    box = xb.Interval.linf(images(2, shape=(6,)), 0.01)
    with pytest.raises(TypeError, match="returns a _Logits"):
        xb.bound(lambda x: _Logits(2 * x))(box)
    with pytest.raises(TypeError, match="returns a dict"):
        xb.bound(xb.explain.gradient(lambda x: {"logits": x}))(box, TARGET)
    with pytest.raises(xb.CaptureError, match=r"NumPy at .*test_capture\.py"):
        xb.bound(lambda x: torch.from_numpy(x.detach().numpy()))(box)
    with pytest.raises(xb.UnsupportedOperatorError, match="mask that depends on the box"):
        xb.bound(lambda x: x[x > 0.5])(box)
    with pytest.raises(TypeError, match="bounded already"):
        xb.bound(xb.bound(mlp()))


def test_a_layer_inside_a_sequential_is_named() -> None:
    samples = torch.full((2, 2, 2), 0.5)  # instead of random ones
    pool = nn.FractionalMaxPool2d(2, output_size=3, _random_samples=samples)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), pool, nn.Flatten())
    with pytest.raises(xb.UnsupportedOperatorError, match=r"\(in FractionalMaxPool2d\("):
        xb.bound(model)(xb.Interval.linf(torch.rand(2, 1, 12, 12), 0.01))


@pytest.mark.parametrize("sound", [False, True])
@pytest.mark.parametrize("name", ["weight norm", "spectral norm", "global max pooling"])
def test_layers_that_are_captured_in_their_parts(name: str, sound: bool) -> None:
    torch.manual_seed(0)
    parametrizations = torch.nn.utils.parametrizations
    first = {
        "weight norm": lambda: parametrizations.weight_norm(nn.Linear(12, 8)),
        "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(12, 8)),
        "global max pooling": lambda: nn.Sequential(
            nn.Unflatten(1, (1, 12)), nn.Conv1d(1, 8, 3), nn.AdaptiveMaxPool1d(1), nn.Flatten()
        ),
    }[name]()
    fn = xb.explain.gradient(nn.Sequential(first, nn.ReLU(), nn.Linear(8, 4)).eval().double())
    x = images(2, shape=(12,))
    box = xb.Interval.linf(x, 0.05)
    bounds = xb.bound(fn, sound=sound)(box, TARGET)
    for seed in range(40):
        assert_encloses(bounds, fn(sample(box, seed, corners=seed % 2 == 0), TARGET).detach())
    point, value = xb.bound(fn, sound=sound)(xb.Interval.point(x), TARGET), fn(x, TARGET).detach()
    assert torch.allclose(point.mid, value, rtol=1e-12, atol=1e-12) and (point.rad <= 1e-12 * value.abs().max()).all()


def test_recapture_after_a_change_that_no_call_notices() -> None:
    class Options:
        scale = 2.0

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.options = Options()

        def forward(self, x: Tensor) -> Tensor:
            return x * self.options.scale

    model, box = Scaled(), xb.Interval.point(torch.ones(2))
    bounded = xb.bound(model)
    assert bounded(box).mid.tolist() == [2.0, 2.0]
    model.options.scale = 3.0
    bounded.recapture()
    assert bounded(box).mid.tolist() == xb.bound(model)(box).mid.tolist() == [3.0, 3.0]


@pytest.mark.parametrize("batch", [5, 100])  # few boxes are a chain, many are operators one by one
@pytest.mark.parametrize("image", [False, True])
def test_first_calls_inside_a_checkpoint(batch: int, image: bool) -> None:
    """Its hooks on saved tensors must not come between the tracer and the parameters."""
    torch.manual_seed(0)
    first: list[nn.Module] = [nn.Conv2d(1, 3, 3), nn.Flatten()] if image else []
    inputs = 3 * 6 * 6 if image else 64
    model = nn.Sequential(*first, nn.Linear(inputs, 16), nn.ReLU(), nn.Linear(16, 4)).double()
    x = torch.rand(batch, *((1, 8, 8) if image else (64,)), dtype=torch.float64)
    target, eps = torch.zeros(batch, dtype=torch.long), 0.1

    def gradients(checkpointed: bool) -> list[Tensor]:
        bounded = xb.bound(xb.explain.gradient(model))

        def widths(x: Tensor) -> Tensor:
            return bounded(xb.Interval.of(x, torch.full_like(x, eps)), target).rad

        for _ in range(2):
            leaf = x.clone().requires_grad_()
            rad = checkpoint(widths, leaf, use_reentrant=False) if checkpointed else widths(leaf)
            found = torch.autograd.grad(rad.square().sum(), [p for p in model.parameters() if p.dim() > 1])
        later = bounded(xb.Interval.linf(x, eps), target).rad
        assert later.requires_grad and torch.equal(later, rad)
        return [rad.detach(), *found]

    for a, e in zip(gradients(True), gradients(False), strict=True):
        assert e.any() and torch.equal(a, e)


# --- errors that are not ours ------------------------------------------------------------------------------


def test_an_error_of_the_function_says_what_it_was_called_with(caplog: pytest.LogCaptureFixture) -> None:
    wrong = torch.zeros(2, 7, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="reduction dim") as caught:
        xb.bound(mlp())(xb.Interval.linf(wrong, 0.1))
    assert caught.value.__notes__ == [
        "pyxai_bounds was recording Sequential, called with float64 [2, 7]. If it fails on such tensors by itself, "
        "too, they do not fit it; else it does something that cannot be recorded."
    ]
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_our_own_errors_stand_alone() -> None:
    with pytest.raises(xb.CaptureError) as caught:
        xb.bound(lambda x: x if x.sum() > 0 else -x)(xb.Interval.linf(images(2), 0.1))
    assert not hasattr(caught.value, "__notes__")


def test_a_function_that_differentiates_by_an_argument_without_history_is_told_so() -> None:
    fn = lambda x: torch.autograd.grad(x.square().sum(), x)[0]  # noqa: E731
    with pytest.raises(RuntimeError) as caught:
        xb.bound(fn)(xb.Interval.linf(images(2), 0.1))
    assert caught.value.__notes__[1].endswith("begin with x = x.detach().requires_grad_().")


def test_spectral_norm_in_training_mode_says_how_to_end_it() -> None:
    layer = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(6, 3)).double()
    with pytest.raises(xb.CaptureError, match=r"spectral norm does, call model.eval\(\)"):
        xb.bound(layer)(xb.Interval.linf(images(2, shape=(6,)), 0.1))


def test_values_of_a_set_that_a_program_needs_are_explained() -> None:
    box = xb.Interval.linf(images(2, shape=(6,)), 0.1)
    with pytest.raises(xb.UnsupportedOperatorError, match="target is computed from the box: compute it outside"):
        xb.bound(lambda x: xb.explain.gradient(torch.sin)(x, x.argmax(1)))(box)
    with pytest.raises(xb.CaptureError, match=r"reads the value of a tensor into Python \(.*\.item\(\)"):
        xb.bound(lambda x: x * x.max().item())(box)
