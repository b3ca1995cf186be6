"""Tables and pictures of the evidence study: of the runs that its directories hold, and of what was measured before.

Runs are large and stay where they were made; what they say is kept in evidence.csv. A method that has runs on a task here
replaces its rows there unless they are of more seeds; all other rows stay.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from evidence_study import METHODS
from evidence_tasks import TASKS
from harness import read, write

from mm_hf.comparison import Comparison, Run
from mm_hf.comparison.report.tables import MAIN, METRICS
from mm_hf.evaluation.plots import plot_alignment_uniformity, plot_differences
from mm_hf.evaluation.statistics import Interval, mean_interval

FIELDS = (
    "task", "method", "metric", "mean", "half_width", "difference_to_erm", "low", "high", "interval", "seeds",
    "test_examples", "measured_on",
)  # fmt: skip
OTHERS = ("fgsm_accuracy", "corruption_accuracy", "ood_auroc", "ood_energy_auroc", "class_spread")
BASELINE = "erm"
BEGIN, END = "<!-- begin: {} -->", "<!-- end: {} -->"
Row = dict[str, Any]


def finished_runs(directory: Path, known_only: bool = True) -> dict[str, dict[int, Run]]:
    """The finished runs of a directory, by method and seed, plain training first; of the study's methods, or of all."""
    found: dict[str, dict[int, Run]] = {}
    for path in sorted(directory.glob("runs/*/seed-*")):
        run = Run.read(path)
        if run is not None:
            found.setdefault(run.method, {})[run.seed] = run
    order = METHODS if known_only else dict.fromkeys([BASELINE, *found])
    return {name: found[name] for name in order if name in found}


def paired(directory: Path, runs: Mapping[str, Mapping[int, Run]], method: str, baseline: str = BASELINE) -> Comparison:
    """Two methods on the seeds that both have: a study that still goes on has more of some methods."""
    seeds = sorted(runs[baseline].keys() & runs[method].keys())
    chosen = {name: [runs[name][seed] for seed in seeds] for name in dict.fromkeys((baseline, method))}
    return Comparison(directory.name, dict.fromkeys(chosen), chosen, baseline)


def rows_of(directory: Path) -> Iterator[Row]:
    """What the runs of one task say, one row a method and figure.

    Half-widths are of Student's 95 % interval over seeds. Differences of accuracy, NLL, Brier score and calibration
    error have intervals of the paired bootstrap over seeds and test examples; those of other figures, Student's of the
    differences seed by seed, which say nothing of other test examples.
    """
    runs = finished_runs(directory)
    settings = json.loads((directory / "settings.json").read_text(encoding="utf-8"))
    for method in runs:
        comparison = paired(directory, runs, method)
        if not comparison.runs[method]:
            continue
        for metric in METRICS:
            values = comparison.values(metric)
            if method not in values:
                continue
            mean = mean_interval(values[method])
            row: Row = dict.fromkeys(FIELDS, "")
            row |= {"task": directory.name, "method": method, "metric": metric, "mean": _number(mean.value)}
            row |= {"half_width": _number((mean.high - mean.low) / 2), "seeds": len(comparison.seeds)}
            row["test_examples"] = settings["task"]["test_examples"]
            row["measured_on"] = settings["task"].get("measured_on", "test examples")
            if method != BASELINE:
                if metric in MAIN:
                    interval, kind = comparison.differences[metric][method], "paired bootstrap"
                else:
                    interval, kind = mean_interval(values[method] - values[BASELINE]), "student"
                row |= {"difference_to_erm": _number(interval.value), "interval": kind}
                row |= {"low": _number(interval.low), "high": _number(interval.high)}
            yield row


def _number(value: float) -> float | str:
    return "" if math.isnan(value) else float(f"{value:.6g}")


