"""Which mixing method helps, by how much and how sure that is: methods trained alike over seeds, measured and reported.

They need the extra `analysis`: `pip install 'mm-hf[analysis]'`.
"""

from .comparing import Comparison, run_comparison
from .measuring import Measures, PeakMemory, measure
from .report import write_report
from .running import Run
from .task import Task, as_methods, parse_method

__all__ = [
    "Comparison",
    "Measures",
    "PeakMemory",
    "Run",
    "Task",
    "as_methods",
    "measure",
    "parse_method",
    "run_comparison",
    "write_report",
]
