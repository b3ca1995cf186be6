"""Terms of the loss of MultiMix and Dense MultiMix: of the clean examples, and of mixed examples or locations.

With the mini-batches of all ranks as one, the mean of a term over the ranks is the loss of all examples, because data
parallel training averages the gradients of the ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..distributed import GlobalBatch, rank_generator
from ..functional import IGNORE_INDEX, Criterion, clean_loss, count_valid
from ..functional.factors import SparseFactors, sample_permutations
from ..functional.inputs import LossOptions
from ..functional.losses import loss_and_occupied

# Draws factors (b, n), given b, the device and, to draw the same on all ranks, a generator.
Sample = Callable[..., Tensor | SparseFactors]


@dataclass
class Term:
    """A term of the loss.

    Attributes:
        loss: Its value.
        count: Number of losses that it is a mean of.
        logs: Other values to log.
    """

    loss: Tensor
    count: Tensor | int
    logs: dict[str, Tensor | float] = field(default_factory=dict)


@dataclass(frozen=True)
class Examples:
    """Examples that are mixed at every location.

    Attributes:
        logits: (b, r, c).
        labels: (b, ...) for all locations of an example, or (b, r, ...), as for [`dense_multimix_loss`].
        confidence: (b, r), the confidence in the label at a location.
    """

    logits: Tensor
    labels: Tensor
    confidence: Tensor

    def with_normalized_targets(self) -> Examples:
        """Multiply the confidence by the sums of the targets, and divide the targets by them.

        With class weights, the target of an example sums to its weight.
        """
        weights = self.labels.sum(dim=-1)
        labels = self.labels / weights.clamp(min=torch.finfo(self.labels.dtype).tiny)[..., None]
        return replace(self, labels=labels, confidence=self.confidence * weights.view(len(labels), -1))

    def gather(self, batch: GlobalBatch, num_locations: int, criterion: Criterion) -> Examples:
        """Return the examples of all ranks, padded to a number of locations."""
        is_index = criterion == "cross_entropy" and not self.labels.is_floating_point()
        has_location_labels = self.labels.ndim == (2 if is_index else 3)
        return Examples(
            labels=batch.gather(
                self.labels, num_locations if has_location_labels else None, IGNORE_INDEX if is_index else 0
            ),
            logits=batch.gather(self.logits, num_locations),
            confidence=batch.gather(self.confidence, num_locations),
        )


def clean_term(logits: Tensor, labels: Tensor, batch: GlobalBatch | None, options: LossOptions) -> Term:
    """Return the loss of the clean examples (b, c), or locations (b, r, c)."""
    criterion, smoothing = options.criterion, options.label_smoothing
    # The training step has checked the labels; on a GPU, each check is several kernels.
    on_cpu = labels.device.type == "cpu"
    loss = clean_loss(logits, labels, label_smoothing=smoothing, criterion=criterion, validate_args=on_cpu)
    if batch is not None:
        valid = count_valid(labels, logits, criterion)
        loss = loss * batch.world_size * valid / batch.total(valid).clamp(min=1e-9)
    return Term(loss, len(labels))


def mixed_term(
    examples: Examples, sample: Sample, batch: GlobalBatch | None, options: LossOptions, permute: bool
) -> Term:
    """Return the loss of mixed examples.

    Args:
        examples: The examples of this rank.
        sample: Draws the factors.
        batch: The mini-batches of all ranks, to mix them as one.
        options: Settings of the loss.
        permute: Permute the examples at each location.
    """
    device, permutations = examples.logits.device, None
    if batch is not None:
        examples = examples.gather(batch, batch.num_locations if permute else 1, options.criterion)
    b, r, _ = examples.logits.shape
    factors = sample(b, device) if batch is None else sample(b, device, batch.generator)
    n = factors.shape[1]
    if permute:
        # All locations share one draw, each with its own permutation of the examples: the distribution at a location
        # and the variance of the gradient are those of one draw per location (benchmarks/sampling.py), for 1/r of the
        # draws.
        generator = rank_generator(device) if batch is None else batch.generator
        permutations = sample_permutations(r, b, device=device, generator=generator)
    if batch is not None:
        options = replace(options, columns=batch.columns(n))
    # The draws are valid. On a GPU, an assertion would stop a training run whose gradient scaler skips the step.
    loss, occupied = loss_and_occupied(
        examples.logits, examples.labels, examples.confidence, factors, permutations, options, validate_args=False
    )
    if batch is not None:
        loss = loss * batch.world_size
    return Term(loss, occupied * n, {"mean_largest_factor": mean_largest_factor(factors)})


def mean_largest_factor(factors: Tensor | SparseFactors) -> Tensor:
    """Return the mean over the mixed examples of their largest factor: 1 for no mixing, 1 / b for the batch mean."""
    if isinstance(factors, SparseFactors):
        return factors.weight.amax(dim=1).mean()
    return factors.amax(dim=-2).mean()


def mean_entropy(attention: Tensor) -> Tensor:
    """Return the mean over the examples of the entropy of their attention (b, r), which sums to 1, in nats."""
    return torch.special.entr(attention).sum(dim=1).mean()


def weighted_sum(losses: list[Tensor], weights: list[Tensor | float]) -> Tensor:
    """Return the sum of weights times losses; a weight of 1, the default, takes no kernel.

    Example:
        >>> weighted_sum([torch.tensor(2.0), torch.tensor(3.0)], [1.0, 0.5])
        tensor(3.5000)
    """
    parts = [x if isinstance(w, (int, float)) and w == 1 else w * x for x, w in zip(losses, weights, strict=True)]
    return sum(parts[1:], parts[0])
