"""The errors that are this package's own, and how values are looked at before an error is raised.

All other bad input is a ValueError or a TypeError.
"""

from __future__ import annotations

import torch
from torch import Tensor


class UnsupportedOperatorError(NotImplementedError):
    """The program uses operators that have no interval rule.

    ``operators`` lists each of them once per place in the user's code: ``(operator, source)``.
    """

    def __init__(self, operators: list[tuple[str, str]], reason: str = "has no interval rule") -> None:
        self.operators = operators
        lines = "\n".join(f"  {name}  at {source}" for name, source in operators)
        noun = "operator" if len(operators) == 1 else "operators"
        super().__init__(
            f"{len(operators)} {noun} of this program cannot be bounded (each {reason}):\n{lines}\n"
            "Rewrite these lines with supported operators, keep them off the path from the box to the "
            "result, or add a rule (see CONTRIBUTING.md, 'Add a rule')."
        )


class CaptureError(ValueError):
    """The function cannot be captured as a fixed program; the message says where and what to do."""


def capturing(t: Tensor) -> bool:
    """Is work on this tensor being recorded in a CUDA graph? Then the host cannot know any value."""
    return on_gpu(t) and torch.cuda.is_current_stream_capturing()


def on_gpu(t: Tensor) -> bool:
    return t.is_cuda


def any_wrong(wrong: Tensor, message: str) -> bool:
    """Is any element True? The caller then raises.

    While a CUDA graph is captured the answer is no, and the device itself looks, at every replay: where it finds one it
    prints ``message`` (at most 254 characters) and stops, which ends the process' use of that GPU.
    """
    if capturing(wrong):
        torch._assert_async(~wrong.any(), message)
        return False
    return bool(wrong.any())
