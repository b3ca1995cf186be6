"""Interpolation factors: the share of each example in each mixed example."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import devices


@dataclass(frozen=True)
class SparseFactors:
    """Interpolation factors of mixed examples that combine a few examples of the mini-batch each.

    Attributes:
        index: (n, m), the examples that each mixed example is made of, without repetition.
        weight: (n, m), their factors; each row sums to 1.
        num_examples: b, the number of examples in the mini-batch.

    Example:
        >>> factors = sample_sparse_factors(num_examples=128, num_mixed=1000, alpha=0.4, examples_per_mix=8)
        >>> factors.shape, factors.index.shape, factors.dense().shape
        ((128, 1000), torch.Size([1000, 8]), torch.Size([128, 1000]))
    """

    index: Tensor
    weight: Tensor
    num_examples: int

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (b, n) of `dense()`."""
        return self.num_examples, len(self.index)

    def dense(self) -> Tensor:
        """Return the factors as a matrix (b, n)."""
        return self.weight.new_zeros(self.shape).scatter_(0, self.index.mT, self.weight.mT)

    def detach(self) -> SparseFactors:
        """Return the factors with weights that are detached from the graph."""
        return SparseFactors(self.index, self.weight.detach(), self.num_examples)

    def to(self, dtype: torch.dtype) -> SparseFactors:
        """Return the factors with weights of another floating type."""
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
    """Draw the interpolation factors of MultiMix: each column is a draw from a symmetric Dirichlet distribution.

    Args:
        num_examples: b, the number of examples in the mini-batch.
        num_mixed: n, the number of mixed examples.
        alpha: Concentration of the Dirichlet distribution, > 0. With a pair `(low, high)`, each column draws its own
            concentration uniformly from that interval, as in the paper with (0.5, 2.0).
        num_locations: r. If given, each location has its own factors.
        device: Device of the factors. Default: the CPU.
        dtype: Floating type of the factors. Half precision factors are drawn in float32 and rounded.
        generator: Default: the global generator of `device`. Trainer's checkpoints restore it, so a resumed training
            run draws the same factors as an uninterrupted one.

    Returns:
        Non-negative factors of shape (b, n), or (r, b, n) with `num_locations`. Each column sums to 1.

    Raises:
        ValueError: If a size is not positive, or if `alpha` is neither a positive number nor an interval of them.

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
        if size is not None or name != "num_locations":
            _check_size(name, size)
    _check_options(dtype, generator)
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

    # Gamma(a) = Gamma(a + 1) U^(1/a), computed as logarithms: for a small alpha, nearly all Gamma(a) variates
    # underflow. Clamping them, as torch's Dirichlet does, would move a column of zeros to the center of the simplex.
    log_gamma = torch._standard_gamma(concentration + 1, generator=generator).log_()
    log_gamma += torch.rand(shape, **options).neg_().log1p_().div_(concentration)
    return log_gamma.softmax(dim=-2).to(dtype)


def sample_sparse_factors(
    num_examples: int,
    num_mixed: int,
    alpha: float | tuple[float, float],
    *,
    examples_per_mix: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
) -> SparseFactors:
    """Draw a few examples of the mini-batch for each mixed example, and their interpolation factors.

    All sets of `examples_per_mix` examples are equally likely, and their factors have a symmetric Dirichlet
    distribution.

    Args:
        num_examples: b, the number of examples in the mini-batch.
        num_mixed: n, the number of mixed examples.
        alpha: Concentration of the Dirichlet distribution, or an interval, as for [`sample_factors`].
        examples_per_mix: m, the number of examples that each mixed example is made of, at most b.
        device: Device of the factors. Default: the CPU.
        dtype: Floating type of the weights.
        generator: Default: the global generator of `device`.

    Returns:
        The factors; each mixed example's weights sum to 1.

    Raises:
        ValueError: If a size is not positive, `examples_per_mix` exceeds `num_examples`, or `alpha` is neither a
            positive number nor an interval of them.

    Source:
        The paper interpolates m < b examples of the mini-batch. Drawing m examples for each mixed example is our
        choice.

    Example:
        >>> factors = sample_sparse_factors(num_examples=128, num_mixed=1000, alpha=0.4, examples_per_mix=8)
        >>> bool(torch.allclose(factors.weight.sum(dim=1), torch.ones(1000)))
        True
    """
    _check_size("num_examples", num_examples)
    _check_size("examples_per_mix", examples_per_mix, least=0)
    if not 1 <= examples_per_mix <= num_examples:
        raise ValueError(
            f"examples_per_mix must be between 1 and the number of examples ({num_examples}), got {examples_per_mix}."
        )
    weight = sample_factors(examples_per_mix, num_mixed, alpha, device=device, dtype=dtype, generator=generator)
    draw = _sets_of_largest if devices.is_accelerator(weight.device) else _sets_of_floyd
    index = draw(num_examples, num_mixed, examples_per_mix, device=device, generator=generator)
    return SparseFactors(index, weight.mT.contiguous(), num_examples)


def _sets_of_floyd(num_examples: int, num_sets: int, size: int, **where: Any) -> Tensor:
    """Draw sets of examples (num_sets, size) by Floyd's algorithm, with as many random numbers as the sets have.

    Draw from 0..j; if already drawn, take j instead.
    """
    index = torch.empty(num_sets, size, dtype=torch.long, device=where["device"])
    uniform = torch.rand(size, num_sets, dtype=torch.float64, **where)
    for column, last in enumerate(range(num_examples - size, num_examples)):
        drawn = (uniform[column] * (last + 1)).long()
        taken = (index[:, :column] == drawn[:, None]).any(dim=1)
        index[:, column] = drawn.masked_fill_(taken, last)
    return index


def _sets_of_largest(num_examples: int, num_sets: int, size: int, **where: Any) -> Tensor:
    """Draw sets of examples (num_sets, size): those with the largest random numbers. It takes two kernels."""
    return torch.rand(num_sets, num_examples, **where).topk(size, dim=1).indices


def sample_permutations(
    num_locations: int,
    num_examples: int,
    *,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw a permutation of the examples for each location, of shape (r, b).

    Locations that share factors and permute the examples have the same distribution of factors as locations with their
    own draws, because the Dirichlet distribution is symmetric in the examples.

    Example:
        >>> sorted(sample_permutations(2, 3)[0].tolist())
        [0, 1, 2]
    """
    _check_size("num_locations", num_locations)
    _check_size("num_examples", num_examples)
    _check_options(torch.float32, generator)
    return torch.rand((num_locations, num_examples), device=device, generator=generator).argsort(dim=1)


