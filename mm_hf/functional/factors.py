"""Interpolation factors: how much of each example a mixed example takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class SparseFactors:
    """Interpolation factors of which few are not zero: each mixed example has a few vertices among the examples.

    Attributes:
        index: (n, s), the examples that a mixed one is made of, each at most once.
        weight: (n, s), their factors; each row sums to 1.
        num_examples: b, the number of examples in the mini-batch.

    Example:
        >>> factors = sample_sparse_factors(num_examples=128, num_mixed=1000, alpha=0.4, num_vertices=8)
        >>> factors.shape, factors.index.shape, factors.dense().shape
        ((128, 1000), torch.Size([1000, 8]), torch.Size([128, 1000]))
    """

    index: Tensor
    weight: Tensor
    num_examples: int

    @property
    def shape(self) -> tuple[int, int]:
        """(b, n): the shape of `dense()`."""
        return self.num_examples, len(self.index)

    def dense(self) -> Tensor:
        """The same factors as a matrix (b, n)."""
        return self.weight.new_zeros(self.shape[::-1]).scatter_(1, self.index, self.weight).mT.contiguous()

    def detach(self) -> SparseFactors:
        """Cut from whatever the factors were computed from."""
        return SparseFactors(self.index, self.weight.detach(), self.num_examples)

    def to(self, dtype: torch.dtype) -> SparseFactors:
        """With weights of another floating type."""
        return SparseFactors(self.index, self.weight.to(dtype), self.num_examples)


def sample_factors(
    num_examples: int,
    num_mixed: int,
    alpha: float | tuple[float, float],
    *,
    num_locations: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw the interpolation factors of MultiMix: each column is one draw of a symmetric Dirichlet distribution.

    Args:
        num_examples: b, the number of examples that are mixed (the size of the mini-batch).
        num_mixed: n, the number of mixed examples.
        alpha: Concentration of the Dirichlet distribution, > 0. A pair `(low, high)` draws it uniformly from that
            interval anew for each column, as the paper does with (0.5, 2.0).
        num_locations: r. When given, every location gets factors of its own.
        device: Where the factors are drawn. Default: the CPU.
        dtype: Floating type of the result. Half precision types are drawn in float32 and rounded.
        generator: Default: the global generator of `device`, which Trainer's checkpoints restore, so that a resumed
            training draws what an uninterrupted one would have drawn.

    Returns:
        Factors of shape (b, n), or (r, b, n) with `num_locations`: non-negative, each column summing to 1.

    Raises:
        ValueError: A size is not positive, or `alpha` is not positive or not an interval.

    Source:
        Venkataramanan et al., "Embedding Space Interpolation Beyond Mini-Batch, Beyond Pairs and Beyond Examples",
        NeurIPS 2023, section 3.2.

    Example:
        >>> import torch
        >>> factors = sample_factors(num_examples=4, num_mixed=1000, alpha=(0.5, 2.0))
        >>> factors.shape
        torch.Size([4, 1000])
        >>> bool(torch.allclose(factors.sum(dim=0), torch.ones(1000)))
        True
    """
    sizes = {"num_examples": num_examples, "num_mixed": num_mixed, "num_locations": num_locations}
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{name} must be at least 1, but is {size}.")
    low, high = check_alpha(alpha)

    working = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    options: dict[str, Any] = {"device": device, "dtype": working, "generator": generator}
    locations = () if num_locations is None else (num_locations,)
    shape = (*locations, num_examples, num_mixed)
    if low == high:
        concentration = torch.full(shape, low, device=device, dtype=working)
    else:
        per_column = torch.rand((*locations, 1, num_mixed), **options)
        concentration = (low + (high - low) * per_column).expand(shape)

    # Gamma(a) = Gamma(a + 1) U^(1/a), kept as logarithms: for a small alpha nearly all Gamma(a) variates underflow, a
    # column of zeros has no direction, and clamping the zeros (as torch's Dirichlet does) pulls it to the centre.
    log_gamma = torch._standard_gamma(concentration + 1, generator=generator).log_()
    log_gamma += torch.rand(shape, **options).neg_().log1p_().div_(concentration)
    return log_gamma.softmax(dim=-2).to(dtype)


