"""Target of the fuzzer: random settings of all methods, trained three steps beside a literal training."""

from __future__ import annotations

import contextlib
import copy
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from datasets import Dataset

from mm_hf import (
    ERM,
    AlignMixup,
    CutMix,
    DenseMultiMix,
    ManifoldMixup,
    Mixing,
    Mixup,
    MultiMix,
    MultiMixTrainer,
    RecursiveMix,
    RegMixup,
    TransMix,
    ZetaMixup,
)
from mm_hf.wrapping import step as wrapping_step
from tests.fuzz.literal_training import CLASSES, RATE, Literal, Step
from tests.helpers import zoo
from tests.helpers.digits import arguments

BATCH, STEPS = 6, 3
IMAGES = ("ViTForImageClassification", "ResNetForImageClassification")
TEXTS = ("BertForSequenceClassification", "GPT2ForSequenceClassification")
AUDIO = ("Wav2Vec2ForSequenceClassification",)
METHODS = (
    ERM, MultiMix, DenseMultiMix, Mixup, CutMix, RegMixup, ZetaMixup, ManifoldMixup, AlignMixup, TransMix, RecursiveMix
)  # fmt: skip
DRAWS = ("draw_factor", "draw_partners", "draw_spans", "draw_box", "zeta_weights", "sample_permutations")
CRITERIA = {"multi-label": "binary_cross_entropy", "regression": "mse"}


def is_rejected(method: Any, name: str, kind: str) -> bool:
    """Return True if the documentation excludes a method for a model or labels."""
    if isinstance(method, AlignMixup) and name in AUDIO:  # the mask marks samples and not tokens
        return True
    if isinstance(method, DenseMultiMix) and method.dense_weight and method.attention == "cam" and kind == "regression":
        return True
    if isinstance(method, TransMix):
        return name != "ViTForImageClassification"
    if isinstance(method, CutMix) or getattr(method, "input_mixing", None) == "cutmix":
        return name in TEXTS
    return isinstance(method, RecursiveMix) and name not in IMAGES


def trainings(seed: int) -> None:
    """Train three steps with random settings, and compare each loss and the final weights with a literal training."""
    random = np.random.default_rng(seed)
    name = str(random.choice(IMAGES + TEXTS + AUDIO))
    kind = str(random.choice(["classes", "ignored", "multi-label", "regression"]))
    mixing = random_method(random)
    if isinstance(mixing, ERM) and name in AUDIO and kind in CRITERIA:
        return  # plain Trainer: the losses of these models are those of class indices
    dtype = torch.float32 if seed % 4 == 0 else torch.float64
    model = build_model(name, seed % 1000, kind).to(dtype).train()
    rows, twin = random_rows(random, name, model, kind), copy.deepcopy(model)
    steps: list[Step] = []
    with tempfile.TemporaryDirectory() as directory, recorded(steps):
        args = arguments(
            directory, per_device_train_batch_size=BATCH, max_steps=STEPS, optim="sgd", learning_rate=RATE,
            lr_scheduler_type="constant", max_grad_norm=0.0, logging_nan_inf_filter=False,
        )  # fmt: skip
        trainer = MultiMixTrainer(model, args, mixing=mixing, train_dataset=rows)
        batches: list[dict[str, Any]] = []
        trainer.data_collator = keeping(trainer.data_collator, batches, dtype)
        try:
            trainer.train()
        except ValueError:
            if not is_rejected(mixing, name, kind):
                raise
            return
    assert not is_rejected(mixing, name, kind), f"{mixing} trained {name}"
    if isinstance(mixing, ERM):  # trains as Trainer, without a wrapped model
        steps = [Step(mixing) for _ in batches]
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    expected = Literal(twin, mixing, CRITERIA.get(kind, "cross_entropy"))
    for batch, step, found in zip(batches, steps, logged, strict=True):
        labels = batch.pop("labels")
        loss = float(expected.train_step(step, batch, labels))
        assert abs(loss - found) <= 1e-3 * max(1, abs(found)), f"{name}, {mixing}: loss {found}, expected {loss}"
    # Factors and mixed targets are float32. Three steps amplify a difference of their last digit, by up to 100.
    rtol, atol = (1e-3, 1e-4) if dtype == torch.float32 else (1e-4, 1e-5)
    for key, value in twin.state_dict().items():
        torch.testing.assert_close(
            model.state_dict()[key], value, rtol=rtol, atol=atol, msg=lambda m, key=key: f"{name}, {mixing}, {key}: {m}"
        )


