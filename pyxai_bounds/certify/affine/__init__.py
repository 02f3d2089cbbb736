"""Affine arithmetic over a captured graph: sets that remember by what they vary.

An Interval forgets why its elements may move, and what moves together later cannot cancel any more. An affine form
keeps it: centre + Σₖ ξₖ·generatorₖ + e with |ξₖ| ≤ 1 and |e| ≤ slack, elementwise (``form``). There is a ξ for each
number of the input that moves, and one for whatever an operator adds: an unstable ReLU, a gate that may be open or
shut, a product (``symbols``). Operators that are linear apply to centre and generators (``linear``); functions of one
number are lines with what is left beside them (``functions``, ``certify.lines``), products keep all that is linear in
either factor (``products``); ``softmax``, ``norms`` and ``maxima`` are made of these. All others take the Intervals,
which are kept beside the forms and cut down to what these allow (``evaluator``). So bounds are never wider than those
of ``bound``, and take as many times their work as there are ξ.

Source: affine arithmetic (Stolfi and de Figueiredo, Self-validated numerical methods, 1997); the slope of a ReLU as in
Singh et al., Fast and effective robustness certification, NeurIPS 2018; attention and norms here by what is left of
their first order. The backward pass is part of the program, and every number is rounded outward.
"""

# The modules of rules are imported to register them.
from pyxai_bounds.certify.affine import functions, linear, maxima, norms, products, softmax  # noqa: F401
from pyxai_bounds.certify.affine.evaluator import Evaluator as Evaluator
from pyxai_bounds.certify.affine.form import Form as Form
