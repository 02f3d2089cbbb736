"""Checkpoints: going on after kill -9 gives the very same result, and what is damaged is noticed and passed over."""

import csv
import json
import random
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from pyxai_bounds.train import Recipe, run
from pyxai_bounds.train.checkpoint import load, load_checkpoint, save_checkpoint
from tests.cuda_graphs import imitate

# Dropout draws from the generator in natural steps, batch norm keeps statistics, 10 steps make an epoch.
NETWORK = """
from torch import nn

def network(shape, classes):
    return nn.Sequential(
        nn.Linear(13, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, classes)
    )
"""
RECIPE = Recipe(
    data="wine", model="killed_network:network", epochs=5, natural_epochs=2, batch_size=12, validation=0.1, patience=4,
    options={"alpha": 0.05}, eps=0.01, weight_ramp="smooth", clip_gradient=1.0, lr_schedule="cosine", weight_decay=1e-3,
)  # fmt: skip

# Kills itself in the middle of optimiser step N, or in the middle of writing file N.
VICTIM = """
import os, signal, sys
import torch
from pyxai_bounds.train import Recipe, run
import json

torch.set_num_threads(1)
kind, count, out, recipe = sys.argv[1], int(sys.argv[2]), sys.argv[3], Recipe.from_json(json.loads(sys.argv[4]))
left = count

def deadly(function):
    def wrapper(*args, **kwargs):
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return function(*args, **kwargs)
    return wrapper

if kind == "step":
    torch.optim.Adam.step = deadly(torch.optim.Adam.step)
else:
    os.fsync = deadly(os.fsync)
run(recipe, out, checkpoint_every=3)
"""


