"""Change one setting of Dense MultiMix at a time: ablation.csv.

The settings are the number of mixed examples n, the number of examples m that one of them combines, the attention that
weights the labels of a location, and whether locations are mixed. `benchmarks/step.py` measures the time that n takes.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path

from benchmarks.evidence.methods import ABLATION_TITLES, ABLATIONS, BASELINE
from benchmarks.evidence.registry import TaskOptions
from benchmarks.evidence.results import (
    ENDS,
    SHOWN,
    Row,
    bold_if_significant,
    difference_of,
    draw_differences,
    group_by,
    merge_rows,
    round_number,
    title_of,
)  # fmt: skip
from benchmarks.evidence.runs import (
    Paths,
    add_lengths,
    chosen_seeds,
    finished_runs,
    length_directories,
    length_of,
    pair_runs,
    train_runs,
)  # fmt: skip
from benchmarks.evidence.tasks import TASKS
from benchmarks.harness import read
from benchmarks.markdown import replace_section, table_lines
from mm_hf.evaluation.metrics.registry import METRICS

DEFAULT_TASKS, DEFAULT_SEEDS = ("mnist1d",), 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_lengths(parser)


def train(args: argparse.Namespace, paths: Paths) -> None:
    """Train and evaluate all runs that are missing."""
    for length, name in itertools.product(args.lengths, args.tasks):
        options = TaskOptions(length=length, quick=args.quick, cache=paths.cache)
        train_runs(name, ABLATIONS, chosen_seeds(args.seeds), paths.output / "ablate" / f"length-{length}", options)


def summarize(paths: Paths) -> list[Path]:
    """Update ablation.csv from finished runs; write its section and a forest plot per task."""
    table = paths.results / "ablation.csv"
    found = [row for directory in length_directories(paths.output / "ablate") for row in rows_of(directory)]
    merge_rows(table, found, {"task": list(TASKS), "length": (), "setting": list(ABLATIONS)})
    rows = [row | {"group": (row["task"], row["length"])} for row in read(table.name, table.parent)]
    written, lines = [table, paths.page], []
    for (task, length), own in group_by(rows, "group").items():
        titles = {setting: ABLATION_TITLES.get(setting, setting) for setting in group_by(own, "setting")}
        by_metric = {
            metric: {titles[row["setting"]]: difference_of(row) for row in own if row["metric"] == metric}
            for metric in SHOWN
        }
        cells = [["Setting", *(f"{title_of(metric)} minus {BASELINE}" for metric in SHOWN)]]
        for title in titles.values():
            shown = {metric: by_metric[metric][title] for metric in SHOWN}
            cells.append(
                [
                    title,
                    *(bold_if_significant(METRICS[m].format_difference(value), value) for m, value in shown.items()),
                ]
            )
        plot = paths.image(f"ablation_{task}_{length}.png")
        draw_differences(by_metric, plot)
        written.append(plot)
        lines += [f"**{task}**, length {length}, {own[0]['seeds']} seeds:", "", *table_lines(cells), ""]
        lines += [
            f"![Differences from {BASELINE} with one setting changed at a time, on {task}](images/{plot.name})",
            "",
        ]
    if not lines:
        return []
    replace_section(paths.page, "ablations", lines)
    return written


def rows_of(directory: Path) -> Iterator[Row]:
    """Yield a row per setting and metric from the finished runs of a task, with intervals of the paired bootstrap."""
    runs = finished_runs(directory)
    for setting in ABLATIONS:
        if BASELINE in runs and setting in runs:
            comparison = pair_runs(directory, runs, setting)
            for metric in SHOWN:
                difference = comparison.differences[metric][setting]
                row = {"task": directory.name, "length": length_of(directory), "setting": setting, "metric": metric}
                row["seeds"] = len(comparison.seeds)
                row["mean"] = round_number(comparison.values(metric)[setting].mean(), 5)
                values = (difference.value, difference.low, difference.high)
                yield row | {end: round_number(value, 5) for end, value in zip(ENDS, values, strict=True)}
