"""Random networks over all rules: no component of any explanation lies outside its sound bounds. Compared exactly."""

from __future__ import annotations

import copy
import itertools
import random
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import pyxai_bounds as xb
from pyxai_bounds import ops
from pyxai_bounds.program import captured_graph
from tests.ops.cases import LEVELS, level, needs_native
from tests.soundness.__main__ import evaluations, networks
from tests.soundness.evaluations import Evaluation
from tests.soundness.networks import CLASSES, Subject, redraw, subject
from tests.soundness.programs import members, outside
from tests.soundness.rules import CHAINS, Chain
from tests.soundness.rules import check as check_one

pytestmark = pytest.mark.usefixtures("one_thread")

COMMON = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@st.composite
def subjects(draw: st.DrawFn) -> Subject:
    return subject(lambda options: draw(st.sampled_from(options)))


@settings(COMMON, max_examples=4)
@given(subjects(), st.sampled_from([0.0, 1e-6, 1e-4, 1e-2]))
def test_enclosure(subj: Subject, eps: float) -> None:
    box = xb.Interval.linf(subj.x, eps)
    bounds = xb.bound(subj.fn, sound=True)(box, subj.target)
    for point in subj.points(box, 6, seed=1):
        assert not outside(bounds, subj.value(point)).any()
    evaluated = xb.bound(subj.fn, sound=True, semantics="float32")(box, subj.target)
    assert not outside(evaluated, subj.value(subj.x.double())).any()
    graph = captured_graph(subj.fn, subj.x, subj.target).graph
    for seed in range(3):
        (value,) = Evaluation(graph, seed, chunk=3 + 2 * seed).run(subj.x, subj.target, enable_io_processing=False)
        assert not outside(evaluated, value).any()


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: chain.name)
def test_chains_of_operators(chain: Chain) -> None:
    """What one rule finds out and another one uses, on values of several scales; nearest bounds are violated."""
    one, found = chain.one(), Counter()
    for seed in range(8):
        for eps in (1e-6, 1e-2):
            components, sound, nearest = check_one(one, eps, seed)
            found.update(components=components, sound=sound, nearest=nearest)
    assert found["sound"] == 0 and found["nearest"] > 0


def test_many_weights_and_the_bounds_that_are_rounded_to_nearest_are_violated() -> None:
    """If the unsound bounds were never violated, this module would see nothing."""
    found = networks(8, seed=16, points=1)
    assert all(counts["sound"] == 0 for counts in [*found.values(), *evaluations(8, seed=16).values()])
    assert all(counts["nearest"] > 0 for eps, counts in found.items() if eps <= 1e-6)


def test_gradients_of_the_bounds_are_those_of_the_unsound_ones() -> None:
    """Rounding outward moves the bounds by a few units in the last place, and their derivatives no more."""
    compared: Counter = Counter()
    for seed in range(2):
        subj = subject(random.Random(300 + seed).choice)
        grads = []
        for sound in (False, True):
            box = xb.Interval.linf(subj.x, 0.05)
            bounds = xb.bound(subj.fn, sound=sound)(box, subj.target)
            if not bounds.isfinite().all():
                break
            score = bounds.rad.sum() + bounds.mid.sum()
            parameters = [p for p in subj.model.parameters() if p.requires_grad]
            grads.append(torch.autograd.grad(score, parameters, allow_unused=True, materialize_grads=True))
        for nearest, outward in zip(*grads, strict=True) if len(grads) == 2 else ():
            scale = max(g.abs().max() for g in grads[0])
            assert (nearest - outward).abs().max() <= 1e-3 * scale
            compared["tensors"] += 1
    assert compared["tensors"] > 0


@pytest.mark.skipif("native" not in ops.available(), reason="the native module is not built")
def test_backends_round_outward_alike() -> None:
    """Elementwise stages agree to the last bit, in both dtypes, subnormal numbers included."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float64):
        for scale in (1.0, 1e-40, 1e30):
            mid = (scale * torch.randn(4, 3, 5, 7, generator=generator, dtype=torch.float64)).to(dtype)
            rad = (scale * torch.rand(4, 3, 5, 7, generator=generator, dtype=torch.float64)).to(dtype)
            grad = [torch.randn(mid.shape, generator=generator, dtype=dtype).mul(scale), rad.flip(0)]
            for rounding in (1, 2):
                results = []
                for name in ("reference", "native"):
                    with xb.backend(name):
                        relu = ops.interval_relu(mid, rad, rounding)
                        back = ops.interval_relu_backward(*grad, relu[2], rounding)
                        product = ops.interval_mul(mid, rad, *grad, rounding)
                        shifted = ops.interval_scale_shift(
                            mid, rad, mid[0, :, 0, 0], rad[0, :, 0, 0], None, None, rounding
                        )
                        results.append([*relu, *back, *product, *shifted])
                for a, b in zip(*results, strict=True):
                    assert torch.equal(*(t if t.dtype == torch.uint8 else t.nan_to_num(0.5) for t in (a, b)))


@needs_native
def test_every_instruction_set_level_encloses() -> None:
    """Convolutions and linear layers in a row, as chains run them at each level; float64 and float32 evaluations."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 17, 3, padding=1), nn.ReLU(), nn.Conv2d(17, 32, 3, stride=2), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(288, 40), nn.ReLU(), nn.Linear(40, CLASSES)),
    )
    twin = copy.deepcopy(model).double()
    fn, oracle = xb.explain.gradient(model, of="loss"), xb.explain.gradient(twin, of="loss")
    target = torch.tensor([0, 3])
    found: Counter = Counter()
    for seed, name in itertools.product(range(6), LEVELS):
        redraw(model, seed)
        twin.load_state_dict(model.state_dict())
        x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        x = x * (x > 0.5) if seed % 2 else x
        box = xb.Interval.linf(x, (0.0, 1e-6, 1e-3)[seed % 3])
        with level(name):
            nearest, sound, evaluated = (
                xb.bound(fn, **options)(box, target)
                for options in ({}, {"sound": True}, {"sound": True, "semantics": "float32"})
            )
        values = [oracle(point, target) for point in members(box, 4, seed)]
        for image in (x, x.contiguous(memory_format=torch.channels_last)):
            assert not outside(evaluated, fn(image, target)).any()
        assert not any(outside(bounds, value).any() for value in values for bounds in (sound, evaluated))
        found[name] += sum(int(outside(nearest, value).sum()) for value in values)
    assert all(found[name] > 0 for name in LEVELS)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_bounds_are_the_same_without_gradients(mode: type) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.GELU(), torch.nn.Linear(9, 3))
    box, target = xb.Interval.linf(torch.rand(4, 6), 1e-3), torch.tensor([0, 1, 2, 0])
    with mode():
        inside = xb.bound(xb.explain.gradient(model), sound=True)(box, target)
    bounds = xb.bound(xb.explain.gradient(model), sound=True)(box, target)
    assert torch.equal(inside.mid, bounds.mid) and torch.equal(inside.rad, bounds.rad)
