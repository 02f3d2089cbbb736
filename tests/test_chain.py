"""Several operators as one native call give what they give one by one, and so do their derivatives."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyxai_bounds as xb
from pyxai_bounds import ops, recompute
from pyxai_bounds.chain import Chain
from pyxai_bounds.ops.chain import Kernel, Kind, Step
from tests.networks import images, mlp, residual
from tests.ops.cases import LEVELS, level

pytestmark = pytest.mark.skipif(not ops.native.available(), reason="no native module")

VECTORS = images(2, shape=(6,)) - 0.5


class Hidden(nn.Module):
    """Returns a hidden layer, too, and computes something that is not linear between its layers."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(a, b, bias) for a, b in ((6, 9), (9, 17), (17, 5), (5, 33), (33, 4)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, b, c, d, e = self.layers
        hidden = b(a(x).relu()).relu()
        y = d(c(hidden).relu()).tanh()
        return hidden, e(y), y.sum(1)


NETWORKS = {
    "logits": (mlp, 1),
    "gradient": (lambda: xb.explain.gradient(mlp((6, 130, 70, 4))), 2),
    "gradient of the loss": (lambda: xb.explain.gradient(mlp((6, 9, 7, 4)), of="loss"), 2),
    "hidden": (Hidden, 1),
    "hidden without bias": (lambda: Hidden(bias=False), 1),
}


def one_layer(mid: int, rad: int, weight: int) -> Chain:
    """A linear layer [4, 4] on four boxes, of three given matrices."""
    step = Step(Kernel.LINEAR, False, True, mid, rad, weight, None, 3, 4, None, (4, 4, 4))
    return Chain([step], [Kind((4, 4), torch.float64, torch.contiguous_format)] * 5, 3, [3, 4])


