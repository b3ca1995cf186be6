"""Losses and gradients of mixed logits in Triton. Mixed logits are never written to memory.

As in cut cross-entropy (Wijmans et al., 2024), the first kernel multiplies a block of classes at a time and keeps the
running logarithm of the sum of exponentials. The second one multiplies again, and adds up the gradient of a block of
logits over all mixed examples. Products are computed in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of a block: examples, classes, mixed examples. tl.dot needs at least 16 of each.
EXAMPLES, CLASSES, MIXED = 32, 64, 64


@triton.jit
def _products(
    logits, targets, factors, v, k, b, c, n, stride_b, stride_k, num_examples: tl.constexpr, num_classes: tl.constexpr,
    num_mixed: tl.constexpr,
):  # fmt: skip
    """Return the products of logits (c, b) and of targets with factors (b, n), for classes v and mixed examples k."""
    z = tl.zeros([num_classes, num_mixed], dtype=tl.float32)
    y = tl.zeros([num_classes, num_mixed], dtype=tl.float32)
    for start in range(0, b, num_examples):
        i = start + tl.arange(0, num_examples)
        f_mask = (i[:, None] < b) & (k[None, :] < n)
        f = tl.load(factors + i[:, None] * stride_b + k[None, :] * stride_k, mask=f_mask, other=0.0)
        x_mask = (v[:, None] < c) & (i[None, :] < b)
        offsets = v[:, None] * b + i[None, :]
        z += tl.dot(tl.load(logits + offsets, mask=x_mask, other=0.0), f, input_precision="ieee")
        y += tl.dot(tl.load(targets + offsets, mask=x_mask, other=0.0), f, input_precision="ieee")
    return z, y


@triton.jit
def _loss_kernel(
    logits, targets, factors, scale, losses, lse, b, c, n, stride_q, stride_b, stride_k, num_examples: tl.constexpr,
    num_classes: tl.constexpr, num_mixed: tl.constexpr,
):  # fmt: skip
    q = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * num_mixed + tl.arange(0, num_mixed)
    s = tl.load(scale + q * n + k, mask=k < n, other=0.0)
    largest = tl.full([num_mixed], float("-inf"), dtype=tl.float32)
    total = tl.zeros([num_mixed], dtype=tl.float32)
    dot = tl.zeros([num_mixed], dtype=tl.float32)
    mass = tl.zeros([num_mixed], dtype=tl.float32)
    for start in range(0, c, num_classes):
        v = start + tl.arange(0, num_classes)
        z, y = _products(
            logits + q * c * b, targets + q * c * b, factors + q * stride_q, v, k, b, c, n, stride_b, stride_k,
            num_examples, num_classes, num_mixed,
        )  # fmt: skip
        z = z * s[None, :]
        y = y * s[None, :]
        dot += tl.sum(y * z, axis=0)
        z = tl.where(v[:, None] < c, z, float("-inf"))
        larger = tl.maximum(largest, tl.max(z, axis=0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(z - larger[None, :]), axis=0)
        largest = larger
        mass += tl.sum(y, axis=0)
    log_total = largest + tl.log(total)
    tl.store(lse + q * n + k, log_total, mask=k < n)
    tl.store(losses + q * n + k, log_total * mass - dot, mask=k < n)


@triton.jit
def _gradient_kernel(
    logits, targets, factors, scale, weight, lse, gradient, b, c, n, stride_q, stride_b, stride_k,
    num_examples: tl.constexpr, num_classes: tl.constexpr, num_mixed: tl.constexpr,
):  # fmt: skip
    q = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * num_classes + tl.arange(0, num_classes)
    i = tl.program_id(2) * num_examples + tl.arange(0, num_examples)
    result = tl.zeros([num_classes, num_examples], dtype=tl.float32)
    for start in range(0, n, num_mixed):
        k = start + tl.arange(0, num_mixed)
        z, y = _products(
            logits + q * c * b, targets + q * c * b, factors + q * stride_q, v, k, b, c, n, stride_b, stride_k,
            num_examples, num_classes, num_mixed,
        )  # fmt: skip
        s = tl.load(scale + q * n + k, mask=k < n, other=0.0)[None, :]
        w = tl.load(weight + q * n + k, mask=k < n, other=0.0)[None, :]
        log_total = tl.load(lse + q * n + k, mask=k < n, other=0.0)[None, :]
        g = (tl.exp(z * s - log_total) - y * s) * w
        f_mask = (i[:, None] < b) & (k[None, :] < n)
        f = tl.load(factors + q * stride_q + i[:, None] * stride_b + k[None, :] * stride_k, mask=f_mask, other=0.0)
        result += tl.dot(g, tl.trans(f), input_precision="ieee")
    mask = (v[:, None] < c) & (i[None, :] < b)
    tl.store(gradient + q * c * b + v[:, None] * b + i[None, :], result, mask=mask)


def losses_and_gradient(
    logits: Tensor, targets: Tensor, factors: Tensor, scale: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the cross-entropy of mixed logits against mixed targets, and the gradient of the logits.

    Args:
        logits: (q, c, b), multiplied by the confidence.
        targets: (q, c, b), multiplied by the confidence.
        factors: (q, b, n), or (1, b, n) for all locations.
        scale: (q, n), the inverse mass of each mixed example.
        weight: (q, n), the weight of the gradient of each mixed example.

    Returns:
        The losses (q, n), and the gradient (q, c, b).
    """
    q, c, b = logits.shape
    n = factors.shape[-1]
    scale, weight = scale.contiguous(), weight.contiguous()
    losses, lse, gradient = torch.empty_like(scale), torch.empty_like(scale), torch.empty_like(logits)
    strides = (factors.stride(0) if len(factors) > 1 else 0, factors.stride(1), factors.stride(2))
    blocks = {"num_examples": EXAMPLES, "num_classes": CLASSES, "num_mixed": MIXED}
    _loss_kernel[(q, triton.cdiv(n, MIXED))](logits, targets, factors, scale, losses, lse, b, c, n, *strides, **blocks)
    _gradient_kernel[(q, triton.cdiv(c, CLASSES), triton.cdiv(b, EXAMPLES))](
        logits, targets, factors, scale, weight, lse, gradient, b, c, n, *strides, **blocks
    )
    return losses, gradient
