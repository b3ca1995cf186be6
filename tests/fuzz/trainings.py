"""Target of the fuzzer: random settings of all methods, trained three steps beside a literal training.

The literal training has a copy of the model without `mm_hf`, and repeats what is random in each step: factors, partners
and regions. It mixes inputs, hidden states and labels, and computes losses one mixed example at a time.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F

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
    extract,
)
from mm_hf.functional.factors import SparseFactors
from mm_hf.locations import find_blocks
from mm_hf.wrapping import step as wrapping_step
from tests.functional import literal
from tests.helpers import zoo
from tests.helpers.digits import arguments

BATCH, STEPS, CLASSES, RATE = 6, 3, 4, 0.1
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


@dataclass
class Step:
    """The method of a mini-batch, and what was drawn in the order of the calls."""

    method: Any = None
    draws: dict[str, list[Any]] = field(default_factory=dict)

    def last(self, name: str) -> Any:
        return self.draws[name][-1]


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


# ---- The literal training ----


class Literal:
    """A training without `mm_hf`'s wrapping and losses."""

    def __init__(self, model: Any, mixing: Mixing, criterion: str):
        self.model, self.mixing, self.criterion = model, mixing, criterion
        self.memory: dict[str, Tensor] = {}
        self.blocks: Any = None

    def train_step(self, step: Step, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
        """Return the loss of a mini-batch, and change the weights."""
        if self.blocks is None and isinstance(self.mixing, (ManifoldMixup, AlignMixup)):
            self.blocks = find_blocks(self.model, inputs)
        loss = self.loss(step, inputs, labels)
        self.model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter -= RATE * parameter.grad
        return loss.detach()

    def loss(self, step: Step, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
        method, targets = step.method, self.targets(labels)
        if isinstance(method, MultiMix):
            return self.multimix(step, inputs, labels)
        if isinstance(method, RegMixup):
            mixed, mixed_targets = self.interpolated(step, inputs, targets)
            clean = dict(inputs)
            if "inputs_embeds" in mixed:
                clean["inputs_embeds"] = self.model.get_input_embeddings()(clean.pop("input_ids"))
            logits = self.model(**{k: torch.cat([clean[k], mixed[k]]) for k in mixed}).logits
            b = len(labels)
            return self.plain(logits[:b], targets) + method.mixup_weight * self.plain(logits[b:], mixed_targets)
        if isinstance(method, (Mixup, ZetaMixup)):
            inputs, targets = self.interpolated(step, inputs, targets)
        elif isinstance(method, RecursiveMix):
            return self.recursive(step, inputs, targets)
        elif isinstance(method, TransMix):
            inputs, _, share = self.pasted(step, inputs, targets)
            output = extract(self.model, "cls", **inputs)
            partner, inside = step.last("draw_partners"), self.patches(step, output.attention.shape[1])
            weight = (1 - method.attention_share) * share + method.attention_share * (output.attention * inside).sum(1)
            weight = weight[:, None].to(targets.dtype)
            return self.plain(output.logits, (1 - weight) * targets + weight * targets[partner])
        elif isinstance(method, CutMix):
            inputs, targets, _ = self.pasted(step, inputs, targets)
        elif method.block_mixing is not None:
            return self.mixed_in_a_block(step, inputs, targets)
        return self.plain(self.model(**inputs).logits, targets)

    def targets(self, labels: Tensor) -> Tensor:
        """Return targets (b, c): rows of zeros for ignored examples."""
        if self.criterion != "cross_entropy":
            return labels[:, None] if labels.ndim == 1 else labels
        rows = F.one_hot(labels.clamp(min=0), CLASSES) * (labels != -100)[:, None]
        return rows.to(next(self.model.parameters()).dtype)

    def plain(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of examples; with class probabilities, a mean that is weighted by their sums."""
        if self.criterion == "mse":
            return (logits - targets).square().mean()
        if self.criterion == "binary_cross_entropy":
            return F.binary_cross_entropy_with_logits(logits, targets)
        return -(targets * logits.log_softmax(-1)).sum() / targets.sum().clamp(min=1e-7)

    def interpolated(self, step: Step, inputs: dict[str, Tensor], targets: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Mix floating-point inputs, embeddings and targets by a matrix of weights, a row for each mixed example."""
        b = len(targets)
        if isinstance(step.method, ZetaMixup):
            weights = step.last("zeta_weights").to(targets.dtype)
            together = torch.ones(b, b)
        else:
            own, other = torch.eye(b), torch.eye(b)[step.last("draw_partners")]
            factor = step.last("draw_factor")
            weights, together = (factor * own + (1 - factor) * other).to(targets.dtype), own + other
        mixed = dict(inputs)
        if "input_ids" in mixed:
            mixed["inputs_embeds"] = self.model.get_input_embeddings()(mixed.pop("input_ids"))
        for name, x in mixed.items():
            if name == "attention_mask":
                mixed[name] = ((together @ x.float()) > 0).to(x.dtype)
            elif x.is_floating_point():
                mixed[name] = torch.einsum("ki,i...->k...", weights, x)
        return mixed, (weights.float() @ targets.float()).to(targets.dtype)  # targets are float32 in all trainings

    def pasted(
        self, step: Step, inputs: dict[str, Tensor], targets: Tensor
    ) -> tuple[dict[str, Tensor], Tensor, Tensor | float]:
        """Paste a region of each example's partner, element by element."""
        partner, spans = step.last("draw_partners"), step.last("draw_spans")
        (name,) = (k for k, x in inputs.items() if x.is_floating_point())
        x, mask = inputs[name], inputs.get("attention_mask")
        region = torch.zeros(x.shape[-len(spans) :], dtype=torch.bool)
        region[tuple(slice(*span) for span in spans)] = True
        share: Tensor | float = float(region.float().mean())
        if mask is not None:
            region = region & (mask > 0) & (mask[partner] > 0)
            share = (region.sum(dim=1) / mask.sum(dim=1))[:, None].to(targets.dtype)
        mixed = torch.where(region, x[partner], x)
        return {**inputs, name: mixed}, (1 - share) * targets + share * targets[partner], share

    def patches(self, step: Step, num_patches: int) -> Tensor:
        """Return 1 for each patch of a square image whose first pixel is in the region."""
        (top, bottom), (left, right) = step.last("draw_spans")
        side = round(num_patches**0.5)
        pixels = 32 // side
        rows, columns = torch.arange(num_patches) // side * pixels, torch.arange(num_patches) % side * pixels
        return ((rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)).float()

    def recursive(self, step: Step, inputs: dict[str, Tensor], targets: Tensor) -> Tensor:
        images, share, method = inputs["pixel_values"], 0.0, step.method
        if self.memory:
            top, bottom, left, right = step.last("draw_box")
            height, width = bottom - top, right - left
            share = height * width / images[0, 0].numel()
            if share:
                images = images.clone()
                images[..., top:bottom, left:right] = F.interpolate(self.memory["images"], (height, width))
            targets = (1 - share) * targets + share * self.memory["targets"]
        output = extract(self.model, "uniform", pixel_values=images) if method.consistency_weight else None
        logits = self.model(pixel_values=images).logits if output is None else output.logits
        loss = self.plain(logits, targets)
        if output is not None and share:
            inside = torch.zeros(images.shape[-2:])
            inside[top:bottom, left:right] = 1
            side = round(output.token_logits.shape[1] ** 0.5)
            size = images.shape[-1] // side
            weights = inside.view(side, size, side, size).sum(dim=(1, 3)).flatten()
            region = torch.einsum("r,brc->bc", (weights / weights.sum()).to(logits.dtype), output.token_logits)
            loss = loss + method.consistency_weight * share * self.divergence(region, self.memory["logits"])
        self.memory = {"images": images.detach(), "targets": targets.detach(), "logits": logits.detach()}
        return loss

    def divergence(self, logits: Tensor, previous: Tensor) -> Tensor:
        if self.criterion == "mse":
            return (logits - previous).square().mean()
        if self.criterion == "cross_entropy":
            p, q = previous.log_softmax(-1), logits.log_softmax(-1)
            return (p.exp() * (p - q)).sum(-1).mean()
        terms = [(F.logsigmoid(s * previous), F.logsigmoid(s * logits)) for s in (1, -1)]
        return sum((p.exp() * (p - q)).mean() for p, q in terms)

    def mixed_in_a_block(self, step: Step, inputs: dict[str, Tensor], targets: Tensor) -> Tensor:
        """Mix the input of one block, and the labels."""
        mixing, method = step.method.block_mixing, step.method
        partner, factor = step.last("draw_partners"), step.last("draw_factor")
        block, calls = min(int(mixing.depth * self.blocks.calls), self.blocks.calls - 1), iter(range(1000))

        def mix(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if next(calls) != block:
                return None
            hidden = args[0] if args else kwargs["hidden_states"]
            if isinstance(method, AlignMixup):
                mixed = mixing(hidden)
            else:
                mixed = factor * hidden + (1 - factor) * hidden[partner]
            return ((mixed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": mixed})

        if "attention_mask" in inputs and not isinstance(method, AlignMixup):
            mask = inputs["attention_mask"]
            inputs = {**inputs, "attention_mask": torch.maximum(mask, mask[partner])}
        modules = [self.model.get_submodule(name) for name in self.blocks.names]
        handles = [module.register_forward_pre_hook(mix, with_kwargs=True) for module in modules]
        try:
            logits = self.model(**inputs).logits
        finally:
            for handle in handles:
                handle.remove()
        return self.plain(logits, factor * targets + (1 - factor) * targets[partner])

    def multimix(self, step: Step, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
        mixing, criterion = step.method, self.criterion
        dense = isinstance(mixing, DenseMultiMix) and mixing.dense_weight > 0
        if dense:
            labels_of_cam = {"labels": labels} if mixing.attention == "cam" else {}
            output = extract(self.model, mixing.attention, **inputs, **labels_of_cam)
            logits = output.logits
        else:
            logits = self.model(**inputs).logits
        targets, samples = self.targets(labels).double(), iter(step.draws["sample"])
        total = mixing.clean_weight * self.plain(logits, targets.to(logits.dtype)) if mixing.clean_weight else 0.0
        if mixing.pooled_weight:
            ones = torch.ones(len(labels), 1, dtype=torch.float64)
            factors = _dense(next(samples))[None]
            pooled = literal.dense_multimix(logits[:, None].double(), targets, ones, factors, 0.0, False, criterion)
            total = total + mixing.pooled_weight * pooled
        if dense:
            factors = _dense(next(samples))
            matrix = torch.stack([factors[row] for row in step.last("sample_permutations")])
            term = literal.dense_multimix(
                output.token_logits.double(), targets, output.attention.detach().double(), matrix, 0.0,
                mixing.confidence_weighted, criterion,
            )  # fmt: skip
            total = total + mixing.dense_weight * term
        return total


def _dense(factors: Tensor | SparseFactors) -> Tensor:
    return (factors.dense() if isinstance(factors, SparseFactors) else factors).double()