@pytest.fixture
def network(tmp_path, monkeypatch, one_thread):
    (tmp_path / "killed_network.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def killed(folder, kind: str, count: int) -> None:
    """Run ``RECIPE`` in another process until it is killed."""
    (folder / "victim.py").write_text(VICTIM)
    recipe = json.dumps(RECIPE.as_json())
    done = subprocess.run(
        [sys.executable, "victim.py", kind, str(count), str(folder / "killed"), recipe],
        cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr


def same(a: nn.Module, b: nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def without_seconds(folder) -> list[dict[str, str]]:
    rows = csv.DictReader((folder / "log.csv").read_text().splitlines())
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.mark.parametrize(
    ("kind", "count"),
    [("step", random.randrange(1, 48)), ("write", random.randrange(2, 34)), ("write", 8)],
    ids=["step", "write", "log"],
)
def test_after_kill_9_it_goes_on_to_the_same_result_bit_for_bit(network, kind, count):
    whole = run(RECIPE, network / "whole", checkpoint_every=3)
    killed(network, kind, count)
    said: list[str] = []
    continued = run(RECIPE, network / "killed", checkpoint_every=3, resume=True, tell=said.append)
    where = f"killed in {kind} {count}: {said}"
    assert len(said) == 1 and said[0].startswith("Continuing after step "), where
    assert same(whole, continued), where
    assert without_seconds(network / "whole") == without_seconds(network / "killed"), where
    losses = [json.loads((network / name / "run.json").read_text())["losses"] for name in ("whole", "killed")]
    assert losses[0] == losses[1], where
    files = {path.name.split("-")[0] for path in (network / "killed").iterdir()}
    assert files == {"log.csv", "model", "run.json"}, where


class StoppedError(Exception):
    pass


def stopped(folder, at: int, recipe: Recipe = RECIPE, **settings) -> None:
    """Run until checkpoint ``at`` steps is written, then stop."""

    def stop(progress) -> None:
        if progress.step >= at:
            raise StoppedError

    with pytest.raises(StoppedError):
        run(recipe, folder, checkpoint_every=3, on_progress=stop, **settings)


def checkpoints(folder) -> list:
    return sorted(folder.glob("checkpoint-*.json"))


@pytest.mark.parametrize("damage", ["flipped bit", "truncated", "missing", "JSON truncated", "JSON changed"])
def test_a_damaged_checkpoint_is_passed_over_and_said_so(network, damage):
    whole = run(RECIPE, network / "whole", checkpoint_every=3)
    out = network / "out"
    stopped(out, at=20)
    newest = checkpoints(out)[-1]
    tensors = out / json.loads(newest.read_bytes())["tensors"]
    if damage == "flipped bit":
        content = bytearray(tensors.read_bytes())
        content[len(content) // 2] ^= 1
        tensors.write_bytes(content)
    elif damage == "truncated":
        tensors.write_bytes(tensors.read_bytes()[:-100])
    elif damage == "missing":
        tensors.unlink()
    elif damage == "JSON truncated":
        newest.write_bytes(newest.read_bytes()[:-1])
    else:
        newest.write_text(newest.read_text().replace('"worse": 0', '"worse": 1'))
    said: list[str] = []
    continued = run(RECIPE, out, checkpoint_every=3, resume=True, tell=said.append)
    assert len(said) == 2 and "Going back to the checkpoint before it" in said[0]
    assert "is missing" in said[0] if damage == "missing" else "is damaged" in said[0]
    assert said[1] == "Continuing after step 15."
    assert same(whole, continued)


def test_when_all_are_damaged_nothing_is_made_up(network):
    stopped(network / "out", at=20)
    for path in checkpoints(network / "out"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"All checkpoints in .* are damaged"):
        run(RECIPE, network / "out", resume=True, tell=lambda _: None)


def test_another_recipe_or_number_of_processes_is_refused(network):
    stopped(network / "out", at=20)
    with pytest.raises(ValueError, match=r"another recipe: lr \(0.002 there, 0.1 now\)"):
        run(replace(RECIPE, lr=0.1), network / "out", resume=True)
    tensors, state = load_checkpoint(network / "out", pytest.fail)
    save_checkpoint(network / "out", 30, tensors, {**state, "processes": 2})
    with pytest.raises(ValueError, match="written by 2 processes; this run has 1"):
        run(RECIPE, network / "out", resume=True, tell=lambda _: None)


def test_resume_starts_where_nothing_is_and_returns_what_is_finished(network):
    said: list[str] = []
    first = run(RECIPE, network / "out", resume=True, tell=said.append)
    assert said == []
    again = run(RECIPE, network / "out", resume=True, tell=said.append)
    assert said == [f"The run in {network / 'out'} is finished."] and same(first, again)
    with pytest.raises(ValueError, match="another recipe: seed"):
        run(replace(RECIPE, seed=1), network / "out", resume=True)


def test_without_resume_it_starts_anew(network):
    whole = run(RECIPE, network / "whole")
    stopped(network / "out", at=20)
    assert checkpoints(network / "out")
    with pytest.raises(FileNotFoundError, match=r"not finished: go on with pyxai-bounds train --resume --out"):
        load(network / "out")
    assert same(run(RECIPE, network / "out"), whole)


def test_the_two_newest_are_kept(tmp_path):
    for step in (0, 5, 10, 2_000_000_000):
        save_checkpoint(tmp_path, step, {"x": torch.tensor([float(step)])}, {"note": "any JSON"})
    assert [int(path.name.split("-")[1]) for path in checkpoints(tmp_path)] == [10, 2_000_000_000]
    assert len(list(tmp_path.iterdir())) == 4
    tensors, state = load_checkpoint(tmp_path, pytest.fail)
    assert tensors["x"].tolist() == [2e9] and (state["step"], state["note"]) == (2_000_000_000, "any JSON")
    assert load_checkpoint(tmp_path / "nowhere", pytest.fail) is None


def test_a_damaged_one_is_replaced_when_its_step_comes_again(tmp_path):
    for step in (5, 10):
        save_checkpoint(tmp_path, step, {"x": torch.tensor([float(step)])}, {"try": 1})
    checkpoints(tmp_path)[-1].write_bytes(b"damaged")
    said: list[str] = []
    _, state = load_checkpoint(tmp_path, said.append)
    assert state["step"] == 5 and len(said) == 1
    save_checkpoint(tmp_path, 10, {"x": torch.tensor([10.5])}, {"try": 2})
    assert len(list(tmp_path.iterdir())) == 4
    tensors, state = load_checkpoint(tmp_path, pytest.fail)
    assert (state["step"], state["try"], tensors["x"].tolist()) == (10, 2, [10.5])


def test_tied_weights_can_be_kept(tmp_path):
    shared = torch.rand(3)
    save_checkpoint(tmp_path, 1, {"a": shared, "b": shared}, {})
    tensors, _ = load_checkpoint(tmp_path, pytest.fail)
    assert torch.equal(tensors["a"], shared) and torch.equal(tensors["b"], shared)


def test_early_stopping_goes_on_where_it_was(network):
    """The best weights and the count of worse epochs live in the checkpoint."""
    recipe = replace(RECIPE, epochs=12, natural_epochs=1, patience=1, lr=0.3, lr_schedule="constant", clip_gradient=0.0,
                     eps_ramp="constant", weight_ramp="constant")  # fmt: skip
    whole = run(recipe, network / "whole", checkpoint_every=3)
    epochs = len(without_seconds(network / "whole"))
    assert 2 < epochs < 12
    stopped(network / "out", at=(epochs - 1) * 10, recipe=recipe)
    assert same(run(recipe, network / "out", checkpoint_every=3, resume=True, tell=lambda _: None), whole)
    assert without_seconds(network / "out") == without_seconds(network / "whole")


def test_recorded_steps_in_parts_go_on_to_the_same_result(network, monkeypatch):
    """What is recorded is not kept: the run that goes on records anew. On an imitation of CUDA graphs."""
    imitate(monkeypatch)
    recipe = replace(RECIPE, accumulate=3, cuda_graph=True)
    whole = run(recipe, network / "whole", checkpoint_every=3)
    stopped(network / "out", at=31, recipe=recipe)
    assert same(run(recipe, network / "out", checkpoint_every=3, resume=True, tell=lambda _: None), whole)
    assert without_seconds(network / "out") == without_seconds(network / "whole")
