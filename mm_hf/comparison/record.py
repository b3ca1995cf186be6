"""Finished runs on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluation.files import replaced_file, write_text

RESULT, ARRAYS = "result.json", "predictions.npz"


@dataclass
class Run:
    """A finished run.

    Attributes:
        method: Name of the method in the comparison.
        seed: Seed of initial weights, order of data and mixing.
        metrics: Values by the names of the registry of metrics.
        corruptions: For each corruption the accuracy at severities 0 to 5.
        history: `log_history` of the trainer.
        notes: Reasons for metrics that could not be computed.
        initial_weights: Digest of the weights before training.
        directory: Directory of the run.
    """

    method: str
    seed: int
    metrics: dict[str, float]
    corruptions: dict[str, list[float]]
    history: list[dict[str, Any]]
    notes: list[str]
    initial_weights: str
    directory: Path

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The available arrays: `logits`, `labels` and `features` of the test examples, and `ood_logits`."""
        with np.load(self.directory / ARRAYS, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}

    @property
    def model(self) -> Path | None:
        """The directory of the trained model; None if it was removed."""
        return self.directory / "model" if (self.directory / "model" / "config.json").exists() else None

    @classmethod
    def read(cls, directory: Path) -> Run | None:
        """Return the run in a directory; None if it is not finished.

        Raises:
            ValueError: The file of the result is damaged.
        """
        if not (directory / RESULT).exists():
            return None
        try:
            values = json.loads((directory / RESULT).read_text(encoding="utf-8"))
            return cls(**values, directory=directory)
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{directory / RESULT} is damaged ({error}): delete {directory} to train this run again."
            ) from error

    def write(self, arrays: Mapping[str, Any]) -> None:
        """Write the run; the result is written last and atomically, so a directory with a result is complete."""
        with replaced_file(self.directory / ARRAYS) as file:
            np.savez_compressed(file, **arrays)
        values = {k: v for k, v in vars(self).items() if k != "directory"}
        write_json(self.directory / RESULT, values)


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file atomically: a reader finds either the old or the new content."""
    write_text(path, json.dumps(values, indent=1) + "\n")
