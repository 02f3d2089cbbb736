"""Whole bound programs on the kernels: bounds and parameter gradients, and torch.compile without a break."""

import contextlib
from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pyxai_bounds as xb
from pyxai_bounds import fuse, ops, program

pytestmark = pytest.mark.filterwarnings("ignore:Input Tensor . did not already require gradients")


def network() -> nn.Sequential:
    """Strides, an odd number of channels, batch norm, ReLU after ReLU-free layers, and a linear head."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 20, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(20), nn.ReLU(),
        nn.Flatten(), nn.Linear(20 * 4 * 4, 24), nn.ReLU(), nn.Linear(24, 5),
    ).eval()  # fmt: skip


def bounds_and_gradients(backend: str, device: str, compiled: bool = False) -> list[torch.Tensor]:
    model = network().double().to(device)
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(device)
    target = torch.tensor([1, 3], device=device)
    with xb.backend(backend):
        box = xb.Interval.linf(x, 1 / 255)
        bounded = xb.bound(xb.explain.gradient(model))
        if compiled:
            graph = torch.compile(bounded.graph(box, target), fullgraph=True, backend="aot_eager")
            mid, rad = graph(box.mid, box.rad, target)
        else:
            out = bounded(box, target)
            mid, rad = out.mid, out.rad
        (rad.square().mean() + mid.square().sum()).backward()
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    return [t.detach().cpu() for t in (mid, rad, *grads)]


@pytest.mark.parametrize("compiled", [False, True])
def test_bounds_and_parameter_gradients(device, compiled):
    torch._dynamo.reset()
    actual = bounds_and_gradients("triton", device, compiled)
    expected = bounds_and_gradients("reference", "cpu")
    assert sum(bool(e.any()) for e in expected) >= 6
    for a, e in zip(actual, expected, strict=True):
        assert torch.allclose(a, e, rtol=1e-9, atol=1e-12 + 1e-10 * e.abs().max().item())


# --- ReLU′ and its derivative as epilogues ---------------------------------------------------------------------


class Residual(nn.Module):
    """A gradient box with two readers, and inside of the block one with a single one."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 2)
        self.block = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 8, 1))
        self.skip = nn.Conv2d(8, 8, 1, 2)

    def forward(self, x):
        x = self.first(x).relu()
        return self.last((self.block(x) + self.skip(x)).relu()).sum((2, 3))


def explained_twice(model):
    """The gradient in the input and in what the second convolution makes, which is read on the way to the former."""

    def explain(x, target):
        x = x.detach().requires_grad_()
        hidden = model[:3](x)
        chosen = model[3:](hidden).gather(1, target[:, None]).sum()
        return torch.autograd.grad(chosen, (x, hidden))

    return explain


def convolutions():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 2, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 2 * 2, 3),
    )  # fmt: skip


# The network, what explains it, and how many of its backward products make ReLU′ and how many boxes come gated.
EPILOGUES = {
    "convolutions": (convolutions, xb.explain.gradient, 2, 3),
    "odd channels": (lambda: nn.Sequential(*convolutions()[:5], nn.Conv2d(16, 5, 1), nn.ReLU(), nn.Conv2d(5, 3, 3)),
                     lambda model: xb.explain.gradient(lambda x: model(x).sum((2, 3))), 2, 3),
    "a second reader": (Residual, xb.explain.gradient, 1, 2),
    "also a result": (convolutions, explained_twice, 2, 2),
    "max pooling": (lambda: nn.Sequential(*convolutions()[:2], nn.MaxPool2d(2), *convolutions()[2:5], nn.Flatten(),
                                          nn.Linear(64, 3)), xb.explain.gradient, 0, 2),
}  # fmt: skip


