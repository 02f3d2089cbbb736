"""Every option of every objective has a meaning, and the page of the docs is that of the code."""

import inspect
from pathlib import Path

from pyxai_bounds.train.objectives import OBJECTIVES, TERMS
from pyxai_bounds.train.objectives.options import MEANINGS, markdown, options

PAGE = Path(__file__).parents[2] / "docs" / "objectives.md"


def test_the_page_is_that_of_the_objectives():
    again = "write it anew: python -m pyxai_bounds.train.objectives.options > docs/objectives.md"
    assert PAGE.read_text(encoding="utf-8") == markdown(), again


def test_every_option_has_a_meaning_and_no_meaning_is_left_over():
    used = set()
    for name, function in (OBJECTIVES | TERMS).items():
        found = options(name)
        assert list(found) == list(inspect.signature(function).parameters)[5:]
        used |= {key if (key := f"{name} {option}") in MEANINGS else option for option in found}
    assert used == MEANINGS.keys()
    assert options("rec")["width"] != options("separated-topk")["width"]
