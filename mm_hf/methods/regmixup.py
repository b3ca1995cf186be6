"""RegMixup: mixup as a regularizer of the loss of clean examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..functional import Criterion, clean_loss
from ..locations import LocationOutput
from .base import MixingLoss
from .mixup import Mixup, embed_ids
from .pairs import targets_of
from .settings import setting


@dataclass
class RegMixup(Mixup):
    """RegMixup: the cross-entropy of the clean examples plus that of the mini-batch after mixup.

    The loss is CE(clean) + `mixup_weight` * CE(mixed). The forward runs on twice as many examples, the clean ones and
    the mixed ones, and takes twice the time and memory. In training mode, the logits of the model's output have these
    2 b rows. A model with batch normalization normalizes both halves together, as in the authors' code.

    Args:
        alpha: Parameter of the symmetric Beta distribution of the factor. The large default mixes most mini-batches
            nearly half and half.
        mixup_weight: Weight of the cross-entropy of the mixed examples (eta in the paper).

    Raises:
        ValueError: A setting is out of range; or, at the first mini-batch, no input can be mixed.

    Source:
        Pinto et al., "RegMixup: Mixup as a Regularizer Can Surprisingly Improve Accuracy and Out Distribution
        Robustness", NeurIPS 2022 (arXiv:2206.14502), and for alpha https://github.com/FrancescoPinto/RegMixup. The code
        takes the mean over the 2 b examples, which is half of the paper's sum.

    Example:
        >>> RegMixup(alpha=10).to_dict()
        {'method': 'regmixup', 'alpha': 10, 'mixup_weight': 1.0}
    """

    name: ClassVar[str] = "regmixup"

    alpha: float = setting(20.0, "Parameter of the Beta distribution of the factor.", within="(0, inf)")
    mixup_weight: float = setting(1.0, "Weight of the cross-entropy of the mixed examples.", within="[0, inf)")

    def mix_inputs(
        self, inputs: dict[str, Any], labels: Tensor, model: nn.Module, criterion: Criterion = "cross_entropy"
    ) -> tuple[dict[str, Any], Tensor]:
        """Return the clean examples followed by the mixed ones."""
        mixed, targets = super().mix_inputs(inputs, labels, model, criterion)
        clean = embed_ids(inputs, model)
        both = {
            name: torch.cat([value, mixed[name]])
            for name, value in clean.items()
            if isinstance(value, Tensor) and value.ndim and len(value) == len(labels)
        }
        return {**inputs, **both}, torch.cat([targets_of(labels, model, criterion), targets])

    def loss(
        self,
        output: LocationOutput,
        labels: Tensor,
        *,
        label_smoothing: float = 0.0,
        criterion: Criterion = "cross_entropy",
    ) -> MixingLoss:
        """Return the weighted sum of the losses of the two halves."""
        halves = zip(output.logits.chunk(2), labels.chunk(2), strict=True)
        clean, mixed = (
            clean_loss(logits, targets, label_smoothing=label_smoothing, criterion=criterion)
            for logits, targets in halves
        )
        terms = {"loss_clean": clean.detach(), "loss_mixup": mixed.detach()}
        return MixingLoss(clean + self.mixup_weight * mixed, {**terms, "loss_terms": len(labels)})
