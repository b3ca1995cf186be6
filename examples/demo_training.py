"""Training runs of the demo, several at once in processes with one thread each.

A second thread does not make a model of this size faster. A run gives the same numbers in any number of processes.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import math
import multiprocessing
import os
import queue
import signal
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import DatasetDict
from transformers import (
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    set_seed,
)

from mm_hf import ERM, DenseMultiMix, Mixing, Mixup, MultiMixTrainer
from mm_hf.data.offline import load_digits
from mm_hf.evaluation.metrics import classification_metrics

PLAIN, OURS = "plain training", "Dense MultiMix"
METHODS: dict[str, Mixing] = {PLAIN: ERM(), "mixup": Mixup(), OURS: DenseMultiMix()}
BATCH_SIZE = 64
EVALUATIONS = 20  # per run: each takes as long as two training steps
MAX_PROCESSES = 4  # each needs half a GB
Examples = list[dict[str, Any]]  # pixel values and label


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        regime: Title of the regime.
        images: Number of training images.
        epochs: Number of epochs.
        method: Key of `METHODS`.
        seed: Seed of the weights, the order of the images and the mixing.
        directory: Directory for the model.
    """

    regime: str
    images: int
    epochs: int
    method: str
    seed: int
    directory: Path

    @property
    def steps(self) -> int:
        """Number of training steps."""
        return self.epochs * math.ceil(self.images / BATCH_SIZE)

    def __str__(self) -> str:
        return f"{self.regime}: {self.method}, seed {self.seed}"


@dataclass(frozen=True)
class Result:
    """Outcome of a training run.

    Attributes:
        metrics: Held-out metrics after training, and the cost of training.
        history: `trainer.state.log_history`.
        arguments: Training arguments.
    """

    metrics: dict[str, float]
    history: list[dict[str, Any]]
    arguments: dict[str, Any]


Progress = Callable[[Run, int, float | None], None]  # run, its completed steps, and its last loss


class ReportProgress(TrainerCallback):
    """Report the completed steps and the loss of a run."""

    def __init__(self, report: Callable[[int, float | None], None]):
        self.report = report
        self.loss: float | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.report(state.global_step, self.loss)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.loss = logs.get("loss", self.loss)


def build_model(class_names: Sequence[str]) -> ViTForImageClassification:
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


@functools.cache
def digits() -> tuple[DatasetDict, ViTImageProcessorPil, Examples, Examples]:
    """Return the dataset, its processor, and processed training and test images, which are the same in every epoch."""
    data = load_digits()
    processor = ViTImageProcessorPil(
        size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5], do_convert_rgb=False
    )

    def prepare(split: Any) -> Examples:
        pixels = processor(split["image"][:], return_tensors="pt")["pixel_values"]
        return [{"pixel_values": image, "labels": label} for image, label in zip(pixels, split["label"], strict=True)]

    return data, processor, prepare(data["train"].shuffle(seed=0)), prepare(data["test"])


def train(run: Run, report: Callable[[int, float | None], None]) -> Result:
    """Train and evaluate a model, and save it."""
    data, processor, training, test = digits()
    set_seed(run.seed)
    arguments = TrainingArguments(
        output_dir=str(run.directory),
        per_device_train_batch_size=BATCH_SIZE,
        per_device_eval_batch_size=450,
        num_train_epochs=run.epochs,
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
        seed=run.seed,
    )
    trainer = MultiMixTrainer(
        build_model(data["train"].features["label"].names),
        arguments,
        mixing=METHODS[run.method],
        train_dataset=training[: run.images],
        eval_dataset=test,
        processing_class=processor,
        compute_metrics=classification_metrics,
        callbacks=[ReportProgress(report)],
    )
    trainer.remove_callback(PrinterCallback)
    start = time.perf_counter()
    evaluations = _time_evaluations(trainer)
    trainer.train()
    seconds = time.perf_counter() - start - sum(evaluations)
    metrics = trainer.evaluate()
    trainer.save_model()
    terms = [entry["loss_terms"] for entry in trainer.state.log_history if "loss_terms" in entry]
    measured = {name: metrics[f"eval_{name}"] for name in ("accuracy", "nll", "calibration_error")}
    return Result(
        {**measured, "seconds": seconds, "loss_terms_per_step": max(terms, default=float(BATCH_SIZE))},
        trainer.state.log_history,
        json.loads(arguments.to_json_string()),
    )


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


def default_processes() -> int:
    """Return the number of available CPU cores, at most `MAX_PROCESSES`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MAX_PROCESSES)


def train_all(runs: Sequence[Run], processes: int, report: Progress) -> Generator[tuple[Run, Result], None, None]:
    """Train several runs at once, in the given order.

    Args:
        runs: Training runs.
        processes: Number of processes. They end when this function ends, also after an exception such as Ctrl-C.
        report: Function that is called after training steps.

    Yields:
        Each run and its result when it is complete.
    """
    context = multiprocessing.get_context("spawn")
    messages = context.Queue()
    # A KeyboardInterrupt can be lost, if it is raised while Python finalizes an object: the loop checks for signals.
    signals: list[int] = []
    handlers = {n: signal.signal(n, lambda n, _: signals.append(n)) for n in (signal.SIGINT, signal.SIGTERM)}
    pool = ProcessPoolExecutor(min(processes, len(runs)), context, _start_process, (messages,))
    waiting: dict[Future[Result], Run] = {pool.submit(_train_in_process, run): run for run in runs}
    try:
        while waiting:
            if signals:
                raise KeyboardInterrupt
            with contextlib.suppress(queue.Empty):
                report(*messages.get(timeout=0.2))
            for done in [future for future in waiting if future.done()]:
                yield waiting.pop(done), done.result()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)  # a pool that waits may wait for a lock of an ended process
        for child in multiprocessing.active_children():
            child.kill()
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    pool.shutdown()


_messages: Any = None  # in a process that trains: queue of its progress


def _start_process(messages: Any) -> None:
    global _messages
    _messages = messages
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one ends the others
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    gc.freeze()  # each training collects garbage, which takes a second with all imported objects


def _train_in_process(run: Run) -> Result:
    return train(run, lambda step, loss: _messages.put((run, step, loss)))
