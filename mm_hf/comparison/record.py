"""Finished runs on disk."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluation.files import replaced_file, write_text

RESULT, ARRAYS = "result.json", "predictions.npz"


class DamagedFileError(ValueError):
    """A file of a comparison's output directory is damaged. The message names it and the remedy."""

    def __init__(self, path: Path, reason: object, remedy: str):
        super().__init__(f"{path} is damaged ({reason}): {remedy}.")


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
        path = self.directory / ARRAYS
        try:
            with np.load(path, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise DamagedFileError(path, error, f"delete {self.directory} to train this run again") from error

    @property
    def model(self) -> Path | None:
        """The directory of the trained model; None if it was removed."""
        return self.directory / "model" if (self.directory / "model" / "config.json").exists() else None

    @classmethod
    def read(cls, directory: Path) -> Run | None:
        """Return the run in a directory; None if it is not finished.

        Raises:
            DamagedFileError: The result or the predictions are damaged.
        """
        path = directory / RESULT
        if not path.exists():
            return None
        kinds = {"metrics": dict, "corruptions": dict, "history": list, "notes": list}
        remedy = f"delete {directory} to train this run again"
        values = read_json(path, remedy, kinds)
        try:
            run = cls(**values, directory=directory)
        except TypeError as error:
            raise DamagedFileError(path, error, remedy) from error
        run.arrays  # noqa: B018  # damaged ones are reported before other runs are trained
        return run

    def write(self, arrays: Mapping[str, Any]) -> None:
        """Write the run; the result is written last and atomically, so a directory with a result is complete."""
        with replaced_file(self.directory / ARRAYS) as file:
            np.savez_compressed(file, **arrays)
        values = {k: v for k, v in vars(self).items() if k != "directory"}
        write_json(self.directory / RESULT, values)


def read_json(path: Path, remedy: str, kinds: Mapping[str, type]) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: The file.
        remedy: End of the error message.
        kinds: Entries that the object must have, with the types of their values.

    Raises:
        DamagedFileError: The file is damaged.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(path, error, remedy) from error
    if not isinstance(values, dict):
        raise DamagedFileError(path, "it is no JSON object", remedy)
    for name, kind in kinds.items():
        if not isinstance(values.get(name), kind):
            raise DamagedFileError(path, f"its entry {name!r} is no {kind.__name__}", remedy)
    return values


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file atomically: a reader finds either the old or the new content."""
    write_text(path, json.dumps(values, indent=1) + "\n")
