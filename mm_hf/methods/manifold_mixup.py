"""Manifold mixup: pairs of examples, mixed inside of the model."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..distributed import rank_generator
from ..functional import Criterion
from ..locations import BlockMixing
from .pairs import PairMixing, check_beta, draw_factor, draw_partners, joint_masks, targets_of


@dataclass
class ManifoldMixup(PairMixing):
    """Every example's hidden state is interpolated with another one's where a random block begins; labels likewise.

    One block, one factor and one permutation are drawn for each mini-batch. The first block begins with the embeddings:
    what is mixed is what enters one of the model's blocks (layers, stages), all equally likely. They are found by looking
    at one mini-batch, whatever the architecture, and proved: exchanging what enters a block exchanges the logits. Two
    texts of different lengths are attended to as far as the longer one goes, in all blocks.

    Args:
        alpha: Parameter of the symmetric Beta distribution of the factor.

    Raises:
        ValueError: `alpha` is not positive; or the model leaves blocks out at random while it trains (layerdrop).
        LocationError: (at the first mini-batch) no list of blocks was found through which alone the logits come about.

    Source:
        Verma et al., "Manifold Mixup: Better Representations by Interpolating Hidden States", ICML 2019, and for alpha
        https://github.com/vikasverma1077/manifold_mixup. That all blocks are eligible is ours.

    Example:
        >>> ManifoldMixup().to_dict()
        {'method': 'manifold_mixup', 'alpha': 2.0}
    """

    name: ClassVar[str] = "manifold_mixup"

    alpha: float = field(default=2.0, metadata={"help": "Parameter of the Beta distribution of the factor."})

    def __post_init__(self) -> None:
        check_beta(self.alpha)
        self._mixing: BlockMixing | None = None

    @property
    def needs_blocks(self) -> bool:
        return True

    @property
    def block_mixing(self) -> BlockMixing | None:
        return self._mixing

    def choose(self) -> ManifoldMixup:
        """A copy, which remembers how this mini-batch is mixed."""
        return copy.copy(self)

    def mix_inputs(
        self, inputs: dict[str, Any], labels: Tensor, model: nn.Module, criterion: Criterion = "cross_entropy"
    ) -> tuple[dict[str, Any], Tensor]:
        """Draw how the blocks will mix; of the inputs only the masks change."""
        generator = rank_generator("cpu")
        depth = float(torch.rand((), generator=generator))
        factor = draw_factor(self.alpha, generator)
        partner = draw_partners(len(labels), generator, labels.device)
        self._mixing = BlockMixing(depth, partner, torch.tensor(1 - factor, device=labels.device))
        targets = targets_of(labels, model, criterion)
        return {**inputs, **joint_masks(inputs, partner)}, targets.lerp(targets[partner], 1 - factor)
