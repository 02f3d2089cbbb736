"""Operators in a row as one call of ``csrc/cpu/chain.cpp``, and their derivative as another.

``pyxai_bounds/chain.py`` finds them in a program. This file says which kernel each of them runs, allocates, and hands
over addresses.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyxai_bounds.ops import native
from pyxai_bounds.ops.layout import state_size


class Kernel(enum.IntEnum):
    """What a step of a chain runs."""

    LINEAR = 0  # on a few boxes
    LINEAR_MANY = 1
    CONV2D = 2
    TRANSPOSE = 3  # one memory order of images into the other
    VIEW = 4  # another shape of the same memory, for which nothing runs


class Step(NamedTuple):
    """One operator of a chain. Values are given by number; ``third`` is a bias, or ReLU′'s state."""

    kernel: Kernel
    backward: bool
    differentiable: bool
    mid: int
    rad: int | None
    weight: int | None
    third: int | None
    out_mid: int
    out_rad: int | None
    state: int | None
    shape: tuple[int, ...]  # ``Conv2d``'s numbers; else batch, and features in and out, or rows and columns
    rest: tuple[Any, ...] = ()  # further arguments of the operator

    @property
    def moves(self) -> bool:
        return self.kernel in (Kernel.TRANSPOSE, Kernel.VIEW)

    def reads(self) -> list[int]:
        return [number for number in (self.mid, self.rad, self.weight, self.third) if number is not None]


