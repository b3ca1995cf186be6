"""Functions shared by the methods that mix pairs: random draws, mixed labels, and joint masks of two texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import Criterion, clean_loss, soft_targets
from ..functional.factors import sample_factors
from ..locations import LocationOutput
from ..locations.pools import MASKS
from ..locations.probe_inputs import num_labels_of
from .base import Mixing, MixingLoss


class PairMixing(Mixing):
    """Base class of the methods that mix examples before or during the forward and give its logits mixed labels."""

    def loss(
        self,
        output: LocationOutput,
        labels: Tensor,
        *,
        label_smoothing: float = 0.0,
        criterion: Criterion = "cross_entropy",
    ) -> MixingLoss:
        """Return the loss of the logits against the mixed labels."""
        loss = clean_loss(output.logits, labels, label_smoothing=label_smoothing, criterion=criterion)
        return MixingLoss(loss, {f"loss_{self.name}": loss.detach()})


def draw_factor(alpha: float, generator: torch.Generator) -> float:
    """Draw from Beta(alpha, alpha), the Dirichlet distribution of two examples: the share that an example keeps."""
    return float(sample_factors(2, 1, alpha, generator=generator)[0, 0])


def draw_partners(num_examples: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Draw the example (b,) that each example is mixed with: a permutation, drawn on the CPU."""
    return torch.randperm(num_examples, generator=generator).to(device)


def targets_of(labels: Tensor, model: nn.Module, criterion: Criterion) -> Tensor:
    """Return labels as targets (b, c) that can be interpolated; zeros for ignored examples."""
    targets, is_valid = soft_targets(labels, num_labels_of(model), criterion=criterion)
    return targets * is_valid[:, None]


def joint_masks(inputs: Mapping[str, Any], partner: Tensor) -> dict[str, Tensor]:
    """Return the masks among the inputs, each the union of an example's mask and its partner's."""
    masks = {name: inputs[name] for name in MASKS if isinstance(inputs.get(name), Tensor)}
    return {name: torch.maximum(mask, mask[partner]) for name, mask in masks.items()}
