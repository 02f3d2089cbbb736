"""Where bounds widen: each row against plain runs and bounds of the part before it, and the layer that is at fault."""

from __future__ import annotations

import math

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F

import pyxai_bounds as xb
from pyxai_bounds import memory
from pyxai_bounds.program import captured_graph
from pyxai_bounds.report.plots import plot_widths
from pyxai_bounds.widths import Meter


class Gate(nn.Module):
    """x − 0.99 x: its bounds do not see that the terms move together."""

    def forward(self, x):
        return x - 0.99 * x


class Ratio(nn.Module):
    def forward(self, x):
        return 1 / (x - x.mean(1, keepdim=True))


def network(*inner: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    return nn.Sequential(first, *inner, nn.Flatten(), nn.Linear(4 * 36, 3)).eval()


X, TARGET = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 2])
BOX = xb.Interval.linf(X, 0.03)


def test_the_layer_at_fault_is_named():
    model = network(Gate(), nn.SiLU())
    widths = xb.bound(model).widths(BOX)
    (worst,) = widths.worst(1)
    assert worst.layer == "1" and worst.operator == "sub" and not worst.backward and worst.growth > 100
    assert [row.layer for row in widths.layers] == ["input", "0.0", "0.1", "0.2", "1", "2", "4"]
    assert [row.operator for row in widths.operators if row.layer == "1"] == ["mul", "sub"]
    marked = [line.split()[1] for line in str(widths).splitlines() if line.startswith("▶")]
    assert "1" in marked and len(marked) == len(widths.worst())


@pytest.mark.parametrize("sound", [False, True])
@pytest.mark.parametrize("moves", [False, True])
def test_the_rows_are_the_bounds_of_the_parts(sound: bool, moves: bool):
    model = network()
    parameters = xb.parameter_box(model, relative=0.01) if moves else None
    widths = xb.bound(model, sound=sound, parameters=parameters).widths(BOX)
    rows = {row.layer: row for row in widths.layers}
    assert rows["input"].rad == pytest.approx(0.03) and rows["input"].growth is None
    for end, path in ((1, "0.0"), (2, "0.1"), (3, "0.2")):
        part = model[0][:end]
        box = xb.parameter_box(part, relative=0.01) if moves else None
        bounds, row = xb.bound(part, sound=sound, parameters=box)(BOX), rows[path]
        assert row.shape == tuple(bounds.shape) and row.unbounded == 0
        assert row.rad == pytest.approx(bounds.rad.mean().item(), rel=1e-4)
        assert row.mid == pytest.approx(bounds.mid.abs().mean().item(), rel=1e-4)
        assert row.width == row.rad / row.mid
        for share in torch.rand(5).tolist():
            value = part(BOX.lower + share * (BOX.upper - BOX.lower)).abs().mean().item()
            assert row.mid - row.rad <= value <= row.mid + row.rad
    before = xb.bound(model[0][:2], sound=sound, parameters=parameters and xb.parameter_box(model[0], relative=0.01))(
        BOX
    )
    unstable = ((before.lower <= 0) & (before.upper > 0)).double().mean().item()
    assert 0 < unstable < 1 and rows["0.2"].unstable == pytest.approx(unstable)
    assert rows["0.2"].growth == pytest.approx(rows["0.2"].width / rows["0.1"].width)


def test_gradients_have_a_backward_side():
    model = network(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
    explain = xb.explain.gradient(model)
    widths, bounds = xb.bound(explain).widths(BOX, TARGET), xb.bound(explain)(BOX, TARGET)
    side = [row for row in widths.layers if row.backward]
    assert [row.layer for row in side] == ["2", "1", "0.2", "0.1", "0.0"], "once backward through the same layers"
    assert side[0].operator == side[2].operator == "threshold_backward" and side[-1].operator == "convolution_backward"
    assert side[-1].rad == pytest.approx(bounds.rad.mean().item(), rel=1e-4)
    assert side[2].growth == pytest.approx(side[2].width / side[1].width), "over the gradient, not over the ReLU"
    assert side[2].unstable == next(row.unstable for row in widths.layers if row.layer == "0.2")
    assert "test_widths.py" in side[0].source


def test_names_are_paths_also_where_lines_repeat():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 3, padding=1)

        def forward(self, x):
            return F.relu(self.conv(x)) + x

    def function(x):
        return torch.exp(blocks(x))

    blocks = nn.Sequential(Block(), Block())
    layers = [(row.layer, row.operator) for row in xb.bound(function).widths(BOX).layers]
    assert [layer for layer, _ in layers][:-1] == ["input", "0.conv", "0", "1.conv", "1"]
    assert layers[-1][0].startswith("test_widths.py:") and layers[-1][1] == "exp"


