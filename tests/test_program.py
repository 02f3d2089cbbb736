"""bound(): structures, errors, modes and caches of the compiled program."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import pyxai_bounds as xb
from pyxai_bounds import fuse, ops, program
from tests.networks import assert_encloses, assert_encloses_samples, images, mlp, residual, sample
from tests.soundness.programs import members, outside

TARGET = torch.tensor([1, 3])
VECTORS = images(2, shape=(6,))


def test_outputs_of_a_network() -> None:
    model = residual()
    assert_encloses_samples(model, xb.Interval.linf(images(2), 0.01))


def test_tensors_and_sets_mix_and_points_stay_points() -> None:
    model = mlp()
    bounded = xb.bound(lambda x, scale: model(x) * scale)
    box = xb.Interval.linf(VECTORS, 0.1)
    scale = torch.rand(4, dtype=torch.float64)
    one = bounded(box, scale)
    both = bounded(box, xb.Interval.linf(scale, 0.1))
    assert (both.rad > one.rad).all()
    assert bounded(VECTORS, scale).rad.max() == 0
    assert torch.allclose(bounded(VECTORS, scale).mid, model(VECTORS) * scale)


def test_keyword_arguments_and_structures() -> None:
    def fn(pair: tuple[Tensor, Tensor], *, shift: Tensor, power: int = 1) -> dict[str, Tensor]:
        return {"sum": pair[0] + pair[1] + shift, "power": pair[0] ** power}

    box = xb.Interval.linf(VECTORS, 0.1)
    out = xb.bound(fn)((box, VECTORS), shift=VECTORS, power=2)
    assert torch.allclose(out["sum"].rad, torch.full_like(VECTORS, 0.1))
    assert_encloses(out["power"], VECTORS**2)


def test_a_linear_model_has_a_constant_explanation_without_width() -> None:
    layer = nn.Linear(6, 4).double()
    bounds = xb.bound(xb.explain.gradient(layer))(xb.Interval.linf(VECTORS, 0.5), TARGET)
    assert bounds.rad.max() == 0
    assert torch.equal(bounds.mid, layer.weight[TARGET])


def test_every_unsupported_operator_is_listed_with_its_line() -> None:
    model = mlp()

    def fn(x: Tensor) -> Tensor:
        y = torch.special.i1(model(x))
        z = torch.special.bessel_j0(y.logcumsumexp(1))
        return torch.special.i0(z) + y

    with pytest.raises(xb.UnsupportedOperatorError) as caught:
        xb.bound(fn)(xb.Interval.linf(VECTORS, 0.1))
    message = str(caught.value)
    for name, line in (
        ("i1", "torch.special.i1(model(x))"),
        ("bessel_j0", "torch.special.bessel_j0(y.logcumsumexp(1))"),
        ("i0", "torch.special.i0(z)"),
    ):
        assert name in message and line in message
    assert "test_program.py" in message
    assert len(caught.value.operators) == 3


def test_a_parametrisation_without_rules_can_be_removed() -> None:
    layer = nn.utils.parametrizations.orthogonal(nn.Linear(6, 6))
    box = xb.Interval.linf(torch.zeros(2, 6), 0.1)
    with pytest.raises(xb.UnsupportedOperatorError, match=r"parametrize\.remove_parametrizations\(layer, name\)"):
        xb.bound(layer, sound=True)(box)
    nn.utils.parametrize.remove_parametrizations(layer, "weight")
    assert xb.bound(layer, sound=True)(box).contains(layer(torch.zeros(2, 6))).all()


def test_unsupported_operators_on_points_are_fine() -> None:
    bounds = xb.bound(lambda x, y: x * torch.special.i0(y))(xb.Interval.linf(VECTORS, 0.1), VECTORS + 1)
    assert bounds.rad.max() > 0


def test_an_operator_of_the_backward_pass_names_the_forward_line() -> None:
    def fn(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        y = torch.special.erfcx(x).sum()
        return torch.autograd.grad(y, x)[0]

    with pytest.raises(xb.UnsupportedOperatorError, match=r"erfcx\(x\)\.sum\(\)"):
        xb.bound(fn)(xb.Interval.linf(VECTORS, 0.1))


def test_what_does_not_exist_says_so() -> None:
    with pytest.raises(ValueError, match="semantics='exact' is unknown"):
        xb.bound(mlp(), sound=True, semantics="exact")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs sound=True"):
        xb.bound(mlp(), semantics="float32")
    with pytest.raises(TypeError, match=r"xb\.parameter_box"):
        xb.bound(mlp(), parameters={"relative": 0.01})
    with pytest.raises(TypeError, match="module or a function, got int"):
        xb.bound(3)  # type: ignore[arg-type]


def test_a_first_call_says_what_takes_its_time(caplog: pytest.LogCaptureFixture) -> None:
    bounded, box = xb.bound(mlp()), xb.Interval.point(images(2, shape=(6,)))
    with caplog.at_level("INFO", "pyxai_bounds.program"):
        for _ in range(2):
            bounded(box)
    before, after = (record.getMessage() for record in caplog.records)
    assert re.fullmatch(r"Building the bounds of a program of \d+ operators, once for arguments of this kind\.", before)
    assert re.fullmatch(r"Captured and built in \d+\.\d s: \d+ operators on tensors\.", after)


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (torch.tensor([1, 4]), ValueError, r"target\[1\] = 4 is out of range.*0 … 3"),
        (torch.tensor([-1, 2]), ValueError, r"target\[0\] = -1 is out of range"),
        (torch.tensor([1, 2, 3]), ValueError, r"target has shape \[3\], but the batch has 2 samples"),
        (torch.tensor([[1], [2]]), ValueError, r"target has shape \[2, 1\]"),
        (torch.tensor([1.0, 2.0]), TypeError, "must be an integer tensor"),
        ([1, 2], TypeError, "must be an integer tensor"),
        (None, ValueError, "pass a target"),
    ],
)
def test_wrong_targets(target, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        xb.bound(xb.explain.gradient(mlp()))(xb.Interval.linf(VECTORS, 0.1), target)


def test_wrong_device_and_dtype() -> None:
    model = mlp()
    with pytest.raises(ValueError, match="different devices, cpu and meta"):
        xb.bound(lambda x, y: model(x) + y)(xb.Interval.point(VECTORS), torch.ones(2, 4, device="meta"))
    with pytest.raises(ValueError, match=r"box of dtype torch.float32 meets a weight of dtype torch.float64: convert"):
        xb.bound(model)(xb.Interval.point(VECTORS.float()))
    elsewhere = mlp().to("meta")
    with pytest.raises(ValueError, match=r"arguments are torch.float64 on cpu, the model's .* on meta"):
        xb.bound(xb.explain.gradient(elsewhere))(xb.Interval.point(VECTORS), TARGET)
    with pytest.raises(TypeError, match="numpy ndarray; convert it"):
        xb.bound(lambda x, y: x + y)(xb.Interval.point(VECTORS), VECTORS.numpy())


def test_empty_batch() -> None:
    for model, x in ((mlp(), VECTORS[:0]), (residual(), images(2)[:0])):
        bounds = xb.bound(xb.explain.gradient(model))(xb.Interval.linf(x, 0.1), TARGET[:0])
        assert bounds.shape == x.shape


def test_one_output_needs_no_target() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 1)).double()
    bounds = xb.bound(xb.explain.gradient(model))(xb.Interval.linf(VECTORS, 0.2))
    assert_encloses(bounds, xb.explain.gradient(model)(VECTORS).detach())


def test_bounds_are_differentiable_in_the_box() -> None:
    model = mlp()
    x = VECTORS.clone().requires_grad_()
    eps = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)

    def widths(x: Tensor, eps: Tensor) -> Tensor:
        bounds = xb.bound(model)(xb.Interval.linf(x, eps))
        return bounds.width.sum() + bounds.mid.sum()

    assert torch.autograd.gradcheck(widths, (x, eps))


def test_gradient_marks_change_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dead-gradient marking against the same program with autograd everywhere."""
    for of in ("logit", "probability", "loss"):
        results = []
        for mark in (True, False):
            model = residual()
            with monkeypatch.context() as patch:
                if not mark:
                    patch.setattr(fuse, "mark_dead_gradients", lambda graph: None)
                bounds = xb.bound(xb.explain.gradient(model, of=of))(xb.Interval.linf(images(2), 0.01), TARGET)
            (bounds.width.square().sum() + bounds.mid.sum()).backward()
            results.append({name: p.grad for name, p in model.named_parameters()})
        for name, grad in results[0].items():
            other = results[1][name]
            zero = torch.zeros_like(model.get_parameter(name))
            assert torch.allclose(zero if grad is None else grad, zero if other is None else other, rtol=1e-12), name


