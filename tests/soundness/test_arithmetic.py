"""The arithmetic that proofs rely on: what sound bounds switch off, put back, or refuse."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pyxai_bounds as xb
from tests.soundness.programs import outside

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("precision", ["medium", "high", "highest"])
def test_reduced_matmul_precision_is_switched_off_and_restored(precision: str) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(300, 50), torch.randn(5, 300)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        bounds = xb.bound(layer, sound=True)(xb.Interval.point(x))
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    value = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
    assert not outside(bounds, value).any()


def test_winograd_is_switched_off_and_nnpack_restored() -> None:
    """Where oneDNN is off, PyTorch may convolve with NNPACK, whose Winograd transforms no γ_n covers."""
    seen = []
    before = torch._C._get_nnpack_enabled()
    layer = nn.Conv2d(2, 3, 3)
    with xb.rounding.ieee_arithmetic():
        seen.append(torch._C._get_nnpack_enabled())
    assert seen == [False] and torch._C._get_nnpack_enabled() == before
    xb.bound(layer, sound=True)(xb.Interval.point(torch.rand(1, 2, 5, 5)))
    assert torch._C._get_nnpack_enabled() == before


def test_arithmetic_stays_exact_until_the_last_thread_needs_it_no_more() -> None:
    """The settings belong to all threads: one that is done must not give the others its user's bfloat16 products."""
    owner = torch.backends.mkldnn.matmul
    before = owner.fp32_precision
    first, second = xb.rounding.ieee_arithmetic(), xb.rounding.ieee_arithmetic()
    try:
        owner.fp32_precision = "bf16"
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert owner.fp32_precision == "ieee"
        second.__exit__(None, None, None)
        assert owner.fp32_precision == "bf16"
    finally:
        owner.fp32_precision = before


def test_flushed_subnormal_numbers_are_refused() -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush")
    try:
        with pytest.raises(RuntimeError, match="set_flush_denormal"):
            xb.bound(torch.relu, sound=True)(xb.Interval.linf(torch.ones(3), 0.1))
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fn", [torch.tanh, torch.relu, lambda x: x + 1])
def test_narrow_dtypes_are_refused(dtype: torch.dtype, fn: object) -> None:
    with pytest.raises(TypeError, match="float32 or float64"):
        xb.bound(fn, sound=True)(xb.Interval.linf(torch.ones(3, dtype=dtype), 0.1))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"])
def test_narrow_products_behind_the_back_of_pytorch_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bounded = xb.bound(torch.nn.Linear(3, 2), sound=True)
    monkeypatch.setenv(name, "BF16")
    with pytest.raises(RuntimeError, match=name):
        bounded(xb.Interval.point(torch.ones(1, 3)))
