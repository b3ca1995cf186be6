"""MultiMix and Dense MultiMix as functions: tensors in, a loss out.

Everything here is computed in float32 or better, whatever autocast says, and is differentiable in the logits.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from .chunked_loss import DenseMixingLoss
from .criteria import CRITERIA
from .factors import SparseFactors, sample_factors

__all__ = ["clean_loss", "count_valid", "dense_multimix_loss", "multimix_loss", "sample_factors", "soft_targets"]

IGNORE_INDEX = -100
Criterion = Literal["cross_entropy", "binary_cross_entropy", "mse"]


def clean_loss(
    logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, criterion: Criterion = "cross_entropy"
) -> Tensor:
    """The loss of examples that are not mixed, in float32 or better; zero if nobody takes part.

    Args:
        logits: (b, c), or (b, r, c) for labels at each location.
        labels: For "cross_entropy", class indices (b,) or (b, r), -100 taking no part, or class probabilities of the
            shape of `logits`, a row of zeros taking no part. For "binary_cross_entropy", of the shape of `logits`. For
            "mse" likewise, or (b,) with one output.
        label_smoothing: In [0, 1], for "cross_entropy".
        criterion: "cross_entropy", "binary_cross_entropy" or "mse", the latter two averaged over the outputs.

    Returns:
        The mean over the examples that take part (weighted by the sum of their probabilities), a scalar.

    Example:
        >>> import torch
        >>> logits, labels = torch.randn(8, 10), torch.randint(10, (8,))
        >>> torch.testing.assert_close(clean_loss(logits, labels), torch.nn.functional.cross_entropy(logits, labels))
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.to(dtype)
        if criterion != "cross_entropy":
            targets, _ = soft_targets(labels, logits.shape[-1], dtype, criterion=criterion)
            loss = F.mse_loss if criterion == "mse" else F.binary_cross_entropy_with_logits
            return loss(logits, targets)
        count = count_valid(labels, logits)
        if labels.shape == logits.shape:
            labels = labels.to(dtype).flatten(0, -2)
            mass = labels.sum(dim=-1, keepdim=True)
            # Not cross_entropy's own smoothing, which makes a row of zeros a target.
            labels = (1 - label_smoothing) * labels + label_smoothing * mass / labels.shape[-1]
            label_smoothing = 0.0
        else:
            labels = _check_classes(labels, logits.shape[-1]).flatten()
        total = F.cross_entropy(logits.flatten(0, -2), labels, reduction="sum", label_smoothing=label_smoothing)
        return total / count.clamp(min=torch.finfo(dtype).eps)


