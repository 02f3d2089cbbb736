"""Training for explanations that can be certified: objectives, schedules, the loop, and runs kept on disk."""

from pyxai_bounds.train.checkpoint import load, read_description, save
from pyxai_bounds.train.loop import Recipe, TrainingDivergedError, fit, run
from pyxai_bounds.train.objectives import explanation_width, natural, rec
from pyxai_bounds.train.schedules import linear_ramp

__all__ = [
    "Recipe",
    "TrainingDivergedError",
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
