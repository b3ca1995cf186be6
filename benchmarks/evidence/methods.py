"""Methods and settings that the evidence study compares. The keys are those of the committed CSV files."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from mm_hf import ERM, DenseMultiMix, Mixing, MultiMix, get_method
from mm_hf.methods.base import MixingLoss

BASELINE = "erm"


@dataclass
class LabelSmoothing(Mixing):
    """Training without mixing on smoothed labels: `label_smoothing_factor` of `TrainingArguments` as a method."""

    name: ClassVar[str] = "label_smoothing"

    factor: float = 0.1

    def loss(self, output: Any, labels: Tensor, *, label_smoothing: float = 0.0, **options: Any) -> MixingLoss:
        """Return the cross-entropy with smoothed labels."""
        return ERM().loss(output, labels, label_smoothing=self.factor, **options)


METHODS: dict[str, Callable[[], Mixing]] = {
    BASELINE: ERM,
    "label_smoothing": LabelSmoothing,
    **{
        name: get_method(name)
        for name in ("mixup", "cutmix", "manifold_mixup", "transmix", "multimix", "dense_multimix")
    },
    "dense_multimix_alone": lambda: DenseMultiMix(input_mixing="none"),
    "dense_multimix_and_mixup": lambda: DenseMultiMix(input_mixing="mixup", input_mixing_start=0.0),
    "dense_multimix_paper": lambda: get_method("dense_multimix").from_dict({"preset": "paper"}),
}
# Titles in text and plots.
TITLES = {
    "erm": "plain training",
    "dense_multimix_alone": "DenseMultiMix(input_mixing='none')",
    "dense_multimix_and_mixup": "DenseMultiMix(input_mixing='mixup', input_mixing_start=0)",
    "dense_multimix": "DenseMultiMix()",
}

# Ablations change one setting of Dense MultiMix at a time. Input mixing, which would replace half of the mini-batches,
# is off. m is varied with alpha = 1 (all mixtures of m examples are equally likely): with a fixed number of effective
# examples, alpha would compensate for a change of m.
_dense = functools.partial(DenseMultiMix, input_mixing="none")
ABLATIONS: dict[str, Mixing] = {
    "n = 1,000, of 8, 3 effective": _dense(),
    "n = 10": _dense(num_mixed=10),
    "n = 100": _dense(num_mixed=100),
    "n = 10,000": _dense(num_mixed=10_000),
    "m = 2, alpha = 1": _dense(alpha=1.0, examples_per_mix=2),
    "m = 4, alpha = 1": _dense(alpha=1.0, examples_per_mix=4),
    "m = 16, alpha = 1": _dense(alpha=1.0, examples_per_mix=16),
    "m = b = 64, alpha = 1": _dense(alpha=1.0),
    "attention: gap": _dense(attention="gap"),
    "attention: cam": _dense(attention="cam"),
    "attention: uniform": _dense(attention="uniform"),
    "not dense: pooled only": MultiMix(),
    "dense and pooled": _dense(pooled_weight=1.0),
    "dense, no clean term": _dense(clean_weight=0.0, pooled_weight=1.0),
}
ABLATION_TITLES = {"n = 1,000, of 8, 3 effective": "default: n = 1,000, m = 8, 3 effective examples"}
