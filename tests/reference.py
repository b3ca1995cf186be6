"""MultiMix and Dense MultiMix as the paper writes them, in loops and float64: mix features, then apply the classifier.

Slow on purpose and independent of `mm_hf`: nothing here uses the identity that mixing logits equals mixing features.
"""

import math

import torch
from torch import Tensor


def soft_cross_entropy(logits: Tensor, target: Tensor, smoothing: float) -> Tensor:
    num_classes = len(logits)
    largest = logits.max()
    log_sum = largest + torch.log(sum(torch.exp(z - largest) for z in logits))
    loss = logits.new_zeros(())
    for c in range(num_classes):
        wanted = (1 - smoothing) * target[c] + smoothing / num_classes
        loss = loss + wanted * (log_sum - logits[c])
    return loss


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    if labels.ndim == 2:
        return labels.double()
    rows = torch.zeros(len(labels), num_classes, dtype=torch.float64)
    for i, label in enumerate(labels.tolist()):
        if label != -100:
            rows[i, label] = 1
    return rows


def dense_multimix(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    attention: Tensor,
    factors: Tensor,
    label_smoothing: float = 0.0,
    confidence_weighted: bool = True,
) -> Tensor:
    """Features (b, r, d), classifier weight (c, d) and bias (c,), labels (b,) or (b, c), attention (b, r), factors (r, b, n)."""
    b, r, _ = features.shape
    n = factors.shape[-1]
    targets = one_hot(labels, len(bias))
    present = [labels.ndim == 2 or int(labels[i]) != -100 for i in range(b)]
    location_losses = []
    for j in range(r):
        losses, weights = [], []
        for k in range(n):
            column = [attention[i, j] * factors[j, i, k] if present[i] else torch.tensor(0.0) for i in range(b)]
            mass = sum(column)
            if float(mass.detach()) == 0:
                continue
            mixed_feature = sum(column[i] / mass * features[i, j] for i in range(b))
            mixed_target = sum(column[i] / mass * targets[i] for i in range(b))
            losses.append(soft_cross_entropy(weight @ mixed_feature + bias, mixed_target, label_smoothing))
            weights.append(mass if confidence_weighted else torch.tensor(1.0, dtype=torch.float64))
        if losses:
            location_losses.append(sum(w * x for w, x in zip(weights, losses)) / sum(weights))
    if not location_losses:
        return features.sum() * 0
    return sum(location_losses) / len(location_losses)


def multimix(
    features: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, factors: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """Features (b, d), classifier weight (c, d) and bias (c,), labels (b,) or (b, c), factors (b, n)."""
    b, n = factors.shape
    targets = one_hot(labels, len(bias))
    losses = []
    for k in range(n):
        present = [i for i in range(b) if labels.ndim == 2 or int(labels[i]) != -100]
        mass = sum(factors[i, k] for i in present)
        if not present or float(mass) == 0:
            continue
        mixed_feature = sum(factors[i, k] / mass * features[i] for i in present)
        mixed_target = sum(factors[i, k] / mass * targets[i] for i in present)
        losses.append(soft_cross_entropy(weight @ mixed_feature + bias, mixed_target, label_smoothing))
    return sum(losses) / len(losses) if losses else features.sum() * 0


def dirichlet_moments(alpha: float, num_examples: int) -> tuple[float, float, float]:
    """Mean, variance and standard deviation of one coordinate of a symmetric Dirichlet distribution."""
    mean = 1 / num_examples
    variance = mean * (1 - mean) / (num_examples * alpha + 1)
    return mean, variance, math.sqrt(variance)
