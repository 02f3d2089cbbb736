"""Programs recorded as CUDA graphs: when they are recorded, what a recording may assume, and that it changes nothing.

Without a GPU they are imitated.
"""

import contextlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import pyxai_bounds as xb
from pyxai_bounds import ops, recorder
from pyxai_bounds.ops import replay, triton
from pyxai_bounds.train import GraphedStep, explanation_width, rec
from tests.cuda_graphs import Recording, imitate

pytestmark = pytest.mark.filterwarnings("ignore:Input Tensor . did not already require gradients")


@pytest.fixture
def device(monkeypatch):
    """A GPU if there is one; else the CPU, passed off as one."""
    if torch.cuda.is_available():
        if "triton" in ops.available():  # the library, which is there without being compiled
            monkeypatch.setattr(triton._kernels("tuning"), "fastest", lambda key, candidates, run: candidates[-1])
        # Results are compared to the last bit, and some of cuDNN's algorithms add in whatever order they come.
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
        yield "cuda"
        return
    imitate(monkeypatch)
    monkeypatch.setattr(xb.program.Program, "_without_grad", without_grad_as_on_a_gpu)
    yield "cpu"


def without_grad_as_on_a_gpu(program, tensors):
    with torch.no_grad():
        return program._on_gpu(tensors)


@pytest.fixture
def recorded(monkeypatch):
    """The recordings that were made."""
    found = []

    class Noted(replay.Replay):
        def __init__(self, *args):
            super().__init__(*args)
            found.append(self)

    monkeypatch.setattr(replay, "Replay", Noted)
    return found


def case(device, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 3)
    ).eval()
    x = torch.rand(4, 2, 8, 8)
    return model.to(device), x.to(device), torch.tensor([0, 1, 2, 1], device=device)


def plainly(monkeypatch, bounded, *args):
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setenv("PYXAI_BOUNDS_CUDA_GRAPHS", "0")
        return bounded(*args)


def same(a, b):
    return torch.equal(a.mid, b.mid) and torch.equal(a.rad, b.rad)


@pytest.mark.parametrize("sound", [False, True])
def test_replayed_bounds_are_the_bounds(device, recorded, monkeypatch, sound):
    model, x, target = case(device)
    bounded = xb.bound(xb.explain.gradient(model), sound=sound)
    with torch.no_grad():
        for k in range(4):
            box = xb.Interval.linf(x + 0.1 * k, 0.01)
            labels = (target + k) % 3
            out = bounded(box, labels)
            assert len(recorded) == (k > 0)
            expected = plainly(monkeypatch, bounded, box, labels)
            assert same(out, expected)
        assert len(recorded) == 1
        box = xb.Interval.linf(x[:2], 0.01)  # another shape is another program
        for _ in range(2):
            out = bounded(box, target[:2])
        assert len(recorded) == 2 and same(out, plainly(monkeypatch, bounded, box, target[:2]))


def test_results_stay_when_the_graph_runs_again(device, recorded):
    model, x, target = case(device)
    bounded = xb.bound(xb.explain.gradient(model))
    with torch.no_grad():
        bounded(xb.Interval.linf(x, 0.01), target)
        first = bounded(xb.Interval.linf(x, 0.01), target)
        kept = first.rad.clone()
        bounded(xb.Interval.linf(x, 0.2), target)
    assert len(recorded) == 1 and torch.equal(first.rad, kept)


def test_live_parameters_are_read_and_moved_ones_recorded_again(device, recorded, monkeypatch):
    model, x, target = case(device)
    bounded = xb.bound(xb.explain.gradient(model))
    box = xb.Interval.linf(x, 0.01)
    with torch.no_grad():
        for _ in range(2):
            before = bounded(box, target)
        model[0].weight.mul_(1.5)  # where it lies: the graph sees it
        model[1].running_var.add_(0.5)
        out = bounded(box, target)
        assert len(recorded) == 1 and not torch.allclose(out.rad, before.rad)
        assert same(out, plainly(monkeypatch, bounded, box, target))
        old = model[5].weight.data  # alive, so that its memory is not given out again
        model[5].weight.data = old * 2
        for times in (1, 2, 2):
            out = bounded(box, target)
            assert same(out, plainly(monkeypatch, bounded, box, target)) and len(recorded) == times
        for _ in range(3):  # moved before every call: not worth recording
            old, model[5].weight.data = model[5].weight.data, model[5].weight.data + 1
            assert same(bounded(box, target), plainly(monkeypatch, bounded, box, target))
    assert len(recorded) == 2


def test_another_backend_or_arithmetic_is_another_recording(device, recorded):
    model, x, target = case(device)
    bounded = xb.bound(xb.explain.gradient(model))
    box = xb.Interval.linf(x, 0.01)
    before = torch.backends.cudnn.conv.fp32_precision
    with torch.no_grad():
        for _ in range(2):
            bounded(box, target)
        with ops.backend("reference"):
            bounded(box, target)
            assert len(recorded) == 1
            bounded(box, target)
        assert len(recorded) == 2
        bounded(box, target)
        torch.backends.cudnn.conv.fp32_precision = "ieee"
        try:
            bounded(box, target)
            assert len(recorded) == 2
        finally:
            torch.backends.cudnn.conv.fp32_precision = before


