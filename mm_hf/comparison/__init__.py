"""Comparison of mixing methods: training over several seeds under equal conditions, evaluation, and a report.

It needs the extra `analysis`: `pip install 'mm-hf[analysis]'`.
"""

from .compare import Comparison, run_comparison
from .evaluate import EvaluationOptions, PeakMemory, evaluate_model
from .lengths import run_lengths
from .record import Run
from .report.write import write_report
from .task import Task, as_methods, parse_method

__all__ = [
    "Comparison",
    "EvaluationOptions",
    "PeakMemory",
    "Run",
    "Task",
    "as_methods",
    "evaluate_model",
    "parse_method",
    "run_comparison",
    "run_lengths",
    "write_report",
]
