"""Train a small ViT on handwritten digits without mixing, with mixup and with Dense MultiMix, and compare the results.

`make demo` runs this script. There are two regimes: few images and long training, where plain training overfits, and
all images, where plain training nearly solves the task. In a regime, all methods use the same data, number of epochs,
schedule and seeds. The held-out images are used only for evaluation.

    python examples/demo.py [--seeds 3] [--epochs 2] [--output_dir outputs/demo]
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from datasets import Dataset, DatasetDict
from demo_plots import plot_attention, plot_training
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers import (
    AutoModelForImageClassification,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    set_seed,
)

import mm_hf
from mm_hf import ERM, DenseMultiMix, Mixing, Mixup, MultiMixTrainer, extract, sample_factors
from mm_hf.data.offline import load_digits
from mm_hf.evaluation.metrics import classification_metrics
from mm_hf.evaluation.metrics.registry import METRICS
from mm_hf.evaluation.statistics import mean_interval
from mm_hf.functional.factors import alpha_for

PLAIN, OURS = "plain training", "Dense MultiMix"
METHODS: dict[str, Mixing] = {PLAIN: ERM(), "mixup": Mixup(), OURS: DenseMultiMix()}
EVALUATIONS = 20  # per run: each takes as long as several training steps
Examples = list[dict[str, Any]]  # pixel values and label
Results = dict[str, list[dict[str, float]]]  # metrics per seed by method


@dataclass(frozen=True)
class Regime:
    """Training budget.

    Attributes:
        title: Title of the table.
        images: Number of training images; None for all of them.
        epochs: Number of epochs of each run.
    """

    title: str
    images: int | None
    epochs: int


REGIMES = (Regime("Few images, long training", 400, 80), Regime("Nearly solved", None, 20))


class RichProgress(TrainerCallback):
    """Progress bar with the loss of one run."""

    def __init__(self, progress: Progress, name: str):
        self.progress, self.name = progress, name

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.task = self.progress.add_task(self.name, total=state.max_steps, loss="")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.progress.update(self.task, loss=f"loss {logs['loss']:.3f}")


def build_model(class_names: list[str]) -> ViTForImageClassification:
    """Create a ViT with 0.14 million parameters for 8x8 images in 4x4 patches."""
    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=8,
        patch_size=2,
        num_channels=1,
        initializer_range=0.1,  # the default of 0.02 suits a width of 768 and slows training at a width of 64
        id2label=dict(enumerate(class_names)),
        label2id={name: i for i, name in enumerate(class_names)},
    )
    return ViTForImageClassification(config)


def prepare(data: Dataset, processor: Any) -> Examples:
    """Apply the processor once, since the images are the same in every epoch."""
    pixels = processor(data["image"][:], return_tensors="pt")["pixel_values"]
    return [{"pixel_values": image, "labels": label} for image, label in zip(pixels, data["label"], strict=True)]


def train_one(
    name: str,
    mixing: Mixing,
    seed: int,
    class_names: list[str],
    train: Examples,
    test: Examples,
    processor: Any,
    epochs: int,
    output_dir: Path,
    callback: TrainerCallback,
) -> tuple[MultiMixTrainer, dict[str, float]]:
    """Train and evaluate one run; return its trainer and its metrics."""
    set_seed(seed)
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        per_device_train_batch_size=64,
        per_device_eval_batch_size=450,
        num_train_epochs=epochs,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        weight_decay=0.05,
        logging_steps=1 / EVALUATIONS,
        eval_strategy="steps",
        eval_steps=1 / EVALUATIONS,
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=seed,
    )
    trainer = MultiMixTrainer(
        build_model(class_names),
        arguments,
        mixing=mixing,
        train_dataset=train,
        eval_dataset=test,
        processing_class=processor,
        compute_metrics=classification_metrics,
        callbacks=[callback],
    )
    trainer.remove_callback(PrinterCallback)
    start = time.perf_counter()
    evaluations = _time_evaluations(trainer)
    trainer.train()
    seconds = time.perf_counter() - start - sum(evaluations)
    metrics = trainer.evaluate()
    terms = [entry["loss_terms"] for entry in trainer.state.log_history if "loss_terms" in entry]
    measured = {name: metrics[f"eval_{name}"] for name in ("accuracy", "nll", "calibration_error")}
    return trainer, {**measured, "seconds": seconds, "loss_terms_per_step": max(terms, default=64.0)}


def _time_evaluations(trainer: MultiMixTrainer) -> list[float]:
    """Return a list to which each evaluation appends its seconds; they do not count as training time."""
    seconds: list[float] = []
    evaluate = trainer.evaluate

    def timed(*args: Any, **kwargs: Any) -> dict[str, float]:
        start = time.perf_counter()
        metrics = evaluate(*args, **kwargs)
        seconds.append(time.perf_counter() - start)
        return metrics

    trainer.evaluate = timed  # type: ignore[method-assign]
    return seconds


def draw_attention(model: Any, data: DatasetDict, test: Examples, path: Path) -> None:
    """Plot the attention of one held-out image of each of eight classes, and labels of their mixtures."""
    labels = np.array(data["test"]["label"])
    chosen = [int(np.flatnonzero(labels == digit)[0]) for digit in range(8)]
    images = torch.tensor(np.stack([np.array(data["test"][i]["image"]) for i in chosen])) / 255
    pixels = torch.stack([test[i]["pixel_values"] for i in chosen])
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
    names = data["test"].features["label"].names
    plot_attention(images, torch.from_numpy(labels[chosen]), attention, factors, names, path)


def show_table(console: Console, title: str, results: Results) -> None:
    """Print the mean and standard deviation of each metric over seeds, and the difference from plain training."""
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
    scales = {"accuracy": (100, "{:.1f}±{:.1f}"), "nll": (1, "{:.3f}±{:.3f}")}
    scales |= {"calibration_error": (100, "{:.1f}±{:.1f}"), "seconds": (1, "{:.0f}±{:.0f}")}
    for name, runs in results.items():
        cells = []
        for metric, (scale, text) in scales.items():
            values = scale * np.array([run[metric] for run in runs])
            cells.append(text.format(values.mean(), values.std(ddof=1) if seeds > 1 else 0))
        table.add_row(name, *cells, f"{np.mean([run['loss_terms_per_step'] for run in runs]):,.0f}")
    console.print(table)
    console.print(conclusion(results))


def conclusion(results: Results) -> str:
    """Return a sentence on the differences of Dense MultiMix from plain training that the seeds show reliably."""
    found = []
    for name in ("accuracy", "nll", "calibration_error"):
        info = METRICS[name]
        differences = np.array(
            [ours[name] - plain[name] for ours, plain in zip(results[OURS], results[PLAIN], strict=True)]
        )
        interval = mean_interval(differences)
        if interval.excludes_zero:
            found.append(f"{info.title} {info.format_difference(interval)}")
    if not found:
        return f"{OURS} and {PLAIN} do not differ reliably over {len(results[PLAIN])} seeds."
    return f"{OURS} minus {PLAIN}, with 95 % intervals over seeds: {', '.join(found)}."


def main() -> None:
    """Train all methods in both regimes, print and plot the results, and save the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="number of runs of each method")
    parser.add_argument("--epochs", type=int, help="number of epochs of each run; default: 80 and 20")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"), help="directory for all results")
    args = parser.parse_args()
    gc.freeze()  # each training collects garbage, which takes a second with all imported objects
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    console = Console()
    data = load_digits()
    processor = ViTImageProcessorPil(
        size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5], do_convert_rgb=False
    )
    names = data["train"].features["label"].names
    train, test = prepare(data["train"].shuffle(seed=0), processor), prepare(data["test"], processor)
    console.print(
        f"A ViT with {sum(p.numel() for p in build_model(['a']).parameters()):,} parameters on handwritten digits of "
        f"8x8 pixels, {args.seeds} seeds per method."
    )
    results: dict[str, Results] = {regime.title: {name: [] for name in METHODS} for regime in REGIMES}
    histories: dict[str, dict[str, list[Any]]] = {regime.title: {name: [] for name in METHODS} for regime in REGIMES}
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    for regime in REGIMES:
        chosen = train[: regime.images]
        epochs = args.epochs or regime.epochs
        with Progress(*columns, TextColumn("{task.fields[loss]}"), TimeRemainingColumn(), console=console) as progress:
            for seed in range(args.seeds):
                for name, mixing in METHODS.items():
                    callback = RichProgress(progress, f"{regime.title}: {name}, seed {seed}")
                    directory = args.output_dir / "runs" / f"{name}-{len(chosen)}-{seed}"
                    trainer, metrics = train_one(
                        name, mixing, seed, names, chosen, test, processor, epochs, directory, callback
                    )
                    results[regime.title][name].append(metrics)
                    histories[regime.title][name].append(trainer.state.log_history)
                    if (regime, name, seed) == (REGIMES[0], OURS, 0):
                        shown = trainer
        title = f"{regime.title}: {len(chosen):,} images, {epochs} epochs"
        show_table(console, f"{title}; mean ± standard deviation of {args.seeds} seeds", results[regime.title])

    model_dir = args.output_dir / "model"
    shown.save_model(str(model_dir))
    plot_training(histories, args.output_dir / "training.png")
    draw_attention(shown.model, data, test, args.output_dir / "attention.png")
    report = {
        "results": results,
        "methods": {name: mixing.to_dict() for name, mixing in METHODS.items()},
        "seeds": list(range(args.seeds)),
        "training_arguments": json.loads(shown.args.to_json_string()),
        "model_config": shown.model.config.to_dict(),  # type: ignore[union-attr, operator]
        "test_examples": len(data["test"]),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "mm_hf": mm_hf.__version__,
        },
        "machine": {"cpu_threads": torch.get_num_threads(), "processor": platform.machine()},
    }
    (args.output_dir / "results.json").write_text(json.dumps(report, indent=2, default=str) + "\n")
    reloaded = AutoModelForImageClassification.from_pretrained(model_dir)
    console.print(
        f"\nWrote training.png, attention.png, results.json and model/ to {args.output_dir}. model/ is a plain "
        f"{type(reloaded).__name__} ({OURS}, few images, seed 0) and loads without mm_hf:\n"
        f"    AutoModelForImageClassification.from_pretrained({str(model_dir)!r})"
    )


if __name__ == "__main__":
    main()
