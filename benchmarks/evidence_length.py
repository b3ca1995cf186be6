"""Which method helps depends on how long one trains: accuracy and NLL of a task of the study, against its epochs.

EvaluationResult on examples of the training part that the study's tests never see. Each length is a training of its own, with a
learning rate that falls to zero at its end. Stopped, the same command goes on; seeds can be added.

    python benchmarks/evidence_length.py [--task fashion_vit] [--epochs 3 6 12 25 50] [--seeds 3]
    python benchmarks/evidence_length.py --summary    # length.csv, and the picture of docs/evidence.md
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from evidence import DOCS, chosen_seeds, command, quiet  # first: it forbids downloads
from evidence_search import compare
from evidence_study import METHODS, Options
from evidence_summary import finished_runs
from evidence_tasks import TASKS
from harness import RESULTS, read, write

from mm_hf.comparison.report.tables import METRICS
from mm_hf.evaluation.plots.style import legend_below, method_styles, panel_grid, saved_figure

OUTPUT = Path("outputs/evidence_length")
SHOWN = ("accuracy", "nll", "calibration_error")
TITLES = {
    "erm": "plain training",
    "dense_multimix_alone": "DenseMultiMix(input_mixing='none')",
    "dense_multimix_and_mixup": "DenseMultiMix(input_mixing='mixup', input_mixing_start=0)",
    "dense_multimix": "DenseMultiMix()",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, and sum up."""
    parser = command(__doc__, 3, OUTPUT)
    parser.add_argument("--task", choices=list(TASKS), default="fashion_vit", metavar="TASK")
    parser.add_argument("--epochs", nargs="+", type=int, default=[3, 6, 12, 25, 50])
    parser.add_argument("--results_dir", type=Path, default=RESULTS, help="gets length.csv")
    parser.add_argument("--docs_dir", type=Path, default=DOCS, help="gets images/length.png")
    args = parser.parse_args(arguments)
    if not args.summary:
        quiet()
        methods = {name: METHODS[name]() for name in TITLES}
        for epochs in args.epochs:
            options = Options(search=True, epochs=epochs, cache=args.output_dir / "cache")
            compare(args.task, methods, chosen_seeds(args.seeds), args.output_dir / f"epochs-{epochs}", options)
    rows = sorted(rows_of(args.output_dir, args.task), key=lambda row: int(str(row["epochs"])))
    if not rows:
        parser.error(
            f"--output_dir {args.output_dir} has no finished runs of {args.task}: run first, without --summary."
        )
    write("length.csv", rows, args.results_dir)
    picture = args.docs_dir / "images" / "length.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw(read("length.csv", args.results_dir), picture)
    return 0


def rows_of(output_dir: Path, task: str) -> Iterator[dict[str, object]]:
    """One row a training."""
    for directory in output_dir.glob(f"epochs-*/{task}"):
        runs = finished_runs(directory)
        for method in [name for name in TITLES if name in runs]:
            for seed, run in runs[method].items():
                row = {"task": task, "epochs": directory.parent.name.partition("-")[2], "method": method, "seed": seed}
                yield row | {name: f"{run.metrics[name]:.5g}" for name in SHOWN}


def draw(rows: Sequence[Mapping[str, str]], path: Path) -> None:
    """A panel a figure: the mean of the seeds against epochs, and each seed as a faint point."""
    with saved_figure(path) as figures:
        figure, panels = panel_grid(len(SHOWN), 2.3)
        figures.append(figure)
        lengths = np.unique([int(row["epochs"]) for row in rows])
        for axes, name in zip(panels, SHOWN, strict=True):
            metric = METRICS[name]
            for method, (colour, marker) in method_styles(TITLES).items():
                own = [row for row in rows if row["method"] == method]
                epochs = np.array([int(row["epochs"]) for row in own])
                values = metric.scale * np.array([float(row[name]) for row in own])
                means = [values[epochs == length].mean() for length in np.unique(epochs)]
                axes.scatter(epochs, values, s=8, color=colour, marker=marker, alpha=0.35, linewidths=0)
                axes.plot(np.unique(epochs), means, color=colour, marker=marker, markersize=4, label=TITLES[method])
            axes.set_xscale("log")
            axes.set_xticks(lengths, [str(length) for length in lengths])
            axes.minorticks_off()
            axes.set_xlabel(f"epochs, {rows[0]['task']}")
            axes.set_title(metric.heading)
            axes.grid(True)
        legend_below(figure, *panels[0].get_legend_handles_labels())


if __name__ == "__main__":
    raise SystemExit(main())