def bounded_example(name, device, **options):
    torch.manual_seed(0)
    make, explain, *_ = EPILOGUES[name]
    model = make().double().eval().to(device, memory_format=torch.channels_last)
    x = torch.rand(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(device)
    box = xb.Interval.linf(x.contiguous(memory_format=torch.channels_last), 1 / 255)
    return model, xb.bound(explain(model), **options), (box, torch.tensor([1, 2], device=device))


def loss_of(explained):
    return sum(e.rad.square().mean() + e.mid.pow(3).sum() for e in tree_leaves(explained, is_leaf=is_interval))


def is_interval(value):
    return isinstance(value, xb.Interval)


def explained_and_differentiated(name, device, **options):
    """Bounds, the gradients of parameters, and those of a loss on these, which the kernels of a max pool have not."""
    model, bounded, args = bounded_example(name, device, **options)
    out = bounded(*args)
    parameters = list(model.parameters())
    twice = name != "max pooling"
    first = torch.autograd.grad(loss_of(out), parameters, create_graph=twice, allow_unused=True)
    squares = sum(g.square().sum() for g in first if g is not None)
    second = torch.autograd.grad(squares, parameters, allow_unused=True) if twice else ()
    once = torch.autograd.grad(loss_of(bounded(*args)), parameters, allow_unused=True)
    ends = [t for e in tree_leaves(out, is_leaf=is_interval) for t in (e.mid, e.rad)]
    return [None if t is None else t.detach().cpu() for t in (*ends, *first, *second, *once)]


@pytest.mark.parametrize("options", [{}, {"checkpoint": True}], ids=str)
@pytest.mark.parametrize("name", EPILOGUES)
def test_epilogues_change_neither_bounds_nor_derivatives(kernels, monkeypatch, name, options):
    actual = explained_and_differentiated(name, kernels, **options)
    _, bounded, args = bounded_example(name, kernels)
    products = bounded.graph(*args).graph.find_nodes(
        op="call_function", target=ops.interval_conv2d_backward_relu
    )  # fmt: skip
    assert sum(node.args[3] is not None for node in products) == EPILOGUES[name][2]
    assert sum(node.args[fuse._GATE] is not None for node in products) == EPILOGUES[name][3]
    monkeypatch.setattr(fuse, "_fuse_relu_backward_after_convolution", lambda graph: None)
    monkeypatch.setattr(fuse, "_gate_gradients_where_they_are_made", lambda graph: None)
    expected = explained_and_differentiated(name, kernels)
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        assert a is None or torch.allclose(a, e, rtol=1e-9, atol=1e-12 + 1e-10 * e.abs().max().item())
    assert sum(bool(e.any()) for e in expected if e is not None) >= 8


def test_no_pass_is_left_for_relu_backward_and_gates(kernels, monkeypatch):
    """Of three ReLU one stands before the first convolution on the way back; no gate is applied by itself."""
    _, bounded, args = bounded_example("convolutions", kernels)
    bounded.graph(*args)
    launched = Counter()
    module = ops.triton._kernels("interval_relu")
    for name in ("relu_into", "relu_backward_into", "gate_into"):
        run = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, name=name, run=run: launched.update([name]) or run(*a))
    loss_of(bounded(*args)).backward()
    assert launched == {"relu_backward_into": 1}


def test_epilogues_compiled(kernels):
    torch._dynamo.reset()
    model, bounded, args = bounded_example("convolutions", kernels)
    program, (box, target) = bounded.graph(*args), args
    mid, rad = torch.compile(program, fullgraph=True, backend="aot_eager")(box.mid, box.rad, target)
    expected = bounded(*args)
    assert torch.equal(mid, expected.mid) and torch.equal(rad, expected.rad)
    weights = [p for p in model.parameters() if p.dim() == 4]
    found, gradients = torch.autograd.grad(rad.sum(), weights), torch.autograd.grad(expected.rad.sum(), weights)
    assert all(torch.allclose(a, e, rtol=1e-12) and e.any() for a, e in zip(found, gradients, strict=True))


# --- flattened images: columns of weights are moved, boxes are not --------------------------------------------