def sample_sparse_factors(
    num_examples: int,
    num_mixed: int,
    alpha: float | tuple[float, float],
    *,
    num_vertices: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
) -> SparseFactors:
    """Draw, for each mixed example, a few examples of the mini-batch and the factors by which they are mixed.

    Every set of `num_vertices` examples is as likely as any other, and the factors on it have the symmetric Dirichlet
    distribution. As the mixed examples are more than the examples, all of these take part.

    Args:
        num_examples: b, the number of examples in the mini-batch.
        num_mixed: n, the number of mixed examples.
        alpha: Concentration of the Dirichlet distribution, or an interval, as for [`sample_factors`].
        num_vertices: s, the number of examples that a mixed one is made of; at most b.
        device: Where the factors are drawn. Default: the CPU.
        dtype: Floating type of the weights.
        generator: Default: the global generator of `device`.

    Raises:
        ValueError: A size is not positive, there are more vertices than examples, or `alpha` is no concentration.

    Source:
        The paper's interpolation of m < b examples of the mini-batch, with a set of m for each mixed example (ours).

    Example:
        >>> factors = sample_sparse_factors(num_examples=128, num_mixed=1000, alpha=0.4, num_vertices=8)
        >>> bool(torch.allclose(factors.weight.sum(dim=1), torch.ones(1000)))
        True
    """
    if not 1 <= num_vertices <= num_examples:
        raise ValueError(
            f"num_vertices must lie between 1 and the number of examples, {num_examples}, but is {num_vertices}."
        )
    weight = sample_factors(num_vertices, num_mixed, alpha, device=device, dtype=dtype, generator=generator)
    # Floyd's sampling: a set of s out of b in s draws. Draw t of 0..j; if it is taken already, j, which is not, replaces it.
    index = torch.empty(num_mixed, num_vertices, dtype=torch.long, device=device)
    uniform = torch.rand(num_vertices, num_mixed, device=device, dtype=torch.float64, generator=generator)
    for column, last in enumerate(range(num_examples - num_vertices, num_examples)):
        drawn = (uniform[column] * (last + 1)).long()
        taken = (index[:, :column] == drawn[:, None]).any(dim=1)
        index[:, column] = drawn.masked_fill_(taken, last)
    return SparseFactors(index, weight.mT.contiguous(), num_examples)


def sample_permutations(
    num_locations: int,
    num_examples: int,
    *,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A random permutation of the examples for each location, shape (r, b).

    With them, locations share one draw of factors and still have, each for itself, factors of the same law: the
    Dirichlet distribution is symmetric in the examples.

    Example:
        >>> sorted(sample_permutations(2, 3)[0].tolist())
        [0, 1, 2]
    """
    return torch.rand((num_locations, num_examples), device=device, generator=generator).argsort(dim=1)


def check_alpha(alpha: float | tuple[float, float]) -> tuple[float, float]:
    """The interval that `alpha` stands for, or a ValueError that says what is wrong with it."""
    try:
        low, high = alpha if isinstance(alpha, (tuple, list)) else (alpha, alpha)
        right = 1e-30 < low <= high < float("inf")  # below, float32 has no such small numbers
    except (TypeError, ValueError):
        right = False
    if not right:
        raise ValueError(
            f"alpha must be a positive number or an interval (low, high) with 0 < low <= high, got {alpha!r}."
        )
    return float(low), float(high)


def alpha_for(effective_examples: float, num_examples: int) -> float:
    """The alpha with which a mixed example is made of about `effective_examples` of `num_examples` examples.

    The effective number 1 / sum(factor^2) of a symmetric Dirichlet is about k = (alpha b + 1) / (alpha + 1) (its
    inverse has exactly the inverse's expectation), hence alpha = (k - 1) / (b - k). A mini-batch that is too small for k
    (fewer than 2 k - 1 examples, say the last one of an epoch) is mixed with alpha = 1, uniformly over the simplex.

    Example:
        >>> round(alpha_for(3, num_examples=128), 4)
        0.016
        >>> alpha_for(3, num_examples=4)
        1.0
    """
    if not 1 < effective_examples < float("inf"):
        raise ValueError(f"effective_examples must be greater than 1, but is {effective_examples}.")
    return min(1.0, (effective_examples - 1) / max(num_examples - effective_examples, 1e-9))
