"""Training for explanations that can be certified: objectives, schedules, the loop, and runs kept on disk."""

from pyxai_bounds.ops.replay import GraphedStep
from pyxai_bounds.train.checkpoint import load, read_description, save
from pyxai_bounds.train.loop import Progress, TrainingDivergedError, fit
from pyxai_bounds.train.objectives import explanation_width, natural, rec
from pyxai_bounds.train.objectives.shared import deployed
from pyxai_bounds.train.recipe import Options, Recipe
from pyxai_bounds.train.runs import run
from pyxai_bounds.train.schedules import linear_ramp

__all__ = [
    "GraphedStep",
    "Options",
    "Progress",
    "Recipe",
    "TrainingDivergedError",
    "deployed",
    "explanation_width",
    "fit",
    "linear_ramp",
    "load",
    "natural",
    "read_description",
    "rec",
    "run",
    "save",
]
