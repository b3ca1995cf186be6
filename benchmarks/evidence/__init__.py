"""Comparison of all methods on small real tasks: the study behind docs/evidence.md.

Run it from the repository root by `python -m benchmarks.evidence`, see `__main__.py`.
"""

import os

# Weights and data come from installed packages. A misspelled name must not start a download.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
