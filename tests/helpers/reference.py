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


def loss_of_one(logits: Tensor, target: Tensor, smoothing: float, criterion: str) -> Tensor:
    if criterion == "cross_entropy":
        return soft_cross_entropy(logits, target, smoothing)
    loss = logits.new_zeros(())
    for z, y in zip(logits, target):
        if criterion == "mse":
            loss = loss + (z - y) ** 2
        else:
            p = 1 / (1 + torch.exp(-z))
            loss = loss - y * torch.log(p) - (1 - y) * torch.log(1 - p)
    return loss / len(logits)


def target_of_one(label: Tensor, num_classes: int) -> Tensor | None:
    """Return the target of a label, which is a class index or the target itself; None if it is ignored."""
    if label.ndim == 1:
        return label.double()
    if int(label) == -100:
        return None
    return torch.tensor([float(c == int(label)) for c in range(num_classes)], dtype=torch.float64)


def dense_multimix(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    attention: Tensor,
    factors: Tensor,
    label_smoothing: float = 0.0,
    confidence_weighted: bool = True,
    criterion: str = "cross_entropy",
    local_labels: bool = False,
) -> Tensor:
    """Compute the loss in loops.

    Features are (b, r, d), the classifier's weight (c, d) and its bias (c,), attention (b, r), factors (r, b, n).

    Labels are (b,) or (b, c), or with `local_labels` (b, r) or (b, r, c).
    """
    b, r, _ = features.shape
    n = factors.shape[-1]
    location_losses = []
    for j in range(r):
        losses, weights = [], []
        targets = [target_of_one(labels[i, j] if local_labels else labels[i], len(bias)) for i in range(b)]
        present = [i for i in range(b) if targets[i] is not None]
        for k in range(n):
            column = {i: attention[i, j] * factors[j, i, k] for i in present}
            mass = sum(column.values(), torch.zeros((), dtype=torch.float64))
            if float(mass.detach()) == 0:
                continue
            mixed_feature = sum(column[i] / mass * features[i, j] for i in present)
            mixed_target = sum(column[i] / mass * targets[i] for i in present)
            losses.append(loss_of_one(weight @ mixed_feature + bias, mixed_target, label_smoothing, criterion))
            weights.append(mass if confidence_weighted else torch.tensor(1.0, dtype=torch.float64))
        if losses:
            location_losses.append(sum(w * x for w, x in zip(weights, losses)) / sum(weights))
    if not location_losses:
        return features.sum() * 0
    return sum(location_losses) / len(location_losses)


def multimix(
    features: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, factors: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """Compute the loss in loops.

    Features are (b, d), the classifier's weight (c, d) and its bias (c,), labels (b,) or (b, c), factors (b, n).
    """
    b, n = factors.shape
    targets = [target_of_one(label, len(bias)) for label in labels]
    losses = []
    for k in range(n):
        present = [i for i in range(b) if targets[i] is not None]
        mass = sum(factors[i, k] for i in present)
        if not present or float(mass) == 0:
            continue
        mixed_feature = sum(factors[i, k] / mass * features[i] for i in present)
        mixed_target = sum(factors[i, k] / mass * targets[i] for i in present)
        losses.append(soft_cross_entropy(weight @ mixed_feature + bias, mixed_target, label_smoothing))
    return sum(losses) / len(losses) if losses else features.sum() * 0


def dirichlet_moments(alpha: float, num_examples: int) -> tuple[float, float, float]:
    """Return mean, variance and standard deviation of one coordinate of a symmetric Dirichlet distribution."""
    mean = 1 / num_examples
    variance = mean * (1 - mean) / (num_examples * alpha + 1)
    return mean, variance, math.sqrt(variance)
