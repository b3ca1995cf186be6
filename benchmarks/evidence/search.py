"""Evaluate candidates for the default on held-out training examples: search.csv.

The tests of the study never use these examples. A candidate is a method of the study, or a specification as `mm-hf
compare` accepts it, with a name: k2=dense_multimix:effective_examples=2.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.evidence import candidates  # noqa: F401  registers its methods
from benchmarks.evidence.methods import BASELINE, METHODS
from benchmarks.evidence.registry import TaskOptions
from benchmarks.evidence.results import Row, merge_rows, round_number
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
from benchmarks.evidence.tasks import STUDY, TASKS
from benchmarks.harness import read
from benchmarks.markdown import replace_section, table_lines
from mm_hf.comparison.task import parse_method
from mm_hf.evaluation.metrics.registry import METRICS

DEFAULT_TASKS, DEFAULT_SEEDS = STUDY, 2
SEARCHED = ("accuracy", "nll", "calibration_error", "ood_auroc", "class_spread", "train_seconds")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument(
        "--methods", nargs="+", default=[BASELINE, "dense_multimix"], metavar="METHOD", help="candidates"
    )
    add_lengths(parser)


def train(args: argparse.Namespace, paths: Paths) -> None:
    """Train and evaluate all runs that are missing."""
    chosen = {name: METHODS[name]() for name in args.methods if name in METHODS}
    chosen |= dict(parse_method(text) for text in args.methods if text not in METHODS)
    for name in args.tasks:
        for length in args.lengths:
            options = TaskOptions(search=True, length=length, quick=args.quick, cache=paths.cache)
            train_runs(name, chosen, chosen_seeds(args.seeds), paths.output / "search" / f"length-{length}", options)


def summarize(paths: Paths) -> list[Path]:
    """Update search.csv from finished runs."""
    table = paths.results / "search.csv"
    found = [row for directory in length_directories(paths.output / "search") for row in rows_of(directory)]
    merge_rows(table, found, {"task": list(TASKS), "length": (), "method": list(METHODS)})
    rows = read(table.name, table.parent)
    if not rows:
        return []
    replace_section(paths.page, "search", [*table_lines(cells(rows)), ""])
    return [table, paths.page]


def cells(rows: Sequence[Mapping[str, str]]) -> list[list[str]]:
    """Return the cells of a table: accuracy and NLL per candidate, a column per task and length."""
    found = {(r["method"], r["task"], r["length"], r["metric"]): r for r in rows}
    columns = list(dict.fromkeys((r["task"], r["length"]) for r in rows))
    table = [["Candidate", *(f"{task}, {length}x" for task, length in columns)]]
    for method in dict.fromkeys(r["method"] for r in rows):
        row = [method]
        for task, length in columns:
            shown = [found.get((method, task, length, metric)) for metric in ("accuracy", "nll")]
            values = [METRICS[r["metric"]].format(float(r["mean"])) for r in shown if r]
            seeds = {r["seeds"] for r in shown if r}
            row.append(f"{', '.join(values)} ({max(seeds)})" if values else "")
        table.append(row)
    return table


def rows_of(directory: Path) -> Iterator[Row]:
    """Yield means over seeds and differences from the baseline on the same seeds, a row per method and metric."""
    runs = finished_runs(directory)
    for method in runs if BASELINE in runs else ():
        comparison = pair_runs(directory, runs, method)
        for metric in SEARCHED:
            values = comparison.values(metric)
            if method in values:
                difference = (values[method] - values[BASELINE]).mean()
                row = {
                    "task": directory.name,
                    "length": length_of(directory),
                    "method": method,
                    "metric": metric,
                    "seeds": len(comparison.seeds),
                }
                row["mean"] = round_number(values[method].mean(), 5)
                yield row | {"difference_to_erm": round_number(difference, 5)}
