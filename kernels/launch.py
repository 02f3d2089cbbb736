"""What all launchers share: launches without Triton's search, their sizes, the arithmetic's type, and the device."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel

# Elementwise kernels must round as the reference does: a product and a sum round once each. ptxas would contract them.
EXACT = {"enable_fp_fusion": False}

TENSOR_CORE_TERMS = 16  # that a product of 16-bit tiles sums at least

PROGRAMS = 528  # enough for four on each multiprocessor of an H200


def interpreting() -> bool:
    """Do the kernels run in Triton's interpreter, on the CPU? It decides when they are imported."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def compute_type(dtype: torch.dtype) -> Any:
    """What a kernel computes in: float32, for tensors of 16 bits too, and float64 for float64."""
    return tl.float64 if dtype is torch.float64 else tl.float32


_HERE = contextlib.nullcontext()


def on_device(t: Tensor) -> Any:
    """Triton launches on the current device, which need not be the tensor's where there are several."""
    return torch.cuda.device(t.device) if t.is_cuda and torch.cuda.device_count() > 1 else _HERE


# --- launches ------------------------------------------------------------------------------------------------------

LAUNCHES = 4096  # that each launcher remembers
ALIGNMENT = 16  # bytes: a kernel may be compiled for tensors that begin at multiples of it


class Launch:
    """A kernel with all that a launch takes besides tensors: grid, numbers, constants, and options of the compiler.

    It belongs to one device. Called with the tensors, which are the kernel's first arguments.

    To find what it compiled, Triton looks at every argument of every launch, which takes longer than many a kernel
    runs. Here all arguments but tensors are fixed, and of these their types matter and whether they begin at multiples
    of 16 bytes. So what Triton found for tensors that all do is launched directly for others of the same types that
    all do, too; everything else goes through Triton, which then compiles for what it is given.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], numbers: Sequence[float], **constants: Any) -> None:
        self._kernel, self._grid = kernel, (*grid, 1, 1)[:3]
        self._numbers, self._constants = numbers, constants
        self._found: tuple[Callable[..., None], list[torch.dtype], tuple] | None = None

    def __call__(self, *tensors: Tensor) -> None:
        found = self._found
        if found is not None:
            run, dtypes, rest = found
            for t, dtype in zip(tensors, dtypes, strict=True):
                if t.dtype is not dtype or t.data_ptr() % ALIGNMENT:
                    break
            else:
                run(*tensors, *rest)
                return
        compiled = self._kernel[self._grid](*tensors, *self._numbers, **self._constants)
        if isinstance(compiled, CompiledKernel) and not any(t.data_ptr() % ALIGNMENT for t in tensors):
            constants = self._kernel.arg_names[len(tensors) + len(self._numbers) :]
            rest = (*self._numbers, *(self._constants[name] for name in constants))
            self._found = compiled[self._grid], [t.dtype for t in tensors], rest


def elementwise(
    kernel: Any, n: int, dtype: torch.dtype, numbers: Sequence[float], groups: int = 256, **constants: Any
) -> Launch:
    """A launch over n elements in groups of eight that computes in the type for ``dtype``."""
    grid, block = flat(n, groups)
    return Launch(kernel, grid, numbers, **block, COMPUTE=compute_type(dtype), **constants, **EXACT)


def flat(n: int, groups: int = 256) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and block of a launch over n elements in groups of eight, whose bits are one byte."""
    groups = 8192 if interpreting() else groups  # a program of the interpreter costs milliseconds, whatever its size
    grid = (triton.cdiv(n, 8 * groups),)
    return grid, {"GROUPS": groups, "WIDE": n + 8 * groups >= 2**31}


@triton.jit
def flat_offsets(GROUPS: tl.constexpr, WIDE: tl.constexpr):
    """The bytes of this program [GROUPS] and their elements [GROUPS, 8]; 64 bits wide where 32 would overflow."""
    start = tl.program_id(0)
    if WIDE:
        start = start.to(tl.int64)
    groups = start * GROUPS + tl.arange(0, GROUPS)
    return groups, groups[:, None] * 8 + tl.arange(0, 8)[None, :]


@triton.jit
def bytes_for(n):
    """ceil(n / 8), where n + 7 may be more than 32 bits hold."""
    return n // 8 + (n % 8 + 7) // 8


# --- matrix products -----------------------------------------------------------------------------------------------


