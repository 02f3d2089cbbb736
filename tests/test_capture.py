"""Capture: every way in which a naive capture goes wrong, and that nothing of the user's is changed by it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import threading
import types
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import pyxai_bounds as xb
from pyxai_bounds import capture, decompose, program
from tests.networks import Residual, assert_encloses, assert_exact_at_zero_radius, images, mlp, residual, sample

TARGET = torch.tensor([1, 3])
X6 = images(3, shape=(6,)) - 0.5


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


def test_a_quantised_layer_is_refused_and_named() -> None:
    class Linear(nn.Linear):  # as PyTorch's own, which warn of their deprecation when they are made
        __module__ = "torch.ao.nn.quantized.dynamic.modules.linear"

    with pytest.raises(xb.CaptureError, match=r"Linear '0' is quantised.*float32"):
        xb.bound(nn.Sequential(Linear(2, 2)))(xb.Interval.linf(torch.zeros(1, 2), 0.1))


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
    with pytest.raises(xb.UnsupportedOperatorError, match=r"\(in 1: FractionalMaxPool2d\("):
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
