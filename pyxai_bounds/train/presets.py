"""Presets: recipes under the names of the papers' set-ups, with the papers' numbers. Any field can be overridden.

A number that neither a paper nor its released code gives is marked "ours". The epochs of cross entropy that our own
recipes begin with are none of the papers', hence natural_epochs=0.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pyxai_bounds.train.recipe import Options, Recipe

# --- REC: Wicker et al., ICLR 2023 --------------------------------------------------------------------------------
# The loss is the published one, the mean width. The released code multiplies it by the batch size: so does alpha here.
# eps ramps over all epochs. The paper varies eps over .01, .025, .05, .1 and alpha over .1, .25, .5, .75, 1.


def _rec(batch_size: int, alpha: float = 0.5, **settings: Any) -> Recipe:
    shared: dict[str, Any] = {"eps": 0.05, "eps_ramp": "linear", "eps_ramp_share": 1.0, "natural_epochs": 0, "lr": 1e-3}
    options = Options(alpha=alpha * batch_size, width="mean")
    return Recipe(objective="rec", options=options, batch_size=batch_size, **shared | settings)


_REC_TABLE = _rec(batch_size=32, model="fc-256x2", epochs=25, lr=5e-4)

_REC = {
    "rec-mnist-cnn": _rec(data="mnist", model="rec-mnist", batch_size=256, epochs=30),
    "rec-mnist-fc": _rec(data="mnist", model="fc-128", batch_size=100, epochs=20),
    # Normal lungs are the rarer class and count three times; 128 hidden units and batches of 100 are ours.
    "rec-pneumonia": _rec(
        data="pneumoniamnist", model="fc-128", batch_size=100, epochs=35, lr=2.5e-3, class_weights=(3.0, 1.0)
    ),
    "rec-adult": replace(_REC_TABLE, data="adult"),
    "rec-credit": replace(_REC_TABLE, data="credit"),
    "rec-german": replace(_REC_TABLE, data="german-credit"),
    "rec-crime": replace(_REC_TABLE, data="crime"),
}

# --- RAR: Chen et al., NeurIPS 2019 -------------------------------------------------------------------------------
# m steps of integrated gradients in the loss, m / approx_factor in the search for the worst input; sums over the batch.
# eps and steps of colour images are given in 255ths. The names that end in -sum are IG-SUM-NORM.


def _rar(
    name: str, weight: float, beta: float, approx_factor: int, search_steps: int, step_size: float, **settings: Any
) -> dict[str, Recipe]:
    search: dict[str, Any] = {
        "m": 50,
        "approx_factor": approx_factor,
        "steps": search_steps,
        "step_size": step_size,
        "random_start": True,
    }
    shared: dict[str, Any] = {"eps_ramp": "constant", "natural_epochs": 0} | settings
    return {
        name: Recipe(objective="ig-norm", options=Options(weight=weight, **search), **shared),
        f"{name}-sum": Recipe(objective="ig-sum-norm", options=Options(weight=beta, **search), **shared),
    }


_SGD: dict[str, Any] = {"optimiser": "sgd", "momentum": 0.9, "weight_decay": 2e-4, "lr_schedule": "steps"}

_RAR = {
    **_rar("rar-mnist", 1.0, 0.1, 5, 40, 0.01, data="mnist", model="rar-mnist", eps=0.3, batch_size=50, steps=100_000,
           lr=1e-4),
    **_rar("rar-fashion", 1.0, 0.1, 5, 20, 0.01, data="fashion-mnist", model="rar-mnist", eps=0.1, batch_size=50,
           steps=100_000, lr=1e-4),
    **_rar("rar-gtsrb", 1.0, 1.0, 10, 7, 2 / 255, data="gtsrb", model="rar-gtsrb", eps=8 / 255, batch_size=64,
           steps=70_000, lr=1e-3, lr_steps=((500, 1e-2), (60_000, 1e-3)), **_SGD),
    **_rar("rar-flower", 0.1, 0.1, 10, 7, 2 / 255, data="flower", model="rar-flower", eps=8 / 255, batch_size=16,
           steps=70_000, lr=1e-4, lr_steps=((500, 1e-3), (60_000, 1e-4)), **_SGD),
}  # fmt: skip

# --- R2ET: Chen et al., NeurIPS 2024 --------------------------------------------------------------------------------
# A trained network is trained on: give --start-from a run of the preset that ends in -pretrain. The weights vary over
# .001 … 100; the released code makes them adaptive. eps plays no part in these objectives.


def _r2et(k: int, weight: float = 0.01, **settings: Any) -> Recipe:
    options = Options(k=k, weight=weight, hessian_weight=weight, h=1e-3, adaptive=True)
    shared: dict[str, Any] = {"objective": "r2et", "options": options, "eps": 0.0, "natural_epochs": 0}
    return Recipe(**shared | {"epochs": 10, "batch_size": 20, "lr": 1e-5, "batch_norm": "batch"} | settings)


_R2ET = {
    "r2et-cifar10-pretrain": Recipe(
        data="cifar10", model="resnet9", objective="natural", eps=0.0, epochs=30, batch_size=20, optimiser="sgd",
        lr=0.01, momentum=0.0, validation=0.2, patience=30,
    ),
    "r2et-cifar10": _r2et(100, weight=1.0, data="cifar10", model="resnet9", validation=0.2),
    # The paper gives k; the networks and how they are trained are ours. Weight 1 unlearns the task at these rates.
    "r2et-mnist-pretrain": Recipe(
        data="mnist", model="cnn-small", objective="natural", eps=0.0, epochs=10, lr=1e-3, validation=0.2, patience=10
    ),
    "r2et-mnist": _r2et(50, data="mnist", model="cnn-small", batch_size=100, lr=1e-4),
    "r2et-adult": _r2et(8, data="adult", model="fc-128", natural_epochs=5, epochs=15, batch_size=100, lr=1e-3),
    "r2et-bank": _r2et(8, data="bank", model="fc-128", natural_epochs=5, epochs=15, batch_size=100, lr=1e-3),
    "r2et-compas": _r2et(8, data="compas", model="fc-128", natural_epochs=5, epochs=15, batch_size=100, lr=1e-3),
}  # fmt: skip

# --- ours -------------------------------------------------------------------------------------------------------------

_DIGITS = {
    # docs/recipes.md has the runs that chose these.
    "digits-cnn7": Recipe(
        data="digits-parity", model="cnn7-identity", objective="separated-topk",
        options=Options(hinge=0.45, margin=0.025, width=0.05, stability=1.0),
        eps=0.012, epochs=110, natural_epochs=5, batch_size=100, lr=2e-3, lr_schedule="cosine", warmup=42,
        beta2=0.99, clip_gradient=5.0, batch_norm="frozen",
    ),
    "digits-resnet": Recipe(
        data="digits-parity", model="resnet11-identity", objective="separated-topk",
        options=Options(hinge=0.35, margin=0.025, width=0.03, stability=1.0),
        eps=0.012, epochs=90, natural_epochs=5, batch_size=100, lr=2e-3, lr_schedule="cosine", warmup=42,
        beta2=0.99, clip_gradient=5.0, batch_norm="frozen",
    ),
}  # fmt: skip

PRESETS: dict[str, Recipe] = {**_DIGITS, **_REC, **_RAR, **_R2ET}
