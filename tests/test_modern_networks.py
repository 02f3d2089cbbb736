"""Networks with the layers of today: attention, norms of a sample, gates, recurrence; bounded whole and proven."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyxai_bounds as xb
from tests.networks import sample

TARGET = torch.tensor([1, 2])


class VisionTransformer(nn.Module):
    """Patches, a class token, positions, encoder layers that normalise first, a head on the token."""

    def __init__(self, width: int = 8, depth: int = 1) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, width)), nn.Parameter(torch.randn(1, 5, width))
        self.blocks = nn.Sequential(
            *(nn.TransformerEncoderLayer(width, 2, 12, 0.1, "gelu", batch_first=True, norm_first=True)
              for _ in range(depth))
        )  # fmt: skip
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], 1) + self.positions
        return self.head(self.norm(self.blocks(tokens))[:, 0])


class ConvNeXtBlock(nn.Module):
    """A depthwise convolution, layer norm over channels last, an inverted bottleneck with GELU, a layer scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(width, width, 3, padding=1, groups=width), nn.LayerNorm(width, eps=1e-6)
        self.widen, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.scale * self.narrow(F.gelu(self.widen(y)))).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, width, 2, 2), ConvNeXtBlock(width)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.block(self.stem(x)).mean((2, 3))))


class Sequence(nn.Module):
    """A body on sequences [B, T, 6] and a head on the mean of its outputs."""

    def __init__(self, body: nn.Module, width: int = 6) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        return self.head((out[0] if isinstance(out, tuple) else out).mean(1))


class Unrolled(nn.Module):
    """A recurrent cell, step by step."""

    def __init__(self, cell: nn.Module, width: int = 5) -> None:
        super().__init__()
        self.cell, self.width, self.head = cell, width, nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(len(x), self.width)
        for step in x.unbind(1):
            if isinstance(self.cell, nn.LSTMCell):
                h, c = self.cell(step, (h, c))
            else:
                h = self.cell(step, h)
        return self.head(h)


class CausalDecoder(nn.Module):
    """Encoder and decoder layers with masks: a causal one, whose values PyTorch looks at, and padding."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(width, 2, 10, batch_first=True), 1)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(width, 2, 10, batch_first=True), 1)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1]).to(x.dtype)
        padding = torch.tensor([[False] * (x.shape[1] - 1) + [True]] * len(x))
        seen = self.encoder(x, mask=mask, src_key_padding_mask=padding.to(x.dtype) * -1e9)
        return self.decoder(x, seen, tgt_mask=mask)


class RelativePositions(nn.Module):
    """Attention with a bias for each bucket of distances; buckets grow like logarithms, cut to whole numbers."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.bias, self.values = nn.Embedding(4, 1), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        distance = (places[:, None] - places).abs()
        known = torch.ones(x.shape[:2]) * 1.0
        bucket = ((distance.float() / 2 + 1).log() / torch.log(torch.tensor(2.0)) * 3).to(torch.long).clamp(max=3)
        scores = x @ x.transpose(1, 2) + self.bias(bucket).squeeze(-1)
        return scores.masked_fill(~known.bool()[:, None], float("-inf")).softmax(-1) @ self.values(x)


