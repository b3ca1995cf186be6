"""Which checkpoints are whole, and a checkpoint's weights read back into a model, all of them or not at all."""

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
# Trainer writes it last, and `MultiMixTrainer` when all processes have written everything else.
LAST_FILE = "trainer_state.json"

logger = logging.getLogger(__name__)


def find_checkpoint_error(
    directory: str | Path, *, process: int = 0, processes: int = 1, model_only: bool = False, sharded: bool = False
) -> str | None:
    """Describe the first missing or truncated file of a checkpoint; None if it is complete.

    Files are opened and not read: those of safetensors say at their beginning how long they are, and PyTorch's end with a
    list of what is in them.

    Args:
        directory: The checkpoint.
        process: Which of the processes asks: each has random numbers of its own.
        processes: How many they are. A checkpoint of another number of processes can be whole, too.
        model_only: Whether it was saved with `save_only_model`.
        sharded: Whether FSDP or DeepSpeed wrote weights and optimizer, whose own files are not looked at.

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
        files += _random_states(directory, process, processes)
        files += [file for file in [state_file(directory, process, processes)] if file.exists()]
    files += [file for file in [directory / "mixing.json"] if file.exists()]
    return next(filter(None, map(_flaw_of, [*files, directory / LAST_FILE])), None)


def _weight_files(directory: Path) -> list[Path]:
    """All files with weights; if there are none, the one that should be there."""
    found = [directory / name for name in (*WEIGHT_FILES, *ADAPTER_FILES) if (directory / name).is_file()]
    found += [file for name in ADAPTER_FILES for file in directory.glob(f"*/{name}")]
    for index in [file for file in found if file.suffix == ".json" and _flaw_of(file) is None]:
        found += [directory / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    return found or [directory / WEIGHT_FILES[0]]


def _random_states(directory: Path, process: int, processes: int) -> list[Path]:
    """The file of this process, unless the checkpoint is one of another number of processes."""
    own = directory / ("rng_state.pth" if processes == 1 else f"rng_state_{process}.pth")
    several = len(list(directory.glob("rng_state_*.pth")))
    elsewhere = several > 1 if processes == 1 else (directory / "rng_state.pth").exists() or 1 < several <= process
    return [] if elsewhere and not own.exists() else [own]


def _flaw_of(file: Path) -> str | None:
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
        return f"{file.name}, of {file.stat().st_size:,} bytes, is not whole ({error})"
    return None


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoints in a directory, the newest first.

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


def last_complete_checkpoint(output_dir: str | Path, **layout: Any) -> Path | None:
    """The newest checkpoint that every process finds whole, the same for all; None if there is none.

    Newer ones are told of by a warning. `layout` is that of [`find_checkpoint_error`].
    """
    names = all_gather_object([path.name for path in list_checkpoints(output_dir)])[0]
    for path in [Path(output_dir) / name for name in names]:
        flaw = find_checkpoint_error_on_any_rank(path, **layout)
        if flaw is None:
            return path
        if not is_distributed() or torch.distributed.get_rank() == 0:
            logger.warning("Passing over the checkpoint %s: %s.", path, flaw)
    return None


def find_checkpoint_error_on_any_rank(directory: str | Path, **layout: Any) -> str | None:
    """What [`find_checkpoint_error`] says in the first process in which it says something."""
    return next(filter(None, all_gather_object(find_checkpoint_error(directory, **layout))), None)


@contextlib.contextmanager
def explain_write_errors(checkpoint: str | Path, **layout: Any) -> Iterator[None]:
    """Say of an error in the writing of a checkpoint what it means for the training. `layout` is that of [`find_checkpoint_error`].

    Raises:
        OSError: The checkpoint could not be written; what PyTorch says of a full disk are two numbers without a meaning.
    """
    checkpoint = Path(checkpoint)
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        flaw = find_checkpoint_error(checkpoint, **layout)
        if flaw is None:  # of what comes after the writing
            raise
        older = [path for path in list_checkpoints(checkpoint.parent) if path.name != checkpoint.name]
        whole = next((path for path in older if find_checkpoint_error(path, **layout) is None), None)
        if whole is None:
            advice = "There is no other checkpoint to go on from: mend the cause and start again."
        else:
            advice = (
                f"{whole} is whole: mend the cause and go on from it by resume_from_checkpoint=True, which passes over what is "
                "half-written."
            )
        free = shutil.disk_usage(next(path for path in (checkpoint, *checkpoint.parents) if path.exists())).free
        raise OSError(
            f"The checkpoint {checkpoint} could not be written: {flaw}. {free / 1e6:,.1f} MB are free there; the error was: "
            f"{error}. {advice}"
        ) from error


def is_plain_checkpoint(model: nn.Module, directory: str | Path) -> bool:
    """Whether a directory holds all weights of a Transformers model that is neither adapted, sharded nor quantised."""
    from transformers import PreTrainedModel

    return (
        isinstance(model, PreTrainedModel)
        and getattr(model, "quantization_method", None) is None
        and any((Path(directory) / name).is_file() for name in WEIGHT_FILES)
    )


def load_weights(model: nn.Module, directory: str | Path) -> None:
    """Load weights the way `from_pretrained` does, which knows the names that older files use.

    Transformers 5 renames parameters of some architectures (ViT among them) when it loads a model and gives them their
    old names back when it saves it. Trainer's own `load_state_dict` does neither and takes no offence at keys that are
    missing, so that a resumed training silently goes on from fresh weights.

    Raises:
        RuntimeError: Weights of the model are missing in the checkpoint, or do not fit.
    """
    cls: Any = type(model)
    loaded, info = cls.from_pretrained(
        directory, config=copy.deepcopy(model.config), dtype=model.dtype, output_loading_info=True
    )
    refuse_missing(directory, {*info["missing_keys"], *info["mismatched_keys"], *info["unexpected_keys"]})
    model.load_state_dict(loaded.state_dict())


def refuse_missing(directory: str | Path | None, keys: set[Any]) -> None:
    """Raise a RuntimeError that names the keys, if there are any."""
    if keys:
        names = sorted(map(str, keys))
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        where = "" if directory is None else f" {directory}"
        raise RuntimeError(
            f"The checkpoint{where} does not fit the model: {shown} would not be restored. Going on would train from "
            "fresh weights; check that the model is of the class and size that the checkpoint was saved from."
        )
