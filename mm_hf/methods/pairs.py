"""What the methods that mix pairs have in common: the draws, the labels, and the masks of two texts in one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import Criterion, clean_loss, soft_targets
from ..functional.factors import sample_factors
from ..locations import LocationOutput
from ..locations.pools import MASKS
from .base import Mixing, MixingLoss


class PairMixing(Mixing):
    """Base of the methods that mix pairs: the forward sees what is mixed already, and only the labels are left."""

    def loss(
        self,
        output: LocationOutput,
        labels: Tensor,
        *,
        label_smoothing: float = 0.0,
        criterion: Criterion = "cross_entropy",
    ) -> MixingLoss:
        """The loss against the mixed labels."""
        loss = clean_loss(output.logits, labels, label_smoothing=label_smoothing, criterion=criterion)
        return MixingLoss(loss, {f"loss_{self.name}": loss.detach()})


def check_beta(alpha: float) -> None:
    """Refuse a parameter that no Beta distribution has."""
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < float("inf"):
        raise ValueError(f"alpha must be positive, but is {alpha!r}.")


def draw_factor(alpha: float, generator: torch.Generator) -> float:
    """One draw of Beta(alpha, alpha), which is the Dirichlet distribution of two: the share that an example keeps."""
    return float(sample_factors(2, 1, alpha, generator=generator)[0, 0])


def draw_partners(num_examples: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """A random permutation (b,): the example that each is mixed with. It is drawn on the CPU."""
    return torch.randperm(num_examples, generator=generator).to(device)


def targets_of(labels: Tensor, model: nn.Module, criterion: Criterion) -> Tensor:
    """Labels as targets (b, c) that can be interpolated; zeros for examples that take no part."""
    num_labels: int = model.config.num_labels  # type: ignore[union-attr, assignment]
    targets, is_valid = soft_targets(labels, num_labels, criterion=criterion)
    return targets * is_valid[:, None]


def joint_masks(inputs: Mapping[str, Any], partner: Tensor) -> dict[str, Tensor]:
    """The masks among the inputs, each example's joined with its partner's: what either attends to."""
    masks = {name: inputs[name] for name in MASKS if isinstance(inputs.get(name), Tensor)}
    return {name: torch.maximum(mask, mask[partner]) for name, mask in masks.items()}
