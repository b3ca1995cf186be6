"""What the study says of Dense MultiMix over all tasks: against plain training, and against the best of the others.

It is kept in verdict.csv, since paired intervals need the runs themselves: a row is replaced where there are runs of the
method, plain training and the others that are best on the task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from evidence_summary import BASELINE, Row, bold, finished_runs, keep_rows, paired, put, read_rows
from harness import read

from mm_hf.comparison.report.tables import METRICS
from mm_hf.evaluation.statistics import Interval, mean_interval

JUDGED = {
    "dense_multimix": "The default, `DenseMultiMix()`",
    "dense_multimix_and_mixup": 'With input mixup from the first step, `DenseMultiMix(input_mixing="mixup", input_mixing_start=0)`',
}
RIVALS = ("label_smoothing", "mixup", "cutmix", "manifold_mixup", "transmix")
SHIFTS = ("fgsm_accuracy", "corruption_accuracy", "ood_auroc")
RATIOS = {"nll": "NLL", "calibration_error": "Calibration error", "train_seconds": "Training time"}
MOST = {"nll": 0.7, "calibration_error": 0.7, "train_seconds": 1.1}


@dataclass(frozen=True)
class Verdict:
    """A method on one task.

    Attributes:
        seeds: That it and plain training both have.
        gain: Of accuracy over plain training, paired bootstrap.
        rival: The other method with the highest mean accuracy on the test examples.
        lead: Of accuracy over that one, paired bootstrap.
        ratios: Mean over seeds divided by plain training's, for NLL, calibration error and seconds.
        shifts: For robustness and unknown classes, the method that is best of the others, and this one's
            difference to it, Student's interval over seeds.
    """

    seeds: int
    gain: Interval
    rival: str
    lead: Interval
    ratios: dict[str, float]
    shifts: dict[str, tuple[str, Interval]]

    def to_row(self, task: str, method: str) -> Row:
        """As a row of verdict.csv."""
        row: Row = dict.fromkeys(FIELDS, "")
        row |= {"task": task, "method": method, "seeds": self.seeds, "lead_over": self.rival}
        row |= {name: f"{ratio:.4g}" for name, ratio in self.ratios.items()}
        intervals = {"gain": self.gain, "lead": self.lead}
        for metric, (rival, interval) in self.shifts.items():
            intervals[metric] = interval
            row[f"{metric}_over"] = rival
        for name, interval in intervals.items():
            row |= {f"{name}{end}": f"{value:.4g}" for end, value in zip(ENDS, _numbers(interval), strict=True)}
        return row

    @classmethod
    def from_row(cls, row: Mapping[str, str]) -> Verdict:
        """The inverse of `to_row`."""

        def interval(name: str) -> Interval:
            return Interval(*(float(row[f"{name}{end}"]) for end in ENDS))

        return cls(
            int(row["seeds"]),
            interval("gain"),
            row["lead_over"],
            interval("lead"),
            {name: float(row[name]) for name in RATIOS},
            {name: (row[f"{name}_over"], interval(name)) for name in SHIFTS if row[f"{name}_over"]},
        )


def _numbers(interval: Interval) -> tuple[float, float, float]:
    return interval.value, interval.low, interval.high


ENDS = ("", "_low", "_high")
FIELDS = (
    "task", "method", "seeds", *(f"gain{end}" for end in ENDS), "lead_over", *(f"lead{end}" for end in ENDS), *RATIOS,
    *(name for metric in SHIFTS for name in (f"{metric}_over", *(f"{metric}{end}" for end in ENDS))),
)  # fmt: skip


def verdict(directory: Path, method: str, rows: Sequence[Row]) -> Verdict | None:
    """A method on the task of a directory.

    Args:
        directory: With the task's runs.
        method: One of the study's.
        rows: Of evidence.csv, all methods of this task: they tell which of the others is best.

    Returns:
        None where there are no runs of the method, of plain training, or of the others that are best.
    """
    runs = finished_runs(directory)
    known = {row["metric"] for row in rows if row["method"] == method}
    rivals = {metric: best(rows, metric) for metric in ("accuracy", *SHIFTS) if metric in known}
    rivals = {metric: name for metric, name in rivals.items() if name}
    if "accuracy" not in rivals or not {method, BASELINE, *rivals.values()} <= runs.keys():
        return None
    plain = paired(directory, runs, method)
    ratios = {}
    for metric in RATIOS:
        values = plain.values(metric)
        ratios[metric] = float(values[method].mean() / values[BASELINE].mean())
    rival = rivals.pop("accuracy")
    shifts = {}
    for metric, other in rivals.items():
        values = paired(directory, runs, method, other).values(metric)
        shifts[metric] = other, mean_interval(values[method] - values[other])
    return Verdict(
        len(plain.seeds),
        plain.differences["accuracy"][method],
        rival,
        paired(directory, runs, method, rival).differences["accuracy"][method],
        ratios,
        shifts,
    )


def best(rows: Sequence[Row], metric: str) -> str:
    """Of the other methods, the one with the highest mean of a figure; "" where none has it."""
    means = {row["method"]: row["mean"] for row in rows if row["metric"] == metric and row["method"] in RIVALS}
    return max(means, key=lambda name: means[name]) if means else ""


def write_verdict(output_dir: Path, tasks: Sequence[str], results_dir: Path, docs_dir: Path) -> None:
    """verdict.csv; and in evidence.md the table over all tasks, and the count of what was aimed at."""
    rows = read_rows(results_dir / "evidence.csv")
    found = []
    for task in tasks:
        own = [row for row in rows if row["task"] == task]
        judged = {method: verdict(output_dir / task, method, own) for method in JUDGED}
        found += [value.to_row(task, method) for method, value in judged.items() if value is not None]
    path = results_dir / "verdict.csv"
    if found:
        keep_rows(path, found)
    kept = read(path.name, path.parent)
    lines: list[str] = []
    for method, title in JUDGED.items():
        known = {row["task"]: Verdict.from_row(row) for row in kept if row["method"] == method}
        if known:
            lines += [f"**{title}**", "", *table(known), "", *counts(known), ""]
    if lines:
        put(docs_dir / "evidence.md", "verdict", lines)


def table(known: Mapping[str, Verdict]) -> list[str]:
    """One row a task."""
    accuracy = METRICS["accuracy"]
    lines = [
        f"| Task | Seeds | Accuracy less {BASELINE}'s | Accuracy less the best other's | NLL | Calibration error | Time |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for task, v in known.items():
        cells = [task, str(v.seeds), bold(accuracy.difference(v.gain), v.gain)]
        cells += [f"{bold(accuracy.difference(v.lead), v.lead)} {v.rival}"]
        cells += [f"{v.ratios[metric]:.2f}x" for metric in RATIOS]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| Task | FGSM accuracy | Corrupted accuracy | AUROC of unknown classes |", "|---|---:|---:|---:|"]
    for task, v in known.items():
        if v.shifts:
            cells = [_shift(metric, v.shifts.get(metric)) for metric in SHIFTS]
            lines.append(f"| {' | '.join([task, *cells])} |")
    return lines


def counts(known: Mapping[str, Verdict]) -> list[str]:
    """Of what was aimed at, how much was shown."""
    total = len(known)
    above = sum(v.gain.low > 0 for v in known.values())
    below = sum(v.gain.high < 0 for v in known.values())
    lines = [
        f"- Accuracy better than plain training with an interval above zero: {above} of {total} tasks (aim: 3); below zero: "
        f"{below} (aim: 0)."
    ]
    for metric, name in RATIOS.items():
        held = sum(v.ratios[metric] <= MOST[metric] for v in known.values())
        lines.append(f"- {name} at most {MOST[metric]} times plain training's: {held} of {total} tasks (aim: all).")
    behind = sum(v.lead.high < 0 for v in known.values())
    ahead = sum(v.lead.low > 0 for v in known.values())
    lines.append(
        f"- Against the best other method of each task, chosen by the test itself: accuracy worse beyond its interval on {behind} "
        f"(aim: 0), better on {ahead} (aim: 2)."
    )
    for metric in SHIFTS:
        shifts = [v.shifts[metric][1] for v in known.values() if metric in v.shifts]
        held = sum(not shift.high < 0 for shift in shifts)
        lines.append(
            f"- {METRICS[metric].title.partition(' (')[0]} not worse than the best other's beyond its interval: {held} of "
            f"{len(shifts)} tasks (aim: 3)."
        )
    return lines


def _shift(metric: str, found: tuple[str, Interval] | None) -> str:
    if found is None:
        return "n/a"
    name, interval = found
    return f"{bold(METRICS[metric].difference(interval), interval)} {name}"
