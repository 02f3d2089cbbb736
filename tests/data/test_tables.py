"""Tables, read from small files in the formats of their publishers; scaled and encoded on the training rows alone."""

import gzip
import random

import pytest
import torch

from pyxai_bounds import data
from pyxai_bounds.data.tables import Encoder, read_table


def write(path, text: str):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


ADULT = (
    "{age}, {work}, 77516, Bachelors, 13, Never-married, Adm-clerical, Not-in-family, White, Male, 2174, 0, 40, "
    "United-States, {label}\n"
)


def write_adult(folder) -> None:
    train = [(20, "Private", "<=50K"), (40, "State-gov", ">50K"), (30, "?", "<=50K"), (60, "Private", ">50K")]
    test = [(80, "Never-worked", "<=50K."), (20, "State-gov", ">50K.")]
    write(folder / "adult.data", "".join(ADULT.format(age=a, work=w, label=k) for a, w, k in train) + "\n")
    rows = "".join(ADULT.format(age=a, work=w, label=k) for a, w, k in test)
    write(folder / "adult.test", "|1x3 Cross validator\n" + rows)


def test_released_code_defect_scaler_and_encoder_are_fitted_on_the_training_rows_alone(tmp_path):
    """The released code of REC fits a scaler and an encoder to each part: columns then mean other things in each."""
    write_adult(tmp_path / "adult")
    d = data.load("adult", tmp_path)
    column = {name: i for i, name in enumerate(d.feature_names)}
    work = [name for name in d.feature_names if name.startswith("workclass=")]
    assert work == ["workclass=?", "workclass=Private", "workclass=State-gov"]  # the training rows' values, no others
    age = column["age"]
    assert d.train_x[:, age].tolist() == pytest.approx([0, 0.5, 0.25, 1])
    assert d.test_x[:, age].tolist() == pytest.approx([1.5, 0])  # 80 years lie beyond the training rows' 20 to 60
    by_row = d.test_x[:, [column[name] for name in work]]
    assert by_row.tolist() == [[0, 0, 0], [0, 0, 1]]  # a value that was never trained on is none of the known ones
    assert d.train_x.shape[1] == d.test_x.shape[1] == len(d.feature_names)
    assert d.train_y.tolist() == [0, 1, 0, 1] and d.test_y.tolist() == [0, 1]
    # Other test rows change nothing in the training part.
    write(tmp_path / "adult" / "adult.test", ADULT.format(age=1000, work="Without-pay", label=">50K."))
    again = data.load("adult", tmp_path)
    assert torch.equal(again.train_x, d.train_x) and again.feature_names == d.feature_names


def test_a_table_with_one_file_is_split_before_anything_is_fitted(tmp_path):
    rows = [f"{v},{'abc'[v % 3]},{'good' if v % 2 else 'bad'}" for v in range(50)]
    write(tmp_path / "credit-g.csv", "\n".join(["amount,kind,class", *rows]))
    d = data.load("german-credit", tmp_path)
    assert len(d.train_x) == 40 and len(d.test_x) == 10 and d.class_names == ("good", "bad")
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    train, test = order[:40], order[40:]
    low, high = int(train.min()), int(train.max())
    for x, y, values in ((d.train_x, d.train_y, train), (d.test_x, d.test_y, test)):
        torch.testing.assert_close(x[:, 0], (values - low).float() / (high - low))
        assert torch.equal(y, 1 - values % 2)
        assert torch.equal(x[:, 1:].argmax(1), values % 3)


def test_missing_numbers_become_the_training_mean():
    encoder = Encoder.fit(["a"], [["1"], ["3"], ["?"], ["8"]])
    assert encoder([["?"], ["8"], ["-6"]]).flatten().tolist() == pytest.approx([3 / 7, 1, -1])


def test_a_constant_column_and_text_where_numbers_were():
    encoder = Encoder.fit(["a", "b"], [["5", "x"], ["5", "y"]])
    assert encoder([["5", "x"], ["7", "z"]]).tolist() == [[0, 1, 0], [2, 0, 0]]
    with pytest.raises(ValueError, match="Column a holds numbers"):
        encoder([["five", "x"]])


def german_rows(count: int = 20) -> str:
    line = "A11 {} A34 A43 1169 A65 A75 4 A93 A101 4 A121 67 A143 A152 2 A173 1 A192 A201 {}"
    return "\n".join(line.format(i, 1 + i % 2) for i in range(count))


