"""How often a class's commonest set of top features is a sample's own: 1 means that the set says nothing."""

import math

import torch

from pyxai_bounds import TopK
from pyxai_bounds.certify.metrics import commonest_top_share


def test_it_counts_sets_class_by_class():
    v = torch.tensor([[3.0, -2, 1], [-5, 9, 0], [0, 1, 4], [1, 0, 2], [0, 1, 2]])
    # Top 2 by size: {0, 1}, {0, 1}, {1, 2} of class 0; {0, 2}, {1, 2} of class 1: (2 + 1) / 5.
    assert commonest_top_share(TopK(2), v, torch.tensor([0, 0, 0, 1, 1])) == 0.6


def test_a_linear_model_has_one_set_for_each_class():
    weight = torch.randn(2, 12)
    y = torch.arange(30) % 2
    assert commonest_top_share(TopK(3), weight[y], y) == 1


def test_no_samples():
    assert math.isnan(commonest_top_share(TopK(1), torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)))