class Heads(nn.Module):
    """Two linear layers on one flattened image, one of them twice."""

    def __init__(self):
        super().__init__()
        self.conv, self.a, self.b = nn.Conv2d(2, 5, 3), nn.Linear(5 * 3 * 4, 3), nn.Linear(5 * 3 * 4, 3)
        self.last = nn.Linear(3, 4)

    def forward(self, x):
        rows = self.conv(x).relu().flatten(1)
        return self.last((self.a(rows) + self.b(rows)).relu() + self.a(rows * 2))


def convolution(outputs=5):
    return nn.Conv2d(2, outputs, 3), nn.ReLU()  # [B, 2, 5, 6] → [B, outputs, 3, 4]


FLATTENED = {
    "one image": (1, lambda: (*convolution(), nn.Flatten(), nn.Linear(60, 3), nn.ReLU(), nn.Linear(3, 4))),
    "odd": (7, lambda: (*convolution(), nn.Flatten(), nn.Linear(60, 9, bias=False), nn.ReLU(), nn.Linear(9, 4))),
    "whole bytes": (6, lambda: (*convolution(8), nn.Flatten(), nn.Linear(96, 16), nn.ReLU(), nn.Linear(16, 4))),
    "one weight": (5, lambda: (*convolution(), nn.Flatten(), nn.Linear(60, 4))),
    "linear in a row": (6, lambda: (*convolution(), nn.Flatten(), nn.Linear(60, 5), nn.Linear(5, 4))),
    "max pooling": (
        4, lambda: (*convolution(8), nn.MaxPool2d(2, 1), nn.Flatten(), nn.Linear(48, 5), nn.ReLU(), nn.Linear(5, 4))),
    "between": (
        3, lambda: (*convolution(), nn.Flatten(), nn.Dropout(), nn.Linear(60, 5), nn.BatchNorm1d(5), nn.ReLU(),
                    nn.Linear(5, 4))),
    "heads": (3, lambda: (Heads(),)),
    "image, linear, image": (
        7, lambda: (*convolution(), nn.Flatten(), nn.Linear(60, 24), nn.ReLU(), nn.Unflatten(1, (2, 3, 4)),
                    nn.Conv2d(2, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 4))),
}  # fmt: skip


def whole_numbers(name, device, dtype, order):
    """A network and a box of small whole numbers, so that sums are exact, and results do not depend on their order."""
    batch, make = FLATTENED[name]
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential(*make()).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randint(-1, 2, p.shape, generator=generator))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.running_var.fill_(1 - module.eps)
    x = torch.randint(-2, 3, (batch, 2, 5, 6), generator=generator).to(device, dtype)
    box = xb.Interval.of(*(t.contiguous(memory_format=order) for t in (x, torch.ones_like(x))))
    target = torch.randint(4, (batch,), generator=generator).to(device)
    return model.to(device, dtype, memory_format=order), box, target


def results(model, box, target):
    """Bounds of outputs and explanations, and the gradients of all parameters and of the box."""
    box = xb.Interval.of(*(t.clone(memory_format=torch.preserve_format).requires_grad_() for t in (box.mid, box.rad)))
    logits, explained = xb.bound(model)(box), xb.bound(xb.explain.gradient(model))(box, target)
    found = [logits.mid, logits.rad, explained.mid, explained.rad]
    weights = [torch.arange(t.numel(), device=t.device).reshape(t.shape) % 3 - 1 for t in found]
    sum((t * w).sum() for t, w in zip(found, weights, strict=True)).backward()
    grads = [t.grad for t in (*model.parameters(), box.mid, box.rad)]
    with torch.no_grad():
        again = xb.bound(xb.explain.gradient(model))(box, target)
    return [*found, *grads, again.mid, again.rad]


def last(name, device, dtype=torch.float32):
    return whole_numbers(name, device, dtype, torch.channels_last)


@contextlib.contextmanager
def original(monkeypatch):
    """Programs that are made in this context flatten images in the order of channels."""
    with monkeypatch.context() as patch:
        patch.setattr(fuse, "_flatten_as_images_lie", lambda graph: None)
        yield


