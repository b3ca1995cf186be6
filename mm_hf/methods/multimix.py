"""MultiMix: any number of mixed examples, each an interpolation of the mini-batch at the input of the classifier."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..distributed import GlobalBatch, is_distributed, rank_generator
from ..functional import Criterion, sample_factors
from ..functional.cost import operations_per_mixed_example
from ..functional.factors import SparseFactors, alpha_for, check_alpha, sample_sparse_factors
from ..functional.inputs import LossOptions
from ..locations import LocationOutput
from .base import Mixing, MixingLoss, Requirements
from .class_weights import check_class_weights
from .fit import START, RunningMean, misfit, mixing_weight
from .input_mixing import INPUT_METHODS, draw_input_method, is_mixable, rising_share
from .settings import check_settings, setting, settings_of
from .terms import Examples, Term, clean_term, mixed_term, weighted_sum

if TYPE_CHECKING:
    Alpha = float | tuple[float, float]
    Count = int | Literal["auto"]
else:  # HfArgumentParser takes one type for an argument; nargs="+" lets it read a number or two
    Alpha = float

    class Count(int):
        """An integer, or "auto"."""

        def __new__(cls, value):
            return value if value == "auto" else int(value)


DEFAULT_EFFECTIVE_EXAMPLES = 3.0
DEFAULTS = {
    "num_mixed": "auto",
    "clean_weight": 1.0,
    "pooled_weight": 1.0,
    "input_mixing_prob": 0.5,
    "input_mixing_start": 3.0,
    "min_fit": 0.37,
}
# The paper states: 1,000 mixed examples only, alpha of each from U[0.5, 2], and a probability of input mixing. That
# this probability is 0.5 and that the inputs get mixup is our reading.
PAPER = {
    "num_mixed": 1000,
    "alpha": (0.5, 2.0),
    "clean_weight": 0.0,
    "pooled_weight": 1.0,
    "input_mixing": "mixup",
    "input_mixing_prob": 0.5,
    "input_mixing_start": 0.0,
    "min_fit": 0.0,
}


@dataclass
class MultiMix(Mixing):
    """MultiMix: `num_mixed` interpolations of the complete mini-batch in embedding space, each with its own loss.

    The loss is `clean_weight` times the cross-entropy of the clean examples plus `pooled_weight` times the mean soft
    cross-entropy of the mixed examples. After three epochs, the latter has a smaller weight while the model underfits,
    see `min_fit`. It supports every model whose last layer is linear.

    Args:
        num_mixed: Number of mixed examples per step and rank (n). "auto", the default, selects the largest number from
            32 to 1,000 whose mixing takes at most 3 % of the operations of a training step, counted in the first
            mini-batch (`mm_hf.wrapping.auto_num_mixed`).
        alpha: Concentration of the Dirichlet distribution of the interpolation factors. A pair of numbers draws it
            uniformly from that interval for each mixed example. Give `alpha` or `effective_examples`, not both.
        effective_examples: Effective number of examples in a mixed example. It sets alpha from the batch size, and so
            has the same meaning at every batch size. Default: 3 if `alpha` is not given.
        examples_per_mix: Number of examples of the mini-batch that are drawn for each mixed example (the paper's m);
            the others have the factor 0. Default: the complete mini-batch if `alpha` is given; 2 k + 2 with
            `effective_examples=k`, which mixes as strongly and costs less.
        clean_weight: Weight of the cross-entropy of the clean examples.
        pooled_weight: Weight of the loss of the mixed examples.
        input_mixing: Mixing in input space that some mini-batches get instead of mixing in embedding space: "none",
            "mixup", "cutmix" or "mixup_cutmix" (one of the two, with equal probability, per mini-batch). Default:
            "none" for `MultiMix`. For [`DenseMultiMix`], CutMix of images, videos and audio with one label per example
            (mixup, where they cannot be cut), and no input mixing of texts; `input_mixing="mixup"` also mixes texts, by
            their embeddings.
        input_mixing_prob: Share of the mini-batches that get input mixing late in training. At epoch e, the share is
            `input_mixing_prob * (1 - input_mixing_start / e)`. Default: 0.5.
        input_mixing_start: Number of epochs of training before input mixing begins. Default: 3, because it costs
            accuracy in shorter trainings. With 0, the share is constant. `MultiMixTrainer` counts the epochs. A custom
            loop sets `handle.epoch`; without it, the epoch is 0.
        min_fit: Fit of the clean examples below which nothing is mixed after three epochs of training. The fit is the
            probability of their labels: exp(-L), with L a running mean of their cross-entropy. The loss of mixed
            examples and the share of input mixing are multiplied by a weight that is 0 below `min_fit`, 1 above its
            square root, and linear in L between. Default: 0.37 (L = 1 nat), because mixing costs accuracy while a model
            underfits. 0 always mixes; this is the default with `clean_weight=0`. Multi-label and regression targets are
            always mixed.
        gather_across_devices: Mix the mini-batches of all ranks as one. Each rank computes its share of the `num_mixed`
            mixed examples. By default each rank mixes its own mini-batch, as in the paper.
        kernel: "eager", "compile" or "triton", see [`dense_multimix_loss`].
        preset: "paper" selects the paper's recipe: 1,000 mixed examples only, alpha from (0.5, 2), and input mixup in
            half of the mini-batches (our reading). Arguments that are given override it.

    Raises:
        ValueError: A setting is invalid; or, at the first mini-batch, `input_mixing` does not support the inputs.

    Source:
        Venkataramanan et al., NeurIPS 2023, section 3.2. Weights, effective examples and defaults are our choices.

    Example:
        >>> MultiMix(num_mixed=500).effective_examples
        3.0
        >>> MultiMix(preset="paper").alpha
        (0.5, 2.0)
    """

    name: ClassVar[str] = "multimix"
    defaults: ClassVar[dict[str, Any]] = DEFAULTS
    presets: ClassVar[dict[str, dict[str, Any]]] = {"paper": PAPER}

    # None selects the value of the preset or else of `defaults`. No setting in `defaults` is None after construction.
    num_mixed: Count = setting(
        None,
        "Mixed examples per step and rank, or 'auto'. auto: 32 to 1,000, by counted operations at most 3 percent of a "
        "step. Default: auto.",
        within="[1, inf)", words=("auto",),
    )  # fmt: skip
    alpha: Alpha | None = setting(
        None, "Concentration of the Dirichlet distribution of the factors. A number, or the two ends of an interval.",
        nargs="+", within="(1e-30, 1e30)",
        requirement="must be a positive number or an interval (low, high) with 1e-30 < low <= high < 1e30",
    )  # fmt: skip
    effective_examples: float | None = setting(
        None, "Effective number of examples in a mixed example, instead of alpha. Default: 3.", within="(1, inf)"
    )
    examples_per_mix: int | None = setting(
        None, "Examples drawn for each mixed example. Default: all; with effective_examples k, 2 k + 2.",
        within="[2, inf)",
    )  # fmt: skip
    clean_weight: float = setting(
        None, "Weight of the cross-entropy of the clean examples. Default: 1.", within="[0, inf)"
    )
    pooled_weight: float = setting(
        None, "Weight of the loss of mixed pooled features. Default: 1 (dense_multimix: 0).", within="[0, inf)"
    )
    # None is the method's default, which depends on the inputs.
    input_mixing: Literal["none", "mixup", "cutmix", "mixup_cutmix"] | None = setting(
        None,
        "Mixing in input space that some mini-batches get instead. Default: none (dense_multimix: cutmix of images, "
        "videos and audio with one label per example).",
    )
    input_mixing_prob: float = setting(
        None, "Share of the mini-batches that get input mixing late in training: it rises from 0 after "
        "input_mixing_start epochs. Default: 0.5.",
        within="[0, 1]",
    )  # fmt: skip
    input_mixing_start: float = setting(
        None, "Epochs of training before input mixing begins. Default: 3.", within="[0, inf]"
    )
    min_fit: float = setting(
        None, "Mean probability of the correct classes of the training examples below which nothing is mixed after "
        "three epochs; 0 mixes always. Default: 0.37 (0 with clean_weight 0).",
        within="[0, 1)",
    )  # fmt: skip
    gather_across_devices: bool = setting(False, "Mix the mini-batches of all ranks as one.")
    kernel: Literal["eager", "compile", "triton"] = setting(
        "eager",
        "How the loss is computed. compile is faster for many classes and mixed examples, triton needs less memory.",
    )
    preset: Literal["paper"] | None = field(
        default=None, compare=False, metadata={"help": "'paper' selects the paper's recipe."}
    )

    def __post_init__(self) -> None:
        self.class_weights = check_class_weights(self.class_weights)
        settings_of(self)["preset"].check(self.preset)
        defaults = {**self.defaults, **self.presets.get(self.preset or "", {})}
        if self.clean_weight == 0:  # nothing else would be trained
            defaults["min_fit"] = 0.0
        for name, value in defaults.items():
            excluded = name == "alpha" and self.effective_examples is not None
            if getattr(self, name) is None and not excluded:
                setattr(self, name, value)
        if isinstance(self.alpha, (list, tuple)):
            self.alpha = self.alpha[0] if len(self.alpha) == 1 else tuple(self.alpha)  # type: ignore[assignment]
        if self.alpha is not None and self.effective_examples is not None:
            raise ValueError(
                f"alpha ({self.alpha}) and effective_examples ({self.effective_examples}) both set the strength of "
                "mixing: give one of the two and leave the other None."
            )
        if self.alpha is None and self.effective_examples is None:
            self.effective_examples = DEFAULT_EFFECTIVE_EXAMPLES
        self._misfit = RunningMean()  # shared with the copies for single mini-batches
        self._follows_fit = False
        self._validate()

    def _validate(self) -> None:
        check_settings(self)
        if self.alpha is not None:
            check_alpha(self.alpha)
        k, most = self.effective_examples, self.examples_per_mix
        if k is not None and most is not None and k >= most:
            raise ValueError(f"examples_per_mix must be greater than effective_examples, got {most} and {k}.")
        weights = {f.name: getattr(self, f.name) for f in fields(self) if f.name.endswith("_weight")}
        if not any(weights.values()):
            raise ValueError(
                f"At least one of {', '.join(weights)} must be positive: with all of them 0 the loss is 0."
            )
        if self.min_fit and not self.clean_weight:
            raise ValueError(
                f"min_fit must be 0 with clean_weight=0, got {self.min_fit}: nothing would train a model that "
                "underfits."
            )

    @property
    def requirements(self) -> Requirements:
        mixes_embeddings = any(method.requirements.embeddings for method in INPUT_METHODS[self.input_mixing or "none"])
        return Requirements(linear_head=True, embeddings=mixes_embeddings, min_examples=1 if self.gathers else 2)

    def check_inputs(self, inputs: Mapping[str, Any], model: nn.Module) -> None:
        for method in INPUT_METHODS[self.input_mixing or "none"]:
            method.check_inputs(inputs, model)

    def for_batch(
        self, inputs: Mapping[str, Any], labels: Tensor, *, epoch: float | None = None, same_on_all_ranks: bool = False
    ) -> Mixing:
        """Return this method, or the input-space method that this mini-batch gets instead."""
        method, epoch = self, epoch or 0.0
        prob = self.input_mixing_prob * rising_share(epoch, self.input_mixing_start)
        if self.min_fit and epoch >= START:
            method = copy.copy(self)
            method._follows_fit = True
            earlier = self._misfit.read()
            prob *= 1.0 if earlier is None else float(mixing_weight(earlier, self.min_fit))
        if self.input_mixing is None:
            methods = self.default_input_methods(inputs)
            prob = prob if is_mixable(inputs, labels) else 0.0
        else:
            methods = INPUT_METHODS[self.input_mixing]
        if not methods or not self.input_mixing_prob:
            return method
        return draw_input_method(methods, prob, same_on_all_ranks or self.gathers) or method

    def default_input_methods(self, inputs: Mapping[str, Any]) -> tuple[Mixing, ...]:
        """Return the methods of `input_mixing=None` for these inputs: none."""
        return ()

    def loss(
        self,
        output: LocationOutput,
        labels: Tensor,
        *,
        label_smoothing: float = 0.0,
        criterion: Criterion = "cross_entropy",
    ) -> MixingLoss:
        """Return the weighted sum of the clean and the mixed loss."""
        batch = None
        if self.gathers:
            locations = 0 if output.token_logits is None else output.token_logits.shape[1]
            batch = GlobalBatch.gather_sizes(len(labels), locations, output.logits.device)
        options = LossOptions(criterion, label_smoothing, kernel=self.kernel)
        terms = self._terms(output, labels, batch, options)
        logs: dict[str, Tensor | float] = {}
        for name, term in terms.items():
            logs |= {f"loss_{name}": term.loss.detach(), **term.logs}
        logs["loss_terms"] = sum(term.count for term in terms.values())
        weights: dict[str, Tensor | float] = {name: getattr(self, f"{name}_weight") for name in terms}
        if self.min_fit and criterion == "cross_entropy":
            loss = terms["clean"].loss if batch is None and not label_smoothing else None
            mean = self._misfit.update(misfit(output.logits, labels, loss, batch))
            if self._follows_fit:
                logs["mixing_weight"] = weight = mixing_weight(mean, self.min_fit)
                weights = {name: w if name == "clean" else weight * w for name, w in weights.items()}
        return MixingLoss(weighted_sum([term.loss for term in terms.values()], list(weights.values())), logs)

    def _terms(
        self, output: LocationOutput, labels: Tensor, batch: GlobalBatch | None, options: LossOptions
    ) -> dict[str, Term]:
        """Return the terms of the loss whose weights are not zero, by name."""
        terms = {}
        if self.clean_weight:
            terms["clean"] = clean_term(output.logits, labels, batch, options)
        if self.pooled_weight:
            ones = output.logits.new_ones(len(labels), 1, dtype=torch.float32)
            examples = Examples(output.logits[:, None], labels, ones)
            options = replace(options, confidence_weighted=self.class_weights is not None)
            terms["pooled"] = self._mixed_term(examples, batch, options)
        return terms

    def _mixed_term(
        self, examples: Examples, batch: GlobalBatch | None, options: LossOptions, permute: bool = False
    ) -> Term:
        if self.class_weights is not None:
            examples = examples.with_normalized_targets()
        return mixed_term(examples, self.sample, batch, options, permute)

    def sample(
        self, num_examples: int, device: torch.device, generator: torch.Generator | None = None
    ) -> Tensor | SparseFactors:
        """Draw factors (b, n) for a mini-batch of b examples, by default from a generator of this rank."""
        if self.num_mixed == "auto":
            raise ValueError("num_mixed='auto' is determined during training: call with_num_mixed before sample.")
        drawn = self._examples_drawn(num_examples)
        alpha = self.alpha
        if alpha is None:
            assert self.effective_examples is not None
            alpha = alpha_for(self.effective_examples, drawn)
        where: dict[str, Any] = {"device": device, "generator": generator or rank_generator(device)}
        if drawn == num_examples:
            return sample_factors(num_examples, self.num_mixed, alpha, **where)
        return sample_sparse_factors(num_examples, self.num_mixed, alpha, examples_per_mix=drawn, **where)

    def _examples_drawn(self, num_examples: int) -> int:
        """Return the number of examples that are drawn for each mixed example."""
        if self.examples_per_mix is not None:
            return min(num_examples, self.examples_per_mix)
        if self.effective_examples is not None:
            return min(num_examples, math.ceil(2 * self.effective_examples) + 2)
        return num_examples

    def mixes(self, num_examples: int) -> bool:
        """Return True if there are examples to mix, and a term for mixed examples."""
        mixed = [f.name for f in fields(self) if f.name.endswith("_weight") and f.name != "clean_weight"]
        return (num_examples > 1 or self.gathers) and any(getattr(self, name) for name in mixed)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the running mean of the misfit of the clean examples; empty before the first mini-batch."""
        return self._misfit.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the running mean."""
        if state and set(state) != set(RunningMean.STATE):
            raise ValueError(
                f"The state of {self.name} has {', '.join(RunningMean.STATE)}, but got {', '.join(sorted(state))}."
            )
        self._misfit.load_state_dict(state)

    @property
    def gathers(self) -> bool:
        """True if the mini-batches of several ranks are mixed as one."""
        return self.gather_across_devices and is_distributed()

    @property
    def ranks(self) -> int:
        """Number of ranks whose mini-batches are mixed as one."""
        return torch.distributed.get_world_size() if self.gathers else 1

    @property
    def is_auto(self) -> bool:
        return self.num_mixed == "auto"

    def with_num_mixed(self, num_mixed: int) -> MultiMix:
        method = copy.copy(self)
        method.num_mixed = num_mixed
        return method

    def operations_per_mixed_example(
        self, num_examples: int, num_locations: int, num_classes: int, device: torch.device
    ) -> float:
        return operations_per_mixed_example(
            num_examples, self._mixed_locations(num_locations), num_classes,
            examples_per_mix=self._examples_drawn(num_examples * self.ranks), ranks=self.ranks, device=device,
        )  # fmt: skip

    def _mixed_locations(self, num_locations: int) -> int:
        """Return the number of losses of each mixed example in a model with this number of locations."""
        return int(bool(self.pooled_weight))

    def to_dict(self) -> dict[str, Any]:
        """Return the method's name and its settings, those of the preset included."""
        values = super().to_dict()
        del values["preset"]
        return values
