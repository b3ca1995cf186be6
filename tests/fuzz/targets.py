"""Targets of the fuzzer: each raises an error if the case of a seed is wrong."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from datasets import Dataset
from torch.nn import functional as F

from mm_hf import ERM, CutMix, DenseMultiMix, Mixing, Mixup, MultiMix, MultiMixTrainer, extract
from mm_hf.cli import commands, main
from mm_hf.cli._options import training_settings
from mm_hf.data.images import read_image_row
from mm_hf.data.options import DataOptions, ModelOptions
from mm_hf.data.splits import load_splits
from mm_hf.functional import soft_targets
from mm_hf.functional.factors import SparseFactors
from mm_hf.methods.settings import read_methods, settings_of
from tests.functional import literal
from tests.functional.test_numbers import check, random_problem
from tests.helpers.digits import arguments, vit
from tests.helpers.models import build

BATCH, STEPS = 6, 3
USER_ERRORS = (ValueError, OSError)


def losses(seed: int) -> None:
    """Compare the loss and the gradient of a random valid problem with float64."""
    check(random_problem(seed), by_attention=seed % 4 == 0)


# ---- Trainings ----


def trainings(seed: int) -> None:
    """Train three steps with random settings, and compare each loss and the final weights with a literal training."""
    random = np.random.default_rng(seed)
    name, labels_kind = random.choice(["vit", "bert"]), str(random.choice(["classes", "ignored", "multi-label"]))
    problem = "multi_label_classification" if labels_kind == "multi-label" else None
    if name == "vit":
        model: Any = vit(int(seed), num_labels=4, problem_type=problem)
    else:
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = build("bert", seed % 1000, num_labels=4, problem_type=problem, **dropout)
    rows = _rows(random, name, labels_kind)
    mixing = _random_method(random, name)
    twin = copy.deepcopy(model)
    records: list[list[Any]] = []
    with tempfile.TemporaryDirectory() as directory, _recorded(type(mixing), records):
        args = arguments(
            directory, per_device_train_batch_size=BATCH, max_steps=STEPS, optim="sgd", learning_rate=0.1,
            lr_scheduler_type="constant", max_grad_norm=0.0, logging_nan_inf_filter=False,
        )  # fmt: skip
        trainer = MultiMixTrainer(model, args, mixing=mixing, train_dataset=rows)
        batches: list[dict[str, Any]] = []
        trainer.data_collator = _keeping(trainer.data_collator, batches)
        trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    _literal_training(twin, mixing, batches, records, logged)
    for key, value in twin.state_dict().items():
        torch.testing.assert_close(
            model.state_dict()[key], value, rtol=1e-3, atol=1e-4, msg=lambda m, key=key: f"{key}: {m}"
        )


def _rows(random: np.random.Generator, name: str, labels_kind: str) -> Dataset:
    count = BATCH * STEPS
    labels: Any = random.integers(0, 4, count)
    if labels_kind == "ignored":
        labels[random.random(count) < 0.2] = -100
        labels[::BATCH] = 1  # each mini-batch has a valid example in expectation
    if labels_kind == "multi-label":
        labels = random.integers(0, 2, (count, 4)).astype(np.float32)
    if name == "vit":
        inputs: dict[str, Any] = {"pixel_values": random.normal(size=(count, 1, 8, 8)).astype(np.float32).tolist()}
    else:
        ids = random.integers(10, 99, (count, 8))
        inputs = {"input_ids": ids.tolist(), "attention_mask": np.ones_like(ids).tolist()}
    return Dataset.from_dict({**inputs, "labels": labels.tolist()}).with_format("torch")


def _random_method(random: np.random.Generator, name: str) -> Mixing:
    kinds: list[Any] = [ERM, MultiMix, DenseMultiMix] + ([Mixup, CutMix] if name == "vit" else [])
    kind = kinds[int(random.integers(len(kinds)))]
    if kind is ERM:
        return ERM()
    alpha = float(10 ** random.uniform(-2, 1))
    if kind in (Mixup, CutMix):
        return kind(alpha=alpha)
    settings: dict[str, Any] = {"num_mixed": int(random.integers(1, 30)), "input_mixing": "none"}
    strength = int(random.integers(3))
    if strength == 0:
        settings["alpha"] = alpha
    elif strength == 1:
        settings["effective_examples"] = float(random.uniform(1.1, 8))
    settings["clean_weight"] = float(random.choice([0.0, 0.5, 1.0]))
    settings["pooled_weight"] = float(random.choice([0.5, 1.0]))
    if kind is DenseMultiMix:
        settings |= {
            "dense_weight": float(random.choice([0.0, 1.0])),
            "attention": str(random.choice(["auto", "gap", "cam", "uniform"])),
            "confidence_weighted": bool(random.integers(2)),
        }
    return kind(**settings)


@contextlib.contextmanager
def _recorded(kind: type[Mixing], records: list[list[Any]]) -> Iterator[None]:
    """Record the random draws of each step: the mixed inputs, the factors and the permutations."""
    mix_inputs = kind.mix_inputs

    def recorded_inputs(self: Any, inputs: Any, labels: Any, *args: Any, **kwargs: Any) -> Any:
        result = mix_inputs(self, inputs, labels, *args, **kwargs)
        records.append([{k: v.detach().clone() if torch.is_tensor(v) else v for k, v in result[0].items()}, result[1]])
        return result

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(kind, "mix_inputs", recorded_inputs))
        if issubclass(kind, MultiMix):
            from mm_hf.methods import multimix

            sample, permute = kind.sample, multimix.sample_permutations

            def recorded_sample(self: Any, *args: Any, **kwargs: Any) -> Any:
                factors = sample(self, *args, **kwargs)
                records[-1].append(factors)
                return factors

            def recorded_permutations(*args: Any, **kwargs: Any) -> Any:
                permutations = permute(*args, **kwargs)
                records[-1].append(permutations)
                return permutations

            stack.enter_context(mock.patch.object(kind, "sample", recorded_sample))
            stack.enter_context(mock.patch.object(multimix, "sample_permutations", recorded_permutations))
        yield


def _keeping(collator: Callable[[Any], Any], batches: list[dict[str, Any]]) -> Callable[[Any], Any]:
    def collate(rows: Any) -> Any:
        batch = collator(rows)
        batches.append({k: v.clone() for k, v in batch.items()})
        return batch

    return collate


def _literal_training(
    model: Any, mixing: Mixing, batches: list[dict[str, Any]], records: list[list[Any]], logged: list[float]
) -> None:
    """Train a model with losses of one mixed example at a time, and compare them with the logged ones."""
    is_multi_label = model.config.problem_type == "multi_label_classification"
    criterion = "binary_cross_entropy" if is_multi_label else "cross_entropy"
    if isinstance(mixing, ERM):  # trains as Trainer, without a wrapped model
        records = [[{k: v for k, v in batch.items() if k != "labels"}, batch["labels"]] for batch in batches]
    for batch, record, found in zip(batches, records, logged, strict=True):
        inputs, targets, *draws = record
        loss = _literal_loss(model, mixing, inputs, batch["labels"], targets, draws, criterion)
        assert abs(float(loss) - found) <= 1e-3 * max(1, abs(found)), f"loss {found}, expected {float(loss)}"
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad


def _literal_loss(
    model: Any, mixing: Any, inputs: Any, labels: torch.Tensor, targets: torch.Tensor, draws: list[Any], criterion: str
) -> torch.Tensor:
    def plain(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if criterion != "cross_entropy":
            return F.binary_cross_entropy_with_logits(logits, labels.float())
        if labels.is_floating_point():
            # The target of a mixture with an ignored example sums to less than 1; the mean is weighted by these sums.
            return -(labels * logits.log_softmax(-1)).sum() / labels.sum()
        return F.cross_entropy(logits, labels)

    if isinstance(mixing, ERM):
        return plain(model(**inputs).logits, labels)
    if isinstance(mixing, (Mixup, CutMix)):
        return plain(model(**inputs).logits, targets)
    dense = isinstance(mixing, DenseMultiMix) and mixing.dense_weight > 0
    if dense:
        output = extract(model, mixing.attention, **inputs, **({"labels": labels} if mixing.attention == "cam" else {}))
        logits, tokens = output.logits, output.token_logits
    else:
        logits = model(**inputs).logits
    total = mixing.clean_weight * plain(logits, labels) if mixing.clean_weight else 0.0
    remaining = list(draws)
    wanted = labels
    if criterion == "cross_entropy":
        rows, is_valid = soft_targets(labels, 4, criterion=criterion)
        wanted = (rows * is_valid[:, None]).double()
    if mixing.pooled_weight:
        factors = _dense(remaining.pop(0))
        ones = torch.ones(len(labels), 1, dtype=torch.float64)
        pooled = literal.dense_multimix(
            logits[:, None].double(), wanted, ones, factors[None], 0.0, False, criterion
        )  # fmt: skip
        total = total + mixing.pooled_weight * pooled
    if dense:
        factors, permutations = _dense(remaining.pop(0)), remaining.pop(0)
        matrix = torch.stack([factors[row] for row in permutations])
        term = literal.dense_multimix(
            tokens.double(),
            wanted,
            output.attention.detach().double(),
            matrix,
            0.0,
            mixing.confidence_weighted,
            criterion,
        )
        total = total + mixing.dense_weight * term
    return total


def _dense(factors: torch.Tensor | SparseFactors) -> torch.Tensor:
    return (factors.dense() if isinstance(factors, SparseFactors) else factors).double()


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
    """Damage a checkpoint, resume, and require the weights of an undamaged run, or an error that is one sentence."""
    from tests.helpers.digits import dataset

    random = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary) / "run"
        shutil.copytree(_checkpoint(), directory)
        last = directory / "checkpoint-2"
        files = sorted(path for path in last.iterdir() if path.is_file())
        damage(files[int(random.integers(len(files)))], random)
        args = arguments(directory, max_steps=3, save_strategy="no")
        trainer = MultiMixTrainer(vit(), args, mixing=MultiMix(num_mixed=8), train_dataset=dataset())
        try:
            trainer.train(resume_from_checkpoint=str(last) if random.integers(2) else True)
        except USER_ERRORS:
            return
        for name, value in trainer.model.state_dict().items():
            assert value.isfinite().all(), f"{name} is not finite"


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
    rows = [{"text": f"word {i}", "label": ["up", "down"][i % 2]} for i in range(12)]
    kind = str(random.choice(["csv", "jsonl"]))
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stderr(io.StringIO()):
        folder = Path(temporary) / "data"
        folder.mkdir()
        for split in ("train", "test"):
            if kind == "csv":
                text = "text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in rows)
            else:
                text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{split}.{kind}").write_text(text)
        damage(folder / f"{random.choice(['train', 'test'])}.{kind}", random)
        try:
            splits = load_splits(DataOptions(str(folder)), cache_dir=str(Path(temporary) / "cache"))
        except USER_ERRORS:
            return
        assert len(splits.class_names) >= 2 and len(splits.train) and len(splits.test)


TARGETS: dict[str, Callable[[int], None]] = {
    "losses": losses, "trainings": trainings, "checkpoints": checkpoints, "command_lines": command_lines,
    "images": images, "tables": tables,
}  # fmt: skip
