"""What the paper's claims rest on: Dense MultiMix with one setting changed at a time, on tasks of the study.

How many mixed examples (n), of how many examples one is drawn (m), what weighs labels at a location, and whether
locations are mixed at all. What n costs in time is measured in step_time.py.
Stopped, the same command goes on; seeds and tasks can be added.

    python benchmarks/evidence_ablation.py [--tasks mnist1d ...] [--seeds 5]
    python benchmarks/evidence_ablation.py --summary    # ablation.csv, and its part of docs/evidence.md
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

from evidence import DOCS, chosen_seeds, command, quiet  # first: it forbids downloads
from evidence_search import compare
from evidence_study import Options
from evidence_summary import BASELINE, bold, draw_differences, finished_runs, header, keep_rows, paired, put
from evidence_tasks import TASKS
from harness import RESULTS, read

from mm_hf import DenseMultiMix, Mixing, MultiMix
from mm_hf.comparison.report.tables import METRICS
from mm_hf.evaluation.statistics import Interval

OUTPUT = Path("outputs/evidence_ablation")
# Without input mixup, which half of the mini-batches would get: it is Dense MultiMix itself whose settings are varied.
# m is varied with alpha = 1, all mixtures of m examples being equally likely: with a fixed number of effective examples
# alpha would make up for it.
dense = functools.partial(DenseMultiMix, input_mixing="none")
ABLATIONS: dict[str, Mixing] = {
    "n = 1,000, of 8, 3 effective": dense(),
    "n = 10": dense(num_mixed=10),
    "n = 100": dense(num_mixed=100),
    "n = 10,000": dense(num_mixed=10_000),
    "m = 2, alpha = 1": dense(alpha=1.0, examples_per_mix=2),
    "m = 4, alpha = 1": dense(alpha=1.0, examples_per_mix=4),
    "m = 16, alpha = 1": dense(alpha=1.0, examples_per_mix=16),
    "m = b = 64, alpha = 1": dense(alpha=1.0),
    "attention: gap": dense(attention="gap"),
    "attention: cam": dense(attention="cam"),
    "attention: uniform": dense(attention="uniform"),
    "not dense: pooled only": MultiMix(),
    "dense and pooled": dense(pooled_weight=1.0),
    "dense, no clean term": dense(clean_weight=0.0, pooled_weight=1.0),
}
SHOWN = ("accuracy", "nll", "calibration_error")
ENDS = ("difference_to_erm", "low", "high")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, and sum up."""
    parser = command(__doc__, 5, OUTPUT)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=["mnist1d"], metavar="TASK")
    parser.add_argument("--results_dir", type=Path, default=RESULTS, help="gets ablation.csv")
    parser.add_argument("--docs_dir", type=Path, default=DOCS, help="gets a table in evidence.md, and images/")
    args = parser.parse_args(arguments)
    if not args.summary:
        quiet()
        options = Options(cache=args.output_dir / "cache")
        for name in args.tasks:
            compare(name, ABLATIONS, chosen_seeds(args.seeds), args.output_dir, options)
    summarise(args.output_dir, args.results_dir, args.docs_dir)
    return 0


def summarise(output_dir: Path, results_dir: Path, docs_dir: Path) -> None:
    """What was run here, in ablation.csv; and tables and pictures of all that stands there, in evidence.md."""
    found = [row for task in TASKS for row in rows_of(output_dir / task)]
    table = results_dir / "ablation.csv"
    if found:
        keep_rows(table, found, list(ABLATIONS), by="setting")
    rows = read(table.name, results_dir)
    lines: list[str] = []
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task]
        differences = {
            metric: {
                row["setting"]: Interval(*(float(row[end]) for end in ENDS)) for row in own if row["figure"] == metric
            }
            for metric in SHOWN
        }
        lines += [f"**{task}**, {own[0]['seeds']} seeds:", ""]
        lines += header("Setting", *(f"{METRICS[m].title} less {BASELINE}" for m in SHOWN))
        for setting in differences[SHOWN[0]]:
            shown = {metric: differences[metric][setting] for metric in SHOWN}
            cells = [bold(METRICS[metric].difference(value), value) for metric, value in shown.items()]
            lines.append(f"| {setting} | {' | '.join(cells)} |")
        picture = docs_dir / "images" / f"ablation_{task}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        draw_differences(differences, picture)
        lines += ["", f"![One setting changed at a time, on {task}](images/{picture.name})", ""]
    if lines:
        put(docs_dir / "evidence.md", "ablations", lines)


def rows_of(directory: Path) -> Iterator[dict[str, object]]:
    """The settings that were run on the task of a directory, with intervals of the paired bootstrap."""
    runs = finished_runs(directory, known_only=False)
    for setting in ABLATIONS:
        if BASELINE in runs and setting in runs:
            comparison = paired(directory, runs, setting)
            for metric in SHOWN:
                difference = comparison.differences[metric][setting]
                row = {"task": directory.name, "setting": setting, "figure": metric, "seeds": len(comparison.seeds)}
                row["mean"] = f"{comparison.values(metric)[setting].mean():.5g}"
                values = (difference.value, difference.low, difference.high)
                yield row | {end: f"{value:.5g}" for end, value in zip(ENDS, values, strict=True)}


if __name__ == "__main__":
    raise SystemExit(main())
