"""The report on several lengths of training: a map, a table, and a sentence for each length."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...evaluation.metrics.registry import MetricInfo, compared_metrics, get_metric
from ...evaluation.plots import plot_lengths
from ...evaluation.statistics import Range
from ...evaluation.templates import render
from ..compare import Comparison
from ..lengths import duration
from .figures import Figure
from .tables import Cell, Table
from .write import TEMPLATES, environment_of

COLUMNS = (
    "length", "duration", "method", "metric", "mean", "low", "high", "difference", "difference_low", "difference_high",
)  # fmt: skip


def write_lengths_report(comparisons: Mapping[int, Comparison], directory: str | Path) -> Path:
    """Write `report.html`, `report.md`, `lengths.csv` and the map in `figures/` into a directory.

    Args:
        comparisons: The finished comparisons by length.
        directory: The output directory. It is created if it does not exist.

    Returns:
        The path of `report.html`, which needs no other file.
    """
    directory = Path(directory)
    (directory / "figures").mkdir(parents=True, exist_ok=True)
    with (directory / "lengths.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows_of(comparisons))
    first = next(iter(comparisons.values()))
    values = {
        "content": "lengths.jinja",
        "name": f"Lengths of training on {first.name}",
        "seeds": len(first.seeds),
        "lengths": list(comparisons),
        "sentences": [sentence(length, comparison) for length, comparison in comparisons.items()],
        "figures": {name: figure for name in ("accuracy", "nll") if (figure := _map(comparisons, name, directory))},
        "tables": {name: _table(comparisons, get_metric(name)) for name in ("accuracy", "nll")},
        "environment": environment_of(first),
    }
    for name in ("report.md", "report.html"):
        (directory / name).write_text(render(TEMPLATES / f"{name}.jinja", **values), encoding="utf-8")
    return directory / "report.html"


def rows_of(comparisons: Mapping[int, Comparison]) -> list[dict[str, Any]]:
    """Return a row for each length, method and compared metric: the content of `lengths.csv`."""
    rows = []
    for length, comparison in comparisons.items():
        for info in compared_metrics():
            for name, mean in comparison.mean(info.name).items():
                row = {"length": length, "duration": duration(comparison), "method": name, "metric": info.name}
                row |= {"mean": mean.value}
                if not isinstance(mean, Range):
                    row |= {"low": mean.low, "high": mean.high}
                difference = comparison.differences.get(info.name, {}).get(name)
                if difference is not None:
                    row |= {"difference": difference.value}
                    row |= {"difference_low": difference.low, "difference_high": difference.high}
                rows.append(row)
    return rows


def sentence(length: int, comparison: Comparison) -> str:
    """State the method with the highest test accuracy at a length, and its difference from the baseline."""
    info = get_metric("accuracy")
    means = {name: mean.value for name, mean in comparison.mean(info.name).items() if np.isfinite(mean.value)}
    start = f"{title(length, comparison)}:"
    if not means:
        return f"{start} no method has a finite accuracy."
    best = max(means, key=lambda name: means[name])
    start = f"{start} {best} is best with an accuracy of {info.with_unit(means[best])}"
    differences = comparison.differences.get(info.name, {})
    difference = differences.get(best)
    if difference is None:  # of the baseline
        unclear = differences and not any(other.excludes_zero for other in differences.values())
        return f"{start}; no method differs reliably from it: use more seeds." if unclear else f"{start}."
    gain = f"{start}, {info.format_difference(difference)} points compared with {comparison.baseline}"
    return f"{gain}." if difference.excludes_zero else f"{gain}: no reliable difference; use more seeds."


def title(length: int, comparison: Comparison) -> str:
    """Return a length with its number of epochs or steps."""
    return f"{length}x ({duration(comparison)})"


def _map(comparisons: Mapping[int, Comparison], metric: str, directory: Path) -> Figure | None:
    first = next(iter(comparisons.values()))
    if first.baseline is None:
        return None
    info, path = get_metric(metric), directory / "figures" / f"lengths_{metric}.png"
    means = {
        f"{length}x\n{duration(each)}": {name: mean.value for name, mean in each.mean(metric).items()}
        for length, each in comparisons.items()
    }
    differences = [each.differences.get(metric, {}) for each in comparisons.values()]
    plot_lengths(means, dict(zip(means, differences, strict=True)), path, baseline=first.baseline, info=info)
    caption = (
        f"{info.label[0].upper()}{info.label[1:]} of each method at each length of training, and below it the "
        f"difference from {first.baseline}, in bold if its 95 % interval excludes zero. Frames: the best method of "
        "each length."
    )
    return Figure(path, f"Map of {info.title}", caption, narrow=True)


def _table(comparisons: Mapping[int, Comparison], info: MetricInfo) -> Table:
    methods = list(dict.fromkeys(name for each in comparisons.values() for name in each.runs))
    rows = [[Cell(name), *(_cell(each, info, name) for each in comparisons.values())] for name in methods]
    headings = ["Method", *(title(length, each) for length, each in comparisons.items())]
    baseline = next(iter(comparisons.values())).baseline
    caption = f"{info.heading}: mean over seeds and difference from {baseline} [95 % interval]."
    return Table(headings, rows, "l" + "r" * len(comparisons), caption)


def _cell(comparison: Comparison, info: MetricInfo, name: str) -> Cell:
    mean = comparison.mean(info.name).get(name)
    if mean is None:
        return Cell("n/a")
    difference = comparison.differences.get(info.name, {}).get(name)
    if difference is None:
        return Cell(info.format(mean.value))
    mark = ("better" if info.is_improvement(difference.value) else "worse") if difference.excludes_zero else ""
    return Cell(f"{info.format(mean.value)}, {info.format_difference(difference)}", mark)  # type: ignore[arg-type]