def moved_weights(program):
    """How many weights have their columns moved in a program."""
    permuted = program.graph.find_nodes(op="call_function", target=torch.ops.aten.permute.default)
    return sum(user.target is torch.ops.aten.clone.default for node in permuted for user in node.users)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.bfloat16) for name in FLATTENED), ("odd", torch.float32), ("one weight", torch.float64)],
    ids=str,
)
def test_flattened_as_images_lie(kernels, monkeypatch, name, dtype):
    model, box, target = last(name, kernels, dtype)
    program = xb.bound(xb.explain.gradient(model)).graph(box, target)
    assert moved_weights(program)
    actual = results(model, box, target)
    with original(monkeypatch):
        expected = results(*last(name, kernels, dtype))
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        assert a is None or torch.equal(a, e)
    assert sum(bool(e.any()) for e in expected if e is not None) >= 8


def test_one_copy_of_a_weight_where_it_is_smaller_than_those_of_the_images(kernels):
    def moved(outputs, order=torch.channels_last, dtype=torch.float64, **options):
        model = nn.Sequential(*convolution(), nn.Flatten(), nn.Linear(60, outputs), nn.ReLU(), nn.Linear(outputs, 4))
        x = torch.rand(5, 2, 5, 6).to(kernels, dtype).contiguous(memory_format=order)
        bounded = xb.bound(xb.explain.gradient(model.to(kernels, dtype)), **options)
        return moved_weights(bounded.graph(xb.Interval.linf(x, 0.1), torch.zeros(5, dtype=torch.long, device=kernels)))

    assert moved(19) == 1 and moved(20) == 0  # two images of 5 boxes there, two back
    # A GPU's program begins by bringing images into that order.
    assert moved(19, order=torch.contiguous_format) == (kernels == "cuda")
    assert moved(19, dtype=torch.float32) == 1 and moved(19, dtype=torch.float32, sound=True) == 0
    with xb.backend("reference"):
        assert moved(19) == 0