def test_the_first_operator_without_finite_bounds_is_named():
    widths = xb.bound(network(Ratio())).widths(BOX)
    first = widths.unbounded
    assert first is not None and first.layer == "1" and 0 < first.unbounded <= 1
    assert first.operator in ("reciprocal", "div") and "1 / (x - x.mean" in first.source
    assert first in widths.operators and first.width == math.inf == first.growth
    assert [row.layer for row in widths.worst(1)] == ["1"]
    assert "First without finite bounds: " in str(widths) and xb.bound(network()).widths(BOX).unbounded is None


def test_a_choice_that_is_not_known_counts_as_unstable():
    widths = xb.bound(lambda x: torch.where(x > 0.5, x, 1 - x)).widths(BOX)
    row = widths.operators[-1]
    assert row.operator == "where" and 0 < row.unstable < 1
    assert all(row.operator != "gt" for row in widths.operators)
    limits = xb.bound(lambda x: F.hardtanh(x, 0.4, 0.6)).widths(BOX).operators[-1]
    expected = [((BOX.lower <= t) & (BOX.upper > t)) for t in (0.4, 0.6)]
    assert limits.unstable == pytest.approx((expected[0] | expected[1]).double().mean().item())


def test_without_sets_there_is_nothing_to_show():
    widths = xb.bound(network()).widths(X)
    assert widths.operators == widths.layers == () and widths.worst() == [] and "width" in str(widths)
    assert isinstance(plot_widths(widths)[0], Figure)


def test_bad_input_is_refused_as_by_a_call():
    model, another = network(), network()
    with pytest.raises(xb.UnsupportedOperatorError, match="argmax"):
        xb.bound(lambda x: model(x).argmax(1)).widths(BOX)
    with pytest.raises(ValueError, match="uses none of the parameters"):
        xb.bound(model, parameters=xb.parameter_box(another, relative=0.1)).widths(BOX)
    with pytest.raises(TypeError, match="float32 or float64"):
        xb.bound(lambda x: x * 2, sound=True).widths(xb.Interval.linf(X.half(), 0.1))
    with pytest.raises((ValueError, IndexError), match="target"):
        xb.bound(xb.explain.gradient(model)).widths(BOX, torch.tensor([0, 3]))


def test_sets_live_as_long_as_they_are_read():
    model = nn.Sequential(*[layer for _ in range(20) for layer in (nn.Linear(64, 64), nn.Tanh())])
    box = xb.Interval.linf(torch.rand(32, 64), 0.01)
    assert len(xb.bound(model).widths(box).operators) == 41
    (meter,) = [made for made in captured_graph(model, box).derived.values() if isinstance(made, Meter)]
    assert memory.peak_bytes(meter._program.graph) < 12 * memory.bytes_of(box.mid)


def test_parameters_are_live_and_gradients_are_off():
    model = nn.Linear(4, 2)
    bounded, box = xb.bound(model), xb.Interval.linf(torch.rand(3, 4), 0.1)
    before = bounded.widths(box).layers[-1].rad
    with torch.no_grad():
        model.weight.mul_(2)
    assert bounded.widths(box).layers[-1].rad == pytest.approx(2 * before) and torch.is_grad_enabled()


def test_the_picture():
    figure, axes = plot_widths(xb.bound(xb.explain.gradient(network(Ratio()))).widths(BOX, TARGET))
    assert axes.get_yscale() == "log" and len(axes.lines) == 2 and isinstance(figure, Figure)
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert "no finite bounds" in names and any(name.startswith("1\n") for name in names)
