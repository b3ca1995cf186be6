"""Telling examples of classes never seen from those of the training's classes, by how sure the classifier is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .base import as_tensor


def max_softmax_score(logits: Any) -> Tensor:
    """Probability of the most probable class, in float64: high for what the classifier knows.

    Args:
        logits: (n, c).

    Returns:
        (n,), in [1/c, 1]. In float32 all confident predictions would be the same 1.

    Source:
        Hendrycks and Gimpel, "A Baseline for Detecting Misclassified and Out-of-Distribution Examples in Neural
        Networks", ICLR 2017.

    Example:
        >>> max_softmax_score([[0.0, 0.0]]).tolist()
        [0.5]
    """
    return _logits(logits, "logits").softmax(dim=-1).amax(dim=-1)


def energy_score(logits: Any, temperature: float = 1.0) -> Tensor:
    """Negative energy, T logsumexp(logits / T), in float64 and nats: high for what the classifier knows.

    Args:
        logits: (n, c).
        temperature: T, > 0.

    Returns:
        (n,).

    Raises:
        ValueError: `temperature` is not positive.

    Source:
        Liu et al., "Energy-based Out-of-distribution Detection", NeurIPS 2020.

    Example:
        >>> round(float(energy_score([[0.0, 0.0]])), 4)
        0.6931
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, but is {temperature}.")
    return temperature * (_logits(logits, "logits") / temperature).logsumexp(dim=-1)


SCORES: dict[str, Callable[[Any], Tensor]] = {"max_softmax": max_softmax_score, "energy": energy_score}


def auroc(in_scores: Any, out_scores: Any) -> float:
    """Probability that an example of the known classes scores higher than one of others, ties counting half.

    Args:
        in_scores: (n,) scores of examples of the known classes.
        out_scores: (m,) scores of others.

    Returns:
        In [0, 1]; 0.5 for scores that say nothing. Exact, in O((n + m) log m).

    Raises:
        ValueError: Scores are not of one dimension, none at all, or not numbers.

    Example:
        >>> auroc([3.0, 2.0], [2.0, 1.0])  # three of four pairs in the right order, one tied
        0.875
    """
    known, others = _scores(in_scores, "in_scores"), _scores(out_scores, "out_scores").sort().values
    below = torch.searchsorted(others, known, right=False)
    not_above = torch.searchsorted(others, known, right=True)
    return float((below + not_above).sum()) / (2 * len(known) * len(others))


def fpr95(in_scores: Any, out_scores: Any) -> float:
    """Share of others that pass for known where 95 % of the known examples do.

    The threshold is the highest that at least 95 % of the known examples reach; examples equal to it pass.

    Args:
        in_scores: (n,) scores of examples of the known classes.
        out_scores: (m,) scores of others.

    Returns:
        In [0, 1], lower is better.

    Raises:
        ValueError: Scores are not of one dimension, none at all, or not numbers.

    Example:
        >>> fpr95([4.0, 3.0], [3.0, 2.0])
        0.5
    """
    known, others = _scores(in_scores, "in_scores"), _scores(out_scores, "out_scores")
    return float((others >= threshold95(known)).double().mean())


def threshold95(in_scores: Any) -> float:
    """The highest score that at least 95 % of the examples of the known classes reach.

    Example:
        >>> threshold95(range(1, 21))  # 19 of 20 are at least 2
        2.0
    """
    known = _scores(in_scores, "in_scores").sort(descending=True).values
    return float(known[-(-19 * len(known) // 20) - 1])  # in integers: 0.95 is no binary number


def ood_metrics(in_logits: Any, out_logits: Any, score: str = "max_softmax") -> dict[str, float]:
    """How well a score of the logits tells known classes from others.

    Args:
        in_logits: (n, c), of examples of the known classes.
        out_logits: (m, c), of others.
        score: "max_softmax" or "energy".

    Returns:
        `auroc` and `fpr95`, both in [0, 1].

    Raises:
        ValueError: Another score, logits of other shapes, or values that are no numbers.

    Example:
        >>> ood_metrics([[4.0, 0.0], [0.0, 3.0]], [[1.0, 0.0]])
        {'auroc': 1.0, 'fpr95': 0.0}
    """
    if score not in SCORES:
        raise ValueError(f"score must be one of {', '.join(SCORES)}, got {score!r}.")
    known, others = _logits(in_logits, "in_logits"), _logits(out_logits, "out_logits")
    if known.shape[-1] != others.shape[-1]:
        raise ValueError(
            f"in_logits and out_logits must be of one classifier, but have {known.shape[-1]} and {others.shape[-1]} classes."
        )
    scores = SCORES[score](known), SCORES[score](others)
    return {"auroc": auroc(*scores), "fpr95": fpr95(*scores)}


def _logits(logits: Any, name: str) -> Tensor:
    logits = as_tensor(logits, name).double()
    if logits.ndim != 2 or not logits.numel():
        raise ValueError(f"{name} must have the shape (examples, classes), got {tuple(logits.shape)}.")
    return logits


def _scores(scores: Any, name: str) -> Tensor:
    scores = as_tensor(scores, name).double()
    if scores.ndim != 1 or not len(scores):
        raise ValueError(f"{name} must have the shape (examples,), at least one, got {tuple(scores.shape)}.")
    if scores.isnan().any():
        raise ValueError(f"{name} hold {int(scores.isnan().sum())} values that are no numbers: they have no order.")
    return scores
