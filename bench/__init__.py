"""Benchmarks: what the engine must beat, measured in one process. ``python -m bench`` runs them."""

import torch

from pyxai_bounds.ops import native

# Where PyTorch is held to AVX2 (ATEN_CPU_CAPABILITY=avx2, and ONEDNN_MAX_CPU_ISA and MKL_ENABLE_INSTRUCTIONS for its
# libraries), so are the native kernels.
if native.available() and torch.backends.cpu.get_cpu_capability() == "AVX2" and "avx2" in native.module().levels():
    native.module().set_level("avx2")
