"""Runs on disk: weights as safetensors, and beside them run.json, which says what they are.

The weights carry their own hash in their name, and run.json names them: replacing run.json, one atomic step, is what
makes a new run visible. An interrupted write leaves the old run whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from pyxai_bounds import models

FORMAT = 1


def save(model: nn.Module, run_dir: str | Path, **description: Any) -> None:
    """Write the weights and a description, which must be JSON, into ``run_dir``; an earlier run there is replaced.

    ``load`` needs recipe (with "model", a name for ``models.build``), input_shape and classes in the description.
    """
    safetensors = _safetensors()
    folder = Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    content = safetensors.save(tensors)
    digest = hashlib.sha256(content).hexdigest()
    weights = f"model-{digest[:12]}.safetensors"
    description = {"format": FORMAT, "weights": weights, "sha256": digest, **description}
    _write(folder / weights, content)
    _write(folder / "run.json", (json.dumps(description, indent=2) + "\n").encode())
    for stale in folder.glob("model-*.safetensors"):
        if stale.name != weights:
            stale.unlink()


def load(run_dir: str | Path) -> nn.Module:
    """The model that ``pyxai-bounds train --out run_dir`` wrote, on the CPU, in evaluation mode.

    A run of a model named ``package.module:factory`` imports that module: load such runs only from people you trust.
    Raises FileNotFoundError where there is no run, ValueError for one that is damaged.
    """
    safetensors = _safetensors()
    description = read_description(run_dir)
    path = Path(run_dir) / description["weights"]
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing, although run.json names it: copy the whole folder, or train again."
        )
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != description["sha256"]:
        raise ValueError(f"{path} is damaged: its content does not have the hash that run.json gives. Train again.")
    with torch.random.fork_rng():  # building draws initial weights; the caller's generator must not notice
        model = models.build(description["recipe"]["model"], tuple(description["input_shape"]), description["classes"])
    try:
        model.load_state_dict(safetensors.load(content))
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit the model {description['recipe']['model']!r}: {error}") from error
    return model.eval()


def read_description(run_dir: str | Path) -> dict[str, Any]:
    """What run.json says of a run. Raises FileNotFoundError without one, ValueError if it is damaged."""
    path = Path(run_dir) / "run.json"
    if not path.is_file():
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


def _write(path: Path, content: bytes) -> None:
    """All of it or nothing: a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Runs are kept as safetensors, which is not installed: pip install 'pyxai-bounds[train]'."
        ) from error
    return safetensors.torch
