"""Convolutions of boxes on Hopper's tensor cores against the reference: on such a GPU, else as C++ on the CPU."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess

import pytest
import torch
from torch import Tensor

from pyxai_bounds.ops import hopper, reference, triton
from pyxai_bounds.ops.hopper import EPILOGUES
from pyxai_bounds.ops.layout import state_size, unpack
from tests.cuda.emulator import SOURCES

ON_A_GPU = torch.cuda.is_available() and not hopper.why_not(0)
LAST = torch.channels_last


@pytest.fixture(autouse=True)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if ON_A_GPU:
        return
    emulated = request.getfixturevalue("emulator")
    monkeypatch.setattr(hopper, "_module", lambda: emulated)
    monkeypatch.setattr(hopper, "_current", lambda t: (0, 0))
    for answers in (hopper.takes, hopper.weight_parts):
        answers.cache_clear()
        request.addfinalizer(answers.cache_clear)


class Problem:
    """A box, a weight and bits; images [B, C, H, W] to [B, K, OH, OW], or with ``back`` gradients the other way."""

    def __init__(self, size, outputs, kernel, stride, padding, dilation, back, dtype=torch.bfloat16) -> None:
        g = torch.Generator().manual_seed(0)
        channels = size[1]
        out = [(n + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1 for n in size[2:]]
        image, result = tuple(size), (size[0], outputs, *out)
        self.source, self.target = (result, image) if back else (image, result)
        self.back, self.kernel = back, (kernel, kernel)
        self.geometry = ((stride, stride), (padding, padding), (dilation, dilation))
        weight = torch.randn(outputs, channels, kernel, kernel, generator=g) / (channels**0.5 * kernel)
        self.weight = weight.to(dtype).contiguous(memory_format=LAST)
        self.mid = torch.randn(self.source, generator=g).to(dtype).contiguous(memory_format=LAST)
        self.rad = (0.3 * torch.rand(self.source, generator=g)).to(dtype).contiguous(memory_format=LAST)
        self.bias = torch.randn(self.target[1], generator=g).to(dtype)
        self.bits = torch.randint(0, 256, self.bits_size(), generator=g).to(torch.uint8)
        self.bits[1] |= self.bits[0]  # no end is kept without the other of its sign

    def empty(self) -> Tensor:
        return torch.full(self.target, torch.nan, dtype=self.mid.dtype).contiguous(memory_format=LAST)

    def bits_size(self) -> tuple[int, ...]:
        return state_size(torch.empty(self.target, device="meta").contiguous(memory_format=LAST))

    def takes(self) -> bool:
        return hopper.takes(self.source, self.target, self.kernel, *self.geometry, 1, self.back)

    def run(self, epilogue: str, biased: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        out = self.empty(), self.empty(), torch.zeros(self.bits_size(), dtype=torch.uint8)
        bias = self.bias if biased and epilogue in ("none", "relu") and not self.back else None  # gradients have none
        tensors = (self.mid, self.rad, self.weight, *out, self.bits, *([] if bias is None else [bias]))
        mid, rad, weight, out_mid, out_rad, out_bits, bits, *bias = (t.cuda() if ON_A_GPU else t for t in tensors)
        hopper.convolve_into(
            mid, rad, weight, *self.geometry, self.back, out_mid, out_rad, epilogue, *bias, bits=bits, out_bits=out_bits
        )
        return out_mid.cpu(), out_rad.cpu(), out_bits.cpu()

    def product(self) -> tuple[Tensor, Tensor]:
        """Of the reference, in float64."""
        mid, rad, weight = self.mid.double(), self.rad.double(), self.weight.double()
        if self.back:
            return reference.interval_conv2d_backward(mid, rad, weight, None, self.target, *self.geometry, 1)
        return reference.interval_conv2d(mid, rad, weight, None, *self.geometry, 1, False)[:2]


CASES = {
    "tall tiles": ((3, 64, 32, 32), 64, 3, 1, 1, 1),
    "one image a tile": ((5, 128, 16, 16), 128, 3, 1, 1, 1),
    "four images a tile": ((5, 64, 8, 8), 64, 3, 1, 1, 1),
    "sixteen images a tile": ((17, 64, 4, 4), 64, 3, 1, 1, 1),
    "rows past the image": ((1, 64, 56, 56), 64, 3, 1, 1, 1),
    "stride 2": ((2, 64, 32, 32), 128, 3, 2, 1, 1),
    "even kernel, stride 2": ((2, 64, 32, 32), 64, 4, 2, 1, 1),
    "dilation": ((2, 64, 16, 16), 64, 3, 1, 2, 2),
    "columns of five taps": ((2, 64, 16, 16), 64, 5, 1, 2, 1),
    "one tap": ((3, 64, 16, 16), 192, 1, 1, 0, 1),
    "no padding": ((2, 64, 18, 18), 64, 3, 1, 0, 1),
    # Several images a tile, whose last row the tap of the next one leaves out or reads as zeros.
    "to 8 x 8, stride 2": ((5, 64, 16, 16), 128, 3, 2, 1, 1),
    "to 4 x 4, stride 2": ((17, 128, 8, 8), 64, 3, 2, 1, 1),
    "to 4 x 4, even kernel": ((17, 64, 8, 8), 64, 4, 2, 1, 1),
    "to 4 x 4, no padding": ((9, 64, 6, 6), 64, 3, 1, 0, 1),
    "to 8 x 8, one tap": ((5, 64, 16, 16), 64, 1, 2, 0, 1),
    "4 x 4, two panels of channels": ((33, 128, 4, 4), 128, 3, 1, 1, 1),
    "4 x 4, five taps": ((9, 64, 4, 4), 64, 5, 1, 2, 1),
    "to 4 x 4, wide padding": ((9, 64, 2, 2), 64, 3, 1, 2, 1),
    "8 x 8, dilation": ((5, 64, 8, 8), 64, 3, 1, 2, 2),
    "2 x 2": ((65, 64, 2, 2), 64, 3, 1, 1, 1),
    "1 x 1": ((3, 64, 1, 1), 64, 3, 1, 1, 1),
    "16 x 8": ((3, 64, 16, 8), 64, 3, 1, 1, 1),
    "32 x 2": ((5, 64, 32, 2), 64, 3, 1, 1, 1),
}
# Backward: 18 x 18 and 6 x 6 pixels, and pixels that no tap reaches.
REFUSED_BACK = {"no padding", "to 4 x 4, no padding", "to 8 x 8, one tap"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("back", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("case", CASES)
def test_product(case, back, dtype):
    """Within half a unit in the last place of the exact product, and what sums in float32 lose."""
    problem = Problem(*CASES[case], back, dtype)
    if back and case in REFUSED_BACK:
        assert not problem.takes()
        return
    assert problem.takes()
    mid, rad, _ = problem.run("none")
    exact = problem.product()
    if not back:
        exact = exact[0] + problem.bias.double().reshape(1, -1, 1, 1), exact[1]
    size = problem.mid.double().abs(), problem.weight.double().abs()
    terms = problem.weight[0].numel()
    unit = torch.finfo(dtype).eps / 2
    for value, wanted in zip((mid, rad), exact, strict=True):
        lost = terms * 2**-23 * size[0].amax() * size[1].amax() * terms**0.5 + 1e-7
        assert ((value.double() - wanted).abs() <= 1.01 * unit * wanted.abs() + lost).all()


@pytest.mark.parametrize("back", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("epilogue", EPILOGUES[1:])
@pytest.mark.parametrize(
    "case",
    [
        "tall tiles",
        "four images a tile",
        "sixteen images a tile",
        "rows past the image",
        "stride 2",
        "to 8 x 8, stride 2",
        "to 4 x 4, stride 2",
        "2 x 2",
        "one tap",
    ],
)
def test_epilogue(case, epilogue, back):
    """To the last bit what the elementwise operator makes of the product that the kernel rounds."""
    problem = Problem(*CASES[case], back)
    product = problem.run("none", biased=epilogue == "relu")[:2]
    *box, bits = problem.run(epilogue)
    mid, rad = (t.float() for t in product)
    if epilogue == "relu":
        *wanted, state = reference.interval_relu(mid, rad)
    elif epilogue == "relu_backward":
        *wanted, state = reference.interval_relu_backward(mid, rad, problem.bits)
    else:
        wanted, state = reference.interval_gate(mid, rad, problem.bits), torch.zeros_like(bits)
    assert torch.equal(bits, state.reshape(bits.shape))
    for value, expected in zip(box, wanted, strict=True):
        assert torch.equal(value, expected.to(value.dtype))


@pytest.mark.skipif(ON_A_GPU, reason="only the emulation counts")
@pytest.mark.parametrize("back", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    ("size", "tiles", "left_out"),
    [((1, 64, 32, 32), 4, 0), ((4, 64, 8, 8), 1, 1 / 24), ((16, 64, 4, 4), 1, 1 / 12), ((64, 64, 2, 2), 1, 1 / 6)],
)
def test_traffic(size, tiles, left_out, back, emulator):
    """Each pixel is read once a column of taps, but for those that no tap of it reaches, and weights once a tile."""
    problem, counts = Problem(size, 64, 3, 1, 1, 1, back), (ctypes.c_int64 * 2)()
    emulator.hopper_counts(ctypes.addressof(counts))
    problem.run("none")
    emulator.hopper_counts(ctypes.addressof(counts))
    batch, channels, height, width = size
    pixels, weights = batch * height * (3 * width - 2), 9 * 64
    assert counts[0] == 2 * 2 * channels * (pixels + tiles * weights)
    assert counts[1] == round(2 * 64 * channels * 9 * batch * height * width * (1 - left_out))


class WeightProblem:
    """Boxes [B, C, H, W] and of gradients [B, K, OH, OW], and a weight with zeros."""

    def __init__(self, size, outputs, kernel, stride, padding, dilation, dtype=torch.bfloat16) -> None:
        forward = Problem(size, outputs, kernel, stride, padding, dilation, False, dtype)
        gradients = Problem(size, outputs, kernel, stride, padding, dilation, True, dtype)
        self.boxes = gradients.mid, gradients.rad, forward.mid, forward.rad
        self.geometry, self.weight = forward.geometry, forward.weight
        self.sizes = forward.source, forward.target, forward.kernel
        self.weight[::3] = 0

    def parts(self) -> int:
        return hopper.weight_parts(0, *self.sizes, *self.geometry, 1)

    def run(self) -> Tensor:
        tensors = (t.cuda() if ON_A_GPU else t for t in (*self.boxes, self.weight))
        return hopper.weight_gradient(*tensors, *self.geometry).cpu()

    def exact(self, boxes, weight: Tensor) -> Tensor:
        return reference.interval_conv2d_weight(*(t.double() for t in boxes), weight.double(), *self.geometry, 1)

    def assert_within_budget(self, gradient: Tensor) -> None:
        """Half a unit in the last place, and what each addition in float32 loses of a sum of magnitudes."""
        wanted = self.exact(self.boxes, self.weight)
        magnitudes = self.exact([t.abs() for t in self.boxes], self.weight.abs())
        terms = 2 * self.boxes[0].numel() // self.boxes[0].shape[1]
        unit = torch.finfo(gradient.dtype).eps / 2
        budget = 1.01 * unit * wanted.abs() + terms * 2**-23 * magnitudes
        assert ((gradient.double() - wanted).abs() <= budget).all()


@pytest.mark.skipif(ON_A_GPU, reason="only the emulation counts")
@pytest.mark.parametrize("outputs", [64, 128])
def test_traffic_of_the_weight_gradient(outputs, emulator):
    """Small images' pixels are read once a column of taps, too, and so are the gradients."""
    problem, counts = WeightProblem((8, 64, 4, 4), outputs, 3, 1, 1, 1), (ctypes.c_int64 * 2)()
    emulator.hopper_counts(ctypes.addressof(counts))
    problem.run()
    emulator.hopper_counts(ctypes.addressof(counts))
    pixels, gradients = 8 * 4 * (4 + 3 + 3), 3 * 8 * 4 * 4
    assert counts[0] == 2 * 2 * (64 * pixels + outputs * gradients)
    assert counts[1] == 2 * outputs * 64 * 9 * 8 * 4 * 4


