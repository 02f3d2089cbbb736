"""How deep, and how large, may a network be whose explanations are certified? ``python -m bench.depth``, half an hour.

Networks trained for accuracy alone, without a thought for their explanations; does the top 5 of the gradient of the
label's logit stay the same for every image within eps? Of the same held-out digits, the shares that plain bounds prove,
affine forms besides, and branch and bound besides; that an input refutes; that survive an attack by gradients. Writes a
row for each network and radius, goes on where it was interrupted, and draws docs/depth.png.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

import pyxai_bounds as xb
from bench.rows import append, device, read, say
from pyxai_bounds import rounding
from pyxai_bounds.certify.forms import Forms
from pyxai_bounds.program import captured_graph
from pyxai_bounds.report.plots import CERTAIN, COLOURS, INK, POSSIBLE

OUT, PICTURE = Path("bench/results/cpu/depth.csv"), Path("docs/depth.png")
PARTS = 64
METHODS: dict[str, dict[str, Any]] = {
    "plain": {"sharpen": False},
    "default": {},
    "branches": {"branches": PARTS},
}
DEPTHS = (1, 2, 3, 4, 6, 8)


@dataclass(frozen=True)
class Network:
    """On ``samples`` digits of ``pixels``² of ``channels``, trained for ``epochs``."""

    make: Callable[[], nn.Sequential]
    pixels: int = 8
    channels: int = 1
    samples: int = 100
    epochs: int = 10
    data: str = "digits-parity"


def dense(depth: int) -> nn.Sequential:
    hidden = [layer for _ in range(depth - 1) for layer in (nn.Linear(32, 32), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), *hidden, nn.Linear(32, 2))


def convolutional(depth: int) -> nn.Sequential:
    """Of 8 channels with batch norm."""
    channels = [1, *[8] * depth]
    hidden = [
        layer
        for before, after in itertools.pairwise(channels)
        for layer in (nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU())
    ]
    return nn.Sequential(*hidden, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(128, 2))


def striding(pixels: int, channels: int, *, deep: bool) -> nn.Sequential:
    """Two convolutions of stride 2 and two dense layers; if ``deep``, a third and a fourth convolution between them."""
    kernels = [(16, 3, 1), (16, 4, 2), (32, 3, 1), (32, 4, 2)] if deep else [(16, 4, 2), (32, 4, 2)]
    layers: list[nn.Module] = []
    for out, kernel, stride in kernels:
        layers += [nn.Conv2d(channels, out, kernel, stride, padding=1), nn.ReLU()]
        channels = out
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2 * pixels**2, 128), nn.ReLU(), nn.Linear(128, 10))


NETWORKS = {
    **{f"dense {depth}": Network(functools.partial(dense, depth)) for depth in DEPTHS},
    **{f"convolutional {depth}": Network(functools.partial(convolutional, depth)) for depth in DEPTHS},
    "28×28, 2 + 2 layers": Network(lambda: striding(28, 1, deep=False), 28, 1, 20, 4, "digits"),
    "28×28, 4 + 2 layers": Network(lambda: striding(28, 1, deep=True), 28, 1, 20, 4, "digits"),
    "3×32×32, 2 + 2 layers": Network(lambda: striding(32, 3, deep=False), 32, 3, 10, 4, "digits"),
}
RADII = (1e-4, 1e-3)
PEER = {"dense 2": 20, "dense 4": 20, "dense 8": 20, "28×28, 2 + 2 layers": 5}  # samples of each


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.depth", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NETWORK")
    parser.add_argument("--out", type=Path, default=OUT, help="the table; rows that it has are not measured again")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    parser.add_argument("--peer", type=Path, metavar="CSV", help="beside auto_LiRPA's linear bounds, and nothing else")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peer:
        known = {row["network"] for row in read(options.peer)} if options.peer.exists() else set()
        for name in (name for name in PEER if name not in known):
            for row in beside_peer(name, PEER[name], RADII[-1]):
                append(options.peer, row)
                say(", ".join(f"{key} {value}" for key, value in row.items()))
        return
    rows = read(options.out) if options.out.exists() else []
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        asked = [eps for eps in RADII if not any(row["network"] == name and float(row["eps"]) == eps for row in rows)]
        if asked:
            model, x, y = trained(NETWORKS[name])
        for eps in asked:
            rows.append(measured(name, model, x, y, eps))
            append(options.out, rows[-1])
            say(", ".join(f"{key} {value}" for key, value in rows[-1].items()))
    print(table(rows))
    draw(rows, options.picture)


def trained(network: Network) -> tuple[nn.Sequential, Tensor, Tensor]:
    """With held-out images and their labels."""
    data = xb.data.load(network.data)
    train, held_out = (shown(t, network) for t in (data.train_x, data.test_x[: network.samples]))
    torch.manual_seed(0)
    model = network.make()
    optimiser = torch.optim.Adam(model.parameters(), 2e-3 if network.pixels == 8 else 1e-3)
    for _ in range(network.epochs):
        for batch in torch.randperm(len(train)).split(50):
            optimiser.zero_grad()
            F.cross_entropy(model(train[batch]), data.train_y[batch]).backward()
            optimiser.step()
    return model.eval(), held_out, data.test_y[: network.samples]


def shown(x: Tensor, network: Network) -> Tensor:
    """Digits of so many pixels; three channels hold x, 1 - x and x²."""
    if network.pixels != x.shape[-1]:
        x = F.interpolate(x, size=(network.pixels, network.pixels), mode="bilinear").clamp(0, 1)
    return x if network.channels == 1 else torch.cat([x, 1 - x, x.square()], 1)


def measured(name: str, model: nn.Module, x: Tensor, y: Tensor, eps: float) -> dict[str, Any]:
    fn = xb.explain.gradient(model)
    question: dict[str, Any] = {"eps": eps, "property": xb.TopK(5), "clip": (0.0, 1.0)}
    box = xb.Interval.linf(x, eps, (0.0, 1.0))
    torch.manual_seed(0)
    points = torch.stack([fn(box.lower + torch.rand_like(x) * (box.upper - box.lower), y) for _ in range(200)])
    sampled = (points.amax(0) - points.amin(0)).mean()
    row: dict[str, Any] = {"network": name, "eps": eps, "samples": len(x)}
    row["width/sampled"] = f"{xb.bound(fn)(box, y).width.mean() / sampled:.4g}" if sampled > 0 else ""
    attack = xb.attack.pgd(fn, x, y, **question)
    for method, options in METHODS.items():
        start = time.process_time()
        found = xb.certify(fn, x, y, **question, **options)
        row[f"{method} s/sample"] = f"{(time.process_time() - start) / len(x):.3g}"
        assert not (found.holds & attack.broken).any(), "an attack broke a certificate"
        row[method] = f"{found.fraction:.3f}"
    row["refuted"] = f"{found.refuted.double().mean():.3f}"
    row["survived"] = f"{1 - attack.broken.double().mean():.3f}"
    return {**row, "device": device(), "torch": torch.__version__}


def beside_peer(name: str, samples: int, eps: float) -> list[dict[str, Any]]:
    """The same gradients by auto_LiRPA, linear bounds in the place of affine forms, sample by sample; a row for each
    method. Seconds of a sample are those of a second call; what is built once for a label is not counted.
    """
    from bench.peers import auto_lirpa

    model, x, y = trained(NETWORKS[name])
    x, y = x[:samples], y[:samples]
    fn, top = xb.explain.gradient(model), xb.TopK(5)
    nominal, rows = fn(x, y).detach(), []

    def row(method: str, width: float, holds: float, seconds: float, refuted: str = "") -> None:
        values: dict[str, Any] = {
            "width": f"{width:.4g}",
            "certified": f"{holds:.3f}",
            "refuted": refuted,
            "s/sample": f"{seconds / samples:.3g}",
        }
        about: dict[str, Any] = {"network": name, "eps": eps, "samples": samples, "method": method}
        rows.append({**about, **values, "device": device(), "torch": torch.__version__})

    methods = ("CROWN", "CROWN-Optimized") if NETWORKS[name].pixels == 8 else ("CROWN",)  # which takes minutes else
    for method in methods:
        width = holds = taken = 0.0
        for i in range(samples):
            one = slice(i, i + 1)
            run = auto_lirpa.gradient_bounds(model, x[one], eps, y[one], method=method)
            run()
            start = time.process_time()
            bounds = xb.Interval(*(t.detach() for t in run()))
            taken += time.process_time() - start
            width += bounds.width.mean().item() / samples
            holds += float(top.margin(nominal[one], bounds) > 0) / samples
        row(f"auto_LiRPA {method}", width, holds, taken)
    box, graph = xb.Interval.linf(x, eps), captured_graph(fn, x[:1], y[:1]).graph
    forms = Forms.of(graph, rounding.choose(True, "real"), "rump", cheaply=False)
    assert forms is not None
    widths = [forms(box[i : i + 1], [[y[i : i + 1]]])[0].width.mean().item() for i in range(samples)]
    settings: dict[str, dict[str, Any]] = {"affine forms": {"sharpen": True}, f"branches={PARTS}": {"branches": PARTS}}
    for label, options in settings.items():
        xb.certify(fn, x, y, eps=eps, property=top, **options)
        start = time.process_time()
        found = xb.certify(fn, x, y, eps=eps, property=top, **options)
        taken = time.process_time() - start
        row(label, sum(widths) / samples, found.fraction, taken, f"{found.refuted.double().mean():.3f}")
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """For the guide."""
    columns = ["network", "eps", "width/sampled", *METHODS, "refuted", "survived", "branches s/sample"]
    lines = [" | ".join(str(row[column]) for column in columns) for row in rows]
    return "\n".join(f"| {line} |" for line in (" | ".join(columns), "|".join("---" for _ in columns), *lines))


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """A bar for each network: what proves how much, what refutes the rest, and what nobody decides."""
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((_place(row["network"])[0], float(row["eps"])), []).append(row)
    kinds = list(dict.fromkeys(kind for kind, _ in groups))
    figure = Figure(figsize=(3.6 * len(kinds) + 1.4, 2.6 * len(RADII) + 0.6))
    all_axes = figure.subplots(len(RADII), len(kinds), squeeze=False, sharey=True)
    for i, eps in enumerate(RADII):
        for j, kind in enumerate(kinds):
            _bars(all_axes[i][j], groups.get((kind, eps), []), f"{kind}, eps {eps:g}")
        all_axes[i][0].set_ylabel("share of samples", color=INK, fontsize=8.5)
    for axes, kind in zip(all_axes[-1], kinds, strict=True):
        axes.set_xlabel("" if kind == "larger images" else "hidden layers", color=INK, fontsize=8.5)
    handles, labels = all_axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=6, frameon=False, labelcolor=INK, fontsize=8.5)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, transparent=True)
    say(f"drew {path}")


def _place(name: str) -> tuple[str, str]:
    """The column of a network in the picture, and what stands below its bar."""
    kind, _, depth = name.rpartition(" ")
    return (kind, depth) if depth.isdigit() else ("larger images", name.replace(", ", "\n"))


def _bars(axes: Axes, rows: list[dict[str, Any]], title: str) -> None:
    places = range(len(rows))
    plain, forms, parts, refuted, survived = (
        [float(row[key]) for row in rows] for key in (*METHODS, "refuted", "survived")
    )
    shares = {
        "proved by plain bounds": (plain, COLOURS[2]),
        "… by certify's default": ([b - a for a, b in zip(plain, forms, strict=True)], COLOURS[5]),
        f"… with branches={PARTS}": ([b - a for a, b in zip(forms, parts, strict=True)], CERTAIN),
        "undecided": ([1 - a - b for a, b in zip(parts, refuted, strict=True)], "none"),
        "refuted by an input": (refuted, POSSIBLE),
    }
    bottom = [0.0] * len(rows)
    for label, (share, colour) in shares.items():
        axes.bar(places, share, 0.75, bottom, color=colour, label=label, edgecolor=INK, linewidth=0.5)
        bottom = [a + b for a, b in zip(bottom, share, strict=True)]
    axes.plot(
        places, survived, "_", color="black", markersize=16, markeredgewidth=2, label="survived gradients' attack"
    )
    axes.set_xticks(places, [_place(row["network"])[1] for row in rows], fontsize=8)
    axes.set_title(title, fontsize=9, color=INK)
    axes.tick_params(colors=INK, labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(INK)


if __name__ == "__main__":
    main()
