"""The benchmark's own arithmetic: what counts as slower, which figures are met, which exponent a curve has."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import __main__ as table
from bench import curves, depth, figures, measure, models, rows
from bench.contenders import CONTENDERS, layouts

COMMITTED = Path(__file__).parents[1] / "bench" / "results" / "cpu" / "gradient_bounds.csv"


def entry(op: str, shape: str, backend: str, seconds: float, peak: int | str = "") -> dict[str, Any]:
    return rows.row(op, shape, backend, (seconds, seconds, seconds), peak)


def run_of(native: float) -> list[dict[str, Any]]:
    return [
        entry("certify", "n4 B32", "native channels-last", native),
        entry("certify", "n4 B32", "plain contiguous", 2.0),
        entry("certify", "n4 B32", "tuned channels-last", 1.2),
    ]


@pytest.mark.parametrize(("native", "failed"), [(1.0, 0), (1.17, 0), (1.19, 1), (0.5, 0), (2.0, 1)])
def test_the_check_fails_below_85_percent_of_the_committed_speed(native: float, failed: int) -> None:
    assert table.check(run_of(native), run_of(1.0), []) == failed


def test_the_check_looks_at_both_loops_and_misses_nothing() -> None:
    slower_beside_one = [*run_of(1.0)[:2], entry("certify", "n4 B32", "tuned", 0.9)]
    assert table.check(slower_beside_one, run_of(1.0), []) == 1
    assert table.check(run_of(1.0)[:2], run_of(1.0), []) == 1  # a row that was not measured
    assert table.check(run_of(1.0), [], []) == 1  # nothing to compare with


def test_the_committed_table_has_what_the_check_compares() -> None:
    compared = table.speedups(rows.read(COMMITTED))
    assert compared.keys() == {(name, op, loop) for name in measure.CASES for op in curves.OPS for loop in table.LOOPS}


def test_figures_say_reached_missed_or_not_measured() -> None:
    lines = figures.table(run_of(1.0)).splitlines()
    found = {figure.name: line for figure, line in zip(figures.FIGURES, lines[1:], strict=True)}
    assert found["certify n4 B32: eager loop / engine"].endswith("2.00 ×")
    assert found["train n4 B32: eager loop / engine"].endswith("not measured")
    missed = figures.table(run_of(1.5)).splitlines()[1]
    assert missed.endswith("1.33 ×   MISSED")
    at_most = [entry("train", "n4 B32", "native", 1.0, 60), entry("train", "n4 B32", "plain", 1.0, 100)]
    assert any(line.endswith("0.60 ×   MISSED") for line in figures.table(at_most).splitlines())


def test_every_figure_is_of_a_row_that_a_run_writes() -> None:
    """With every row that a full run can write, no figure may be left without a value."""
    from bench import fresh

    everything = [
        entry(op, shape, backend, 1.0, 1) for shape in measure.CASES for op in curves.OPS for backend in CONTENDERS
    ]
    everything += [entry("first call", name, "native", 1.0) for name in fresh.FIRST_CALLS]
    assert all(figure.value(everything) is not None for figure in figures.FIGURES)


def test_exponents_are_those_of_the_power_law_and_a_step_shows() -> None:
    def rows_of(cost: dict[int, float]) -> list[dict[str, Any]]:
        return [entry("certify", f"batch {value}", "native", seconds) for value, seconds in cost.items()]

    batches = (1, 2, 4, 8, 16, 32, 64, 128)
    axis = curves.AXES["batch"]
    linear = rows_of({n: 0.01 * n for n in batches})
    found = curves.fit(axis, curves.curve(linear, "batch", "certify", "native", "p20"))
    assert found == pytest.approx((1.0, 1.0))
    assert "steep" not in curves.exponents(linear).splitlines()[1]
    step = rows_of({n: 0.01 * n * (1.5 if n > 32 else 1) for n in batches})
    assert "steep" in curves.exponents(step).splitlines()[1]
    assert curves.fit(axis, {1: 1.0}) is None


def test_the_deepest_chain_has_finite_bounds_and_the_depth_that_it_says() -> None:
    deepest = curves.AXES["depth"].values[-1]
    case = curves.make_case("depth", deepest)
    convolutions = [m for m in case.model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert len(convolutions) == deepest
    small = measure.Case("small", models.chain(deepest, width=4), case.x[:1], case.target[:1])
    mid, rad = measure.plain(small, "contiguous").bounds()
    assert mid.isfinite().all() and rad.isfinite().all() and rad.max() > 0
    with pytest.raises(ValueError, match="even number"):
        models.chain(5)


@pytest.mark.parametrize("backend", ["native", "plain", "tuned", "agt", "auto_lirpa", "auto_lirpa-any-label"])
def test_contenders_of_the_table_agree(backend: str) -> None:
    case = measure.Case("n4", models.n4(pixels=8), torch.rand(1, 3, 8, 8), torch.tensor([3]))
    kind = CONTENDERS[backend]
    try:
        found = [measure.outcome(case, kind.make(case, layout)) for layout in layouts(case, kind)]
    except ImportError as error:
        pytest.skip(str(error))
    truth = measure.truth(case)
    for one in found:
        assert max(measure.disagreement(one, truth).values()) <= table.TOLERANCE
        assert ("grad" in one) == (not backend.startswith("auto_lirpa"))
    wrong = {**found[0], "rad": [1.1 * found[0]["rad"][0]]}
    assert measure.disagreement(wrong, truth)["rad"] > table.TOLERANCE


def test_short_calls_fill_their_turn_and_every_contender_takes_part() -> None:
    calls = {"short": 0, "long": 0}

    def short() -> None:
        calls["short"] += 1

    def long() -> None:
        calls["long"] += 1
        torch.rand(1000, 1000) @ torch.rand(1000, 1000)

    times = measure.interleaved({"short": short, "long": long}, seconds=0.0, rounds=4)
    assert len(times["short"]) == len(times["long"]) == 4
    assert calls["short"] > 10 * calls["long"]


def test_depths_go_on_where_they_were_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("dense 2", "convolutional 1"):
        small = dataclasses.replace(depth.NETWORKS[name], samples=4, epochs=1)
        monkeypatch.setitem(depth.NETWORKS, name, small)
    table, picture = tmp_path / "depth.csv", tmp_path / "depth.png"

    def run(*names: str) -> list[dict[str, Any]]:
        monkeypatch.setattr("sys.argv", ["depth", "--only", *names, "--out", str(table), "--picture", str(picture)])
        depth.main()
        return rows.read(table)

    first = run("dense 2")
    assert [float(row["eps"]) for row in first] == list(depth.RADII) and picture.stat().st_size > 0
    both = run("dense 2", "convolutional 1")
    assert both[:2] == first and len(both) == 4 and "| convolutional 1 | 0.001 |" in capsys.readouterr().out
    for row in both:
        plain, forms, parts = (float(row[method]) for method in depth.METHODS)
        assert plain <= forms <= parts <= float(row["survived"]) and parts + float(row["refuted"]) <= 1


def test_every_network_of_the_depths_takes_its_images() -> None:
    for network in depth.NETWORKS.values():
        images = depth.shown(torch.rand(2, 1, 8, 8), network)
        assert images.shape == (2, network.channels, network.pixels, network.pixels)
        assert network.make()(images).shape[0] == 2 and images.min() >= 0 and images.max() <= 1
