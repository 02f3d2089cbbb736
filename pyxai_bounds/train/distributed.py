"""Several processes that train one model: who this one is, and averages over all of them.

``torchrun`` starts the processes and says who is who in environment variables; without it there is one process and
everything here does nothing.
"""

from __future__ import annotations

import atexit
import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


@dataclass(frozen=True)
class World:
    """The processes of this run. rank 0 alone writes and prints."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        return self.rank == 0

    def mean(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over the processes."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.detach().double().flatten() for tensor in tensors]).to(self.device)
        dist.all_reduce(flat)
        for tensor, piece in zip(tensors, (flat / self.size).split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(piece.reshape(tensor.shape))

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


def world(device: str = "auto") -> World:
    """The processes that torchrun started, connected, or this one alone.

    device: auto (a GPU where there is one), cpu, cuda or cuda:N. Under torchrun each process takes the GPU of its local
    rank. Raises ValueError for a device that is not there.
    """
    size, rank, local = (int(os.environ.get(name, default)) for name, default in
                         (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))  # fmt: skip
    chosen = _device(device, local if size > 1 else None)
    if size == 1:
        return World(device=chosen)
    if not dist.is_initialized():
        # Imported with a group at hand, the compiler's defaults hold it for good: its threads then run into the end of
        # the interpreter, which sometimes aborts the process after all its work is done.
        importlib.import_module("torch._dynamo")
        # Once for all runs of a program: connecting again under torchrun meets what the first time left, and may hang.
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(dist.destroy_process_group)
    return World(rank, size, chosen)


def _device(name: str, local_rank: int | None) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", local_rank or 0)
        torch.zeros(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"The device {name!r} cannot be used here ({reason}); choose auto, cpu or cuda:N.") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device
