"""Stale captures: whatever changes what a function computes is noticed at its next call, and nothing else costs one."""

from __future__ import annotations

import dataclasses
import functools
import gc
import operator
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyxai_bounds as xb
from pyxai_bounds import program, watch
from pyxai_bounds.ops import native
from tests.networks import assert_encloses, images, mlp, residual

TARGET = torch.tensor([1, 3])
X6 = images(3, shape=(6,)) - 0.5


def captures(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by one with every capture."""
    calls: list[int] = []
    real = program.capture

    def counted(*args, **kwargs):
        calls.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(program, "capture", counted)
    return calls


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
