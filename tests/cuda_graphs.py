"""CUDA graphs without a GPU: what is done while "recording" is noted, and done again on the very tensors."""

import contextlib
import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from pyxai_bounds import errors, recorder, rounding
from pyxai_bounds.ops import replay


class Recording(TorchDispatchMode):
    """Stands for a CUDA graph: refuses what looks at values, remembers the rest with the memory that it touches.

    It notes below autograd, and parameters are used where they lie.
    """

    active = 0

    def __init__(self):
        super().__init__()
        self.done = []

    def __enter__(self):
        Recording.active += 1
        return super().__enter__()

    def __exit__(self, *error):
        Recording.active -= 1
        super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if torch.Tag.data_dependent_output in function.tags:
            raise RuntimeError("operation not permitted when stream is capturing")
        out = function(*args, **(kwargs or {}))
        lying = tree_map_only(torch.Tensor, lambda t: t.data, (args, kwargs or {}))
        self.done.append((function, *lying, out))
        return out

    def pool(self):
        return None

    def replay(self):
        for function, args, kwargs, out in self.done:
            again = function(*args, **kwargs)
            for old, new in zip(tree_flatten(out)[0], tree_flatten(again)[0], strict=True):
                if isinstance(old, torch.Tensor) and old.numel() and old.data_ptr() != new.data_ptr():
                    old.data.copy_(new)  # as a GPU does: autograd does not notice


def imitate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pass the CPU off as a GPU, to all that records."""
    nothing = types.SimpleNamespace(wait_stream=lambda other: None, record=lambda: None, wait=lambda: None)
    imitations = {
        "CUDAGraph": Recording,
        "Stream": lambda: nothing,
        "Event": lambda: nothing,
        "current_stream": lambda: nothing,
        "stream": lambda stream: contextlib.nullcontext(),
        "device": lambda device: contextlib.nullcontext(),
        "graph": lambda graph, pool, stream, capture_error_mode: graph,
        "is_current_stream_capturing": lambda: Recording.active > 0,
    }
    for name, imitation in imitations.items():
        monkeypatch.setattr(torch.cuda, name, imitation)
    for module in (errors, rounding, recorder, replay):
        monkeypatch.setattr(module, "on_gpu", lambda t: True)
