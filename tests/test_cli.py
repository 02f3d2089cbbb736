"""The command line: exit codes, messages of one line, JSON that is JSON."""

import csv
import dataclasses
import json
import subprocess
import sys

import pytest

from pyxai_bounds import TopK, certify, cli, data, explain, report, train
from pyxai_bounds.report import demo, glossary
from pyxai_bounds.train import Recipe, presets


def call(capsys, *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of one command."""
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:  # tyro's own errors
        code = stop.code
    streams = capsys.readouterr()
    return code, streams.out, streams.err


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for model in ("linear", "fc-128"):
        assert (
            cli.main(["train", "--data", "wine", "--model", model, "--epochs", "8", "--out", str(folder / model)]) == 0
        )
    return folder


def test_train_says_what_it_kept(capsys, tmp_path):
    code, out, err = call(
        capsys, "train", "--data", "wine", "--model", "linear", "--epochs", 3, "--out", tmp_path / "a"
    )
    assert code == 0 and err == "" and "accuracy" in out and "39 test samples" in out
    recipe = recipe_of(tmp_path / "a")
    assert (recipe["data"], recipe["model"], recipe["epochs"]) == ("wine", "linear", 3)


def recipe_of(folder) -> dict:
    return json.loads((folder / "run.json").read_text())["recipe"]


TINY = Recipe(data="wine", model="linear", objective="rec", options={"alpha": 0.5, "width": "mean"}, epochs=2, lr=0.5)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(presets.PRESETS, "tiny", TINY)
    monkeypatch.setitem(presets.PRESETS, "other", Recipe(data="digits"))


@pytest.mark.parametrize("place", [0, 2, 4])
def test_flags_override_a_preset_wherever_it_stands(capsys, tmp_path, tiny, place):
    flags = ["--epochs", "3", "--natural-epochs", "1"]
    flags.insert(place, "tiny")
    code, out, err = call(capsys, "train", *flags, "--lr-steps", 1, 0.1, 3, 0.2, "--lr-schedule", "steps",
                          "--class-weights", 1, 2, 1, "--out", tmp_path / "run")  # fmt: skip
    assert code == 0 and err == "" and "rec alpha=0.5 width=mean, eps 0.02: linear on wine" in out
    recipe = recipe_of(tmp_path / "run")
    assert (recipe["data"], recipe["epochs"], recipe["natural_epochs"], recipe["lr"]) == ("wine", 3, 1, 0.5)
    assert recipe["options"] == {"alpha": 0.5, "width": "mean"}
    assert recipe["lr_steps"] == [[1, 0.1], [3, 0.2]] and recipe["class_weights"] == [1, 2, 1]


def test_options_are_added_to_the_presets_but_not_to_another_objective(capsys, tmp_path, tiny):
    assert call(capsys, "train", "tiny", "--options", "alpha=0.25", "--out", tmp_path / "a")[0] == 0
    assert recipe_of(tmp_path / "a")["options"] == {"alpha": 0.25, "width": "mean"}
    assert call(capsys, "train", "tiny", "--objective", "natural", "--out", tmp_path / "b")[0] == 0
    assert recipe_of(tmp_path / "b")["options"] == {}


def test_a_recipe_from_a_file_or_a_run(capsys, tmp_path, tiny):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"data": "wine", "model": "linear", "epochs": 2, "options": {"alpha": 0.3}}))
    assert call(capsys, "train", file, "--options", "width=mean", "--seed", 4, "--out", tmp_path / "a")[0] == 0
    first = recipe_of(tmp_path / "a")
    assert (first["data"], first["model"], first["epochs"], first["seed"]) == ("wine", "linear", 2, 4)
    assert first["options"] == {"alpha": 0.3, "width": "mean"}
    for source in (tmp_path / "a", tmp_path / "a" / "run.json"):
        assert call(capsys, "train", source, "--seed", 5, "--out", tmp_path / "b")[0] == 0
        assert recipe_of(tmp_path / "b") == {**first, "seed": 5}


def test_a_step_in_parts_may_be_recorded(capsys, tmp_path):
    """Without a GPU it runs as it is written."""
    flags = ("train", "--data", "wine", "--model", "linear", "--epochs", 2, "--natural-epochs", 1, "--batch-size", 20)
    found = []
    for name, parts in (("whole", ()), ("parts", ("--accumulate", 4, "--cuda-graph"))):
        assert call(capsys, *flags, *parts, "--out", tmp_path / name)[0] == 0
        found.append(json.loads((tmp_path / name / "run.json").read_text()))
    assert (found[1]["recipe"]["accumulate"], found[1]["recipe"]["cuda_graph"]) == (4, True)
    assert found[1]["losses"] == pytest.approx(found[0]["losses"], rel=1e-5)


def test_training_says_when_nothing_is_left_of_the_task(capsys, tmp_path):
    flags = ("train", "--data", "wine", "--model", "linear", "--out", tmp_path / "run", "--objective", "natural")
    assert "Always naming" not in call(capsys, *flags, "--epochs", 40, "--lr", 0.02)[1]
    assert "Always naming the commonest class gives" in call(capsys, *flags, "--epochs", 1, "--lr", 1e-9)[1]


def test_a_radius_is_shown_where_it_plays_a_part(capsys, tmp_path):
    flags = ("train", "--data", "wine", "--epochs", 3, "--natural-epochs", 1, "--eps", 0.123, "--out", tmp_path / "run")
    assert "0.123" in call(capsys, *flags)[1].partition("Next")[0]
    assert "0.123" not in call(capsys, *flags, "--objective", "r2et")[1].partition("Next")[0]


def test_a_value_that_is_the_name_of_a_preset_is_none(capsys, tmp_path, tiny, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(capsys, "train", "--out", "other", "--data", "wine", "--model", "linear", "--epochs", 2)[0] == 0
    assert recipe_of(tmp_path / "other")["data"] == "wine"
    assert call(capsys, "train", "--out", "other", "tiny")[0] == 0
    assert recipe_of(tmp_path / "other")["lr"] == 0.5


def test_help_shows_a_presets_numbers(capsys, tiny):
    code, out, _ = call(capsys, "train", "tiny", "--help")
    assert code == 0 and "alpha=0.5 width=mean" in out and "(default: wine)" in out


def test_resume_takes_the_recipe_of_the_run(capsys, tmp_path, tiny, monkeypatch):
    flags = ["train", "tiny", "--seed", 3, "--checkpoint-every", 1, "--out", tmp_path / "run"]
    with monkeypatch.context() as patch:
        patch.setattr("pyxai_bounds.train.runs.save", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        code, _, err = call(capsys, *flags)
    assert code == 130 and err == f"interrupted; go on with: pyxai-bounds train --resume --out {tmp_path / 'run'}\n"
    code, out, err = call(capsys, "train", "--resume", "--out", tmp_path / "run")
    assert code == 0 and err == "" and "Continuing after step 2." in out
    assert recipe_of(tmp_path / "run")["seed"] == 3
    code, out, _ = call(capsys, "train", "--resume", "--out", tmp_path / "run")
    assert code == 0 and "is finished" in out
    code, out, _ = call(capsys, "train", "tiny", "--resume", "--out", tmp_path / "new run")
    assert code == 0 and "There is nothing to continue in" in out and f"evaluate '{tmp_path / 'new run'}' --eps" in out


def test_a_data_root_from_a_flag(capsys, tmp_path):
    rows = "\n".join(f"{i},{'ab'[i % 2]},{'good' if i % 3 else 'bad'}" for i in range(60))
    (tmp_path / "german-credit.csv").write_text(f"amount,kind,class\n{rows}\n")
    where = ("--data-root", tmp_path)
    assert call(capsys, "train", "rec-german", "--epochs", 2, "--out", tmp_path / "run", *where)[0] == 0
    code, out, _ = call(capsys, "certify", tmp_path / "run", "--k", 1, "--json", *where)
    assert code == 0 and json.loads(out)["samples"] == 12


def test_evaluate_prints_text_or_json_and_keeps_it(capsys, runs):
    code, out, err = call(capsys, "evaluate", runs / "fc-128", "--eps", 0.05, 0.1, "--k", 3, "--samples", 20, "--json")
    result = json.loads(out, parse_constant=pytest.fail)
    assert code == 0 and err == "" and json.loads((runs / "fc-128" / "evaluation.json").read_text()) == result
    assert (result["data"], result["model"], result["samples"]) == ("wine", "fc-128", 20)
    assert [row["eps"] for row in result["at"]] == [0.05, 0.1]
    code, out, err = call(capsys, "evaluate", runs / "fc-128", "--eps", 0.05, "--k", 3, "--samples", 20)
    assert code == 0 and err == "" and "fc-128" in out and "0.05" in out and "↑ proof" in out
    words = " ".join(out.split())
    for row in glossary.rows(result):
        assert row.attack in out
        if row.metric in glossary.METRICS:
            assert row.metric in out and row.entry.definition.split()[0] in words


SHORT = ("--eps", "0.05", "--k", "3", "--samples", "6", "--json")


@pytest.fixture(scope="module")
def of_gradient(runs):
    """What ``evaluate`` measures of the plain gradient."""
    assert cli.main(["evaluate", str(runs / "fc-128"), *SHORT]) == 0
    return json.loads((runs / "fc-128" / "evaluation.json").read_text())["at"][0]


@pytest.mark.parametrize(
    ("chosen", "told"),
    [
        (["saliency", "--of", "loss"], "saliency of loss"),
        (["gradient-x-input"], "gradient-x-input of logit"),
        (["integrated-gradients", "--points", "2"], "integrated-gradients of logit, 2 steps from 0"),
        (["smoothgrad", "--points", "2", "--noise", "0.5"], "smoothgrad of logit, 2 copies, noise 0.5"),
    ],
)
def test_evaluate_takes_other_explanations_and_writes_csv(capsys, runs, of_gradient, tmp_path, chosen, told):
    table = tmp_path / "new" / "numbers.csv"
    code, out, err = call(capsys, "evaluate", runs / "fc-128", *SHORT, "--csv", table, "--explanation", *chosen)
    found = json.loads(out)
    assert code == 0 and err == "" and found["explanation"] == told
    assert found["at"][0]["AA"] == of_gradient["AA"] and found["at"][0]["attacks"] != of_gradient["attacks"]
    lines = list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))
    assert {line["explanation"] for line in lines} == {"", told} and {line["data"] for line in lines} == {"wine"}
    (certified,) = [line for line in lines if line["metric"] == "certified topk"]
    assert float(certified["value"]) == found["at"][0]["certified_topk"] and certified["eps"] == "0.05"


def test_certify_and_report_take_other_explanations(capsys, runs, tmp_path):
    chosen = ("--explanation", "gradient-x-input", "--of", "loss", "--eps", 0.05, "--k", 3)
    model, dataset = train.load(runs / "fc-128"), data.load("wine")
    fn = explain.gradient_x_input(model, "loss")
    expected = certify(fn, dataset.test_x, dataset.test_y, eps=0.05, property=TopK(3))
    code, out, err = call(capsys, "certify", runs / "fc-128", *chosen, "--json")
    result = json.loads(out)
    assert code == 0 and err == "" and result["explanation"] == "gradient-x-input of loss"
    assert result["holds"] == expected.holds.tolist() and result["margin"] == expected.margin.tolist()
    plain = json.loads(call(capsys, "certify", runs / "fc-128", "--eps", 0.05, "--k", 3, "--json")[1])
    assert plain["explanation"] == "gradient of logit" and plain["margin"] != result["margin"]
    assert call(capsys, "report", runs / "fc-128", *chosen, "--out", tmp_path / "page.html")[0] == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "gradient-x-input of the true label&#x27;s loss" in page and f"{expected.fraction:.3f}" in page


def test_certify_prints_text_or_json(capsys, runs):
    code, text, err = call(capsys, "certify", runs / "fc-128", "--eps", 0.05, "--k", 3)
    assert code == 0 and err == "" and "of 39 certified" in text and "rounding: " in text
    code, out, err = call(capsys, "certify", runs / "fc-128", "--eps", 0.05, "--k", 3, "--json")
    result = json.loads(out)
    open_ = 39 - result["certified"] - sum(result["refuted"])
    assert open_ > 0 and f"{open_} open: neither proved nor refuted; --branches 64" in text
    assert code == 0 and err == ""
    assert (result["data"], result["eps"], result["k"], result["samples"]) == ("wine", 0.05, 3, 39)
    assert result["certified"] == sum(result["holds"]) and len(result["margin"]) == 39


def test_json_stays_json_where_every_feature_is_on_top(capsys, runs):
    code, out, _ = call(capsys, "certify", runs / "linear", "--k", 13, "--json")
    assert code == 0 and json.loads(out, parse_constant=pytest.fail)["margin"] == [None] * 39


def test_a_run_that_cannot_be_written_to_is_not_measured_in_vain(capsys, runs, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)
    code, out, err = call(capsys, "evaluate", runs / "linear")
    assert code == 2 and out == "" and "evaluation.json is kept: copy the run" in err


def test_a_reader_that_leaves_is_no_error(runs):
    command = [sys.executable, "-m", "pyxai_bounds", "certify", str(runs / "linear"), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.wait() == 1 and process.stderr.read() == ""
    process.stderr.close()


def test_report_compares_runs(capsys, runs, tmp_path):
    page = tmp_path / "page.html"
    code, out, err = call(capsys, "report", runs / "linear", runs / "fc-128", "--eps", 0.1, "--out", page)
    assert code == 0 and err == "" and str(page) in out
    assert "fc-128" in page.read_text(encoding="utf-8")


def test_info(capsys):
    code, out, _ = call(capsys, "info")
    assert code == 0
    for word in (
        "pyxai_bounds",
        "torch",
        "backend reference",
        "backend native",
        "Hopper kernels",
        "digits-parity",
        "cnn7",
        "rec-german",
    ):
        assert word in out


def test_info_explains_an_objective(capsys):
    code, out, err = call(capsys, "info", "--objective", "rec")
    assert code == 0 and err == "" and "2212.08507" in out and "\nalpha=0.1: weight of" in out and "\nof=logit: " in out
    assert "It has no options." in call(capsys, "info", "--objective", "natural")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "--objective", "rce"], "no objective 'rce'; choose from natural, rec"),
        (["train", "--out", "OUT", "--data", "mnst"], "no data set 'mnst'; choose one of digits"),
        (
            ["train", "rec-mnist-cnn", "--out", "OUT", "--data-root", "OUT"],
            "The data set mnist is not here: looked for",
        ),
        (["train", "rec-mnist", "--out", "OUT"], "no preset 'rec-mnist'; choose one of digits-cnn7"),
        (["train", "no.json", "--out", "OUT"], "No such file"),
        (["train", "bad.json", "--out", "OUT"], "bad.json holds no recipe: The recipe has lrr, which this version"),
        (["train", "EMPTY", "--out", "OUT"], "is not a run: it has no run.json and no checkpoint"),
        (["train", "--out", "OUT", "--objective", "rce"], "no objective 'rce'; choose from natural, rec"),
        (["train", "--out", "OUT", "--options", "beta=1"], "rec has no option beta; it has alpha, width"),
        (["train", "--out", "OUT", "--options", "alpha=x"], "alpha of rec is 'x'; it must be a number"),
        (["train", "--out", "OUT", "--device", "abacus"], "The device 'abacus' cannot be used here"),
        (["train", "--out", "RUN", "--resume", "--seed", "1"], "another recipe: seed (0 there, 1 now)"),
        (["evaluate", "OUT"], "is not a run"),
        (["evaluate", "RUN", "--eps", "0"], "all of them positive"),
        (["evaluate", "RUN", "--samples", "0"], "at least one sample"),
        (["evaluate", "RUN", "--csv", "EMPTY"], "is a folder: name a file"),
        (["evaluate", "RUN", "--explanation", "smoothgrad", "--noise", "0"], "--noise > 0, got 10 and 0"),
        (["evaluate", "RUN", "--explanation", "integrated-gradients", "--points", "0"], "at least one step"),
        (["train", "--out", "OUT", "--model", "resnet"], "no model 'resnet'; choose one of linear"),
        (["train", "--out", "OUT", "--data", "wine", "--model", "cnn7"], "cnn7 takes images"),
        (["train", "--out", "OUT", "--model", "no_such_module:f"], "cannot be imported"),
        (["train", "--out", "OUT", "--model", "os:getcwd"], "os:getcwd, called with ((1, 8, 8), 2): "),
        (["train", "--out", "OUT", "--data", "json:dumps"], "json:dumps, called without arguments: "),
        (["train", "--out", "OUT", "--epochs", "0"], "epochs=0"),
        (["certify", "OUT"], "is not a run"),
        (["certify", "RUN", "--eps", "-1"], "eps must be finite and ≥ 0"),
        (["certify", "RUN", "--k", "0"], "k must be at least 1"),
        (["report"], "at least one run"),
        (["report", "RUN", "--out", "EMPTY"], "is a folder: name a file"),
        (["report", "RUN", "--eps", "0"], "all of them positive"),
        (["demo", "--seeds", "0"], "at least one seed"),
    ],
)
def test_a_user_error_is_one_line_and_exit_code_2(capsys, runs, tmp_path, arguments, message):
    places = {"OUT": tmp_path / "out", "RUN": runs / "fc-128", "EMPTY": tmp_path, "bad.json": tmp_path / "bad.json"}
    places["bad.json"].write_text('{"lrr": 1}')
    code, out, err = call(capsys, *(places.get(a, a) for a in arguments))
    assert code == 2 and out == ""
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "RUN", "NONE"], "is not a run"),
        (["report", "RUN", "--out", "BELOW"], "a.txt is a file, not a folder"),
        (["evaluate", "RUN", "--csv", "BELOW"], "a.txt is a file, not a folder"),
        (["train", "--data", "wine", "--out", "BELOW"], "a.txt is a file, not a folder"),
        (["train", "--data", "wine", "--out", "FILE"], "a.txt is a file, not a folder"),
    ],
)
def test_nothing_is_computed_that_would_be_lost(capsys, monkeypatch, runs, tmp_path, arguments, message):
    places = {"RUN": runs / "linear", "NONE": tmp_path, "FILE": tmp_path / "a.txt", "BELOW": tmp_path / "a.txt" / "b"}
    places["FILE"].write_text("")

    def too_late(*arguments, **options):
        raise AssertionError("this is said after the work")

    for module, name in ((cli, "_measure"), (report, "evaluate"), (train.runs, "fit")):
        monkeypatch.setattr(module, name, too_late)
    code, _, err = call(capsys, *(places.get(a, a) for a in arguments))
    assert code == 2 and message in err and places["FILE"].read_text() == ""


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["train"],
        ["evaluate", "x", "--explanation", "lime"],
        ["certify", "x", "--k", "many"],
        ["train", "--out", "x", "--options", "alpha"],
    ],
)
def test_a_command_that_cannot_be_read_exits_with_2(capsys, arguments):
    code, _, err = call(capsys, *arguments)
    assert code == 2 and "Traceback" not in err and err


def test_the_demo_writes_a_page_a_table_and_runs(capsys, tmp_path, monkeypatch):
    recipes = {
        "linear": demo.Recipe(model="linear", objective="natural", epochs=3),
        "fc-128, REC": demo.Recipe(model="fc-128", epochs=2, natural_epochs=1),
    }
    monkeypatch.setattr(demo, "RECIPES", recipes)
    whole = data.load(Recipe().data)  # of which a few samples say as much here
    few = dataclasses.replace(whole, test_x=whole.test_x[:40], test_y=whole.test_y[:40])
    monkeypatch.setattr(data, "load", lambda *_: few)
    code, out, err = call(capsys, "demo", "--out", tmp_path, "--seeds", 2, "--seed", 4)
    assert code == 0 and err == ""
    assert "fc-128, REC" in out and "±" in out and "survived" in out
    assert {p.name for p in tmp_path.iterdir()} == {
        "linear", "fc-128-rec", "seed-5", "report.html", "results.json", "overview.png",
    }  # fmt: skip
    results = json.loads((tmp_path / "results.json").read_text())
    assert [(r["seed"], r["label"]) for r in results] == [(s, name) for s in (4, 5) for name in recipes]
    assert all(row["certified"] <= row["survived"] for r in results for row in r["at"] + r["curve"])
    assert call(capsys, "certify", tmp_path / "fc-128-rec")[0] == 0


def test_without_tyro_the_error_names_the_extra(capsys, monkeypatch):
    monkeypatch.setattr(cli, "_missing", "tyro")
    code, _, err = call(capsys, "info")
    assert code == 2 and "pip install 'pyxai-bounds[cli]'" in err


def test_without_matplotlib_the_demo_stops_before_it_trains(capsys, monkeypatch, tmp_path):
    for module in [
        name
        for name in sys.modules
        if name.startswith(("matplotlib", "pyxai_bounds.report.html", "pyxai_bounds.report.plots"))
    ]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delattr("pyxai_bounds.report.html", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = call(capsys, "demo", "--out", tmp_path / "demo")
    assert code == 2 and "pip install 'pyxai-bounds[report]'" in err and not (tmp_path / "demo").exists()


def test_python_dash_m_is_the_same_command():
    done = subprocess.run([sys.executable, "-m", "pyxai_bounds", "certify", "/nowhere"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: /nowhere is not a run")


def test_training_says_when_the_objective_never_runs(capsys, tmp_path):
    arguments = ["train", "--data", "wine", "--model", "linear", "--out", str(tmp_path / "run"), "--epochs", "1"]
    assert cli.main(arguments) == 0
    assert "All 1 epochs are natural: rec never runs" in capsys.readouterr().out
    assert cli.main([*arguments, "--natural-epochs", "0"]) == 0
    assert "are natural" not in capsys.readouterr().out
    assert cli.main([*arguments, "--checkpoint-every", "-1"]) == 2
    assert "checkpoint_every=-1 must be ≥ 0" in capsys.readouterr().err