def count_valid(labels: Tensor, logits: Tensor, criterion: Criterion = "cross_entropy") -> Tensor:
    """Over how many examples (or locations) [`clean_loss`] is a mean: a scalar, in float32 or better.

    Example:
        >>> import torch
        >>> count_valid(torch.tensor([3, -100, 1]), torch.randn(3, 5))
        tensor(2.)
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if criterion != "cross_entropy":
        return torch.tensor(float(len(labels)), dtype=dtype, device=logits.device)
    if labels.shape == logits.shape:
        return labels.sum(dtype=dtype)
    return (labels != IGNORE_INDEX).sum(dtype=dtype)


def multimix_loss(
    logits: Tensor,
    labels: Tensor,
    factors: Tensor | SparseFactors,
    *,
    label_smoothing: float = 0.0,
    criterion: Criterion = "cross_entropy",
) -> Tensor:
    """Loss of interpolated logits against labels interpolated by the same factors.

    The last layer is linear and each column of `factors` sums to 1, so that this equals interpolating the last
    layer's *inputs*, which is what MultiMix does.

    Args:
        logits: (b, c), one row for each example of the mini-batch.
        labels: (b,) class indices, or (b, c) class probabilities. Examples labelled -100 take no part: their factors
            are dropped and the other factors of the column scaled to sum to 1.
        factors: (b, n) interpolation factors, see [`sample_factors`].
        label_smoothing: In [0, 1]: the share of each target that is spread evenly over the classes.
        criterion: "cross_entropy", or "binary_cross_entropy" (labels (b, c) in [0, 1]) or "mse" (real numbers (b, c), or
            (b,) with one output), the latter two averaged over the c outputs.

    Returns:
        The mean over the n mixed examples, a scalar in float32 (float64 for float64 logits).

    Raises:
        ValueError: The shapes do not fit together.

    Source:
        Venkataramanan et al., NeurIPS 2023, section 3.2.

    Example:
        >>> import torch
        >>> logits, labels = torch.randn(8, 10, requires_grad=True), torch.randint(10, (8,))
        >>> loss = multimix_loss(logits, labels, sample_factors(8, 1000, alpha=1.0))
        >>> loss.backward()
        >>> loss.shape, logits.grad.shape
        (torch.Size([]), torch.Size([8, 10]))
    """
    if logits.ndim != 2:
        raise ValueError(f"logits must have the shape (examples, classes), got {tuple(logits.shape)}.")
    if len(factors.shape) != 2:
        raise ValueError(f"factors must have the shape (examples, mixed), got {tuple(factors.shape)}.")
    attention = logits.new_ones(len(logits), 1, dtype=torch.float32)
    return dense_multimix_loss(
        logits[:, None],
        labels,
        attention,
        factors,
        label_smoothing=label_smoothing,
        confidence_weighted=False,
        criterion=criterion,
    )


def dense_multimix_loss(
    token_logits: Tensor,
    labels: Tensor,
    attention: Tensor,
    factors: Tensor | SparseFactors,
    *,
    label_smoothing: float = 0.0,
    confidence_weighted: bool = True,
    criterion: Criterion = "cross_entropy",
    permutations: Tensor | None = None,
    columns: slice | None = None,
) -> Tensor:
    """MultiMix at every location (patch or token), labels inherited from the examples and weighted by attention.

    At location j the factors are multiplied by the examples' attention there and each column is scaled to sum to 1
    again; the resulting matrix mixes the logits of location j and the labels. The loss is the mean over locations of
    the (weighted) mean over mixed examples. Locations that no example occupies are left out of the mean.

    Args:
        token_logits: (b, r, c), the classifier applied at every location.
        labels: (b,) class indices, or (b, c) class probabilities, inherited by all locations of an example; or labels of
            each location's own: (b, r) class indices or (b, r, c) class probabilities. What is labelled -100, or by a row
            of zeros, takes no part.
        attention: (b, r) >= 0, the confidence of the label of example i at location j. Zero means "not a location of
            this example" (padding, special tokens). Only ratios between examples at one location matter.
        factors: (r, b, n) interpolation factors, or (b, n) shared by all locations, see [`sample_factors`].
        label_smoothing: In [0, 1]: the share of each target that is spread evenly over the classes.
        confidence_weighted: A mixed example counts within its location with the attention mass that it is made of;
            if False, all mixed examples of a location that have any mass count the same.
        criterion: "cross_entropy", or "binary_cross_entropy" (labels (b, c) or (b, r, c) in [0, 1]) or "mse" (real numbers
            likewise, or (b,) with one output), the latter two averaged over the c outputs.
        orders: (r, b) permutations of the examples, with factors (b, n): example i takes row `orders[j, i]` of the
            factors at location j. Each location's factors have the law that the shared ones have, at 1/r of the draws.
        columns: Some of the mixed examples, by their numbers: what these contribute to the mean over all. Processes that
            share the work each take some.

    Returns:
        The loss, a scalar in float32 (float64 for float64 logits). Zero where nobody takes part.

    Raises:
        ValueError: The shapes do not fit together.

    Source:
        Venkataramanan et al., NeurIPS 2023, section 3.3. How mixed examples are weighted within a location is not
        taken from the paper.

    Example:
        >>> import torch
        >>> token_logits, labels = torch.randn(8, 49, 10, requires_grad=True), torch.randint(10, (8,))
        >>> attention = torch.rand(8, 49)
        >>> factors = sample_factors(8, 100, alpha=1.0, num_locations=49)
        >>> dense_multimix_loss(token_logits, labels, attention, factors).backward()
        >>> token_logits.grad.shape
        torch.Size([8, 49, 10])
    """
    _check_shapes(token_logits, labels, attention, factors, permutations, criterion)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must lie in [0, 1], but is {label_smoothing}.")
    if label_smoothing and criterion != "cross_entropy":
        raise ValueError(f"label_smoothing spreads class probabilities and does not go with criterion={criterion!r}.")
    dtype = torch.promote_types(token_logits.dtype, torch.float32)
    with torch.autocast(token_logits.device.type, enabled=False):
        b, r, c = token_logits.shape
        if labels.dtype == torch.bool or (labels.shape == (b, c) and r != c):
            labels = labels.to(dtype)  # probabilities that are all 0 or 1
        if labels.is_floating_point() or criterion != "cross_entropy":
            targets, is_valid = soft_targets(labels, c, dtype, criterion=criterion)
        else:
            is_valid = (labels != IGNORE_INDEX).to(dtype)
            targets = _check_classes(labels, c).masked_fill(labels == IGNORE_INDEX, 0)
        if is_valid.ndim == 1:
            is_valid = is_valid[:, None]
        confidence = (attention.to(dtype) * is_valid).T
        # Only ratios within a location matter; the largest becomes 1 so that tiny attention does not underflow.
        confidence = confidence / confidence.detach().amax(dim=1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
        factors = factors.detach().to(dtype)
        return DenseMixingLoss.apply(
            token_logits,
            targets,
            confidence,
            factors,
            permutations,
            confidence_weighted,
            criterion,
            label_smoothing,
            columns,
        )


def soft_targets(
    labels: Tensor,
    num_classes: int,
    dtype: torch.dtype = torch.float32,
    criterion: Criterion = "cross_entropy",
) -> tuple[Tensor, Tensor]:
    """Labels as targets (..., c), and which take part (...): 0 where labelled -100.

    Labels are class indices (...) if they are integers and the criterion is "cross_entropy"; else they have the shape of
    the targets, or (...) with one output.
    """
    if criterion == "cross_entropy" and not labels.is_floating_point():
        is_valid = (labels != IGNORE_INDEX).to(dtype)
        targets = is_valid.new_zeros(*labels.shape, num_classes)
        targets.scatter_(-1, labels.masked_fill(labels == IGNORE_INDEX, 0)[..., None].long(), 1.0)
    else:
        targets = labels.to(dtype)
        targets = targets[:, None] if targets.ndim == 1 else targets
        is_valid = targets.new_ones(targets.shape[:-1])
        if criterion == "cross_entropy":
            is_valid = (targets.sum(dim=-1) > 0).to(dtype)
    return targets, is_valid


def _check_classes(labels: Tensor, num_classes: int) -> Tensor:
    """Class indices as int64. On a CPU those out of range are refused; a GPU would have to be waited for."""
    labels = labels.long()
    if labels.device.type == "cpu":
        wrong = labels[(labels != IGNORE_INDEX) & ((labels < 0) | (labels >= num_classes))]
        if len(wrong):
            raise ValueError(
                f"labels has the class {int(wrong[0])}, and the logits have {num_classes} classes (0 to {num_classes - 1}; "
                f"{IGNORE_INDEX} takes no part)."
            )
    return labels


def _check_shapes(
    token_logits: Tensor,
    labels: Tensor,
    attention: Tensor,
    factors: Tensor | SparseFactors,
    permutations: Tensor | None,
    criterion: str,
) -> None:
    if token_logits.ndim != 3:
        raise ValueError(
            f"token_logits must have the shape (examples, locations, classes), got {tuple(token_logits.shape)}."
        )
    b, r, c = token_logits.shape
    if criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {', '.join(CRITERIA)}, got {criterion!r}.")
    if criterion == "cross_entropy":
        if labels.shape not in ((b,), (b, c), (b, r), (b, r, c)):
            raise ValueError(
                f"labels must be class indices of shape ({b},) or class probabilities of shape ({b}, {c}), or those of each "
                f"location of shape ({b}, {r}) or ({b}, {r}, {c}), to fit logits of {b} examples, {r} locations and {c} "
                f"classes; got shape {tuple(labels.shape)}."
            )
        if labels.is_floating_point() and (labels.ndim == 1 or labels.shape[-1] != c):
            raise ValueError(
                f"labels of shape {tuple(labels.shape)} must be integers, got {labels.dtype}: class probabilities have the "
                f"shape ({b}, {c})."
            )
    elif labels.shape not in ((b, c), (b, r, c), *([(b,)] if c == 1 else [])):
        raise ValueError(
            f"labels must have the shape ({b}, {c}) or ({b}, {r}, {c}) for criterion={criterion!r} and {c} outputs, got "
            f"{tuple(labels.shape)}."
        )
    if attention.shape != (b, r):
        raise ValueError(
            f"attention must have the shape (examples, locations) = ({b}, {r}), got {tuple(attention.shape)}."
        )
    shape = tuple(factors.shape)
    if len(shape) not in (2, 3) or shape[-2] != b or (len(shape) == 3 and shape[0] != r):
        raise ValueError(
            f"factors must have the shape (locations, examples, mixed) = ({r}, {b}, n) or (examples, mixed) = ({b}, n), "
            f"got {shape}."
        )
    if permutations is not None and (permutations.shape != (r, b) or len(shape) != 2):
        raise ValueError(
            f"orders must have the shape (locations, examples) = ({r}, {b}), with factors of shape (examples, mixed); got "
            f"{tuple(permutations.shape)} with factors of shape {shape}."
        )
