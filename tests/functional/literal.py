"""MultiMix and Dense MultiMix as the paper writes them, in float64 and one mixed example at a time.

Features are mixed, and the classifier is applied to mixed features: nothing here uses that mixing logits is equal. For
inputs of any magnitude, only the scale of the attention differs from the formulas: it is multiplied by 2^512, which
changes no ratio, so that products of the smallest numbers do not underflow.
"""

from collections.abc import Callable

import torch
from torch import Tensor

SCALE = 2.0**512


def y_log_p(y: Tensor, z: Tensor) -> Tensor:
    """Return y log sigmoid(z), which is 0 for y = 0."""
    return torch.where(y > 0, y * torch.nn.functional.logsigmoid(torch.where(y > 0, z, 0)), 0)


def loss_of_one(logits: Tensor, target: Tensor, smoothing: float, criterion: str) -> Tensor:
    """Return the loss of one mixed example; a class with the logit -inf has a probability of 0."""
    if criterion == "mse":
        return (logits - target).square().mean()
    if criterion == "binary_cross_entropy":
        terms = -y_log_p(target, logits) - y_log_p(1 - target, -logits)
        return terms.mean()
    target = (1 - smoothing) * target + smoothing / len(target)
    wanted = (target > 0) | logits.isfinite()  # 0 times the infinite logit of a masked class is 0
    return (target[wanted] * (logits.logsumexp(0) - logits[wanted])).sum()


def target_of_one(label: Tensor, num_classes: int) -> Tensor | None:
    """Return the target of a class index or of probabilities; None if it is ignored."""
    if label.ndim == 1:
        return label.double() if bool((label != 0).any()) else None
    if int(label) == -100:
        return None
    return torch.nn.functional.one_hot(label.long(), num_classes).double()


def unchanged(features: Tensor) -> Tensor:
    """Return features that are logits already."""
    return features


def dense_multimix(
    features: Tensor,
    labels: Tensor,
    attention: Tensor,
    factors: Tensor,
    smoothing: float = 0.0,
    weighted: bool = True,
    criterion: str = "cross_entropy",
    local_labels: bool = False,
    columns: slice = slice(None),
    classify: Callable[[Tensor], Tensor] = unchanged,
) -> Tensor:
    """Return the loss of features (b, r, d), with a classifier of mixed features (d,), by default of logits.

    Labels are (b, ...), or (b, r, ...) with `local_labels`; attention is (b, r), factors (r, b, n).
    """
    b, r, _ = features.shape
    c = len(classify(features[0, 0]))
    zero = (features * 0).nan_to_num(0).sum()
    locations = []
    for j in range(r):
        labels_here = [labels[i, j] if local_labels else labels[i] for i in range(b)]
        targets = [target_of_one(label, c) if criterion == "cross_entropy" else label.double() for label in labels_here]
        examples = [i for i in range(b) if targets[i] is not None]
        losses, weights, chosen = [], [], []
        for k in range(factors.shape[-1]):
            shares = {i: SCALE * attention[i, j] * factors[j, i, k] for i in examples}
            mass = sum(shares.values(), torch.zeros((), dtype=torch.float64))
            if float(mass.detach()) == 0:
                continue
            shares = {i: share / mass for i, share in shares.items()}  # may underflow to 0
            used = [i for i in examples if float(shares[i].detach()) > 0 or bool(features[i, j].isfinite().all())]
            mixed = sum(shares[i] * features[i, j] for i in used)
            target = sum(shares[i] * targets[i] for i in used)
            losses.append(loss_of_one(classify(mixed), target, smoothing, criterion))
            weights.append(mass if weighted else torch.ones((), dtype=torch.float64))
            chosen.append(k in range(factors.shape[-1])[columns])
        if losses:
            own = sum((w * x for w, x, mine in zip(weights, losses, chosen) if mine), zero)
            locations.append(own / sum(weights))
    return sum(locations) / len(locations) if locations else zero


def multimix(
    features: Tensor,
    labels: Tensor,
    factors: Tensor,
    smoothing: float = 0.0,
    classify: Callable[[Tensor], Tensor] = unchanged,
) -> Tensor:
    """Return the loss of features (b, d) of one location, with factors (b, n) and mixed examples of equal weight."""
    ones = torch.ones(len(labels), 1, dtype=torch.float64)
    return dense_multimix(features[:, None], labels, ones, factors[None], smoothing, weighted=False, classify=classify)
