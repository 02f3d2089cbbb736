"""Complex numbers between real ones: Fourier transforms, spectral layers, magnitudes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import pyxai_bounds as xb
from tests.networks import sample
from tests.rules.cases import Case, case_id, check, rand

X, ROWS = rand(3, 8), rand(2, 5)
FILTER = torch.view_as_complex(rand(3, 5, 2, seed=1))
MIX = torch.view_as_complex(rand(2, 2, 3, 2, seed=2))
WINDOW = torch.hann_window(6, dtype=torch.float64) + 0.1


def spectral(x: Tensor) -> Tensor:
    """A Fourier neural operator's layer: [B, channels, n], of which three frequencies are mixed."""
    found = torch.fft.rfft(x)
    kept = torch.zeros_like(found)
    kept[..., :3] = torch.einsum("bik,iok->bok", found[..., :3], MIX)
    return torch.fft.irfft(kept, n=x.shape[-1])


CASES = [
    Case("rfft", lambda x: torch.view_as_real(torch.fft.rfft(x)), X),
    Case("rfft of an odd length, normed", lambda x: torch.view_as_real(torch.fft.rfft(x, norm="ortho")), ROWS),
    Case("rfft of the first dimension, padded", lambda x: torch.fft.rfft(x, n=4, dim=0).imag, ROWS),
    Case("fft", lambda x: torch.fft.fft(x).imag, X),
    Case("fft in two dimensions", lambda x: torch.fft.fft2(x).real, X),
    Case("rfft in two dimensions, and back", lambda x: torch.fft.irfft2(torch.fft.rfft2(x), s=(2, 5)), ROWS),
    Case("inverse fft", lambda x: torch.fft.ifft(torch.complex(x, x * x), norm="forward").real, X),
    Case("hfft", lambda x: torch.fft.hfft(torch.complex(x, -x.sin()), n=9), ROWS),
    Case("filtered", lambda x: torch.fft.irfft(torch.fft.rfft(x) * FILTER, n=8), X),
    Case("filtered by itself", lambda x: torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(x).conj(), n=5), ROWS),
    Case("spectral layer", spectral, rand(2, 2, 6)),
    Case("parts", lambda x: torch.cat([-torch.fft.rfft(x), torch.fft.rfft(x) / 3 - 2j], 1).sum(0).real, X),
    Case("rotations by polar numbers", lambda x: torch.view_as_real(torch.view_as_complex(x.reshape(-1, 2))
         * torch.polar(torch.ones(1, dtype=x.dtype), torch.ones(1, dtype=x.dtype))), rand(3, 4)),
    Case("matrix product", lambda x: (torch.fft.fft(x) @ (FILTER.T[:, :1] * (1 + 1j))).imag, ROWS),
    Case("magnitudes", lambda x: torch.fft.rfft(x).abs(), X + 2, eps=0.05, kinks=False),
    Case("magnitudes that may be 0", lambda x: torch.fft.rfft(x).abs(), ROWS, kinks=False),
    Case("power spectrum", lambda x: torch.stft(x, 6, 2, window=WINDOW, return_complex=True).abs() ** 2, X, eps=0.05,
         kinks=False),
    Case("short-time transform", lambda x: torch.stft(x[0], 4, 3, 3, WINDOW[:3], normalized=True, onesided=False,
         center=False, return_complex=True).real, X),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_against_autograd(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("sound", [False, True])
@pytest.mark.parametrize("n", [1, 2, 5, 12])
def test_a_transform_has_its_exact_range(n: int, sound: bool) -> None:
    """Each part of each frequency is a weighted sum of the numbers: no more than Σ|weight|·radius from the centre."""
    box = xb.Interval.of(rand(2, n), rand(2, n, seed=3).abs())
    bounds = xb.bound(lambda x: torch.view_as_real(torch.fft.fft(x)), sound=sound)(box)
    waves = torch.view_as_real(torch.fft.fft(torch.eye(n, dtype=torch.float64))).abs()
    assert torch.allclose(bounds.rad, torch.einsum("bt,tkp->bkp", box.rad, waves), rtol=1e-11, atol=1e-12)
    for seed in range(20 * sound):
        assert bounds.contains(torch.view_as_real(torch.fft.fft(sample(box, seed, corners=True)))).all()


def test_proofs_in_float32_cover_points_too() -> None:
    """Filters that are transforms of weights are sets in a proof."""
    kernel, x = rand(8, seed=4).float(), X.float()

    def fn(x: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(kernel.to(x.dtype)), n=8)

    bounds = xb.bound(fn, sound=True)(xb.Interval.point(x))
    exact = fn(x.double())
    assert ((bounds.lower.double() <= exact) & (exact <= bounds.upper.double())).all()
    assert 0 < bounds.rad.max() < 1e-5


def test_what_is_not_bounded_is_named() -> None:
    box = xb.Interval.linf(X, 0.1)
    for fn, message in (
        (lambda x: torch.fft.rfft(x), "return torch.view_as_real"),
        (lambda x: torch.fft.rfft(x).exp().real, "take real and imaginary parts"),
        (lambda x: (1 / torch.fft.rfft(x)).real, "complex"),
    ):
        with pytest.raises(xb.UnsupportedOperatorError, match=message):
            xb.bound(fn)(box)
    with pytest.raises(xb.UnsupportedOperatorError, match="float32 evaluations"):
        xb.bound(lambda x: torch.fft.rfft(x).real, sound=True, semantics="float32")(box)
