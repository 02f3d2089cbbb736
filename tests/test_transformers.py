"""Models of the ``transformers`` library as they come, made from small configurations: bounded whole and proven."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pyxai_bounds as xb
from tests.networks import sample

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")

TARGET = torch.tensor([1])
TEXT = {"vocab_size": 20, "num_labels": 3}
ENCODER = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
EMBEDDINGS, PIXELS = (1, 4, 12), (1, 3, 8, 8)

# The configuration, the head, the argument that is a set and its shape, the ways to attend.
MODELS: dict[str, tuple[str, str, dict, str, tuple[int, ...], tuple[str, ...]]] = {
    "BERT": ("BertConfig", "BertForSequenceClassification", ENCODER | TEXT, "inputs_embeds", EMBEDDINGS,
             ("sdpa",)),
    "DistilBERT": ("DistilBertConfig", "DistilBertForSequenceClassification",
                   {"dim": 12, "n_layers": 1, "n_heads": 2, "hidden_dim": 16} | TEXT, "inputs_embeds", EMBEDDINGS,
                   ("sdpa",)),
    "GPT-2": ("GPT2Config", "GPT2LMHeadModel",
              {"vocab_size": 20, "n_embd": 12, "n_layer": 1, "n_head": 2, "n_positions": 8, "bos_token_id": 0,
               "eos_token_id": 0}, "inputs_embeds", EMBEDDINGS, ("sdpa",)),
    "Llama": ("LlamaConfig", "LlamaForCausalLM", ENCODER | {"vocab_size": 20, "num_key_value_heads": 1},
              "inputs_embeds", EMBEDDINGS, ("sdpa",)),
    "DeBERTa": ("DebertaConfig", "DebertaForSequenceClassification", ENCODER | TEXT, "inputs_embeds", EMBEDDINGS,
                ("",)),
    "FNet": ("FNetConfig", "FNetForSequenceClassification",
             {"hidden_size": 12, "num_hidden_layers": 1, "intermediate_size": 16} | TEXT, "inputs_embeds", EMBEDDINGS,
             ("",)),
    "ViT": ("ViTConfig", "ViTForImageClassification", ENCODER | {"image_size": 8, "patch_size": 4, "num_labels": 3},
            "pixel_values", PIXELS, ("eager",)),
    "ResNet": ("ResNetConfig", "ResNetForImageClassification",
               {"embedding_size": 4, "hidden_sizes": [4, 6], "depths": [1, 1], "layer_type": "basic", "num_labels": 3},
               "pixel_values", PIXELS, ("",)),
    "ConvNeXt": ("ConvNextConfig", "ConvNextForImageClassification",
                 {"hidden_sizes": [4, 6], "depths": [1, 1], "num_stages": 2, "image_size": 8, "num_labels": 3},
                 "pixel_values", PIXELS, ("",)),
}  # fmt: skip
CASES = [(name, attention) for name, model in MODELS.items() for attention in model[-1]]


def made(name: str, attention: str) -> tuple[nn.Module, str, Tensor]:
    config, head, options, argument, shape, _ = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, head)(getattr(transformers, config)(**options))
    if attention:
        model.set_attn_implementation(attention)
    return model.eval(), argument, torch.randn(shape)


def logits(model: nn.Module, argument: str) -> Callable[[Tensor], Tensor]:
    """Of a language model those of the last token."""

    def fn(x: Tensor) -> Tensor:
        out = model(**{argument: x}).logits
        return out[:, -1] if out.dim() == 3 else out

    return fn


def with_gradient(fn: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        out = fn(x)
        return out, torch.autograd.grad(out[0, 1], x)[0]


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_logits_and_gradients_are_proven(name: str, attention: str) -> None:
    """Sound float32 bounds hold the float64 values at samples and corners, and are not vacuous."""
    model, argument, x = made(name, attention)
    twin = copy.deepcopy(model).double()

    def both(model: nn.Module) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        return lambda x: with_gradient(logits(model, argument), x)

    box = xb.Interval.linf(x, 1e-5)
    found = [bounds.detach() for bounds in xb.bound(both(model), sound=True)(box)]
    wide = xb.Interval.of(box.mid.double(), box.rad.double())
    for i in range(4):
        for bounds, value in zip(found, both(twin)(sample(wide, i, i % 2 == 0)), strict=True):
            assert bounds.contains(value.detach()).all()
    assert all(bounds.rad.max() < 0.1 for bounds in found)


@pytest.mark.parametrize("name", ["BERT"])
def test_a_point_gives_back_the_explanation(name: str) -> None:
    model, argument, x = made(name, "sdpa")  # eager attention takes its softmax in float32, whatever the model is in
    explanation, x = xb.explain.gradient(logits(model.double(), argument)), x.double()
    bounds, value = xb.bound(explanation)(xb.Interval.point(x), TARGET), explanation(x, TARGET).detach()
    assert (bounds.mid - value).abs().max() < 1e-12 * value.abs().max().clamp(min=1)
    assert bounds.rad.max() < 1e-12


def test_the_documented_example_runs() -> None:
    text = (Path(__file__).parents[1] / "docs" / "transformers.md").read_text()
    session: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.S):
        exec(compile(block, "docs/transformers.md", "exec"), session)
    assert (session["gradient"].rad < 1e-3).all()  # type: ignore[attr-defined]
