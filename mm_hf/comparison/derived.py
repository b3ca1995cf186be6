"""Baselines that are derived from a run of plain training: early stopping and temperature scaling.

They train nothing. Early stopping predicts with the weights of the evaluation with the best validation accuracy;
temperature scaling divides the logits of the last weights by a number fitted on the validation examples.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from ..evaluation.metrics import compute_metrics, predictions
from ..evaluation.temperature import fit_temperature
from .record import DamagedFileError, Run
from .task import Task, slug

EARLY_STOPPING, TEMPERATURE_SCALING = "early_stopping", "temperature_scaling"
DERIVED = (EARLY_STOPPING, TEMPERATURE_SCALING)
CHECKSUM = "sha256"  # in the metadata of a file of weights


def derived_names(name: str) -> dict[str, str]:
    """Return the names of the baselines that are derived from a method, by their kind.

    Example:
        >>> derived_names("erm")["early_stopping"]
        'erm_early_stopping'
    """
    return {kind: f"{name}_{kind}" for kind in DERIVED}


class BestWeights(TrainerCallback):
    """Keep the weights of the evaluation with the best validation accuracy, of equal ones that with the least loss.

    They are kept in a file, so that a resumed run has those of the evaluations before. The file has a checksum of its
    values and weights, which are verified before they are used.

    Args:
        path: The file.
    """

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> tuple[tuple[float, float], float] | None:
        """Return accuracy and minus the loss, and the epoch; None if there was no evaluation.

        Raises:
            DamagedFileError: The file is damaged.
        """
        if not self.path.exists():
            return None
        values, _ = self._verified()
        return (float(values["accuracy"]), float(values["minus_loss"])), float(values["epoch"])

    def load(self, model: nn.Module) -> None:
        """Load the best weights into a model.

        Raises:
            DamagedFileError: The file is damaged.
        """
        model.load_state_dict(self._verified()[1])

    def _verified(self) -> tuple[dict[str, str], dict[str, Tensor]]:
        """Return the values and the weights of the file."""
        try:
            with safe_open(self.path, "pt") as file:
                values, weights = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if values.pop(CHECKSUM, None) != _checksum(values, weights):
                raise ValueError("its checksum differs")
        except (SafetensorError, OSError, ValueError) as error:
            remedy = f"delete {self.path.parent} to train this run again"
            raise DamagedFileError(self.path, error, remedy) from error
        return values, weights

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.global_step:  # not resumed: the file is of an interrupted run that starts again
            self.path.unlink(missing_ok=True)
        best = self.read()
        self.best = (-np.inf, -np.inf) if best is None else best[0]

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        metrics, model = kwargs["metrics"], kwargs["model"]
        score = (float(metrics.get("eval_accuracy", np.nan)), -float(metrics.get("eval_loss", np.nan)))
        if np.isfinite(score).all() and score > self.best and state.is_world_process_zero:
            self.best = score
            # Copies, because a safetensors file does not share memory between tied weights.
            contiguous = {"memory_format": torch.contiguous_format}
            weights = {name: tensor.detach().cpu().clone(**contiguous) for name, tensor in model.state_dict().items()}
            values = {"accuracy": repr(score[0]), "minus_loss": repr(score[1]), "epoch": repr(float(state.epoch))}
            partial = self.path.with_suffix(".partial")
            save_file(weights, partial, metadata={**values, CHECKSUM: _checksum(values, weights)})
            os.replace(partial, self.path)


def _checksum(values: Mapping[str, str], weights: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 digest of strings and of the names, types, shapes and bytes of tensors."""
    digest = hashlib.sha256(repr(sorted(values.items())).encode())
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


def write_derived_runs(
    run: Run, arrays: Mapping[str, np.ndarray], model: nn.Module, task: Task, best: BestWeights
) -> None:
    """Write the baselines that are derived from a run of plain training beside it.

    Their metrics are those of the predictions. The training time is that of the run. Early stopping needs validation
    during the training.

    Args:
        run: The run, before it is written.
        arrays: Logits and labels of its test examples.
        model: Its trained model. It has the best weights afterwards.
        task: Its task, with validation examples.
        best: The best weights.
    """
    args = task.arguments(
        str(run.directory / "checkpoints"), run.seed, eval_strategy="no", save_strategy="no",
        load_best_model_at_end=False, torch_compile=False,
    )  # fmt: skip
    trainer = Trainer(model, args, data_collator=task.data_collator, processing_class=task.processing_class)
    logits, labels = predictions(model, trainer.get_test_dataloader(task.validation_dataset))
    temperature = fit_temperature(logits, labels)
    scaled = (arrays["logits"] / temperature).astype(arrays["logits"].dtype)
    _write(run, TEMPERATURE_SCALING, scaled, arrays["labels"], temperature=temperature)
    found = best.read()
    if found is not None:
        best.load(model)
        logits, labels = predictions(model, trainer.get_test_dataloader(task.test_dataset))
        _write(run, EARLY_STOPPING, logits.float().numpy(), labels.numpy(), best_epoch=found[1])
        best.path.unlink()


def derived_runs(directory: Path, name: str, seeds: list[int]) -> dict[str, list[Run]]:
    """Return the baselines that were derived from a method for all seeds, by name.

    Args:
        directory: Output directory of the comparison.
        name: Name of the method.
        seeds: The seeds.
    """
    found = {
        derived: [Run.read(directory / "runs" / slug(derived) / f"seed-{seed}") for seed in seeds]
        for derived in derived_names(name).values()
    }
    return {derived: [run for run in runs if run] for derived, runs in found.items() if all(runs)}


def _write(run: Run, kind: str, logits: np.ndarray, labels: np.ndarray, **values: float) -> None:
    name = derived_names(run.method)[kind]
    directory = run.directory.parents[1] / slug(name) / run.directory.name
    directory.mkdir(parents=True, exist_ok=True)
    metrics = {**compute_metrics("classification", logits, labels), "train_seconds": run.metrics["train_seconds"]}
    derived = Run(name, run.seed, {**metrics, **values}, {}, [], [], run.initial_weights, directory)
    derived.write({"logits": logits, "labels": labels})
