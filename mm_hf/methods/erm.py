"""Empirical risk minimisation: plain training, the baseline of every comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..functional import Criterion, clean_loss
from ..locations import LocationOutput
from .base import Mixing, MixingLoss


@dataclass
class ERM(Mixing):
    """No mixing. Under `MultiMixTrainer`, exactly what `Trainer` does.

    Example:
        >>> ERM().to_dict()
        {'method': 'erm'}
    """

    name: ClassVar[str] = "erm"

    @property
    def takes_dense_labels(self) -> bool:
        return True

    def loss(
        self,
        output: LocationOutput,
        labels: Tensor,
        *,
        label_smoothing: float = 0.0,
        criterion: Criterion = "cross_entropy",
    ) -> MixingLoss:
        """The loss of the clean logits."""
        return MixingLoss(clean_loss(output.logits, labels, label_smoothing=label_smoothing, criterion=criterion))
