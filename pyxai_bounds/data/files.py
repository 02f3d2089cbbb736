"""Where files of data are looked for, and what is said when they are missing or damaged. Nothing is ever downloaded."""

from __future__ import annotations

import gzip
import importlib.util
import os
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

ROOT_VARIABLE = "PYXAI_BOUNDS_DATA"


def data_root(root: str | Path | None = None) -> Path:
    """The folder that data sets are kept in: ``root``, else $PYXAI_BOUNDS_DATA, else ~/.cache/pyxai_bounds."""
    chosen = root or os.environ.get(ROOT_VARIABLE) or Path("~/.cache/pyxai_bounds")
    return Path(chosen).expanduser()


def find(folders: Sequence[Path], names: Iterable[str]) -> list[Path] | None:
    """All files of these names from the first folder that has every one of them, each plain or with .gz, or None."""
    names = list(names)
    for folder in folders:
        found = [next((p for p in (folder / n, folder / f"{n}.gz") if p.is_file()), None) for n in names]
        if all(found):
            return [path for path in found if path is not None]
    return None


def missing(name: str, wanted: str, folders: Sequence[Path], how: str) -> NoReturn:
    """Say which files were looked for, where, and how to get them."""
    places = ", ".join(dict.fromkeys(str(folder) for folder in folders))
    raise FileNotFoundError(
        f"The data set {name} is not here: looked for {wanted} in {places}. To get it: {how}. "
        f"Data kept elsewhere: --data-root FOLDER, or {ROOT_VARIABLE}=FOLDER."
    )


def damaged(path: Path, why: str) -> ValueError:
    """The error for a file that is not what its format says."""
    return ValueError(f"{path} is damaged: {why}. Fetch it again.")


def read(path: Path) -> bytes:
    """A file's content, unpacked if its name ends in .gz. Raises ValueError where the packing is damaged."""
    content = path.read_bytes()
    if path.suffix != ".gz":
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, OSError, zlib.error) as error:
        raise damaged(path, f"it cannot be unpacked ({error})") from error


def read_text(path: Path) -> str:
    """A text file's content, unpacked if its name ends in .gz. Raises ValueError if it is no text."""
    try:
        return read(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise damaged(path, f"it is not UTF-8 text ({error.reason} at byte {error.start})") from error


def with_library(library: str, code: str, otherwise: str) -> str:
    """How to get something: by ``code`` where the library is installed, else from a place on the web."""
    if importlib.util.find_spec(library) is not None:
        return f'python -c "{code}"'
    return otherwise
