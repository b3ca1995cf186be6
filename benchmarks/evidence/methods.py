"""Methods and settings that the evidence study compares. The keys are those of the committed CSV files."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from mm_hf import ERM, CutMix, DenseMultiMix, Mixing, MultiMix, get_method
from mm_hf.comparison.derived import derived_names
from mm_hf.functional import soft_targets
from mm_hf.methods.base import MixingLoss
from mm_hf.methods.input_mixing import draw_input_method

BASELINE = "erm"


@dataclass
class LabelSmoothing(Mixing):
    """Training without mixing on smoothed labels: `label_smoothing_factor` of `TrainingArguments` as a method."""

    name: ClassVar[str] = "label_smoothing"

    factor: float = 0.1

    def loss(self, output: Any, labels: Tensor, *, label_smoothing: float = 0.0, **options: Any) -> MixingLoss:
        """Return the cross-entropy with smoothed labels."""
        return ERM().loss(output, labels, label_smoothing=self.factor, **options)


@dataclass
class CenteredRegression(Mixing):
    """Control without mixing in embedding space: bounded targets of clean examples, and CutMix of the others.

    With many examples in each mixed example, the gradient of Dense MultiMix on the logits is close to that of a
    regression of centered logits on centered labels, whose targets are bounded. This method has such targets and mixes
    only by CutMix, so that its difference from Dense MultiMix with as much CutMix is the effect of mixing itself.

    The loss of a mini-batch is the mean squared difference between the logits minus their mean over the classes and the
    one-hot label minus its mean, times `margin`. A share of the mini-batches gets CutMix instead.

    Args:
        margin: Difference of the targets of the label and of the other classes.
        cutmix_prob: Share of the mini-batches that get CutMix.
    """

    name: ClassVar[str] = "centered_regression"

    margin: float = 4.0
    cutmix_prob: float = 0.5

    def check_inputs(self, inputs: Mapping[str, Any], model: nn.Module) -> None:
        """Raise a ValueError if the inputs cannot be cut."""
        CutMix().check_inputs(inputs, model)

    def for_batch(
        self, inputs: Mapping[str, Any], labels: Tensor, *, epoch: float | None = None, same_on_all_ranks: bool = False
    ) -> Mixing:
        """Return CutMix with probability `cutmix_prob`, else this method."""
        return draw_input_method([CutMix()], self.cutmix_prob, same_on_all_ranks) or self

    def loss(self, output: Any, labels: Tensor, **options: Any) -> MixingLoss:
        """Return the squared loss of the centered logits."""
        logits = output.logits.float()
        targets, _ = soft_targets(labels, logits.shape[1])
        targets = self.margin * (targets - targets.mean(dim=1, keepdim=True))
        loss = F.mse_loss(logits - logits.mean(dim=1, keepdim=True), targets)
        return MixingLoss(loss, {"loss_regression": loss.detach()})


METHODS: dict[str, Callable[[], Mixing]] = {
    BASELINE: ERM,
    "label_smoothing": LabelSmoothing,
    **{
        name: get_method(name)
        for name in (
            *("mixup", "cutmix", "recursivemix", "manifold_mixup", "transmix", "zeta_mixup", "regmixup", "align_mixup"),
            *("multimix", "dense_multimix"),
        )
    },
    "dense_multimix_paper": lambda: get_method("dense_multimix").from_dict({"preset": "paper"}),
    CenteredRegression.name: CenteredRegression,
}
# Derived from the runs of plain training, where the task has validation examples: they train nothing.
DERIVED = tuple(derived_names(BASELINE).values())
EARLY_STOPPED = derived_names(BASELINE)["early_stopping"]
DEFAULT = "dense_multimix"
RIVALS = (
    "mixup", "cutmix", "recursivemix", "manifold_mixup", "transmix", "zeta_mixup", "regmixup", "align_mixup",
)  # fmt: skip
MIXING = (DEFAULT, *RIVALS, "multimix", "dense_multimix_paper")

# Ablations change one setting of Dense MultiMix at a time. Input mixing, which would replace half of the mini-batches,
# is off. m is varied with alpha = 1 (all mixtures of m examples are equally likely): with a fixed number of effective
# examples, alpha would compensate for a change of m. Everything is mixed also while the model underfits.
_dense = functools.partial(DenseMultiMix, num_mixed=1000, input_mixing="none", min_fit=0.0)
ABLATIONS: dict[str, Mixing] = {
    "n = 1,000, of 8, 3 effective": _dense(),
    **{f"n = {n:,}": _dense(num_mixed=n) for n in (10, 100, 10_000)},
    "m = 2, alpha = 1": _dense(alpha=1.0, examples_per_mix=2),
    "m = 4, alpha = 1": _dense(alpha=1.0, examples_per_mix=4),
    "m = 16, alpha = 1": _dense(alpha=1.0, examples_per_mix=16),
    "m = b = 64, alpha = 1": _dense(alpha=1.0),
    "attention: gap": _dense(attention="gap"),
    "attention: cam": _dense(attention="cam"),
    "attention: uniform": _dense(attention="uniform"),
    "not dense: pooled only": MultiMix(min_fit=0.0),
    "dense and pooled": _dense(pooled_weight=1.0),
    "dense, no clean term": _dense(clean_weight=0.0, pooled_weight=1.0),
}
ABLATION_TITLES = {"n = 1,000, of 8, 3 effective": "default: n = 1,000, m = 8, 3 effective examples"}
