"""Zeta-mixup: all examples of the mini-batch, mixed in input space with weights that fall as a power of their order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..distributed import rank_generator
from ..functional import Criterion
from ..locations.embeddings import text_mask
from ..locations.pools import MASKS
from .mixup import InputInterpolation, embed_ids, real_inputs
from .pairs import targets_of
from .settings import setting


@dataclass
class ZetaMixup(InputInterpolation):
    """Zeta-mixup: each example is mixed with all others of the mini-batch, by weights i^-gamma of a random order.

    In the order of each mixed example, its own example is the first and the others follow at random. Their weights are
    i^-gamma, i = 1, 2, ..., divided by their sum. Inputs and labels are mixed by the same weights. With gamma > 1.73,
    the first weight is greater than the sum of all others, in mini-batches of every size.

    It mixes the same inputs as `Mixup`: floating-point inputs, and texts by their embeddings. The attention mask of a
    mixed text is the union of all masks.

    Args:
        gamma: Exponent of the weights. A larger one mixes less.

    Raises:
        ValueError: `gamma` is not positive; or, at the first mini-batch, no input can be mixed.

    Source:
        Abhishek et al., "Multi-Sample ζ-mixup: Richer, More Realistic Synthetic Samples from a p-Series Interpolant",
        Journal of Big Data 2024 (arXiv:2204.03323), and for gamma https://github.com/kakumarabhishek/zeta-mixup. The
        authors draw the order of the others as a rotated permutation, which has the same distribution.

    Example:
        >>> ZetaMixup().to_dict()
        {'method': 'zeta_mixup', 'gamma': 2.8}
    """

    name: ClassVar[str] = "zeta_mixup"

    gamma: float = setting(2.8, "Exponent of the weights; a larger one mixes less.", within="(0, inf)")

    def mix_inputs(
        self, inputs: dict[str, Any], labels: Tensor, model: nn.Module, criterion: Criterion = "cross_entropy"
    ) -> tuple[dict[str, Any], Tensor]:
        """Mix every floating-point input, the embeddings of token ids, and the labels.

        Texts have `inputs_embeds` and the `input_ids` of the longest one in the result, as those of `Mixup`.
        """
        inputs = embed_ids(inputs, model)
        if inputs.get("input_ids") is not None:
            ids = inputs["input_ids"]
            longest = text_mask(inputs, model).sum(dim=1).argmax()
            inputs["input_ids"] = ids.index_select(0, longest[None]).expand_as(ids)
        weights = zeta_weights(len(labels), self.gamma, rank_generator("cpu")).to(labels.device)
        mixed = {name: mix(inputs[name], weights) for name in real_inputs(inputs, len(labels))}
        for name in MASKS:
            if isinstance(inputs.get(name), Tensor):
                mixed[name] = inputs[name].amax(dim=0, keepdim=True).expand_as(inputs[name])
        return {**inputs, **mixed}, mix(targets_of(labels, model, criterion), weights)


def zeta_weights(num_examples: int, gamma: float, generator: torch.Generator) -> Tensor:
    """Draw weights (b, b), a row for each mixed example; each row sums to 1, and its largest one is on the diagonal.

    Example:
        >>> weights = zeta_weights(3, 1.0, torch.Generator().manual_seed(0))
        >>> weights.sort(dim=1, descending=True).values[0], weights.diagonal()
        (tensor([0.5455, 0.2727, 0.1818]), tensor([0.5455, 0.5455, 0.5455]))
    """
    ordered = torch.arange(1, num_examples + 1, dtype=torch.float64).pow(-gamma)
    scores = torch.rand(num_examples, num_examples, generator=generator, dtype=torch.float64).fill_diagonal_(-1)
    return (ordered / ordered.sum())[scores.argsort(dim=1).argsort(dim=1)].float()


def mix(x: Tensor, weights: Tensor) -> Tensor:
    """Return weighted sums of the examples (b, ...), one for each row of weights, computed in at least float32."""
    with torch.autocast(x.device.type, enabled=False):
        dtype = torch.promote_types(x.dtype, torch.float32)
        return (weights.to(dtype) @ x.to(dtype).flatten(1)).view_as(x).to(x.dtype)
