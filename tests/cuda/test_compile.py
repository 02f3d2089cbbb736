"""Every kernel compiles for sm_80 and sm_90 without a warning or a spilled register: no GPU is needed."""

import re
import shutil
import subprocess

import pytest

from tests.cuda.emulator import SOURCES

NAMES = ["interval_conv2d", "interval_matmul", "interval_mul", "interval_relu", "interval_scale_shift"]
FLAGS = ["-std=c++17", "-fmad=false", "-Werror=all-warnings", "-Xptxas=-v", "-Xcompiler=-Wall,-Wextra,-Werror"]
pytestmark = pytest.mark.skipif(
    shutil.which("nvcc") is None or not SOURCES.is_dir(), reason="needs nvcc and the sources of the kernels"
)


def test_all_sources_are_here_and_in_the_build():
    listed = re.findall(r"csrc/cuda/(\w+)\.cu", (SOURCES.parent / "CMakeLists.txt").read_text())
    assert sorted(listed) == sorted(path.stem for path in (SOURCES / "cuda").glob("*.cu")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_resources(name, tmp_path):
    """Two blocks of threads find room on a multiprocessor at least: 64 Ki registers, 48 KiB of shared memory each."""
    architectures = [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in (80, 90)]
    source = SOURCES / "cuda" / f"{name}.cu"
    command = ["nvcc", *FLAGS, *architectures, f"-I{SOURCES / 'include'}", "-c", source, "-o", tmp_path / "kernel.o"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    kernels = re.findall(r"Compiling entry function '\w*(interval_\w+_kernel)I([fd])\w*' for '(sm_\d+)'", result.stderr)
    spilled = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr)
    registers = [int(x) for x in re.findall(r"Used (\d+) registers", result.stderr)]
    shared = [int(x) for x in re.findall(r"(\d+) bytes smem", result.stderr)]
    found = {kernel for kernel, _, _ in kernels}
    assert len(kernels) == 4 * len(found) == len(spilled) == len(registers) and len(set(kernels)) == len(kernels)
    assert found == set(re.findall(r"\s(interval_\w+_kernel)\(", source.read_text()))
    assert set(spilled) == {("0", "0")}, result.stderr
    threads = int(re.search(r"constexpr int threads = (\d+)", source.read_text())[1])
    assert max(registers) * threads * 2 <= 65536 and max(shared, default=0) <= 48 * 1024
