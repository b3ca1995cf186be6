"""MultiMix and Dense MultiMix losses as pure functions.

The losses are computed in float32 or float64, also under autocast, and are differentiable in the logits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from . import arguments
from .arguments import IGNORE_INDEX
from .chunked_loss import DenseMixingLoss
from .criteria import Criterion, mask_infinite
from .factors import SparseFactors
from .inputs import LossOptions
from .kernels import KERNELS, Kernel
from .targets import count_valid, soft_targets


def clean_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    criterion: Criterion = "cross_entropy",
    validate_args: bool = True,
) -> Tensor:
    """Compute the loss of examples that are not mixed.

    Args:
        logits: (b, c), or (b, r, c) with labels of each location.
        labels: For "cross_entropy", class indices (b,) or (b, r), where -100 is ignored, or class probabilities of the
            shape of `logits`, where a row of zeros is ignored and a row that sums to less than 1 weighs less. For
            "binary_cross_entropy", of the shape of `logits`. For "mse", of the shape of `logits`, or (b,) with one
            output.
        label_smoothing: Share of each target that is spread evenly over the classes, in [0, 1]. For "cross_entropy".
        criterion: "cross_entropy", "binary_cross_entropy" or "mse". The latter two are averaged over the outputs.
        validate_args: As for [`dense_multimix_loss`].

    Returns:
        The mean over the valid examples (weighted by the sum of their probabilities), a scalar in float32 (float64 for
        float64 logits). 0 if every label is ignored.

    Raises:
        ValueError: If an argument has the wrong shape or an invalid value.

    Example:
        >>> import torch
        >>> logits, labels = torch.randn(8, 10), torch.randint(10, (8,))
        >>> torch.testing.assert_close(clean_loss(logits, labels), torch.nn.functional.cross_entropy(logits, labels))
    """
    arguments.check_settings(criterion, label_smoothing)
    arguments.check_tensors(logits=logits, labels=labels)
    arguments.check_logits("logits", logits, "b, c" if logits.ndim != 3 else "b, r, c")
    one_output = criterion != "cross_entropy" and logits.shape[1:] == (1,)
    has_index_shape = labels.shape == logits.shape[:-1] and (criterion == "cross_entropy" or one_output)
    if labels.shape != logits.shape and not has_index_shape:
        raise ValueError(
            f"labels must have the shape {tuple(logits.shape[:-1])} or {tuple(logits.shape)} of class indices or "
            f"targets for criterion={criterion!r}, got {tuple(labels.shape)}."
        )
    if criterion == "cross_entropy" and has_index_shape and labels.is_floating_point():
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} must be integers, got {labels.dtype}; class probabilities must "
            f"have the shape {tuple(logits.shape)}."
        )
    dtype = torch.promote_types(logits.dtype, torch.float32)
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.to(dtype)
        if validate_args and (not has_index_shape or one_output):
            arguments.check_targets(labels.to(dtype), criterion, partial_rows=True)
        if criterion != "cross_entropy":
            targets, _ = soft_targets(labels, logits.shape[-1], dtype, criterion=criterion)
            if criterion == "mse":
                return F.mse_loss(logits, targets)
            return F.binary_cross_entropy_with_logits(mask_infinite(logits), targets)
        count = count_valid(labels, logits)
        if has_index_shape:
            labels = labels.long()
            arguments.check_class_indices(labels, logits.shape[-1], validate_args)
            labels = labels.flatten()
        else:
            logits = mask_infinite(logits - logits.detach().amax(dim=-1, keepdim=True))
            labels = labels.to(dtype).flatten(0, -2)
            mass = labels.sum(dim=-1, keepdim=True)
            # The label_smoothing of F.cross_entropy would turn a row of zeros into a target.
            labels = (1 - label_smoothing) * labels + label_smoothing * mass / labels.shape[-1]
            label_smoothing = 0.0
        total = F.cross_entropy(logits.flatten(0, -2), labels, reduction="sum", label_smoothing=label_smoothing)
        return total / count.clamp(min=torch.finfo(dtype).eps)


def multimix_loss(
    logits: Tensor,
    labels: Tensor,
    factors: Tensor | SparseFactors,
    *,
    label_smoothing: float = 0.0,
    criterion: Criterion = "cross_entropy",
    validate_args: bool = True,
) -> Tensor:
    """Compute the MultiMix loss: interpolated logits against labels interpolated by the same factors.

    MultiMix interpolates the inputs of the last layer. Because that layer is linear and each column of `factors` sums
    to 1, interpolating its outputs gives the same loss.

    Args:
        logits: (b, c), one row for each example of the mini-batch.
        labels: (b,) class indices, or (b, c) class probabilities. Examples labeled -100 are ignored: their factors are
            dropped, and the other factors of each column are scaled to sum to 1.
        factors: (b, n) interpolation factors, see [`sample_factors`] and
            [`sample_sparse_factors`][mm_hf.functional.factors.sample_sparse_factors].
        label_smoothing: Share of each target that is spread evenly over the classes, in [0, 1]. For "cross_entropy".
        criterion: "cross_entropy", "binary_cross_entropy" (labels (b, c) in [0, 1]) or "mse" (real numbers (b, c), or
            (b,) with one output). The latter two are averaged over the c outputs.
        validate_args: As for [`dense_multimix_loss`].

    Returns:
        The mean over the n mixed examples, a scalar in float32 (float64 for float64 logits). 0 if every label is
        ignored.

    Raises:
        ValueError: If an argument has the wrong shape or an invalid value.

    Source:
        Venkataramanan et al., NeurIPS 2023, section 3.2.

    Example:
        >>> import torch
        >>> from mm_hf.functional import sample_factors
        >>> logits, labels = torch.randn(8, 10, requires_grad=True), torch.randint(10, (8,))
        >>> loss = multimix_loss(logits, labels, sample_factors(8, 1000, alpha=1.0))
        >>> loss.backward()
        >>> loss.shape, logits.grad.shape
        (torch.Size([]), torch.Size([8, 10]))
    """
    arguments.check_tensors(logits=logits, labels=labels, factors=factors)
    arguments.check_logits("logits", logits, "examples, classes")
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
        validate_args=validate_args,
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
    kernel: Kernel = "eager",
    validate_args: bool = True,
) -> Tensor:
    """Compute the Dense MultiMix loss: MultiMix at every location (patch or token), weighted by attention.

    At location j, the factors are multiplied by the attention of the examples and each column is scaled to sum to 1.
    The resulting matrix mixes the logits of location j and the labels, which locations inherit from their examples. The
    loss is the mean over locations of the weighted mean over mixed examples. Locations that no example occupies are
    left out.

    Args:
        token_logits: (b, r, c), the classifier applied at every location.
        labels: (b,) class indices or (b, c) class probabilities, inherited by all locations of an example; or (b, r)
            class indices or (b, r, c) class probabilities of each location. The index -100 and rows of zeros are
            ignored.
        attention: (b, r) >= 0, the confidence in the label of example i at location j. 0 marks padding and special
            tokens, which are not mixed. The loss depends only on the ratios between the examples at a location.
        factors: (r, b, n) interpolation factors, or (b, n) shared by all locations, see [`sample_factors`] and
            [`sample_sparse_factors`][mm_hf.functional.factors.sample_sparse_factors].
        label_smoothing: Share of each target that is spread evenly over the classes, in [0, 1]. For "cross_entropy".
        confidence_weighted: If True, weigh the mixed examples of a location by their attention mass; if False, all that
            have mass weigh the same.
        criterion: "cross_entropy", "binary_cross_entropy" (labels (b, c) or (b, r, c) in [0, 1]) or "mse" (real numbers
            of these shapes, or (b,) with one output). The latter two are averaged over the c outputs.
        permutations: (r, b) permutations of the examples, for shared factors: example i has row `permutations[j, i]` of
            the factors at location j. Each location's factors keep their distribution, and only one set of factors is
            drawn.
        columns: A slice of the mixed examples. The loss is then their contribution to the mean over all mixed examples.
            Ranks that share the work compute one slice each.
        kernel: "eager"; "compile", which fuses the operations between the matrix products with `torch.compile`; or
            "triton", which never writes mixed logits to memory, for cross-entropy with a constant attention. The first
            result of the latter two is compared with that of "eager", which is used with a warning if they fail.
        validate_args: Check the values of labels, attention, factors and permutations. An invalid value raises a
            ValueError on a CPU; on other devices, `torch._assert_async` checks the values without synchronization. If
            False, only shapes, dtypes, settings and, on a CPU, class indices are checked.

    Returns:
        The loss, a scalar in float32 (float64 for float64 logits). 0 if no location is occupied by a valid example.

    Raises:
        ValueError: If an argument has the wrong shape or an invalid value.

    Source:
        Venkataramanan et al., NeurIPS 2023, section 3.3. How mixed examples are weighted within a location is not
        taken from the paper.

    Example:
        >>> import torch
        >>> from mm_hf.functional import sample_factors
        >>> token_logits, labels = torch.randn(8, 49, 10, requires_grad=True), torch.randint(10, (8,))
        >>> attention = torch.rand(8, 49)
        >>> factors = sample_factors(8, 100, alpha=1.0, num_locations=49)
        >>> dense_multimix_loss(token_logits, labels, attention, factors).backward()
        >>> token_logits.grad.shape
        torch.Size([8, 49, 10])
    """
    options = LossOptions(criterion, label_smoothing, confidence_weighted, columns, kernel)
    return loss_and_occupied(token_logits, labels, attention, factors, permutations, options, validate_args)[0]


def loss_and_occupied(
    token_logits: Tensor,
    labels: Tensor,
    attention: Tensor,
    factors: Tensor | SparseFactors,
    permutations: Tensor | None,
    options: LossOptions,
    validate_args: bool,
) -> tuple[Tensor, Tensor]:
    """Compute [`dense_multimix_loss`], and the number of locations that it is a mean over: an integer scalar."""
    criterion = options.criterion
    arguments.check_settings(criterion, options.label_smoothing)
    if options.kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, got {options.kernel!r}.")
    arguments.check_tensors(
        token_logits=token_logits, labels=labels, attention=attention, factors=factors, permutations=permutations
    )
    arguments.check_differentiable(labels=labels, factors=factors)
    arguments.check_logits("token_logits", token_logits, "examples, locations, classes")
    b, r, c = token_logits.shape
    arguments.check_label_shape(labels, b, r, c, criterion)
    arguments.check_attention(attention, b, r)
    arguments.check_factors(factors, b, r)
    arguments.check_permutations(permutations, b, r, factors)
    arguments.check_columns(options.columns, factors.shape[-1])
    if validate_args:
        arguments.check_attention_values(attention)
        arguments.check_factor_values(factors)
        arguments.check_permutation_values(permutations)
        if criterion == "cross_entropy":
            arguments.check_one_hot_is_unambiguous(labels, r, c)
    dtype = torch.promote_types(token_logits.dtype, torch.float32)
    with torch.autocast(token_logits.device.type, enabled=False):
        labels = arguments.convert_labels(labels, r, c) if criterion == "cross_entropy" else labels.to(dtype)
        if labels.is_floating_point():
            if validate_args:
                arguments.check_targets(labels, criterion)
            targets, is_valid = soft_targets(labels, c, dtype, criterion=criterion)
            ignored = is_valid == 0
        else:
            arguments.check_class_indices(labels, c, validate_args)
            ignored = labels == IGNORE_INDEX
            targets = labels.masked_fill(ignored, 0)
        if ignored.ndim == 1:
            ignored = ignored[:, None]
        # The loss depends only on ratios within a location. They are kept in float64 on a CPU; MPS devices have none.
        confidence = attention.to(torch.float64 if attention.device.type == "cpu" else dtype)
        if confidence.requires_grad:
            # A gradient beyond the range of the attention's type is that of a label that hardly counts: padding, whose
            # attention was multiplied by 0, would turn an infinite one into NaN.
            limit = torch.finfo(attention.dtype).max
            confidence.register_hook(lambda grad: grad.clamp(-limit, limit))
        confidence = confidence.masked_fill(ignored, 0).T  # a product would turn an infinite gradient into NaN
        confidence = confidence / confidence.detach().amax(dim=1, keepdim=True).clamp(
            min=torch.finfo(confidence.dtype).tiny
        )
        return DenseMixingLoss.apply(
            token_logits, confidence, targets, factors.detach().to(dtype), permutations, options
        )
