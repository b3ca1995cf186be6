"""Terms of the loss of MultiMix and Dense MultiMix."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..functional.factors import SparseFactors


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


def mean_largest_factor(factors: Tensor | SparseFactors) -> Tensor:
    """Return the mean over the mixed examples of their largest factor: 1 for no mixing, 1 / b for the batch mean."""
    if isinstance(factors, SparseFactors):
        return factors.weight.amax(dim=1).mean()
    return factors.amax(dim=-2).mean()
