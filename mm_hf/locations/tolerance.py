"""When two results of a recorded forward are the same: up to rounding, through an activation, up to a factor."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .recording import Call


def tolerance(x: Tensor) -> float:
    """How far apart two ways to the same result may end, relatively, in the arithmetic of `x`."""
    return 1e-5 if x.dtype in (torch.float32, torch.float64) else 2e-2


def relative_error(a: Tensor, b: Tensor) -> float:
    """Largest difference of two tensors relative to the larger one's largest entry."""
    a, b = a.detach(), b.detach()
    scale = max(float(a.abs().max()), float(b.abs().max()), 1e-12)
    return float((a.double() - b.double()).abs().max()) / scale


def is_close(a: Tensor, b: Tensor, limit: float | None = None) -> bool:
    """Whether two tensors are equal up to a relative error."""
    return a.shape == b.shape and relative_error(a, b) <= (tolerance(a) if limit is None else limit)


def is_vector(x: Tensor) -> bool:
    """One vector an example, with or without dimensions of size 1 for a single token or pixel."""
    return x.ndim == 2 or (x.ndim == 3 and 1 in x.shape[1:]) or (x.ndim == 4 and x.shape[2:] == (1, 1))


def returns(call: Call, target: Tensor) -> bool:
    """Whether a module's one result is `target`, a vector an example."""
    return mismatch(call, target) <= tolerance(target)


def mismatch(call: Call, target: Tensor, activation: Any = None) -> float:
    """How far a module's one result, a vector an example (through an activation), is from `target`."""
    result = _vector(call, target)
    if result is None:
        return math.inf
    result = result if activation is None else activation(result)
    return relative_error(result, target) if result.shape == target.shape else math.inf


def scale_between(call: Call, target: Tensor) -> float | None:
    """The number by which a module's one result was multiplied to give `target`, if it was."""
    result = _vector(call, target)
    if result is None:
        return None
    limit = tolerance(target)
    result, target = result.detach().double(), target.detach().double()
    scale = round(float((result * target).sum() / result.square().sum().clamp(min=1e-30)), 6)
    return scale if scale and is_close(scale * result, target, limit) else None


def _vector(call: Call, target: Tensor) -> Tensor | None:
    """A module's one result as a vector an example, if it has as many numbers as `target`."""
    result = call.results.get(None)
    return result.flatten(1) if result is not None and is_vector(result) and result.numel() == target.numel() else None
