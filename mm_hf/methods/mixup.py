"""Mixup: pairs of examples, mixed in input space."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..distributed import rank_generator
from ..functional import Criterion
from ..locations.embeddings import text_mask, token_embeddings
from .base import Requirements
from .pairs import PairMixing, draw_factor, draw_partners, joint_masks, targets_of
from .settings import setting


class InputInterpolation(PairMixing):
    """Base class of the methods that interpolate floating-point inputs, and texts by their embeddings."""

    @property
    def requirements(self) -> Requirements:
        return Requirements(embeddings=True)

    def check_inputs(self, inputs: Mapping[str, Any], model: nn.Module) -> None:
        numbers = [x for x in inputs.values() if isinstance(x, Tensor) and x.is_floating_point() and x.ndim]
        if inputs.get("input_ids") is None and not numbers:
            raise ValueError(
                f"{type(self).__name__} mixes floating-point inputs (pixel_values, input_values) and token ids "
                f"(input_ids), and this batch has only {', '.join(sorted(inputs))}: use MultiMix or DenseMultiMix."
            )


@dataclass
class Mixup(InputInterpolation):
    """Mixup: each example is interpolated with another one of the mini-batch, inputs and labels by the same factor.

    Args:
        alpha: Parameter of the symmetric Beta distribution of the factor, which is drawn once per mini-batch.

    Raises:
        ValueError: `alpha` is not positive; or, at the first mini-batch, no input can be mixed.

    Source:
        Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018.

    Example:
        >>> Mixup(alpha=0.4).to_dict()
        {'method': 'mixup', 'alpha': 0.4}
    """

    name: ClassVar[str] = "mixup"

    alpha: float = setting(1.0, "Parameter of the Beta distribution of the factor.", within="(0, inf)")

    def mix_inputs(
        self, inputs: dict[str, Any], labels: Tensor, model: nn.Module, criterion: Criterion = "cross_entropy"
    ) -> tuple[dict[str, Any], Tensor]:
        """Mix every floating-point input, the embeddings of token ids, and the labels.

        Texts have `inputs_embeds` and the `input_ids` of the longer one of a pair in the result. The wrapped model
        uses the ids only where its head finds the token that it reads by them.
        """
        b = len(labels)
        generator = rank_generator("cpu")
        factor = draw_factor(self.alpha, generator)
        partner = draw_partners(b, generator, labels.device)
        ids = inputs.get("input_ids")
        if ids is not None:
            # The ids of the longer text: by them, some models find the token that their head reads.
            lengths = text_mask(inputs, model).sum(dim=1)
            longer = torch.where((lengths[partner] > lengths)[:, None], ids[partner], ids)
            inputs = {**embed_ids(inputs, model), "input_ids": longer}
        mixed = {k: inputs[k].lerp(inputs[k][partner], 1 - factor) for k in real_inputs(inputs, b)}
        targets = targets_of(labels, model, criterion)
        return {**inputs, **mixed, **joint_masks(inputs, partner)}, targets.lerp(targets[partner], 1 - factor)


def embed_ids(inputs: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return the inputs, with the embeddings of token ids, if there are any, beside these."""
    ids = inputs.get("input_ids")
    return dict(inputs) if ids is None else {**inputs, "inputs_embeds": token_embeddings(model)(ids)}


def real_inputs(inputs: Mapping[str, Any], num_examples: int) -> list[str]:
    """Return the names of inputs that can be mixed as they are: floating-point, one row per example."""
    return [
        name
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim and len(value) == num_examples
    ]