class Kind(NamedTuple):
    """A value of a chain, which is dense in this order."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    order: torch.memory_format

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def empty(self) -> Tensor:
        make = native.empty_channels_last if self.order is torch.channels_last else native.empty_contiguous
        return make(self.shape, self.dtype)


class Chain:
    """Several layers and backward passes as one call; and their derivative as another.

    Between two calls Python takes as long as the kernel of a small layer, and ten times as long after a large one has
    filled the caches. Values are numbered: ``values`` describes them, and the first ``given`` ones are the arguments of
    a call. ``taken`` are its results, and ``read`` are those that the derivative reads.
    """

    def __init__(
        self, steps: list[Step], values: list[Kind], given: int, taken: list[int], read: Iterable[int]
    ) -> None:
        self._kinds, self._given, self._taken = values, values[:given], taken
        self._small = [_is_small(values[number]) for number in taken]
        self._blank = [0] * (len(values) - given)
        same = list(range(len(values)))  # the value that is in the same memory
        rows = []
        for step in steps:
            if step.kernel is Kernel.VIEW:
                same[step.out_mid] = same[step.mid]
            else:
                numbers = (-1 if number is None else same[number] for number in step[3:10])
                rows.append((step.kernel, step.backward, step.differentiable, *numbers, *step.shape))
        dtypes = {kind.dtype for kind in values} - {torch.uint8}
        assert len(dtypes) == 1, f"a chain on {dtypes} would write past its memory"
        # The values that the derivative reads: arguments, results (by position), and those kept in the chain's block.
        memory = sorted({same[number] for number in read})
        self.read_given = [number for number in memory if number < given]
        self.read_taken = [place for place, number in enumerate(taken) if number in memory]
        self.read_kept = [number for number in memory if number >= given and number not in taken]
        sizes = [kind.bytes for kind in values]
        self._chain = native.module().Chain(dtypes.pop().itemsize, rows, sizes, given, taken, self.read_kept)
        self._places, self._size = self._chain.places, self._chain.size

    def addresses(self, tensors: Sequence[Tensor]) -> list[int] | None:
        """The addresses of the arguments; None if the kernels cannot read one of them."""
        addresses = []
        for t, (shape, dtype, order) in zip(tensors, self._given, strict=True):
            dense = t.is_contiguous() if order is torch.contiguous_format else t.is_contiguous(memory_format=order)
            if not dense or t.shape != shape or t.dtype is not dtype or not t.is_cpu:
                return None
            addresses.append(t.data_ptr())
        return addresses

    def run(self, given: list[int]) -> list[Tensor]:
        """The results."""
        addresses = given + self._blank
        results = self._results(addresses)
        self._chain.run(addresses, 0)
        return results

    def run_and_keep(self, given: list[int]) -> tuple[list[Tensor], Tensor]:
        """The results, and a block of memory with the other values that the derivative reads."""
        addresses = given + self._blank
        results = self._results(addresses)
        block = native.empty_contiguous((self._size,), torch.uint8)
        self._chain.run(addresses, block.data_ptr())
        return results, block

    def _results(self, addresses: list[int]) -> list[Tensor]:
        results = []
        for number, is_small in zip(self._taken, self._small, strict=True):
            kind = self._kinds[number]
            result = torch.empty(kind.shape, dtype=kind.dtype, device=native.CPU) if is_small else kind.empty()
            addresses[number] = result.data_ptr()
            results.append(result)
        return results

    def kept(self, block: Tensor, number: int) -> Tensor:
        """A value in the block, unless it is a channels-last image."""
        kind, start = self._kinds[number], self._places[number]
        return block[start : start + kind.bytes].view(kind.dtype).view(kind.shape)

    def adjoint(
        self,
        known: dict[int, Tensor],
        block: Tensor,
        overwrite: bool,
        grads: Sequence[Tensor | None],
        needs: Sequence[bool],
    ) -> list[Tensor | None]:
        """The gradients of the arguments that need one, from the gradients of the results; None stands for zeros.

        ``known``: the arguments and results that the derivative reads. ``overwrite``: nobody will read the block again,
        so gradients may be written over the values in it.
        """
        count = len(self._kinds)
        addresses, given_grads, wanted = [0] * count, [0] * count, [0] * len(self._given)
        # Hooks on saved tensors may return them in another memory order.
        read = {number: self._dense(number, t) for number, t in known.items()}
        for number, t in read.items():
            addresses[number] = t.data_ptr()
        taken = zip(self._taken, grads, strict=True)
        dense = {number: self._dense(number, grad) for number, grad in taken if grad is not None}
        for number, grad in dense.items():
            given_grads[number] = grad.data_ptr()
        found: list[Tensor | None] = [None] * len(needs)
        for number, needed in enumerate(needs):
            if needed:
                found[number] = gradient = self._kinds[number].empty()
                wanted[number] = gradient.data_ptr()
        written = self._chain.adjoint(addresses, block.data_ptr(), overwrite, given_grads, wanted)
        return [gradient if is_written else None for gradient, is_written in zip(found, written, strict=True)]

    def _dense(self, number: int, t: Tensor) -> Tensor:
        return t.contiguous(memory_format=self._kinds[number].order)


def _is_small(kind: Kind) -> bool:
    """Is it contiguous and so small that PyTorch allocates it?"""
    return kind.order is torch.contiguous_format and kind.bytes < native.module().least_kept


def kernel_of(
    mid: Tensor,
    rad: Tensor,
    weight: Tensor,
    third: Tensor | None,
    backward: bool,
    geometry: tuple[Any, ...],
    differentiable: bool,
) -> tuple[Kernel, tuple[int, ...]] | None:
    """The kernel that a chain runs for an affine operator that rounds to nearest, and its ``Step.shape``, or None.

    ``third``: a bias or, backward, the state of ReLU′. ``geometry``: a convolution's input size, stride, padding,
    dilation and groups; empty for a linear layer. ``differentiable``: must there be kernels for the derivative, too?
    """
    outputs = weight.shape[0]
    if backward:
        suits = third is None or (third.shape == state_size(mid) and third.dtype is torch.uint8)
    else:
        suits = third is None or native.is_vector(third, mid, outputs)
    if not suits or not native.supports(mid):
        return None
    if geometry:
        size, stride, padding, dilation, groups = geometry
        numbers = native.conv2d_geometry(mid, rad, weight, size, stride, padding, dilation, groups, backward)
        suits = numbers is not None and (not differentiable or native.has_weight_kernel(numbers, weight))
        return (Kernel.CONV2D, numbers) if numbers is not None and suits else None
    summed = 0 if backward else 1
    shape = (*mid.shape, weight.shape[1 - summed])
    if native.few(mid, rad, weight, summed):
        return Kernel.LINEAR, shape
    many = weight.is_contiguous() and native.several(mid, rad, weight, summed)
    return (Kernel.LINEAR_MANY, shape) if many else None