class Block(NamedTuple):
    """Tile sizes of a matrix product along its three dimensions, warps per tile and stages of the load pipeline."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    flat: bool = False  # of a convolution: a block of the sum spans taps
    image: bool = False  # it is that of an image: the kernels of interval_conv2d_image.py


# A program of the interpreter costs milliseconds; these tiles still have edges on the shapes of the tests.
_INTERPRETED = [Block(64, 32, 32, 4, 1)]


def box_blocks(dtype: torch.dtype, n: int, summed: int, tf32: bool, hopper: bool) -> list[Block]:
    """Candidates for box · weight: m rows of the box, n of the weight, k summed; the first is the default.

    ``summed`` terms lie side by side in memory: of a convolution, the channels of a group. Chosen so that nothing
    spills: two accumulators take twice the registers of an ordinary product. Most let two programs of four warps onto
    a multiprocessor: one computes while the other writes.
    """
    if interpreting():
        return _INTERPRETED
    if dtype is torch.float64:
        return [Block(32, 32, 16, 4, 2)]
    if dtype is torch.float32 and not tf32:  # no tensor cores: what limits these are registers
        return [Block(64, 64, 16, 8, 3), Block(32, 64, 16, 8, 3)]
    k = min(32 if dtype is torch.float32 or not hopper else 64, max(TENSOR_CORE_TERMS, triton.next_power_of_2(summed)))
    half = max(TENSOR_CORE_TERMS, k // 2)
    if n <= 16:
        return [Block(64, 16, k, 4, 3), Block(128, 16, k, 4, 3)]
    wide = [Block(128, 128, k, 8, 3), Block(128, 128, half, 8, 4), Block(64, 128, k, 4, 2)] if n > 64 else []
    return [Block(128, 64, half, 4, 4), Block(128, 64, k, 8, 3), Block(64, 64, k, 4, 3), *wide]


def few_channels_blocks(dtype: torch.dtype, n: int, groups: int, tf32: bool, hopper: bool) -> list[Block]:
    """The same for a convolution of few channels, whose blocks of the sum span taps and hold an address an element.

    Of one group, which may be filled up with zeros to what tensor cores sum at least, also the blocks for that.
    """
    if interpreting() or dtype is torch.float64 or (dtype is torch.float32 and not tf32):
        flat = box_blocks(dtype, n, 1, tf32, hopper)
    elif n <= 16:
        flat = [Block(64, 16, 32, 4, 2)]
    else:
        flat = [Block(64, 64, 32, 8, 2), Block(128, 64, 32, 8, 2), Block(128, 64, 16, 8, 2)]
    cores = dtype is not torch.float64 and (dtype is not torch.float32 or tf32)
    padded = box_blocks(dtype, n, TENSOR_CORE_TERMS, tf32, hopper) if groups == 1 and cores else []
    return [*(block._replace(flat=True) for block in flat), *padded]


def weight_blocks(
    dtype: torch.dtype, n: int, flat: bool, tf32: bool, hopper: bool, linear: bool = False
) -> list[Block]:
    """Candidates for the weight's gradient: m summed, n rows of the weight, k columns."""
    if interpreting():
        return _INTERPRETED
    if dtype is torch.float64:
        return [Block(16, 32, 32, 4, 2)]
    if dtype is torch.float32 and not tf32:
        return [Block(16, 64, 64, 8, 3)]
    m = 32 if dtype is torch.float32 or flat or not hopper else 64
    if n <= 16:
        return [Block(m, 16, 64, 4, 3)]
    if flat:
        return [Block(m, 64, 32, 8, 2)]
    blocks = [Block(m, 64, 64, 4, 3), Block(m, 64, 128, 8, 3)]
    # Few samples and many weights: a small tile reads its factors out of L2 too often (62 bytes for 1,000
    # multiplications with 64 x 64, 31 with 128 x 128), and there are tiles enough for all multiprocessors.
    if linear and hopper and dtype.itemsize == 2 and n >= 128:
        blocks += [Block(m, 128, 128, 8, 3), Block(m, 128, 128, 16, 3)]
    return blocks


def is_flat(channels: int) -> bool:
    """Is a block of a convolution's sum better filled from several taps than from one tap's channels?"""
    return channels < TENSOR_CORE_TERMS


def dot_options(dtype: torch.dtype, tf32: bool) -> dict[str, Any]:
    """Arithmetic of the products: of 32-bit operands in full precision, unless tf32 is asked for."""
    precision = "tf32" if tf32 else "ieee"
    widen = interpreting() and dtype.itemsize == 2
    return {"PRECISION": precision, "WIDEN": widen, "COMPUTE": compute_type(dtype), "enable_fp_fusion": True}


def tile_options(block: Block, dtype: torch.dtype, tf32: bool) -> dict[str, Any]:
    """What a launch of a matrix product says of its tiles, beside its arithmetic."""
    sizes = {"BLOCK_M": block.m, "BLOCK_N": block.n, "BLOCK_K": block.k}
    return {**sizes, "num_warps": block.warps, "num_stages": block.stages, **dot_options(dtype, tf32)}


def sum_type(dtype: torch.dtype) -> torch.dtype:
    """The type in which partial sums are written."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def parts_of(rows: int, tiles: int, block: int) -> tuple[int, int]:
    """Into how many parts to split a sum over ``rows`` so that ``tiles`` of them fill the device; rows of a part.

    Each part is summed by its own program and the parts are added in a fixed order: the result is reproducible.
    """
    wanted = max(1, min(PROGRAMS // max(1, tiles), rows // (4 * block), 256))
    rows_of_part = triton.cdiv(triton.cdiv(max(1, rows), wanted), block) * block
    return triton.cdiv(max(1, rows), rows_of_part), rows_of_part
