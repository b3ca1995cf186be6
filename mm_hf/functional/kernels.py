"""Kernels that compute a chunk of the loss: PyTorch's operations one by one ("eager"), compiled, or written in Triton.

"compile" fuses the operations between the matrix products to one pass. "triton" never writes mixed logits to memory
(triton_kernel.py). Both are optional: on a GPU, "compile" takes 0.8 to 6 times the kernels' time of the eager
operations, depending on the sizes, and "triton" takes longer and needs less memory (docs/gpu.md). At its first use on a
kind of device, each is compared with the eager operations; if it fails or differs, a warning is given once and the
eager operations are used instead.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .criteria import CRITERIA, ClassTargets, Criterion

Kernel = Literal["eager", "compile", "triton"]
KERNELS: tuple[str, ...] = get_args(Kernel)
TOLERANCE = 1e-4  # relative to the largest number of a result; rounding errors are below 1e-6


class MixedTerms(NamedTuple):
    """Losses of a chunk's mixed examples, and gradients that are weighted but not yet mixed back.

    Attributes:
        losses: (o, i).
        logits_grad: (o, c, i).
        targets_grad: (o, c, i), or None unless asked for.
        scale_grad: (o, i), the gradient of `scale` before weighting, or None unless asked for.
    """

    losses: Tensor
    logits_grad: Tensor
    targets_grad: Tensor | None
    scale_grad: Tensor | None


def mixed_terms(
    criterion: Criterion,
    logits: Tensor,
    targets: Tensor | ClassTargets,
    scale: Tensor | None,
    share: Tensor,
    need_targets_grad: bool,
) -> MixedTerms:
    """Compute losses and gradients of mixed logits, in place unless it is compiled.

    Args:
        criterion: A key of `CRITERIA`.
        logits: (o, c, i), mixed and not yet scaled.
        targets: The same for the targets; those of `ClassTargets` are scaled.
        scale: (o, 1, i), the inverse mass; None if logits and targets are scaled and it needs no gradient.
        share: (o, 1, i), the weight of each loss.
        need_targets_grad: Compute the gradients of the targets and of `scale`, too.
    """
    if scale is not None and torch.compiler.is_compiling():  # a change of the arguments would be written to memory
        logits = logits * scale
        targets = targets * scale if isinstance(targets, Tensor) else targets
    elif scale is not None:
        logits.mul_(scale)
        targets = targets.mul_(scale) if isinstance(targets, Tensor) else targets
    original = logits.clone() if need_targets_grad else logits  # the criteria overwrite their input
    losses, grad, targets_grad = CRITERIA[criterion](logits, targets, need_targets_grad)
    share, scale_grad = share if scale is None else share * scale, None
    if targets_grad is not None:
        assert isinstance(targets, Tensor)
        scale_grad = (grad * original).sum(dim=1) + (targets_grad * targets).sum(dim=1)
        targets_grad = targets_grad.mul_(share)
    return MixedTerms(losses, grad.mul_(share), targets_grad, scale_grad)


_compiled_terms: Callable[..., MixedTerms] | None = None


def compiled_terms(*args: Any) -> MixedTerms:
    """Compute `mixed_terms` in one graph for all sizes of chunks, compiled at the first call."""
    global _compiled_terms
    if _compiled_terms is None:
        _compiled_terms = torch.compile(mixed_terms, dynamic=True, fullgraph=True)
    return _compiled_terms(*args)


_is_equal: dict[tuple[str, str, str], bool] = {}  # by kernel, kind of device and criterion


def run(
    kernel: Kernel,
    device: torch.device,
    criterion: Criterion,
    compute: Callable[[Callable[..., MixedTerms]], tuple[Tensor, ...]],
    in_triton: Callable[[], tuple[Tensor, ...]] | None = None,
) -> tuple[Tensor, ...]:
    """Compute a chunk with a kernel, or with the eager operations if it fails or its first result differs from theirs.

    Args:
        kernel: One of `KERNELS`.
        device: Device of the chunk.
        criterion: A key of `CRITERIA`.
        compute: Computes the chunk, given `mixed_terms` or its compiled form.
        in_triton: Computes the chunk in Triton; None if that is not implemented, and the eager operations are used.
    """
    eager = partial(compute, mixed_terms)
    fast = {"compile": partial(compute, compiled_terms), "triton": in_triton}.get(kernel)
    # A mode such as FlopCounterMode observes single operations, and a compiled function does not run in one.
    if fast is None or is_in_torch_dispatch_mode():
        return eager()
    key = (kernel, device.type, criterion)
    if key not in _is_equal:
        problem = _problem(fast, eager)
        _is_equal[key] = not problem
        if problem:
            warnings.warn(
                f"kernel={kernel!r} is not used on {device.type} for {criterion}, but the eager operations: {problem}",
                stacklevel=2,
            )
    return fast() if _is_equal[key] else eager()


def _problem(fast: Callable[[], tuple[Tensor, ...]], eager: Callable[[], tuple[Tensor, ...]]) -> str:
    """Return the reason why a fast function cannot be used, or an empty string."""
    try:
        found = fast()
    except Exception as error:  # no compiler, no Triton, or a device that they do not support
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    for a, b in zip(found, eager(), strict=True):
        largest = float((a - b).abs().max()) if a.numel() else 0.0
        if not largest <= TOLERANCE * max(float(b.abs().max()) if b.numel() else 0.0, 1e-30):
            return f"its first result differs by {largest:.1e}."
    return ""
