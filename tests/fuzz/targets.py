"""Targets of the fuzzer: each raises an error if the case of a seed is wrong."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from mm_hf import MultiMix, MultiMixTrainer
from mm_hf.cli import commands, main
from mm_hf.cli._options import training_settings
from mm_hf.data.images import read_image_row
from mm_hf.data.options import DataOptions, ModelOptions
from mm_hf.data.splits import load_splits
from mm_hf.methods.settings import read_methods, settings_of
from tests.functional.test_numbers import check, random_problem
from tests.fuzz.faults import faults
from tests.fuzz.trainings import trainings
from tests.helpers.digits import arguments, vit

USER_ERRORS = (ValueError, OSError)


def losses(seed: int) -> None:
    """Compare the loss and the gradient of a random valid problem with float64."""
    check(random_problem(seed), by_attention=seed % 4 == 0)


# ---- Checkpoints ----


@functools.cache
def _checkpoint() -> Path:
    """Train a tiny model with two checkpoints once."""
    from tests.helpers.digits import dataset

    directory = Path(tempfile.mkdtemp(prefix="mm_hf_fuzz_"))
    args = arguments(directory, max_steps=2, save_strategy="steps", save_steps=1)
    MultiMixTrainer(vit(), args, mixing=MultiMix(num_mixed=8), train_dataset=dataset()).train()
    return directory


def checkpoints(seed: int) -> None:
    """Damage a checkpoint and resume: the weights of an undamaged run, a warning, or an error that is one sentence."""
    random = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary) / "run"
        shutil.copytree(_checkpoint(), directory)
        last = directory / "checkpoint-2"
        files = sorted(path for path in last.iterdir() if path.is_file())
        damaged = files[int(random.integers(len(files)))]
        damage(damaged, random)
        with _warnings() as warnings:
            try:
                weights = _resume(directory, str(last) if random.integers(2) else True)
            except USER_ERRORS as error:
                _check_message(error, damaged.name)
                return
        for name, value in _undamaged().items():
            assert weights[name].isfinite().all(), f"{name} is not finite"
            assert torch.equal(weights[name], value) or warnings, f"{damaged.name}: {name} differs without a warning"


def _check_message(error: Exception, name: str) -> None:
    """Check that an error is one short line that names the damaged file or split."""
    message = str(error)
    if "\n" in message or len(message) > 800 or name not in message:
        raise AssertionError(f"{message!r} is not one line with {name}") from error


def _resume(directory: Path, checkpoint: str | bool) -> dict[str, Tensor]:
    from tests.helpers.digits import dataset

    args = arguments(directory, max_steps=3, save_strategy="no")
    trainer = MultiMixTrainer(vit(), args, mixing=MultiMix(num_mixed=8), train_dataset=dataset())
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer.model.state_dict()


@functools.cache
def _undamaged() -> dict[str, Tensor]:
    return _resume(_checkpoint(), str(_checkpoint() / "checkpoint-2"))


@contextlib.contextmanager
def _warnings() -> Iterator[list[str]]:
    """Collect the warnings of the package."""
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("mm_hf")
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)


def damage(path: Path, random: np.random.Generator) -> None:
    """Remove, cut, empty or overwrite a part of a file."""
    content = bytearray(path.read_bytes())
    kind = int(random.integers(5))
    if kind == 0:
        path.unlink()
        return
    if kind == 1:
        content = content[: int(random.integers(len(content) + 1))]
    elif kind == 2:
        content = bytearray()
    elif kind == 3 and content:
        for _ in range(64):
            content[int(random.integers(len(content)))] ^= 1 << int(random.integers(8))
    else:
        half = len(content) // 2
        content[half:] = bytes(len(content) - half)
    path.write_bytes(bytes(content))


# ---- Command lines ----


def command_lines(seed: int) -> None:
    """Run a random command line up to the point where the work begins: exit code 0 or 2, and one line of error."""
    random = np.random.default_rng(seed)
    words = _random_command_line(random)
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
        for function in ("train._train", "compare._compare", "analyze._analyze", "check._check", "predict._predict"):
            module, name = function.split(".")
            if module in commands():
                stack.enter_context(mock.patch(f"mm_hf.cli.{module}.{name}", return_value=0))
        stack.enter_context(contextlib.redirect_stdout(output))
        stack.enter_context(contextlib.redirect_stderr(errors))
        try:
            code = main(words)
        except SystemExit as stopped:  # --help
            code = stopped.code
    assert code in (0, 2), (words, code)
    assert "Traceback" not in errors.getvalue(), words
    assert code == 0 or errors.getvalue().count("\n") == 1, (words, errors.getvalue())


VALUES = (
    *("", "0", "-1", "1e-3", "3", "nan", "inf", "1e400", "yes", "no", "maybe", "digits", "vit", "erm", "auto", "[1,2]"),
    *("{}", "a=b", "a=b:c=d", "mixup:alpha=2", "multimix:alpha=[1", "=", ":", ",", "--", "-", "%s", "$HOME", "\u00e9"),
    *("a" * 300, "/", ".", "..", "missing.yaml", "None", "null", "true", "x\ny", "hidden_size=3", "user/name", "a/b/c"),
    '{"depths": [1]}',
)


def _random_command_line(random: np.random.Generator) -> list[str]:
    names = [*commands(), "help", "--version", "trian", ""]
    options = [
        *training_settings(),
        *settings_of(DataOptions),
        *settings_of(ModelOptions),
        "mixing",
        "methods",
        "seeds",
    ]
    options += [name for settings in read_methods().values() for name in settings] + ["output_dir", "help", "help-all"]
    words = [str(random.choice(names))] if random.random() < 0.98 else []
    for _ in range(int(random.integers(0, 6))):
        option = str(random.choice(options))
        if random.random() < 0.15:  # misspelled
            k = int(random.integers(len(option)))
            option = option[:k] + option[k + 1 :]
        value = [VALUES[int(random.integers(len(VALUES)))] for _ in range(int(random.integers(0, 3)))]
        words += [f"--{option}={value[0]}"] if value and random.random() < 0.2 else [f"--{option}", *value]
    return words


# ---- Images and tables ----


def images(seed: int) -> None:
    """Damage an image file, and read it: an image, or an error that names the file."""
    from datasets import Image
    from PIL import Image as Pillow

    random = np.random.default_rng(seed)
    suffix, mode = str(random.choice(["png", "jpg", "gif", "bmp", "tiff"])), str(random.choice(["RGB", "L"]))
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / f"picture.{suffix}"
        shape = (int(random.integers(1, 40)), int(random.integers(1, 40)), *((3,) if mode == "RGB" else ()))
        Pillow.fromarray(random.integers(0, 256, shape, dtype=np.uint8)).save(path)
        damage(path, random)
        rows = Dataset.from_dict({"image": [str(path)]}).cast_column("image", Image())
        try:
            image = read_image_row(rows, 0, "image")["image"]
        except ValueError as error:
            if path.name not in str(error):
                raise AssertionError(f"the message does not name {path.name}") from error
            return
        assert image.width > 0 and image.height > 0


def tables(seed: int) -> None:
    """Damage a table of texts, and load it: two classes or more, or one sentence of error."""
    random = np.random.default_rng(seed)
    suffix = str(random.choice(TABLES_OF_TEXTS))
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stderr(io.StringIO()):
        folder = Path(temporary) / "data"
        folder.mkdir()
        for split in ("train", "test"):
            (folder / f"{split}{suffix}").write_bytes(_table(suffix))
        split = str(random.choice(["train", "test"]))
        damage(folder / f"{split}{suffix}", random)
        try:
            splits = load_splits(DataOptions(str(folder)), cache_dir=str(Path(temporary) / "cache"))
        except USER_ERRORS as error:
            _check_message(error, split)
            return
        assert len(splits.class_names) >= 2 and len(splits.train) and len(splits.test)
        for rows in (splits.train, splits.validation, splits.test):
            assert all(isinstance(text, str) for text in rows["text"])


TABLES_OF_TEXTS = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".arrow")


@functools.cache
def _table(suffix: str) -> bytes:
    rows = [{"text": f"word {i}", "label": ["up", "down"][i % 2]} for i in range(12)]
    if suffix in (".csv", ".tsv"):
        separator = {".csv": ",", ".tsv": "\t"}[suffix]
        return "".join(separator.join(row) + "\n" for row in [["text", "label"], *map(dict.values, rows)]).encode()
    if suffix == ".jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if suffix == ".json":
        return json.dumps(rows).encode()
    with tempfile.TemporaryDirectory() as temporary:
        data = Dataset.from_list(rows)
        if suffix == ".parquet":
            data.to_parquet(Path(temporary) / "rows.parquet")
        else:
            data.save_to_disk(temporary)
        (path,) = Path(temporary).glob(f"*{suffix}")
        return path.read_bytes()


TARGETS: dict[str, Callable[[int], None]] = {
    "losses": losses, "trainings": trainings, "faults": faults, "checkpoints": checkpoints,
    "command_lines": command_lines, "images": images, "tables": tables,
}  # fmt: skip