def test_targets_are_still_checked(device, recorded):
    model, x, target = case(device)
    bounded = xb.bound(xb.explain.gradient(model))
    box = xb.Interval.linf(x, 0.01)
    with torch.no_grad():
        for _ in range(2):
            bounded(box, target)
        with pytest.raises(ValueError, match=r"target\[0\] = 9 is out of range"):
            bounded(box, torch.full_like(target, 9))
    assert len(recorded) == 1


def test_nothing_is_recorded_with_gradients_by_request_or_if_too_large(device, recorded, monkeypatch):
    model, x, target = case(device)
    bounded = xb.bound(xb.explain.gradient(model))
    box = xb.Interval.linf(x, 0.01)
    for _ in range(3):
        assert bounded(box, target).rad.requires_grad
        plainly(monkeypatch, bounded, box, target)
    monkeypatch.setattr(recorder, "LARGEST", 1000)
    monkeypatch.setattr(recorder, "LARGEST_EACH", 10)
    large = xb.bound(xb.explain.gradient(case(device, seed=1)[0]))
    with torch.no_grad():
        for _ in range(3):
            large(box, target)
    assert recorded == []
    monkeypatch.setattr(recorder, "LARGEST_EACH", 10**6)  # a deep program of small operators
    deep = xb.bound(xb.explain.gradient(case(device, seed=2)[0]))
    with torch.no_grad():
        for _ in range(3):
            deep(box, target)
    assert len(recorded) == 1


def test_a_program_that_cannot_be_recorded_runs_as_it_is(device, monkeypatch):
    def refuse(*args):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    model, x, target = case(device)
    bounded = xb.bound(xb.explain.gradient(model))
    box = xb.Interval.linf(x, 0.01)
    monkeypatch.setattr(replay, "Replay", refuse)
    with torch.no_grad():
        expected = bounded(box, target)
        with pytest.warns(RuntimeWarning, match="not permitted when stream is capturing\\)"):
            assert same(bounded(box, target), expected)
        assert same(bounded(box, target), expected)  # and says so once


def test_numbers_on_the_cpu_and_looks_at_values_are_not_recorded(device, recorded, monkeypatch):
    constant = torch.full((), 2.0)
    x = torch.rand(3, 4, device=device)
    if device == "cpu":
        monkeypatch.setattr(recorder, "on_gpu", lambda t: t is not constant)
    functions = [lambda t: t * constant]
    weight = torch.rand(4, 4, device=device)
    box = xb.parameter_box(model := nn.Linear(4, 2).to(device), absolute=0.1)
    bounds = [xb.bound(functions[0]), xb.bound(model, parameters=box, product="exact")]
    with torch.no_grad():
        for bounded in bounds:
            for _ in range(3):
                bounded(xb.Interval.linf(x, 0.1))
        assert recorded == []
        for _ in range(2):
            xb.bound(model)(xb.Interval.linf(x @ weight, 0.1))
    assert len(recorded) == 1


def test_expanded_arguments_keep_their_layout(device, recorded, monkeypatch):
    model, x, target = case(device)
    bounded = xb.bound(xb.explain.gradient(model))
    rad = torch.full((1, 1, 1, 1), 0.01, device=device).expand(x.shape)
    box = xb.Interval.of(x, rad)
    with torch.no_grad():
        for _ in range(3):
            out = bounded(box, target)
    assert len(recorded) == 1 and recorded[0]._graph.inputs[1].stride() == (0, 0, 0, 0)
    assert same(out, plainly(monkeypatch, bounded, box, target))


def test_a_replay_takes_what_it_was_recorded_for(device):
    x = torch.rand(3, 4, device=device)
    double = replay.Replay(lambda t: (t * 2,), [x])
    assert torch.equal(double(x + 1)[0], (x + 1) * 2)
    with pytest.raises(ValueError, match=r"Recorded for torch\.float32 \[3, 4\]"):
        double(x[:2])
    with pytest.raises(ValueError, match="Only work on CUDA tensors"):
        replay.Replay(lambda: (), [])


def test_a_recording_that_gives_something_else_is_dropped(device, recorded, monkeypatch):
    """Here a replay does nothing: what stays is of other arguments, or of nothing at all."""
    model, x, target = case(device)
    bounded = xb.bound(xb.explain.gradient(model))
    monkeypatch.setattr(replay.Graph, "replay", lambda self: None)
    boxes = [xb.Interval.linf(x, 0.01 * (k + 1)) for k in range(5)]
    with (
        torch.no_grad(),
        pytest.warns(RuntimeWarning, match="its replays do not give what launching it does") as warned,
    ):
        for box in boxes:
            assert same(bounded(box, target), plainly(monkeypatch, bounded, box, target))
    assert len(warned) == len(recorded) == 1


