"""The loop and finished runs on disk: the schedules it follows, batch norm, the same result from the same seed."""

import csv
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from pyxai_bounds import data
from pyxai_bounds.ops import replay
from pyxai_bounds.train import Recipe, TrainingDivergedError, fit, load, natural, rec, run, save
from tests.cuda_graphs import imitate

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


def test_the_objectives_weight_ramps_and_mixes_with_cross_entropy():
    x, y = problem(40)
    seen = []

    def objective(model, x, y, eps):
        seen.append(eps)
        return 5 * natural(model, x, y)

    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    with torch.no_grad():
        plain = float(natural(model, x, y))
    losses = fit(model, x, y, objective, eps=0.1, eps_ramp="constant", epochs=4, natural_epochs=1, batch_size=40,
                 weight=0.5, weight_ramp="linear", weight_ramp_share=1.0, lr=1e-12)  # fmt: skip
    assert seen == [0.1] * 3
    # With lr ≈ 0 only the weight moves: s = 1/6, 2/6, 3/6 in (1 − s)·CE + s·5·CE = (1 + 4s)·CE.
    assert losses == pytest.approx([plain, plain * (1 + 4 / 6), plain * (1 + 8 / 6), plain * 3], rel=1e-5)


def test_steps_instead_of_epochs():
    x, y = problem(50)
    epochs = []
    losses = fit(nn.Linear(3, 2), x, y, steps=5, batch_size=20, on_epoch=lambda done, loss: epochs.append(done))
    assert epochs == [1, 2, 3] and len(losses) == 3  # two steps an epoch


def test_the_learning_rate_follows_its_schedule(monkeypatch):
    rates = []
    step = torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: (rates.append(self.param_groups[0]["lr"]), step(self)))
    x, y = problem(20)
    fit(nn.Linear(3, 2), x, y, optimiser="sgd", epochs=4, batch_size=10, lr=1.0, lr_schedule="steps",
        lr_steps=((2, 0.5), (6, 0.1)), warmup=2)  # fmt: skip
    assert rates == pytest.approx([0.5, 1.0, 0.5, 0.5, 0.5, 0.5, 0.1, 0.1])


def test_sgd_has_momentum_and_weight_decay():
    x, y = problem(10)
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    weight, bias = (p.detach().clone().requires_grad_() for p in model.parameters())
    fit(model, x.double(), y, optimiser="sgd", epochs=3, batch_size=10, lr=0.3, momentum=0.7, weight_decay=0.01)
    velocity = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for _ in range(3):
        loss = nn.functional.cross_entropy(x.double() @ weight.T + bias, y)
        gradients = torch.autograd.grad(loss, (weight, bias))
        with torch.no_grad():
            for p, g, v in zip((weight, bias), gradients, velocity, strict=True):
                v.mul_(0.7).add_(g + 0.01 * p)
                p -= 0.3 * v
    torch.testing.assert_close(list(model.parameters()), [weight, bias], rtol=0, atol=1e-14)


@pytest.mark.parametrize("objective", [natural, rec])
def test_accumulated_parts_are_one_batch(objective, one_thread):
    x, y = problem(48)
    results = []
    for accumulate in (1, 4):
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)).double()
        fit(model, x.double(), y, objective, eps=0.05, epochs=3, natural_epochs=1, batch_size=24, accumulate=accumulate)
        results.append(list(model.parameters()))
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


def test_the_gradient_is_clipped():
    x, y = problem(10)
    moved = []
    for limit in (0.0, 1e-3):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        before = model.weight.detach().clone(), model.bias.detach().clone()
        fit(model, x, y, optimiser="sgd", epochs=1, batch_size=10, lr=1.0, clip_gradient=limit)
        moved.append(torch.cat([(p.detach() - q).flatten() for p, q in zip(model.parameters(), before, strict=True)]))
    assert moved[0].norm() > 0.01 and moved[1].norm() == pytest.approx(1e-3, rel=1e-4)
    torch.testing.assert_close(moved[0] / moved[0].norm(), moved[1] / moved[1].norm(), rtol=1e-3, atol=1e-4)


