"""Two processes started by torchrun, as a user would, give what one gives on the joint batch."""

import os
import subprocess
import sys

import pytest
import torch

from pyxai_bounds.train import Recipe, load, run

# Everything in float64. No batch norm and no dropout: their results depend on how samples are grouped.
OWN = """
import torch
from torch import nn
from pyxai_bounds import data

def network(shape, classes):
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, classes)
    ).double()

def normed(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, classes)).double()

def digits():
    raw = data.load("digits")
    return data.Dataset("own", raw.train_x[:200].double(), raw.train_y[:200], raw.test_x.double(), raw.test_y,
                        10, raw.clip, raw.image_shape, raw.feature_names, raw.class_names)
"""
FLAGS = ["--epochs", "4", "--natural-epochs", "1", "--batch-size", "40", "--validation", "0.1", "--eps", "0.01",
         "--weight-ramp", "linear", "--options", "alpha=0.1", "--clip-gradient", "0.5"]  # fmt: skip
RECIPE = Recipe(data="own_things:digits", epochs=4, natural_epochs=1, batch_size=40, validation=0.1, eps=0.01,
                weight_ramp="linear", options={"alpha": 0.1}, clip_gradient=0.5)  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch, one_thread):
    (tmp_path / "own_things.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_things", raising=False)
    return tmp_path


def torchrun(folder, *arguments: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               "-m", "pyxai_bounds", "train", "--data", "own_things:digits", *FLAGS, *arguments]  # fmt: skip
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_gloo_processes_equal_one_on_the_joint_batch(folder, accumulate):
    out = torchrun(folder, "--model", "own_things:network", "--accumulate", str(accumulate), "--out", "two")
    assert out.count("accuracy") == 1  # the first process alone speaks
    one = run(Recipe(**{**vars(RECIPE), "model": "own_things:network"}), folder / "one")
    two = load(folder / "two")
    torch.testing.assert_close(list(two.parameters()), list(one.parameters()), rtol=0, atol=1e-10)
    rows = [(folder / name / "log.csv").read_text().splitlines() for name in ("one", "two")]
    for a, b in zip(*rows, strict=True):
        for x, y in zip(a.split(","), b.split(","), strict=True):
            if "e" not in x and "." in x and x != a.split(",")[6]:  # not the seconds
                assert float(x) == pytest.approx(float(y), abs=1e-9)


def test_batch_norms_statistics_are_averaged_over_the_processes(folder):
    """The mean of the halves' means is the joint mean; the first layer's inputs do not depend on the grouping."""
    torchrun(folder, "--model", "own_things:normed", "--out", "two", "--lr", "1e-12")
    one = run(Recipe(**{**vars(RECIPE), "model": "own_things:normed", "lr": 1e-12}), folder / "one")
    torch.testing.assert_close(load(folder / "two")[1].running_mean, one[1].running_mean, rtol=0, atol=1e-10)