WEIGHT_CASES = CASES | {
    "parts": ((3, 64, 16, 16), 64, 1, 1, 0, 1),  # a part for each of three blocks
    "two rows an image": ((17, 64, 2, 8), 64, 3, 1, 1, 1),
    "one row an image": ((17, 64, 1, 8), 64, 3, 1, 1, 1),
    "wide": ((1, 64, 2, 64), 128, 3, 1, 1, 1),  # too much for stages of 128 channels
    "one tap, stride 2": ((2, 64, 32, 32), 64, 1, 2, 0, 1),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", WEIGHT_CASES)
def test_weight_gradient(case, dtype):
    problem = WeightProblem(*WEIGHT_CASES[case], dtype)
    assert problem.parts() > (case == "parts")
    gradient = problem.run()
    problem.assert_within_budget(gradient)
    assert gradient.dtype is dtype and gradient.is_contiguous(memory_format=LAST)
    assert torch.equal(gradient, problem.run())


@pytest.mark.parametrize(
    ("size", "outputs"),
    [
        ((33, 64, 16, 16), 64),
        ((33, 64, 4, 32), 64),
        ((33, 64, 16, 16), 128),
        ((9, 64, 2, 64), 128),
    ],
    ids=["6", "4 of 5", "4, of 128 channels", "4, of 64 of 128 channels"],
)
def test_weight_gradient_of_many_tiles(size, outputs):
    """Stages, so many, are filled often; an even number of what finds room, each for midpoints or for radii."""
    problem = WeightProblem(size, outputs, 3, 1, 1, 1)
    assert problem.parts() > 0
    problem.assert_within_budget(problem.run())


def test_a_weight_that_is_left_to_others_is_refused():
    problem = WeightProblem((2, 64, 14, 14), 64, 3, 1, 1, 1)
    assert problem.parts() == 0
    with pytest.raises(RuntimeError, match="do not take the weight"):
        problem.run()


def test_weight_gradient_of_a_number_that_is_not_finite():
    """It reaches the channels that it belongs to, and no others."""
    problem = WeightProblem(*CASES["one image a tile"])
    _, _, mid, rad = problem.boxes
    mid[0, 3, 5, 5], rad[1, 7, 2, 9] = torch.nan, torch.inf
    gradient, wanted = problem.run(), problem.exact(problem.boxes, problem.weight)
    assert gradient[:, 3].isnan().all()
    assert torch.equal(gradient.isfinite(), wanted.isfinite())


def test_not_a_number_and_infinity():
    """They spread to where they are summed, as in the reference, and leave a ReLU unstable."""
    problem = Problem(*CASES["one image a tile"], False)
    problem.mid[0, 3, 5, 5] = torch.nan
    problem.rad[1, 7, 2, 9] = torch.inf
    mid, rad, bits = problem.run("relu")
    exact = problem.product()
    assert torch.equal(mid.isnan() | mid.isinf(), exact[0].isnan() | (exact[1].isinf()))
    lower, upper = unpack(bits, mid)
    assert upper[exact[0].isnan()].all() and not lower[exact[0].isnan()].any()
    assert (rad[exact[1].isinf()] == torch.inf).all()


def test_strides_of_a_dimension_of_size_1_mean_nothing():
    problem = Problem((1, 64, 16, 16), 64, 3, 1, 1, 1, False)
    problem.kernel, problem.geometry = (3, 1), ((1, 1), (1, 0), (1, 1))
    g = torch.Generator().manual_seed(1)
    base = (torch.randn(64, 3, 64, generator=g) / 14).bfloat16()
    problem.weight = base.permute(0, 2, 1).unsqueeze(-1)  # strides 192, 1, 64 and, of the last, 1
    mid, rad, _ = problem.run("none", biased=False)
    for value, wanted in zip((mid, rad), problem.product(), strict=True):
        torch.testing.assert_close(value.double(), wanted, rtol=5e-3, atol=5e-3)


def test_a_view_that_begins_anywhere():
    problem = Problem(*CASES["one image a tile"], False)
    expected = problem.run("none")
    shifted = torch.empty(problem.mid.numel() + 3, dtype=problem.mid.dtype)[3:]
    problem.mid = shifted.as_strided(problem.mid.shape, problem.mid.stride()).copy_(problem.mid)
    for value, wanted in zip(problem.run("none"), expected, strict=True):
        assert torch.equal(value, wanted)


def test_many_tiles_for_a_block():
    """Blocks walk over several tiles each; the last images fill no tile."""
    problem = Problem((37, 64, 8, 8), 128, 3, 1, 1, 1, False)
    mid, rad, _ = problem.run("none")
    exact = problem.product()
    torch.testing.assert_close(
        mid.double(), exact[0] + problem.bias.double().reshape(1, -1, 1, 1), rtol=5e-3, atol=5e-3
    )
    torch.testing.assert_close(rad.double(), exact[1], rtol=5e-3, atol=5e-3)


def test_operators_of_auto_use_it(monkeypatch):
    """With the results of the kernel, and the bits that belong to them, for each operator that ends in an epilogue."""
    offered = []

    def fastest(key, candidates, run):
        offered.append(candidates)
        run(triton.HOPPER)  # its trial, too, raises nothing
        return triton.HOPPER

    monkeypatch.setattr(triton, "_problems", {})
    monkeypatch.setattr(triton._kernels("tuning"), "fastest", fastest)
    monkeypatch.setattr(hopper, "supports", lambda t: True)
    where = "cuda" if ON_A_GPU else "cpu"
    for back in (False, True):
        problem = Problem(*CASES["one image a tile"], back)
        mid, rad, weight, bias, bits = (
            t.to(where) for t in (problem.mid, problem.rad, problem.weight, problem.bias, problem.bits)
        )
        args = (*problem.geometry, 1)
        if back:
            size = problem.target
            got = {
                "none": triton.measured.interval_conv2d_backward(mid, rad, weight, None, size, *args),
                "relu_backward": triton.measured.interval_conv2d_backward_relu(mid, rad, weight, bits, size, *args),
            }
        else:
            got = {
                "relu": triton.measured.interval_conv2d(mid, rad, weight, bias, *args, True),
                "gate": triton.measured.interval_conv2d_gate(mid, rad, weight, bits, *args),
            }
        for epilogue, results in got.items():
            wanted = problem.run(epilogue)
            for value, expected in zip(results, wanted, strict=False):
                assert torch.equal(value.cpu(), expected.reshape(value.shape))
        box = mid.contiguous(), rad.contiguous()
        if back:
            results = triton.measured.interval_conv2d_backward(*box, weight, None, size, *args)
        else:
            results = triton.measured.interval_conv2d(*box, weight, bias, *args, False)[:2]
        for value, expected in zip(results, problem.run("none"), strict=False):
            assert torch.equal(value.cpu(), expected) and value.is_contiguous()  # the order of the box
    problem = WeightProblem(*CASES["one image a tile"])
    for order in (LAST, torch.contiguous_format):
        weight = problem.weight.contiguous(memory_format=order)
        tensors = (t.to(where) for t in (*problem.boxes, weight))
        gradient = triton.measured.interval_conv2d_weight(*tensors, *problem.geometry, 1)
        assert torch.equal(gradient.cpu(), problem.run()) and gradient.is_contiguous(memory_format=order)
    assert all(triton.HOPPER in candidates for candidates in offered) and len(offered) == 8


@pytest.mark.parametrize(
    ("size", "outputs", "kernel", "stride", "groups"),
    [
        ((2, 48, 16, 16), 64, 3, 1, 1),  # channels that are no multiples of 64
        ((2, 64, 16, 16), 80, 3, 1, 1),
        ((2, 64, 14, 14), 64, 3, 1, 1),  # an image that does not divide into tiles
        ((2, 64, 15, 16), 64, 3, 2, 1),  # one that is no multiple of the stride
        ((2, 64, 16, 16), 64, 9, 1, 1),  # too many taps
        ((1, 64, 200, 1600), 64, 3, 200, 1),  # steps that a byte does not count
        ((2, 128, 16, 16), 128, 3, 1, 2),
    ],
)
def test_what_is_left_to_others(size, outputs, kernel, stride, groups):
    out = [(n - 1) // stride + 1 for n in size[2:]]
    geometry = ((kernel, kernel), (stride, stride), (kernel // 2, kernel // 2), (1, 1), groups)
    assert not hopper.takes(size, (size[0], outputs, *out), *geometry, False)
    assert not hopper.weight_parts(0, size, (size[0], outputs, *out), *geometry)


def test_a_pixel_that_no_tap_reaches_is_left_to_others():
    assert not hopper.takes((2, 64, 8, 8), (2, 64, 16, 16), (1, 1), (2, 2), (0, 0), (1, 1), 1, True)


@pytest.mark.skipif(shutil.which("nvcc") is None or not SOURCES.is_dir(), reason="needs nvcc and the sources")
@pytest.mark.parametrize(
    ("name", "instruction"),
    [("interval_conv2d", "stmatrix"), ("interval_conv2d_weight", "wgmma.mma_async.sync.aligned.m64n192k16")],
)
def test_compiles(name, instruction, tmp_path):
    """Without a warning or a spilled register, and so that products overlap: ptxas says where they do not."""
    source = SOURCES / "hopper" / f"{name}.cu"
    flags = ["-std=c++17", "-fmad=false", "-Werror=all-warnings", "-Xptxas=-v", "-Xcompiler=-Wall,-Wextra,-Werror"]
    flags += ["-gencode=arch=compute_90a,code=[sm_90a,compute_90a]", f"-I{SOURCES / 'include'}", "-keep"]
    command = ["nvcc", *flags, "-c", str(source), "-o", "kernel.o"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert set(re.findall(r"(\d+) bytes spill", result.stderr)) == {"0"}, result.stderr
    assert not re.findall(r"\(C75\d\d\)", result.stderr), result.stderr
    (ptx,) = tmp_path.glob("*.ptx")
    text = ptx.read_text()
    assert "wgmma.mma_async" in text and "cp.async.bulk.tensor.5d" in text and instruction in text