def _check_size(name: str, size: Any, least: int = 1) -> None:
    """Raise a ValueError if a size is not a whole number of at least `least`."""
    try:
        is_valid = not isinstance(size, bool) and operator.index(size) >= least
    except TypeError:
        is_valid = False
    if not is_valid:
        raise ValueError(f"{name} must be at least {least} and a whole number, got {size!r}.")


def _check_options(dtype: Any, generator: Any) -> None:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point type such as torch.float32, got {dtype!r}.")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(
            f"generator must be a torch.Generator, got {generator!r}: torch.Generator().manual_seed(seed) makes one."
        )


def check_alpha(alpha: float | tuple[float, float]) -> tuple[float, float]:
    """Return `alpha` as an interval (low, high).

    Raises:
        ValueError: If `alpha` is neither a positive number nor an interval of them.
    """
    try:
        low, high = alpha if isinstance(alpha, (tuple, list)) else (alpha, alpha)
        is_valid = 1e-30 < low <= high < 1e30  # the range of float32, with a margin
    except (TypeError, ValueError):
        is_valid = False
    if not is_valid:
        raise ValueError(
            "alpha must be a positive number or an interval (low, high) with 1e-30 < low <= high < 1e30, got "
            f"{alpha!r}."
        )
    return float(low), float(high)


def alpha_for(effective_examples: float, num_examples: int) -> float:
    """Return the alpha for which a mixed example has about `effective_examples` of `num_examples` examples.

    The effective number of examples of a mixed example is 1 / sum(factor^2). The expectation of its inverse is 1 / k
    with k = (alpha b + 1) / (alpha + 1), hence alpha = (k - 1) / (b - k). For a mini-batch of fewer than 2 k - 1
    examples, such as the last one of an epoch, alpha is 1: the factors are uniform over the simplex.

    Example:
        >>> round(alpha_for(3, num_examples=128), 4)
        0.016
        >>> alpha_for(3, num_examples=4)
        1.0
    """
    is_number = isinstance(effective_examples, (int, float)) and not isinstance(effective_examples, bool)
    if not is_number or not 1 < effective_examples < float("inf"):
        raise ValueError(f"effective_examples must be greater than 1 and finite, got {effective_examples!r}.")
    _check_size("num_examples", num_examples)
    return min(1.0, (effective_examples - 1) / max(num_examples - effective_examples, 1e-9))