def summarise(output_dir: Path, tasks: Sequence[str], results_dir: Path, docs_dir: Path) -> list[Path]:
    """Put what the runs say into evidence.csv, and write the tables of evidence.md and the pictures of all that is there.

    Returns:
        The files that were written.

    Raises:
        FileNotFoundError: No task has runs.
    """
    found: list[Row] = []
    for task in tasks:
        if BASELINE in finished_runs(output_dir / task):
            found += rows_of(output_dir / task)
    if not found:
        raise FileNotFoundError(
            f"{output_dir} has no finished runs of any task: run the study first, without --summary."
        )
    written = [results_dir / "evidence.csv", docs_dir / "evidence.md"]
    (docs_dir / "images").mkdir(parents=True, exist_ok=True)
    keep_rows(written[0], found)
    rows = read_rows(written[0])
    for task in dict.fromkeys(row["task"] for row in found):
        own = [row for row in rows if row["task"] == task]
        for name, saved_figure in (("evidence", draw), ("plane", draw_plane)):
            path = docs_dir / "images" / f"{name}_{task}.png"
            if saved_figure(own, path):
                written.append(path)
    write_tables(rows, docs_dir)
    return written


def keep_rows(path: Path, found: Sequence[Row], order: Sequence[str] = tuple(METHODS), by: str = "method") -> None:
    """Put rows into a table in place of those of the same tasks and methods with no more seeds; all others stay.

    Args:
        path: The table, which need not be there yet.
        found: All with the same names, "task" among them.
        order: Of the methods in the table; others come behind.
        by: The name of the column that says what was run on the task.
    """
    kept = read(path.name, path.parent)
    seeds = {(row["task"], row[by]): int(row["seeds"]) for row in kept}
    found = [row for row in found if int(row["seeds"]) >= seeds.get((row["task"], row[by]), 0)]
    new = {(row["task"], row[by]) for row in found}
    rows = [{name: str(value) for name, value in row.items()} for row in found]
    rows += [row for row in kept if (row["task"], row[by]) not in new]
    tasks, places = ({name: place for place, name in enumerate(names)} for names in (TASKS, order))
    rows.sort(key=lambda row: (tasks.get(row["task"], len(tasks)), places.get(row[by], len(places))))
    write(path.name, rows, path.parent)


def read_rows(path: Path) -> list[Row]:
    """The rows of evidence.csv, with numbers where there are any."""
    names = ("task", "method", "metric", "interval", "measured_on")
    return [{k: v if k in names else float(v or "nan") for k, v in row.items()} for row in read(path.name, path.parent)]


def _difference(row: Row) -> Interval:
    return Interval(row["difference_to_erm"], row["low"], row["high"])


def draw(rows: Sequence[Row], path: Path) -> bool:
    """The differences of one task as a forest plot; whether there are any that can be drawn."""
    named = {
        metric: {
            row["method"]: _difference(row) for row in rows if row["metric"] == metric and row["method"] != BASELINE
        }
        for metric in MAIN
    }
    finite = [all(math.isfinite(d.value) for d in differences.values()) for differences in named.values()]
    if not all(named.values()) or not all(finite):
        return False
    draw_differences(named, path)
    return True


def draw_differences(named: Mapping[str, Mapping[str, Interval]], path: Path) -> None:
    """Differences from plain training, by metric and method, as a forest plot."""
    partial = path.with_name(f"partial-{os.getpid()}-{path.name}")
    plot_differences(
        {METRICS[metric].title: differences for metric, differences in named.items()},
        partial,
        baseline=BASELINE,
        better={METRICS[metric].title: METRICS[metric].better for metric in named},
        scales={METRICS[metric].title: METRICS[metric].scale for metric in named},
    )
    shutil.move(partial, path)


def draw_plane(rows: Sequence[Row], path: Path) -> bool:
    """Alignment and uniformity of one task's methods, means over seeds; whether there are any."""
    found = {(row["method"], row["metric"]): row["mean"] for row in rows}
    pairs = {
        method: [(found[method, "alignment"], found[method, "uniformity"])]
        for method in dict.fromkeys(row["method"] for row in rows)
        if (method, "alignment") in found
    }
    if len(pairs) > 1:
        plot_alignment_uniformity(pairs, path)
    return len(pairs) > 1


