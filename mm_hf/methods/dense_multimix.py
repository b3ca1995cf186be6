"""Dense MultiMix: MultiMix at every patch or token, with the labels of the examples weighted by attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..distributed import GlobalBatch
from ..functional.cost import operations_of_locations
from ..functional.inputs import LossOptions
from ..locations import LocationOutput
from .base import Mixing, Requirements
from .cutmix import can_cut
from .input_mixing import INPUT_METHODS
from .multimix import DEFAULTS, PAPER, MultiMix
from .settings import setting
from .terms import Examples, Term, mean_entropy


@dataclass
class DenseMultiMix(MultiMix):
    """Dense MultiMix: the mini-batch is mixed at every location, and the loss is applied at every location.

    The loss is `clean_weight` times the cross-entropy of the clean examples, plus `pooled_weight` times MultiMix of the
    pooled features, plus `dense_weight` times Dense MultiMix of the features of the locations. The clean term trains
    the CLS token, which a ViT is evaluated by and which losses of the patches do not train. After three epochs, the
    mixed terms have a smaller weight while the model underfits, see `min_fit` of [`MultiMix`].

    Args:
        dense_weight: Weight of the loss of the locations.
        attention: Weight of an example's label at a location: "cls" (attention of the CLS token in the last block),
            "mean" (mean attention of all tokens, for heads that read no single one), "gap" (agreement with the mean
            feature), "cam" (logit of the label at the location), "uniform", or "auto": "cls" if the head reads a single
            token, else "gap"; "uniform" if every location has its own label (token classification, segmentation).
        detach_attention: Treat the attention as a constant.
        confidence_weighted: Weight a mixed example by the total attention of its examples at the location.

    The other arguments are those of [`MultiMix`]. `pooled_weight` is 0 by default. By default, some mini-batches of
    images, videos and audio with one label per example get CutMix instead (mixup, if they cannot be cut): none in the
    first three epochs, then a share of (1 - 3 / epoch) / 2.

    Source: Venkataramanan et al., NeurIPS 2023, section 3.3. Weights, defaults and the CLS attention of transformers
        are our choices.

    Example:
        >>> DenseMultiMix(alpha=1.0, attention="uniform").to_dict()["attention"]
        'uniform'
        >>> DenseMultiMix.from_dict(DenseMultiMix().to_dict()) == DenseMultiMix()
        True
    """

    name: ClassVar[str] = "dense_multimix"
    defaults: ClassVar[dict[str, Any]] = {**DEFAULTS, "pooled_weight": 0.0, "dense_weight": 1.0}
    # The pooled loss trains the CLS token of a ViT, which the dense loss does not.
    presets: ClassVar[dict[str, dict[str, Any]]] = {"paper": {**PAPER, "dense_weight": 1.0}}

    dense_weight: float = setting(
        None, "Weight of the loss of mixed features at every location. Default: 1.", within="[0, inf)"
    )
    attention: Literal["auto", "cls", "mean", "gap", "cam", "uniform"] = setting(
        "auto", "Weight of labels at a location."
    )
    detach_attention: bool = setting(True, "Treat the attention as a constant.")
    confidence_weighted: bool = setting(
        True, "Weight a mixed example by the total attention of its examples at the location."
    )

    def _validate(self) -> None:
        super()._validate()
        if self.class_weights is not None and not self.confidence_weighted:
            raise ValueError(
                "class_weights are a part of the confidence of the examples: confidence_weighted must be True, got "
                "False."
            )

    @property
    def requirements(self) -> Requirements:
        return replace(
            super().requirements,
            attention=self.attention if self.dense_weight else None,
            token_logits=bool(self.dense_weight),
            dense_labels=not self.pooled_weight and self.input_mixing in (None, "none"),
            detach_attention=self.detach_attention,
        )

    def _mixed_locations(self, num_locations: int) -> int:
        return super()._mixed_locations(num_locations) + (num_locations if self.dense_weight else 0)

    def operations_of_locations(
        self, num_examples: int, num_locations: int, num_classes: int, head_operations: float, device: torch.device
    ) -> float:
        if not self.dense_weight:
            return 0.0
        return operations_of_locations(
            num_examples, num_locations, num_classes, head_operations=head_operations, ranks=self.ranks, device=device
        )

    def default_input_methods(self, inputs: Mapping[str, Any]) -> tuple[Mixing, ...]:
        """Return the methods of `input_mixing=None`: CutMix, or mixup for inputs that cannot be cut."""
        return INPUT_METHODS["cutmix" if can_cut(inputs) else "mixup"]

    def _terms(
        self, output: LocationOutput, labels: Tensor, batch: GlobalBatch | None, options: LossOptions
    ) -> dict[str, Term]:
        terms = super()._terms(output, labels, batch, options)
        if self.dense_weight:
            assert output.token_logits is not None and output.attention is not None
            confidence = output.attention
            if output.labels is not None:  # one label per location
                labels = output.labels
                if output.mask is not None:
                    # Attention sums to 1 over the locations of an example, which share its one label. With one label
                    # per location, the weight of a location must not depend on the length of the text.
                    confidence = confidence * output.mask.sum(dim=1, keepdim=True)
            options = replace(options, confidence_weighted=self.confidence_weighted)
            examples = Examples(output.token_logits, labels, confidence)
            terms["dense"] = term = self._mixed_term(examples, batch, options, permute=True)
            term.logs["attention_entropy"] = mean_entropy(output.attention.detach())
        return terms
