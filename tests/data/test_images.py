"""Image data sets, read from small files in the formats of their authors, which the tests write."""

import gzip
import pickle
import struct
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from pyxai_bounds import data
from pyxai_bounds.data import images

IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">I{array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()


def write_idx(folder, *, gz: bool = False) -> list[np.ndarray]:
    folder.mkdir(parents=True)
    labels = np.arange(12, dtype=np.uint8) % 10
    arrays = [pixels(12, 28, 28), labels, pixels(5, 28, 28) // 2, labels[:5]]
    for name, array in zip(IDX, arrays, strict=True):
        path = folder / (f"{name}.gz" if gz else name)
        path.write_bytes(gzip.compress(idx(array)) if gz else idx(array))
    return arrays


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("mnist", "mnist"),
        ("mnist", "MNIST/raw"),
        ("fashion-mnist", "FashionMNIST/raw"),
        ("fashion-mnist", "fashion-mnist"),
    ],
)
def test_idx_files(tmp_path, name, folder, gz):
    arrays = write_idx(tmp_path / folder, gz=gz)
    d = data.load(name, tmp_path)
    assert (d.classes, d.clip, d.image_shape) == (10, (0.0, 1.0), (1, 28, 28))
    for x, array in ((d.train_x, arrays[0]), (d.test_x, arrays[2])):
        assert torch.equal(x, torch.from_numpy(array).unsqueeze(1).float() / 255)
    assert d.train_y.tolist() == arrays[1].tolist() and d.test_y.tolist() == arrays[3].tolist()
    assert len(d.feature_names) == 784 and d.class_names[9] in ("9", "ankle boot")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b[:-1], "promises 9408 bytes of data, but 9407 follow"),
        (lambda b: b[:7], "ends within its header"),
        (lambda b: b"", "begins with nothing"),
        (lambda b: b"\x89PNG" + b, "instead of 00 00 08"),
        (lambda b: idx(np.zeros((2, 2), np.uint8)), "2 dimensions instead of 3"),
        (lambda b: idx(pixels(11, 28, 28)), "11 samples and 12 labels"),
    ],
)
def test_a_damaged_idx_file(tmp_path, change, message):
    write_idx(tmp_path / "mnist")
    path = tmp_path / "mnist" / IDX[0]
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        data.load("mnist", tmp_path)


def test_a_truncated_gzip_file(tmp_path):
    write_idx(tmp_path / "mnist", gz=True)
    path = tmp_path / "mnist" / f"{IDX[2]}.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte.gz is damaged: it cannot be unpacked"):
        data.load("mnist", tmp_path)


# --- CIFAR-10 -------------------------------------------------------------------------------------------------

BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def python2_pickle(rows: np.ndarray, labels: list[int]) -> bytes:
    """What Python 2 and numpy wrote: protocol 2, byte strings as SHORT_BINSTRING and BINSTRING."""

    def string(text: bytes) -> bytes:
        short = len(text) < 256
        return (b"U" + bytes([len(text)]) if short else b"T" + struct.pack("<i", len(text))) + text

    def integer(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    dtype = (
        b"cnumpy\ndtype\n(" + string(b"u1") + integer(0) + integer(1) + b"tR"
        + b"(" + integer(3) + string(b"|") + b"NNN" + integer(-1) + integer(-1) + integer(0) + b"tb"
    )  # fmt: skip
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(" + integer(0) + b"t" + string(b"b") + b"tR"
        + b"(" + integer(1) + b"(" + b"".join(map(integer, rows.shape)) + b"t" + dtype + b"I00\n"
        + string(rows.tobytes()) + b"tb"
    )  # fmt: skip
    return b"\x80\x02}(" + string(b"data") + array + string(b"labels") + b"](" + b"".join(map(integer, labels)) + b"eu."


def write_cifar10(folder, version: str) -> tuple[np.ndarray, np.ndarray]:
    """Three rows a batch."""
    folder.mkdir(parents=True)
    rows, labels = pixels(18, 3072), np.arange(18, dtype=np.uint8) % 10
    for i, name in enumerate(BATCHES):
        part, of = rows[3 * i : 3 * i + 3], labels[3 * i : 3 * i + 3]
        if version == "bin":
            (folder / f"{name}.bin").write_bytes(np.concatenate((of[:, None], part), 1).tobytes())
        elif version == "python 2":
            (folder / name).write_bytes(python2_pickle(part, of.tolist()))
        else:
            (folder / name).write_bytes(pickle.dumps({b"data": part, b"labels": of.tolist()}, protocol=2))
    return rows, labels


@pytest.mark.parametrize(
    ("folder", "version"),
    [
        ("cifar10/cifar-10-batches-bin", "bin"),
        ("cifar-10-batches-py", "python 2"),
        ("cifar-10-batches-py", "python 3"),
    ],
)
def test_cifar10(tmp_path, folder, version):
    rows, labels = write_cifar10(tmp_path / folder, version)
    d = data.load("cifar10", tmp_path)
    together = torch.cat((d.train_x, d.test_x))
    assert torch.equal(together, torch.from_numpy(rows).reshape(-1, 3, 32, 32).float() / 255)
    assert torch.cat((d.train_y, d.test_y)).tolist() == labels.tolist() and len(d.train_x) == 15
    assert d.class_names[:2] == ("airplane", "automobile")


def test_the_hand_written_pickle_is_one_that_numpy_reads():
    rows = pixels(2, 3072)
    batch = pickle.loads(python2_pickle(rows, [3, 4]), encoding="bytes")
    assert (batch[b"data"] == rows).all() and batch[b"labels"] == [3, 4]


def test_a_damaged_cifar10_batch(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    write_cifar10(folder, "bin")
    content = (folder / "data_batch_3.bin").read_bytes()
    (folder / "data_batch_3.bin").write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"data_batch_3.bin is damaged: its 9218 bytes are no whole number of rows"):
        data.load("cifar10", tmp_path)
    (folder / "data_batch_3.bin").write_bytes(b"\x0b" + content[1:])
    with pytest.raises(ValueError, match="has the label 11"):
        data.load("cifar10", tmp_path)


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('a pickle ran a program')",)


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps({b"data": Evil(), b"labels": [1]}),
        pickle.dumps({b"data": np.zeros((1, 3072), object), b"labels": [1]}, protocol=2),
        pickle.dumps({b"data": np.zeros((1, 3072)), b"labels": [1]}, protocol=2),
        pickle.dumps({b"data": np.zeros((1, 3071), np.uint8), b"labels": [1]}, protocol=2),
        pickle.dumps({b"labels": [1]}),
        b"",
        python2_pickle(pixels(3, 3072), [0, 1, 2])[:-40],
    ],
)
def test_a_pickle_that_is_no_batch_of_bytes_runs_nothing(tmp_path, content):
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar10(folder, "python 2")
    (folder / "data_batch_2").write_bytes(content)
    with pytest.raises(ValueError, match="data_batch_2 is damaged"):
        data.load("cifar10", tmp_path)


# --- folders of pictures -------------------------------------------------------------------------------------------