def test_class_weights_draw_rare_classes_as_often():
    x = torch.arange(1000.0).unsqueeze(1)
    y = (x[:, 0] >= 900).long()
    drawn = []

    def objective(model, x, y, eps):
        drawn.append(y)
        return natural(model, x, y)

    fit(nn.Linear(1, 2), x, y, objective, epochs=5, natural_epochs=0, batch_size=100, class_weights=(1.0, 9.0), lr=1e-9)
    assert torch.cat(drawn).double().mean() == pytest.approx(0.5, abs=0.05)
    with pytest.raises(ValueError, match="2 entries, but there are more classes"):
        fit(nn.Linear(1, 3), x, y + 1, class_weights=(1.0, 3.0))


def test_channels_last_changes_the_memory_order_alone(tmp_path, one_thread):
    recipe = Recipe(data="digits", model="cnn-small", epochs=2, natural_epochs=1, batch_size=200)
    digits = data.load("digits")
    small = replace(digits, train_x=digits.train_x[:400], train_y=digits.train_y[:400])
    plain = run(recipe, tmp_path / "a", dataset=small)
    other = run(replace(recipe, channels_last=True), tmp_path / "b", dataset=small)
    assert other[0].weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(list(plain.parameters()), list(other.parameters()), rtol=1e-3, atol=1e-4)
    assert same(other, load(tmp_path / "b"))


# --- batch norm ---------------------------------------------------------------------------------------------------


def normed() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 2))


def modes(recorded: list) -> object:
    def objective(model, x, y, eps):
        recorded.append((model.training, model[1].training, model[1].running_mean.clone()))
        return natural(model, x, y)

    return objective


def test_batch_norm_learns_in_natural_passes_and_bounds_see_running_statistics():
    x, y = problem(40)
    recorded: list = []
    model = normed().eval()
    fit(model, x, y, modes(recorded), epochs=3, natural_epochs=1, batch_size=20, lr=1e-12)
    assert [entry[:2] for entry in recorded] == [(False, False)] * 4
    assert not model.training and not model[1].training
    assert int(model[1].num_batches_tracked) == 6  # two natural steps, and one pass before each of four others
    # With lr ≈ 0 the statistics are running averages of the batches' own.
    before = recorded[0][2]
    assert not torch.equal(before, recorded[-1][2])
    hidden = model[0](x).mean(0)
    assert (recorded[-1][2] - hidden).abs().max() < hidden.abs().max()


def test_frozen_statistics_stay_as_the_natural_epochs_left_them():
    x, y = problem(40)
    recorded: list = []
    model = normed()
    fit(model, x, y, modes(recorded), epochs=3, natural_epochs=1, batch_size=20, batch_norm="frozen")
    assert int(model[1].num_batches_tracked) == 2 and model.training
    assert all(torch.equal(entry[2], model[1].running_mean) for entry in recorded)
    with pytest.raises(ValueError, match="batch_norm='frozen' needs natural epochs"):
        fit(normed(), x, y, modes([]), natural_epochs=0, batch_norm="frozen")


def test_batch_statistics_for_objectives_that_bound_nothing():
    x, y = problem(40)
    recorded: list = []
    fit(normed(), x, y, modes(recorded), epochs=2, natural_epochs=1, batch_size=20, batch_norm="batch")
    assert [entry[:2] for entry in recorded] == [(True, True)] * 2


def test_rec_trains_a_network_with_batch_norm_and_dropout(one_thread):
    x, y = problem(60)
    losses = fit(normed(), x, y, rec, eps=0.01, epochs=6, natural_epochs=2, batch_size=20, lr=0.02)
    assert losses[-1] < losses[2]


