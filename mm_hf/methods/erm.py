"""Empirical risk minimization: plain training, the baseline of every comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..functional import Criterion, clean_loss
from ..locations import LocationOutput
from .base import Mixing, MixingLoss, Requirements


@dataclass
class ERM(Mixing):
    """No mixing: empirical risk minimization. `MultiMixTrainer` then trains as `Trainer` does.

    Example:
        >>> ERM().to_dict()
        {'method': 'erm'}
    """

    name: ClassVar[str] = "erm"

    @property
    def requirements(self) -> Requirements:
        return Requirements(dense_labels=True, min_examples=1)

    def loss(
        self,
        output: LocationOutput,
        labels: Tensor,
        *,
        label_smoothing: float = 0.0,
        criterion: Criterion = "cross_entropy",
    ) -> MixingLoss:
        """Return the loss of the clean logits."""
        return MixingLoss(clean_loss(output.logits, labels, label_smoothing=label_smoothing, criterion=criterion))
