"""How a backend is chosen, what happens without the compiled module, and whose threads it uses."""

import subprocess
import sys
import warnings

import pytest
import torch

from pyxai_bounds import ops, rounding
from pyxai_bounds.ops import native, reference

from .cases import LEVELS, assert_identical, box, level, nasty_box, needs_native


def test_the_test_environment_has_the_native_backend():
    """Without it most of tests/ops would be skipped in silence."""
    assert native.available(), native.why_not_available()
    assert ops.available()[:2] == ["reference", "native"] and native.why_not_available() == ""


@needs_native
def test_supports_float32_and_float64_on_the_cpu_alone():
    wanted = {torch.float32: True, torch.float64: True, torch.bfloat16: False, torch.float16: False, torch.int32: False}
    assert {dtype: native.supports(torch.empty(1, dtype=dtype)) for dtype in wanted} == wanted
    assert not native.supports(torch.empty(1, device="meta"))


def record_calls(monkeypatch):
    called = []
    for backend in (native, reference):
        run = backend.interval_relu
        name = backend.__name__.rsplit(".", 1)[-1]

        def recorded(*args, run=run, name=name):
            called.append(name)
            return run(*args)

        monkeypatch.setattr(backend, "interval_relu", recorded)
    return called


@needs_native
def test_auto_takes_native_where_it_can_and_the_reference_elsewhere(monkeypatch):
    called = record_calls(monkeypatch)
    ops.interval_relu(*box(9))
    ops.interval_relu(*box(9, dtype=torch.bfloat16))
    with ops.backend("reference"):
        ops.interval_relu(*box(9))
        with ops.backend("native"):
            ops.interval_relu(*box(9))
        with ops.backend("auto"):
            ops.interval_relu(*box(9))
    assert called == ["native", "reference", "reference", "native", "native"]


@needs_native
def test_native_forced_on_bfloat16_says_what_to_do():
    with ops.backend("native"), pytest.raises(ValueError, match=r"native backend does not support torch\.bfloat16"):
        ops.interval_relu(*box(9, dtype=torch.bfloat16))


def test_unknown_and_unavailable_backends(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ValueError, match="Unknown backend 'numpy'"), ops.backend("numpy"):
        pass
    with pytest.raises(RuntimeError, match="cuda backend is not available"), ops.backend("cuda"):
        pass


def test_without_the_module_the_reference_runs_and_one_warning_says_so(monkeypatch):
    monkeypatch.setattr(native, "_native", None)
    monkeypatch.setattr(native, "_failure", "No module named '_native'")
    monkeypatch.setattr(native, "_warned", False)
    expected = reference.interval_relu(*box(9))
    ops.interval_relu(*box(9, dtype=torch.bfloat16))  # the reference's work anyway: nothing to say
    with pytest.warns(RuntimeWarning, match=r"No module named '_native'.*pip install") as caught:
        actual = ops.interval_relu(*box(9))
        ops.interval_relu(*box(9))
    assert len(caught) == 1
    for a, e in zip(actual, expected, strict=True):
        assert_identical(a, e)
    assert ops.available() == ["reference"]
    with pytest.raises(RuntimeError, match="native backend is not available"), ops.backend("native"):
        pass
    with pytest.raises(RuntimeError, match="native backend is not available"):
        native.interval_relu(*box(9))


