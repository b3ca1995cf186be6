"""Files of the mixing beside a saved model: `mixing.json` with the settings, and the method's state in checkpoints."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import load_file, save_file
from torch import Tensor

from ..evaluation.files import write_text
from ..locations import Plan
from ..methods import Mixing
from ..wrapping.wrapper import MixingHandle

MIXING_FILE = "mixing.json"
Parsed = TypeVar("Parsed")

logger = logging.getLogger(__name__)


def save_mixing(
    directory: str | Path,
    mixing: Mixing,
    plan: Plan | None = None,
    num_mixed: int | None = None,
    training: Mapping[str, Any] | None = None,
) -> Path:
    """Write the settings that a model was trained with to `mixing.json`.

    Args:
        directory: Directory of the model.
        mixing: The method.
        plan: Plan of the model's locations.
        num_mixed: Number that `num_mixed="auto"` has selected, which a resumed training keeps.
        training: Other settings that a resumed training must have ([`~mm_hf.training.run_settings.training_settings`]).
    """
    from .. import __version__

    path = Path(directory) / MIXING_FILE
    values = {
        "mixing": mixing.to_dict(),
        "locations": None if plan is None else plan.to_dict(),
        **({} if num_mixed is None else {"num_mixed": num_mixed}),
        **({} if training is None else {"training": dict(training)}),
        "mm_hf_version": __version__,
    }
    write_text(path, json.dumps(values, indent=2) + "\n")
    return path


def load_mixing(name_or_path: str | Path, **hub: Any) -> Mixing:
    """Load the method that a model was trained with from its `mixing.json`.

    Args:
        name_or_path: A directory that `MultiMixTrainer` saved (also a checkpoint), or a model on the Hub, "user/name".
        hub: Arguments of `from_pretrained`: `revision`, `token`, `subfolder`, `cache_dir`, `local_files_only`.

    Raises:
        FileNotFoundError: The directory has no `mixing.json`: it was not saved by `MultiMixTrainer`.
        OSError: The model on the Hub has no `mixing.json`, does not exist or is private, or the Hub cannot be reached.
        ValueError: `mixing.json` is damaged, or of a newer version of mm_hf whose method or settings are unknown.

    Example:
        >>> import tempfile
        >>> from mm_hf import DenseMultiMix, load_mixing
        >>> from mm_hf.training.hub import save_mixing
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     path = save_mixing(directory, DenseMultiMix(num_mixed=100))
        ...     load_mixing(directory).num_mixed
        100
    """
    path = _find(name_or_path, **hub)
    return _parse(path, "mixing", Mixing.from_dict)


def load_plan(name_or_path: str | Path, **hub: Any) -> Plan | None:
    """Load the plan of a model's locations from its `mixing.json`; None if the method needed none.

    Arguments and errors are those of [`load_mixing`].
    """
    path = _find(name_or_path, **hub)
    return None if read_mixing_file(path).get("locations") is None else _parse(path, "locations", Plan.from_dict)


def load_num_mixed(directory: str | Path) -> int | None:
    """Load the number that `num_mixed="auto"` had selected when a checkpoint was written; None before that."""
    path = Path(directory) / MIXING_FILE
    number = read_mixing_file(path).get("num_mixed") if path.exists() else None
    return number if isinstance(number, int) else None


def state_file(directory: str | Path, rank: int = 0, world_size: int = 1) -> Path:
    """Return the file of one rank's method state in a checkpoint.

    Example:
        >>> state_file("checkpoint-7").name, state_file("checkpoint-7", rank=1, world_size=2).name
        ('mixing_state.safetensors', 'mixing_state_1.safetensors')
    """
    return Path(directory) / ("mixing_state.safetensors" if world_size == 1 else f"mixing_state_{rank}.safetensors")


def save_method_state(
    directory: str | Path, state: Mapping[str, Tensor], rank: int = 0, world_size: int = 1
) -> Path | None:
    """Write a method's state into a checkpoint. A method without state has no file.

    The state may hold training examples, as that of RecursiveMix does, and is then part of a checkpoint that is pushed.
    """
    path = state_file(directory, rank, world_size)
    path.unlink(missing_ok=True)  # of an earlier training in the same directory
    if not state:
        return None
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, path)
    return path


def load_method_state(directory: str | Path, rank: int = 0, world_size: int = 1) -> dict[str, Tensor]:
    """Load what `save_method_state` wrote: empty if the method had no state.

    The state of a checkpoint of another number of ranks is not used; a warning reports this.
    """
    path = state_file(directory, rank, world_size)
    if path.is_file():
        # Copies: tensors of `load_file` keep the file open, which may be deleted as training goes on.
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    if any(Path(directory).glob("mixing_state*.safetensors")):
        logger.warning(
            "The checkpoint %s has method states of another number of processes than %d: the method starts without "
            "its memory, and the resumed training is not exact.",
            directory,
            world_size,
        )
    return {}


def restore_method_state(handle: MixingHandle, directory: str | Path, rank: int = 0, world_size: int = 1) -> None:
    """Restore the state of a checkpoint. The state of another method is not used; a warning reports this."""
    state = load_method_state(directory, rank, world_size)
    try:
        handle.load_state_dict(state)
    except ValueError as error:
        logger.warning("The method starts without the state of the checkpoint %s: %s", directory, error)


def read_mixing_file(path: Path) -> dict[str, Any]:
    """Read a `mixing.json`.

    Raises:
        ValueError: It is damaged or another file.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): restore it or delete it.") from error
    if not isinstance(values, dict) or not isinstance(values.get("mixing"), dict):
        raise ValueError(
            f"{path} was not written by mm_hf: it is no JSON object with the settings of a method as 'mixing'. Restore "
            "it or delete it."
        )
    return values


def _parse(path: Path, entry: str, parse: Callable[[dict[str, Any]], Parsed]) -> Parsed:
    """Return a parsed entry of a `mixing.json`; a ValueError names the file and the version that wrote it."""
    from .. import __version__

    values = read_mixing_file(path)
    try:
        return parse(values[entry])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        written = values.get("mm_hf_version", "an unknown version")
        raise ValueError(
            f"The entry {entry!r} of {path} cannot be read by mm_hf {__version__}; {written} wrote it: {error}"
        ) from error


def _find(name_or_path: str | Path, **hub: Any) -> Path:
    from transformers.utils import cached_file

    path = Path(name_or_path) / (hub.get("subfolder") or "") / MIXING_FILE
    if Path(name_or_path).is_dir() and not path.is_file():
        raise FileNotFoundError(
            f"There is no {MIXING_FILE} in {path.parent}: the model was not saved by MultiMixTrainer."
        )
    found: Any = cached_file(str(name_or_path), MIXING_FILE, **hub)
    return Path(found)
