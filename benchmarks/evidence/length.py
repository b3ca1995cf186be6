"""Train for several numbers of epochs: length.csv.

The runs are evaluated on held-out training examples, which the tests of the study never use. Each length is a separate
training run, whose learning rate decays to zero at its end.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.evidence.methods import METHODS, TITLES
from benchmarks.evidence.registry import TaskOptions
from benchmarks.evidence.results import SHOWN, Row, group_by, merge_rows, round_number
from benchmarks.evidence.runs import Paths, chosen_seeds, finished_runs, train_runs
from benchmarks.evidence.tasks import TASKS
from benchmarks.harness import read
from mm_hf.evaluation.metrics.registry import METRICS
from mm_hf.evaluation.plots.style import legend_below, method_styles, panel_grid, saved_figure

DEFAULT_TASKS, DEFAULT_SEEDS = ("fashion_vit",), 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument(
        "--epochs", nargs="+", type=int, default=[3, 6, 12, 25, 50], help="lengths of the training runs"
    )


def train(args: argparse.Namespace, paths: Paths) -> None:
    """Train and evaluate all runs that are missing."""
    methods = {name: METHODS[name]() for name in TITLES}
    for epochs in args.epochs:
        options = TaskOptions(search=True, epochs=epochs, quick=args.quick, cache=paths.cache)
        for name in args.tasks:
            directory = paths.output / "length" / f"epochs-{epochs}"
            train_runs(name, methods, chosen_seeds(args.seeds), directory, options)


def summarize(paths: Paths) -> list[Path]:
    """Update length.csv from finished runs; draw a plot per task."""
    table = paths.results / "length.csv"
    found = [row for directory in (paths.output / "length").glob("epochs-*/*") for row in rows_of(directory)]
    merge_rows(table, found, {"task": list(TASKS), "epochs": (), "method": list(TITLES), "seed": ()})
    written = []
    for task, own in group_by(read(table.name, table.parent), "task").items():
        written.append(paths.image(f"length_{task}.png"))
        draw(own, written[-1])
    return [table, *written] if written else []


def rows_of(directory: Path) -> Iterator[Row]:
    """Yield a row per method and seed from the finished runs of a task at one length."""
    runs = finished_runs(directory, list(TITLES))
    epochs = directory.parent.name.partition("-")[2]
    for method, by_seed in runs.items():
        for seed, run in by_seed.items():
            row = {"task": directory.name, "epochs": epochs, "method": method, "seed": seed}
            yield row | {name: round_number(run.metrics[name], 5) for name in SHOWN}


def draw(rows: Sequence[Mapping[str, str]], path: Path) -> None:
    """Draw a panel per metric: the mean over seeds against epochs, and each seed as a faint point."""
    with saved_figure(path) as figures:
        figure, panels = panel_grid(len(SHOWN), 2.3)
        figures.append(figure)
        lengths = np.unique([int(row["epochs"]) for row in rows])
        for axes, name in zip(panels, SHOWN, strict=True):
            metric = METRICS[name]
            for method, (color, marker) in method_styles(TITLES).items():
                own = [row for row in rows if row["method"] == method]
                epochs = np.array([int(row["epochs"]) for row in own])
                values = metric.scale * np.array([float(row[name]) for row in own])
                means = [values[epochs == length].mean() for length in np.unique(epochs)]
                axes.scatter(epochs, values, s=8, color=color, marker=marker, alpha=0.35, linewidths=0)
                axes.plot(np.unique(epochs), means, color=color, marker=marker, markersize=4, label=TITLES[method])
            axes.set_xscale("log")
            axes.set_xticks(lengths, [str(length) for length in lengths])
            axes.minorticks_off()
            axes.set_xlabel(f"epochs, {rows[0]['task']}")
            axes.set_title(metric.heading)
            axes.grid(True)
        legend_below(figure, *panels[0].get_legend_handles_labels())
