"""What a trained network can prove, measured and shown: metrics, evaluations, pictures, the HTML page, the demo.

The pictures need matplotlib, which ``plots`` and ``html`` import when they are first used.
"""

from pyxai_bounds.report.evaluate import AtRadius, Evaluation, Sample, SoundnessError, evaluate
from pyxai_bounds.report.measure import evaluate_all

__all__ = [
    "AtRadius",
    "Evaluation",
    "Sample",
    "SoundnessError",
    "evaluate",
    "evaluate_all",
]