def test_importing_without_the_module_is_silent():
    program = (
        "import sys; sys.modules['pyxai_bounds._native'] = None\n"
        "from pyxai_bounds import ops\n"
        "assert ops.available() == ['reference']\n"
        "assert 'None in sys.modules' in ops.native.why_not_available()\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)


@needs_native
def test_kernels_run_on_the_threads_of_torch():
    """One OpenMP runtime: what torch.set_num_threads says holds for the kernels. See parallel.h."""
    for count in (1, 3, 2):
        torch.set_num_threads(count)
        assert native._native.threads() == count


@needs_native
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_results_do_not_depend_on_the_number_of_threads(count):
    mid, rad = box(200_003, dtype=torch.float32)
    expected = reference.interval_relu(mid, rad)
    torch.set_num_threads(count)
    for a, e in zip(native.interval_relu(mid, rad), expected, strict=True):
        assert_identical(a, e)


def large_relu(seed: int) -> tuple[torch.Tensor, ...]:
    """A result in memory that is kept: 1 MiB each for midpoint and radius."""
    mid, rad = box(2, 8, 128, 128, dtype=torch.float32, seed=seed)
    return native.interval_relu(*(t.contiguous(memory_format=torch.channels_last) for t in (mid, rad)))


@pytest.fixture
def keeps_memory():
    torch.use_deterministic_algorithms(False)  # which asks for new memory, filled


@needs_native
def test_large_results_take_the_memory_of_those_that_are_gone(keeps_memory):
    first = large_relu(0)
    places, kept = {t.data_ptr() for t in first[:2]}, native._native.memory_kept()
    values = first[0].clone()
    second = large_relu(1)
    assert places.isdisjoint(t.data_ptr() for t in second[:2]) and torch.equal(first[0], values)
    part = first[0][1, 3]  # a view holds all of it
    del first
    third = large_relu(2)
    assert part.data_ptr() not in {t.data_ptr() for t in third} and torch.equal(part, values[1, 3])
    del part
    assert native._native.memory_kept() > kept
    assert places & {t.data_ptr() for t in large_relu(3)}


@needs_native
def test_what_is_kept_has_a_limit(keeps_memory):
    module = native._native
    blocks = [module.Memory(module.most_kept) for _ in range(2 * module.kept_bytes // module.most_kept)]
    blocks += [module.Memory(module.least_kept) for _ in range(9)]
    del blocks
    assert module.kept_bytes // 2 <= module.memory_kept() <= module.kept_bytes
    before = module.memory_kept()
    del before  # smaller and larger blocks are not kept at all
    kept = module.memory_kept()
    module.Memory(module.least_kept - 1), module.Memory(module.most_kept + 1)
    assert module.memory_kept() == kept


class Large(torch.autograd.Function):
    """A sum whose gradient lies in kept memory."""

    @staticmethod
    def forward(ctx, weight, places):
        ctx.shape, ctx.places = weight.shape, places
        return weight.sum()

    @staticmethod
    def backward(ctx, grad):
        out = native.empty_contiguous(ctx.shape, grad.dtype).fill_(grad.item())
        ctx.places.append(out.data_ptr())
        return out, None


@needs_native
def test_autograd_adds_to_a_gradient_in_kept_memory_in_place(keeps_memory):
    """A third matrix as large as the weight would cost a step of a small network more than its sum."""
    weight, places = torch.ones(256, 1024, requires_grad=True), []
    torch.autograd.backward(
        [torch.nn.functional.linear(torch.ones(3, 1024), weight).sum(), Large.apply(weight, places)]
    )
    assert places == [weight.grad.data_ptr()]
    assert torch.equal(weight.grad, torch.full_like(weight, 4))
    with torch.inference_mode():
        assert native.empty_contiguous((256, 1024), torch.float64).is_contiguous()


@needs_native
def test_results_in_kept_memory_are_ordinary_tensors(keeps_memory, tmp_path):
    with torch.no_grad():
        mid, rad, _ = large_relu(0)
    assert not mid._is_view() and mid.is_contiguous(memory_format=torch.channels_last)
    scale = torch.ones((), requires_grad=True)
    mid.mul_(scale)
    mid.sum().backward()
    assert scale.grad is not None
    torch.save(rad, tmp_path / "rad.pt")
    assert torch.equal(torch.load(tmp_path / "rad.pt"), rad)
    values = rad.clone()
    rad.share_memory_()
    large_relu(1), large_relu(2)
    assert rad.is_shared() and torch.equal(rad, values)
    box_here = [t.contiguous(memory_format=torch.channels_last) for t in box(2, 8, 128, 128, dtype=torch.float32)]
    with torch.device("meta"):  # a default device is for what the user makes
        assert native.interval_relu(*box_here)[0].device.type == "cpu"


@needs_native
def test_levels():
    assert LEVELS[-1] == "portable" and native._native.level() == LEVELS[0]
    for name in LEVELS:
        with level(name):
            assert native._native.level() == name
    with pytest.raises(ValueError, match=r"does not run level 'sse9'; choose one of .*portable"):
        native._native.set_level("sse9")


def test_operators_do_not_write_to_their_inputs(backend):
    mid, rad = box(4, 5)
    weight = box(6, 5, seed=2)[0]
    state = ops.interval_relu(*box(4, 6, seed=3))[2]
    grad = box(4, 6, seed=4)
    tensors = (mid, rad, weight, state, *grad)
    before = [t.clone() for t in tensors]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.interval_relu(mid, rad)
        ops.interval_linear(mid, rad, weight, None, True)
        ops.interval_linear_backward(*grad, weight, state)
        ops.interval_relu_backward(*grad, state)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level_name", LEVELS)
def test_native_stages_of_outward_rounding_agree(dtype: torch.dtype, level_name: str) -> None:
    """widen and magnitude, to the last bit: zeros stay zeros, subnormals are lifted, NaN and infinity stay."""
    mid, rad = (t.clone() for t in nasty_box(1003, dtype=dtype))
    mid[5], mid[9], rad[11] = torch.inf, torch.finfo(dtype).smallest_normal / 8, torch.nan
    mid[::7], rad[::14] = 0, 0
    lost = rounding.errors(100, dtype, rounding.Rounding.OUTWARD)
    with level(level_name):
        pairs = (
            (native.widen(mid, rad, lost), rounding.widen(mid, rad, lost)),
            (native.magnitude(mid, lost), rounding.magnitude(mid, lost)),
            (native.magnitude(mid.reshape(17, 59).t(), lost), rounding.magnitude(mid.reshape(17, 59).t(), lost)),
        )
    for actual, expected in pairs:
        assert torch.equal(actual.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))
        assert actual.stride() == expected.stride()
    assert (pairs[0][0][::14] == 0).all() and pairs[1][0][9] > 0
