"""One run of a comparison: a method is trained with a seed and evaluated, and the result is written."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from ..methods import ERM, Mixing
from ..training.checkpoints import last_complete_checkpoint, list_checkpoints
from ..training.trainer import MultiMixTrainer
from .derived import BestWeights, write_derived_runs
from .evaluate import EvaluationOptions, PeakMemory, evaluate_model
from .record import Run, read_json, write_json
from .task import Task

COST = "comparison.json"
Progress = Callable[[str, int, str], None]


def train_run(
    task: Task,
    name: str,
    mixing: Mixing,
    seed: int,
    directory: Path,
    *,
    evaluation: EvaluationOptions,
    progress: Progress | None = None,
    callbacks: list[TrainerCallback] | None = None,
) -> Run:
    """Train a method with a seed, evaluate it, and write the result; resume from the last checkpoint, if any.

    Args:
        task: Model, data and budget.
        name: Name of the method in the comparison.
        mixing: The method.
        seed: Seed of initial weights, order of data, augmentation and mixing.
        directory: Directory of this run. The model is written to `model` inside it. Of plain training with validation
            examples, early stopping and temperature scaling are written beside it: see `mm_hf.comparison.derived`.
        evaluation: Options of the evaluation after training.
        progress: Function that is called with the name, the seed and a short status.
        callbacks: Additional trainer callbacks.

    Raises:
        ValueError: The method cannot train this model; the message gives the reason.
    """
    directory.mkdir(parents=True, exist_ok=True)
    checkpoints = directory / "checkpoints"
    args = task.arguments(str(checkpoints), seed)
    costs = _Costs()
    reporting = _ProgressCallback(name, seed, progress)
    best = BestWeights(directory / "best.safetensors")
    derives = type(mixing) is ERM and task.validation_dataset is not None
    of_run: list[TrainerCallback] = [costs, reporting, *([best] if derives else []), *(callbacks or [])]
    trainer = task.trainer(args, mixing, kind=_Trainer, callbacks=of_run)
    assert isinstance(trainer, _Trainer) and trainer.model is not None
    trainer.costs = costs
    digest = weights_digest(trainer.model)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    last = _resumable_checkpoint(checkpoints)
    if last is not None:
        remedy = f"delete {last} to resume from an earlier checkpoint, or else to start this run again"
        costs.before = read_json(last / COST, remedy, {"train_seconds": float})
    with PeakMemory() as memory:
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    trainer.save_model(str(directory / "model"))
    history = trainer.state.log_history
    state = {k: v.detach().cpu() for k, v in trainer.model.state_dict().items()}
    del trainer
    if progress is not None:
        progress(name, seed, "testing")
    # A fresh model, without the wrappers of mixing, mixed precision and compilation.
    plain = task.model_init()
    plain.load_state_dict(state)
    plain.to(args.device)
    result = evaluate_model(plain, task, evaluation, str(checkpoints), seed)
    terms = [entry["loss_terms"] for entry in history if "loss_terms" in entry]
    result.metrics |= {
        "train_seconds": costs.seconds,
        "peak_memory_mib": max(memory.mib, costs.before.get("peak_memory_mib", 0.0)),
        "loss_terms_per_step": float(np.mean(terms)) if terms else float(args.train_batch_size),
    }
    run = Run(name, seed, result.metrics, result.corruptions, history, result.notes, digest, directory)
    if derives:
        write_derived_runs(run, result.arrays, plain, task, best)
    run.write(result.arrays)  # last: a finished run has its derived ones
    return run


def warm_up(task: Task, directory: Path) -> None:
    """Train one step and discard the result, so that one-time setup is not charged to the first run."""
    args = task.arguments(
        str(directory), 0, max_steps=1, eval_strategy="no", save_strategy="no", load_best_model_at_end=False
    )
    trainer = task.trainer(args, ERM())
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.train()


def weights_digest(model: nn.Module) -> str:
    """Return a short digest of all weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()[:16]


def remove_checkpoints(directory: Path) -> None:
    """Remove the checkpoints of a run."""
    shutil.rmtree(directory / "checkpoints", ignore_errors=True)


def _resumable_checkpoint(directory: Path) -> Path | None:
    """Return the newest complete checkpoint; those without costs, whose saving was interrupted, are removed."""
    for path in list_checkpoints(directory):
        if not (path / COST).exists():
            shutil.rmtree(path)
    return last_complete_checkpoint(directory)


class _Trainer(MultiMixTrainer):
    """A trainer that excludes evaluations and checkpoints from the training time."""

    costs: _Costs

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self.costs.paused():
            return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self.costs.paused():
            super()._save_checkpoint(*args, **kwargs)


class _Costs(TrainerCallback):
    """A timer of training, stored in checkpoints, so that a resumed run includes the time before."""

    def __init__(self) -> None:
        self.before: dict[str, float] = {}
        self.seconds = 0.0
        self._since: float | None = None

    def paused(self) -> _Pause:
        """Return a context manager whose time is not counted."""
        return _Pause(self)

    def stop(self) -> None:
        """Synchronize the device and add the time since the last start."""
        if self._since is not None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds += time.perf_counter() - self._since
            self._since = None

    def start(self) -> None:
        """Start counting."""
        self._since = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds = self.before.get("train_seconds", 0.0)
        self.start()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stop()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # It is the last file of a checkpoint; a checkpoint without it is incomplete.
        path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / COST
        self.stop()
        if path.parent.is_dir():
            write_json(path, {"train_seconds": self.seconds})
        self.start()


class _Pause:
    def __init__(self, costs: _Costs):
        self.costs = costs

    def __enter__(self) -> None:
        self.running = self.costs._since is not None
        self.costs.stop()

    def __exit__(self, *error: object) -> None:
        if self.running:
            self.costs.start()


class _ProgressCallback(TrainerCallback):
    """Report the progress of a run in percent."""

    def __init__(self, name: str, seed: int, progress: Progress | None):
        self.name, self.seed, self.progress = name, seed, progress
        self.status = ""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        status = f"{100 * state.global_step // max(state.max_steps, 1)} %"
        if self.progress is not None and status != self.status:
            self.progress(self.name, self.seed, status)
            self.status = status