# --- early stopping ------------------------------------------------------------------------------------------------


def test_early_stopping_keeps_the_best_weights():
    x, y = problem(50)
    states, losses = [], []

    def objective(model, x, y, eps):
        if not torch.is_grad_enabled() or len(x) == 10:  # validation: 20 % of 50
            states.append(state(model))
            value = [3.0, 2.0, 2.5, 2.2, 1.0][len(states) - 1]
            return torch.tensor(value, requires_grad=True) * 1.0
        return natural(model, x, y)

    model = nn.Linear(3, 2)
    losses = fit(model, x, y, objective, epochs=9, natural_epochs=1, batch_size=40, eps_ramp="constant",
                 validation=0.2, patience=2)  # fmt: skip
    # The natural epoch's validation loss does not count: 2.0 is best, 2.5 and 2.2 are worse, and then it ends.
    assert len(losses) == 4 and all(torch.equal(state(model)[name], states[1][name]) for name in states[1])


def test_the_samples_held_out_are_never_trained_on():
    x = torch.arange(30.0).unsqueeze(1)
    y = (x[:, 0] > 15).long()
    trained, watched = set(), set()

    def objective(model, x, y, eps):
        (watched if len(x) == 6 else trained).update(x[:, 0].tolist())
        return natural(model, x, y)

    fit(nn.Linear(1, 2), x, y, objective, epochs=3, natural_epochs=0, batch_size=24, validation=0.2)
    assert len(trained) == 24 and len(watched) == 6 and not trained & watched


# --- logs -----------------------------------------------------------------------------------------------------------


def test_log_csv_has_a_row_per_epoch_and_old_measurements_go(tmp_path):
    (tmp_path / "evaluation.json").write_text("{}")
    run(replace(SHORT, model="linear", validation=0.1), tmp_path)
    rows = list(csv.DictReader((tmp_path / "log.csv").read_text().splitlines()))
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3, 4]
    assert [float(row["loss"]) for row in rows] == json.loads((tmp_path / "run.json").read_text())["losses"]
    assert not (tmp_path / "evaluation.json").exists()
    assert float(rows[-1]["eps"]) == 0.02 and 0 < float(rows[-1]["validation_accuracy"]) <= 1


