"""Train a small ViT on handwritten digits with and without Dense MultiMix, and compare the results.

`make demo` runs this script. Both methods use the same data, number of epochs, schedule and seeds. The held-out images
are used only for evaluation.

    python examples/demo.py [--seeds 3] [--epochs 20] [--paper] [--output_dir outputs/demo]
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from datasets import DatasetDict
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
from mm_hf import ERM, DenseMultiMix, Mixing, MultiMixTrainer, extract, sample_factors
from mm_hf.data.offline import load_digits
from mm_hf.evaluation.metrics import classification_metrics
from mm_hf.functional.factors import alpha_for

METHODS: dict[str, Mixing] = {"plain training": ERM(), "Dense MultiMix": DenseMultiMix()}
PAPER: dict[str, Mixing] = {"paper's recipe": DenseMultiMix(preset="paper")}
METRICS = ("accuracy", "nll", "calibration_error", "seconds", "loss_terms_per_step")


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


def prepare(data: DatasetDict, processor: Any) -> DatasetDict:
    """Apply the processor once, since the images are the same in every epoch."""

    def process(batch: dict[str, list[Any]]) -> dict[str, Any]:
        return {"pixel_values": processor(batch["image"], return_tensors="np")["pixel_values"]}

    return data.map(process, batched=True, remove_columns="image").with_format("torch")


def train_one(
    name: str,
    mixing: Mixing,
    seed: int,
    data: DatasetDict,
    processor: Any,
    args: argparse.Namespace,
    callback: TrainerCallback,
) -> tuple[MultiMixTrainer, dict[str, float]]:
    """Train and evaluate one run; return its trainer and its metrics."""
    set_seed(seed)
    arguments = TrainingArguments(
        output_dir=str(args.output_dir / "runs" / f"{name}-{seed}"),
        per_device_train_batch_size=64,
        per_device_eval_batch_size=450,
        num_train_epochs=args.epochs,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        weight_decay=0.05,
        logging_strategy="epoch",
        eval_strategy="epoch",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=seed,
    )
    trainer = MultiMixTrainer(
        build_model(data["train"].features["label"].names),
        arguments,
        mixing=mixing,
        train_dataset=data["train"],
        eval_dataset=data["test"],
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


def draw_attention(model: Any, data: DatasetDict, processed: DatasetDict, path: Path) -> None:
    """Plot the attention of one held-out image of each of eight classes, and labels of their mixtures."""
    labels = np.array(data["test"]["label"])
    chosen = [int(np.flatnonzero(labels == digit)[0]) for digit in range(8)]
    images = torch.tensor(np.stack([np.array(data["test"][i]["image"]) for i in chosen])) / 255
    batch = processed["test"][chosen]
    with torch.no_grad():
        attention = extract(model.eval(), pixel_values=batch["pixel_values"]).attention
    assert attention is not None  # only models without locations have none
    factors = sample_factors(
        len(chosen),
        4,
        alpha_for(3, len(chosen)),
        num_locations=attention.shape[1],
        generator=torch.Generator().manual_seed(0),
    )
    names = data["test"].features["label"].names
    plot_attention(images, batch["label"], attention, factors, names, path)


def show_table(console: Console, results: dict[str, list[dict[str, float]]], examples: int) -> None:
    """Print the mean and standard deviation of each metric over seeds."""
    seeds = len(next(iter(results.values())))
    title = f"{examples} held-out digits, mean ± standard deviation of {seeds} seeds"
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    columns = ("", "accuracy\n(%)", "NLL\n(nats)", "calibration\nerror", "training\nseconds", "loss terms\nper step")
    for column in columns:
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    scales = {"accuracy": (100, "{:.1f}±{:.1f}"), "nll": (1, "{:.3f}±{:.3f}")}
    scales |= {"calibration_error": (1, "{:.3f}±{:.3f}"), "seconds": (1, "{:.0f}±{:.0f}")}
    for name, runs in results.items():
        cells = []
        for metric, (scale, text) in scales.items():
            values = scale * np.array([run[metric] for run in runs])
            cells.append(text.format(values.mean(), values.std(ddof=1) if seeds > 1 else 0))
        table.add_row(name, *cells, f"{np.mean([run['loss_terms_per_step'] for run in runs]):,.0f}")
    console.print(table)


def main() -> None:
    """Train all methods, print and plot the results, and save the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="number of runs of each method")
    parser.add_argument("--epochs", type=int, default=20, help="number of epochs of each run")
    parser.add_argument("--paper", action="store_true", help="add Dense MultiMix with the paper's settings")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"), help="directory for all results")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    console = Console()
    data = load_digits()
    processor = ViTImageProcessorPil(
        size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5], do_convert_rgb=False
    )
    processed = prepare(data, processor)
    console.print(
        f"A ViT with {sum(p.numel() for p in build_model(['a']).parameters()):,} parameters on {len(data['train']):,} "
        f"handwritten digits of 8x8 pixels: {args.epochs} epochs, {args.seeds} seeds per method."
    )
    methods = {**METHODS, **(PAPER if args.paper else {})}
    results: dict[str, list[dict[str, float]]] = {name: [] for name in methods}
    histories: dict[str, list[Any]] = {name: [] for name in methods}
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    with Progress(*columns, TextColumn("{task.fields[loss]}"), TimeRemainingColumn(), console=console) as progress:
        for seed in range(args.seeds):
            for name, mixing in methods.items():
                callback = RichProgress(progress, f"{name}, seed {seed}")
                trainer, metrics = train_one(name, mixing, seed, processed, processor, args, callback)
                results[name].append(metrics)
                histories[name].append(trainer.state.log_history)
                if (name, seed) == ("Dense MultiMix", 0):
                    shown = trainer
    show_table(console, results, len(data["test"]))

    model_dir = args.output_dir / "model"
    shown.save_model(str(model_dir))
    plot_training(histories, args.output_dir / "training.png")
    draw_attention(shown.model, data, processed, args.output_dir / "attention.png")
    report = {
        "results": results,
        "mean": {n: {m: float(np.mean([run[m] for run in runs])) for m in METRICS} for n, runs in results.items()},
        "methods": {name: mixing.to_dict() for name, mixing in methods.items()},
        "seeds": list(range(args.seeds)),
        "epochs": args.epochs,
        "training_arguments": json.loads(shown.args.to_json_string()),
        "model_config": shown.model.config.to_dict(),  # type: ignore[union-attr, operator]
        "train_examples": len(data["train"]),
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
        f"{type(reloaded).__name__} (Dense MultiMix, seed 0) and loads without mm_hf:\n"
        f"    AutoModelForImageClassification.from_pretrained({str(model_dir)!r})"
    )


if __name__ == "__main__":
    main()