def chained_calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A list that grows with every call of a chain: did the kernels take it?"""
    calls: list[bool] = []
    real = Chain.addresses

    def counted(self: Chain, tensors: tuple[Tensor, ...]) -> list[int] | None:
        found = real(self, tensors)
        calls.append(found is not None)
        return found

    monkeypatch.setattr(Chain, "addresses", counted)
    return calls


def flat(results) -> list[Tensor]:
    return [t for r in (results if isinstance(results, tuple) else (results,)) for t in (r.mid, r.rad)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [0, 1, 3, ops.native.FEW, ops.native.FEW + 1])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_chain_computes_what_its_operators_compute(
    name: str, batch: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, arguments = NETWORKS[name]
    fn = make()
    (fn.model if arguments == 2 else fn).to(dtype)
    target = torch.arange(batch) % 4
    args = (xb.Interval.linf(images(batch, shape=(6,)).to(dtype) - 0.5, 0.1), target)[:arguments]
    bounded, calls = xb.bound(fn), chained_calls(monkeypatch)
    with torch.no_grad():
        together = flat(bounded(*args))
        by_operators = bounded.graph(*args)(args[0].mid, args[0].rad, *args[1:])
    chains = len(calls)
    with_gradients = flat(bounded(*args))
    assert len(calls) == 2 * chains
    if batch <= ops.native.FEW:  # more boxes are chained if their layers are large
        assert chains
    assert all(calls)
    assert all(torch.equal(a, b) for a, b in zip(together, by_operators, strict=True))
    assert all(torch.equal(a, b.detach()) for a, b in zip(together, with_gradients, strict=True))
    with torch.no_grad(), xb.backend("reference"):
        plain = flat(bounded(*args))
    tolerance = 1e-5 if dtype is torch.float32 else 1e-12
    assert all(torch.allclose(a, b, tolerance, tolerance) for a, b in zip(plain, together, strict=True))


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_chain_differentiates_as_its_operators_do(name: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    make, arguments = NETWORKS[name]
    fn = make()
    model = (fn.model if arguments == 2 else fn).double()
    box = xb.Interval.of(images(batch, shape=(6,)).sub(0.5), torch.full((batch, 6), 0.1).double())
    calls = chained_calls(monkeypatch)
    assert_same_derivatives(fn, model, box, (torch.arange(batch) % 4,)[: arguments - 1], 1e-9)
    assert calls and all(calls)


def assert_same_derivatives(fn, model: nn.Module, box: xb.Interval, target: tuple, tolerance: float) -> None:
    """Through every result by itself and through all, and once more: one node against one for each operator.

    A derivative that may overwrite what it has read is the one that keeps it, to the last bit.
    """
    inputs = [box.mid.requires_grad_(), box.rad.requires_grad_(), *model.parameters()]
    bounded, args = xb.bound(fn), (box, *target)
    outcomes = []
    for run in (lambda: flat(bounded(*args)), lambda: bounded.graph(*args)(box.mid, box.rad, *target)):
        found: list[Tensor | None] = []
        count = len(run())
        for chosen in (*([place] for place in range(count)), list(range(count))):
            results = run()
            total = sum(results[place].sin().sum() for place in chosen)
            if not total.requires_grad:
                continue
            kept = torch.autograd.grad(total, inputs, retain_graph=True, allow_unused=True)
            found += kept
            first = torch.autograd.grad(total, inputs, create_graph=True, allow_unused=True)
            found += first
            penalty = sum(grad.square().sum() for grad in first if grad is not None)
            if penalty.requires_grad:
                found += torch.autograd.grad(penalty, inputs, retain_graph=True, allow_unused=True)
            last = torch.autograd.grad(total, inputs, allow_unused=True)
            assert all(
                a is b is None or torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(kept, last, strict=True)
            )
        outcomes.append(found)
    assert all(a is b is None or same(a, b, tolerance) for a, b in zip(*outcomes, strict=True))


def same(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """In the 2-norm, and NaN where the other is."""
    error = (a - b).nan_to_num().norm() <= tolerance * b.nan_to_num().norm()
    return a.shape == b.shape and torch.equal(a.isnan(), b.isnan()) and bool(error)


def test_one_weight_in_several_steps_of_a_chain() -> None:
    """Its gradient, and that of a hidden layer that is returned as well, are sums of several parts."""
    torch.manual_seed(0)
    weight = torch.rand(6, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.rand(6, dtype=torch.float64, requires_grad=True)

    def twice(x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.linear(x, weight, bias).relu()
        return hidden, F.linear(F.linear(hidden, weight - 0.5, bias).relu(), weight - 0.5, bias)

    box = xb.Interval.linf(VECTORS, 0.1)
    bounded = xb.bound(twice)
    outcomes = []
    for results in (flat(bounded(box)), bounded.graph(box)(box.mid, box.rad)):
        outcomes.append(torch.autograd.grad(sum(r.sin().sum() for r in results), [weight, bias]))
    assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(*outcomes, strict=True))


@pytest.mark.parametrize("wanted", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("box", [(0, 0, 1), (0, 2, 0), (2, 0, 0)])
def test_a_value_that_a_chain_reads_twice_in_one_step(box: tuple[int, int, int], wanted: tuple[int, ...]) -> None:
    """Its gradient is a sum of parts, of which one may be missing: where midpoints have none, or are the weight."""
    torch.manual_seed(0)
    given = [torch.rand(4, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    chain = one_layer(*box)
    used = [given[number] for number in sorted(set(box))]
    found = []
    for run in (recompute._recorded_chain(chain), chain.with_gradients):
        results = run(*given)
        found.append(torch.autograd.grad(sum(results[n].sin().sum() for n in wanted), used, materialize_grads=True))
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(*found, strict=True))


def test_a_chain_reads_saved_tensors_as_hooks_give_them_back() -> None:
    torch.manual_seed(0)
    given = [torch.rand(4, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    chain = one_layer(0, 1, 2)
    found = []
    for unpack in (lambda t: t, lambda t: t.t().contiguous().t() if t.dim() == 2 else t):  # in the other order
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            results = recompute._recorded_chain(chain)(*given)
        found.append(torch.autograd.grad(sum(r.sum() for r in results), given))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_chain_reads_only_what_its_kernels_can_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that lies in memory in another order is captured anew, and is then no part of a chain."""
    weight = torch.rand(9, 6, dtype=torch.float64)
    weights = [weight, torch.rand(7, 9, dtype=torch.float64)]
    bounded = xb.bound(lambda x: F.linear(F.linear(x, weights[0]).relu(), weights[1]))
    box, calls = xb.Interval.linf(VECTORS, 0.1), chained_calls(monkeypatch)
    with torch.no_grad():
        before = bounded(box)
        weight.set_(weight.t().contiguous().t())  # the same numbers in the other order
        after = bounded(box)
    assert calls == [True]
    assert torch.allclose(before.mid, after.mid) and torch.allclose(before.rad, after.rad)


