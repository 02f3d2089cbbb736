"""The comparison: options are valid, rows depend on the seed alone, runs go on, the page says what the rows say."""

import dataclasses
import json

import pytest

from bench import compare, comparison_page
from bench.recipes import read
from pyxai_bounds.train.objectives import OBJECTIVES
from pyxai_bounds.train.recipe import typed_options

TINY = [
    compare.Plan(
        "digits-parity", model, epochs=2, natural_epochs=1, seconds=1, batch_size=200, samples=40, attacked=8,
        attack_steps=2,
    )
    for model in ("linear", "fc-128")
]  # fmt: skip


def rows_of(folder):
    return {(r["model"], r["objective"], r["seed"]): r for r in read(folder / "comparison.csv")}


def without_time(row):
    return {name: str(value) for name, value in row.items() if not name.startswith("seconds")}


def test_every_objective_has_options_that_it_knows():
    assert compare.OPTIONS.keys() <= OBJECTIVES.keys()
    for plan in compare.PLANS:
        for name in OBJECTIVES:
            recipe = compare.Job(plan, name, (0,)).recipe(0)
            recipe.check()
            assert typed_options(name, recipe.options) == recipe.options


def test_it_measures_resumes_and_writes_the_page(tmp_path, monkeypatch, one_thread):
    arguments = ["--only", "natural,separated-topk", "--seeds", "2", "--out", str(tmp_path), "--jobs", "1"]
    assert compare.main(arguments, TINY) == 0
    first = rows_of(tmp_path)
    assert len(first) == 8
    for (model, objective, _), row in first.items():
        applies = (model, objective) != ("linear", "separated-topk")
        assert (row["accuracy"] != "") == applies and (row["note"] == "") == applies
        if applies:
            assert 0 <= float(row["certified_top5_2"]) <= float(row["certified_top5_1"]) <= 1
            assert all(0 <= float(row[name]) <= 1 for name in ("accuracy", "AA", "IN", "P@5", "commonest_top_share"))
    # Whatever was trained on the same network before, the numbers are the same.
    job = compare.Job(TINY[1], "separated-topk", (1, 0))
    compare.row_of(compare.Job(TINY[1], "l2", (0,)), 0)
    for row in compare.work(job).rows:
        assert without_time(row) == without_time(first["fc-128", "separated-topk", str(row["seed"])])

    with monkeypatch.context() as patched:
        patched.setattr(compare, "work", lambda job: pytest.fail("this has been measured"))
        assert compare.main(arguments, TINY) == 0
    assert rows_of(tmp_path) == first
    page = (tmp_path / "comparison.md").read_text()
    assert "### digits-parity, fc-128" in page and "| *linear model* |" in page and "does not apply" in page
    assert page.count("| `separated-topk`") == 3  # on both networks, and among the options
    assert (tmp_path / "comparison.png").stat().st_size > 10_000

    # Other settings are another run; what fails is told, and stops nothing else.
    longer = [dataclasses.replace(plan, epochs=3) for plan in TINY]
    monkeypatch.setitem(compare.OPTIONS, "natural", {"no such": 1})
    assert compare.main([*arguments, "--model", "fc-128"], longer) == 1
    after = rows_of(tmp_path)
    assert {key for key in first if key not in after} == {("fc-128", "natural", "0"), ("fc-128", "natural", "1")}
    changed = {key for key, row in after.items() if row != first[key]}
    assert changed == {("fc-128", "separated-topk", "0"), ("fc-128", "separated-topk", "1")}
    assert {json.loads(after[key]["settings"])["epochs"] for key in changed} == {3}
    assert "not measured: `natural`" in (tmp_path / "comparison.md").read_text()


def test_processes_share_the_jobs(tmp_path):
    """With an objective that does not apply there is nothing to train."""
    plans = [TINY[0], dataclasses.replace(TINY[0], data="digits")]
    found = compare.main(["--only", "separated-topk", "--jobs", "2", "--seeds", "2", "--out", str(tmp_path)], plans)
    assert found == 0 and len(read(tmp_path / "comparison.csv")) == 4


@pytest.mark.parametrize("arguments", (["--only", "recc"], ["--seeds", "0"], ["--fresh", "--page"]))
def test_wrong_arguments_are_refused(arguments):
    with pytest.raises(SystemExit):
        compare.main(arguments, TINY)


def row(objective, model="fc-128", accuracy=0.97, certified=0.5, cosine=0.8, commonest=0.3, seed=0):
    job = compare.Job(dataclasses.replace(TINY[0], model=model), objective, (seed,))
    values = dict.fromkeys(compare.MEASURES, "0.5") | {
        "accuracy": accuracy, "certified_top5_1": certified, "same_class_cosine": cosine,
        "commonest_top_share": commonest,
    }  # fmt: skip
    found = {
        "data": "digits-parity",
        "model": model,
        "objective": objective,
        "seed": seed,
        "eps_1": 0.01,
        "eps_2": 0.02,
    }
    found |= values | {"note": "", "settings": job.settings()}
    return {name: str(value) for name, value in found.items()}


def test_traps_frontier_and_spread():
    table = comparison_page.grouped([
        row("natural", "linear", accuracy=0.917, cosine=1.0, commonest=1.0, certified=1.0),
        row("natural", accuracy=0.98, certified=0.1), row("rec", accuracy=0.96, certified=0.6),
        row("rec", accuracy=0.98, certified=0.8, seed=1), row("ibp", accuracy=0.96, certified=0.3),
        row("r2et", accuracy=0.95, certified=1.0, commonest=0.95),
        row("ssr", accuracy=0.9, certified=1.0, cosine=0.995),
    ])  # fmt: skip
    group, baseline = table["digits-parity", "fc-128"], comparison_page.linear(table, "digits-parity")
    assert baseline is not None and comparison_page.traps(baseline, baseline) == []
    caught = {name: comparison_page.traps(runs, baseline) for name, runs in group.items()}
    assert caught == {"natural": [], "rec": [], "ibp": [], "r2et": ["same top"], "ssr": ["constant", "≤ linear"]}
    clear = [runs for name, runs in group.items() if not caught[name]]
    assert comparison_page.frontier(clear) == ["natural", "rec"]
    assert group["rec"].cell("accuracy", 3) == ".970 ± .014" and group["rec"].cell("certified_top5_1") == ".70 ± .14"
    assert group["natural"].cell("accuracy", 3) == ".980" and baseline.cell("certified_top5_1") == "1"
    text = comparison_page.page(table)
    assert "`rec` (accuracy .970, certified .70) certifies most; `natural` (accuracy .980, certified .10)" in text
    # certified most first, the linear model before all
    start = text.index("### digits-parity, fc-128")
    places = [text.index(f"| {name}", start) for name in ("*linear", "`r2et`", "`ssr`", "`rec`", "`ibp`", "`natural`")]
    assert places == sorted(places)
