"""The errors that are this package's own; all other bad input is a ValueError or a TypeError."""

from __future__ import annotations


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
