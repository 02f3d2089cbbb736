"""Tables from the files that UCI, OpenML and ProPublica publish; scaled and encoded by what the training rows say."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from pyxai_bounds.data.dataset import Dataset, split
from pyxai_bounds.data.files import damaged, find, missing, read_text, with_library

TRAIN_FRACTION = 0.8
# OpenML and others call some targets by other names than their authors do.
OTHER_TARGETS = ("class", "Class", "target")
MISSING = frozenset(("", "?", "NA", "NaN", "nan"))

Row = list[str]


@dataclass(frozen=True)
class Table:
    """How one published table is read. ``labels`` maps what its target column says to class names, in their order."""

    target: str
    labels: dict[str, str]
    how: str  # where to get it
    files: tuple[tuple[str, ...], ...]  # (one file,) that is split here, or (training file, test file)
    openml: int = 0  # its number there
    columns: tuple[str, ...] = ()  # the names, where a file has no header
    drop: tuple[str, ...] = ()
    only: tuple[str, ...] = ()  # if given, the features to keep
    categorical: tuple[str, ...] = ()  # columns of numbers that are names
    above_median: bool = False  # the target is a number: is it above the training rows' median?
    keep: Callable[[dict[str, str]], bool] = field(default=lambda row: True)


# The names of files that have no header, as their authors' documentation gives them.
_ADULT = (
    "age", "workclass", "fnlwgt", "education", "education-num", "marital-status", "occupation", "relationship", "race",
    "sex", "capital-gain", "capital-loss", "hours-per-week", "native-country", "class",
)  # fmt: skip
_GERMAN = (
    "checking_status", "duration", "credit_history", "purpose", "credit_amount", "savings_status", "employment",
    "installment_commitment", "personal_status", "other_parties", "residence_since", "property_magnitude", "age",
    "other_payment_plans", "housing", "existing_credits", "job", "num_dependents", "own_telephone", "foreign_worker",
    "class",
)  # fmt: skip
_BANK = {"no": "no deposit", "yes": "deposit", "1": "no deposit", "2": "deposit"}
_CRIME_TARGET = "ViolentCrimesPerPop"


def _screened(row: dict[str, str]) -> bool:
    """ProPublica's own selection: the charge belongs to the score, and there is a case."""
    days = row.get("days_b_screening_arrest", "0")
    return (
        days not in MISSING and abs(float(days)) <= 30
        and row.get("is_recid") != "-1" and row.get("c_charge_degree") != "O" and row.get("score_text") != "N/A"
    )  # fmt: skip


TABLES: dict[str, Table] = {
    "adult": Table(
        target="class", labels={"<=50K": "at most 50K", ">50K": "above 50K"}, columns=_ADULT, openml=1590,
        files=(("adult.data", "adult.test"), ("adult.data.csv", "adult.test.csv"), ("adult.csv",), ("adult.arff",)),
        how="adult.data and adult.test of https://archive.ics.uci.edu/dataset/2/adult",
    ),
    "german-credit": Table(
        target="class", labels={"1": "good", "2": "bad", "good": "good", "bad": "bad"}, columns=_GERMAN, openml=31,
        files=(
            ("german.data",),
            ("german-credit.csv",), ("german-credit.arff",), ("credit-g.csv",), ("credit-g.arff",),
        ),
        how="german.data of https://archive.ics.uci.edu/dataset/144/statlog+german+credit+data",
    ),
    "credit": Table(
        target="y", labels={"0": "paid", "1": "default"}, openml=42477,
        files=(
            ("credit.csv",), ("credit.arff",),
            ("default-of-credit-card-clients.csv",), ("default-of-credit-card-clients.arff",),
        ),
        categorical=("x2", "x3", "x4", "x6", "x7", "x8", "x9", "x10", "x11"), drop=("id",),
        how="the CSV or ARFF file of https://www.openml.org/d/42477",
    ),
    "bank": Table(
        target="y", labels=_BANK, openml=1461,
        files=(("bank-full.csv",), ("bank-additional-full.csv",), ("bank.csv",), ("bank.arff",)),
        how="bank-full.csv of https://archive.ics.uci.edu/dataset/222/bank+marketing",
    ),
    "compas": Table(
        target="two_year_recid", labels={"0": "no new charge", "1": "new charge"}, keep=_screened,
        files=(("compas-scores-two-years.csv",), ("compas.csv",)),
        only=("sex", "age", "race", "juv_fel_count", "juv_misd_count", "juv_other_count", "priors_count",
              "c_charge_degree"),
        how="compas-scores-two-years.csv of https://github.com/propublica/compas-analysis",
    ),
    "crime": Table(
        target=_CRIME_TARGET, labels={"0": "at most the median", "1": "above the median"}, above_median=True,
        files=(("communities.data",), ("crime.csv",), ("crime.arff",), ("communities.csv",), ("communities.arff",)),
        # Without a header the first five columns name the place and the last is the target.
        columns=("state", "county", "community", "communityname", "fold",
                 *(f"column{i}" for i in range(6, 128)), _CRIME_TARGET),
        drop=("state", "county", "community", "communityname", "fold", "Unnamed: 0", ""),
        how="communities.data of https://archive.ics.uci.edu/dataset/183/communities+and+crime",
    ),
}  # fmt: skip


