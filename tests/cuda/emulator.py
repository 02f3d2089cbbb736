"""The kernels of csrc/cuda compiled as C++, and called as pyxai_bounds._native calls them: numbers without a GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = Path(__file__).parents[2] / "csrc"
FLAGS = ["-std=c++17", "-O2", "-ffp-contract=off", "-frounding-math", "-fno-strict-aliasing", "-w", "-fPIC", "-shared"]


def compiler() -> str | None:
    return shutil.which("c++") if SOURCES.is_dir() else None


class Emulator:
    """``cuda_<name>(...)`` for integers and floats; raises RuntimeError as the bindings do."""

    def __init__(self, folder: Path) -> None:
        library = folder / "emulated.so"
        files = sorted([*(SOURCES / "cuda").glob("*.cu"), *(SOURCES / "hopper").glob("*.cu")])
        sources = [arg for source in files for arg in ("-x", "c++", str(source))]
        command = ["c++", *FLAGS, f"-I{HERE}", f"-I{SOURCES / 'include'}", *sources, "-o", str(library)]
        subprocess.run(command, check=True)
        self._library = ctypes.CDLL(str(library))

    def __getattr__(self, name: str) -> Callable[..., None]:
        function = getattr(self._library, name)
        function.restype = ctypes.c_char_p

        def call(*args: int | float) -> None:
            wrong = function(*(ctypes.c_double(x) if isinstance(x, float) else ctypes.c_int64(x) for x in args))
            if wrong is not None:
                raise RuntimeError(wrong.decode())

        return call
