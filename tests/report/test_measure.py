"""evaluate_all: every number there, ready for JSON, in the order that must hold, and honest when it does not."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import pyxai_bounds as xb
from pyxai_bounds import data, models
from pyxai_bounds.report import SoundnessError, evaluate_all, glossary
from pyxai_bounds.report import measure as module
from pyxai_bounds.train import fit

SHORT = {"attack_steps": 4, "m": 3, "neighbours": 2}


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    dataset = data.load("digits-parity")
    torch.manual_seed(0)
    model = models.build("cnn-small", dataset.input_shape, dataset.classes)
    fit(model, dataset.train_x, dataset.train_y, epochs=2, lr=2e-3)
    return model, dataset.test_x[:40], dataset.test_y[:40]


def test_all_numbers_of_a_network_on_images(digits) -> None:
    seen = []
    found = evaluate_all(*digits, eps=(0.01, 0.001), clip=(0.0, 1.0), on_progress=seen.append, **SHORT)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert seen == sorted(seen) and seen[-1] == pytest.approx(1.0) and not digits[0].training
    assert found["samples"] == 40 and found["k"] == 5 and [row["eps"] for row in found["at"]] == [0.001, 0.01]
    assert 0 < found["unstable_relus"] < 1 and -1 <= found["same_class_cosine"] <= 1
    radius = found["certified_radius"]
    assert 0 <= radius["lower_quartile"] <= radius["median"] <= radius["upper_quartile"] <= radius["max_eps"] == 0.025
    for row in found["at"]:
        assert row["certified_accuracy"] <= row["AA"] <= found["NA"]
        assert row["certified_topk"] <= row["survived_topk"]
        assert row["certified_mean_square"] <= row["survived_mean_square"]
        assert 0 < row["ig_norm_found"] <= row["ig_norm_certified"]
        assert row["certified_topk"] <= row["certified_intersection"] and 0 <= row["thickness"] <= 1
        assert row["IN"] == row["attacks"]["topk"]["intersection"] and row["CO"] == row["attacks"]["topk"]["kendall"]
        assert row["P@k"] == row["attacks"]["er-stop"]["intersection"]
        assert row["attacks"].keys() == {
            "topk", "random", "center", "region", "er-stop", "er-hinge", "mse-stop", "mse-hinge",
        }  # fmt: skip
        for attacked in row["attacks"].values():
            assert attacked.keys() == {"intersection", "kendall", "spearman", "pearson", "mse"}
    named = [(row.attack, row.metric) for row in glossary.rows(found) if row.entry.definition]
    attacked = [(attack, metric) for attack in glossary.ATTACKS for metric in glossary.COMPARISONS]
    assert set(named) == {("", metric) for metric in glossary.METRICS} | set(attacked), "one entry each, and none more"
    first, second = found["at"]
    assert second["certified_topk"] <= first["certified_topk"] and second["IN"] <= first["IN"]
    again = evaluate_all(*digits, eps=(0.01, 0.001), clip=(0.0, 1.0), **SHORT)
    assert again == found


def test_a_linear_model_on_a_table_is_certified_throughout() -> None:
    dataset = data.load("breast-cancer")
    torch.manual_seed(0)
    model = models.build("linear", dataset.input_shape, dataset.classes)
    found = evaluate_all(model, dataset.test_x[:30], dataset.test_y[:30], eps=(0.1,), **SHORT)
    (row,) = found["at"]
    assert found["unstable_relus"] is None, "it has no ReLUs, so there is no such number"
    for key in (
        "certified_topk",
        "survived_topk",
        "certified_intersection",
        "certified_cosine",
        "IN",
        "P@k",
        "thickness",
    ):
        assert row[key] == 1.0, key
    assert row["CO"] == pytest.approx(1.0) and row["certified_mean_square"] == 1.0
    assert "center" not in row["attacks"]
    assert found["certified_radius"]["median"] == found["certified_radius"]["max_eps"]


def test_a_network_that_is_never_right_has_nothing_to_compare(digits) -> None:
    model, x, _ = digits
    with torch.no_grad():
        wrong = 1 - model(x).argmax(1)
    found = evaluate_all(model, x, wrong, eps=(0.01,), clip=(0.0, 1.0), k=64, **SHORT)
    assert found["NA"] == 0 and found["at"][0]["compared"] == 0
    assert found["at"][0]["IN"] is None and found["at"][0]["certified_topk"] == 1.0


def test_a_certificate_that_an_attack_breaks_is_no_result(digits, monkeypatch) -> None:
    def lying(*args, **options):
        certificate = xb.certify(*args, **options)
        return replace(certificate, holds=torch.ones_like(certificate.holds))

    monkeypatch.setattr(module, "certify", lying)
    with pytest.raises(SoundnessError, match=r"At eps 0\.05 an attack went beyond the certified top-k"):
        evaluate_all(*digits, eps=(0.05,), clip=(0.0, 1.0), **SHORT)


def test_bad_arguments(digits) -> None:
    model, x, y = digits
    for call, message in (
        (lambda: evaluate_all(model, x, y, eps=()), "at least one radius"),
        (lambda: evaluate_all(model, x, y, eps=(0.0,)), "positive"),
        (lambda: evaluate_all(model, x[:0], y[:0]), "at least one; got 0"),
        (lambda: evaluate_all(model, x, y[:3]), "got 40 and 3"),
        (
            lambda: evaluate_all(model, x, y, explanation=xb.explain.saliency(model)),
            r"must have their shape, but has \[",
        ),
        (lambda: evaluate_all(model, x, y, explanation=lambda x, y: [x]), "but has None"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