@pytest.mark.parametrize("grads", [False, True])
@pytest.mark.parametrize("first", [torch.float32, torch.float64])
def test_branches_of_two_dtypes_share_no_chain(first: torch.dtype, grads: bool) -> None:
    """Neither needs the other; in one chain one would be read as if it were the other."""
    torch.manual_seed(0)
    second = torch.float64 if first is torch.float32 else torch.float32
    one, two = (nn.Sequential(nn.Linear(60, 90), nn.ReLU(), nn.Linear(90, 50)).to(dtype) for dtype in (first, second))
    box = xb.Interval.linf(torch.rand(3, 60), 0.1)
    with torch.set_grad_enabled(grads):
        bounds = xb.bound(lambda x: (one(x.to(first)), two(x.to(second))))(box)
    for found, (network, dtype) in zip(bounds, ((one, first), (two, second)), strict=True):
        value = network(box.mid.to(dtype)).detach()
        assert found.dtype is dtype and (found.lower <= value).all() and (value <= found.upper).all()
        alone = xb.bound(network)(box.to(dtype))
        assert torch.equal(found.mid, alone.mid) and torch.equal(found.rad, alone.rad)


# --- convolutions ---------------------------------------------------------------------------------------------


class Seen(nn.Module):
    """Returns an image from between its convolutions, and one that is flattened."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 4, 2, 1), nn.Conv2d(32, 16, 3)
        self.last = nn.Linear(64, 7)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        image = self.b(self.a(x).relu()).relu()
        flat = self.c(image).relu().flatten(1)
        return image, flat, self.last(flat)


def convnet(channels: int = 16, pool: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    between = [nn.MaxPool2d(2), nn.Conv2d(channels, channels, 1)] if pool else [nn.Conv2d(channels, channels, 4, 2, 1)]
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(), *between, nn.ReLU(),
        nn.Conv2d(channels, 32, 3, padding=1, bias=False), nn.ReLU(), nn.Flatten(),
        nn.Linear(512, 48), nn.ReLU(), nn.Linear(48, 10),
    ).eval()  # fmt: skip


CONVNETS = {
    "logits": lambda: convnet(),
    "gradient": lambda: xb.explain.gradient(convnet()),
    "few channels": lambda: xb.explain.gradient(convnet(channels=20)),
    "pooled": lambda: xb.explain.gradient(convnet(pool=True)),
    "residual": lambda: xb.explain.gradient(residual()),
    "flattened without ReLU": lambda: xb.explain.gradient(
        nn.Sequential(
            nn.ReLU(), nn.Conv2d(3, 16, 1, bias=False), nn.Flatten(), nn.Linear(1024, 5), nn.ReLU(), nn.Linear(5, 4)
        )
    ),
    "one pixel": lambda: xb.explain.gradient(
        nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 6), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4))
    ),
    "one channel": lambda: xb.explain.gradient(
        nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 1, 1), nn.ReLU(), nn.Flatten(), nn.Linear(36, 4))
    ),
    "seen": Seen,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [0, 1, 3, 11])
@pytest.mark.parametrize("name", CONVNETS)
def test_a_chain_of_convolutions_computes_what_they_compute(
    name: str, batch: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    fn = CONVNETS[name]()
    model = getattr(fn, "model", fn).to(dtype)
    x = images(batch, shape=(3, 8, 8)).to(dtype).contiguous(memory_format=torch.channels_last)
    args = (xb.Interval.linf(x, 0.02), *(() if fn is model else (torch.arange(batch) % 4,)))
    bounded, calls = xb.bound(fn), chained_calls(monkeypatch)
    with torch.no_grad():
        together = flat(bounded(*args))
        once_more = flat(bounded(*args))
        by_operators = bounded.graph(*args)(args[0].mid, args[0].rad, *args[1:])
    chains = len(calls) // 2
    assert all(calls)
    if batch and name in ("logits", "gradient", "pooled", "seen") and ops.native._has_tiles():
        assert chains
    assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(together, by_operators, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(together, once_more, strict=True))
    assert batch == 0 or not {t.data_ptr() for t in together} & {t.data_ptr() for t in once_more}
    with_gradients = flat(bounded(*args))
    assert all(calls)
    assert all(torch.equal(a, b.detach()) for a, b in zip(together, with_gradients, strict=True))
    with torch.no_grad(), xb.backend("reference"):
        plain = flat(bounded(*args))
    tolerance = 1e-5 if dtype is torch.float32 else 1e-12
    assert all(torch.allclose(a, b, tolerance, tolerance) for a, b in zip(plain, together, strict=True))


@pytest.fixture(params=[name for name in LEVELS if name in ops.native.TILED] or LEVELS)
def at_level(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each instruction-set level that has chains of convolutions."""
    with level(request.param):
        yield


