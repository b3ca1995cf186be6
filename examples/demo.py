"""Train a small ViT on handwritten digits without mixing, with mixup and with Dense MultiMix, and compare the results.

`make demo` runs this script. There are two regimes: few images and long training, where plain training overfits, and
all images, where plain training nearly solves the task. In a regime, all methods use the same data, number of epochs,
schedule and seeds. The held-out images are used only for evaluation.

    python examples/demo.py [--seeds 4] [--epochs 2] [--processes 2] [--output_dir outputs/demo]
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import signal
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from demo_plots import plot_attention, plot_training
from demo_training import METHODS, OURS, PLAIN, Result, Run, build_model, default_processes, digits, train_all
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers import AutoModelForImageClassification

import mm_hf
from mm_hf import extract, sample_factors
from mm_hf.evaluation.metrics.registry import METRICS
from mm_hf.evaluation.statistics import has_interval, mean_interval
from mm_hf.functional.factors import alpha_for

Results = dict[str, list[dict[str, float]]]  # metrics per seed by method


@dataclass(frozen=True)
class Regime:
    """Training budget.

    Attributes:
        title: Title of the table.
        images: Number of training images.
        epochs: Number of epochs of each run.
    """

    title: str
    images: int
    epochs: int


REGIMES = (Regime("Few images, long training", 400, 80), Regime("Nearly solved", 1347, 10))


def draw_attention(model: Any, path: Path) -> None:
    """Plot the attention of one held-out image of each of eight classes, and labels of their mixtures."""
    dataset, _, _, examples = digits()
    data = dataset["test"]
    labels = np.array(data["label"])
    chosen = [int(np.flatnonzero(labels == digit)[0]) for digit in range(8)]
    images = torch.tensor(np.stack([np.array(data[i]["image"]) for i in chosen])) / 255
    pixels = torch.stack([examples[i]["pixel_values"] for i in chosen])
    with torch.no_grad():
        attention = extract(model.eval(), pixel_values=pixels).attention
    assert attention is not None  # only models without locations have none
    factors = sample_factors(
        len(chosen),
        4,
        alpha_for(3, len(chosen)),
        num_locations=attention.shape[1],
        generator=torch.Generator().manual_seed(0),
    )
    names = data.features["label"].names
    plot_attention(images, torch.from_numpy(labels[chosen]), attention, factors, names, path)


def show_table(console: Console, title: str, results: Results) -> None:
    """Print each metric's mean and standard deviation (of two seeds: range), and the difference from plain training."""
    seeds = len(results[PLAIN])
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    columns = (
        "",
        "accuracy\n(%)",
        "NLL\n(nats)",
        "calibration\nerror (%)",
        "training\nseconds",
        "loss terms\nper step",
    )
    for column in columns:
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    formats = {"accuracy": (100, 1), "nll": (1, 3), "calibration_error": (100, 1), "seconds": (1, 0)}  # scale, digits
    for name, runs in results.items():
        cells = []
        for metric, (scale, places) in formats.items():
            values = scale * np.array([run[metric] for run in runs])
            spread = f"±{values.std(ddof=1):.{places}f}" if has_interval(seeds) else ""
            if seeds > 1 and not spread:
                spread = f" ({values.min():.{places}f} to {values.max():.{places}f})"
            cells.append(f"{values.mean():.{places}f}{spread}")
        table.add_row(name, *cells, f"{np.mean([run['loss_terms_per_step'] for run in runs]):,.0f}")
    console.print(table)
    console.print(conclusion(results))


def conclusion(results: Results) -> str:
    """Return a sentence on the differences of Dense MultiMix from plain training that the seeds show reliably."""
    seeds = len(results[PLAIN])
    if seeds == 1:
        return "One seed shows no reliable difference: use --seeds 4."
    found = []
    for name in ("accuracy", "nll", "calibration_error"):
        info = METRICS[name]
        differences = [ours[name] - plain[name] for ours, plain in zip(results[OURS], results[PLAIN], strict=True)]
        interval = mean_interval(np.array(differences))
        if interval.excludes_zero:
            side = "better" if info.is_improvement(interval.value) else "worse"
            found.append(f"{info.title} {info.format_difference(interval)} {info.difference_unit} ({side})")
    if not found:
        return f"{OURS} and {PLAIN} do not differ reliably over {seeds} seeds."
    return f"{OURS} minus {PLAIN}, with 95 % intervals over {seeds} seeds: {', '.join(found)}."