def write_tables(rows: Sequence[Row], docs_dir: Path) -> None:
    """The section of each task, in evidence.md."""
    for task in dict.fromkeys(row["task"] for row in rows):
        put(docs_dir / "evidence.md", task, section(task, [row for row in rows if row["task"] == task], docs_dir))


def put(path: Path, name: str, lines: Sequence[str]) -> None:
    """Put lines between the markers of a page, or at its end if it has none of that name; other text is left."""
    text = path.read_text(encoding="utf-8") if path.exists() else "# Evidence\n"
    begin, end = BEGIN.format(name), END.format(name)
    body = "\n".join([begin, *lines, end])
    before, found, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    text = f"{before}{body}{after}" if found else f"{text.rstrip()}\n\n{body}\n"
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def section(task: str, rows: Sequence[Row], docs_dir: Path) -> list[str]:
    """The part of one task: what it is, means and differences, the other figures, the picture."""
    found = {(row["method"], row["metric"]): row for row in rows}
    methods = list(dict.fromkeys(row["method"] for row in rows))
    seeds = sorted({int(row["seeds"]) for row in rows})
    said = f"{seeds[0]} seed{'s' * (seeds[0] > 1)}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds"
    caption = f"{said} of each method, {rows[0]['test_examples']:,.0f} {rows[0]['measured_on']}. First row: means; the others: difference from erm [95 % interval]"
    lines = [f"## {task}", "", TASKS[task].description, "", f"*{caption}, bold where it excludes zero.*", ""]
    lines += header("Method", *(METRICS[m].heading for m in MAIN))
    for method in methods:
        lines.append(f"| {method} | {' | '.join(_cell(found.get((method, m))) for m in MAIN)} |")
    others = [m for m in OTHERS if any((method, m) in found for method in methods)]
    lines += ["", *header("Method", *(METRICS[m].heading for m in others), "Training time\u00a0↓")]
    for method in methods:
        cells = [_mean(found.get((method, m))) for m in others]
        lines.append(f"| {method} | {' | '.join([*cells, _time(found[method, 'train_seconds'])])} |")
    if (docs_dir / "images" / f"evidence_{task}.png").exists():
        lines += ["", f"![Differences from erm on {task}, with 95 % intervals](images/evidence_{task}.png)"]
    if (docs_dir / "images" / f"plane_{task}.png").exists():
        lines += ["", f"![Alignment and uniformity of the features on {task}](images/plane_{task}.png)"]
    return [*lines, ""]


def header(*names: str) -> list[str]:
    """The first two lines of a table."""
    return [f"| {' | '.join(names)} |", f"|---|{'---:|' * (len(names) - 1)}"]


def _cell(row: Row | None) -> str:
    if row is None or row["method"] == BASELINE:
        return _mean(row)
    shown, difference = METRICS[row["metric"]], _difference(row)
    if math.isnan(difference.value):
        return "not a number"
    text = shown.number(difference.value, sign=True) if math.isnan(difference.low) else shown.difference(difference)
    return bold(text, difference)


def bold(text: str, interval: Interval) -> str:
    """In bold where the interval excludes zero."""
    return f"**{text}**" if interval.excludes_zero else text


def _mean(row: Row | None) -> str:
    if row is None or math.isnan(row["mean"]):
        return "n/a" if row is None else "not a number"
    return METRICS[row["metric"]].mean(_around(row))


def _time(row: Row) -> str:
    """Seconds of plain training, and what share of those a method takes that was measured beside it."""
    if row["method"] == BASELINE:
        return f"{METRICS['train_seconds'].mean(_around(row))} s"
    return f"{row['mean'] / (row['mean'] - row['difference_to_erm']):.2f}x"


def _around(row: Row) -> Interval:
    return Interval(row["mean"], row["mean"] - row["half_width"], row["mean"] + row["half_width"])
