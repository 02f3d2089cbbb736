"""Reports: each number against a plain computation, the refusal to hide a broken certificate, and the page itself."""

import base64
import dataclasses
import itertools
import json
from html import escape
from html.parser import HTMLParser

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F

from pyxai_bounds import TopK, attack, bound, certify, data, explain
from pyxai_bounds.certify.metrics import accuracy, certain_members, same_class_cosine, unstable_relu_fraction
from pyxai_bounds.interval import Interval
from pyxai_bounds.report import SoundnessError, evaluate
from pyxai_bounds.report.evaluate import rounded_down
from pyxai_bounds.report.glossary import entry
from pyxai_bounds.report.html import page, write_page
from pyxai_bounds.report.plots import plot_curves, plot_overview, plot_samples
from pyxai_bounds.train import fit

# --- metrics ------------------------------------------------------------------------------------------------


class Functional(nn.Module):
    """ReLUs of three kinds, one of them in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 2)
        self.module = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.c(torch.relu(F.relu(self.b(self.module(self.a(x))))))


def test_unstable_relus_are_counted_by_the_definition():
    torch.manual_seed(0)
    model, x, eps = Functional(), torch.rand(9, 4), 0.1
    first = bound(model.a)(Interval.linf(x, eps))
    second = bound(lambda x: model.b(torch.relu(model.a(x))))(Interval.linf(x, eps))
    third = Interval(second.lower.clamp(min=0).detach(), second.upper.clamp(min=0).detach())  # the ReLU after the ReLU
    boxes = (first, second, third)
    unstable = sum(int(((b.lower <= 0) & (b.upper > 0)).sum()) for b in boxes)
    expected = unstable / sum(b.mid.numel() for b in boxes)
    assert 0 < expected < 1
    assert unstable_relu_fraction(model, x, eps) == expected
    assert unstable_relu_fraction(model, x, eps, batch_size=4) == pytest.approx(expected)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_no_relus_no_fraction():
    assert unstable_relu_fraction(nn.Linear(4, 2), torch.rand(3, 4), 0.1) is None


def test_cosine_is_the_mean_over_pairs():
    torch.manual_seed(0)
    v, y = torch.randn(12, 2, 3), torch.tensor([0, 1, 2] * 3 + [0, 0, 7])
    per_class = []
    for label in (0, 1, 2):
        group = v[y == label].flatten(1)
        pairs = [F.cosine_similarity(a, b, dim=0).item() for a, b in itertools.combinations(group, 2)]
        per_class.append(sum(pairs) / len(pairs))
    assert same_class_cosine(v, y) == pytest.approx(sum(per_class) / 3, abs=1e-6)
    assert same_class_cosine(torch.ones(5, 4), torch.zeros(5)) == pytest.approx(1.0)


def test_accuracy():
    model = nn.Identity()
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0]])
    assert accuracy(model, x, torch.tensor([0, 1, 1]), batch_size=2) == pytest.approx(2 / 3)


def test_certain_members_are_members_of_every_corner_and_all_of_them_is_the_property():
    generator = torch.Generator().manual_seed(0)
    property, all_certain = TopK(2), 0
    for _ in range(200):
        mid = torch.randn(1, 5, generator=generator, dtype=torch.float64)
        rad = 0.3 * torch.rand(1, 5, generator=generator, dtype=torch.float64)
        box = Interval.of(mid, rad)
        certain = certain_members(property, box)[0]
        corners = mid + rad * torch.tensor(list(itertools.product((-1.0, 1.0), repeat=5)), dtype=torch.float64)
        tops = property.top(corners)
        assert tops[:, certain].all()
        holds = bool(property.margin(mid, box) > 0)
        assert (int(certain.sum()) == 2) == holds
        all_certain += holds
    assert 20 < all_certain < 180


@pytest.mark.parametrize(
    ("radius", "text"), [(0.0296, "0.029"), (0.00098, "0.00098"), (0.0, "0"), (0.0199999, "0.019")]
)
def test_a_radius_is_never_rounded_up(radius, text):
    assert rounded_down(radius) == text


# --- evaluations --------------------------------------------------------------------------------------------


def small(name: str, samples: int) -> data.Dataset:
    d = data.load(name)
    return dataclasses.replace(d, test_x=d.test_x[:samples], test_y=d.test_y[:samples])


@pytest.fixture(scope="module")
def evaluations():
    dataset = small("digits-parity", 24)
    results = []
    for label, layers in (
        ("linear", [nn.Flatten(), nn.Linear(64, 2)]),
        ("dense", [nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 2)]),
    ):
        torch.manual_seed(0)
        model = nn.Sequential(*layers)
        fit(model, dataset.train_x, dataset.train_y, epochs=5, lr=5e-3)
        results.append(evaluate(model, dataset, label, attack_steps=5, pictures=2))
    return results


def test_an_evaluation_orders_certified_below_survived(evaluations):
    linear, dense = evaluations
    assert linear.unstable is None and linear.cosine == pytest.approx(1) and linear.accuracy > 0.7
    for evaluation in evaluations:
        assert [row.eps for row in evaluation.at] == [0.01, 0.02]
        assert [row.eps for row in evaluation.curve] == [0.005, 0.01, 0.02, 0.03, 0.05]
        assert all(0 <= row.certified <= row.survived <= 1 for row in (*evaluation.at, *evaluation.curve))
        for column in ("certified", "survived"):
            values = [getattr(row, column) for row in evaluation.curve]
            assert values == sorted(values, reverse=True)
        assert len(evaluation.samples) == 2
    assert all(row.certified == row.survived == 1 for row in linear.curve)
    assert (linear.radius >= 0.05).all() and dense.at[0].certified < 1
    assert 0 < dense.unstable < 1
    json.dumps([e.summary() for e in evaluations], allow_nan=False)


def test_samples_hold_what_the_engine_says(evaluations):
    sample = evaluations[1].samples[0]
    assert (sample.lower <= sample.attribution).all() and (sample.attribution <= sample.upper).all()
    assert int(sample.top.sum()) == 5 and (sample.certain <= sample.top).all()
    assert sample.holds == (int(sample.certain.sum()) == 5)


def test_a_broken_certificate_stops_the_report(monkeypatch):
    dataset = small("digits-parity", 6)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    honest = attack.pgd

    def liar(*args, **kwargs):
        found = honest(*args, **kwargs)
        return dataclasses.replace(found, broken=torch.ones_like(found.broken))

    monkeypatch.setattr(attack, "pgd", liar)
    with pytest.raises(SoundnessError, match="broke 6 certified samples, the first with index 0"):
        evaluate(model, dataset, "linear", attack_steps=1)


def test_radii_must_be_positive():
    with pytest.raises(ValueError, match="at least one radius"):
        evaluate(nn.Flatten(), small("wine", 3), "none", eps=())


def test_another_explanation_is_certified_attacked_and_named():
    dataset = small("wine", 6)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(13, 8), nn.ReLU(), nn.Linear(8, 3))
    fn = explain.gradient_x_input(model)
    found = evaluate(model, dataset, "dense", explanation=fn, explained_as="mine", eps=(0.1,), attack_steps=2)
    certificate = certify(fn, dataset.test_x, dataset.test_y, eps=0.1, property=TopK(5))
    assert found.at[0].certified == certificate.fraction and torch.equal(
        found.samples[0].attribution, certificate.nominal[0]
    )
    assert "mine" in page([found]) and found.summary()["explanation"] == "mine"
    with pytest.raises(ValueError, match=r"inputs \[1, 13\] must have their shape, but has \[1\]"):
        evaluate(model, dataset, "sum", explanation=lambda x, y: fn(x, y).sum(1))


# --- pictures and the page ----------------------------------------------------------------------------------


class Links(HTMLParser):
    """Every tag closed in order, and what the page refers to."""

    VOID = frozenset({"img", "meta", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.pictures: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        values = dict(attrs)
        self.references += [values[name] for name in ("src", "href", "action", "data") if name in values]
        if tag == "img":
            assert values["alt"]
            self.pictures.append(values["src"])
        assert tag not in ("script", "link", "iframe")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.text.append(text)


def parse(text: str) -> Links:
    links = Links()
    links.feed(text)
    links.close()
    assert not links.open
    return links


def test_the_page_is_self_contained_and_holds_the_pictures(evaluations, tmp_path):
    path = write_page(tmp_path / "deep" / "page.html", evaluations)
    text = path.read_text(encoding="utf-8")
    links = parse(text)
    assert "http" not in text and "url(" not in text and "@import" not in text
    # The curves, two samples, and each network's widths.
    assert len(links.pictures) == 5 and links.references == links.pictures
    for picture in links.pictures:
        assert base64.b64decode(picture.removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")
    shown = " ".join(links.text)
    for evaluation in evaluations:
        assert evaluation.label in shown and f"{evaluation.accuracy:.3f}" in shown
        assert all(f"{row.certified:.3f}" in shown and f"{row.survived:.3f}" in shown for row in evaluation.at)
    for metric in ("NA", "certified topk", "survived topk", "certified radius median", "unstable relus"):
        assert f'title="{escape(entry(metric).line)}"' in text, "over its column"
        assert entry(metric).definition in shown and entry(metric).details in shown, "in the guide"
    assert "Beware of the linear model" in shown and [p.name for p in path.parent.iterdir()] == ["page.html"]


def test_the_page_says_when_a_certificate_is_worth_nothing(evaluations):
    linear, dense = evaluations
    worse = dataclasses.replace(dense, accuracy=linear.accuracy)
    better = dataclasses.replace(dense, accuracy=linear.accuracy + 0.1)
    assert "No more accurate than the linear model" in page([linear, worse])
    assert "No more accurate than the linear model" not in page([linear, better])
    assert "There is no linear model in this table" in page([dense])


def test_labels_are_escaped(evaluations):
    nasty = dataclasses.replace(evaluations[1], label="<b>&'\"")
    text = page([nasty])
    parse(text)
    assert "<b>" not in text and "&lt;b&gt;" in text


def test_nothing_and_different_tables_are_refused(evaluations):
    with pytest.raises(ValueError, match="at least one evaluation"):
        page([])
    with pytest.raises(ValueError, match="different radii, k or explanations"):
        page([evaluations[0], dataclasses.replace(evaluations[1], property=TopK(3))])
    with pytest.raises(ValueError, match="different radii, k or explanations"):
        page([evaluations[0], dataclasses.replace(evaluations[1], explained_as="saliency")])


def test_plots_return_figures(evaluations):
    figure, axes = plot_curves(evaluations)
    assert isinstance(figure, Figure) and axes.figure is figure
    for certified, survived in zip(axes.lines[::2], axes.lines[1::2], strict=True):
        eps, radii = certified.get_xdata(), survived.get_xdata()
        above = survived.get_ydata()[[int((radii <= e).sum()) - 1 for e in eps]]
        assert survived.get_drawstyle() == "steps-post" and (above >= certified.get_ydata()).all()
    assert len(plot_samples(evaluations, 1)[0].axes) == 10
    assert len(plot_overview(evaluations)[0].axes) == 11


def test_a_table_of_measurements_is_drawn_as_bars():
    dataset = small("wine", 8)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(13, 8), nn.ReLU(), nn.Linear(8, 3))
    evaluation = evaluate(model, dataset, "dense", eps=(0.1,), attack_steps=2, pictures=1)
    figure, axes = plot_samples([evaluation], 0)
    assert isinstance(figure, Figure) and len(axes) == 1
    shown = parse(page([evaluation]))
    assert len(shown.pictures) == 3
    text = " ".join(" ".join(shown.text).split())
    assert (
        "in standard deviations of each feature" in text
        and "the bar what the bounds allow" in text
        and "Blue" not in text
    )
    assert torch.equal(
        evaluation.samples[0].attribution, explain.gradient(model)(dataset.test_x, dataset.test_y)[0].detach()
    )


def test_of_colour_images_pixels_are_ranked():
    """As the metrics of ``evaluate`` do: k counts pixels, with their channels added up."""
    torch.manual_seed(0)
    digits = small("digits-parity", 6)
    colour = dataclasses.replace(
        digits, image_shape=(3, 8, 8),
        train_x=digits.train_x.expand(-1, 3, -1, -1), test_x=digits.test_x * torch.rand(6, 3, 8, 8),
    )  # fmt: skip
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).to(digits.test_x.dtype)
    found = evaluate(model, colour, "colour", eps=[0.001], attack_steps=2, pictures=2)
    assert found.property == TopK(5, channels="sum")
    sample = found.samples[0]
    assert sample.top.shape == sample.certain.shape == (64,) and int(sample.top.sum()) == 5
    pixels = sample.attribution.abs().sum(0).flatten()
    assert pixels[sample.top].min() >= pixels[~sample.top].max()
    plot_samples([found], 0)
