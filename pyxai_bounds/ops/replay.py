"""Records the GPU work of a function once and replays it: small bound programs spend their time on launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Replay:
    """``fn`` on CUDA tensors of the shapes, dtypes and strides of ``example``, as a CUDA graph.

    The graph reads parameters where they lie: what an optimiser writes into them is seen, rebinding them is not.
    ``fn`` returns a tuple of tensors, needs no gradient and must not look at values on the host (``check_target``
    does: leave it out and call it before). Calls copy their arguments in and their results out.
    Raises ValueError for other shapes, dtypes or devices than those of ``example``.
    """

    def __init__(self, fn: Callable[..., tuple[Tensor, ...]], example: Sequence[Tensor]) -> None:
        if not all(t.is_cuda for t in example):
            raise ValueError("Only work on CUDA tensors can be recorded; call the function itself.")
        self._inputs = [t.detach().clone() for t in example]
        self._graph = torch.cuda.CUDAGraph()
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.no_grad():
            with torch.cuda.stream(aside):
                for _ in range(2):  # compiles kernels and measures tile sizes, neither of which can be recorded
                    fn(*self._inputs)
            torch.cuda.current_stream().wait_stream(aside)
            with torch.cuda.graph(self._graph):
                self._outputs = fn(*self._inputs)

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        for kept, given in zip(self._inputs, tensors, strict=True):
            if kept.shape != given.shape or kept.dtype != given.dtype or kept.device != given.device:
                raise ValueError(
                    f"Recorded for {kept.dtype} {list(kept.shape)} on {kept.device}, called with {given.dtype} "
                    f"{list(given.shape)} on {given.device}: record again for these."
                )
            kept.copy_(given)
        self._graph.replay()
        return tuple(t.clone() for t in self._outputs)
