"""Update the tables of docs/gpu.md."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from benchmarks import harness
from benchmarks.gpu import growth, kernels, step, tests, training
from benchmarks.gpu.setup import NOT_MEASURED
from benchmarks.markdown import replace_section, table_lines

PAGE = Path(__file__).parents[2] / "docs" / "gpu.md"
PARTS: dict[str, ModuleType] = {
    "tests": tests,
    "step": step,
    "growth": growth,
    "kernels": kernels,
    "training": training,
}


def update(page: Path = PAGE, directory: Path | None = None) -> None:
    """Replace the sections of a page, by default from benchmarks/results. A part without a file is not measured."""
    for name, part in PARTS.items():
        rows = harness.read(part.FILE, directory)
        lines = [f"Measured on {rows[0]['device']}.", "", *table_lines(part.table(rows), align="l")] if rows else []
        replace_section(page, name, ["", *(lines or [f"{NOT_MEASURED.capitalize()}."]), ""])