def test_german_credit_as_uci_publishes_it(tmp_path):
    path = tmp_path / "german-credit" / "german.data.gz"
    path.parent.mkdir()
    path.write_bytes(gzip.compress(german_rows().encode()))
    d = data.load("german-credit", tmp_path)
    assert len(d.train_x) == 16 and d.feature_names[:2] == ("checking_status=A11", "duration")
    assert torch.equal(torch.cat((d.train_y, d.test_y)).bincount(), torch.tensor([10, 10]))


def test_bank_marketing_with_semicolons_and_quotes(tmp_path):
    rows = [f'{30 + i};"job {i % 3}";{i * 100};"{"yes" if i % 4 == 0 else "no"}"' for i in range(20)]
    write(tmp_path / "bank" / "bank-full.csv", "\n".join(['"age";"job";"balance";"y"', *rows]))
    d = data.load("bank", tmp_path)
    assert d.feature_names == ("age", "job=job 0", "job=job 1", "job=job 2", "balance")
    assert int(torch.cat((d.train_y, d.test_y)).sum()) == 5 and d.class_names == ("no deposit", "deposit")


def test_credit_from_openmls_arff(tmp_path):
    header = "% a comment\n@RELATION 'credit'\n\n@attribute id INTEGER\n@ATTRIBUTE x1 NUMERIC\n@ATTRIBUTE 'x2' {1,2}\n"
    rows = "\n".join(f"{i},{i * 10},{1 + i % 2},{int(i % 5 == 0)}" for i in range(20))
    write(tmp_path / "credit.arff", f"{header}@ATTRIBUTE y {{0,1}}\n@DATA\n% another\n{rows}\n")
    d = data.load("credit", tmp_path)
    assert d.feature_names == ("x1", "x2=1", "x2=2") and d.class_names == ("paid", "default")


def test_compas_keeps_the_rows_that_propublica_kept(tmp_path):
    header = "id,sex,age,race,juv_fel_count,juv_misd_count,juv_other_count,priors_count,c_charge_degree,"
    header += "days_b_screening_arrest,is_recid,score_text,priors_count,two_year_recid"
    kept = [f"{i},Male,{20 + i},Other,0,0,0,{i},F,{i - 10},0,Low,{i},{i % 2}" for i in range(20)]
    dropped = [
        "90,Male,99,Other,0,0,0,1,F,31,0,Low,1,1", "91,Male,99,Other,0,0,0,1,F,,0,Low,1,1",
        "92,Male,99,Other,0,0,0,1,F,0,-1,Low,1,1", "93,Male,99,Other,0,0,0,1,O,0,0,Low,1,1",
        "94,Male,99,Other,0,0,0,1,F,0,0,N/A,1,1",
    ]  # fmt: skip
    write(tmp_path / "compas" / "compas-scores-two-years.csv", "\n".join([header, *kept, *dropped]))
    d = data.load("compas", tmp_path)
    assert len(d.train_x) + len(d.test_x) == 20
    assert d.feature_names.count("priors_count") == 1 and "id" not in d.feature_names


def test_crime_is_above_the_training_rows_median(tmp_path):
    rng = random.Random(0)
    targets = [rng.random() for _ in range(25)]
    rows = [
        ",".join(["8", "?", "?", f"town{i}", "1", *["0.5"] * 121, "?" if i == 3 else f"{i}", f"{t:.3f}"])
        for i, t in enumerate(targets)
    ]
    write(tmp_path / "crime" / "communities.data", "\n".join(rows))
    d = data.load("crime", tmp_path)
    assert len(d.feature_names) == 122 and d.classes == 2
    order = torch.randperm(25, generator=torch.Generator().manual_seed(0))
    values = torch.tensor([float(f"{t:.3f}") for t in targets], dtype=torch.float64)[order]
    assert torch.equal(d.train_y, (values[:20] > values[:20].median()).long())
    assert torch.equal(d.test_y, (values[20:] > values[:20].median()).long())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("a,b,class\n1,2,good\n1,2\n", "line 3 has 2 values, but there are 3 columns"),
        ("a,b,class\n", "no rows"),
        ("a,b,c\n1,2,3\n", "no column class; its columns are a, b, c"),
        ("a,class\n" + "1,good\n" * 9 + "1,perhaps\n", r"class says \['perhaps'\], which is none of"),
        (b"a,class\n\xff\xfe", "not UTF-8"),
    ],
)
def test_a_damaged_table(tmp_path, text, message):
    path = tmp_path / "german-credit.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        data.load("german-credit", tmp_path)


def test_an_arff_file_without_data(tmp_path):
    with pytest.raises(ValueError, match="no @data section"):
        read_table(write(tmp_path / "x.arff", "@relation x\n@attribute a numeric\n"))
