"""Image data sets from the files that their authors publish; also in the folders that torchvision and medmnist use."""

from __future__ import annotations

import csv
import io
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyxai_bounds.data.dataset import Dataset, split
from pyxai_bounds.data.files import damaged, find, missing, read, read_text, with_library

Part = tuple[Tensor, Tensor]  # images [N, C, H, W] uint8, labels [N] int64


def _dataset(name: str, train: Part, test: Part, class_names: Sequence[str]) -> Dataset:
    """Pixels in [0, 1]; feature names are c.row.column."""
    channels, height, width = train[0].shape[1:]
    names = (f"{c}.{i}.{j}" for c in range(channels) for i in range(height) for j in range(width))
    return Dataset(
        name=name,
        train_x=train[0].float() / 255, train_y=train[1], test_x=test[0].float() / 255, test_y=test[1],
        classes=len(class_names), clip=(0.0, 1.0), image_shape=(channels, height, width),
        feature_names=tuple(names), class_names=tuple(class_names),
    )  # fmt: skip


# --- MNIST and Fashion-MNIST: IDX files ------------------------------------------------------------------------


class _Idx(NamedTuple):
    folder: str  # torchvision's name of the folder
    class_names: tuple[str, ...]
    source: str


_IDX = {
    "mnist": _Idx("MNIST", tuple(str(digit) for digit in range(10)), "https://ossci-datasets.s3.amazonaws.com/mnist/"),
    "fashion-mnist": _Idx(
        "FashionMNIST",
        ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"),
        "https://github.com/zalandoresearch/fashion-mnist",
    ),
}


