"""The report of a comparison: one HTML file, and Markdown with figures beside it."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

from ...evaluation.files import write_text
from ...evaluation.templates import render
from ..compare import Comparison
from .figures import draw_figures
from .findings import FINDINGS_HEADING, findings
from .tables import report_tables

TEMPLATES = Path(__file__).parent


def write_report(comparison: Comparison, directory: str | Path) -> Path:
    """Write `report.html`, `report.md` and `figures/` into a directory.

    Args:
        comparison: The finished runs.
        directory: The output directory. It is created if it does not exist.

    Returns:
        The path of `report.html`, which needs no other file.
    """
    directory = Path(directory)
    figures = draw_figures(comparison, directory / "figures")
    values = {**_values(comparison), "figures": figures}
    for name in ("report.md", "report.html"):
        write_text(directory / name, render(TEMPLATES / f"{name}.jinja", **values))
    return directory / "report.html"


def _values(comparison: Comparison) -> dict[str, Any]:
    """Return the variables of the templates, but for the figures."""
    task, several = comparison.settings.get("task", {}), len(comparison.trained) > 1
    return {
        "content": "content.jinja",
        "name": f"{'Mixing methods' if several else next(iter(comparison.runs))} on {comparison.name}",
        "summary": _summary(comparison),
        "findings_heading": FINDINGS_HEADING,
        "sentences": findings(comparison),
        "tables": report_tables(comparison),
        "robustness": _robustness(comparison),
        "unknown_examples": task.get("unknown_examples", "the"),
        "gpu": torch.cuda.is_available(),
        "notes": sorted({note for runs in comparison.runs.values() for run in runs for note in run.notes}),
        "replicates": f"{comparison.replicates:,}",
        "seeds": len(comparison.seeds),
        "derived": list(comparison.derived),
        "trained": several or comparison.baseline is not None,
        "environment": environment_of(comparison),
    }


def _summary(comparison: Comparison) -> str:
    task, seeds, methods = comparison.settings.get("task", {}), len(comparison.seeds), len(comparison.trained)
    model = f"{task['model']} with {task['parameters']:,} parameters" if "model" in task else "The model"
    test = f"{task['test_examples']:,} test examples" if "test_examples" in task else "the test examples"
    if methods == 1 and comparison.baseline is None:
        return f"{model}, evaluated on {test}."
    training = f"trained on {task['training_examples']:,} examples and " if "training_examples" in task else ""
    return (
        f"{model}, {training}evaluated on {test}: {methods} method{'s' * (methods > 1)} with {seeds} "
        f"seed{'s' * (seeds > 1)} each. With the same seed, all methods start from the same weights and get the same "
        "mini-batches in the same order."
    )


def _robustness(comparison: Comparison) -> dict[str, Any]:
    options, task = comparison.settings.get("evaluation", {}), comparison.settings.get("task", {})
    samples = options.get("robustness_samples", 0)
    return {
        "samples": f"{min(samples, task.get('test_examples', samples)):,}",
        "epsilon": f"{255 * options.get('epsilon', 0.0):.3g}/255",
        "corruptions": max(len(run.corruptions) for runs in comparison.runs.values() for run in runs),
    }


def environment_of(comparison: Comparison) -> str:
    """Return the settings of a comparison and the versions of libraries, a line each."""
    from ... import __version__

    settings = {k: v for k, v in comparison.settings.items() if k != "methods"}
    lines = [f"{key}: {json.dumps(value)}" for key, value in settings.items()]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    lines.append(
        f"versions: mm_hf {__version__}, transformers {transformers.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}; {device}"
    )
    return "\n".join(lines)