def picture(path, colour: tuple[int, int, int], size: tuple[int, int] = (9, 7)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def colours(x: torch.Tensor) -> list[tuple[int, ...]]:
    """Each picture is of one colour, which scaling must not change."""
    assert (x == x[:, :, :1, :1]).all()
    return [tuple(c) for c in (x[:, :, 0, 0] * 255).round().int().tolist()]


@pytest.mark.parametrize("layout", ["official", "torchvision", "folders"])
def test_gtsrb(tmp_path, layout):
    if layout == "folders":
        train = {"stop": tmp_path / "gtsrb/train/stop", "yield": tmp_path / "gtsrb/train/yield"}
        tests = [tmp_path / "gtsrb/test/yield/a.png", tmp_path / "gtsrb/test/stop/b.png"]
    else:
        base = tmp_path / ("gtsrb/GTSRB" if layout == "torchvision" else "GTSRB")
        folder = base / ("Training" if layout == "torchvision" else "Final_Training/Images")
        train = {"0": folder / "00000", "1": folder / "00001"}
        tests = [base / "Final_Test/Images/00000.ppm", base / "Final_Test/Images/00001.ppm"]
    for (_, folder), red in zip(train.items(), (10, 20), strict=True):
        picture(folder / "00000_00000.ppm", (red, 1, 2))
        picture(folder / "00000_00001.ppm", (red + 1, 1, 2), size=(40, 60))
        (folder / "GT-00000.csv").write_text("not a picture")
    picture(tests[0], (30, 3, 4))
    picture(tests[1], (40, 3, 4))
    if layout != "folders":
        table = tmp_path / "gtsrb" if layout == "torchvision" else base / "Final_Test/Images"
        (table / "GT-final_test.csv").write_text(
            "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n"
            "00000.ppm;9;7;0;0;9;7;1\n00001.ppm;9;7;0;0;9;7;0\n"
        )
    d = data.load("gtsrb", tmp_path)
    assert d.image_shape == (3, 32, 32) and d.class_names == tuple(train)
    assert colours(d.train_x) == [(10, 1, 2), (11, 1, 2), (20, 1, 2), (21, 1, 2)] and d.train_y.tolist() == [0, 0, 1, 1]
    assert dict(zip(colours(d.test_x), d.test_y.tolist(), strict=True)) == {(30, 3, 4): 1, (40, 3, 4): 0}


def test_flower_17_keeps_a_tenth_of_each_kind_for_testing(tmp_path):
    for i in range(17 * 10):
        picture(tmp_path / "17flowers/jpg" / f"image_{i + 1:04d}.jpg", (i, i, i))
    d = data.load("flower", tmp_path)
    assert d.image_shape == (3, 128, 128) and len(d.class_names) == 17
    assert d.train_y.bincount().tolist() == [9] * 17 and d.test_y.bincount().tolist() == [1] * 17
    grey = torch.cat((d.train_x, d.test_x)).mul(255).round()[:, 0, 0, 0].long()  # grey survives JPEG
    assert sorted(grey.tolist()) == list(range(170))
    assert torch.equal(grey // 10, torch.cat((d.train_y, d.test_y)))


def test_folders_that_do_not_fit(tmp_path):
    picture(tmp_path / "flower/train/tulip/a.png", (1, 2, 3))
    picture(tmp_path / "flower/test/rose/a.png", (1, 2, 3))
    with pytest.raises(ValueError, match=r"train has the classes \['tulip'\], test \['rose'\]"):
        data.load("flower", tmp_path)


def test_a_truncated_picture(tmp_path):
    for part in ("train", "test"):
        for kind in ("a", "b"):
            picture(tmp_path / "flower" / part / kind / "x.png", (1, 2, 3))
    path = tmp_path / "flower/train/b/x.png"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"b/x.png is damaged: it is no readable picture"):
        data.load("flower", tmp_path)


# --- MedMNIST -------------------------------------------------------------------------------------------------------


def write_medmnist(path, **changes: np.ndarray) -> dict[str, np.ndarray]:
    shape = (28, 28, 3) if path.stem == "bloodmnist" else (28, 28)
    arrays = {}
    for part, count in (("train", 6), ("val", 2), ("test", 3)):
        arrays[f"{part}_images"] = pixels(count, *shape)
        arrays[f"{part}_labels"] = (np.arange(count) % 2)[:, None]
    arrays |= changes
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return arrays


@pytest.mark.parametrize("name", ["pneumoniamnist", "bloodmnist"])
def test_medmnist(tmp_path, name, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    arrays = write_medmnist(tmp_path / "home/.medmnist" / f"{name}.npz")
    d = data.load(name, tmp_path)
    channels = 3 if name == "bloodmnist" else 1
    assert d.image_shape == (channels, 28, 28) and len(d.train_x) == 6 and len(d.test_x) == 3
    expected = torch.from_numpy(arrays["test_images"]).reshape(3, 28, 28, channels).permute(0, 3, 1, 2).float() / 255
    assert torch.equal(d.test_x, expected)
    assert d.train_y.tolist() == [0, 1, 0, 1, 0, 1] and d.classes == images.MEDMNIST[name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_images": None}, "no MedMNIST archive .KeyError"),
        ({"train_images": np.zeros((6, 28, 28))}, "float64"),
        ({"train_labels": np.zeros((6, 14), np.int64)}, "not one class number per image"),
        ({"train_labels": np.full((6, 1), 7)}, "labels go from 7 to 7, but there are 2 classes"),
        ({"train_labels": np.array([None] * 6)}, "no MedMNIST archive .ValueError"),  # object arrays are pickles
    ],
)
def test_an_archive_that_does_not_fit(tmp_path, changes, message):
    write_medmnist(tmp_path / "pneumoniamnist.npz", **changes)
    with pytest.raises(ValueError, match=message):
        data.load("pneumoniamnist", tmp_path)


def test_a_truncated_archive(tmp_path):
    path = tmp_path / "pneumoniamnist.npz"
    write_medmnist(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"pneumoniamnist.npz is damaged"):
        data.load("pneumoniamnist", tmp_path)
    path.write_bytes(b"not a zip file")
    with pytest.raises(ValueError, match=r"pneumoniamnist.npz is damaged"):
        data.load("pneumoniamnist", tmp_path)


# --- libraries that may be there ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "library", "code"),
    [
        ("mnist", "torchvision", "from torchvision.datasets import MNIST"),
        ("octmnist", "medmnist", "medmnist.OCTMNIST("),
        ("organamnist", "medmnist", "medmnist.OrganAMNIST("),
        ("credit", "openml", "get_dataset(42477)"),
    ],
)
def test_the_way_to_get_it_names_a_library_that_is_installed(tmp_path, monkeypatch, name, library, code):
    module = types.ModuleType(library)
    module.__spec__ = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, library, module)
    with pytest.raises(FileNotFoundError) as caught:
        data.load(name, tmp_path)
    assert 'python -c "' in str(caught.value) and code in str(caught.value)


def test_reading_needs_no_torchvision_medmnist_or_openml(tmp_path, monkeypatch):
    for library in ("torchvision", "medmnist", "openml"):
        monkeypatch.setitem(sys.modules, library, None)
    write_idx(tmp_path / "mnist")
    assert len(data.load("mnist", tmp_path).train_x) == 12
