"""Summary over all tasks: Dense MultiMix against plain training, and against the best other method of each task.

Paired intervals need the training runs themselves. They are kept in verdict.csv: a row is replaced if there are runs of
the method, of plain training and of the best other methods of the task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.evidence.methods import BASELINE
from benchmarks.evidence.results import Row, bold_if_significant, group_by, merge_rows
from benchmarks.evidence.runs import Paths, finished_runs, pair_runs
from benchmarks.evidence.tasks import TASKS
from benchmarks.harness import read
from benchmarks.markdown import replace_section, table_lines
from mm_hf.evaluation.metrics.registry import METRICS
from mm_hf.evaluation.statistics import Interval, mean_interval

JUDGED = {
    "dense_multimix": "The default, `DenseMultiMix()`",
    "dense_multimix_and_mixup": (
        'With input mixup from the first step, `DenseMultiMix(input_mixing="mixup", input_mixing_start=0)`'
    ),
}
RIVALS = ("label_smoothing", "mixup", "cutmix", "manifold_mixup", "transmix")
SHIFTS = {
    "fgsm_accuracy": "FGSM accuracy",
    "corruption_accuracy": "Corrupted accuracy",
    "ood_auroc": "AUROC of unknown classes",
}
RATIOS = {"nll": "NLL", "calibration_error": "Calibration error", "train_seconds": "Training time"}
LARGEST_RATIO = {"nll": 0.7, "calibration_error": 0.7, "train_seconds": 1.1}
SUFFIXES = ("", "_low", "_high")
FIELDS = (
    "task", "method", "seeds", *(f"gain{end}" for end in SUFFIXES), "lead_over", *(f"lead{end}" for end in SUFFIXES),
    *RATIOS, *(name for metric in SHIFTS for name in (f"{metric}_over", *(f"{metric}{end}" for end in SUFFIXES))),
)  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """Summary of a method on one task.

    Attributes:
        seeds: Number of seeds that both the method and plain training have finished.
        gain: Accuracy minus plain training's; interval of the paired bootstrap.
        rival: The other method with the highest mean accuracy on the test examples.
        lead: Accuracy minus the rival's; interval of the paired bootstrap.
        ratios: Mean over seeds divided by plain training's, for NLL, calibration error and training time.
        shifts: For each metric of robustness and unknown classes, the best other method and the difference from
            it, with Student's interval over seeds.
    """

    seeds: int
    gain: Interval
    rival: str
    lead: Interval
    ratios: dict[str, float]
    shifts: dict[str, tuple[str, Interval]]

    def to_row(self, task: str, method: str) -> Row:
        """Return the row of verdict.csv."""
        row: Row = dict.fromkeys(FIELDS, "")
        row |= {"task": task, "method": method, "seeds": self.seeds, "lead_over": self.rival}
        row |= {name: f"{ratio:.4g}" for name, ratio in self.ratios.items()}
        intervals = {"gain": self.gain, "lead": self.lead}
        for metric, (rival, interval) in self.shifts.items():
            intervals[metric] = interval
            row[f"{metric}_over"] = rival
        for name, interval in intervals.items():
            values = (interval.value, interval.low, interval.high)
            row |= {f"{name}{end}": f"{value:.4g}" for end, value in zip(SUFFIXES, values, strict=True)}
        return row

    @classmethod
    def from_row(cls, row: Mapping[str, str]) -> Verdict:
        """Return the verdict of a row of verdict.csv: the inverse of `to_row`."""

        def interval(name: str) -> Interval:
            return Interval(*(float(row[f"{name}{end}"]) for end in SUFFIXES))

        return cls(
            int(row["seeds"]),
            interval("gain"),
            row["lead_over"],
            interval("lead"),
            {name: float(row[name]) for name in RATIOS},
            {name: (row[f"{name}_over"], interval(name)) for name in SHIFTS if row[f"{name}_over"]},
        )


def judge(directory: Path, method: str, rows: Sequence[Row]) -> Verdict | None:
    """Compare a method with plain training and with the best other methods on a task.

    Args:
        directory: Directory of the task's runs.
        method: Name of a method.
        rows: Rows of evidence.csv of this task, which decide which of the other methods is best.

    Returns:
        None if runs of the method, of plain training or of the best other methods are missing.
    """
    runs = finished_runs(directory)
    known = {row["metric"] for row in rows if row["method"] == method}
    rivals = {metric: best_rival(rows, metric) for metric in ("accuracy", *SHIFTS) if metric in known}
    rivals = {metric: name for metric, name in rivals.items() if name}
    if "accuracy" not in rivals or not {method, BASELINE, *rivals.values()} <= runs.keys():
        return None
    plain = pair_runs(directory, runs, method)
    values = {metric: plain.values(metric) for metric in RATIOS}
    ratios = {metric: float(v[method].mean() / v[BASELINE].mean()) for metric, v in values.items()}
    rival = rivals.pop("accuracy")
    shifts = {}
    for metric, other in rivals.items():
        found = pair_runs(directory, runs, method, other).values(metric)
        shifts[metric] = other, mean_interval(found[method] - found[other])
    lead = pair_runs(directory, runs, method, rival).differences["accuracy"][method]
    return Verdict(len(plain.seeds), plain.differences["accuracy"][method], rival, lead, ratios, shifts)


def best_rival(rows: Sequence[Row], metric: str) -> str:
    """Return the other method with the highest mean of a metric; "" if none has the metric."""
    means = {row["method"]: row["mean"] for row in rows if row["metric"] == metric and row["method"] in RIVALS}
    return max(means, key=lambda name: means[name]) if means else ""


def summarize(paths: Paths, rows: Sequence[Row]) -> list[Path]:
    """Update verdict.csv from finished runs; write the tables over all tasks into evidence.md."""
    found = []
    for task, own in group_by(rows, "task").items():
        judged = {method: judge(paths.output / "run" / task, method, own) for method in JUDGED}
        found += [value.to_row(task, method) for method, value in judged.items() if value is not None]
    path = paths.results / "verdict.csv"
    merge_rows(path, found, {"task": list(TASKS), "method": list(JUDGED)})
    kept = read(path.name, path.parent)
    lines: list[str] = []
    for method, title in JUDGED.items():
        known = {row["task"]: Verdict.from_row(row) for row in kept if row["method"] == method}
        if known:
            lines += [f"**{title}**", "", *tables(known), "", *count_targets(known), ""]
    if not lines:
        return []
    replace_section(paths.page, "verdict", lines)
    return [path]


def tables(known: Mapping[str, Verdict]) -> list[str]:
    """Return the lines of two tables with a row per task."""
    accuracy = METRICS["accuracy"]
    first = [
        ["Task", "Seeds", f"Accuracy minus {BASELINE}", "Accuracy minus best other", "NLL", "Calibration error", "Time"]
    ]
    for task, v in known.items():
        gain = bold_if_significant(accuracy.format_difference(v.gain), v.gain)
        lead = f"{bold_if_significant(accuracy.format_difference(v.lead), v.lead)} {v.rival}"
        first.append([task, str(v.seeds), gain, lead, *(f"{v.ratios[metric]:.2f}x" for metric in RATIOS)])
    second = [["Task", *(f"{title} minus best other" for title in SHIFTS.values())]]
    second += [[task, *(_shift_cell(m, v.shifts.get(m)) for m in SHIFTS)] for task, v in known.items() if v.shifts]
    return [*table_lines(first), "", *table_lines(second)]


def count_targets(known: Mapping[str, Verdict]) -> list[str]:
    """Return a line per target of the study, with the number of tasks that reach it."""
    total = len(known)
    better = sum(v.gain.low > 0 for v in known.values())
    worse = sum(v.gain.high < 0 for v in known.values())
    lines = [
        f"- Accuracy significantly higher than plain training: {better} of {total} tasks (target: 3); significantly "
        f"lower: {worse} (target: 0)."
    ]
    for metric, name in RATIOS.items():
        held = sum(v.ratios[metric] <= LARGEST_RATIO[metric] for v in known.values())
        lines.append(
            f"- {name} at most {LARGEST_RATIO[metric]} times plain training: {held} of {total} tasks (target: all)."
        )
    behind = sum(v.lead.high < 0 for v in known.values())
    ahead = sum(v.lead.low > 0 for v in known.values())
    lines.append(
        f"- Accuracy minus best other method, which is chosen on the test examples: significantly lower on {behind} "
        f"tasks (target: 0),\n  significantly higher on {ahead} (target: 2)."
    )
    for metric, title in SHIFTS.items():
        shifts = [v.shifts[metric][1] for v in known.values() if metric in v.shifts]
        held = sum(not shift.high < 0 for shift in shifts)
        lines.append(
            f"- {title} not significantly lower than the best other method: {held} of {len(shifts)} tasks (target: 3)."
        )
    return lines


def _shift_cell(metric: str, found: tuple[str, Interval] | None) -> str:
    if found is None:
        return "n/a"
    name, interval = found
    return f"{bold_if_significant(METRICS[metric].format_difference(interval), interval)} {name}"