def load_table(name: str, root: Path) -> Dataset:
    """A published table, one class per row.

    Numbers are scaled to [0, 1] on the training rows, so that a radius is a share of a column's range; test rows may go
    beyond, hence no clip. Names become one-hot columns of the values that the training rows have. Where the authors
    publish no test part, a seed-0 permutation leaves a fifth of the rows for testing.
    """
    table = TABLES[name]
    folders = [root / name, root]
    paths = next((paths for names in table.files if (paths := find(folders, names))), None)
    if paths is None:
        code = (
            f"import openml; d = openml.datasets.get_dataset({table.openml}); x, *_ = d.get_data(); "
            f"x.to_csv('{folders[0] / f'{name}.csv'}', index=False)"
        )
        how = f"put {table.how} into {folders[0]}"
        wanted = ", or ".join(" and ".join(names) for names in table.files)
        missing(name, wanted, folders, with_library("openml", code, how) if table.openml else how)
    parts = [_features_and_target(path, table) for path in paths]
    columns = parts[0][0]
    if any(part[0] != columns for part in parts):
        raise ValueError(f"{paths[0]} and {paths[1]} have different columns, so they are not parts of one table.")
    if len(parts) == 2:
        (_, train_rows, train_target), (_, test_rows, test_target) = parts
    else:
        _, rows, target = parts[0]
        train, test = (part.tolist() for part in split(len(rows), round(TRAIN_FRACTION * len(rows))))
        train_rows, test_rows = [rows[i] for i in train], [rows[i] for i in test]
        train_target, test_target = [target[i] for i in train], [target[i] for i in test]
    encoder = Encoder.fit(columns, train_rows, table.categorical)
    labels = _labeller(table, train_target, paths[0])
    return Dataset(
        name=name,
        train_x=encoder(train_rows), train_y=labels(train_target),
        test_x=encoder(test_rows), test_y=labels(test_target),
        classes=len(set(table.labels.values())), clip=None, image_shape=None,
        feature_names=encoder.feature_names, class_names=tuple(dict.fromkeys(table.labels.values())),
        unit="shares of each column's range",
    )  # fmt: skip


@dataclass(frozen=True)
class Encoder:
    """Columns of text to columns of numbers, fixed by the rows it was fitted on and by nothing else.

    numeric: (column, least, greatest, mean) of the fitted rows; categorical: (column, the values of the fitted rows).
    """

    columns: tuple[str, ...]
    numeric: dict[str, tuple[float, float, float]]
    categorical: dict[str, tuple[str, ...]]

    @classmethod
    def fit(cls, columns: Sequence[str], rows: Sequence[Row], categorical: Sequence[str] = ()) -> Encoder:
        """A column is numeric where every value that is not missing is a number and it is not declared categorical."""
        numeric: dict[str, tuple[float, float, float]] = {}
        names: dict[str, tuple[str, ...]] = {}
        for i, column in enumerate(columns):
            values = [row[i] for row in rows]
            numbers = None if column in categorical else _numbers(v for v in values if v not in MISSING)
            if numbers:
                numeric[column] = min(numbers), max(numbers), math.fsum(numbers) / len(numbers)
            else:
                names[column] = tuple(sorted(set(values)))
        return cls(tuple(columns), numeric, names)

    @property
    def feature_names(self) -> tuple[str, ...]:
        """In the order of the result: a number's column, or column=value for each value of the fitted rows."""
        return tuple(
            name
            for column in self.columns
            for name in ([column] if column in self.numeric else [f"{column}={v}" for v in self.categorical[column]])
        )

    def __call__(self, rows: Sequence[Row]) -> Tensor:
        """Rows as float32 [N, features].

        A missing number becomes the fitted mean, a name that the fitted rows do not have becomes zeros.
        Raises ValueError for text in a column of numbers.
        """
        encoded = []
        for i, column in enumerate(self.columns):
            values = [row[i] for row in rows]
            if column in self.numeric:
                low, high, mean = self.numeric[column]
                numbers = _numbers("nan" if v in MISSING else v for v in values)
                if numbers is None:
                    raise ValueError(f"Column {column} holds numbers in the training rows, but text in other rows.")
                x = torch.tensor(numbers, dtype=torch.float64)
                x = (torch.where(x.isnan(), mean, x) - low) / ((high - low) or 1.0)
                encoded.append(x.unsqueeze(1))
            else:
                place = {value: j for j, value in enumerate(self.categorical[column])}
                places = torch.tensor([place.get(value, len(place)) for value in values])
                encoded.append(torch.nn.functional.one_hot(places, len(place) + 1)[:, :-1].double())
        return torch.cat(encoded, 1).float()


