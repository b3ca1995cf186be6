"""AlignMixup: pairs of examples, mixed in the features of the last block after aligning their locations."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..distributed import rank_generator
from ..functional import Criterion
from ..functional.transport import assignment
from ..locations import BlockMixing
from ..locations.pools import MASKS
from .base import Mixing, Requirements
from .input_mixing import draw_input_method
from .mixup import Mixup
from .pairs import PairMixing, draw_factor, draw_partners, targets_of
from .settings import setting

LAST = 1 - 2**-20  # depth of the last block


@dataclass
class AlignMixup(PairMixing):
    """AlignMixup: features of two examples are aligned by optimal transport and interpolated; labels likewise.

    The input of the model's last block (layer, stage) is mixed. Each location of an example (token, or place of a
    feature map) is interpolated with a weighted mean of the partner's locations: those that the transport plan between
    the two examples assigns to it (`mm_hf.functional.transport.assignment`). An example so keeps the places of its own
    features, and its attention mask, and gets the contents of the partner's. The plan is a constant. All tokens are
    aligned, also a CLS token, which is most similar to that of the partner. One factor and one permutation are drawn
    per mini-batch. Mini-batches get input mixup without alignment with the probability `unaligned_prob`.

    Compared with the authors' code:

    - They mix the output of the last stage. There, alignment changes nothing if the head averages the locations,
      because the transport plan keeps this mean, and does not reach the head if it reads a CLS token. Here, the last
      block runs on the mixed features.
    - They align either example with the other one, at random. Over the draws of factors and partners, this is the same.
    - Their cost is the squared distance; here it is relative to its mean, so that `eps` suits models of any scale, and
      the number of iterations is fixed.
    - The autoencoder of the paper, which decodes mixed features into images, is left out.

    Args:
        alpha: Parameter of the symmetric Beta distribution of the factor.
        unaligned_prob: Share of the mini-batches that get `Mixup(alpha)` instead.
        eps: Weight of the entropy of the transport plan. A larger one aligns less sharply.

    Raises:
        ValueError: A setting is out of range; the model skips blocks at random in training (layerdrop); or its
            attention mask does not fit the input of the last block.
        LocationError: (at the first mini-batch) the logits do not depend on the input only through one stack of blocks.

    Source:
        Venkataramanan et al., "AlignMixup: Improving Representations By Interpolating Aligned Features", CVPR 2022
        (arXiv:2103.15375), and for the settings https://github.com/shashankvkt/AlignMixup_CVPR22. The input of the last
        block and the relative cost are our choices.

    Example:
        >>> AlignMixup().to_dict()
        {'method': 'align_mixup', 'alpha': 2.0, 'unaligned_prob': 0.5, 'eps': 0.1}
    """

    name: ClassVar[str] = "align_mixup"

    alpha: float = setting(2.0, "Parameter of the Beta distribution of the factor.", within="(0, inf)")
    unaligned_prob: float = setting(0.5, "Share of the mini-batches that get input mixup.", within="[0, 1]")
    eps: float = setting(0.1, "Weight of the entropy of the transport plan.", within="(0, inf)")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._mixing: AlignedBlockMixing | None = None

    @property
    def requirements(self) -> Requirements:
        return Requirements(blocks=True, embeddings=self.unaligned_prob > 0)

    @property
    def block_mixing(self) -> BlockMixing | None:
        return self._mixing

    def check_inputs(self, inputs: Mapping[str, Any], model: nn.Module) -> None:
        if self.unaligned_prob:
            Mixup(self.alpha).check_inputs(inputs, model)

    def for_batch(
        self, inputs: Mapping[str, Any], labels: Tensor, *, epoch: float | None = None, same_on_all_ranks: bool = False
    ) -> Mixing:
        """Return input mixup, or a copy, which keeps how this mini-batch is mixed."""
        unaligned = draw_input_method([Mixup(self.alpha)], self.unaligned_prob, same_on_all_ranks)
        return unaligned or copy.copy(self)

    def mix_inputs(
        self, inputs: dict[str, Any], labels: Tensor, model: nn.Module, criterion: Criterion = "cross_entropy"
    ) -> tuple[dict[str, Any], Tensor]:
        """Draw partners and factor, and mix the labels. The forward mixes the features."""
        generator = rank_generator("cpu")
        factor = draw_factor(self.alpha, generator)
        partner = draw_partners(len(labels), generator, labels.device)
        share = torch.tensor(1 - factor, device=labels.device)
        masks = [inputs[name] for name in MASKS if isinstance(inputs.get(name), Tensor)]
        self._mixing = AlignedBlockMixing(LAST, partner, share, masks[0] if masks else None, self.eps)
        targets = targets_of(labels, model, criterion)
        return inputs, targets.lerp(targets[partner], 1 - factor)


@dataclass
class AlignedBlockMixing(BlockMixing):
    """Mixing of one mini-batch with aligned partners.

    Attributes:
        mask: Attention mask of the examples, or None.
        eps: Weight of the entropy of the transport plan.
    """

    mask: Tensor | None
    eps: float

    def __call__(self, hidden: Tensor) -> Tensor:
        """Mix hidden states (b, locations, d) or feature maps (b, d, ...)."""
        tokens = hidden if hidden.ndim == 3 else hidden.flatten(2).mT
        mask = self.mask
        if mask is not None and mask.shape != tokens.shape[:2]:
            raise ValueError(
                f"AlignMixup aligns the {tokens.shape[1]} tokens at the last block, and the mask of shape "
                f"{tuple(mask.shape)} does not mark the valid ones among them: use ManifoldMixup."
            )
        masks = {} if mask is None else {"mask": mask, "other_mask": mask[self.partner]}
        others = tokens[self.partner]
        with torch.autocast(hidden.device.type, enabled=False):
            aligned = assignment(tokens.detach(), others.detach(), eps=self.eps, **masks) @ others
        kept = (self.partner == torch.arange(len(tokens), device=tokens.device))[:, None]  # mixed with itself
        if mask is not None:
            kept = kept | (mask == 0)
        aligned = torch.where(kept[..., None], tokens, aligned)
        mixed = tokens + self.share.to(hidden.device) * (aligned - tokens)
        return mixed if hidden.ndim == 3 else mixed.mT.reshape(hidden.shape)
