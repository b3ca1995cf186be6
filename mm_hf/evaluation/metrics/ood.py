"""Detection of examples of unknown classes from the confidence of a classifier: scores, AUROC and FPR95."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .base import as_tensor


def max_softmax_score(logits: Any) -> Tensor:
    """Return the probability of the most probable class, in float64; high for examples of known classes.

    Args:
        logits: (n, c).

    Returns:
        (n,), in [1/c, 1]. In float32 all confident predictions would be equal to 1.

    Source:
        Hendrycks and Gimpel, "A Baseline for Detecting Misclassified and Out-of-Distribution Examples in Neural
        Networks", ICLR 2017.

    Example:
        >>> max_softmax_score([[0.0, 0.0]]).tolist()
        [0.5]
    """
    return _logits(logits, "logits").softmax(dim=-1).amax(dim=-1)


def energy_score(logits: Any, temperature: float = 1.0) -> Tensor:
    """Return the negative energy, T logsumexp(logits / T), in float64 and nats; high for examples of known classes.

    Args:
        logits: (n, c).
        temperature: T, positive.

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
    """Return the area under the ROC curve: how often a known example scores higher than an unknown one.

    Args:
        in_scores: (n,) scores of examples of known classes.
        out_scores: (m,) scores of examples of unknown classes.

    Returns:
        The share of pairs in the right order, in [0, 1], where ties count half; 0.5 for uninformative scores.

    Raises:
        ValueError: Scores are empty, have more than one dimension, or contain NaN.

    Example:
        >>> auroc([3.0, 2.0], [2.0, 1.0])  # three of four pairs in the right order, one tied
        0.875
    """
    from scipy.stats import mannwhitneyu

    known, unknown = _scores(in_scores, "in_scores").numpy(), _scores(out_scores, "out_scores").numpy()
    # The statistic counts pairs exactly; only its p-value, which is not used, is asymptotic.
    return float(mannwhitneyu(known, unknown, method="asymptotic").statistic) / (len(known) * len(unknown))


def fpr95(in_scores: Any, out_scores: Any) -> float:
    """Return the false positive rate at a true positive rate of at least 95 %.

    It is the share of unknown examples whose score reaches `threshold95`.

    Args:
        in_scores: (n,) scores of examples of known classes.
        out_scores: (m,) scores of examples of unknown classes.

    Returns:
        In [0, 1], lower is better.

    Raises:
        ValueError: Scores are empty, have more than one dimension, or contain NaN.

    Example:
        >>> fpr95([4.0, 3.0], [3.0, 2.0])
        0.5
    """
    known, unknown = _scores(in_scores, "in_scores"), _scores(out_scores, "out_scores")
    return float((unknown >= threshold95(known)).double().mean())


def threshold95(in_scores: Any) -> float:
    """Return the highest score that at least 95 % of the examples of known classes reach.

    Example:
        >>> threshold95(range(1, 21))  # 19 of 20 are at least 2
        2.0
    """
    known = _scores(in_scores, "in_scores").sort(descending=True).values
    return float(known[-(-19 * len(known) // 20) - 1])  # in integers, since 0.95 is not exact in binary


def ood_metrics(in_logits: Any, out_logits: Any, score: str = "max_softmax") -> dict[str, float]:
    """Return how well a score of the logits separates examples of known classes from those of unknown ones.

    Args:
        in_logits: (n, c), logits of examples of known classes.
        out_logits: (m, c), logits of examples of unknown classes.
        score: "max_softmax" or "energy".

    Returns:
        `auroc` and `fpr95`, both in [0, 1].

    Raises:
        ValueError: The score is unknown, the shapes do not match, or a score is NaN.

    Example:
        >>> ood_metrics([[4.0, 0.0], [0.0, 3.0]], [[1.0, 0.0]])
        {'auroc': 1.0, 'fpr95': 0.0}
    """
    if score not in SCORES:
        raise ValueError(f"score must be one of {', '.join(SCORES)}, got {score!r}.")
    known, unknown = _logits(in_logits, "in_logits"), _logits(out_logits, "out_logits")
    if known.shape[-1] != unknown.shape[-1]:
        raise ValueError(
            "in_logits and out_logits must have the same number of classes, got "
            f"{known.shape[-1]} and {unknown.shape[-1]}."
        )
    scores = SCORES[score](known), SCORES[score](unknown)
    return {"auroc": auroc(*scores), "fpr95": fpr95(*scores)}


def _logits(logits: Any, name: str) -> Tensor:
    logits = as_tensor(logits, name).double()
    if logits.ndim != 2 or not logits.numel():
        raise ValueError(f"{name} must have the shape (examples, classes), got {tuple(logits.shape)}.")
    return logits


def _scores(scores: Any, name: str) -> Tensor:
    scores = as_tensor(scores, name).double()
    if scores.ndim != 1 or not len(scores):
        raise ValueError(
            f"{name} must have the shape (examples,) with at least one example, got {tuple(scores.shape)}."
        )
    if scores.isnan().any():
        raise ValueError(f"{name} must not contain NaN, but {int(scores.isnan().sum())} values are NaN.")
    return scores