def load_idx(name: str, root: Path) -> Dataset:
    """MNIST or Fashion-MNIST: 60,000 + 10,000 images 1×28×28, four IDX files, plain or gzipped."""
    kind = _IDX[name]
    folders = [root / name, root / kind.folder / "raw", root / kind.folder]
    files = [f"{part}-{what}" for part in ("train", "t10k") for what in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    paths = find(folders, files)
    if paths is None:
        code = f"from torchvision.datasets import {kind.folder}; {kind.folder}('{root}', download=True)"
        how = with_library("torchvision", code, f"put the four files of {kind.source} into {folders[0]}")
        missing(name, ", ".join(files) + " (each plain or .gz)", folders, how)
    arrays = [read_idx(path) for path in paths]
    for path, array, dimensions in zip(paths, arrays, (3, 1, 3, 1), strict=True):
        if array.ndim != dimensions:
            raise damaged(path, f"it has {array.ndim} dimensions instead of {dimensions}")
    return _dataset(name, _grey(*arrays[:2]), _grey(*arrays[2:]), kind.class_names)


def read_idx(path: Path) -> np.ndarray:
    """An IDX file of bytes, plain or .gz, as a uint8 array. Raises ValueError for anything else.

    Format: two zero bytes, 8 for "unsigned byte", the number of dimensions, each dimension as a big-endian uint32,
    then the data.
    """
    content = read(path)
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise damaged(path, f"it begins with {content[:4].hex(' ') or 'nothing'} instead of 00 00 08, as IDX bytes do")
    dimensions = content[3]
    start = 4 + 4 * dimensions
    if len(content) < start:
        raise damaged(path, "it ends within its header")
    shape = struct.unpack(f">{dimensions}I", content[4:start])
    expected = int(np.prod(shape, dtype=np.int64))
    if len(content) - start != expected:
        raise damaged(path, f"its header promises {expected} bytes of data, but {len(content) - start} follow")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _grey(images: np.ndarray, labels: np.ndarray) -> Part:
    return torch.from_numpy(images.copy()).unsqueeze(1), torch.from_numpy(labels.astype(np.int64))


# --- CIFAR-10: binary or pickled batches -------------------------------------------------------------------------

_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR10_ROW = 3 * 32 * 32


def load_cifar10(name: str, root: Path) -> Dataset:
    """CIFAR-10: 50,000 + 10,000 images 3×32×32, from the binary or the python version of its authors' archive."""
    readers: list[tuple[str, str, Callable[[Path], tuple[np.ndarray, np.ndarray]]]] = [
        ("cifar-10-batches-bin", ".bin", _read_cifar10_binary),
        ("cifar-10-batches-py", "", _read_cifar10_pickle),
    ]
    folders = []
    for folder, suffix, reader in readers:
        folders += (places := [root / name / folder, root / folder])
        paths = find(places, [*(f"data_batch_{i}{suffix}" for i in range(1, 6)), f"test_batch{suffix}"])
        if paths is not None:
            parts = [reader(path) for path in paths]
            train = tuple(np.concatenate(arrays) for arrays in zip(*parts[:5], strict=True))
            return _dataset(name, _coloured(*train), _coloured(*parts[5]), _CIFAR10)
    code = f"from torchvision.datasets import CIFAR10; CIFAR10('{root}', download=True)"
    how = with_library(
        "torchvision", code, f"unpack the binary version of https://www.cs.toronto.edu/~kriz/cifar.html in {root}"
    )
    missing(name, "data_batch_1 to 5 and test_batch, with .bin or pickled", folders, how)


def _coloured(pixels: np.ndarray, labels: np.ndarray) -> Part:
    return torch.from_numpy(pixels.reshape(-1, 3, 32, 32).copy()), torch.from_numpy(labels.astype(np.int64))


def _read_cifar10_binary(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Rows of one label and 3072 pixels, all bytes."""
    content = np.frombuffer(read(path), np.uint8)
    if content.size == 0 or content.size % (1 + _CIFAR10_ROW):
        raise damaged(path, f"its {content.size} bytes are no whole number of rows of {1 + _CIFAR10_ROW}")
    rows = content.reshape(-1, 1 + _CIFAR10_ROW)
    return rows[:, 1:], _checked_labels(path, rows[:, 0])


def _read_cifar10_pickle(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        batch = _BytesAndArrays(io.BytesIO(read(path)), encoding="bytes").load()
        pixels, labels = batch[b"data"], batch[b"labels"]
    except Exception as error:  # a damaged pickle can raise anything
        raise damaged(path, f"it is no pickled CIFAR-10 batch ({type(error).__name__}: {error})") from error
    if not isinstance(pixels, _Array) or pixels.value is None or pixels.value.shape != (len(labels), _CIFAR10_ROW):
        raise damaged(path, "its data is no array of one row of 3072 bytes per label")
    return pixels.value, _checked_labels(path, np.array(labels, dtype=np.int64))


def _checked_labels(path: Path, labels: np.ndarray) -> np.ndarray:
    if labels.size and (labels.min() < 0 or labels.max() > 9):
        raise damaged(path, f"it has the label {labels.max()}, but CIFAR-10 has classes 0 to 9")
    return labels


class _Array:
    """Stands in for numpy's array while unpickling: takes bytes and nothing else."""

    value: np.ndarray | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, content = state
        if not isinstance(dtype, _Bytes) or not isinstance(content, bytes):
            raise pickle.UnpicklingError("an array of something else than unsigned bytes")
        self.value = np.frombuffer(content, np.uint8).reshape(shape, order="F" if fortran else "C")


class _Bytes:
    """Stands in for numpy's dtype: only that of unsigned bytes."""

    def __init__(self, kind: str | bytes, *_: Any) -> None:
        if kind not in ("u1", b"u1"):
            raise pickle.UnpicklingError(f"an array of {kind!r}")

    def __setstate__(self, _: tuple[Any, ...]) -> None:
        pass


class _BytesAndArrays(pickle.Unpickler):
    """Reads what a CIFAR-10 batch holds, and can build nothing else: a pickle may otherwise run any program."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return lambda *_: _Array()
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return {"ndarray": _Array, "dtype": _Bytes}[name]
        if (module, name) == ("_codecs", "encode"):
            return lambda text, _: text.encode("latin1")
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


# --- folders of pictures ---------------------------------------------------------------------------------------------

PICTURES = (".ppm", ".png", ".jpg", ".jpeg", ".bmp")
GTSRB_SIZE = 32
FLOWER_SIZE = 128
FLOWERS = (
    "daffodil", "snowdrop", "lily of the valley", "bluebell", "crocus", "iris", "tiger lily", "tulip", "fritillary",
    "sunflower", "daisy", "colts' foot", "dandelion", "cowslip", "buttercup", "windflower", "pansy",
)  # fmt: skip


def load_gtsrb(name: str, root: Path) -> Dataset:
    """German traffic signs: 43 classes, scaled to 3×32×32; the test labels from GT-final_test.csv.

    Folders: the official archives (Final_Training/Images/00000 …, Final_Test/Images), torchvision's, or train/<class>
    and test/<class>.
    """
    places = [root / name, root / "GTSRB", root / "gtsrb" / "GTSRB", root / "gtsrb"]
    for folder in places:
        if both := _train_and_test(folder, name, GTSRB_SIZE):
            return both
        train = next((p for p in (folder / "Final_Training" / "Images", folder / "Training") if p.is_dir()), None)
        test = folder / "Final_Test" / "Images"
        tables = [folder.parent / "GT-final_test.csv", folder / "GT-final_test.csv", test / "GT-final_test.csv"]
        table = next((p for p in tables if p.is_file()), None)
        if train is not None and test.is_dir() and table is not None:
            classes = _class_folders(train)
            label_of = {str(int(f.name)): i for i, f in enumerate(classes) if f.name.isdigit()}
            samples = []
            for row in csv.DictReader(io.StringIO(read_text(table)), delimiter=";"):
                if row.get("Filename") is None or row.get("ClassId") not in label_of:
                    raise damaged(table, f"a row is {row}; it needs Filename and a ClassId that {train} has")
                samples.append((test / row["Filename"], label_of[row["ClassId"]]))
            names = [str(int(f.name)) if f.name.isdigit() else f.name for f in classes]
            return _dataset(name, _pictures(_by_folder(classes), GTSRB_SIZE), _pictures(samples, GTSRB_SIZE), names)
    code = f"from torchvision.datasets import GTSRB; [GTSRB('{root}', s, download=True) for s in ('train', 'test')]"
    how = with_library(
        "torchvision", code,
        "unpack GTSRB_Final_Training_Images.zip, GTSRB_Final_Test_Images.zip and GTSRB_Final_Test_GT.zip of "
        f"https://benchmark.ini.rub.de/gtsrb_dataset.html in {root}",
    )  # fmt: skip
    wanted = "Final_Training/Images, Final_Test/Images and GT-final_test.csv, or train/<class> and test/<class>"
    missing(name, wanted, places, how)


def load_flower(name: str, root: Path) -> Dataset:
    """Flower-17: 80 pictures of each of 17 kinds, scaled to 3×128×128.

    Folders: the authors' (jpg/image_0001.jpg …, 80 of each kind in a row; a seed-0 permutation leaves 8 of each for
    testing, as many as the RAR paper's code leaves), or train/<class> and test/<class>.
    """
    places = [root / name, root / "17flowers", root]
    for folder in places:
        if folder != root and (both := _train_and_test(folder, name, FLOWER_SIZE)):
            return both
        pictures = sorted((folder / "jpg").glob("image_*.jpg"))
        if pictures:
            per_class, rest = divmod(len(pictures), len(FLOWERS))
            if rest or per_class < 2:
                raise ValueError(
                    f"{folder / 'jpg'} holds {len(pictures)} pictures, which are not equally many of each of the "
                    f"{len(FLOWERS)} kinds: unpack 17flowers.tgz again."
                )
            train, test = split(per_class, per_class - max(1, per_class // 10))
            kinds = [pictures[i * per_class : (i + 1) * per_class] for i in range(len(FLOWERS))]
            parts = [[(kind[j], i) for i, kind in enumerate(kinds) for j in part.tolist()] for part in (train, test)]
            return _dataset(name, _pictures(parts[0], FLOWER_SIZE), _pictures(parts[1], FLOWER_SIZE), FLOWERS)
    how = f"unpack 17flowers.tgz of https://www.robots.ox.ac.uk/~vgg/data/flowers/17/ in {places[0]}"
    missing(name, "jpg/image_0001.jpg …, or train/<class> and test/<class>", places, how)


def _train_and_test(folder: Path, name: str, size: int) -> Dataset | None:
    """The folders train and test with one folder per class in each, or None."""
    if not (folder / "train").is_dir() or not (folder / "test").is_dir():
        return None
    train, test = _class_folders(folder / "train"), _class_folders(folder / "test")
    names = [f.name for f in train]
    if [f.name for f in test] != names:
        raise ValueError(f"{folder}: train has the classes {names}, test {[f.name for f in test]}; give both the same.")
    return _dataset(name, _pictures(_by_folder(train), size), _pictures(_by_folder(test), size), names)


def _class_folders(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.is_dir())


def _by_folder(classes: Sequence[Path]) -> list[tuple[Path, int]]:
    return [
        (path, label)
        for label, folder in enumerate(classes)
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in PICTURES
    ]


def _pictures(samples: Iterable[tuple[Path, int]], size: int) -> Part:
    """RGB pictures, scaled to size × size. Raises ValueError for one that cannot be read."""
    image = _pillow()
    arrays, labels = [], []
    for path, label in samples:
        try:
            with image.open(path) as picture:
                scaled = picture.convert("RGB").resize((size, size), image.Resampling.BILINEAR)
                arrays.append(np.asarray(scaled, dtype=np.uint8))
        except FileNotFoundError:
            raise
        except (OSError, ValueError, SyntaxError) as error:
            raise damaged(path, f"it is no readable picture ({error})") from error
        labels.append(label)
    stacked = np.stack(arrays) if arrays else np.zeros((0, size, size, 3), np.uint8)
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels, dtype=torch.int64)


def _pillow() -> Any:
    try:
        import PIL.Image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Pictures are read by Pillow, which is not installed: pip install pillow.") from error
    return PIL.Image


# --- MedMNIST: .npz archives ----------------------------------------------------------------------------------------

MEDMNIST = {
    "pathmnist": 9, "dermamnist": 7, "octmnist": 4, "pneumoniamnist": 2, "retinamnist": 5, "breastmnist": 2,
    "bloodmnist": 8, "tissuemnist": 8, "organamnist": 11, "organcmnist": 11, "organsmnist": 11,
}  # fmt: skip


def load_medmnist(name: str, root: Path) -> Dataset:
    """A two-dimensional, single-label MedMNIST set from its .npz, also where the medmnist package keeps it.

    Its own train and test parts; its validation part is left unread.
    """
    folders = [root / "medmnist", root, Path("~/.medmnist").expanduser()]
    paths = find(folders, [f"{name}.npz"])
    if paths is None:
        code = f"import medmnist; medmnist.{_medmnist_class(name)}(split='train', download=True)"
        how = with_library("medmnist", code, f"put {name}.npz of https://medmnist.com into {folders[0]}")
        missing(name, f"{name}.npz", folders, how)
    (path,) = paths
    parts = []
    try:
        with np.load(io.BytesIO(read(path)), allow_pickle=False) as archive:
            for part in ("train", "test"):
                parts.append((archive[f"{part}_images"], archive[f"{part}_labels"]))
    except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise damaged(path, f"it is no MedMNIST archive ({type(error).__name__}: {error})") from error
    train, test = (_medmnist_part(path, *part) for part in parts)
    return _dataset(name, train, test, [str(i) for i in range(MEDMNIST[name])])


def _medmnist_part(path: Path, images: np.ndarray, labels: np.ndarray) -> Part:
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[3:] not in ((), (3,)):
        raise damaged(path, f"its images are {images.dtype} {list(images.shape)}, not bytes [N, H, W] or [N, H, W, 3]")
    if labels.size != len(labels) or labels.dtype.kind not in "iu":
        raise damaged(path, f"its labels are {labels.dtype} {list(labels.shape)}, not one class number per image")
    pixels = torch.from_numpy(images)
    pixels = pixels.unsqueeze(1) if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2).contiguous()
    return pixels, torch.from_numpy(labels.reshape(-1).astype(np.int64))


def _medmnist_class(name: str) -> str:
    stem = name.removesuffix("mnist")
    if stem.startswith("organ"):
        return f"Organ{stem[-1].upper()}MNIST"
    return f"{stem.upper() if stem == 'oct' else stem.capitalize()}MNIST"
