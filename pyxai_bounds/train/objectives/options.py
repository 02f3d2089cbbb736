"""What each option of an objective means, in one place: ``pyxai-bounds info --objective NAME`` and docs/objectives.md.

``python -m pyxai_bounds.train.objectives.options > docs/objectives.md`` writes the page anew.
"""

from __future__ import annotations

import inspect
import textwrap

from pyxai_bounds.train.objectives import OBJECTIVES, TERMS

MEANINGS = {
    "adaptive": "rescale every weight at each step so that its term counts as much as weight · (CE + 1)",
    "alpha": "weight of what is added to the cross entropy",
    "approx_factor": "the search for the worst neighbour uses m / approx_factor steps of integrated gradients",
    "beta": "sharpness of the softplus that stands for ReLU while searching; larger is closer to ReLU",
    "channels": "rank each entry (none), or an image's pixels with their channels added up (sum)",
    "extremes": "how many of the lowest top features and of the highest others are compared",
    "functional": "which released function is bounded: (p_t − 1)·∂z_t/∂x (training) or (z_t − 1)·∂z_t/∂x (evaluation)",
    "gamma": "radius of a box around the parameters, too, relative to each; 0 keeps them fixed",
    "h": "step of the finite difference that estimates curvature, in the units of x",
    "hessian_weight": "weight of the curvature term Est-H; 0 leaves it out",
    "hinge": "weight of the top-k separation",
    "ignore": "features that must not matter: flat indices and half-open ranges, such as 3,8:16",
    "iterations": "of the power method; more find the largest eigenvalue more exactly",
    "k": "how many features count as top",
    "kappa": "share of the plain cross entropy; the rest is that of the worst logits in the box",
    "m": "steps of integrated gradients",
    "margin": "how far apart top and other features are asked to be, relative to the length of the explanation",
    "method": "hutchinson (random signs), finite-difference (cheaper), or exact (a product per feature)",
    "of": "what is explained: the label's logit, its probability, or the loss",
    "pairs": "only the worst (top, other) pair of a sample, or the mean over all",
    "random_start": "start the search at a random point of the box instead of at the sample",
    "reach": "a ReLU costs nothing once its input's box is at least reach radii away from 0, by its midpoint",
    "reduction": "over the batch: mean or sum; RAR's published objectives are sums",
    "samples": "random vectors per step for the estimate of the Hessian's norm",
    "scale": "the hinge itself (linear), or log(1 + 10 · hinge), which bounds that are still enormous cannot dominate",
    "size": "l1, the norm of the integrated gradients, or sum, which is the change of the loss exactly",
    "stability": "weight of the penalty on ReLUs near their kink",
    "step_size": "of the search, in the units of x; 0 means 2.5 · eps / steps",
    "steps": "of the search for the worst neighbour",
    "tolerance": "a layer's box costs nothing while it is at most 1 / tolerance as wide as the input's",
    "weight": "weight of the term beside the cross entropy: λ, β or w₁ of the paper",
    "width": "how widths become one number: mean (as published), l2, squared, log (of l2), relative or log-relative "
    "(to the length of the explanation)",
    "separated-topk width": "weight of the log-width",
}


def options(objective: str) -> dict[str, tuple[str, str]]:
    """Name → (default, meaning) of each option of an objective or term. Raises KeyError where MEANINGS lacks one."""
    parameters = inspect.signature((OBJECTIVES | TERMS)[objective]).parameters.values()
    named = [p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    return {p.name: (_default(p.default), _meaning(objective, p.name)) for p in named}


def _default(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _meaning(objective: str, option: str) -> str:
    return MEANINGS.get(f"{objective} {option}") or MEANINGS[option]


def described(objective: str) -> str:
    """An objective or term as text: its documentation, then each option with its default and meaning.

    Raises ValueError for an unknown name.
    """
    known = OBJECTIVES | TERMS
    if objective not in known:
        raise ValueError(f"There is no objective {objective!r}; choose from {', '.join(known)}.")
    lines = [f"{name}={default}: {meaning}" for name, (default, meaning) in options(objective).items()]
    return "\n".join([inspect.getdoc(known[objective]) or "", "", *(lines or ["It has no options."])])


def markdown() -> str:
    """docs/objectives.md."""
    return _PAGE + "\n".join(_section(name) for name in OBJECTIVES)


def _section(name: str) -> str:
    what = (inspect.getdoc(OBJECTIVES[name]) or "").splitlines()[0].replace("`", "").replace(":func:", "")
    rows = "".join(f"| `{key}` | {default} | {text} |\n" for key, (default, text) in options(name).items())
    table = f"\n| option | default | meaning |\n|---|---|---|\n{rows}" if rows else "\nNo options.\n"
    return f"## `{name}`\n\n`{what}`\n{table}"


_PAGE = textwrap.dedent(
    """\
    # Objectives and their options

        pyxai-bounds train --objective rec --options alpha=0.1 width=log --eps 0.02 --out runs/mine
        pyxai-bounds info --objective rec

    The second command prints an objective's whole documentation with its source. CE is the cross entropy, v the
    explanation. A radius is not among the options: it is `--eps`. A sum such as
    `--objective "natural + 0.1 * width"` takes its parts with the defaults of their options.

    """
)

if __name__ == "__main__":
    print(markdown(), end="")
