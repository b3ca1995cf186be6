"""Summary over all tasks and lengths: Dense MultiMix against plain training and against the best rival.

Paired intervals need the training runs themselves. They are kept in verdict.csv: a row is replaced if there are runs of
the default, of plain training and of the rival.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.evidence.methods import BASELINE, DEFAULT, EARLY_STOPPED, RIVALS
from benchmarks.evidence.results import Row, bold_if_significant, group_by, merge_rows
from benchmarks.evidence.runs import Paths, finished_runs, length_directories, length_of, pair_runs
from benchmarks.evidence.tasks import TASKS
from benchmarks.harness import read
from benchmarks.markdown import replace_section, table_lines, wrap_text
from mm_hf.comparison import Run
from mm_hf.evaluation.metrics.registry import METRICS
from mm_hf.evaluation.statistics import Interval

DIFFERENCES = {  # columns of verdict.csv: metric and the method that it is compared with
    "gain": ("accuracy", BASELINE),
    "early_gain": ("accuracy", EARLY_STOPPED),
    "early_nll": ("nll", EARLY_STOPPED),
    "lead": ("accuracy", "rival"),
}
RATIOS = {"nll": "NLL", "calibration_error": "Calibration error"}
SUFFIXES = ("", "_low", "_high")
FIELDS = (
    "task", "length", "seeds", "rival", "plain_calibration_error", *RATIOS,
    *(f"{name}{end}" for name in DIFFERENCES for end in SUFFIXES),
)  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """Summary of the default on one task at one length.

    Attributes:
        task: Name of the task.
        length: Multiple of the task's number of epochs.
        seeds: Number of seeds that the default and plain training have both finished.
        rival: The other mixing method with the highest mean accuracy on the validation examples; "" if unknown.
        plain_calibration_error: Mean calibration error of plain training.
        ratios: Mean over seeds divided by plain training's, for NLL and calibration error.
        differences: The default minus another method, by the names of `DIFFERENCES`; intervals of the paired bootstrap.
    """

    task: str
    length: int
    seeds: int
    rival: str
    plain_calibration_error: float
    ratios: dict[str, float]
    differences: dict[str, Interval]

    def to_row(self) -> Row:
        """Return the row of verdict.csv."""
        row: Row = dict.fromkeys(FIELDS, "")
        row |= {"task": self.task, "length": self.length, "seeds": self.seeds, "rival": self.rival}
        row["plain_calibration_error"] = f"{self.plain_calibration_error:.4g}"
        row |= {name: f"{ratio:.4g}" for name, ratio in self.ratios.items()}
        for name, interval in self.differences.items():
            values = (interval.value, interval.low, interval.high)
            row |= {f"{name}{end}": f"{value:.4g}" for end, value in zip(SUFFIXES, values, strict=True)}
        return row

    @classmethod
    def from_row(cls, row: Mapping[str, str]) -> Verdict:
        """Return the verdict of a row of verdict.csv: the inverse of `to_row`."""
        return cls(
            row["task"],
            int(row["length"]),
            int(row["seeds"]),
            row["rival"],
            float(row["plain_calibration_error"]),
            {name: float(row[name]) for name in RATIOS},
            {name: Interval(*(float(row[f"{name}{end}"]) for end in SUFFIXES)) for name in DIFFERENCES if row[name]},
        )


def judge(directory: Path) -> Verdict | None:
    """Compare the default with plain training and with the best rival on a task; None if runs are missing."""
    runs = finished_runs(directory)
    if not {DEFAULT, BASELINE} <= runs.keys():
        return None
    plain = pair_runs(directory, runs, DEFAULT)
    if not plain.seeds:
        return None
    values = {metric: plain.values(metric) for metric in RATIOS}
    ratios = {metric: float(v[DEFAULT].mean() / v[BASELINE].mean()) for metric, v in values.items()}
    rival = best_rival(runs, plain.seeds)
    differences = {}
    for name, (metric, other) in DIFFERENCES.items():
        other = rival if other == "rival" else other
        if other in runs:
            differences[name] = pair_runs(directory, runs, DEFAULT, other).differences[metric][DEFAULT]
    error = float(values["calibration_error"][BASELINE].mean())
    return Verdict(directory.name, length_of(directory), len(plain.seeds), rival, error, ratios, differences)


def best_rival(runs: Mapping[str, Mapping[int, Run]], seeds: Sequence[int]) -> str:
    """Return the rival with the highest mean validation accuracy, of those that have finished all seeds; else ""."""
    means = {
        name: float(np.mean([validation_accuracy(runs[name][seed]) for seed in seeds]))
        for name in RIVALS
        if name in runs and set(seeds) <= runs[name].keys()
    }
    means = {name: mean for name, mean in means.items() if not np.isnan(mean)}
    return max(means, key=lambda name: means[name]) if means else ""


def validation_accuracy(run: Run) -> float:
    """Return the accuracy on the validation examples at the end of a run; NaN without validation examples."""
    found = [entry["eval_accuracy"] for entry in run.history if "eval_accuracy" in entry]
    return float(found[-1]) if found else float("nan")


def summarize(paths: Paths) -> list[Path]:
    """Update verdict.csv from finished runs; write the table over all tasks into evidence.md."""
    judged = (judge(directory) for directory in length_directories(paths.output / "run"))
    path = paths.results / "verdict.csv"
    merge_rows(path, [value.to_row() for value in judged if value], {"task": list(TASKS), "length": ()})
    known = [Verdict.from_row(row) for row in read(path.name, path.parent)]
    if not known:
        return []
    lines = [*table_lines(cells(known)), ""]
    for length, rows in group_by([vars(v) for v in known], "length").items():
        lines += [f"**Length {length}**", "", *count_targets([Verdict(**row) for row in rows]), ""]
    replace_section(paths.page, "verdict", lines)
    return [path]


def cells(known: Sequence[Verdict]) -> list[list[str]]:
    """Return the cells of a table with a row per task and length."""
    titles = ["Accuracy minus plain", "minus early-stopped plain", "minus best rival"]
    table = [["Task", "Length", "Seeds", *titles, "NLL minus early-stopped plain", *RATIOS.values()]]
    for v in known:
        shown = {name: _cell(v.differences.get(name), metric) for name, (metric, _) in DIFFERENCES.items()}
        lead = f"{shown['lead']} {v.rival}".strip()
        row = [v.task, f"{v.length}x", str(v.seeds), shown["gain"], shown["early_gain"], lead, shown["early_nll"]]
        table.append([*row, *(f"{v.ratios[metric]:.2f}x" for metric in RATIOS)])
    return table


def _cell(interval: Interval | None, metric: str) -> str:
    if interval is None:
        return "n/a"
    return bold_if_significant(METRICS[metric].format_difference(interval), interval)


def count_targets(known: Sequence[Verdict]) -> list[str]:
    """Return a line per question of the study, with the number of tasks that answer yes."""

    def counts(name: str) -> tuple[int, int, int]:
        found = [v.differences[name] for v in known if name in v.differences]
        return sum(d.low > 0 for d in found), sum(d.high < 0 for d in found), len(found)

    lines = []
    for name, title in (
        ("gain", "plain training"),
        ("early_gain", "early-stopped plain training"),
        ("lead", "the best rival, which is chosen on the validation examples"),
    ):
        higher, lower, total = counts(name)
        lines += wrap_text(
            f"- Accuracy against {title}: significantly higher on {higher} of {total} tasks, lower on {lower}."
        )
    higher, lower, total = counts("early_nll")
    lines.append(
        f"- NLL against early-stopped plain training: significantly lower on {lower} of {total}, higher on {higher}."
    )
    miscalibrated = [v for v in known if v.plain_calibration_error > 0.05]
    for metric in ("nll", "calibration_error"):
        held = sum(v.ratios[metric] <= 0.7 for v in miscalibrated)
        lines += wrap_text(
            f"- {RATIOS[metric]} at most 0.7 times that of plain training, where plain training's calibration error "
            f"exceeds 5 %: {held} of {len(miscalibrated)} tasks."
        )
    return lines
