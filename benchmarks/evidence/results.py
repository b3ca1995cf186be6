"""CSV rows, table cells and plots of the evidence study."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.evidence.methods import BASELINE
from benchmarks.harness import read, write
from mm_hf.evaluation.metrics.registry import METRICS
from mm_hf.evaluation.plots import plot_differences
from mm_hf.evaluation.statistics import Interval

Row = dict[str, Any]
SHOWN = ("accuracy", "nll", "calibration_error")  # in ablations and training lengths
ENDS = ("difference_to_erm", "low", "high")


def round_number(value: float, digits: int = 6) -> str:
    """Format a number for a CSV file; empty if it is not a number."""
    return "" if math.isnan(value) else f"{value:.{digits}g}"


def merge_rows(path: Path, found: Sequence[Row], keys: Mapping[str, Sequence[str]]) -> None:
    """Merge rows into a CSV file and sort it.

    New rows replace the rows with the same keys unless those have more `seeds`. All other rows are kept, since the
    training runs behind them may be on another machine.

    Args:
        path: The file; it is created if it does not exist.
        found: New rows, all with the same columns.
        keys: Columns that identify a group of rows, each with its values in the order of the file; other values come
            last, numbers in increasing order.
    """

    def key(row: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(str(row[name]) for name in keys)

    def position(row: Mapping[str, Any]) -> list[tuple[int, float]]:
        places = []
        for name, order in keys.items():
            value = str(row[name])
            number = float(value) if value.isdigit() else 0.0
            places.append((list(order).index(value) if value in order else len(order), number))
        return places

    if not found:
        return
    kept = read(path.name, path.parent)
    seeds = {key(row): int(row.get("seeds", 0)) for row in kept}
    found = [row for row in found if int(row.get("seeds", 0)) >= seeds.get(key(row), 0)]
    new = {key(row) for row in found}
    rows = [{name: str(value) for name, value in row.items()} for row in found]
    rows += [row for row in kept if key(row) not in new]
    write(path.name, sorted(rows, key=position), path.parent)


def read_rows(path: Path) -> list[Row]:
    """Return the rows of evidence.csv, with numbers in its columns of numbers."""
    names = ("task", "method", "metric", "interval", "measured_on")
    return [{k: v if k in names else float(v or "nan") for k, v in row.items()} for row in read(path.name, path.parent)]


def group_by(rows: Sequence[Row], column: str) -> dict[str, list[Row]]:
    """Return the rows per value of a column, in the order of the rows."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[column], []).append(row)
    return groups


def difference_of(row: Mapping[str, Any]) -> Interval:
    """Return the difference from the baseline and its interval."""
    return Interval(*(float("nan" if row[end] == "" else row[end]) for end in ENDS))


def mean_of(row: Row) -> Interval:
    """Return the mean over seeds and its interval."""
    return Interval(row["mean"], row["mean"] - row["half_width"], row["mean"] + row["half_width"])


def bold_if_significant(text: str, interval: Interval) -> str:
    """Return the text in bold if the interval excludes zero."""
    return f"**{text}**" if interval.excludes_zero else text


def mean_cell(row: Row | None) -> str:
    """Format the mean of a metric."""
    if row is None or math.isnan(row["mean"]):
        return "n/a" if row is None else "not a number"
    return METRICS[row["metric"]].format_mean(mean_of(row))


def difference_cell(row: Row | None) -> str:
    """Format the difference from the baseline; for the baseline itself, the mean."""
    if row is None or row["method"] == BASELINE:
        return mean_cell(row)
    shown, difference = METRICS[row["metric"]], difference_of(row)
    if math.isnan(difference.value):
        return "not a number"
    text = (
        shown.format(difference.value, sign=True) if math.isnan(difference.low) else shown.format_difference(difference)
    )
    return bold_if_significant(text, difference)


def title_of(metric: str) -> str:
    """Return the name of a metric with its unit and a capital letter."""
    label = METRICS[metric].label
    return label[0].upper() + label[1:]


def draw_differences(by_metric: Mapping[str, Mapping[str, Interval]], path: Path) -> None:
    """Draw a forest plot of differences from the baseline, by metric and method."""
    partial = path.with_name(f"partial-{os.getpid()}-{path.name}")
    plot_differences(
        {title_of(metric): differences for metric, differences in by_metric.items()},
        partial,
        baseline=BASELINE,
        better={title_of(metric): METRICS[metric].better for metric in by_metric},
        scales={title_of(metric): METRICS[metric].scale for metric in by_metric},
    )
    shutil.move(partial, path)
