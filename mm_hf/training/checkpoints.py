"""Complete checkpoints, and loading their weights into a model without missing any."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..distributed import all_gather_object, is_distributed
from .hub import state_file

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
# Trainer writes it last. `MultiMixTrainer` waits until all ranks have written their files.
LAST_FILE = "trainer_state.json"

logger = logging.getLogger(__name__)


def find_checkpoint_error(
    directory: str | Path, *, rank: int = 0, world_size: int = 1, model_only: bool = False, sharded: bool = False
) -> str | None:
    """Describe the first missing or truncated file of a checkpoint; None if it is complete.

    Only files that a resumed training run reads are checked. They are opened but not read: a safetensors file starts
    with its length, and a PyTorch file ends with the list of its contents.

    Args:
        directory: The checkpoint.
        rank: Rank of the calling process, whose random state is checked.
        world_size: Number of ranks. A checkpoint of another number of ranks can also be complete.
        model_only: The checkpoint was saved with `save_only_model`.
        sharded: FSDP or DeepSpeed wrote the weights and the optimizer. Their files are not checked.

    Returns:
        A clause for an error message.

    Example:
        >>> find_checkpoint_error("outputs/checkpoint-7")
        'there is no such directory'
    """
    directory = Path(directory)
    if not directory.is_dir():
        return "there is no such directory"
    files = [] if sharded else _weight_files(directory)
    if not model_only:
        files += [] if sharded else [directory / "optimizer.pt", directory / "scheduler.pt"]
        files += [file for file in [directory / "scaler.pt"] if file.exists()]
        files += _random_states(directory, rank, world_size)
        files += [file for file in [state_file(directory, rank, world_size)] if file.exists()]
    files += [file for file in [directory / "mixing.json"] if file.exists()]
    return next(filter(None, map(_find_file_error, [*files, directory / LAST_FILE])), None)


def _weight_files(directory: Path) -> list[Path]:
    """Return all files with weights; if there are none, the expected one."""
    found = [directory / name for name in (*WEIGHT_FILES, *ADAPTER_FILES) if (directory / name).is_file()]
    found += [file for name in ADAPTER_FILES for file in directory.glob(f"*/{name}")]
    for index in [file for file in found if file.suffix == ".json" and _find_file_error(file) is None]:
        found += [directory / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    return found or [directory / WEIGHT_FILES[0]]


def _random_states(directory: Path, rank: int, world_size: int) -> list[Path]:
    """Return the random state of a rank; none if the checkpoint is of another number of ranks."""
    own = directory / ("rng_state.pth" if world_size == 1 else f"rng_state_{rank}.pth")
    saved = len(list(directory.glob("rng_state_*.pth")))
    other_size = saved > 1 if world_size == 1 else (directory / "rng_state.pth").exists() or 1 < saved <= rank
    return [] if other_size and not own.exists() else [own]


def _find_file_error(file: Path) -> str | None:
    if not file.is_file():
        return f"{file.name} is missing"
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt"):
                pass
        elif file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
        else:
            with zipfile.ZipFile(file):
                pass
    except (OSError, ValueError, SafetensorError, zipfile.BadZipFile) as error:
        return f"{file.name}, of {file.stat().st_size:,} bytes, is incomplete ({error})"
    return None


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the checkpoints in a directory, newest first.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     for name in ("checkpoint-9", "checkpoint-10", "checkpoint-best", "runs"):
        ...         (Path(directory) / name).mkdir()
        ...     [checkpoint.name for checkpoint in list_checkpoints(directory)]
        ['checkpoint-10', 'checkpoint-9']
    """
    steps = {path: path.name.removeprefix("checkpoint-") for path in Path(output_dir).glob("checkpoint-*")}
    numbered = [path for path, step in steps.items() if step.isdecimal() and path.is_dir()]
    return sorted(numbered, key=lambda path: int(steps[path]), reverse=True)


