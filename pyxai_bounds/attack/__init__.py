"""Empirical attacks on explanations: the lower bound that stands beside every certificate."""

from pyxai_bounds.attack.pgd import Attack, pgd
from pyxai_bounds.attack.surrogate import smooth

__all__ = ["Attack", "pgd", "smooth"]