class Mixture(nn.Module):
    """A mixture density, by PyTorch's distributions, which look at the values that they are given."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.weights, self.means, self.scales = (nn.Linear(width, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        mixture = torch.distributions.Categorical(logits=self.weights(x))
        parts = torch.distributions.Normal(self.means(x), self.scales(x).exp())
        density = torch.distributions.MixtureSameFamily(mixture, parts)
        return torch.stack([density.mean, density.variance, density.log_prob(x[..., 0])], -1)


class CausalAttention(nn.Module):
    """Self-attention as it is written by hand around the fused function."""

    def __init__(self, width: int = 6, heads: int = 2) -> None:
        super().__init__()
        self.qkv, self.heads = nn.Linear(width, 3 * width), heads

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.transpose(1, 2).reshape(batch, length, width)


def on_images(*layers: nn.Module, features: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3), *layers, nn.Flatten(), nn.Linear(features, 4))


# A network, and whether it takes images [B, 3, 8, 8] or sequences [B, 3, 6].
NETWORKS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "layer norm": (lambda: on_images(nn.Flatten(), nn.Linear(216, 9), nn.LayerNorm(9), nn.ReLU(), features=9), True),
    "group norm": (lambda: on_images(nn.GroupNorm(2, 6), nn.ReLU(), features=216), True),
    "instance norm": (lambda: on_images(nn.InstanceNorm2d(6, affine=True), nn.ReLU(), features=216), True),
    "PReLU and Mish": (lambda: on_images(nn.PReLU(6), nn.Conv2d(6, 3, 3), nn.Mish(), features=48), True),
    "gated linear unit": (lambda: on_images(nn.GLU(1), nn.LogSigmoid(), features=108), True),
    "encoder layer": (lambda: Sequence(nn.TransformerEncoderLayer(6, 2, 10, batch_first=True)), False),
    "causal attention": (lambda: Sequence(CausalAttention()), False),
    "encoder and decoder with masks": (lambda: Sequence(CausalDecoder()), False),
    "relative positions": (lambda: Sequence(RelativePositions()), False),
    "mixture density": (lambda: Sequence(Mixture(), 3), False),
    "vision transformer": (VisionTransformer, True),
    "ConvNeXt": (ConvNeXt, True),
    "LSTM": (lambda: Sequence(nn.LSTM(6, 5, batch_first=True), 5), False),
    "LSTM, two layers, both ways": (lambda: Sequence(nn.LSTM(6, 3, 2, batch_first=True, bidirectional=True)), False),
    "LSTM without biases": (lambda: Sequence(nn.LSTM(6, 5, bias=False, batch_first=True), 5), False),
    "GRU": (lambda: Sequence(nn.GRU(6, 5, batch_first=True), 5), False),
    "LSTM cell": (lambda: Unrolled(nn.LSTMCell(6, 5)), False),
    "GRU cell": (lambda: Unrolled(nn.GRUCell(6, 5)), False),
}  # fmt: skip


def network(name: str) -> tuple[nn.Module, Tensor]:
    """The float32 network in eval mode and two inputs of it."""
    make, takes_images = NETWORKS[name]
    torch.manual_seed(0)
    model = make().eval()
    return model, torch.rand(2, 3, 8, 8) if takes_images else torch.randn(2, 3, 6)


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_and_gradients_are_proven(name: str) -> None:
    """Sound float32 bounds hold the float64 values at the centre, at samples and at corners, and are not vacuous."""
    model, x = network(name)
    twin = copy.deepcopy(model).double()

    def both(model: nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
        return lambda x, target: (model(x), xb.explain.gradient(model)(x, target))

    bounded = xb.bound(both(model), sound=True)
    for eps in (0.0, 1e-5):
        box = xb.Interval.linf(x, eps)
        found = [bounds.detach() for bounds in bounded(box, TARGET)]
        wide = xb.Interval.of(box.mid.double(), box.rad.double())
        for i in range(5 if eps else 1):
            for bounds, value in zip(found, both(twin)(sample(wide, i, i % 2 == 0), TARGET), strict=True):
                assert bounds.contains(value.detach()).all()
        assert all(bounds.rad.max() < 0.5 for bounds in found)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_point_gives_back_the_explanation(name: str) -> None:
    model, x = network(name)
    model, x = model.double(), x.double()
    for parameter in model.parameters():
        parameter.requires_grad_(False)  # where nothing asks for gradients PyTorch takes its fused layers
    explanation = xb.explain.gradient(model)
    bounds, value = xb.bound(explanation)(xb.Interval.point(x), TARGET), explanation(x, TARGET).detach()
    assert (bounds.mid - value).abs().max() < 1e-12 * value.abs().max().clamp(min=1)
    assert bounds.rad.max() < 1e-12


def test_fused_layers_of_float32_inference_are_taken_apart() -> None:
    """Without gradients PyTorch gives an LSTM to oneDNN and an encoder layer to one operator."""
    for name in ("LSTM", "LSTM, two layers, both ways", "LSTM without biases", "encoder layer"):
        model, x = network(name)
        model.requires_grad_(False)
        fast = torch.backends.mha.get_fastpath_enabled()
        bounds = xb.bound(model)(xb.Interval.linf(x, 1e-3))
        assert torch.backends.mha.get_fastpath_enabled() == fast
        with torch.no_grad():
            assert bounds.contains(model(x)).all()


@pytest.mark.parametrize("two_layers", [False, True])
def test_a_recurrent_layer_goes_on_from_its_states(two_layers: bool) -> None:
    """One state for each sample, and shapes that a second call takes."""
    torch.manual_seed(0)
    layer = nn.LSTM(4, 3, num_layers=1 + two_layers).eval()
    states = [torch.randn(1 + two_layers, 2, 3) for _ in range(2)]

    def twice(x: Tensor) -> tuple[Tensor, ...]:
        h, c = states
        first, carried = layer(x[:2], (h.to(x.dtype), c.to(x.dtype)))
        second, (h, c) = layer(x[2:], carried)
        return first, second, h, c

    x = torch.randn(5, 2, 4)
    bounds = xb.bound(twice, sound=True)(xb.Interval.point(x))
    layer.double()
    for bound, value in zip(bounds, twice(x.double()), strict=True):
        assert bound.shape == value.shape
        assert ((bound.lower.double() <= value) & (value <= bound.upper.double())).all()


def test_the_gradient_of_an_lstm_in_float32() -> None:
    """There oneDNN has an operator of its own for the backward pass of a layer."""
    layer = nn.LSTM(4, 3, batch_first=True)
    exact = copy.deepcopy(layer).double()

    def gradient(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        layer_of = layer if x.dtype == torch.float32 else exact
        return torch.autograd.grad(layer_of(x)[0].tanh().sum(), x)[0]

    box = xb.Interval.linf(torch.rand(2, 3, 4), 1e-3)
    bounds = xb.bound(gradient, sound=True)(box)
    assert torch._C._get_mkldnn_enabled()
    for seed in range(5):
        assert bounds.contains(gradient(sample(box, seed, corners=True))).all()
