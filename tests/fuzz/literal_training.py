"""Literal training of all methods, beside which the fuzzer trains.

It has a copy of the model without `mm_hf`, and repeats what is random in each step: factors, partners and regions. It
mixes inputs, hidden states and labels, and computes losses one mixed example at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mm_hf import (
    AlignMixup,
    CutMix,
    DenseMultiMix,
    ManifoldMixup,
    Mixing,
    Mixup,
    MultiMix,
    RecursiveMix,
    RegMixup,
    TransMix,
    ZetaMixup,
    extract,
)
from mm_hf.functional.factors import SparseFactors
from mm_hf.locations import find_blocks
from tests.functional import literal

CLASSES, RATE = 4, 0.1


@dataclass
class Step:
    """The method of a mini-batch, and what was drawn in the order of the calls."""

    method: Any = None
    draws: dict[str, list[Any]] = field(default_factory=dict)

    def last(self, name: str) -> Any:
        return self.draws[name][-1]


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