def test_the_first_two_replays_are_compared_with_launches(device):
    x, factor, launches = torch.rand(3, 4, device=device), [2], []
    double = replay.Replay(lambda t: launches.append(0) or (t * factor[0], t > 0.5), [x])
    double(x / 0)  # of infinity and NaN
    factor[0] = 3  # which a recording cannot see
    with pytest.raises(RuntimeError, match="its replays do not give what launching it does"):
        double(x)
    factor[0] = 2
    double(x)
    before = len(launches)
    assert torch.equal(double(x + 1)[0], (x + 1) * 2) and len(launches) == before


def test_what_differs_from_launch_to_launch_and_memory_that_is_missing_drop_nothing(device):
    x, noise = torch.rand(3, 4, device=device), []

    def noisy(t):
        noise.append(torch.full_like(t, 1e-6 * len(noise)))
        return (t + noise[-1],)

    def large(t):
        noise.append(t)
        if len(noise) > 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return (t + 1,)

    for function in (noisy, large):
        noise.clear()
        recording = replay.Replay(function, [x])
        for k in range(3):
            assert torch.allclose(recording(x + k)[0] - (x + k), recording(x)[0] - x, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="streams of a GPU")
def test_calls_on_several_streams_wait_for_one_another():
    model, x, target = case("cuda")
    bounded = xb.bound(xb.explain.gradient(model))
    boxes = [xb.Interval.linf(x, 0.01 * (k + 1)) for k in range(8)]
    with torch.no_grad():
        expected = [bounded(boxes[0], target), *(bounded(box, target) for box in boxes)][1:]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in boxes]
        found = []
        for box, stream in zip(boxes, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(bounded(box, target))
        torch.cuda.synchronize()
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))


# --- training steps -------------------------------------------------------------------------------------------


@pytest.fixture
def steps(monkeypatch):
    """How many training steps were recorded."""
    found = []
    record = GraphedStep._record
    monkeypatch.setattr(GraphedStep, "_record", lambda self, graph: (record(self, graph), found.append(graph)))
    return found


def loss_of(model):
    def loss(x, target, eps):
        return F.cross_entropy(model(x), target) + explanation_width(model, x, target, eps, clip=(0.0, 1.0))

    return loss


def batches(x, target):
    """Ten steps: the data, the radius and the learning rate change, and two batches are smaller than the others."""
    for k in range(10):
        size = 3 if k in (1, 6) else 4
        eps = torch.tensor(0.01 * (k + 1), device=x.device)
        yield ((x + 0.1 * k) % 1)[:size], ((target + k) % 3)[:size], eps, 0.1 / (k + 1)


def trained(device, graphed, seed=0):
    model, x, target = case(device, seed)
    loss = loss_of(model)
    optimiser = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    step = GraphedStep(loss, model.parameters())
    losses = []
    for *tensors, rate in batches(x, target):
        optimiser.param_groups[0]["lr"] = rate
        if graphed:
            losses.append(step(*tensors))
        else:
            optimiser.zero_grad()
            value = loss(*tensors)
            value.backward()
            losses.append(value.detach())
        optimiser.step()
    return losses, [*model.parameters()]


