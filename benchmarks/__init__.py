"""Benchmarks of mm_hf. Run them from the repository root: `python -m benchmarks.step`."""
