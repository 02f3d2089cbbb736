"""Empirical attacks on explanations: the lower bound that stands beside every certificate."""

from pyxai_bounds.attack.ig import ig_norm
from pyxai_bounds.attack.labels import misclassify
from pyxai_bounds.attack.pgd import pgd
from pyxai_bounds.attack.ranking import center, er, mse, random, region, topk
from pyxai_bounds.attack.rec import targeted, untargeted
from pyxai_bounds.attack.search import Attack, Search
from pyxai_bounds.attack.surrogate import smooth
from pyxai_bounds.attack.weights import WeightAttack, weights

__all__ = [
    "Attack",
    "Search",
    "WeightAttack",
    "center",
    "er",
    "ig_norm",
    "misclassify",
    "mse",
    "pgd",
    "random",
    "region",
    "smooth",
    "targeted",
    "topk",
    "untargeted",
    "weights",
]
