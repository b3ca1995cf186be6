"""What the paper's claims rest on: Dense MultiMix with one setting changed at a time, on tasks of the study.

How many mixed examples (n), of how many examples one is drawn (m), what weighs labels at a location, and whether
locations are mixed at all. What n costs in time is measured in step_time.py.
Stopped, the same command goes on; seeds and tasks can be added.

    python benchmarks/evidence_ablation.py [--tasks mnist1d ...] [--seeds 5]
    python benchmarks/evidence_ablation.py --summary    # ablation.csv, and its part of docs/evidence.md
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path

from evidence import DOCS, chosen_seeds, quiet  # first: it forbids downloads
from evidence_search import compare
from evidence_study import Options
from evidence_summary import BASELINE, bold, draw_differences, finished_runs, header, paired, put
from evidence_tasks import TASKS
from harness import write

from mm_hf import DenseMultiMix, Mixing, MultiMix
from mm_hf.analysis.statistics import Interval
from mm_hf.comparison.tables import METRICS

OUTPUT = Path("outputs/evidence_ablation")
# Without input mixup, which half of the mini-batches would get: it is Dense MultiMix itself whose settings are varied.
# m is varied with alpha = 1, all mixtures of m examples being equally likely: with a fixed number of effective examples
# alpha would make up for it.
dense = functools.partial(DenseMultiMix, input_mixup=0.0)
ABLATIONS: dict[str, Mixing] = {
    "n = 1,000, of 8, 3 effective": dense(),
    "n = 10": dense(num_mixed=10),
    "n = 100": dense(num_mixed=100),
    "n = 10,000": dense(num_mixed=10_000),
    "m = 2, alpha = 1": dense(alpha=1.0, num_vertices=2),
    "m = 4, alpha = 1": dense(alpha=1.0, num_vertices=4),
    "m = 16, alpha = 1": dense(alpha=1.0, num_vertices=16),
    "m = b = 64, alpha = 1": dense(alpha=1.0),
    "attention: gap": dense(attention="gap"),
    "attention: cam": dense(attention="cam"),
    "attention: uniform": dense(attention="uniform"),
    "not dense: pooled only": MultiMix(),
    "dense and pooled": dense(pooled_weight=1.0),
    "dense, no clean term": dense(clean_weight=0.0, pooled_weight=1.0),
}
SHOWN = ("accuracy", "nll", "calibration_error")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, and sum up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=["mnist1d"], metavar="TASK")
    parser.add_argument("--seeds", nargs="+", type=int, default=[5], help="how many; or several numbers: which")
    parser.add_argument("--output_dir", type=Path, default=OUTPUT)
    parser.add_argument("--docs_dir", type=Path, default=DOCS, help="gets a table in evidence.md, and images/")
    parser.add_argument("--summary", action="store_true", help="sum up what has been run; train nothing")
    args = parser.parse_args(arguments)
    if not args.summary:
        quiet()
        options = Options(cache=args.output_dir / "cache")
        for name in args.tasks:
            compare(name, ABLATIONS, chosen_seeds(args.seeds), args.output_dir, options)
    summarise(args.output_dir, args.docs_dir)
    return 0


def summarise(output_dir: Path, docs_dir: Path) -> None:
    """ablation.csv, and the tables and pictures of evidence.md."""
    rows: list[dict[str, object]] = []
    lines: list[str] = []
    for task in TASKS:
        directory = output_dir / task
        runs = finished_runs(directory, known_only=False)
        settings = [name for name in ABLATIONS if name in runs]
        if BASELINE not in runs or not settings:
            continue
        seeds = len(runs[BASELINE])
        lines += [f"**{task}**, {seeds} seeds:", ""]
        lines += header("Setting", *(f"{METRICS[m].title} less {BASELINE}" for m in SHOWN))
        drawn: dict[str, dict[str, Interval]] = {metric: {} for metric in SHOWN}
        for setting in settings:
            comparison = paired(directory, runs, setting)
            cells = []
            for metric in SHOWN:
                difference = comparison.differences[metric][setting]
                drawn[metric][setting] = difference
                cells.append(bold(METRICS[metric].difference(difference), difference))
                row = {"task": task, "setting": setting, "figure": metric, "seeds": len(comparison.seeds)}
                row["mean"] = f"{comparison.values(metric)[setting].mean():.5g}"
                row |= {"difference_to_erm": f"{difference.value:.5g}"}
                rows.append(row | {"low": f"{difference.low:.5g}", "high": f"{difference.high:.5g}"})
            lines.append(f"| {setting} | {' | '.join(cells)} |")
        picture = docs_dir / "images" / f"ablation_{task}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        draw_differences(drawn, picture)
        lines += ["", f"![One setting changed at a time, on {task}](images/{picture.name})", ""]
    write("ablation.csv", rows)
    put(docs_dir / "evidence.md", "ablations", lines)


if __name__ == "__main__":
    raise SystemExit(main())