def test_a_recorded_step_trains_the_same_network(device, steps):
    losses, parameters = trained(device, graphed=True)
    expected_losses, expected = trained(device, graphed=False)
    assert len(steps) == 1 and len({float(value) for value in losses}) == 10
    assert all(torch.equal(a, b) for a, b in zip(losses, expected_losses, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(parameters, expected, strict=True))


def test_gradients_are_set_and_not_added(device, steps):
    model, x, target = case(device)
    model[0].bias.requires_grad_(False)
    unused = nn.Parameter(torch.ones(2, device=device))
    step = GraphedStep(loss_of(model), [*model.parameters(), unused])
    eps = torch.tensor(0.05, device=device)
    for k in range(5):
        if k % 2:
            model.zero_grad(set_to_none=k == 1)
        step(x, target, eps)
        loss_of(twin := case(device)[0])(x, target, eps).backward()
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert p.grad is None if name == "0.bias" else torch.equal(p.grad, q.grad), name
        assert unused.grad is None
    assert len(steps) == 1


@pytest.mark.parametrize(("pieces", "sizes"), [(1, [5]), (2, [3, 2]), (3, [2, 2, 1]), (5, [1] * 5), (9, [1] * 5)])
def test_pieces_add_up_to_the_batch(device, steps, monkeypatch, pieces, sizes):
    """In float64, to rounding, in one recording; arguments of the batch's length are cut, a number is given whole."""
    model, x, _ = case(device)
    model, x = model.double(), torch.cat([x, x[:1] / 2]).double()
    target, weight = torch.tensor([0, 1, 2, 1, 0], device=device), torch.arange(1.0, 6.0, device=device).double()
    seen = []

    def loss(x, target, weight, eps):
        seen.append(len(x))
        plain = F.cross_entropy(model(x), target, reduction="none")
        return (weight * plain).mean() + explanation_width(model, x, target, eps, clip=(0.0, 1.0))

    step = GraphedStep(loss, model.parameters(), pieces=pieces)
    for k in range(5):
        tensors = (x + 0.1 * k) % 1, (target + k) % 3, weight + k, torch.tensor(0.01 * (k + 1), device=device)
        seen.clear()
        value, gradients = step(*tensors), [p.grad.clone() for p in model.parameters()]
        assert seen == (sizes if k < 3 else [])
        model.zero_grad()
        (expected := loss(*tensors)).backward()
        expected = expected.detach()  # no loss with its graph may be alive when a step is recorded
        torch.testing.assert_close(value, expected, rtol=1e-13, atol=0)
        for found, p in zip(gradients, model.parameters(), strict=True):
            torch.testing.assert_close(found, p.grad, rtol=1e-11, atol=1e-13)
        monkeypatch.setenv("PYXAI_BOUNDS_CUDA_GRAPHS", "0")
        assert torch.equal(step(*tensors), value)
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
        monkeypatch.delenv("PYXAI_BOUNDS_CUDA_GRAPHS")
    assert len(steps) == 1


@pytest.mark.parametrize("concurrent", [False, True])
@pytest.mark.parametrize("pieces", [1, 2])
def test_terms_add_up_to_the_loss_and_each_is_differentiated_before_the_next(device, steps, pieces, concurrent):
    model, x, target = case(device)
    model, x, eps = model.double(), x.double(), torch.tensor(0.05, device=device)
    seen = []

    def watched(term):
        def run(*tensors):
            loss = term(*tensors)
            seen.append("computed")
            loss.register_hook(lambda gradient: seen.append("differentiated"))
            return loss

        return run

    terms = (
        lambda x, y, eps: F.cross_entropy(model(x), y),
        lambda x, y, eps: explanation_width(model, x, y, eps, clip=(0.0, 1.0)),
    )
    step = GraphedStep([watched(term) for term in terms], model.parameters(), pieces, concurrent)
    for k in range(5):
        tensors = (x + 0.1 * k) % 1, target, eps
        value, gradients = step(*tensors), [p.grad.clone() for p in model.parameters()]
        assert seen == ["computed", "differentiated"] * 2 * pieces * min(k + 1, 3)
        model.zero_grad()
        (expected := terms[0](*tensors) + terms[1](*tensors)).backward()
        expected = expected.detach()
        torch.testing.assert_close(value, expected, rtol=1e-13, atol=0)
        for found, p in zip(gradients, model.parameters(), strict=True):
            torch.testing.assert_close(found, p.grad, rtol=1e-11, atol=1e-13)
    assert len(steps) == 1
    with pytest.raises(ValueError, match="loss holds no function"):
        GraphedStep([], model.parameters())


def test_terms_side_by_side_have_the_gradients_of_terms_in_turn(device, steps, monkeypatch):
    """To the last bit, also of a parameter that only one reads; a stream for each term, for all pieces the same (memory
    is used again on its own stream alone), and only recorded."""
    model, x, target = case(device)
    read_once, opened, make = nn.Parameter(torch.ones(2, device=device)), [], torch.cuda.Stream
    terms = (
        lambda x, y: F.cross_entropy(model(x), y),
        lambda x, y: explanation_width(model, x, y, 0.05, clip=(0.0, 1.0)) + read_once.sum(),
        lambda x, y: model[0].weight.square().sum(),
    )
    parameters = [*model.parameters(), read_once]
    monkeypatch.setattr(torch.cuda, "Stream", lambda **how: (opened.append(how), make(**how))[1])
    in_turn = GraphedStep(terms, parameters, pieces=2)
    side_by_side = GraphedStep(terms, parameters, pieces=2, concurrent=True)
    for k in range(5):
        results = []
        for step in (in_turn, side_by_side):
            opened.clear()
            loss = step((x + 0.1 * k) % 1, target)
            results.append([loss, *(p.grad.clone() for p in parameters)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        made = [how for how in opened if not how]  # others stand for the current one
        assert len(made) == (1 if k < 2 else 1 + 3 if k == 2 else 0)
    assert len(steps) == 2


def test_terms_side_by_side_share_no_weights_that_autocast_converted(device, steps):
    """It keeps them: a term would read what another one has yet to write, on a stream that it does not wait for."""
    if device == "cuda":
        pytest.skip("looks into the recording, as only the imitation can")
    model, x = nn.Linear(4, 3), torch.rand(2, 4)
    step = GraphedStep([lambda x: model(x).sum(), lambda x: model(x).square().sum()], model.parameters(), 1, True)
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            step(x)
    converted = [args[0] for function, args, *_ in steps[0]._graph.done if function is torch.ops.aten._to_copy.default]
    assert sum(t.shape == model.weight.shape and t.dtype is torch.float32 for t in converted) == 2


@pytest.mark.parametrize("looks", [False, True])
def test_what_fails_while_terms_are_recorded_is_what_is_said(device, monkeypatch, looks):
    """As on a GPU, a recording cannot end with streams apart nor after a look at values. Nothing of it stays."""
    if device == "cuda":
        pytest.skip("a recording that failed may leave random numbers unusable for the tests after it")
    model, x, _ = case(device)
    apart, looked = set(), []

    class Stream:
        def wait_stream(self, other):
            refuse_if(looked)
            if Recording.active:
                (apart.discard if self is here else apart.add)(other if self is here else self)

    class Ending(Recording):
        def __exit__(self, *error):
            super().__exit__(*error)
            refuse_if(looked or apart)

    def refuse_if(wrong):
        if wrong:
            raise RuntimeError("operation failed due to a previous error during capture")

    def fails(x):
        if Recording.active and not looks:
            raise ValueError("once it is recorded")
        if Recording.active:
            looked.append(x)
            x.max().item()
        return model(x).square().mean()

    here = Stream()
    for name, imitation in {"CUDAGraph": Ending, "Stream": Stream, "current_stream": lambda: here}.items():
        monkeypatch.setattr(torch.cuda, name, imitation)
    step = GraphedStep([lambda x: model(x).mean(), fails], model.parameters(), concurrent=True)
    for _ in range(2):
        step(x)
    with pytest.raises(RuntimeError if looks else ValueError, match=r"\(operation not permitted|once it is recorded"):
        step(x)
    assert all(p.grad is None for p in model.parameters())


def test_terms_side_by_side_must_not_write_what_others_read(device):
    model, x, target = case(device)
    terms = (
        lambda x, y: F.cross_entropy(model(x), y),
        lambda x, y: explanation_width(model, x, y, 0.05, clip=(0.0, 1.0)),
    )
    model.train()
    side_by_side = GraphedStep(terms, model.parameters(), concurrent=True)
    in_turn = GraphedStep(terms, model.parameters())
    for _ in range(2):
        assert torch.isfinite(side_by_side(x, target) + in_turn(x, target))
    with pytest.raises(ValueError, match="batch norm in training mode"):
        side_by_side(x, target)
    model.eval()
    assert torch.equal(side_by_side(x, target), in_turn(x, target))


def test_a_step_in_pieces_says_what_it_cannot_cut(device):
    model, x, target = case(device)
    eps = torch.tensor(0.05, device=device)
    step = GraphedStep(lambda x, *rest: model(x).mean(), model.parameters(), pieces=2)
    with pytest.raises(ValueError, match=r"Argument 2 has shape \[1\], but the batch has 4 samples"):
        step(x, target, eps[None])
    for tensors in ((), (eps, x), (x[:0], target[:0])):
        with pytest.raises(ValueError, match="first argument must hold the samples along dimension 0"):
            step(*tensors)
    assert not GraphedStep(lambda eps, x: model(x).mean() * eps, model.parameters())(eps, x).requires_grad
    for pieces in (0, -1, 1.5, True, "auto"):
        with pytest.raises(ValueError, match=r"pieces=.* must be a whole number of at least 1"):
            GraphedStep(lambda x: model(x).mean(), model.parameters(), pieces=pieces)


def test_what_a_recorded_step_reads_may_change_and_what_moves_is_recorded_anew(device, steps, monkeypatch):
    model, x, target = case(device)
    eps = torch.tensor(0.05, device=device)
    step = GraphedStep(lambda x, y, eps: rec(model, x, y, eps), model.parameters())

    def agrees():
        found = step(x, target, eps), *(p.grad.clone() for p in model.parameters())
        monkeypatch.setenv("PYXAI_BOUNDS_CUDA_GRAPHS", "0")
        expected = step(x, target, eps), *(p.grad.clone() for p in model.parameters())
        monkeypatch.delenv("PYXAI_BOUNDS_CUDA_GRAPHS")
        return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    assert [agrees() and len(steps) for _ in range(4)] == [0, 0, 1, 1]
    with torch.no_grad():
        model[1].running_var.mul_(2.0)
        model[5].weight.mul_(0.5)
    assert agrees() and len(steps) == 1
    old = model[5].weight.data  # alive, so that its memory is not given out again
    model[5].weight.data = old * 2
    assert [agrees() and len(steps) for _ in range(4)] == [1, 1, 2, 2]
    with ops.backend("reference"):
        assert [agrees() and len(steps) for _ in range(3)] == [2, 2, 3]


def test_a_step_says_what_it_cannot_take(device):
    model, x, target = case(device)
    step = GraphedStep(lambda x, y: F.cross_entropy(model(x), y) * (2 if x.max() > 0 else 1), model.parameters())
    with pytest.raises(TypeError, match="Argument 1 is a float, which a recorded step could not take anew"):
        step(x, 0.1)
    with pytest.raises(ValueError, match="Argument 1 is on meta, the parameters on"):
        step(x, target.to("meta"))
    with pytest.raises(ValueError, match="nothing to train"):
        GraphedStep(lambda x: x.sum(), [x])
    if device == "cpu":  # on a GPU a recording that failed may leave its random numbers unusable for the tests after it
        for _ in range(2):
            step(x, target)
        with pytest.raises(RuntimeError, match=r"cannot be recorded as a CUDA graph .*an if on a tensor"):
            step(x, target)


def test_while_recording_the_device_looks(device):
    """What is wrong when the graph is replayed stops it. (A GPU would be lost to all tests after it.)"""
    if device == "cuda":
        pytest.skip("ends the use of the GPU")
    x, target, eps = torch.rand(4, 3), torch.arange(80) % 3, torch.full((4, 1), 0.1)
    looks = {
        "Interval: lower is NaN or infinite": (lambda: xb.Interval(x, x + 1), x, torch.nan),
        "Interval: lower > upper": (lambda: xb.Interval(x, torch.ones(4, 3)), x, 1.5),
        "x lies outside clip": (lambda: xb.Interval.linf(x, eps, (0.0, 1.0)), x, 1.5),
        "eps must be finite": (lambda: xb.Interval.linf(x, eps), eps, -0.1),
        "A target is out of range: the model has 3": (lambda: ops.undispatched[ops.check_target](target, 3), target, 3),
    }
    for message, (look, read, wrong) in looks.items():
        look()  # what is known of numbers by now, such as limits that a dtype can hold, is not computed while recording
        with Recording() as recording:
            look()
        recording.replay()
        kept = read.clone()
        read[1] = wrong
        with pytest.raises(RuntimeError, match=message):
            recording.replay()
        read.copy_(kept)


def test_an_exact_product_needs_no_look_while_recording(device):
    """Nor does its gradient; both may then add in another order."""
    if device == "cuda":
        pytest.skip("records by hand, as only the imitation can")
    box = [torch.rand(2, 3, dtype=torch.float64), torch.rand(2, 3, dtype=torch.float64) * 0.1]
    box += [torch.rand(3, 2, dtype=torch.float64) + 0.5, torch.rand(3, 2, dtype=torch.float64) * 0.1]
    grads = [torch.rand(2, 2, dtype=torch.float64) for _ in range(2)]
    expected = ops.reference.interval_matmul(*box, True), ops.reference.interval_matmul_backward(*grads, *box)
    with Recording():
        found = ops.reference.interval_matmul(*box, True), ops.reference.interval_matmul_backward(*grads, *box)
    for a, b in zip(found, expected, strict=True):
        assert all(torch.allclose(s, t, rtol=1e-12, atol=0) for s, t in zip(a, b, strict=True))


# --- programs whose results are differentiated ----------------------------------------------------------------


@pytest.fixture
def turns(device, monkeypatch):
    """What recordings of differentiated programs did: calls, and derivatives replayed, run, or left to others."""
    done = []
    call, backward = recorder.TrainingReplay.forward, recorder.TrainingReplay.backward

    def noted_call(self, *args):
        done.append("call")
        return call(self, *args)

    def noted_backward(self, turn, derivative, *args):
        found = backward(self, turn, derivative, *args)
        done.append("left" if found is None else "replayed" if self._backward.get(derivative) else "run")
        return found

    def with_grad(program, tensors, checkpoint):
        return program._on_gpu_with_grad(tensors)

    monkeypatch.setattr(recorder.TrainingReplay, "forward", noted_call)
    monkeypatch.setattr(recorder.TrainingReplay, "backward", noted_backward)
    if device == "cpu":
        monkeypatch.setattr(xb.program.Program, "_with_grad", with_grad)
    return done


@pytest.fixture
def trained_case(device, turns):
    """Bounds that are recorded, derivative included: (model, bounds, box, target)."""
    model, x, target = case(device)
    bounded, box = xb.bound(xb.explain.gradient(model)), xb.Interval.linf(x, 0.01)
    for _ in range(3):
        gradients_of(loss_on(bounded(box, target)), model)
    assert turns == ["call", "run", "call", "replayed"]
    turns.clear()
    return model, bounded, box, target


def loss_on(bounds):
    return (bounds.mid * bounds.rad).sum() + bounds.rad.square().sum()


def gradients_of(loss, model):
    model.zero_grad()
    loss.backward()
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def all_equal(found, expected):
    pairs = zip(found, expected, strict=True)
    return all((a is None) == (b is None) and (a is None or torch.equal(a, b)) for a, b in pairs)


@contextlib.contextmanager
def launched():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYXAI_BOUNDS_CUDA_GRAPHS", "0")
        yield


def test_bounds_in_a_loop_of_ones_own_are_replayed_and_so_are_their_derivatives(device, turns):
    model, x, target = case(device)
    bounded = xb.bound(xb.explain.gradient(model))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for k in range(5):
        box, labels = xb.Interval.linf((x + 0.1 * k) % 1, 0.01 * (k + 1)), (target + k) % 3
        for loss in (lambda bounds: bounds.rad.square().mean(), loss_on):  # of radii alone; of both
            found = loss(bounded(box, labels))
            gradients = gradients_of(found, model)
            with launched():
                expected = loss(bounded(box, labels))
                assert torch.equal(found, expected) and all_equal(gradients, gradients_of(expected, model))
        optimiser.step()
    # The first call runs as it is; each derivative is run once before it is recorded.
    assert turns == ["call", "run", "call", "run"] + ["call", "replayed"] * 7


def test_a_second_call_before_the_backward_pass_runs_as_it_is(trained_case, turns):
    model, bounded, box, target = trained_case
    other = xb.Interval.linf(box.mid / 2, 0.03)

    def loss():
        return loss_on(bounded(box, target)) + 2 * loss_on(bounded(other, target))

    found = loss()
    assert turns == ["call"]
    gradients = gradients_of(found, model)
    with launched():
        assert torch.equal(found, expected := loss()) and all_equal(gradients, gradients_of(expected, model))
    for _ in range(3):
        bounded(box, target)  # whose results nobody keeps
    assert turns == ["call", "replayed", "call", "call", "call"]


def test_results_and_graphs_outlast_other_calls(trained_case, turns):
    model, bounded, box, target = trained_case
    bounds = bounded(box, target)
    loss, kept = loss_on(bounds), (bounds.mid.detach().clone(), bounds.rad.detach().clone())
    model.zero_grad()
    loss.backward(retain_graph=True)
    first = [p.grad for p in model.parameters()]
    model.zero_grad()
    loss.backward()  # while nobody else had a turn
    assert turns == ["call", "replayed", "replayed"] and all_equal(first, [p.grad for p in model.parameters()])
    again = loss_on(bounded(box, target))
    parts = [
        torch.autograd.grad(again, [*model[k].parameters()], retain_graph=k != 5, allow_unused=True) for k in (0, 1, 5)
    ]
    assert all_equal([g for part in parts for g in part], first)
    late = loss_on(bounded(box, target))
    late.backward(retain_graph=True)
    torch.autograd.grad(late, [model[0].weight])
    loss_on(bounded(xb.Interval.linf(box.mid / 3, 0.1), target)).backward()
    assert torch.equal(bounds.mid, kept[0]) and torch.equal(bounds.rad, kept[1])
    turns.clear()
    old = loss_on(old_bounds := bounded(box, target))
    old.backward()
    loss_on(bounded(xb.Interval.linf(box.mid / 3, 0.1), target)).backward()
    assert turns == ["call", "replayed"] * 2
    model.zero_grad()
    with pytest.raises(RuntimeError, match="a second time"):  # as of any other graph: the recording serves others now
        loss_on(old_bounds).backward()
    assert turns[4:] == ["left"]


def test_derivatives_of_second_order_and_in_the_box(trained_case, turns, device):
    model, bounded, box, target = trained_case

    def penalty():
        loss = loss_on(bounded(box, target))
        gradients = torch.autograd.grad(loss, [model[0].weight, model[5].weight], create_graph=True)
        return sum(g.square().sum() for g in gradients)

    found = gradients_of(penalty(), model)
    with launched():
        expected = gradients_of(penalty(), model)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, rtol=1e-5, atol=1e-7))

    def in_the_radius(eps):
        model.zero_grad()
        eps = torch.tensor(eps, device=device, requires_grad=True)
        loss_on(bounded(xb.Interval.of(box.mid, eps * torch.ones_like(box.mid)), target)).backward()
        return [eps.grad, *(p.grad for p in model.parameters())]

    turns.clear()
    for _ in range(4):
        found = in_the_radius(0.02)
    with launched():
        assert all_equal(found, in_the_radius(0.02))
    assert turns == ["call", "run", "call", "replayed", "call", "replayed"]


def test_what_changes_between_call_and_backward_pass(trained_case):
    model, bounded, box, target = trained_case
    expected = gradients_of(loss_on(bounded(box, target)), model)
    loss = loss_on(bounded(box, target))
    with torch.no_grad():
        box.mid.add_(0.1)  # was copied
        model[1].running_mean.add_(1.0)  # is not read again: another forward pass in training mode may move it
    assert all_equal(gradients_of(loss, model), expected)
    loss = loss_on(bounded(box, target))
    with torch.no_grad():
        model[0].weight.mul_(1.01)
    with pytest.raises(RuntimeError, match="was changed in place after they were computed"):
        loss.backward()


def test_autograd_sees_what_results_depend_on_and_nothing_else(trained_case):
    model, bounded, box, target = trained_case
    bounds = bounded(box, target)
    seen = {id(node.variable) for node, _ in bounds.rad.grad_fn.next_functions if hasattr(node, "variable")}
    with launched():
        plain = bounded(box, target)
    assert recorder.leaves_behind([plain.mid, plain.rad]) == seen
    assert id(model[5].bias) not in seen and id(model[5].weight) in seen


def test_recordings_of_derivatives_are_made_anew_where_those_of_programs_are(trained_case, turns):
    model, bounded, box, target = trained_case
    old = model[5].weight.data  # alive, so that its memory is not given out again
    model[5].weight.data = old * 2
    model[0].bias.requires_grad_(False)
    for _ in range(4):
        gradients = gradients_of(loss_on(bounded(box, target)), model)
    with launched():
        assert all_equal(gradients, gradients_of(loss_on(bounded(box, target)), model))
    assert turns == ["call", "run", "call", "replayed", "call", "replayed"]


def test_no_recording_within_one_nor_where_others_keep_what_autograd_saves(trained_case, turns, device):
    model, bounded, box, target = trained_case
    step = GraphedStep(lambda x, y: loss_on(bounded(xb.Interval.linf(x, 0.01), y)), model.parameters())
    for _ in range(4):
        step(box.mid, target)
    assert turns == []

    def loss(mid):
        return loss_on(bounded(xb.Interval.of(mid, box.rad), target))

    mid = box.mid.clone().requires_grad_()
    for _ in range(3):
        checkpoint(loss, mid, use_reentrant=False).backward()
    assert turns == []


def test_a_derivative_that_cannot_be_recorded_runs_as_it_is(device, turns, monkeypatch):
    def refuse(self, derivative):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(recorder.TrainingReplay, "_record_derivative", refuse)
    model, x, target = case(device)
    bounded, box = xb.bound(xb.explain.gradient(model)), xb.Interval.linf(x, 0.01)
    found = [gradients_of(loss_on(bounded(box, target)), model) for _ in range(2)]
    with pytest.warns(RuntimeWarning, match=r"runs without \(operation not permitted when stream is capturing\)"):
        found.append(gradients_of(loss_on(bounded(box, target)), model))
    found.append(gradients_of(loss_on(bounded(box, target)), model))
    assert all(all_equal(gradients, found[0]) for gradients in found)
    assert turns == ["call", "run"]


@pytest.mark.parametrize("what", ["program", "derivative"])
def test_a_recording_for_training_that_gives_something_else_is_dropped(device, turns, monkeypatch, what):
    record, records = replay.Graph.record, []

    def recorded_badly(graph, *args):
        record(graph, *args)
        records.append(graph)
        if len(records) == ["program", "derivative"].index(what) + 1:
            graph.replay = lambda: None

    monkeypatch.setattr(replay.Graph, "record", recorded_badly)
    model, x, target = case(device)
    bounded = xb.bound(xb.explain.gradient(model))
    with pytest.warns(RuntimeWarning, match="its replays do not give what launching it does") as warned:
        for k in range(5):
            box = xb.Interval.linf(x, 0.01 * (k + 1))
            found = gradients_of(loss_on(bounded(box, target)), model)
            with launched():
                assert all_equal(found, gradients_of(loss_on(bounded(box, target)), model))
    assert len(warned) == 1, [str(one.message) for one in warned]
    # To record computes nothing on a GPU, but the imitation does: there the first replay leaves what is right.
    first = ["call", "run"] if what == "derivative" or device == "cpu" else []
    assert turns == [*first, "call", *(["left"] if what == "derivative" else [])]


def test_a_derivative_is_compared_with_one_of_the_same_call(device, turns):
    """Also where something that only the program reads was changed after it."""
    model, x, target = case(device)
    bounded, box = xb.bound(xb.explain.gradient(model)), xb.Interval.linf(x, 0.01)
    for _ in range(4):
        loss = loss_on(bounded(box, target))
        with launched():
            expected = gradients_of(loss_on(bounded(box, target)), model)
        model[1].running_mean.add_(0.2)
        assert all_equal(gradients_of(loss, model), expected)
    assert turns == ["call", "run", "call", "replayed", "call", "replayed"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="streams of a GPU")
def test_turns_on_several_streams_wait_for_one_another(trained_case, turns):
    model, bounded, box, target = trained_case
    boxes = [xb.Interval.linf(box.mid, 0.01 * (k + 1)) for k in range(8)]
    with launched():
        expected = [gradients_of(loss_on(bounded(one, target)), model) for one in boxes]
    found = []
    for one in boxes:
        with torch.cuda.stream(torch.cuda.Stream()):
            found.append(gradients_of(loss_on(bounded(one, target)), model))
    torch.cuda.synchronize()
    assert turns == ["call", "replayed"] * len(boxes)
    assert all(all_equal(a, b) for a, b in zip(found, expected, strict=True))