class Moves(TorchDispatchMode):
    """Counts copies of images of one size into another memory order, inside of fused operators as well."""

    def __init__(self, size):
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in ops.undispatched:
            with self:
                return ops.undispatched[func](*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        aten = torch.ops.aten
        if func in (aten.clone.default, aten.contiguous.default, aten.reshape.default, aten.copy_.default):
            before = args[func is aten.copy_.default]
            moved = out.data_ptr() != before.data_ptr() and out.stride() != before.stride()
            self.count += moved and out.numel() == self.size
        return out


@pytest.mark.parametrize(
    ("name", "copies"), [("odd", 4), ("whole bytes", 4), ("max pooling", 4), ("linear in a row", 2)]
)
@pytest.mark.parametrize("train", [False, True])
def test_no_image_is_moved(kernels, monkeypatch, name, copies, train):
    def moves():
        model, box, target = last(name, kernels)
        size = model[: list(map(type, model)).index(nn.Flatten)](box.mid).numel()
        bounded = xb.bound(xb.explain.gradient(model))
        bounded.graph(box, target)  # captured before anybody counts
        with torch.set_grad_enabled(train), Moves(size) as counted:
            out = bounded(box, target)
            if train:
                (out.mid.square().sum() + out.rad.square().sum()).backward()
        return counted.count

    assert moves() == 0
    with original(monkeypatch):
        assert moves() >= copies  # in training more, some of them inside of PyTorch's own operators


@pytest.mark.parametrize("name", FLATTENED)
def test_memory_orders_are_as_foreseen(kernels, name):
    class Compare(torch.fx.Interpreter):
        def run_node(self, node):
            value = super().run_node(node)
            foreseen = node.meta["val"] if node.op == "call_function" and "val" in node.meta else None
            for v, f in zip(tree_leaves(value), tree_leaves(foreseen), strict=False):
                if isinstance(f, torch.Tensor) and f.dim() == 4:
                    assert (v.shape, v.stride(), v.dtype) == (f.shape, f.stride(), f.dtype), node
            return value

    model, box, target = last(name, kernels)
    program = xb.bound(xb.explain.gradient(model)).graph(box, target)
    Compare(program).run(box.mid, box.rad, target)


def test_images_as_they_lie_compiled(kernels):
    torch._dynamo.reset()
    model, box, target = last("whole bytes", kernels)
    program = xb.bound(xb.explain.gradient(model)).graph(box, target)
    mid, rad = torch.compile(program, fullgraph=True, backend="aot_eager")(box.mid, box.rad, target)
    expected = xb.bound(xb.explain.gradient(model))(box, target)
    assert torch.equal(mid, expected.mid) and torch.equal(rad, expected.rad)
    actual = torch.autograd.grad(rad.sum(), model[3].weight)
    assert torch.equal(*actual, *torch.autograd.grad(expected.rad.sum(), model[3].weight))


class First(nn.Module):
    """Of what a layer returns the first tensor, flattened, and a linear head: [B, 3]."""

    def __init__(self, layer: nn.Module, *shape: int) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(torch.Size(shape).numel(), 3)

    def forward(self, x: Tensor) -> Tensor:
        args = (x, x, x) if isinstance(self.layer, nn.MultiheadAttention) else (x,)
        out = self.layer(*args)
        return self.head((out if isinstance(out, Tensor) else out[0]).flatten(1))


# Layers for which PyTorch has other operators on a GPU than on the CPU, the shape of a sample, that of the result.
OTHERWISE_ON_A_GPU = {
    "batch norm": (lambda: nn.BatchNorm2d(3), (3, 4, 4), (3, 4, 4)),
    "batch norm, 1-D": (lambda: nn.BatchNorm1d(3), (3, 4), (3, 4)),
    "instance norm": (lambda: nn.InstanceNorm2d(3, affine=True), (3, 4, 4), (3, 4, 4)),
    "group norm": (lambda: nn.GroupNorm(1, 3), (3, 4, 4), (3, 4, 4)),
    "layer norm": (lambda: nn.LayerNorm(4), (3, 4), (3, 4)),
    "RMS norm": (lambda: nn.RMSNorm(4), (3, 4), (3, 4)),
    "LSTM": (lambda: nn.LSTM(4, 3, batch_first=True), (3, 4), (3, 3)),
    "GRU": (lambda: nn.GRU(4, 3, 2, batch_first=True, bidirectional=True), (3, 4), (3, 6)),
    "RNN": (lambda: nn.RNN(4, 3, batch_first=True), (3, 4), (3, 3)),
    "LSTM cell": (lambda: nn.LSTMCell(4, 3), (4,), (3,)),
    "GRU cell": (lambda: nn.GRUCell(4, 3), (4,), (3,)),
    "attention": (lambda: nn.MultiheadAttention(4, 2, batch_first=True), (3, 4), (3, 4)),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), (3, 4), (3, 4)),
    "transposed convolution": (lambda: nn.ConvTranspose2d(3, 2, 3, stride=2), (3, 4, 4), (2, 9, 9)),
}


@pytest.mark.parametrize("name", OTHERWISE_ON_A_GPU)
def test_a_gpu_is_asked_for_the_same_operators(device, name):
    if device == "cpu":
        pytest.skip("needs an NVIDIA GPU")
    layer, shape, result = OTHERWISE_ON_A_GPU[name]
    torch.manual_seed(0)
    model = First(layer(), *result).double().eval()
    x, target = torch.rand(2, *shape, dtype=torch.float64), torch.tensor([0, 2])
    operators, bounds = [], []
    for place in ("cpu", "cuda"):
        fn = xb.explain.gradient(model.to(place))
        graph = program.captured_graph(fn, x.to(place), target.to(place)).graph.graph
        operators.append(Counter(str(node.target) for node in graph.nodes if node.op == "call_function"))
        out = xb.bound(fn)(xb.Interval.linf(x.to(place), 1e-3), target.to(place))
        bounds.append((out.mid.detach().cpu(), out.rad.detach().cpu()))
    assert operators[0] == operators[1]
    for a, e in zip(bounds[1], bounds[0], strict=True):
        assert torch.allclose(a, e, rtol=1e-7, atol=1e-12 + 1e-9 * e.abs().max().item())
