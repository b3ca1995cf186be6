"""What is told about the mixing beside a saved model: the settings it was trained with, as `mixing.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..locations import Plan
from ..methods import Mixing

MIXING_FILE = "mixing.json"


def save_mixing(directory: str | Path, mixing: Mixing, plan: Plan | None = None, num_mixed: int | None = None) -> Path:
    """Write the settings that a model was trained with, and how its locations were found, to `mixing.json`.

    `num_mixed` is what `num_mixed="auto"` has come to, with which a resumed training goes on.
    """
    from .. import __version__

    path = Path(directory) / MIXING_FILE
    values = {
        "mixing": mixing.to_dict(),
        "locations": None if plan is None else plan.to_dict(),
        **({} if num_mixed is None else {"num_mixed": num_mixed}),
        "mm_hf_version": __version__,
    }
    path.write_text(json.dumps(values, indent=2) + "\n")
    return path


def load_mixing(name_or_path: str | Path, **hub: Any) -> Mixing:
    """The method that a model was trained with, from its `mixing.json`.

    Args:
        name_or_path: A directory that `MultiMixTrainer` saved (a checkpoint, too), or a model on the Hub, "user/name".
        hub: What `from_pretrained` is told of the Hub: `revision`, `token`, `subfolder`, `cache_dir`, `local_files_only`.

    Raises:
        FileNotFoundError: The directory has no `mixing.json`: it was not saved by `MultiMixTrainer`.
        OSError: The same of a model on the Hub; or it is not there, is private, or the Hub cannot be reached.

    Example:
        >>> import tempfile
        >>> from mm_hf import DenseMultiMix, load_mixing
        >>> from mm_hf.training.hub import save_mixing
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     path = save_mixing(directory, DenseMultiMix(num_mixed=100))
        ...     load_mixing(directory).num_mixed
        100
    """
    return Mixing.from_dict(_read(name_or_path, **hub)["mixing"])


def load_plan(name_or_path: str | Path, **hub: Any) -> Plan | None:
    """How the locations of a model were found, from its `mixing.json`; None if they were not needed.

    Arguments and errors are those of [`load_mixing`].
    """
    values = _read(name_or_path, **hub)["locations"]
    return None if values is None else Plan.from_dict(values)


def load_num_mixed(directory: str | Path) -> int | None:
    """What `num_mixed="auto"` had come to when the checkpoint in a directory was written; None if it had not yet."""
    path = Path(directory) / MIXING_FILE
    return json.loads(path.read_text()).get("num_mixed") if path.exists() else None


def _read(name_or_path: str | Path, **hub: Any) -> dict[str, Any]:
    from transformers.utils import cached_file

    path = Path(name_or_path) / (hub.get("subfolder") or "") / MIXING_FILE
    if Path(name_or_path).is_dir() and not path.is_file():
        raise FileNotFoundError(
            f"There is no {MIXING_FILE} in {path.parent}: the model was not saved by MultiMixTrainer."
        )
    found: Any = cached_file(str(name_or_path), MIXING_FILE, **hub)
    return json.loads(Path(found).read_text())