def last_complete_checkpoint(output_dir: str | Path, **checkpoint_format: Any) -> Path | None:
    """Return the newest checkpoint that is complete on all ranks, the same on each rank; None if there is none.

    Newer, incomplete checkpoints are reported by a warning.

    Args:
        output_dir: Directory of the checkpoints.
        checkpoint_format: Keyword arguments of [`find_checkpoint_error`].
    """
    names = all_gather_object([path.name for path in list_checkpoints(output_dir)])[0]
    for path in [Path(output_dir) / name for name in names]:
        problem = find_checkpoint_error_on_any_rank(path, **checkpoint_format)
        if problem is None:
            return path
        if not is_distributed() or torch.distributed.get_rank() == 0:
            logger.warning("Skipping the checkpoint %s: %s.", path, problem)
    return None


def find_checkpoint_error_on_any_rank(directory: str | Path, **checkpoint_format: Any) -> str | None:
    """Return the result of [`find_checkpoint_error`] on the first rank that finds an error; None if none does."""
    return next(filter(None, all_gather_object(find_checkpoint_error(directory, **checkpoint_format))), None)


@contextlib.contextmanager
def explain_write_errors(checkpoint: str | Path, **checkpoint_format: Any) -> Iterator[None]:
    """Add to an error while writing a checkpoint what it means for the training run.

    Args:
        checkpoint: The checkpoint that is written in the context.
        checkpoint_format: Keyword arguments of [`find_checkpoint_error`].

    Raises:
        OSError: The checkpoint could not be written, for example because the disk is full. PyTorch reports a full disk
            only as an unexpected position in the file.
    """
    checkpoint = Path(checkpoint)
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        problem = find_checkpoint_error(checkpoint, **checkpoint_format)
        if problem is None:  # raised after the checkpoint was written
            raise
        older = [path for path in list_checkpoints(checkpoint.parent) if path.name != checkpoint.name]
        # Not `last_complete_checkpoint`, which waits for the other ranks.
        complete = next((path for path in older if find_checkpoint_error(path, **checkpoint_format) is None), None)
        if complete is None:
            advice = "There is no other checkpoint: fix the cause and start again."
        else:
            advice = (
                f"{complete} is complete: fix the cause and resume with resume_from_checkpoint=True, which skips "
                "incomplete checkpoints."
            )
        free = shutil.disk_usage(next(path for path in (checkpoint, *checkpoint.parents) if path.exists())).free
        raise OSError(
            f"The checkpoint {checkpoint} could not be written: {problem}. The disk has {free / 1e6:,.1f} MB free; the "
            f"error was: {error}. {advice}"
        ) from error


def is_plain_checkpoint(model: nn.Module, directory: str | Path) -> bool:
    """Return True if a directory has all weights of a Transformers model: no adapter, not sharded, not quantized."""
    from transformers import PreTrainedModel

    return (
        isinstance(model, PreTrainedModel)
        and getattr(model, "quantization_method", None) is None
        and any((Path(directory) / name).is_file() for name in WEIGHT_FILES)
    )


def load_weights(model: nn.Module, directory: str | Path) -> None:
    """Load the weights of a checkpoint with `from_pretrained`, which knows the parameter names of older files.

    Transformers 5 renames parameters of some architectures, for example ViT, when it loads a model, and restores the
    old names when it saves one. Trainer's own `load_state_dict` does neither and ignores missing keys, so that a
    resumed training run silently starts from new weights.

    Args:
        model: The model to load into.
        directory: The checkpoint.

    Raises:
        RuntimeError: Weights of the model are missing in the checkpoint, or have other shapes.
    """
    cls: Any = type(model)
    loaded, info = cls.from_pretrained(
        directory, config=copy.deepcopy(model.config), dtype=model.dtype, output_loading_info=True
    )
    raise_if_missing(directory, {*info["missing_keys"], *info["mismatched_keys"], *info["unexpected_keys"]})
    model.load_state_dict(loaded.state_dict())


def raise_if_missing(directory: str | Path | None, keys: set[Any]) -> None:
    """Raise a RuntimeError that names the keys, if there are any."""
    if keys:
        names = sorted(map(str, keys))
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        where = "" if directory is None else f" {directory}"
        raise RuntimeError(
            f"The checkpoint{where} does not fit the model: {shown} would not be restored, and training would start "
            "from new weights. Use a model of the class and size that the checkpoint was saved from."
        )
