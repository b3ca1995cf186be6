"""The losses of logits in float64, one mixed example at a time, for inputs of any magnitude.

Only the scale of the attention differs from the formulas: it is multiplied by 2^512, which changes no ratio, so that
products of the smallest numbers do not underflow.
"""

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
    wanted = target > 0
    return (target[wanted] * (logits.logsumexp(0) - logits[wanted])).sum()


def target_of_one(label: Tensor, num_classes: int) -> Tensor | None:
    """Return the target of a class index or of probabilities; None if it is ignored."""
    if label.ndim == 1:
        return label.double() if bool((label != 0).any()) else None
    if int(label) == -100:
        return None
    return torch.nn.functional.one_hot(label.long(), num_classes).double()


def dense_multimix(
    logits: Tensor,
    labels: Tensor,
    attention: Tensor,
    factors: Tensor,
    smoothing: float = 0.0,
    weighted: bool = True,
    criterion: str = "cross_entropy",
    local_labels: bool = False,
    columns: slice = slice(None),
) -> Tensor:
    """Logits (b, r, c), labels (b, ...) or with `local_labels` (b, r, ...), attention (b, r), factors (r, b, n)."""
    b, r, c = logits.shape
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
            used = [i for i in examples if float(shares[i].detach()) > 0 or bool(logits[i, j].isfinite().all())]
            mixed = sum(shares[i] * logits[i, j] for i in used)
            target = sum(shares[i] * targets[i] for i in used)
            losses.append(loss_of_one(mixed, target, smoothing, criterion))
            weights.append(mass if weighted else torch.ones((), dtype=torch.float64))
            chosen.append(k in range(factors.shape[-1])[columns])
        if losses:
            own = sum((w * x for w, x, mine in zip(weights, losses, chosen) if mine), (logits * 0).nan_to_num(0).sum())
            locations.append(own / sum(weights))
    return sum(locations) / len(locations) if locations else (logits * 0).nan_to_num(0).sum()