def test_the_forward_pass_of_a_logit_gradient_runs_without_autograd() -> None:
    model = residual()
    bounds = xb.bound(xb.explain.gradient(model))(xb.Interval.linf(images(2), 0.01), TARGET)
    names = set()
    pending = [bounds.rad.grad_fn]
    while pending:
        node = pending.pop()
        if node is not None and node not in names:
            names.add(node)
            pending += [parent for parent, _ in node.next_functions]
    kinds = {type(node).__name__ for node in names}  # of an operator's node: its name, and Backward
    assert "interval_conv2d_backwardBackward" in kinds
    assert not kinds & {"interval_conv2dBackward", "interval_reluBackward"}


def test_fusion_leaves_no_separate_stage() -> None:
    """In a plain convnet with batch norm every ReLU and ReLU′ is part of an affine operator, and no norm is left."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4),
    ).double().eval()  # fmt: skip
    graph = xb.bound(xb.explain.gradient(model)).graph(xb.Interval.linf(images(2), 0.01), TARGET)
    targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    for fused in (ops.interval_relu, ops.interval_scale_shift):
        assert fused not in targets
    assert targets.count(ops.interval_conv2d) == 2 and targets.count(ops.interval_linear) == 1
    assert targets.count(ops.interval_conv2d_backward) == 2 and targets.count(ops.interval_linear_backward) == 1
    # The last hidden layer's ReLU′ meets a point, so its one stage stands alone.
    assert targets.count(ops.interval_relu_backward) <= 1


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_only_products_on_the_cpu_take_relu_backward_along(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fuse_relu_backward = fuse._fuse_relu_backward_into_affine_backward
    monkeypatch.setattr(fuse, "_fuse_relu_backward_into_affine_backward", lambda graph: None)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4))
    graph = xb.bound(xb.explain.gradient(model.double())).graph(xb.Interval.linf(images(2), 0.01), TARGET)
    gates = graph.graph.find_nodes(op="call_function", target=ops.interval_relu_backward)
    for node in gates:
        node.meta["val"] = tuple(t.to(device) for t in node.meta["val"])
    fuse_relu_backward(graph)
    products = graph.graph.find_nodes(op="call_function", target=ops.interval_conv2d_backward)
    assert len(products) == 2 and len(gates) > 0
    assert any(node.args[3] is not None for node in products) == (device == "cpu")


def test_grad_mode_is_restored_after_an_error() -> None:
    model = mlp()
    bounded = xb.bound(xb.explain.gradient(model))
    box = xb.Interval.linf(VECTORS, 0.1)
    bounded(box, TARGET)
    with pytest.raises(ValueError, match="out of range"):
        bounded(box, TARGET + 3)
    assert torch.is_grad_enabled()
    with torch.no_grad():
        bounded(box, TARGET)
        assert not torch.is_grad_enabled()


def test_a_program_compiles_whole() -> None:
    """What runs is a flat graph of tensors, which torch.compile takes without a break."""
    model = mlp()
    box = xb.Interval.linf(VECTORS, 0.1)
    graph = xb.bound(xb.explain.gradient(model)).graph(box, TARGET)
    compiled = torch.compile(graph, fullgraph=True, backend="aot_eager")
    expected = graph(box.mid, box.rad, TARGET)
    for ours, theirs in zip(compiled(box.mid, box.rad, TARGET), expected, strict=True):
        assert torch.allclose(ours, theirs)


def test_bounds_grow_with_eps_and_sub_boxes_lie_inside() -> None:
    model = residual()
    bounded = xb.bound(xb.explain.gradient(model))
    small, large = (bounded(xb.Interval.linf(images(2), eps), TARGET).detach() for eps in (0.002, 0.01))
    assert (small.lower >= large.lower - 1e-12).all() and (small.upper <= large.upper + 1e-12).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = mlp()
    exact = xb.bound(xb.explain.gradient(model))(xb.Interval.linf(VECTORS, 0.1), TARGET)
    rough = xb.bound(xb.explain.gradient(model.to(dtype)))(xb.Interval.linf(VECTORS.to(dtype), 0.1), TARGET)
    assert rough.dtype is dtype
    tolerance = 40 * torch.finfo(dtype).eps * exact.mid.abs().max()
    # A state may flip where a pre-activation's bound is next to 0: most entries agree, and none is wild.
    agree = (rough.rad.double() - exact.rad).abs() <= tolerance
    assert agree.double().mean() > 0.8


def test_program_cache_ignores_values_but_not_kinds() -> None:
    model = mlp()
    bounded = xb.bound(model)
    bounded(xb.Interval.linf(VECTORS, 0.1))
    bounded(xb.Interval.linf(VECTORS * 2, 0.3))
    bounded(VECTORS)
    (captured,) = program._captures_of(model).values()
    assert len(captured.derived) == 2


def test_autocast_around_the_call_changes_nothing() -> None:
    model = mlp().float()
    box = xb.Interval.linf(VECTORS.float(), 1e-5)
    expected = xb.bound(model)(box)
    with torch.autocast("cpu", torch.bfloat16):
        bounds = xb.bound(model)(box)
        certificate = xb.certify(xb.explain.gradient(model), box.mid, TARGET, eps=1e-5, property=xb.TopK(2))
    assert bounds.dtype is torch.float32 and torch.equal(bounds.mid, expected.mid)
    assert certificate.nominal.dtype is torch.float32


@pytest.mark.parametrize("batch", [1, 3])
def test_programs_run_alike_with_and_without_the_dispatcher(batch: int) -> None:
    """A dispatch mode sees operators; without one they are plain calls. A subclass of Tensor needs the dispatcher."""
    model = residual().float()
    x, target = images(batch).float(), torch.arange(batch) % 3
    bounded = xb.bound(xb.explain.gradient(model))

    def outcome() -> list[Tensor]:
        with torch.no_grad():
            quick = bounded(xb.Interval.linf(x, 0.01), target)
        bounds = bounded(xb.Interval.linf(x, 0.01), target)
        grads = torch.autograd.grad(
            bounds.width.square().sum(), list(model.parameters()), allow_unused=True, materialize_grads=True
        )
        return [quick.mid, quick.rad, bounds.mid.detach(), bounds.rad.detach(), *grads]

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            names.add(func.name())
            return func(*args, **(kwargs or {}))

    names: set[str] = set()
    plain = outcome()
    with Seen():
        seen = outcome()
    assert "pyxai_bounds::interval_conv2d" in names
    assert all(torch.equal(a, b) for a, b in zip(plain, seen, strict=True))

    class Marked(Tensor):
        pass

    with torch.no_grad():
        marked = bounded(xb.Interval.of(x.as_subclass(Marked), torch.full_like(x, 0.01)), target)
    assert torch.allclose(marked.rad.as_subclass(Tensor), plain[1], rtol=1e-5)


def test_a_program_that_was_made_in_inference_mode_trains_later() -> None:
    """Its constants must not be inference tensors, which autograd cannot save."""
    bounded = xb.bound(lambda x: x * torch.full((3,), 2.0).cumsum(0))
    with torch.inference_mode():
        bounded(xb.Interval.of(torch.rand(3), torch.rand(3)))
    mid = torch.rand(3, requires_grad=True)
    bounded(xb.Interval.of(mid, torch.rand(3))).mid.sum().backward()
    assert mid.grad is not None and mid.grad.tolist() == [2.0, 4.0, 6.0]


def test_a_default_device_does_not_lead_kernels_astray() -> None:
    """Inside torch.device(…) what an operator allocates must lie where its arguments lie."""
    wide = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))
    convolutional = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    )
    for model, x in (
        (mlp().float(), torch.rand(2, 6)),
        (wide, torch.rand(20, 6)),
        (convolutional, torch.rand(2, 3, 8, 8)),
    ):
        for sound in (False, True):
            bounded = xb.bound(xb.explain.gradient(model), sound=sound)
            box, target = xb.Interval.linf(x, 0.01), torch.zeros(len(x), dtype=torch.long)
            expected = bounded(box, target)
            for grads in (True, False):
                with torch.set_grad_enabled(grads), torch.device("meta"):
                    found = bounded(box, target)
                assert torch.equal(found.mid, expected.mid) and torch.equal(found.rad, expected.rad)


def test_backward_under_autocast() -> None:
    for batch in (2, 20):
        model = mlp().float()
        bounded, box = xb.bound(model), xb.Interval.linf(torch.rand(batch, 6), 0.01)
        grads = []
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                bounds = bounded(box)
                grads.append(torch.autograd.grad(bounds.mid.sum() + bounds.rad.sum(), list(model.parameters())))
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_first_call_under_a_mode_leaves_nothing_behind() -> None:
    bounded, box = xb.bound(xb.explain.gradient(mlp().float())), xb.Interval.linf(torch.rand(2, 6), 0.01)
    target = torch.tensor([0, 1])
    with FakeTensorMode(allow_non_fake_inputs=True):
        bounded(box, target)
    assert type(bounded(box, target).mid) is Tensor


def test_a_first_call_inside_a_transform_says_so() -> None:
    def fn(x: Tensor) -> Tensor:
        return xb.bound(torch.tanh)(xb.Interval.point(x)).mid.sum()

    with pytest.raises(xb.CaptureError, match="call it once outside"):
        torch.func.grad(fn)(torch.rand(3))


def test_results_may_be_written_into() -> None:
    """Constants of a program are computed once and kept; what it returns is the caller's."""
    bounded = xb.bound(lambda x: (x, torch.ones(2, 3) * 2, torch.zeros(3).expand(2, 3)))
    for _ in range(2):
        _, twos, zeros = bounded(xb.Interval.point(torch.rand(2)))
        assert (twos.mid == 2).all() and (zeros.mid == 0).all()
        twos.mid.mul_(0)
        twos.rad.add_(1)
        zeros.rad.add_(1)


