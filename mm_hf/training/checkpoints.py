"""Complete and undamaged checkpoints."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..distributed import all_gather_object, is_distributed
from .checksums import CHECKSUM_FILE, file_digest, read_checksums
from .hub import MIXING_FILE, state_file
from .weights import ADAPTER_FILES, INDEX_SUFFIX, WEIGHT_FILES, shards

# Trainer writes it last. `MultiMixTrainer` waits until all ranks have written their files, and adds `SHA256SUMS`.
LAST_FILE = "trainer_state.json"
# Files that are read if they exist.
CONFIG = "config.json"
OPTIONAL_FILES = (CONFIG, "optimizer.pt", "scheduler.pt", "scaler.pt", MIXING_FILE)

logger = logging.getLogger(__name__)


def find_checkpoint_error(
    directory: str | Path, *, rank: int = 0, world_size: int = 1, sharded: bool = False, own_files_only: bool = False
) -> str | None:
    """Describe the first file of a checkpoint that is damaged or indispensable and missing; None if there is none.

    Only files that a resumed training run reads are checked. They are compared with the checksums in `SHA256SUMS`. In
    a checkpoint without checksums, such as one of `Trainer`, the checksums inside PyTorch files are verified, and
    safetensors files have the length that they state.

    Args:
        directory: The checkpoint.
        rank: Rank of the calling process, whose random state is checked.
        world_size: Number of ranks. A checkpoint of another number of ranks can also be complete.
        sharded: FSDP or DeepSpeed wrote the weights and the optimizer.
        own_files_only: Check only the files of this rank, because another process checks the others.

    Returns:
        A clause for an error message.

    Example:
        >>> find_checkpoint_error("outputs/checkpoint-7")
        'there is no such directory'
    """
    directory = Path(directory)
    if not directory.is_dir():
        return "there is no such directory"
    try:
        checksums = read_checksums(directory)
    except ValueError as error:
        return str(error)
    own = _existing([*_random_states(directory, rank, world_size), state_file(directory, rank, world_size)])
    if own_files_only:
        return _find_error(own, directory, checksums)
    weights = [directory / name for name in checksums if "/" in name] if sharded else _weight_files(directory)
    optional = _existing([directory / name for name in OPTIONAL_FILES])
    return _find_error([*weights, *optional, *own, directory / LAST_FILE], directory, checksums)


def find_weights_error(directory: str | Path) -> str | None:
    """Describe the first file with weights of a checkpoint that is missing or damaged; None if there is none."""
    directory = Path(directory)
    try:
        return _find_error(_weight_files(directory), directory, read_checksums(directory))
    except ValueError as error:
        return str(error)


def _find_error(files: list[Path], directory: Path, checksums: dict[str, str]) -> str | None:
    return next(filter(None, (_find_file_error(file, directory, checksums) for file in files)), None)


def find_missing_files(
    directory: str | Path, *, rank: int = 0, world_size: int = 1, sharded: bool = False, own_files_only: bool = False
) -> list[str]:
    """Return the names of the files that an exact resumption needs and a checkpoint lacks.

    A training run can resume without them, as it can from a checkpoint that was saved with `save_only_model`.
    Arguments are those of [`find_checkpoint_error`].
    """
    directory = Path(directory)
    needed = _random_states(directory, rank, world_size)
    if not own_files_only and not sharded:
        needed = [directory / "optimizer.pt", directory / "scheduler.pt", *needed]
    optional = [directory / "scaler.pt", directory / MIXING_FILE, state_file(directory, rank, world_size)]
    needed += [file for file in optional if file.name in _listed(directory)]
    return [file.name for file in needed if not file.exists()]


def _listed(directory: Path) -> set[str]:
    """Return the names of all files that a checkpoint had when it was written, if that is known."""
    try:
        return set(read_checksums(directory))
    except ValueError:
        return set()


def _existing(files: list[Path]) -> list[Path]:
    return [file for file in files if file.exists()]


def _weight_files(directory: Path) -> list[Path]:
    """Return all files with weights; if there are none, the expected one."""
    found = [directory / name for name in (*WEIGHT_FILES, *ADAPTER_FILES) if (directory / name).is_file()]
    found += [file for name in ADAPTER_FILES for file in directory.glob(f"*/{name}")]
    found += _existing([file.parent / "adapter_config.json" for file in found if file.name in ADAPTER_FILES])
    for index in [file for file in found if file.name.endswith(INDEX_SUFFIX)]:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # a damaged index
            found += shards(index)
    return found or [directory / WEIGHT_FILES[0]]


def _random_states(directory: Path, rank: int, world_size: int) -> list[Path]:
    """Return the random state of a rank; none if the checkpoint is of another number of ranks."""
    own = directory / ("rng_state.pth" if world_size == 1 else f"rng_state_{rank}.pth")
    saved = len(list(directory.glob("rng_state_*.pth")))
    other_size = saved > 1 if world_size == 1 else (directory / "rng_state.pth").exists() or 1 < saved <= rank
    return [] if other_size and not own.exists() else [own]


def _find_file_error(file: Path, directory: Path, checksums: dict[str, str]) -> str | None:
    name = file.relative_to(directory).as_posix()
    if not file.is_file():
        return f"{name} is missing"
    error = _find_format_error(file, read_members=name not in checksums)
    if error is not None:
        return f"{name}, of {file.stat().st_size:,} bytes, is damaged ({error})"
    # Users edit configs, of which Trainer reads the version of Transformers only.
    if file.name != CONFIG and checksums.get(name) not in (None, file_digest(file)):
        return f"{name} is damaged: it differs from {CHECKSUM_FILE} (delete that file if you changed {file.name})"
    return None


def _find_format_error(file: Path, read_members: bool) -> str | None:
    """Describe a file that is truncated or not of its format.

    Args:
        file: A file of a checkpoint.
        read_members: Verify the checksums inside a PyTorch file, which is a zip archive. This reads all of it.
    """
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt"):
                pass
        elif file.suffix == ".json":
            if not isinstance(json.loads(file.read_text(encoding="utf-8")), dict):
                return "it is not a JSON object"
        elif file.suffix in (".pt", ".pth", ".bin"):
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip() if read_members else None
            return None if damaged is None else f"its part {damaged} differs from its checksum"
    except Exception as error:  # `zipfile` raises many types of errors for damaged archives
        return str(error) or type(error).__name__
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

    Newer checkpoints that are damaged or have lost files are reported by a warning. If all have lost files that a
    training run can resume without, the newest one is returned.

    Args:
        output_dir: Directory of the checkpoints.
        checkpoint_format: Keyword arguments of [`find_checkpoint_error`].
    """
    names = all_gather_object([path.name for path in list_checkpoints(output_dir)])[0]
    incomplete: dict[Path, str] = {}
    for path in [Path(output_dir) / name for name in names]:
        problem = find_checkpoint_error_on_any_rank(path, **checkpoint_format)
        lost = [] if problem else _lost_files_on_any_rank(path, **checkpoint_format)
        if problem is None and not lost:
            _warn_of_skipped(incomplete)
            return path
        if problem is None:
            incomplete[path] = f"{' and '.join(lost)} {'is' if len(lost) == 1 else 'are'} missing"
        else:
            _warn_of_skipped({path: problem})
    return next(iter(incomplete), None)


def _warn_of_skipped(problems: dict[Path, str]) -> None:
    if not is_distributed() or torch.distributed.get_rank() == 0:
        for path, problem in problems.items():
            logger.warning("Skipping the checkpoint %s: %s.", path, problem)


def _lost_files_on_any_rank(directory: Path, **checkpoint_format: Any) -> list[str]:
    """Return the missing files that were written: with checksums, those of which there is a checksum."""
    missing, listed = find_missing_files_on_any_rank(directory, **checkpoint_format), _listed(directory)
    lost = [name for name in missing if name in listed or not listed]
    return sorted({name for names in all_gather_object(lost) for name in names})


def find_missing_files_on_any_rank(directory: str | Path, **checkpoint_format: Any) -> list[str]:
    """Return the results of [`find_missing_files`] on all ranks."""
    found = all_gather_object(find_missing_files(directory, **checkpoint_format))
    return list(dict.fromkeys(name for names in found for name in names))


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
