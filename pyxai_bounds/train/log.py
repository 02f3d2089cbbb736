"""What a run leaves to read: log.csv, one row per epoch, and TensorBoard's files where they are asked for."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pyxai_bounds.train.checkpoint import write_file


@dataclass(frozen=True)
class Epoch:
    """One epoch of training: its mean loss, eps, weight and lr of its last step, seconds since the beginning."""

    epoch: int
    step: int
    loss: float
    eps: float
    weight: float
    lr: float
    seconds: float
    validation_loss: float | None = None
    validation_accuracy: float | None = None


class Log:
    """Writes epochs into a folder. ``history`` are those of a run that continues: they replace what is there."""

    def __init__(self, folder: str | Path, history: Sequence[Epoch] = (), tensorboard: bool = False) -> None:
        self.path = Path(folder) / "log.csv"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_file(self.path, _csv([[f.name for f in fields(Epoch)], *map(_cells, history)]))
        self.writer = _tensorboard(folder, history) if tensorboard else None

    def write(self, epoch: Epoch) -> None:
        with self.path.open("ab") as file:
            file.write(_csv([_cells(epoch)]))
        if self.writer is not None:
            for name, value in asdict(epoch).items():
                if name not in ("epoch", "step") and value is not None:
                    self.writer.add_scalar(name, value, epoch.step)
            self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


def _cells(epoch: Epoch) -> list[Any]:
    return ["" if value is None else value for value in asdict(epoch).values()]


def _csv(rows: Sequence[Sequence[Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def _tensorboard(folder: str | Path, history: Sequence[Epoch]) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ModuleNotFoundError("--tensorboard needs TensorBoard: pip install tensorboard.") from error
    step = history[-1].step + 1 if history else 0
    return SummaryWriter(str(Path(folder) / "tensorboard"), purge_step=step)
