"""Every kernel compiles for sm_80 and sm_90, and what the compiler reports is what a GPU wants: no GPU is needed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pyxai_bounds.ops import triton

ROOT = Path(__file__).parents[2]
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes that one program may use


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    pytest.importorskip("triton")
    if triton._interpreting():
        pytest.skip("compiled in the other run, without TRITON_INTERPRET")
    command = [sys.executable, "-m", "tests.kernels.compile_kernels"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_every_kernel_type_and_architecture_is_there(compiled):
    from tests.kernels.compile_kernels import elementwise_kernels  # imports triton

    products = {entry["kernel"] for entry in compiled if entry["block"]}
    assert {entry["kernel"] for entry in compiled} - products == set(elementwise_kernels())
    assert len(products) == 21
    for kernel in products:
        seen = {(entry["dtype"], entry["sm"]) for entry in compiled if entry["kernel"] == kernel}
        others = {(d, 90) for d in ("bf16", "fp16", "fp32", "tf32")} | {("bf16", 80), ("fp32", 80)}
        assert seen == others if "image" in kernel else seen >= others | {("fp64", 90)}


def test_shared_memory_fits(compiled):
    assert all(entry["shared"] <= SHARED_LIMIT[entry["sm"]] for entry in compiled)


def test_registers_do_not_spill(compiled):
    """The assembler may give up a few by itself, where that lets a second program onto the multiprocessor."""
    for entry in compiled:
        own_choice = entry["registers"] <= 128 and (entry["sm"] == 80 or entry["dtype"] == "fp64")
        assert entry["spilled"] <= (16 if own_choice else 0), entry


def test_products_run_on_tensor_cores(compiled):
    for entry in compiled:
        if entry["block"] is None:
            continue
        if entry["dtype"] in ("bf16", "fp16", "tf32"):
            assert entry["mma" if entry["sm"] == 80 else "wgmma"] > 0, entry
        elif entry["dtype"] == "fp32":  # in full precision: no tensor core may touch it
            assert entry["wgmma"] == entry["mma"] == 0 and entry["fma"] > 0, entry


def test_loads_are_wide(compiled):
    """16 bytes at a time, where channels are many and stand side by side."""
    for entry in compiled:
        transposed = entry["dtype"] == "tf32" and entry["kernel"] == "conv2d_image_weight"  # as tensor cores want it
        if entry["block"] and not transposed and not entry["kernel"].endswith(("flat", "of_one")):
            assert entry["wide loads"] > 0, entry


def test_elementwise_kernels_round_each_operation(compiled):
    for entry in compiled:
        # erf is a library's, which contracts by its own design.
        if entry["block"] is None and "gelu" not in entry["kernel"]:
            assert entry["fma"] == 0, entry