def test_jacobians_by_vmap() -> None:
    model = mlp()
    jacobian = torch.vmap(torch.func.jacrev(model))
    bounds = xb.bound(jacobian)(xb.Interval.linf(VECTORS, 0.05))
    assert bounds.shape == (2, 4, 6)
    assert_encloses(bounds, jacobian(VECTORS).detach())
    label = xb.bound(xb.explain.gradient(model))(xb.Interval.linf(VECTORS, 0.05), TARGET)
    assert torch.allclose(bounds.rad[range(2), TARGET], label.rad)


@pytest.mark.parametrize("sound", [False, True])
def test_gradients_by_vmap_through_max_pooling(sound: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 2)).double()
    x = torch.rand(3, 1, 6, 6, dtype=torch.float64)
    box, target = xb.Interval.linf(x, 0.05), torch.tensor([0, 1, 0])

    def gradients(x: Tensor, y: Tensor) -> Tensor:
        return torch.vmap(torch.func.grad(lambda x, y: model(x[None])[0].gather(0, y[None])[0]))(x, y)

    plain = xb.bound(xb.explain.gradient(model), sound=sound)(box, target)
    bounds = xb.bound(gradients, sound=sound)(box, target)
    jacobian = xb.bound(torch.vmap(torch.func.jacrev(lambda x: model(x[None])[0])), sound=sound)(box)
    for found in (bounds, xb.Interval.of(*(t[range(3), target] for t in (jacobian.mid, jacobian.rad)))):
        assert (found.mid - plain.mid).abs().max() < 1e-12 and (found.rad - plain.rad).abs().max() < 1e-12


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@pytest.mark.parametrize(
    "layer",
    [
        nn.ReLU(), nn.LayerNorm(6), nn.BatchNorm1d(6).eval(), nn.GroupNorm(2, 6), nn.GELU(),
        nn.Sequential(nn.Linear(6, 24), nn.Unflatten(1, (1, 4, 6)), nn.MaxPool2d(2), nn.Flatten()),
    ],
    ids=lambda layer: type(layer).__name__,
)  # fmt: skip
def test_forward_derivatives(layer: nn.Module) -> None:
    """Where an operand has no tangent PyTorch takes zeros that are on no device of a tracer's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), copy.deepcopy(layer), nn.Linear(6, 2)).double()
    v = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(2, 6)

    def derived(x: Tensor) -> tuple[Tensor, ...]:
        forward = torch.func.jvp(model, (x,), (v,))[1]
        product = torch.func.jvp(torch.func.grad(lambda x: model(x).logsumexp(1).sum()), (x,), (v,))[1]
        return forward, product

    hessian = torch.vmap(torch.func.hessian(lambda x: model(x[None]).logsumexp(1)[0]))
    box = xb.Interval.linf(VECTORS, 1e-3)
    for fn in (derived, hessian):
        if fn is hessian and isinstance(layer, nn.Sequential):
            with pytest.raises(xb.UnsupportedOperatorError, match="pool's gradient forwards inside of vmap; use jac"):
                xb.bound(fn)(box)
            continue
        for found, value in zip(
            pytree.tree_leaves(xb.bound(fn)(box), is_leaf=lambda leaf: isinstance(leaf, xb.Interval)),
            pytree.tree_leaves(fn(sample(box, 1, corners=True))), strict=True,
        ):  # fmt: skip
            assert_encloses(found, value.detach())


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@pytest.mark.parametrize("derivative", ["jacrev", "jacfwd", "hessian"])
def test_jacobians_and_hessians_have_proofs(derivative: str) -> None:
    """The identity that they start from is written into zeros along a diagonal."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Softplus(), nn.Flatten(), nn.Linear(8, 2))
    wide = copy.deepcopy(model).double()

    def derived(network: nn.Module) -> Callable[[Tensor], Tensor]:
        return getattr(torch.func, derivative)(lambda x: network(x).tanh().sum(1))

    box = xb.Interval.linf(torch.rand(1, 1, 4, 4), 1e-3)
    bounds = xb.bound(derived(model), sound=True)(box)
    for point in members(box, 10):
        assert bounds.isfinite().all() and not outside(bounds, derived(wide)(point)).any()


