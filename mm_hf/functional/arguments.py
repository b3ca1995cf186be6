"""Checks of the arguments of the losses. Each error names the argument, its value and a valid one.

Shapes, dtypes and settings are always checked. Values of tensors are checked on a CPU with a ValueError. On other
devices a ValueError would need to wait for the device: `torch._assert_async` checks the values there without
synchronization, and the device reports a failed assertion at a later operation.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .criteria import CRITERIA
from .factors import SparseFactors

IGNORE_INDEX = -100
# Rounding of sums of factors or class probabilities, for float32 and for shorter types.
TOLERANCE = 1e-3
WITHOUT_ASSERT = ("meta", "mps")  # devices that do not implement torch._assert_async


def check_settings(criterion: str, label_smoothing: float) -> None:
    """Check the criterion and the label smoothing."""
    if criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {', '.join(CRITERIA)}, got {criterion!r}.")
    is_number = isinstance(label_smoothing, (int, float)) and not isinstance(label_smoothing, bool)
    if not is_number or not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be a number in [0, 1], got {label_smoothing!r}.")
    if label_smoothing and criterion != "cross_entropy":
        raise ValueError(
            f"label_smoothing must be 0 with criterion={criterion!r}, got {label_smoothing}: it applies to class "
            "probabilities only."
        )


def check_tensors(**tensors: Tensor | SparseFactors | None) -> None:
    """Check that arguments are dense tensors on the device of the first one, which are the logits.

    `factors` may be sparse ones, and `permutations` may be None.
    """
    name_of_logits, logits = next(iter(tensors.items()))
    for name, given in tensors.items():
        if given is None and name == "permutations":
            continue
        x = given.weight if isinstance(given, SparseFactors) and name == "factors" else given
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(x).__name__}: convert it with torch.as_tensor.")
        if x.layout is not torch.strided:
            raise ValueError(f"{name} must be a dense tensor, got the layout {x.layout}: convert it with .to_dense().")
        assert isinstance(logits, Tensor)
        if x.device != logits.device:
            raise ValueError(f"{name} must be on the device of {name_of_logits}, {logits.device}, got {x.device}.")


def check_differentiable(**constants: Tensor | SparseFactors) -> None:
    """Check that no gradient is requested that the MultiMix losses do not compute."""
    if torch._C._are_functorch_transforms_active():
        raise ValueError(
            "The MultiMix losses do not support the transforms of torch.func, such as grad and vmap: use backward() or "
            "torch.autograd.grad()."
        )
    for name, x in constants.items():
        if torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad:
            raise ValueError(
                f"{name} must not require a gradient: the loss is differentiable in the logits and the attention only. "
                f"Pass {name}.detach()."
            )


def check_logits(name: str, logits: Tensor, dimensions: str) -> None:
    """Check that logits have the right number of dimensions, none of them empty, and a floating type."""
    names = dimensions.split(", ")
    if logits.ndim != len(names) or 0 in logits.shape:
        raise ValueError(f"{name} must have the shape ({dimensions}), none of them 0, got {tuple(logits.shape)}.")
    if not logits.is_floating_point() or logits.itemsize < 2:
        raise ValueError(
            f"{name} must have a floating-point dtype of 16 bits or more, got {logits.dtype}: convert it with .float()."
        )


def check_label_shape(labels: Tensor, b: int, r: int, c: int, criterion: str) -> None:
    """Check that labels fit logits (b, r, c)."""
    shape = tuple(labels.shape)
    if criterion != "cross_entropy":
        if shape not in ((b, c), (b, r, c), *([(b,)] if c == 1 else [])):
            raise ValueError(
                f"labels must have the shape ({b}, {c}) or ({b}, {r}, {c}) for criterion={criterion!r} and {c} "
                f"outputs, got {shape}."
            )
        return
    if shape not in ((b,), (b, c), (b, r), (b, r, c)):
        raise ValueError(
            f"labels must be class indices of shape ({b},) or class probabilities of shape ({b}, {c}), or those of "
            f"each location, of shape ({b}, {r}) or ({b}, {r}, {c}), for logits of {b} examples, {r} locations and {c} "
            f"classes; got shape {shape}."
        )
    if labels.is_floating_point() and (labels.ndim == 1 or shape[-1] != c):
        raise ValueError(
            f"labels of shape {shape} must be integers, got {labels.dtype}; class probabilities must have the shape "
            f"({b}, {c})."
        )


def convert_labels(labels: Tensor, r: int, c: int) -> Tensor:
    """Convert labels for "cross_entropy" to class indices in int64, or to floating-point class probabilities.

    Floating-point labels are probabilities. Boolean and integer labels of the shape of the targets are one-hot. As many
    locations as classes make (b, r) and (b, c) the same shape: then booleans are one-hot and integers class indices.
    """
    if labels.is_floating_point():
        return labels
    one_hot = labels.ndim == 3 or (labels.ndim == 2 and labels.shape[1] == c and (r != c or labels.dtype == torch.bool))
    return labels.to(torch.float32 if one_hot else torch.int64)


def check_class_indices(labels: Tensor, num_classes: int, validate_args: bool = True) -> None:
    """Check the range of class indices in int64; on a CPU also without `validate_args`, since it costs little there."""
    if not validate_args and labels.device.type != "cpu":
        return
    valid = (labels.clamp(0, num_classes - 1) == labels) | (labels == IGNORE_INDEX)
    require(
        valid.all(),
        lambda: (
            f"labels must be class indices from 0 to {num_classes - 1}, or {IGNORE_INDEX} to be ignored, for logits of "
            f"{num_classes} classes; got {int(labels[~valid][0])}."
        ),
    )


def check_targets(labels: Tensor, criterion: str, partial_rows: bool = False) -> None:
    """Check the values of floating-point labels.

    Args:
        labels: The labels (..., c).
        criterion: A key of `CRITERIA`.
        partial_rows: For "cross_entropy", also accept rows that sum to less than 1.
    """
    labels = labels.detach()
    if criterion == "mse":
        require(labels.isfinite().all(), lambda: f"labels must be finite, got {_first(labels, ~labels.isfinite())}.")
        return
    outside = ~((labels >= 0) & (labels <= 1 + tolerance_of(labels)))
    require(
        ~outside.any(),
        lambda: f"labels must be probabilities in [0, 1] or class indices, got {_first(labels, outside)}.",
    )
    if criterion == "cross_entropy":
        sums = labels.sum(dim=-1, dtype=torch.promote_types(labels.dtype, torch.float32))
        wrong = (
            sums > 1 + tolerance_of(labels) if partial_rows else ((sums - 1).abs() > tolerance_of(labels)) & (sums != 0)
        )
        require(
            ~wrong.any(),
            lambda: (
                f"labels must have rows that sum to 1, or to 0 to be ignored, got a sum of {_first(sums, wrong)}: "
                'divide each row by its sum, or use criterion="binary_cross_entropy" for several classes per example.'
            ),
        )


def check_one_hot_is_unambiguous(labels: Tensor, r: int, c: int) -> None:
    """Reject integer one-hot labels where they have the shape of class indices per location."""
    if r != c or labels.ndim != 2 or labels.is_floating_point() or labels.dtype == torch.bool:
        return
    if len(labels) * (c - 1) * math.log(c) < 20:  # random class indices are one-hot in all rows with probability e^-20
        return
    one_hot = ((labels == 0) | (labels == 1)).all() & (labels.sum(dim=1) == 1).all()
    require(
        ~one_hot,
        lambda: (
            f"labels of shape {tuple(labels.shape)} and dtype {labels.dtype} may be one-hot or class indices of each "
            "location: convert one-hot labels with .float(), or pass class indices with validate_args=False."
        ),
    )


def check_attention(attention: Tensor, b: int, r: int) -> None:
    """Check the shape of the attention."""
    if attention.shape != (b, r):
        raise ValueError(
            f"attention must have the shape (examples, locations) = ({b}, {r}), got {tuple(attention.shape)}."
        )


def check_attention_values(attention: Tensor) -> None:
    """Check that the attention is finite and not negative."""
    attention = attention.detach()
    require(
        (attention.amin() >= 0) & (attention.amax() < torch.inf),
        lambda: (
            "attention must be finite and not negative, got "
            f"{_first(attention, ~((attention >= 0) & (attention < torch.inf)))}; use 0 for padding."
        ),
    )


def check_factors(factors: Tensor | SparseFactors, b: int, r: int) -> None:
    """Check the shape of the factors."""
    shape = tuple(factors.shape)
    if len(shape) not in (2, 3) or shape[-2] != b or (len(shape) == 3 and shape[0] != r) or shape[-1] == 0:
        raise ValueError(
            f"factors must have the shape (locations, examples, mixed) = ({r}, {b}, n), or (examples, mixed) = ({b}, "
            f"n), for n >= 1; got {shape}."
        )


def check_factor_values(factors: Tensor | SparseFactors) -> None:
    """Check that factors are not negative and sum to 1 in each mixed example, and that sparse ones name examples."""
    if isinstance(factors, SparseFactors):
        values, dim, index = factors.weight.detach(), 1, factors.index.sort(dim=1).values
        distinct = (index[:, 1:] > index[:, :-1]).all()
        require(
            (index[:, 0].amin() >= 0) & (index[:, -1].amax() < factors.num_examples) & distinct,
            lambda: (
                f"factors.index must have rows of distinct examples from 0 to {factors.num_examples - 1}, got "
                f"examples from {int(index.min())} to {int(index.max())}"
                f"{'' if bool(distinct) else ', some of them twice in a row'}."
            ),
        )
    else:
        values, dim = factors.detach(), -2
    sums = values.sum(dim=dim, dtype=torch.promote_types(values.dtype, torch.float32))
    deviation, tolerance = (sums - 1).abs(), tolerance_of(values)
    require(
        (values.amin() >= 0) & (deviation.amax() <= tolerance),
        lambda: (
            f"factors must not be negative, got {_first(values, ~(values >= 0))}; sample_factors draws valid ones."
            if bool((~(values >= 0)).any())
            else f"factors must sum to 1 for each mixed example, got {_first(sums, ~(deviation <= tolerance))}: divide "
            "each column by its sum."
        ),
    )


def check_permutations(permutations: Tensor | None, b: int, r: int, factors: Tensor | SparseFactors) -> None:
    """Check the shape and dtype of the permutations."""
    if permutations is None:
        return
    shape = tuple(factors.shape)
    if permutations.shape != (r, b) or len(shape) != 2:
        raise ValueError(
            f"permutations must have the shape (locations, examples) = ({r}, {b}), with factors of shape (examples, "
            f"mixed); got {tuple(permutations.shape)} with factors of shape {shape}."
        )
    if permutations.dtype != torch.int64:
        raise ValueError(f"permutations must have the dtype torch.int64, got {permutations.dtype}: use .long().")


def check_permutation_values(permutations: Tensor | None) -> None:
    """Check that each row contains every example once."""
    if permutations is None:
        return
    b = permutations.shape[1]
    in_range = (permutations >= 0) & (permutations < b)
    found = torch.zeros_like(permutations, dtype=torch.bool).scatter_(1, permutations.clamp(0, b - 1), True)
    valid = (in_range & found).all(dim=1)
    require(
        valid.all(),
        lambda: (
            f"permutations must contain each of the {b} examples once per row, got the row "
            f"{permutations[~valid][0].tolist()[:8]}; sample_permutations draws valid ones."
        ),
    )


def check_columns(columns: slice | None, num_mixed: int) -> None:
    """Check that a slice of the mixed examples has ends within their number."""
    if columns is None:
        return
    ends = (columns.start, columns.stop)
    if (
        columns.step not in (None, 1)
        or not all(isinstance(end, int) for end in ends)
        or not (0 <= columns.start <= columns.stop <= num_mixed)
    ):
        raise ValueError(
            f"columns must be slice(start, stop) with 0 <= start <= stop <= {num_mixed}, the number of mixed examples; "
            f"got {columns}."
        )


def require(
    condition: Tensor,
    message: Callable[[], str],
    on_device: str = "An argument of an mm_hf loss has an invalid value; the CPU reports which one.",
) -> None:
    """Raise a ValueError on a CPU if a condition is false; assert it without synchronization on other devices.

    Args:
        condition: A boolean scalar.
        message: Function that returns the message of the ValueError. It may read values.
        on_device: Message of the assertion.
    """
    if condition.device.type == "cpu":
        if not bool(condition):
            raise ValueError(message())
    elif condition.device.type not in WITHOUT_ASSERT:
        torch._assert_async(condition, on_device)


def tolerance_of(x: Tensor) -> float:
    """Return the tolerance of sums of `x`."""
    return max(TOLERANCE, 4 * torch.finfo(x.dtype).eps) if x.is_floating_point() else TOLERANCE


def _first(x: Tensor, wrong: Tensor) -> float:
    """Return the first wrong value."""
    return float(x[wrong][0])
