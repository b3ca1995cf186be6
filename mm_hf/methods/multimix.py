"""MultiMix: any number of mixed examples, each made of the whole mini-batch, mixed where the classifier begins."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from ..distributed import GlobalBatch, is_distributed, raise_if_uneven_inputs, rank_generator
from ..functional import IGNORE_INDEX, Criterion, clean_loss, count_valid, dense_multimix_loss, sample_factors
from ..functional.factors import SparseFactors, alpha_for, check_alpha, sample_permutations, sample_sparse_factors
from ..locations import LocationOutput
from .base import Mixing, MixingLoss
from .erm import ERM
from .mixup import Mixup, real_inputs

if TYPE_CHECKING:
    Alpha = float | tuple[float, float]
    Count = int | Literal["auto"]
else:  # HfArgumentParser takes one type for an argument; nargs="+" lets it read a number or two
    Alpha = float

    class Count(int):
        """A whole number, or "auto"."""

        def __new__(cls, value):
            return value if value == "auto" else int(value)


DEFAULT_EFFECTIVE_EXAMPLES = 3.0
DEFAULTS = {"clean_weight": 1.0, "pooled_weight": 1.0, "probability": 1.0, "otherwise": "clean", "input_mixup": 0.0}
WITH_MIXUP = {"probability": 0.5, "otherwise": "mixup", "input_mixup": 0.0}
SIGNALS = {"pixel_values", "pixel_values_videos", "input_values", "input_features"}  # images, videos, sounds
# What the paper states (mixed examples only, alpha per mixed example from U[0.5, 2]); that the probability is 0.5 and
# that the other mini-batches get input mixup is our reading.
PAPER = {**WITH_MIXUP, "alpha": (0.5, 2.0), "clean_weight": 0.0, "pooled_weight": 1.0}


def setting(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field with the text that a command line shows."""
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class MultiMix(Mixing):
    """MultiMix: `num_mixed` interpolations of the whole mini-batch in embedding space, each with a loss of its own.

    The loss is `clean_weight` times the ordinary cross-entropy plus `pooled_weight` times the mean soft cross-entropy
    of the mixed examples. Works with every model whose last layer is linear.

    Args:
        num_mixed: Mixed examples a step (n), for each process. "auto": as many as keep a step within 1.05 times plain
            training, by the clock of the first steps (`mm_hf.wrapping.auto_num_mixed`).
        alpha: Concentration of the Dirichlet distribution of the factors; a pair draws it for each mixed example from
            that interval. Give this or `effective_examples`.
        effective_examples: Of how many examples a mixed one is made: sets alpha from the size of the mini-batch, and
            so means the same at every size. Default: 3, if `alpha` is not given.
        num_vertices: How many examples of the mini-batch are drawn for each mixed one, which mixes those alone (the
            paper's m). Default: all of them if `alpha` is given; with `effective_examples` k, 2 k + 2, which mix as
            strongly, at a fraction of the cost.
        clean_weight: Weight of the cross-entropy of the clean examples.
        pooled_weight: Weight of the loss of the mixed examples.
        probability: Share of the mini-batches that are mixed.
        otherwise: What happens to the other mini-batches: "clean" training or input "mixup".
        input_mixup: Share of the mixed mini-batches whose inputs are mixed instead, pair by pair, once the training has
            gone over its examples often enough to overfit; where inputs are real numbers (images, sounds; not texts)
            and a label is one of a whole example. Default: 0 ([`DenseMultiMix`]: 0.5).
        input_mixup_after: After how many epochs that begins: in shorter trainings it costs accuracy. `MultiMixTrainer`
            counts epochs, a loop of one's own by `handle.epoch`; where nobody does, inputs are never mixed.
        gather_across_devices: Mix the mini-batches of all processes as one, of which each process takes its share of the
            `num_mixed` mixed examples; else each process mixes its own, as in the paper.
        preset: "paper" sets what the paper states: mixed examples only, alpha from (0.5, 2), and half of the
            mini-batches (our reading) with input mixup instead. "mixup": the defaults, and likewise half of the
            mini-batches with input mixup, of texts, too, and from the first step. Arguments that are given win.

    Raises:
        ValueError: A setting makes no sense.

    Source:
        Venkataramanan et al., NeurIPS 2023, section 3.2. Weights, effective examples and defaults are ours.

    Example:
        >>> MultiMix(num_mixed=500).effective_examples
        3.0
        >>> MultiMix(preset="paper").alpha
        (0.5, 2.0)
    """

    name: ClassVar[str] = "multimix"
    defaults: ClassVar[dict[str, Any]] = DEFAULTS
    presets: ClassVar[dict[str, dict[str, Any]]] = {"paper": PAPER, "mixup": WITH_MIXUP}

    num_mixed: Count = setting(
        1000, "Mixed examples a step, for each process, or 'auto': as many as a step can have at 1.05 times the time."
    )
    alpha: Alpha | None = setting(
        None, "Concentration of the Dirichlet distribution of the factors: a number, or the two ends of an interval.",
        nargs="+",
    )  # fmt: skip
    effective_examples: float | None = setting(
        None, "Of how many examples a mixed one is made, in place of alpha. Default: 3."
    )
    num_vertices: int | None = setting(
        None,
        "How many examples of the mini-batch are drawn for each mixed one. Default: all, or few with effective_examples.",
    )
    # None stands for what the preset says, or else `defaults`; after construction none of these is None.
    clean_weight: float = setting(None, "Weight of the cross-entropy of the clean examples. Default: 1.")
    pooled_weight: float = setting(None, "Weight of the loss of mixed pooled features. Default: 1 (dense_multimix: 0).")
    probability: float = setting(None, "Share of the mini-batches that are mixed. Default: 1.")
    otherwise: Literal["clean", "mixup"] = setting(None, "What happens to the other mini-batches. Default: clean.")
    input_mixup: float = setting(
        None,
        "Share of the mixed mini-batches that get input mixup instead, after input_mixup_after epochs. Default: 0 "
        "(dense_multimix: 0.5).",
    )
    input_mixup_after: float = setting(3.0, "How many epochs of a training are without input mixup.")
    gather_across_devices: bool = setting(False, "Mix the mini-batches of all processes as one.")
    preset: Literal["paper", "mixup"] | None = field(
        default=None,
        compare=False,
        metadata={
            "help": "'paper': the paper's recipe. 'mixup': half of the mini-batches by mixup from the first step."
        },
    )

    def __post_init__(self) -> None:
        if self.preset is not None and self.preset not in self.presets:
            raise ValueError(f"preset must be one of {', '.join(self.presets)}, got {self.preset!r}.")
        defaults = {**self.defaults, **self.presets.get(self.preset or "", {})}
        if self.otherwise == "mixup" and self.probability not in (None, 1):
            # Who says when inputs are mixed wants no more of it.
            defaults["input_mixup"] = 0.0
        for name, value in defaults.items():
            excluded = name == "alpha" and self.effective_examples is not None
            if getattr(self, name) is None and not excluded:
                setattr(self, name, value)
        if isinstance(self.alpha, (list, tuple)):
            self.alpha = tuple(self.alpha) if len(self.alpha) > 1 else self.alpha[0]  # type: ignore[assignment]
        if self.alpha is not None and self.effective_examples is not None:
            raise ValueError(
                f"alpha ({self.alpha}) and effective_examples ({self.effective_examples}) both say how strongly "
                "examples are mixed: give one of the two and leave the other None."
            )
        if self.alpha is None and self.effective_examples is None:
            self.effective_examples = DEFAULT_EFFECTIVE_EXAMPLES
        self._validate()

    def _validate(self) -> None:
        if self.num_mixed != "auto" and not _whole(self.num_mixed, 1):
            raise ValueError(f"num_mixed must be a whole number of at least 1, or 'auto', got {self.num_mixed!r}.")
        if self.num_vertices is not None:
            if not _whole(self.num_vertices, 2):
                raise ValueError(f"num_vertices must be a whole number of at least 2, got {self.num_vertices!r}.")
            if self.effective_examples is not None and not self.effective_examples < self.num_vertices:
                raise ValueError(
                    f"num_vertices ({self.num_vertices}) must be greater than effective_examples "
                    f"({self.effective_examples}): so many examples cannot be made of fewer."
                )
        if self.alpha is not None:
            check_alpha(self.alpha)
        else:
            alpha_for(self.effective_examples, 2)  # type: ignore[arg-type]
        for name in ("probability", "input_mixup"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], but is {getattr(self, name)}.")
        after = self.input_mixup_after
        if isinstance(after, bool) or not isinstance(after, (int, float)) or not after >= 0:
            raise ValueError(f"input_mixup_after is a number of epochs, at least 0, but is {after!r}.")
        if self.otherwise not in ("clean", "mixup"):
            raise ValueError(f"otherwise must be 'clean' or 'mixup', got {self.otherwise!r}.")
        weights = {f.name: getattr(self, f.name) for f in fields(self) if f.name.endswith("_weight")}
        for name, weight in weights.items():
            if not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
                raise ValueError(f"{name} must be a number and not be negative, but is {weight!r}.")
        if not any(weights.values()):
            raise ValueError(
                f"At least one of {', '.join(weights)} must be positive: with all at 0 nothing is trained."
            )

    @property
    def needs_linear_head(self) -> bool:
        return True

    def choose(self) -> Mixing:
        return self._chosen(late=False, same_on_all_ranks=self.gathers)

    def for_batch(
        self, inputs: Mapping[str, Any], labels: Tensor, *, epoch: float | None = None, same_on_all_ranks: bool = False
    ) -> Mixing:
        """Itself, or input mixup in late epochs, or what happens to mini-batches that are not mixed."""
        late = epoch is not None and epoch >= self.input_mixup_after and has_mixable_inputs(inputs, labels)
        return self._chosen(late, same_on_all_ranks or self.gathers)

    def _chosen(self, late: bool, same_on_all_ranks: bool) -> Mixing:
        if self.probability == 1 and not self.input_mixup:
            return self
        # Drawn on the CPU whatever the device: the choice is Python's, and a draw on a GPU would have to be waited for.
        mixed = self.probability == 1 or float(torch.rand(())) < self.probability
        inputs = mixed and late and float(torch.rand(())) < self.input_mixup
        if same_on_all_ranks and is_distributed():  # else one process would wait for the others for ever
            raise_if_uneven_inputs("Choosing alike how a mini-batch is mixed", "use input_mixup=0 and probability=1")
            chosen = [mixed, inputs]
            torch.distributed.broadcast_object_list(chosen)
            mixed, inputs = chosen
        if mixed:
            return Mixup() if inputs else self
        return Mixup() if self.otherwise == "mixup" else ERM()

    @property
    def gathers(self) -> bool:
        """Whether there are other processes whose mini-batches are mixed with this one's."""
        return self.gather_across_devices and is_distributed()

    @property
    def is_auto(self) -> bool:
        return self.num_mixed == "auto"

    def with_num_mixed(self, num_mixed: int) -> MultiMix:
        method = copy.copy(self)
        method.num_mixed = num_mixed
        return method

    def sample(
        self, num_examples: int, device: torch.device, generator: torch.Generator | None = None
    ) -> Tensor | SparseFactors:
        """Factors (b, n) for a mini-batch of b examples, by default this process's own."""
        assert self.num_mixed != "auto", "The wrapper decides on a size first."
        vertices = num_examples
        if self.num_vertices is not None:
            vertices = min(num_examples, self.num_vertices)
        elif self.effective_examples is not None:
            vertices = min(num_examples, math.ceil(2 * self.effective_examples) + 2)
        alpha = self.alpha
        if alpha is None:
            assert self.effective_examples is not None
            alpha = alpha_for(self.effective_examples, vertices)
        where: dict[str, Any] = {"device": device, "generator": generator or rank_generator(device)}
        if vertices == num_examples:
            return sample_factors(num_examples, self.num_mixed, alpha, **where)
        return sample_sparse_factors(num_examples, self.num_mixed, alpha, num_vertices=vertices, **where)

    def loss(
        self,
        output: LocationOutput,
        labels: Tensor,
        *,
        label_smoothing: float = 0.0,
        criterion: Criterion = "cross_entropy",
    ) -> MixingLoss:
        """Weighted sum of the clean and the mixed loss."""
        how = {"label_smoothing": label_smoothing, "criterion": criterion}
        global_batch = None
        if self.gathers:
            tokens = output.token_logits
            global_batch = GlobalBatch.gather_sizes(
                len(labels), 0 if tokens is None else tokens.shape[1], output.logits.device
            )
        return self._weighted_sum(self._terms(output, labels, how, global_batch))

    def _terms(
        self, output: LocationOutput, labels: Tensor, how: dict[str, Any], global_batch: GlobalBatch | None
    ) -> dict[str, tuple[Tensor, dict[str, Any]]]:
        """Each term's loss and what else to log of it, for terms whose weight is not zero.

        With `everyone`, the losses are such that their mean over the processes is the loss of all examples as one
        mini-batch: that is how data parallel training averages them.
        """
        terms: dict[str, tuple[Tensor, dict[str, Any]]] = {}
        if self.clean_weight:
            loss = clean_loss(output.logits, labels, **how)
            if global_batch is not None:
                mine = count_valid(labels, output.logits, how["criterion"])
                loss = loss * global_batch.processes * mine / global_batch.total(mine).clamp(min=1e-9)
            terms["clean"] = (loss, {"loss_terms": len(labels)})
        if self.pooled_weight:
            ones = output.logits.new_ones(len(labels), 1, dtype=torch.float32)
            how = {**how, "confidence_weighted": False}
            terms["pooled"] = self._mixed(output.logits[:, None], labels, ones, how, global_batch)
        return terms

    def _mixed(
        self,
        logits: Tensor,
        labels: Tensor,
        attention: Tensor,
        how: dict[str, Any],
        global_batch: GlobalBatch | None,
        dense: bool = False,
    ) -> tuple[Tensor, dict[str, Any]]:
        """The loss of mixed logits (b, 1, c), or if `dense` (b, r, c), with labels of examples or of each location."""
        device = logits.device
        if global_batch is not None:
            r = global_batch.locations if dense else 1
            classes = how["criterion"] == "cross_entropy" and not labels.is_floating_point()
            of_locations = dense and classes and labels.ndim == 2
            labels = global_batch.gather(labels, r, IGNORE_INDEX) if of_locations else global_batch.gather(labels)
            logits, attention = global_batch.gather(logits, r), global_batch.gather(attention, r)
        b, r, _ = logits.shape
        if global_batch is None:
            factors, generator = self.sample(b, device), None
        else:
            generator = global_batch.generator
            factors = self.sample(b, device, generator)
            how = {**how, "columns": global_batch.columns(factors.shape[1])}
        # One draw in an order of its own at each location: the law at each location is the same as with a draw for each,
        # and so is the gradient's variance (benchmarks/sampling.py), for 1/r of the work.
        permutations = None
        if dense:
            permutations = sample_permutations(r, b, device=device, generator=generator or rank_generator(device))
        loss = dense_multimix_loss(logits, labels, attention, factors, permutations=permutations, **how)
        terms = (attention.detach() > 0).any(dim=0).sum() * factors.shape[1]
        loss = loss if global_batch is None else loss * global_batch.processes
        return loss, {"loss_terms": terms, "mean_largest_factor": largest(factors)}

    def _weighted_sum(self, terms: dict[str, tuple[Tensor, dict[str, Any]]]) -> MixingLoss:
        logs: dict[str, Tensor | float] = {}
        for name, (loss, more) in terms.items():
            logs[f"loss_{name}"] = loss.detach()
            count = more.pop("loss_terms")
            logs.update(more)
            logs["loss_terms"] = logs.get("loss_terms", 0) + count
        total = sum(getattr(self, f"{name}_weight") * loss for name, (loss, _) in terms.items())
        return MixingLoss(total, logs)

    def to_dict(self) -> dict[str, Any]:
        """The method's name and its settings; what a preset set is among them."""
        values = super().to_dict()
        del values["preset"]
        return values


def largest(factors: Tensor | SparseFactors) -> Tensor:
    """Mean over the mixed examples of their largest factor: 1 for no mixing, 1 / b for the mean of the batch."""
    if isinstance(factors, SparseFactors):
        return factors.weight.amax(dim=1).mean()
    return factors.amax(dim=-2).mean()


def has_mixable_inputs(inputs: Mapping[str, Any], labels: Tensor) -> bool:
    """Whether a mini-batch is one that input mixup is good for: images, videos or sounds, no text, a label an example."""
    of_examples = labels.ndim == 1 or labels.is_floating_point()
    text = any(inputs.get(name) is not None for name in ("input_ids", "inputs_embeds"))
    # With shapes of their own (NaFlex), the same place in two images' rows of patches is not the same place in the images.
    shaped = inputs.get("spatial_shapes") is not None
    known = SIGNALS & set(real_inputs(inputs, len(labels)))
    return of_examples and len(labels) > 1 and bool(known) and not text and not shaped


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