def test_softmax_attention_of_sets() -> None:
    """Products of two sets: a small attention layer with an input box."""

    def attention(x: Tensor) -> Tensor:
        weights = F.softmax(x @ x.transpose(1, 2) / 2, dim=-1)
        return weights @ x

    assert_encloses_samples(attention, xb.Interval.linf(images(2, shape=(3, 4)), 0.05))


def test_the_seed_of_a_gradient_selects_rows_of_the_last_weight() -> None:
    model = mlp()
    graph = xb.bound(xb.explain.gradient(model)).graph(xb.Interval.linf(VECTORS, 0.1), TARGET).graph
    targets = [node.target for node in graph.nodes]
    assert torch.ops.aten.index_select.default in targets
    assert torch.ops.aten.mm.default not in targets and torch.ops.aten.scatter_add.default not in targets
    box = xb.Interval.linf(VECTORS, 0.1)
    for repeated in (torch.tensor([2, 2]), TARGET):  # the gradient in the last weight gathers rows
        model.zero_grad()
        xb.bound(xb.explain.gradient(model))(box, repeated).width.sum().backward()
        used = model[-1].weight.grad.abs().sum(1) > 0
        assert used.nonzero().flatten().tolist() == sorted(set(repeated.tolist()))


def test_a_seed_with_rows_of_its_own_selects_nothing() -> None:
    """A seed of three rows, of which the targets set two."""
    weight, target = torch.rand(4, 6, dtype=torch.float64), torch.tensor([1, 3])

    def explained(x: Tensor, target: Tensor) -> Tensor:
        ones = torch.ones(2, 1, dtype=x.dtype)
        return x * (torch.zeros(3, 4, dtype=x.dtype).scatter_add(1, target.unsqueeze(1), ones) @ weight)

    x = torch.rand(3, 6, dtype=torch.float64)
    assert torch.allclose(xb.bound(explained)(xb.Interval.point(x), target).mid, explained(x, target))


def test_a_bound_function_prints_what_it_bounds_and_is_not_bounded_again() -> None:
    bounded = xb.bound(nn.Linear(6, 3), sound=True)
    assert repr(bounded) == "BoundFunction(Linear, rounding='outward')"
    for again in (xb.bound, lambda fn: xb.attack.pgd(fn, torch.zeros(2, 6), eps=0.1, property=xb.TopK(1))):
        with pytest.raises(TypeError, match="is bounded already: pass what was bounded"):
            again(bounded)
