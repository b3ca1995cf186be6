"""What the study says of Dense MultiMix over all tasks: against plain training, and against the best of the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from evidence_summary import BASELINE, bold, finished_runs, paired, put

from mm_hf.analysis.statistics import Interval, mean_interval
from mm_hf.comparison import Run
from mm_hf.comparison.tables import METRICS

JUDGED = {
    "dense_multimix": "The default, `DenseMultiMix()`",
    "dense_multimix_and_mixup": 'With input mixup in half of the mini-batches, `DenseMultiMix(preset="mixup")`',
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


def verdict(directory: Path, method: str) -> Verdict | None:
    """A method on the task of a directory; None where it, plain training, or all others were not run."""
    runs = finished_runs(directory)
    rivals = [name for name in RIVALS if name in runs]
    if method not in runs or BASELINE not in runs or not rivals:
        return None
    plain = paired(directory, runs, method)
    rival = best(runs, rivals, "accuracy")
    ratios = {}
    for metric in RATIOS:
        values = plain.values(metric)
        ratios[metric] = float(values[method].mean() / values[BASELINE].mean())
    shifts = {}
    for metric in SHIFTS:
        others = [name for name in rivals if has(runs[name], metric)]
        if others and has(runs[method], metric):
            other = best(runs, others, metric)
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


def has(runs: Mapping[int, Run], metric: str) -> bool:
    """Whether every run has a figure."""
    return all(metric in run.metrics for run in runs.values())


def best(runs: Mapping[str, Mapping[int, Run]], names: Iterable[str], metric: str) -> str:
    """The method with the highest mean of a figure, over its own seeds."""
    return max(names, key=lambda name: np.mean([run.metrics[metric] for run in runs[name].values()]))


def write_verdict(output_dir: Path, tasks: Sequence[str], docs_dir: Path) -> None:
    """The table over all tasks, and the count of what was aimed at, in evidence.md."""
    lines: list[str] = []
    for method, title in JUDGED.items():
        found = {task: verdict(output_dir / task, method) for task in tasks}
        known = {task: value for task, value in found.items() if value is not None}
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
