"""Data sets by name: sizes, splits that are the same everywhere, no test row in the scaler, one's own."""

import dataclasses
import sys
import types

import pytest
import torch

from pyxai_bounds import data


@pytest.mark.parametrize("name", data.EMBEDDED)
def test_shapes_dtypes_and_names(name):
    d = data.load(name)
    assert d.name == name
    assert d.train_x.dtype == d.test_x.dtype == torch.float32
    assert d.train_y.dtype == d.test_y.dtype == torch.int64
    assert len(d.train_x) == len(d.train_y) and len(d.test_x) == len(d.test_y)
    assert d.input_shape == tuple(d.train_x.shape[1:]) == tuple(d.test_x.shape[1:])
    assert set(d.train_y.tolist()) == set(range(d.classes)) and len(d.class_names) == d.classes
    assert len(d.feature_names) == d.train_x[0].numel()
    assert d.train_x.isfinite().all() and d.test_x.isfinite().all()
    if d.clip is not None:
        low, high = d.clip
        assert low <= min(d.train_x.min(), d.test_x.min()) and max(d.train_x.max(), d.test_x.max()) <= high


@pytest.mark.parametrize(
    ("name", "train", "test"),
    [("digits", 1400, 397), ("digits-parity", 1400, 397), ("breast-cancer", 444, 125), ("wine", 139, 39)],
)
def test_the_split_covers_everything_once(name, train, test):
    d = data.load(name)
    assert (len(d.train_x), len(d.test_x)) == (train, test)


def test_digits_are_the_seed_0_permutation():
    from sklearn.datasets import load_digits

    raw = load_digits()
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    d = data.load("digits")
    assert torch.equal(torch.cat((d.train_y, d.test_y)), torch.from_numpy(raw.target)[order])
    images = torch.from_numpy(raw.images).float().unsqueeze(1)[order] / 16
    assert torch.equal(torch.cat((d.train_x, d.test_x)), images)
    assert d.image_shape == (1, 8, 8)


def test_parity_is_the_same_images_with_other_labels():
    digits, parity = data.load("digits"), data.load("digits-parity")
    assert torch.equal(digits.test_x, parity.test_x) and torch.equal(digits.train_x, parity.train_x)
    assert torch.equal(digits.test_y % 2, parity.test_y) and parity.class_names == ("even", "odd")


@pytest.mark.parametrize("name", ["breast-cancer", "wine"])
def test_the_scaler_saw_the_training_rows_alone(name):
    d = data.load(name)
    columns = d.train_x.double()
    torch.testing.assert_close(columns.mean(0), torch.zeros(columns.shape[1], dtype=torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        columns.std(0, unbiased=False), torch.ones(columns.shape[1], dtype=torch.float64), atol=1e-5, rtol=0
    )
    assert d.test_x.mean(0).abs().max() > 0.02  # it would be 0 if the test rows had been scaled by themselves
    together = torch.cat((d.train_x, d.test_x)).double()
    assert together.mean(0).abs().max() > 1e-3  # and this if all rows had been scaled together


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"no data set 'mnst'.*digits, digits-parity, breast-cancer, wine.*:factory"):
        data.load("mnst")


@pytest.mark.parametrize("name", sorted(data.DATASETS.keys() - data.EMBEDDED.keys()))
def test_a_missing_data_set_says_where_it_was_looked_for_and_how_to_get_it(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    message = rf"{name} is not here: looked for .* in {tmp_path}.*To get it: .+--data-root FOLDER.*PYXAI_BOUNDS_DATA"
    with pytest.raises(FileNotFoundError, match=message):
        data.load(name, tmp_path)
    monkeypatch.setenv(data.ROOT_VARIABLE, str(tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError, match=f"in {tmp_path}/elsewhere"):
        data.load(name)
    monkeypatch.delenv(data.ROOT_VARIABLE)
    with pytest.raises(FileNotFoundError, match=f"in {tmp_path}/home/.cache/pyxai_bounds"):
        data.load(name)


@pytest.fixture
def own(monkeypatch):
    module = types.ModuleType("own_data")
    module.wine = lambda: dataclasses.replace(data.load("wine"), name="mine")
    module.number = lambda: 3
    monkeypatch.setitem(sys.modules, "own_data", module)


def test_ones_own_factory(own):
    assert data.load("own_data:wine").name == "mine"


@pytest.mark.parametrize(
    ("name", "message"),
    [("own_data:number", "gave int; a data factory returns"), ("own_data:absent", "cannot be imported")],
)
def test_a_bad_factory_says_what_is_wrong(own, name, message):
    with pytest.raises(ValueError, match=message):
        data.load(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_y": torch.zeros(3, dtype=torch.int64)}, "139 samples and 3 labels"),
        ({"classes": 2}, "labels go from 0 to 2, but there are 2 classes"),
        ({"test_x": torch.zeros(39, 4)}, r"training sample has shape \[13\], a test sample \[4\]"),
        ({"test_x": torch.full((39, 13), torch.nan)}, "NaN"),
        ({"test_x": torch.zeros(39, 13, dtype=torch.int64)}, "must be floating point"),
        ({"clip": (0.0, 1.0)}, "outside of clip"),
    ],
)
def test_parts_that_do_not_fit_together(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(data.load("wine"), **change)


def test_without_scikit_learn_the_error_names_the_extra(monkeypatch):
    for module in [name for name in sys.modules if name.split(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ModuleNotFoundError, match=r"pyxai-bounds\[train\]"):
        data.load("wine")