def test_tensorboard_where_it_is_installed(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    run(replace(SHORT, model="linear"), tmp_path, tensorboard=True)
    assert list((tmp_path / "tensorboard").glob("events.*"))


# --- the result -----------------------------------------------------------------------------------------------------


def test_a_run_that_starts_from_another(tmp_path):
    first = run(replace(SHORT, model="linear"), tmp_path / "a")
    second = run(replace(SHORT, model="linear", start_from=str(tmp_path / "a"), lr=1e-12), tmp_path / "b")
    torch.testing.assert_close(list(first.parameters()), list(second.parameters()), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="is of another network than fc-128"):
        run(replace(SHORT, start_from=str(tmp_path / "a")), tmp_path / "c")


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
    other = run(replace(SHORT, seed=1), tmp_path / "c")
    assert not same(first, other)
    description = json.loads((tmp_path / "a" / "run.json").read_text())
    assert description["recipe"] == SHORT.as_json() and len(description["losses"]) == SHORT.epochs


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
        ({"accumulate": 0}, "accumulate=0"),
        ({"weight": 1.5}, "weight=1.5 must lie between 0 and 1"),
        ({"eps_ramp": "cubic"}, "eps_ramp=cubic must be one of constant, linear, smooth"),
        ({"optimiser": "lion"}, "optimiser=lion must be one of adam, adamw, sgd"),
        ({"lr_steps": ((5, 0.1),)}, "go with lr_schedule='steps'"),
        ({"lr_schedule": "steps"}, "go with lr_schedule='steps'"),
        ({"beta2": 1.0}, "beta2=1.0 must be"),
        ({"patience": 2}, "patience=2 needs validation above 0"),
        ({"validation": 0.999}, "leaves none of the 50 samples"),
        ({"accumulate": 3, "batch_size": 20}, "choose a multiple of 3"),
        ({"accumulate": 60}, "cannot be divided evenly"),
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
        with pytest.raises(OSError, match=rf"disk full; it cannot be written: '{kept}/model-\w+.safetensors'"):
            write(newer, kept)
    assert same(load(kept), old)
    assert sorted(p.suffix for p in kept.iterdir()) == [".json", ".safetensors"]
    write(newer, kept)
    assert same(load(kept), newer) and weights(kept)


def test_loading_does_not_move_the_global_generator(kept):
    before = torch.get_rng_state()
    load(kept)
    assert torch.equal(before, torch.get_rng_state())


def test_recomputed_bounds_train_the_same_network():
    """To the rounding of a gradient's terms, and recomputed they are."""
    x, y = problem(40)
    outcomes, seen = [], []

    def objective(model, x, y, eps):
        loss = rec(model, x, y, eps)
        pending = [loss.grad_fn]
        while pending:
            node = pending.pop()
            seen.append(type(node).__name__)
            pending += [parent for parent, _ in getattr(node, "next_functions", ())]
        return loss

    for recompute in (False, True):
        torch.manual_seed(0)
        layers = [layer for _ in range(6) for layer in (nn.Linear(8, 8), nn.ReLU())]
        model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), *layers, nn.Linear(8, 2)).double()
        seen.clear()
        fit(model, x.double(), y, objective, eps=0.01, epochs=3, natural_epochs=1, batch_size=20, recompute=recompute)
        assert ("_RecomputedBackward" in seen) == recompute
        outcomes.append(state(model))
    assert all(torch.allclose(outcomes[0][name], outcomes[1][name], rtol=1e-9, atol=1e-12) for name in outcomes[0])


@pytest.mark.parametrize(
    "settings", [{}, {"weight": 0.5, "weight_ramp": "linear", "recompute": True}, {"accumulate": 4}]
)
def test_recorded_steps_train_the_same_network(settings, monkeypatch):
    """Radius, weight and learning rate change at every step, and batch norm learns; on an imitation of CUDA graphs."""
    imitate(monkeypatch)
    recorded = []
    record = replay.Graph.record
    monkeypatch.setattr(replay.Graph, "record", lambda *args: (recorded.append(args), record(*args)))
    found = []
    for cuda_graph in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).double()
        x, y = problem(41)
        losses = fit(model, x.double(), y, rec, eps=0.05, eps_ramp_share=1.0, epochs=5, natural_epochs=1, batch_size=20,
                     optimiser="sgd", lr=0.3, lr_schedule="cosine", cuda_graph=cuda_graph, **settings)  # fmt: skip
        found.append([torch.tensor(losses), *model.state_dict().values()])
    assert len(recorded) == 1
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(*found, strict=True))


def test_all_parts_see_the_network_that_all_parts_taught(monkeypatch):
    """Batch norm learns from every part of a step before the first one's loss."""
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: None)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).double()
    norm = model[1]
    norm.reset_running_stats()
    x, y = problem(24)
    seen = []

    def objective(model, x, y, eps):
        assert not model.training
        seen.append((len(x), int(norm.num_batches_tracked), norm.running_mean.clone()))
        return natural(model, x, y)

    fit(model, x.double(), y, objective, optimiser="sgd", epochs=2, natural_epochs=0, batch_size=24, accumulate=3)
    assert [(size, learned) for size, learned, _ in seen] == [(8, 3)] * 3 + [(8, 6)] * 3
    assert torch.equal(seen[0][2], seen[2][2])


def test_an_objective_is_a_function():
    x, y = problem(40)
    with pytest.raises(TypeError, match=r"such as xb\.train\.rec, got 'rec'; names are what"):
        fit(nn.Linear(3, 2), x, y, "rec", epochs=1)
