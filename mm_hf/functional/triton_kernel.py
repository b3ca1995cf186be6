"""Losses and gradients of mixed logits in Triton. Mixed logits are never written to memory.

As in cut cross-entropy (Wijmans et al., 2024), the first kernel multiplies a block of classes at a time and keeps the
running logarithm of the sum of exponentials. The second one multiplies again, and adds up the gradient of a block of
logits over all mixed examples. A product in float32 is the sum of three products of tensor cores ("tf32x3"), which has
the precision of float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of a block: examples that are added up, classes, mixed examples. tl.dot needs at least 16 of each.
EXAMPLES, CLASSES, MIXED = 32, 64, 32
PRECISION = "tf32x3"  # of tl.dot
LARGEST_GRADIENT = 128  # examples in a block of the gradient; more do not fit the registers


@triton.jit
def _products(
    logits, targets, matrix, v, k, b, c, n, logits_b, logits_v, targets_b, targets_v, matrix_b, matrix_k,
    num_examples: tl.constexpr, num_classes: tl.constexpr, num_mixed: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Return mixed logits and mixed targets (mixed examples k, classes v) of a location."""
    z = tl.zeros([num_mixed, num_classes], dtype=tl.float32)
    y = tl.zeros([num_mixed, num_classes], dtype=tl.float32)
    for start in range(0, b, num_examples):
        i = start + tl.arange(0, num_examples)
        m_mask = (k[:, None] < n) & (i[None, :] < b)
        m = tl.load(matrix + i[None, :] * matrix_b + k[:, None] * matrix_k, mask=m_mask, other=0.0)
        mask = (i[:, None] < b) & (v[None, :] < c)
        x = tl.load(logits + i[:, None] * logits_b + v[None, :] * logits_v, mask=mask, other=0.0)
        t = tl.load(targets + i[:, None] * targets_b + v[None, :] * targets_v, mask=mask, other=0.0)
        z += tl.dot(m, x, input_precision=precision)
        y += tl.dot(m, t, input_precision=precision)
    return z, y


@triton.jit
def _loss_kernel(
    logits, targets, matrix, losses, lse, b, c, n, logits_q, logits_b, logits_v, targets_q, targets_b, targets_v,
    matrix_q, matrix_b, matrix_k, num_examples: tl.constexpr, num_classes: tl.constexpr, num_mixed: tl.constexpr,
    precision: tl.constexpr,
):  # fmt: skip
    q = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * num_mixed + tl.arange(0, num_mixed)
    largest = tl.full([num_mixed], float("-inf"), dtype=tl.float32)
    total = tl.zeros([num_mixed], dtype=tl.float32)
    dot = tl.zeros([num_mixed], dtype=tl.float32)
    mass = tl.zeros([num_mixed], dtype=tl.float32)
    for start in range(0, c, num_classes):
        v = start + tl.arange(0, num_classes)
        z, y = _products(
            logits + q * logits_q, targets + q * targets_q, matrix + q * matrix_q, v, k, b, c, n, logits_b, logits_v,
            targets_b, targets_v, matrix_b, matrix_k, num_examples, num_classes, num_mixed, precision,
        )  # fmt: skip
        dot += tl.sum(y * z, axis=1)
        z = tl.where(v[None, :] < c, z, float("-inf"))
        larger = tl.maximum(largest, tl.max(z, axis=1))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(z - larger[:, None]), axis=1)
        largest = larger
        mass += tl.sum(y, axis=1)
    log_total = largest + tl.log(total)
    tl.store(lse + q * n + k, log_total, mask=k < n)
    tl.store(losses + q * n + k, log_total * mass - dot, mask=k < n)


@triton.jit
def _gradient_kernel(
    logits, targets, matrix, weight, lse, gradient, b, c, n, logits_q, logits_b, logits_v, targets_q, targets_b,
    targets_v, matrix_q, matrix_b, matrix_k, num_examples: tl.constexpr, num_classes: tl.constexpr,
    num_mixed: tl.constexpr, num_gradients: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    q = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * num_classes + tl.arange(0, num_classes)
    i = tl.program_id(2) * num_gradients + tl.arange(0, num_gradients)
    result = tl.zeros([num_gradients, num_classes], dtype=tl.float32)
    for start in range(0, n, num_mixed):
        k = start + tl.arange(0, num_mixed)
        z, y = _products(
            logits + q * logits_q, targets + q * targets_q, matrix + q * matrix_q, v, k, b, c, n, logits_b, logits_v,
            targets_b, targets_v, matrix_b, matrix_k, num_examples, num_classes, num_mixed, precision,
        )  # fmt: skip
        w = tl.load(weight + q * n + k, mask=k < n, other=0.0)[:, None]
        log_total = tl.load(lse + q * n + k, mask=k < n, other=0.0)[:, None]
        g = (tl.exp(z - log_total) - y) * w
        m_mask = (i[:, None] < b) & (k[None, :] < n)
        m = tl.load(matrix + q * matrix_q + i[:, None] * matrix_b + k[None, :] * matrix_k, mask=m_mask, other=0.0)
        result += tl.dot(m, g, input_precision=precision)
    mask = (i[:, None] < b) & (v[None, :] < c)
    tl.store(gradient + q * b * c + i[:, None] * c + v[None, :], result, mask=mask)


def losses_and_gradient(logits: Tensor, targets: Tensor, matrix: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the cross-entropy of mixed logits against mixed targets, and the gradient of the logits.

    Args:
        logits: (q, b, c).
        targets: (q, b, c).
        matrix: (q, b, n), the mixing matrices.
        weight: (q, n), the weight of the gradient of each mixed example.

    Returns:
        The losses (q, n), and the gradient (q, b, c).
    """
    q, b, c = logits.shape
    n = matrix.shape[-1]
    losses, lse = torch.empty_like(weight), torch.empty_like(weight)
    gradient = logits.new_empty(q, b, c)
    blocks = {"num_examples": EXAMPLES, "num_classes": CLASSES, "num_mixed": MIXED, "precision": PRECISION}
    strides = (*logits.stride(), *targets.stride(), *matrix.stride())
    _loss_kernel[(q, triton.cdiv(n, MIXED))](logits, targets, matrix, losses, lse, b, c, n, *strides, **blocks)
    rows = min(LARGEST_GRADIENT, max(16, triton.next_power_of_2(b)))
    _gradient_kernel[(q, triton.cdiv(c, CLASSES), triton.cdiv(b, rows))](
        logits, targets, matrix, weight, lse, gradient, b, c, n, *strides, num_gradients=rows, **blocks
    )
    return losses, gradient
