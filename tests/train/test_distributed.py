"""Two processes started by torchrun, as a user would, give what one gives on the joint batch."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace

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


def torchrun(folder, *commands: list[str]) -> str:
    """Run commands of pyxai-bounds, one after the other, in two processes."""
    (folder / "driver.py").write_text(
        "import atexit, json, os, sys\nfrom pyxai_bounds.cli import main\n"
        "names = lambda: [open(f'/proc/self/task/{task}/comm').read() for task in os.listdir('/proc/self/task')]\n"
        # One write each: unbuffered, two processes print into each other's lines.
        "left = lambda: str([name for name in names() if 'gloo' in name])\n"
        "atexit.register(lambda: os.write(1, f'left {left()}\\n'.encode()))\n"
        "sys.exit(max(main(command) for command in json.loads(sys.argv[1])))\n"
    )
    flags = ["train", "--data", "own_things:digits", *FLAGS]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "driver.py",
         json.dumps([flags + command for command in commands])],
        cwd=folder, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_gloo_processes_equal_one_on_the_joint_batch(folder):
    out = torchrun(
        folder,
        ["--model", "own_things:network", "--accumulate", "2", "--out", "network"],
        ["--model", "own_things:normed", "--lr", "1e-12", "--out", "normed"],
    )
    assert out.count("test samples") == 2  # the first process alone speaks
    assert out.count("left []") == 2  # a thread of the group that outlives it may abort the process
    one = run(replace(RECIPE, model="own_things:network"), folder / "one")
    two = load(folder / "network")
    torch.testing.assert_close(list(two.parameters()), list(one.parameters()), rtol=0, atol=1e-10)
    texts = [(folder / name / "log.csv").read_text() for name in ("one", "network")]
    logs = [list(csv.DictReader(text.splitlines())) for text in texts]
    assert len(logs[0]) == 4
    for a, b in zip(*logs, strict=True):
        del a["seconds"], b["seconds"]
        assert [float(value) for value in a.values()] == pytest.approx([float(value) for value in b.values()], abs=1e-9)
    # The mean of two halves' means is the joint mean: the first layer's inputs do not depend on the grouping.
    one = run(replace(RECIPE, model="own_things:normed", lr=1e-12), folder / "one-normed")
    torch.testing.assert_close(load(folder / "normed")[1].running_mean, one[1].running_mean, rtol=0, atol=1e-10)
