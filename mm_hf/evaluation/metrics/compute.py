"""Metrics of the registry, computed: for a `Trainer`, for a bootstrap, and as an `evaluate.Metric`."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from transformers import EvalPrediction

from .classification import log_probabilities_and_labels
from .registry import METRICS, Group, compared_metrics, metrics_of

if TYPE_CHECKING:
    import evaluate

LOADABLE_GROUPS = ("classification", "ood", "representation")


def compute_metrics(
    group: Group,
    first: Any,
    second: Any,
    *,
    names: Collection[str] | None = None,
    errors: list[ValueError] | None = None,
) -> dict[str, float]:
    """Compute the metrics of a group.

    Args:
        group: "classification", "ood" or "representation".
        first: Logits, logits of examples of known classes, or features.
        second: Labels, logits of examples of unknown classes, or labels.
        names: Names of the metrics to compute. Default: all metrics of the group.
        errors: List that collects the errors of functions that reject their arguments; their metrics are left out.
            Default: the first error is raised.

    Returns:
        The values by name, in the order of the registry. Metrics without a function are left out.

    Raises:
        ValueError: A function rejects its arguments, and `errors` is None.

    Example:
        >>> compute_metrics("classification", [[2.0, 1.0], [0.0, 1.0]], [0, 0])["accuracy"]
        0.5
    """
    values: dict[str, float] = {}
    wanted = [info for info in metrics_of(group) if names is None or info.name in names]
    for info in wanted:
        if info.compute is not None and info.name not in values:
            try:
                value = info.compute(first, second)
            except ValueError as error:
                if errors is None:
                    raise
                errors.append(error)
                continue
            values |= value if isinstance(value, Mapping) else {info.name: value}
    return {info.name: values[info.name] for info in wanted if info.name in values}


def check_packages(names: Collection[str]) -> None:
    """Raise an ImportError if a package of these metrics is not installed, before a training run that ends with them.

    Args:
        names: Names of registered metrics.

    Example:
        >>> check_packages(["accuracy"])
    """
    for package in dict.fromkeys(package for name in names for package in METRICS[name].packages):
        importlib.import_module(package)


def classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Compute all registered classification metrics, for `Trainer(compute_metrics=...)`.

    Args:
        prediction: Logits (n, c), alone or first in a tuple, and labels (n,); -100 is ignored.

    Returns:
        The values by name, not scaled: `accuracy`, `calibration_error`, `macro_f1` and `balanced_accuracy` in [0, 1],
        `brier` in [0, 2], `nll` in nats.

    Raises:
        ValueError: The shapes or values of logits and labels do not match.

    Example:
        >>> prediction = EvalPrediction(np.array([[4.0, 0.0], [0.0, 4.0]]), np.array([0, 1]))
        >>> classification_metrics(prediction)["accuracy"]
        1.0
    """
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return compute_metrics("classification", logits, prediction.label_ids)


def example_scores(logits: Any, labels: Any) -> dict[str, np.ndarray]:
    """Return the scores of each example for all metrics with a per-example statistic.

    Args:
        logits: (n, c).
        labels: (n,) class indices; -100 is ignored.

    Returns:
        For each metric of [`compared_metrics`], its scores (n,) or (n, k), for
        [`~mm_hf.evaluation.statistics.paired_bootstrap`].

    Raises:
        ValueError: The shapes or values of logits and labels do not match.

    Example:
        >>> scores = example_scores([[2.0, 1.0], [0.0, 1.0]], [0, 0])
        >>> scores["accuracy"].tolist(), scores["calibration_error"].shape
        ([1.0, 0.0], (2, 2))
    """
    log_probabilities, y = log_probabilities_and_labels(logits, labels)
    return {
        info.name: info.statistic.scores(log_probabilities, y)
        for info in compared_metrics()
        if info.statistic is not None
    }


def load_metric(name: str, **kwargs: Any) -> evaluate.Metric:
    """Return a registered metric, or all metrics of a group, as an `evaluate.Metric`; it needs no network.

    Args:
        name: The name of a metric with a `compute` function, or one of the groups "classification", "ood" and
            "representation".
        kwargs: Arguments of `evaluate.Metric`, for example `cache_dir`.

    Returns:
        A metric with `compute`, `add` and `add_batch`, as `evaluate.load` returns it; `evaluate.combine` accepts it,
        too. Predictions are logits, references class indices (-100 is ignored). For the group "representation",
        predictions are features; for "ood", references are 1 for examples of known classes and 0 for those of unknown
        ones.

    Raises:
        ValueError: The name is not registered, or the metric is not computed from predictions and references.
        ImportError: A metric requires a package that is not installed.

    Example:
        >>> metric = load_metric("accuracy")
        >>> metric.compute(predictions=[[2.0, 1.0], [0.0, 1.0]], references=[0, 0])
        {'accuracy': 0.5}
        >>> logits = [[4.0, 0.0], [0.0, 3.0], [1.0, 0.0]]
        >>> load_metric("ood_auroc").compute(predictions=logits, references=[1, 1, 0])
        {'ood_auroc': 1.0}
    """
    from .evaluate_metric import RegisteredMetric

    computed = {info.name: info for info in METRICS.values() if info.compute is not None}
    if name in computed:
        group, metrics = computed[name].group, [name]
    elif name in LOADABLE_GROUPS:
        group, metrics = cast(Group, name), [info.name for info in computed.values() if info.group == name]
    else:
        raise ValueError(f"name must be one of {', '.join(LOADABLE_GROUPS)} or of {', '.join(computed)}, got {name!r}.")
    check_packages(metrics)
    return RegisteredMetric(name, group, metrics, **kwargs)
