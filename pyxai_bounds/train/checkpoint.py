"""Runs on disk: finished ones, and checkpoints of one that is under way. Tensors are safetensors, the rest is JSON.

A finished run is run.json and the weights that it names; replacing run.json, one atomic step, is what makes a new run
visible. A checkpoint, likewise, is a JSON file and the tensors that it names. Every name carries the hash of its
content, so that an interrupted write leaves the old state whole, and damage is noticed. Nothing here is a pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from pyxai_bounds import models

FORMAT = 1


def save(model: nn.Module, run_dir: str | Path, **description: Any) -> None:
    """Write the weights and a description, which must be JSON, into ``run_dir``; an earlier run there is replaced.

    ``load`` needs recipe (with "model", a name for ``models.build``), input_shape and classes in the description.
    """
    folder = Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    weights, digest = _write_tensors(folder, "model", model.state_dict())
    description = {"format": FORMAT, "weights": weights, "sha256": digest, **description}
    write_file(folder / "run.json", (json.dumps(description, indent=2) + "\n").encode())
    for stale in folder.glob("model-*.safetensors"):
        if stale.name != weights:
            stale.unlink()


def load(run_dir: str | Path) -> nn.Module:
    """The model that ``pyxai-bounds train --out run_dir`` wrote, on the CPU, in evaluation mode.

    A run of a model named ``package.module:factory`` imports that module: load such runs only from people you trust.
    Raises FileNotFoundError where there is no run, ValueError for one that is damaged.
    """
    description = read_description(run_dir)
    path = Path(run_dir) / description["weights"]
    tensors = _read_tensors(path, description["sha256"], "run.json")
    with torch.random.fork_rng():  # building draws initial weights; the caller's generator must not notice
        model = models.build(description["recipe"]["model"], tuple(description["input_shape"]), description["classes"])
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit the model {description['recipe']['model']!r}: {error}") from error
    return model.eval()


def read_description(run_dir: str | Path) -> dict[str, Any]:
    """What run.json says of a run. Raises FileNotFoundError without one, ValueError if it is damaged."""
    path = Path(run_dir) / "run.json"
    if not path.is_file():
        if any(path.parent.glob("checkpoint-*.json")):
            raise FileNotFoundError(
                f"The run in {run_dir} is not finished: go on with pyxai-bounds train --resume --out {run_dir}."
            )
        raise FileNotFoundError(f"{run_dir} is not a run: it has no run.json. Make one with pyxai-bounds train --out.")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        version = description["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}. Train again.") from error
    if version != FORMAT:
        raise ValueError(f"{path} has format {version!r}; this version of pyxai_bounds reads format {FORMAT}.")
    needed = {"weights": str, "sha256": str, "recipe": dict, "input_shape": list, "classes": int}
    wrong = [key for key, kind in needed.items() if not isinstance(description.get(key), kind)]
    if wrong or not all(isinstance(description["recipe"].get(key), str) for key in ("data", "model")):
        raise ValueError(f"{path} is damaged: {', '.join(wrong) or 'recipe'} is missing or of the wrong type.")
    if Path(description["weights"]).name != description["weights"]:
        raise ValueError(f"{path} is damaged: its weights must lie beside it, not at {description['weights']!r}.")
    return description


# --- checkpoints ----------------------------------------------------------------------------------------------


def save_checkpoint(folder: str | Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write what a run needs to go on from ``step``; the one before it is kept, older ones are removed.

    ``state`` must be JSON.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"checkpoint-{step:010d}"
    name, digest = _write_tensors(folder, stem, tensors)
    content = json.dumps({"format": FORMAT, "tensors": name, "sha256": digest, "step": step, **state}).encode()
    description = folder / f"{stem}-{_short(content)}.json"
    write_file(description, content)
    kept = sorted({path.name[: len(stem)] for path in folder.glob("checkpoint-*.json")})[-2:]
    for path in folder.glob("checkpoint-*"):
        damaged = path.name.startswith(stem) and path.name not in (name, description.name)  # passed over before
        if damaged or path.name[: len(stem)] not in kept:
            path.unlink()


def load_checkpoint(folder: str | Path, tell: Callable[[str], None]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest checkpoint that is whole, as (tensors, state), or None where there is none at all.

    ``tell`` hears of each damaged one. Raises ValueError if all are damaged.
    """
    paths = sorted(Path(folder).glob("checkpoint-*.json"), reverse=True)
    for path in paths:
        try:
            content = path.read_bytes()
            if _short(content) != path.stem.rpartition("-")[2]:
                raise ValueError(f"{path} is damaged: its content does not have the hash that its name gives.")
            state: dict[str, Any] = json.loads(content)
            if state["format"] != FORMAT:
                raise ValueError(f"{path} has format {state['format']!r}; this version reads format {FORMAT}.")
            tensors = _read_tensors(path.with_name(state["tensors"]), state["sha256"], path.name)
        except (ValueError, OSError) as error:
            tell(f"{error} Going back to the checkpoint before it.")
            continue
        return tensors, state
    if paths:
        raise ValueError(f"All checkpoints in {folder} are damaged. Train again, without --resume.")
    return None


def clear_checkpoints(folder: str | Path) -> None:
    """Remove the checkpoints of a run that is finished or starts again, and what an interrupted write left."""
    for pattern in ("checkpoint-*", ".*.[0-9]*.tmp"):  # the latter as `write_file` names them
        for path in Path(folder).glob(pattern):
            path.unlink()


# --- files ------------------------------------------------------------------------------------------------------


def _write_tensors(folder: Path, stem: str, tensors: dict[str, Tensor]) -> tuple[str, str]:
    """Returns the file's name, which carries the beginning of its hash, and the whole hash."""
    # Copies, because tied weights share memory, which safetensors refuses.
    copies = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    content = _safetensors().save(copies)
    digest = hashlib.sha256(content).hexdigest()
    name = f"{stem}-{digest[:12]}.safetensors"
    write_file(folder / name, content)
    return name, digest


def _read_tensors(path: Path, digest: str, named_by: str) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing, although {named_by} names it: copy the whole folder, or train again."
        )
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != digest:
        raise ValueError(f"{path} is damaged: its content does not have the hash that {named_by} gives. Train again.")
    tensors: dict[str, Tensor] = _safetensors().load(content)
    return tensors


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def write_file(path: Path, content: bytes) -> None:
    """All of it or nothing: a reader never sees half a file. An OSError names it, whatever step failed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror or error}; it cannot be written", str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Raise OSError or ValueError, before there are results to lose, where no file ``path`` can be made; makes none."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise ValueError(f"{path} cannot be written: {folder} is a file, not a folder.")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror or error}; it cannot be written", str(path)) from error


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Runs are kept as safetensors, which is not installed: pip install 'pyxai-bounds[train]'."
        ) from error
    return safetensors.torch
