"""Candidates for the default that are not part of mm_hf, for `python -m benchmarks.evidence search`."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from mm_hf import DenseMultiMix, Mixing
from mm_hf.functional import clean_loss
from mm_hf.locations import LocationOutput
from mm_hf.methods.base import MixingLoss
from mm_hf.methods.fit import START
from mm_hf.methods.input_mixing import INPUT_METHODS, draw_input_method, is_mixable, rising_share


@dataclass
class Fitted(DenseMultiMix):
    """Dense MultiMix that mixes as much as the clean examples are fitted.

    With L the cross-entropy of clean examples, the share of mini-batches with input mixing is proportional to
    min(1, slope * max(0, 1 - L / tau)), where L is a running mean. Reading it waits for the device.

    Args:
        tau: Cross-entropy below which examples are mixed, in nats.
        relative: `tau` is a share of the entropy log(c) of c classes instead.
        slope: Slope of the share below tau: it is min(1, slope * (1 - L / tau)).
        decay: Weight of earlier mini-batches in the running mean.
        gate: The loss of mixed examples is multiplied by min(1, slope * (1 - L / tau)), too, with L of the mini-batch.
        ratchet: The share never falls, and is the factor of the loss of mixed examples, too.
    """

    name: ClassVar[str] = "fitted"
    defaults: ClassVar[dict[str, Any]] = {**DenseMultiMix.defaults, "min_fit": 0.0}

    tau: float = 1.0
    relative: bool = False
    slope: float = 1.0
    decay: float = 0.9
    gate: bool = False
    ratchet: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._fit: dict[str, float] = {}  # shared with copies

    def for_batch(self, inputs: Mapping[str, Any], labels: Tensor, **context: Any) -> Mixing:
        """Return this method, or the input-space method that this mini-batch gets instead."""
        share = self._fit.get("share", 0.0) * self.input_mixing_prob if is_mixable(inputs, labels) else 0.0
        return draw_input_method(INPUT_METHODS[self.input_mixing or "cutmix"], share) or self

    def loss(self, output: LocationOutput, labels: Tensor, **options: Any) -> MixingLoss:
        """Return the loss, and update the running mean."""
        found = super().loss(output, labels, **options)
        tau = self.tau * (math.log(output.logits.shape[1]) if self.relative else 1.0)
        earlier = self._fit.get("share", 0.0)
        if self.gate:
            clean = clean_loss(output.logits, labels, **options)
            weight = earlier if self.ratchet else (self.slope * (1 - clean.detach() / tau)).clamp(0, 1)
            found.loss = clean + weight * (found.loss - clean)
        new = float(found.logs["loss_clean"])
        mean = self.decay * self._fit.get("loss", new) + (1 - self.decay) * new
        share = min(1.0, self.slope * max(0.0, 1 - mean / tau))
        self._fit.update(loss=mean, share=max(earlier, share) if self.ratchet else share)
        return found


@dataclass
class Linear(DenseMultiMix):
    """Dense MultiMix whose share of input mixing rises to 1 as the cross-entropy of clean examples falls to 0.

    The weight of the loss of mixed examples is that of the default.
    """

    name: ClassVar[str] = "linear"
    defaults: ClassVar[dict[str, Any]] = {**DenseMultiMix.defaults, "input_mixing_prob": 1.0}

    def for_batch(self, inputs: Mapping[str, Any], labels: Tensor, *, epoch: float | None = None, **context: Any):
        """Return this method, or the input-space method that this mini-batch gets instead."""
        epoch = epoch or 0.0
        earlier = self._misfit.read()
        prob = self.input_mixing_prob * rising_share(epoch, self.input_mixing_start)
        method = self
        if epoch >= START:
            method = copy.copy(self)
            method._follows_fit = True
            if earlier is not None:
                prob *= min(1.0, max(0.0, 1 + earlier / math.log(self.min_fit)))
        prob = prob if is_mixable(inputs, labels) else 0.0
        return draw_input_method(self.default_input_methods(inputs), prob) or method