class RunProgress:
    """Bars for all runs and for those in training, and a line for each completed run.

    Args:
        console: Console for the output.
        runs: All runs.
    """

    def __init__(self, console: Console, runs: list[Run]):
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
        self.bars = Progress(
            *columns, TextColumn("{task.fields[loss]}"), TimeRemainingColumn(), console=console, transient=True
        )
        self.steps = dict.fromkeys(runs, 0)
        self.tasks: dict[Run, TaskID] = {}
        self.all = self.bars.add_task("all runs", total=sum(run.steps for run in runs), loss="")

    def update(self, run: Run, step: int, loss: float | None) -> None:
        """Show the number of completed steps and the last loss of a run."""
        if run not in self.tasks:
            self.tasks[run] = self.bars.add_task(str(run), total=run.steps, loss="")
        self.steps[run] = step
        self.bars.update(self.tasks[run], completed=step, loss="" if loss is None else f"loss {loss:.3f}")
        self.bars.update(self.all, completed=sum(self.steps.values()))

    def complete(self, run: Run, metrics: dict[str, float]) -> None:
        """Replace the bar of a run by a line with its metrics."""
        if run in self.tasks:
            self.bars.remove_task(self.tasks.pop(run))
        text = f"{run}: accuracy {metrics['accuracy']:.1%}, NLL {metrics['nll']:.3f}"
        self.bars.console.print(text, highlight=False)


def plan(seeds: int, epochs: int | None, output_dir: Path) -> list[Run]:
    """Return the runs of all methods in all regimes."""
    return [
        Run(regime.title, regime.images, epochs or regime.epochs, method, seed, output_dir / "runs" / name)
        for regime in REGIMES
        for seed in range(seeds)
        for method in METHODS
        for name in [f"{method}-{regime.images}-{seed}".replace(" ", "_")]
    ]


def metrics_of(regime: Regime, results: dict[Run, Result]) -> Results:
    """Return the metrics of the runs of a regime, in the order of their seeds."""
    chosen = sorted((run for run in results if run.regime == regime.title), key=lambda run: run.seed)
    return {method: [results[run].metrics for run in chosen if run.method == method] for method in METHODS}


def train_and_show(runs: list[Run], processes: int, console: Console) -> dict[Run, Result]:
    """Train all runs, and print the table of a regime as soon as its runs are complete."""
    results: dict[Run, Result] = {}
    progress = RunProgress(console, runs)
    with progress.bars, closing(train_all(runs, processes, progress.update)) as completed:
        for run, result in completed:
            results[run] = result
            progress.complete(run, result.metrics)
            regime = next(regime for regime in REGIMES if regime.title == run.regime)
            ours = [other for other in runs if other.regime == run.regime]
            if all(other in results for other in ours):
                seeds = len({other.seed for other in ours})
                title = f"{run.regime}: {run.images:,} images, {run.epochs} epochs"
                spread = "mean ± SD" if has_interval(seeds) else "mean and range"
                title += f"; {spread} of {seeds} seeds" if seeds > 1 else "; one seed"
                show_table(console, title, metrics_of(regime, results))
    return results


def main() -> None:
    """Train all methods in both regimes, print and plot the results, and save the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4, help="number of runs of each method")
    parser.add_argument("--epochs", type=int, help="number of epochs of each run; default: 80 and 10")
    parser.add_argument(
        "--processes",
        type=int,
        default=default_processes(),
        help="number of runs at once; default: number of CPU cores, at most 4",
    )
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"), help="directory for all results")
    args = parser.parse_args()
    for name in ("seeds", "epochs", "processes"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}.")
    gc.freeze()  # the end of the program would collect all imported objects, which takes seconds
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    console = Console()
    console.print(
        f"A ViT with {build_model(['a']).num_parameters():,} parameters on handwritten digits of 8x8 pixels; "
        f"" + ("one seed." if args.seeds == 1 else f"{args.seeds} seeds.")
    )
    runs = plan(args.seeds, args.epochs, args.output_dir)
    shown = next(i for i, run in enumerate(runs) if run.method == OURS)
    runs[shown] = replace(runs[shown], directory=args.output_dir / "model")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends all processes, as Ctrl-C does
    try:
        results = train_and_show(runs, args.processes, console)
    except KeyboardInterrupt:
        console.print("Interrupted.")
        raise SystemExit(130) from None

    model = AutoModelForImageClassification.from_pretrained(runs[shown].directory)
    histories: dict[str, dict[str, list[Any]]] = {regime.title: {name: [] for name in METHODS} for regime in REGIMES}
    for run in runs:
        histories[run.regime][run.method].append(results[run].history)
    plot_training(histories, args.output_dir / "training.png")
    draw_attention(model, args.output_dir / "attention.png")
    report = {
        "results": {regime.title: metrics_of(regime, results) for regime in REGIMES},
        "methods": {name: mixing.to_dict() for name, mixing in METHODS.items()},
        "seeds": list(range(args.seeds)),
        "training_arguments": results[runs[shown]].arguments,
        "model_config": model.config.to_dict(),
        "test_examples": len(digits()[0]["test"]),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "mm_hf": mm_hf.__version__,
        },
        "machine": {"processes": args.processes, "processor": platform.machine()},
    }
    (args.output_dir / "results.json").write_text(json.dumps(report, indent=2, default=str) + "\n")
    console.print(
        f"\nWrote training.png, attention.png, results.json and model/ to {args.output_dir}. model/ is a plain "
        f"{type(model).__name__} ({OURS}, few images, seed 0) and loads without mm_hf:\n"
        f"    AutoModelForImageClassification.from_pretrained({str(runs[shown].directory)!r})"
    )


if __name__ == "__main__":
    main()
