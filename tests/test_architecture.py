"""The imports go one way, the documented examples run, and the package stays light to import."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pyxai_bounds"

# Each part may import from the parts before it, and from its own.
ORDER = [
    ["kernels", "_native"],
    ["errors"],
    ["rounding"],
    ["interval", "data", "models", "identity"],
    ["ops", "parameters"],
    ["rules"],
    ["decompose", "tracer"],
    ["watch"],
    ["capture"],
    ["fuse"],
    ["memory"],
    ["chain"],
    ["recompute"],
    ["recorder"],
    ["patterns"],
    ["interpreter"],
    ["widths"],
    ["program"],
    ["explain"],
    ["certify"],
    ["attack"],
    ["train"],
    ["report"],
    ["cli"],
    ["__main__"],
]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("pyxai_bounds"):
            names = node.module.split(".")[1:2] or [alias.name for alias in node.names]
            found.update(names)
        elif isinstance(node, ast.Import):
            found.update(a.name.split(".")[1] for a in node.names if a.name.startswith("pyxai_bounds."))
    return found


def test_imports_go_one_way() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        part = part_of(path)
        if part == "__init__":
            continue
        assert part in RANK, f"{path}: give '{part}' a place in the order"
        for other in imported_parts(path) & RANK.keys():
            assert RANK[other] < RANK[part] or other == part, f"{path.relative_to(ROOT)} imports {other}"


def test_make_fx_is_imported_in_one_place() -> None:
    users = [
        path.name
        for path in PACKAGE.rglob("*.py")
        if "make_fx" in re.sub(r'""".*?"""|#.*', "", path.read_text(), flags=re.S)
    ]
    assert users == ["capture.py"]


def test_types_are_shipped() -> None:
    assert (ROOT / "pyxai_bounds" / "py.typed").read_bytes() == b""


def test_csrc_needs_no_torch() -> None:
    for path in (ROOT / "csrc").rglob("*.[ch]*"):
        assert not re.search(r"#include *[<\"](torch|ATen|c10)", path.read_text()), path


@pytest.mark.filterwarnings("ignore:Input Tensor . did not already require gradients")
def test_the_readmes_examples_run() -> None:
    """The Python blocks of the README, one after the other in one session, as a reader would type them."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    assert len(blocks) >= 4
    session: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), session)
    assert session["bounds"].shape == session["x"].shape


@pytest.mark.parametrize(
    "name, shorter",
    [
        (
            "own-loop",
            {"seed = 40, 5,": "seed = 16, 3,", "data.test_x": "data.test_x[:100]", "data.test_y": "data.test_y[:100]"},
        ),
        ("tables", {}),
        ("guide", {"test_x[:100], data.test_y[:100]": "test_x[:20], data.test_y[:20]", "rand(200": "rand(20"}),
    ],
)
def test_the_examples_of_the_guides_run(name: str, shorter: dict[str, str], one_thread: None) -> None:
    """As they stand, but for what only takes longer there. (Networks this small lose more to waking threads than they
    gain.)
    """
    text, session = (ROOT / "docs" / f"{name}.md").read_text(), {}
    for written, run in shorter.items():
        assert written in text
        text = text.replace(written, run)
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.S):
        exec(compile(block, f"docs/{name}.md", "exec"), session)
    assert session["certificate"].fraction > 0.2


@pytest.mark.filterwarnings("ignore:Input Tensor . did not already require gradients")
def test_the_training_steps_of_the_gpu_guide_run(one_thread: None) -> None:
    """As they stand; without a GPU nothing is recorded."""
    session: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "gpu.md").read_text(), flags=re.S)
    exec(compile(blocks[0], "docs/gpu.md", "exec"), session)
    assert session["value"] < 0.9 and session["eps"].item() == pytest.approx(0.01)
    session["model"].zero_grad()
    exec(compile(blocks[1], "docs/gpu.md", "exec"), session)
    assert all(bool(p.grad.any()) for p in session["model"].parameters()) and len(blocks) == 2


def test_importing_the_package_is_cheap() -> None:
    """All of it but the command line, whose libraries may be missing."""
    heavy = ("tyro", "rich", "matplotlib", "sklearn", "safetensors", "captum", "triton")
    code = "import sys, pyxai_bounds.kernels, pyxai_bounds.train, pyxai_bounds.report; "
    code += f"print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"
