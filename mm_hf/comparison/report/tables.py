"""Tables of a report: means of metrics, differences from the baseline, and settings of the methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from markupsafe import Markup

from ...evaluation.metrics.registry import Group, MetricInfo, compared_metrics, metrics_of
from ...evaluation.statistics import INTERVAL_SEEDS, Interval, has_interval
from ...evaluation.templates import escape_markdown, markdown_table
from ..compare import Comparison

LISTED_CLASSES = 50
GROUPS: tuple[Group, ...] = ("classification", "robustness", "ood", "representation", "cost")


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Args:
        text: The content.
        mark: The side of a significant difference, which is highlighted.
    """

    text: str
    mark: Literal["", "better", "worse"] = ""

    @property
    def markdown(self) -> Markup:
        """The content as Markdown, in bold if it is marked."""
        text = escape_markdown(self.text)
        return Markup("**") + text + Markup("**") if self.mark else text


@dataclass(frozen=True)
class Table:
    """Rows of cells under headings.

    Args:
        headings: One for each column.
        rows: The cells of each row.
        align: "l" (text) or "r" (numbers) for each column.
        caption: What the cells contain.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    align: str
    caption: str = ""

    @property
    def markdown(self) -> Markup:
        """The table, without its caption, as Markdown."""
        return markdown_table(self.headings, [[cell.markdown for cell in row] for row in self.rows], self.align)


def report_tables(comparison: Comparison) -> dict[str, Table | None]:
    """Return the tables of a report by name; None in place of an empty one."""
    return {
        **{group: mean_table(comparison, group) for group in GROUPS},
        "differences": difference_table(comparison),
        "classes": class_table(comparison),
        "settings": settings_table(comparison),
    }


def mean_table(comparison: Comparison, group: Group) -> Table | None:
    """Return the means over seeds of a group's metrics, one row for each method; None if no metric was measured.

    Args:
        comparison: The finished runs.
        group: A group of the metric registry.
    """
    means = {info: mean for info in metrics_of(group) if (mean := comparison.mean(info.name))}
    if not means:
        return None
    rows = [
        [Cell(name), *(Cell(info.format_mean(mean[name]) if name in mean else "n/a") for info, mean in means.items())]
        for name in (comparison.runs if group == "classification" else comparison.trained)
    ]
    return _metric_table(list(means), rows, mean_caption(len(comparison.seeds)))


def mean_caption(seeds: int) -> str:
    """Describe the cells of a table of means over this number of seeds."""
    if has_interval(seeds):
        return f"Mean over {seeds} seeds ± half-width of Student's 95 % interval."
    if seeds == 1:
        return ""
    return f"Mean over {seeds} seeds (range of their values). A confidence interval requires {INTERVAL_SEEDS} seeds."


def difference_table(comparison: Comparison) -> Table | None:
    """Return the differences of all other methods from the baseline, with intervals; None without other methods."""
    if not comparison.differences:
        return None
    metrics = compared_metrics()
    rows = [
        [Cell(name), *(_difference_cell(info, comparison.differences[info.name][name]) for info in metrics)]
        for name in comparison.runs
        if name != comparison.baseline
    ]
    return _metric_table(
        metrics, rows, f"Difference from {comparison.baseline} [95 % interval of the paired bootstrap]."
    )


def class_table(comparison: Comparison) -> Table | None:
    """Return precision, recall and F1 of each class; None if training has diverged.

    Of many classes, those with the lowest mean F1 are listed.
    """
    counts = {name: confusion_counts(comparison, name) for name in comparison.trained}
    if any(not np.isfinite(run.metrics["nll"]) for runs in comparison.trained.values() for run in runs):
        return None
    examples = next(iter(counts.values())).sum(axis=1) // len(comparison.seeds)
    scores = {name: class_scores(matrix) for name, matrix in counts.items()}
    mean_f1 = np.mean([each[:, 2] for each in scores.values()], axis=0)
    listed = np.arange(len(examples))
    caption = "Precision / recall / F1 in %"
    if len(listed) > LISTED_CLASSES:
        listed = np.argsort(mean_f1, kind="stable")[:LISTED_CLASSES]
        caption += f", of the {LISTED_CLASSES} of {len(examples):,} classes with the lowest mean F1"
    caption += "; the predictions of all seeds are pooled." if len(comparison.seeds) > 1 else "."
    names = comparison.class_names if comparison.class_names and len(comparison.class_names) == len(examples) else None
    rows = [
        [
            Cell(str(i) if names is None else str(names[i])),
            Cell(f"{examples[i]:,}"),
            *(Cell(" / ".join(f"{100 * score:.1f}" for score in each[i])) for each in scores.values()),
        ]
        for i in listed.tolist()
    ]
    return Table(["Class", "Test examples", *scores], rows, "lr" + "r" * len(scores), caption)


def confusion_counts(comparison: Comparison, name: str) -> np.ndarray:
    """Return the number of test examples (c, c) by class and predicted class, over all seeds of a method."""
    from sklearn.metrics import confusion_matrix

    total = 0
    for run in comparison.runs[name]:
        arrays = run.arrays
        kept = arrays["labels"] >= 0
        logits, labels = arrays["logits"][kept], arrays["labels"][kept]
        total = total + confusion_matrix(labels, logits.argmax(axis=1), labels=np.arange(logits.shape[1]))
    return np.asarray(total)


def class_scores(counts: np.ndarray) -> np.ndarray:
    """Return precision, recall and F1 (c, 3) of a confusion matrix; 0 where they are undefined.

    Example:
        >>> class_scores(np.array([[3, 1], [0, 4]])).round(3).tolist()
        [[1.0, 0.75, 0.857], [0.8, 1.0, 0.889]]
    """
    correct, predicted, actual = counts.diagonal(), counts.sum(axis=0), counts.sum(axis=1)
    precision, recall = (correct / np.maximum(total, 1) for total in (predicted, actual))
    return np.stack([precision, recall, 2 * correct / np.maximum(predicted + actual, 1)], axis=1)


def settings_table(comparison: Comparison) -> Table | None:
    """Return the settings of each method; None if they are unknown."""
    rows = [
        [Cell(name), Cell(", ".join(f"{key}={value}" for key, value in method.to_dict().items()))]
        for name, method in comparison.methods.items()
        if method is not None
    ]
    return Table(["Method", "Settings"], rows, "ll") if rows else None


def _metric_table(metrics: Sequence[MetricInfo], rows: Sequence[Sequence[Cell]], caption: str) -> Table:
    return Table(["Method", *(info.heading for info in metrics)], rows, "l" + "r" * len(metrics), caption)


def _difference_cell(info: MetricInfo, interval: Interval) -> Cell:
    text = info.format_difference(interval)
    if not interval.excludes_zero:
        return Cell(text)
    return Cell(text, "better" if info.is_improvement(interval.value) else "worse")
