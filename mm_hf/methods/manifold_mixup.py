"""Manifold mixup: pairs of examples, mixed in the hidden states of the model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..distributed import rank_generator
from ..functional import Criterion
from ..locations import BlockMixing
from .base import Requirements
from .pairs import PairMixing, draw_factor, draw_partners, joint_masks, targets_of
from .settings import setting


@dataclass
class ManifoldMixup(PairMixing):
    """Manifold mixup: the hidden states of each example are interpolated with another example's; labels likewise.

    One block (layer, stage), one factor and one permutation are drawn per mini-batch, all blocks equally likely, and
    the input of that block is mixed. The input of the first block is the embeddings. The blocks are found in one
    forward of any architecture and verified: exchanging the input of a block between examples exchanges their logits.
    The attention mask of two texts is the union of their masks, in all blocks.

    Args:
        alpha: Parameter of the symmetric Beta distribution of the factor.

    Raises:
        ValueError: `alpha` is not positive; or the model skips blocks at random in training (layerdrop).
        LocationError: (at the first mini-batch) the logits do not depend on the input only through one stack of blocks.

    Source:
        Verma et al., "Manifold Mixup: Better Representations by Interpolating Hidden States", ICML 2019, and for alpha
        https://github.com/vikasverma1077/manifold_mixup. That all blocks are eligible is our choice.

    Example:
        >>> ManifoldMixup().to_dict()
        {'method': 'manifold_mixup', 'alpha': 2.0}
    """

    name: ClassVar[str] = "manifold_mixup"

    alpha: float = setting(2.0, "Parameter of the Beta distribution of the factor.", within="(0, inf)")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._mixing: BlockMixing | None = None

    @property
    def requirements(self) -> Requirements:
        return Requirements(blocks=True)

    @property
    def block_mixing(self) -> BlockMixing | None:
        return self._mixing

    def for_batch(self, inputs: Mapping[str, Any], labels: Tensor, **context: Any) -> ManifoldMixup:
        """Return a copy, which keeps how this mini-batch is mixed."""
        return copy.copy(self)

    def mix_inputs(
        self, inputs: dict[str, Any], labels: Tensor, model: nn.Module, criterion: Criterion = "cross_entropy"
    ) -> tuple[dict[str, Any], Tensor]:
        """Draw how a block mixes its input, and mix the masks and the labels."""
        generator = rank_generator("cpu")
        depth = float(torch.rand((), generator=generator))
        factor = draw_factor(self.alpha, generator)
        partner = draw_partners(len(labels), generator, labels.device)
        self._mixing = BlockMixing(depth, partner, torch.tensor(1 - factor, device=labels.device))
        targets = targets_of(labels, model, criterion)
        return {**inputs, **joint_masks(inputs, partner)}, targets.lerp(targets[partner], 1 - factor)
