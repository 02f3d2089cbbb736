"""The loop and runs on disk: the schedule it follows, the same result from the same seed, and damage noticed."""

import json

import pytest
import torch
from torch import nn

from pyxai_bounds.train import Recipe, TrainingDivergedError, fit, load, natural, run, save

SHORT = Recipe(data="digits-parity", model="fc-128", epochs=4, natural_epochs=2, batch_size=200)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: nn.Module, b: nn.Module) -> bool:
    a, b = state(a), state(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def problem(samples: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(samples, 3, generator=torch.Generator().manual_seed(1))
    return x, (x.sum(1) > 1.5).long()


def test_natural_epochs_then_a_ramp_over_the_first_half():
    calls = []

    def objective(model, x, y, eps):
        calls.append((len(x), eps))
        return natural(model, x, y)

    epochs = []
    x, y = problem()
    fit(nn.Linear(3, 2), x, y, objective, eps=0.4, epochs=5, natural_epochs=1, batch_size=20,
        on_epoch=lambda done, loss: epochs.append(done))  # fmt: skip
    assert epochs == [1, 2, 3, 4, 5]
    # 50 samples make 2 batches of 20; 4 epochs of the objective are 8 steps, 4 of them ramp.
    assert {size for size, _ in calls} == {20}
    assert [eps for _, eps in calls] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.4, 0.4])


def test_it_learns_and_leaves_the_mode_and_the_global_generator_alone():
    x, y = problem(200)
    torch.manual_seed(3)
    model = nn.Linear(3, 2)
    before = torch.get_rng_state()
    losses = fit(model, x, y, epochs=30, lr=0.05)
    assert losses[-1] < losses[0] / 2 and model.training
    assert torch.equal(before, torch.get_rng_state())


def test_fewer_samples_than_a_batch():
    x, y = problem(7)
    assert len(fit(nn.Linear(3, 2), x, y, epochs=2, batch_size=100)) == 2


def test_a_run_is_reproducible_bit_for_bit_and_loads_as_it_was(tmp_path):
    torch.manual_seed(11)
    first = run(SHORT, tmp_path / "a")
    torch.manual_seed(12)
    second = run(SHORT, tmp_path / "b")
    assert same(first, second) and not first.training
    for folder in ("a", "b"):
        loaded = load(tmp_path / folder)
        assert same(first, loaded) and not loaded.training
    other = run(Recipe(**{**vars(SHORT), "seed": 1}), tmp_path / "c")
    assert not same(first, other)
    description = json.loads((tmp_path / "a" / "run.json").read_text())
    assert description["recipe"] == vars(SHORT) and len(description["losses"]) == SHORT.epochs


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path):
    x, y = problem()

    def objective(model, x, y, eps):
        return natural(model, x, y) * (torch.nan if eps > 0.2 else 1.0)

    with pytest.raises(TrainingDivergedError, match=r"nan in epoch 4.*Lower lr"):
        fit(nn.Linear(3, 2), x, y, objective, eps=0.4, epochs=6, natural_epochs=2, batch_size=25)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"eps": -0.1}, "eps=-0.1"),
        ({"eps": float("nan")}, "eps=nan"),
    ],
)
def test_impossible_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        fit(nn.Linear(3, 2), *problem(), natural, **settings)


# --- runs on disk -------------------------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 2))
    write(model, tmp_path)
    return tmp_path


def write(model: nn.Module, folder) -> None:
    save(model, folder, recipe={"data": "wine", "model": "linear"}, input_shape=(6,), classes=2)


def weights(folder):
    (path,) = folder.glob("model-*.safetensors")
    return path


def test_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is not a run.*pyxai-bounds train"):
        load(tmp_path / "nowhere")


def test_missing_weights(kept):
    weights(kept).unlink()
    with pytest.raises(FileNotFoundError, match="is missing"):
        load(kept)


def test_a_flipped_bit_in_the_weights(kept):
    content = bytearray(weights(kept).read_bytes())
    content[-1] ^= 1
    weights(kept).write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        load(kept)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 1}', '{"format": 1, "recipe": {}}'])
def test_a_damaged_description(kept, text):
    (kept / "run.json").write_text(text)
    with pytest.raises(ValueError, match="damaged"):
        load(kept)


def test_a_description_of_another_format_or_model(kept):
    description = json.loads((kept / "run.json").read_text())
    (kept / "run.json").write_text(json.dumps({**description, "format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        load(kept)
    (kept / "run.json").write_text(json.dumps({**description, "input_shape": [5]}))
    with pytest.raises(ValueError, match="does not fit the model 'linear'"):
        load(kept)
    (kept / "run.json").write_text(json.dumps({**description, "weights": "../elsewhere.safetensors"}))
    with pytest.raises(ValueError, match="must lie beside"):
        load(kept)


def test_an_interrupted_write_leaves_the_old_run_whole(kept, monkeypatch):
    old = load(kept)
    newer = nn.Sequential(nn.Flatten(), nn.Linear(6, 2))
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            write(newer, kept)
    assert same(load(kept), old)
    assert sorted(p.suffix for p in kept.iterdir()) == [".json", ".safetensors"]
    write(newer, kept)
    assert same(load(kept), newer) and weights(kept)


def test_loading_does_not_move_the_global_generator(kept):
    before = torch.get_rng_state()
    load(kept)
    assert torch.equal(before, torch.get_rng_state())