def _numbers(values: Iterable[str]) -> list[float] | None:
    try:
        return [float(value) for value in values]
    except ValueError:
        return None


def _labeller(table: Table, train_target: Row, path: Path) -> Callable[[Row], Tensor]:
    """Text of the target column → class numbers [N]."""
    if table.above_median:
        numbers = _numbers(train_target)
        if numbers is None:
            raise damaged(path, f"its target {table.target} is not a number throughout")
        median = float(torch.tensor(numbers, dtype=torch.float64).median())
        return lambda target: torch.tensor([int(float(t) > median) for t in target])
    order = {name: i for i, name in enumerate(dict.fromkeys(table.labels.values()))}

    def labels(target: Row) -> Tensor:
        unknown = sorted({t for t in target if t not in table.labels})
        if unknown:
            raise damaged(path, f"its target {table.target} says {unknown[:3]}, which is none of {list(table.labels)}")
        return torch.tensor([order[table.labels[t]] for t in target])

    return labels


def _features_and_target(path: Path, table: Table) -> tuple[tuple[str, ...], list[Row], Row]:
    """Names of the features, rows of the features, and the target column."""
    columns, rows = read_table(path, table.columns)
    target = next((t for t in (table.target, *OTHER_TARGETS) if t in columns), None)
    if target is None:
        raise ValueError(f"{path} has no column {table.target}; its columns are {', '.join(columns[:30])}.")
    rows = [row for row in rows if table.keep(dict(zip(columns, row, strict=True)))]
    wanted = [
        i
        for i, c in enumerate(columns)
        if c != target and c not in table.drop and (not table.only or c in table.only) and c not in columns[:i]
    ]
    absent = [c for c in table.only if c not in columns]
    if absent or not rows or not wanted:
        raise ValueError(f"{path} lacks {', '.join(absent) or 'rows or columns'}: it is no such table.")
    at = columns.index(target)
    features = tuple(columns[i] for i in wanted)
    return features, [[row[i] for i in wanted] for row in rows], [row[at].rstrip(".") for row in rows]


def read_table(path: Path, names: Sequence[str] = ()) -> tuple[list[str], list[Row]]:
    """Columns and rows of a CSV file (separated by commas, semicolons or spaces) or an ARFF file, plain or .gz.

    ``names`` are the columns of a CSV file without a header: one that has as many columns, and no name of a target in
    its first row. Raises ValueError with the line where rows disagree.
    """
    text = read_text(path)
    if path.name.removesuffix(".gz").endswith(".arff"):
        return _read_arff(path, text)
    lines = [(i, line) for i, line in enumerate(text.splitlines(), 1) if line.strip() and not line.startswith("|")]
    if not lines:
        raise damaged(path, "it is empty")
    first = lines[0][1]
    delimiter = max(",; \t", key=first.count)
    reader = csv.reader((line.strip() for _, line in lines), delimiter=delimiter, skipinitialspace=True)
    rows = [[value.strip() for value in row] for row in reader]
    if len(rows[0]) == len(names) and not any(target in rows[0] for target in (names[-1], *OTHER_TARGETS)):
        columns = list(names)
    else:
        columns = rows.pop(0)
        lines.pop(0)
    _check_rows(path, columns, rows, [number for number, _ in lines])
    return columns, rows


def _read_arff(path: Path, text: str) -> tuple[list[str], list[Row]]:
    columns: list[str] = []
    lines = text.splitlines()
    for i, line in enumerate(lines):
        word, _, rest = line.strip().partition(" ")
        if word.lower() == "@attribute":
            rest = rest.strip()
            quote = rest[0] if rest[:1] in ("'", '"') else ""
            columns.append(rest[1:].partition(quote)[0] if quote else rest.split()[0])
        elif word.lower() == "@data":
            body = [(j, x) for j, x in enumerate(lines[i + 1 :], i + 2) if x.strip() and not x.startswith("%")]
            reader = csv.reader((x.strip() for _, x in body), quotechar="'", escapechar="\\", skipinitialspace=True)
            rows = [[value.strip().strip('"') for value in row] for row in reader]
            _check_rows(path, columns, rows, [number for number, _ in body])
            return columns, rows
    raise damaged(path, "it has no @data section")


def _check_rows(path: Path, columns: Sequence[str], rows: Sequence[Row], numbers: Sequence[int]) -> None:
    for row, number in zip(rows, numbers, strict=False):
        if len(row) != len(columns):
            raise damaged(path, f"line {number} has {len(row)} values, but there are {len(columns)} columns")
    if not rows:
        raise damaged(path, "it has no rows")
