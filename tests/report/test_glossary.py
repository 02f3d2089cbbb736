"""The glossary: the page of the docs is its own, and a CSV says what each number is."""

import csv
from pathlib import Path

import pytest

from pyxai_bounds.report import glossary

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
FOUND = {
    "samples": 3, "k": 5, "rounding": "outward", "NA": 0.5, "unstable_relus": None,
    "certified_radius": {"median": 0.25},
    "at": [
        {"eps": eps, "AA": 0.25, "certified_topk": 0.125, "attacks": {"er-stop": {"kendall": 1.0, "mse": eps}}}
        for eps in (0.01, 0.02)
    ],
}  # fmt: skip


def test_the_page_is_that_of_the_glossary():
    again = "write it anew: python -m pyxai_bounds.report.glossary > docs/metrics.md"
    assert PAGE.read_text(encoding="utf-8") == glossary.markdown(), again


def test_entries_are_one_line_and_certificates_say_that_they_are():
    for name, metric in {**glossary.METRICS, **glossary.COMPARISONS}.items():
        assert (
            metric.definition and metric.unit and metric.source and "\n" not in metric.line and "|" not in metric.line
        )
        assert (metric.kind == "certified") <= ("certified" in name), name
        assert metric.kind != "empirical" or "certified" not in name, name
    assert "higher is better; certified" in glossary.entry("certified topk").line
    with pytest.raises(KeyError):
        glossary.entry("certified luck")


def test_the_csv_holds_every_number_with_its_settings():
    settings = {"run": "runs/a,b", "data": "wine", "model": "linear", "explanation": "gradient of logit", "seed": 7}
    lines = list(csv.DictReader(glossary.csv_text(settings, FOUND).splitlines()))
    assert len(lines) == 3 + 2 * 4 and tuple(lines[0]) == glossary.COLUMNS
    for line in lines:
        assert (line["run"], line["data"], line["seed"], line["samples"]) == ("runs/a,b", "wine", "7", "3")
    by_name = {(line["eps"], line["attack"], line["metric"]): line for line in lines}
    certified, attacked = by_name["0.01", "", "certified topk"], by_name["0.02", "er-stop", "mse"]
    assert (certified["value"], certified["kind"], certified["better"]) == ("0.125", "certified", "higher")
    assert (attacked["value"], attacked["kind"], attacked["better"]) == ("0.02", "empirical", "lower")
    assert certified["explanation"] == attacked["explanation"] == "gradient of logit"
    assert by_name["0.01", "", "AA"]["explanation"] == "", "an accuracy is about no explanation"
    assert by_name["", "", "unstable relus"]["value"] == "" and by_name["", "", "certified radius median"]["eps"] == ""
