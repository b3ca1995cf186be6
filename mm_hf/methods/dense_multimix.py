"""Dense MultiMix: MultiMix at every patch or token, labels inherited and weighted by attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..distributed import GlobalBatch
from ..locations import LocationOutput
from ..locations.attention.weights import KINDS
from .base import Requirements
from .multimix import DEFAULTS, PAPER, MultiMix, setting


@dataclass
class DenseMultiMix(MultiMix):
    """Dense MultiMix: the mini-batch is mixed at every location, and the loss is applied at every location.

    The loss is `clean_weight` times the ordinary cross-entropy, plus `pooled_weight` times MultiMix of the pooled
    features, plus `dense_weight` times Dense MultiMix of the locations' features: a ViT is evaluated by its CLS head,
    which the locations alone never train.

    Args:
        dense_weight: Weight of the loss of the locations.
        attention: What weighs a label at a location: "cls" (attention of the CLS token in the last block), "mean" (of all
            tokens, for heads that read no single one), "gap" (agreement with the mean feature), "cam" (the label's own
            logit there), "uniform", or "auto": "cls" where the head reads a single token, else "gap"; "uniform" where
            every location has a label of its own (token classification, segmentation).
        detach_attention: Treat the attention as a constant.
        confidence_weighted: A mixed example counts with the attention it is made of within its location.

    The other arguments are those of [`MultiMix`]. `pooled_weight` is 0 by default. Images, videos and audio with one
    label per example get input mixup in half of the mini-batches after three epochs.

    Source:
        Venkataramanan et al., NeurIPS 2023, section 3.3. Weights and defaults are ours, and so is the use of CLS
        attention for transformers.

    Example:
        >>> DenseMultiMix(alpha=1.0, attention="uniform").to_dict()["attention"]
        'uniform'
        >>> DenseMultiMix.from_dict(DenseMultiMix().to_dict()) == DenseMultiMix()
        True
    """

    name: ClassVar[str] = "dense_multimix"
    defaults: ClassVar[dict[str, Any]] = {**DEFAULTS, "pooled_weight": 0.0, "dense_weight": 1.0}
    # A ViT's head reads its CLS token: the paper's recipe needs the pooled loss beside the dense one to train it.
    presets: ClassVar[dict[str, dict[str, Any]]] = {"paper": {**PAPER, "dense_weight": 1.0}}
    default_input_mixing: ClassVar[str] = "mixup"

    dense_weight: float = setting(None, "Weight of the loss of mixed features at every location. Default: 1.")
    attention: Literal["auto", "cls", "mean", "gap", "cam", "uniform"] = setting(
        "auto", "What weighs an example's label at a location."
    )
    detach_attention: bool = setting(True, "Treat the attention as a constant.")
    confidence_weighted: bool = setting(True, "A mixed example counts with the attention it is made of.")

    def _validate(self) -> None:
        super()._validate()
        if self.attention not in KINDS:
            raise ValueError(f"attention must be one of {', '.join(KINDS)}, got {self.attention!r}.")

    @property
    def requirements(self) -> Requirements:
        return replace(
            super().requirements,
            attention=self.attention if self.dense_weight else None,
            token_logits=bool(self.dense_weight),
            dense_labels=not self.pooled_weight and self.input_mixing in (None, "none"),
            detach_attention=self.detach_attention,
        )

    def _terms(
        self, output: LocationOutput, labels: Tensor, how: dict[str, Any], global_batch: GlobalBatch | None
    ) -> dict[str, tuple[Tensor, dict[str, Any]]]:
        terms = super()._terms(output, labels, how, global_batch)
        if self.dense_weight:
            assert output.token_logits is not None and output.attention is not None
            labels = labels if output.labels is None else output.labels
            how = {**how, "confidence_weighted": self.confidence_weighted}
            loss, logs = self._mixed(output.token_logits, labels, output.attention, how, global_batch, dense=True)
            with torch.no_grad():
                attention = output.attention.detach()
                attention = attention / attention.sum(dim=1, keepdim=True).clamp(min=1e-30)
                entropy = -torch.xlogy(attention, attention).sum(dim=1).mean()
            terms["dense"] = loss, {**logs, "attention_entropy": entropy}
        return terms