@pytest.mark.usefixtures("at_level")
@pytest.mark.parametrize(
    ("batch", "dtype", "last"), [(1, torch.float64, False), (17, torch.float64, True), (17, torch.float32, False)]
)
@pytest.mark.parametrize("name", [*CONVNETS, "gradient of the loss"])
def test_a_chain_of_convolutions_differentiates_as_they_do(
    name: str, batch: int, dtype: torch.dtype, last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``last``: a weight with its channels last."""
    fn = CONVNETS[name]() if name in CONVNETS else xb.explain.gradient(convnet(), of="loss")
    model = getattr(fn, "model", fn).to(dtype)
    if last:
        model.to(memory_format=torch.channels_last)
    x = images(batch, shape=(3, 8, 8)).to(dtype).contiguous(memory_format=torch.channels_last)
    box = xb.Interval.of(x, torch.full_like(x, 0.02))
    calls = chained_calls(monkeypatch)
    target = () if fn is model else (torch.arange(batch) % 4,)
    assert_same_derivatives(fn, model, box, target, 1e-4 if dtype is torch.float32 else 1e-9)
    assert all(calls)
    if name not in ("residual", "flattened without ReLU") and ops.native._has_tiles():
        assert calls


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.usefixtures("at_level")
@pytest.mark.parametrize(("batch", "dtype"), [(2, torch.float64), (15, torch.float32), (32, torch.float32)])
@pytest.mark.parametrize("name", ["gradient", "few channels", "one channel", "seen", "infinite"])
def test_images_go_through_all_convolutions_at_once(name: str, batch: int, dtype: torch.dtype, threads) -> None:
    """With enough images for all threads a thread takes them one by one, which changes no bit of the bounds."""
    fn = xb.explain.gradient(convnet()) if name == "infinite" else CONVNETS[name]()
    model = getattr(fn, "model", fn).to(dtype)
    if name == "infinite":
        with torch.no_grad():
            model[3].weight[5, 2] = float("inf")
    x = images(batch, shape=(3, 8, 8)).to(dtype).contiguous(memory_format=torch.channels_last)
    args = (xb.Interval.linf(x, 0.02), *(() if fn is model else (torch.arange(batch) % 4,)))
    bounded, found = xb.bound(fn), []
    for count in (1, 2, 3):
        threads(count)
        results = flat(bounded(*args))
        gradients = torch.autograd.grad(
            sum(r.sin().sum() for r in results), list(model.parameters()), allow_unused=True
        )
        with torch.no_grad():
            found.append((*flat(bounded(*args)), *(t.detach() for t in results), *gradients))
    results = bounded.graph(*args)(args[0].mid, args[0].rad, *args[1:])
    for outcome in found:
        for a, b, c in zip(outcome, outcome[len(results) :], results, strict=False):
            assert torch.allclose(a, c, 0, 0, equal_nan=True) and torch.allclose(b, c, 0, 0, equal_nan=True)
        pairs = zip(outcome[2 * len(results) :], found[0][2 * len(results) :], strict=True)
        assert all(a is b is None or same(a, b, 1e-5) for a, b in pairs)  # a library's sums depend on its threads


def test_a_convolution_in_several_steps_of_a_chain() -> None:
    """Its gradient is a sum, its hidden image is returned as well, and one image is read by two layers."""
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 16, 3, padding=1).double()
    first, other = nn.Conv2d(3, 16, 3, padding=1).double(), nn.Conv2d(16, 32, 3, 2).double()

    def branches(x: Tensor) -> tuple[Tensor, ...]:
        hidden = conv(first(x).relu()).relu()
        return hidden, conv(hidden), other(hidden).relu().flatten(1), conv(conv(hidden).relu())

    x = images(5, shape=(3, 8, 8)).contiguous(memory_format=torch.channels_last)
    parts = nn.ModuleList([conv, first, other])
    assert_same_derivatives(branches, parts, xb.Interval.of(x, torch.full_like(x, 0.02)), (), 1e-9)


@pytest.mark.parametrize("what", ["weight", "input", "result"])
def test_what_a_derivative_reads_must_not_be_overwritten(what: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)).double()
    x = images(2, shape=(3, 8, 8)).contiguous(memory_format=torch.channels_last)
    box = xb.Interval.of(x, torch.full_like(x, 0.02))

    def hidden(x: Tensor) -> tuple[Tensor, Tensor]:
        first = model[:2](x)
        return first, model[2:](first)

    first, last = xb.bound(hidden)(box)
    with torch.no_grad():
        {"weight": model[2].weight, "input": box.rad, "result": first.mid}[what].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        last.rad.sum().backward()


def test_gradients_of_boxes_take_their_places_in_memory() -> None:
    """Unless the graph is kept, for which there must be other memory, or a box has several readers."""
    module, model = ops.native.module(), convnet()
    x = images(512, shape=(3, 8, 8)).float().contiguous(memory_format=torch.channels_last)
    args = (xb.Interval.linf(x, 0.02), torch.arange(512) % 4)
    bounded = xb.bound(xb.explain.gradient(model))

    def taken(keep: bool) -> int:
        """Bytes of kept memory that one derivative leaves behind, where there was none."""
        saved: list[Tensor] = []  # held here, since it would wait for the next call as well
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            rad = bounded(*args).rad
        whole = module.kept_bytes // module.most_kept
        blocks = [module.Memory(module.most_kept) for _ in range(whole)]
        blocks.clear()  # what was kept before has made room for them
        blocks += [module.Memory(module.most_kept) for _ in range(whole)]
        assert module.memory_kept() == 0
        torch.autograd.grad(rad.sum(), model[0].weight, retain_graph=keep)
        return module.memory_kept()

    first = 4 * 512 * 16 * 8 * 8  # bytes of the first layer's midpoints
    assert taken(keep=True) - taken(keep=False) >= 2 * first


def test_a_block_that_was_overwritten_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A derivative that failed midway has kept its graph, and may have overwritten what it needs."""
    model = convnet(channels=32).double()
    x = images(17, shape=(3, 8, 8)).contiguous(memory_format=torch.channels_last)
    rad = xb.bound(xb.explain.gradient(model))(xb.Interval.linf(x, 0.02), torch.arange(17) % 4).rad
    real = ops.chain.Chain.adjoint

    def fails(*args) -> None:
        real(*args)
        raise MemoryError

    monkeypatch.setattr(ops.chain.Chain, "adjoint", fails)
    with pytest.raises(MemoryError):
        rad.sum().backward(retain_graph=True)
    with pytest.raises(MemoryError):
        rad.sum().backward()
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        rad.sum().backward()


def test_an_image_that_no_derivative_reads_may_be_overwritten() -> None:
    """The states of ReLU carry no gradient, so nothing reads the box of an explanation again."""
    model = convnet().double()
    x = images(2, shape=(3, 8, 8)).contiguous(memory_format=torch.channels_last)
    box = xb.Interval.of(x, torch.full_like(x, 0.02))
    rad = xb.bound(xb.explain.gradient(model))(box, torch.arange(2)).rad
    box.mid.zero_()
    rad.sum().backward()
    assert model[0].weight.grad is not None


def test_a_derivative_on_another_level_finds_the_same() -> None:
    """Where the tiles read no bits, ReLU′ and gates are passes of their own."""
    model = convnet().double()
    x = images(3, shape=(3, 8, 8)).contiguous(memory_format=torch.channels_last)
    args = (xb.Interval.linf(x, 0.02), torch.arange(3))
    bounded, module = xb.bound(xb.explain.gradient(model)), ops.native.module()
    best, gradients = module.level(), []
    bounded(*args)
    for name in module.levels():
        module.set_level(name)
        try:
            gradients.append(torch.autograd.grad(bounded(*args).rad.square().sum(), model[0].weight)[0])
        finally:
            module.set_level(best)
    assert all(torch.allclose(gradient, gradients[0], rtol=1e-9, atol=1e-12) for gradient in gradients)


def test_images_in_another_order_run_by_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program is kept for one kind of argument, of which the order in memory is no part."""
    x = images(3, shape=(3, 8, 8)).float()
    bounded, target = xb.bound(xb.explain.gradient(convnet())), torch.arange(3)
    results = []
    with torch.no_grad():
        for order in (torch.channels_last, torch.contiguous_format, torch.channels_last):
            results.append(bounded(xb.Interval.linf(x.contiguous(memory_format=order), 0.02), target))
    for other in results[1:]:
        assert torch.allclose(other.mid, results[0].mid, atol=1e-6)
        assert torch.allclose(other.rad, results[0].rad, atol=1e-6)