def build_model(name: str, seed: int, kind: str) -> Any:
    """Build a tiny model in which nothing is random in training."""
    import transformers

    config = getattr(transformers, name).config_class().to_dict()
    changes: dict[str, Any] = {k: 0.0 for k, v in config.items() if "drop" in k and isinstance(v, float)}
    changes |= {key: False for key in ("apply_spec_augment",) if key in config}
    model = zoo.build(name, seed=seed, num_labels=1 if kind == "regression" else CLASSES, **changes)
    if kind == "multi-label":
        model.config.problem_type = "multi_label_classification"
    return model


def random_rows(random: np.random.Generator, name: str, model: Any, kind: str) -> Dataset:
    """Draw examples and labels; no mini-batch has ignored labels only."""
    count = BATCH * STEPS
    padding = "left" if name.startswith("GPT2") else "right"
    inputs = zoo.batch(name, model, b=count, seed=int(random.integers(1000)), padding=padding)
    labels: Any = random.integers(0, CLASSES, count)
    if kind == "ignored":
        labels[random.permutation(count)[: BATCH - 1]] = -100
    elif kind == "multi-label":
        labels = random.integers(0, 2, (count, CLASSES)).astype(np.float32)
    elif kind == "regression":
        labels = random.normal(size=count).astype(np.float32)
    columns = {k: v.tolist() for k, v in inputs.items()}
    return Dataset.from_dict({**columns, "labels": labels.tolist()}).with_format("torch")


def random_method(random: np.random.Generator) -> Mixing:
    """Draw a method and its settings."""
    kind: Any = METHODS[int(random.integers(len(METHODS)))]
    alpha = float(10 ** random.uniform(-2, 1))
    if kind is ERM:
        return ERM()
    if kind is ZetaMixup:
        return ZetaMixup(gamma=float(random.uniform(0.5, 4)))
    if kind is RecursiveMix:
        return RecursiveMix(
            max_area=float(random.uniform(0.1, 1)), consistency_weight=float(random.choice([0.0, 0.1, 0.5]))
        )
    if not issubclass(kind, MultiMix):
        more = {TransMix: {"attention_share": float(random.choice([0.0, 0.5, 1.0]))}}
        more[AlignMixup] = {"unaligned_prob": float(random.choice([0.0, 0.5])), "eps": float(random.choice([0.1, 1.0]))}
        more[RegMixup] = {"mixup_weight": float(random.choice([0.5, 1.0]))}
        return kind(alpha=alpha, **more.get(kind, {}))
    settings: dict[str, Any] = {"num_mixed": int(random.integers(1, 30)), "input_mixing_start": 0.0}
    settings["input_mixing"] = str(random.choice(["none", "none", "mixup", "cutmix"]))
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


# ---- What is random in a step ----


@contextlib.contextmanager
def recorded(steps: list[Step]) -> Iterator[None]:
    """Record the steps of a training."""
    mix, sample = wrapping_step._mix, MultiMix.sample

    def recorded_mix(*args: Any, **kwargs: Any) -> Any:
        steps.append(Step())
        result = mix(*args, **kwargs)
        steps[-1].method = result[0]
        return result

    def recording(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            drawn = function(*args, **kwargs)
            steps[-1].draws.setdefault(name, []).append(drawn)
            return drawn

        return call

    modules = [module for name, module in sys.modules.items() if name.startswith("mm_hf.methods.")]
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(wrapping_step, "_mix", recorded_mix))
        stack.enter_context(mock.patch.object(MultiMix, "sample", recording("sample", sample)))
        for name in DRAWS:
            for module in modules:
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, recording(name, getattr(module, name))))
        yield


def keeping(
    collator: Callable[[Any], Any], batches: list[dict[str, Any]], dtype: torch.dtype
) -> Callable[[Any], dict[str, Any]]:
    """Return a collator that converts the mini-batches to a type and keeps copies."""

    def collate(rows: Any) -> dict[str, Any]:
        batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in collator(rows).items()}
        batches.append({k: v.clone() for k, v in batch.items()})
        return batch

    return collate
