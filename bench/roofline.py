"""``python -m bench.roofline``: the least time of each kernel on an H200, at the layers of CNN7, batch 512, bf16.

The larger of two times: every input read once and every result written once at the bandwidth that copies reach, and
all operations at the rate that large products reach. An estimate, not a measurement.
"""

from __future__ import annotations

from math import prod

BYTES_PER_SECOND = 4.3e12
FLOP_PER_SECOND = 790e12
ELEMENT = 2  # bytes
STATE = 2 / 8  # bytes: two bits per element
BATCH = 512
# channels in, out, kernel, pixels in, stride; the fully connected layers are 1 × 1 convolutions of one pixel.
LAYERS = {
    "conv 3-64": (3, 64, 3, 32, 1),
    "conv 64-64": (64, 64, 3, 32, 1),
    "conv 64-128 /2": (64, 128, 3, 32, 2),
    "conv 128-128": (128, 128, 3, 16, 1),
    "linear 32768-512": (32768, 512, 1, 1, 1),
    "linear 512-10": (512, 10, 1, 1, 1),
}


def products(layer: tuple[int, int, int, int, int]) -> dict[str, tuple[float, float]]:
    """Kernel → (bytes, operations). Each computes two products of the same size."""
    channels, outputs, kernel, pixels, stride = layer
    box = BATCH * channels * pixels**2
    out = BATCH * outputs * (pixels // stride) ** 2
    weight = outputs * channels * kernel**2
    operations = 2 * 2 * out * channels * kernel**2
    return {
        "forward + ReLU or gate": (ELEMENT * (2 * box + weight + 2 * out) + STATE * out, operations),
        "backward + ReLU′": (ELEMENT * (2 * out + weight + 2 * box) + 2 * STATE * box, operations),
        "weight gradient": (ELEMENT * (2 * out + 2 * box + 2 * weight), operations),
    }


def elementwise() -> dict[str, tuple[float, float]]:
    """Kernel → (bytes, operations) on the largest activation, 64 channels of 32 × 32 pixels."""
    n = BATCH * prod((64, 32, 32))
    return {
        "interval_relu": (ELEMENT * 4 * n + STATE * n, 8 * n),
        "interval_relu_backward": (ELEMENT * 4 * n + 2 * STATE * n, 8 * n),
        "interval_gate": (ELEMENT * 4 * n + STATE * n, 6 * n),
        "interval_scale_shift": (ELEMENT * 4 * n, 4 * n),
        "interval_mul": (ELEMENT * 6 * n, 20 * n),
        # Two evaluations of a function of about 15 operations, or four where a derivative is needed as well.
        "interval_smooth": (ELEMENT * 4 * n, 40 * n),
        "interval_smooth_backward": (ELEMENT * 6 * n, 60 * n),
        "interval_smooth_adjoint": (ELEMENT * 6 * n, 80 * n),
        "interval_smooth_backward_adjoint": (ELEMENT * 10 * n, 130 * n),
        # 2 × 2 windows: a quarter as many results, and two int32 of bits for each of them.
        "interval_max_pool2d": (ELEMENT * 2.5 * n, 6 * n),
        "interval_first_maximum": (ELEMENT * 2 * n + 8 * n / 4, 30 * n),
        "interval_max_pool2d_backward": (ELEMENT * 2.5 * n + 8 * n / 4, 60 * n),
        "interval_max_pool2d_gather": (ELEMENT * 3 * n + 8 * n / 4, 20 * n),
    }


def line(where: str, kernel: str, moved: float, operations: float, rate: float) -> str:
    memory, arithmetic = 1e6 * moved / BYTES_PER_SECOND, 1e6 * operations / rate
    bound = "memory" if memory > arithmetic else "arithmetic"
    least = max(memory, arithmetic)
    return f"| {where} | {kernel} | {moved / 1e6:.1f} | {operations / 1e9:.2f} | {memory:.1f} | {arithmetic:.1f} | **{least:.1f}** {bound} |"  # noqa: E501


def main() -> None:
    print("| layer | kernel | MB | GFLOP | memory µs | arithmetic µs | least µs |\n|---|---|---|---|---|---|---|")
    for where, layer in LAYERS.items():
        for kernel, (moved, operations) in products(layer).items():
            print(line(where, kernel, moved, operations, FLOP_PER_SECOND))
    for kernel, (moved, operations) in elementwise().items():
        print(line("64 × 32 × 32", kernel, moved, operations, 67e12))


if __name__ == "__main__":
    main()
