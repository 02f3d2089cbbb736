"""``python -m bench.ops.interval_conv2d``: convolutions of boxes, the native kernel beside the library's products.

Every layer of some networks, forward with ReLU and backward with ReLU′, rounded to nearest and outward, at a small and
a large batch. *library*: what the native backend does where it has no tiles, two convolutions and |W|, with
native stages between them. Results are compared before anything is timed; times are of one process, by turns.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import models
from bench.measure import interleaved, percentiles
from bench.rows import row, say, write
from pyxai_bounds.ops import native

NETWORKS = {"n4": models.n4, "cnn7": models.cnn7, "resnet18": models.resnet18}
ROUNDINGS = {"nearest": 0, "outward": 1}
TILED = native.TILED


def layers(build: Callable[[], nn.Sequential]) -> dict[str, tuple[nn.Conv2d, torch.Size]]:
    """Label → a convolution and the shape of its input at batch 1, each kind once."""
    found: dict[str, tuple[nn.Conv2d, torch.Size]] = {}

    def note(module: nn.Conv2d, inputs: tuple[Tensor], output: Tensor) -> None:
        (kernel, stride), shape = (module.kernel_size[0], module.stride[0]), inputs[0].shape
        label = f"{shape[1]}-{len(module.weight)} {kernel}x{kernel} /{stride} at {shape[2]}"
        found.setdefault(label, (module, shape))

    model = build()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note)  # type: ignore[arg-type]
    with torch.no_grad():
        model(torch.rand(1, 3, 32, 32))
    return found


def with_tiles(tiles: bool, operator: Callable[..., Any], *args: Any) -> Any:
    native.TILED = TILED if tiles else ()
    try:
        return operator(*args)
    finally:
        native.TILED = TILED


def run(
    label: str, layer: nn.Conv2d, shape: torch.Size, batch: int, rows: list[dict[str, Any]], seconds: float
) -> None:
    generator = torch.Generator().manual_seed(0)

    def box(size: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        mid, rad = torch.randn(size, generator=generator), torch.rand(size, generator=generator)
        return tuple(t.contiguous(memory_format=torch.channels_last) for t in (mid, rad))  # type: ignore[return-value]

    geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
    weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
    size = [batch, *shape[1:]]
    forward = (*box(tuple(size)), weight, bias, *geometry, True)
    out, _, state = native.interval_conv2d(*forward)
    backward = (*box(tuple(out.shape)), weight, state, size, *geometry)
    for name, rounding in ROUNDINGS.items():
        for op, operator, args in (
            ("interval_conv2d", native.interval_conv2d, forward),
            ("interval_conv2d_backward", native.interval_conv2d_backward, backward),
        ):
            steps = {
                kind: lambda tiles=tiles, operator=operator, args=args, rounding=rounding: with_tiles(
                    tiles, operator, *args, rounding
                )
                for kind, tiles in (("native", True), ("library", False))
            }
            ours, theirs = (step()[:2] for step in steps.values())
            for mine, other in zip(ours, theirs, strict=True):
                error = (mine - other).norm() / other.norm()
                if not error <= 1e-4:
                    raise SystemExit(f"{label}, {op}: the two disagree by {error}")
            times = {kind: percentiles(t) for kind, t in interleaved(steps, seconds, 7).items()}
            rows += [row(f"{op} {name}", f"{label} B{batch}", kind, spans, "") for kind, spans in times.items()]
            ratio = times["library"][1] / times["native"][1]
            print(f"{label:28} B{batch:<4}{op:26}{name:9}{1e3 * times['native'][1]:8.2f} ms  library {ratio:5.2f} ×")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.ops.interval_conv2d", description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--seconds", type=float, default=0.2, help="per contender, layer, pass and rounding")
    parser.add_argument("--out", type=Path, default=Path("bench/results/cpu/interval_conv2d.csv"), help="the CSV")
    options = parser.parse_args()
    if native.module().level() not in TILED:
        raise SystemExit(f"The tiles need {' or '.join(TILED)}; this processor has {native.module().level()}.")
    rows: list[dict[str, Any]] = []
    for network, build in NETWORKS.items():
        for label, (layer, shape) in layers(build).items():
            for batch in options.batches:
                say(f"{network}: {label}, batch {batch}")
                run(f"{network} {label}", layer, shape, batch, rows, options.seconds)
    write(options.out, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
