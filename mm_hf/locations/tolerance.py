"""The rule for results that are equal up to rounding."""

from __future__ import annotations

import torch
from torch import Tensor

FULL_PRECISION = 1e-5  # float32 and float64
HALF_PRECISION = 2e-2  # bfloat16 and float16
LARGEST = 5e-2  # A larger error is never attributed to rounding.


def tolerance(dtype: torch.dtype, slack: float = 1.0) -> float:
    """Return the largest relative error that is attributed to rounding.

    Args:
        dtype: The precision in which the results were computed.
        slack: Factor on the tolerance, for results of long or ill-conditioned computations.

    Example:
        >>> tolerance(torch.float32), tolerance(torch.bfloat16), tolerance(torch.bfloat16, slack=100)
        (1e-05, 0.02, 0.05)
    """
    base = FULL_PRECISION if dtype in (torch.float32, torch.float64) else HALF_PRECISION
    return min(slack * base, LARGEST)


def within_rounding(error: float | None, dtype: torch.dtype, slack: float = 1.0) -> bool:
    """Return True if a relative error is at most `tolerance(dtype, slack)`; False for None.

    Example:
        >>> [within_rounding(error, torch.float32) for error in (1e-7, 1e-3, None)]
        [True, False, False]
    """
    return error is not None and error <= tolerance(dtype, slack)


def relative_error(a: Tensor, b: Tensor) -> float:
    """Return the largest absolute difference of two tensors, divided by their largest absolute entry."""
    a, b = a.detach(), b.detach()
    scale = max(float(a.abs().max()), float(b.abs().max()), 1e-12)
    return float((a.double() - b.double()).abs().max()) / scale


def is_close(a: Tensor, b: Tensor, slack: float = 1.0) -> bool:
    """Return True if two tensors have the same shape and are equal up to rounding in the precision of `a`."""
    return a.shape == b.shape and within_rounding(relative_error(a, b), a.dtype, slack)
