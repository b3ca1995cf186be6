"""`evaluate.Metric` for metrics of the registry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from .base import as_tensor
from .compute import compute_metrics
from .registry import Group, get_metric

PREDICTIONS = {"representation": "features of each example"}
REFERENCES = {"ood": "1 for an example of a known class, 0 for one of an unknown class"}


class RegisteredMetric(evaluate.Metric):
    """One or more metrics of a group, computed from predictions (n, d) and references (n,).

    Args:
        name: The name that `evaluate.combine` may use as a prefix.
        group: The group of the metrics.
        metrics: Names of the metrics in the result.
        kwargs: Arguments of `evaluate.Metric`, for example `cache_dir`.
    """

    def __init__(self, name: str, group: Group, metrics: Sequence[str], **kwargs: Any):
        self._group, self._metrics = group, list(metrics)
        kwargs.setdefault("keep_in_memory", kwargs.get("num_process", 1) == 1)  # no files, thus no locks
        super().__init__(config_name=name, **kwargs)
        self.info.module_name = name

    def _info(self) -> evaluate.MetricInfo:
        features = {
            "predictions": datasets.Sequence(datasets.Value("float64")),
            "references": datasets.Value("int64"),
        }
        predictions = PREDICTIONS.get(self._group, "logits of each example")
        references = REFERENCES.get(self._group, "class index of each example, -100 to ignore it")
        return evaluate.MetricInfo(
            description=", ".join(get_metric(name).label for name in self._metrics),
            citation="",
            inputs_description=f"predictions: {predictions}; references: {references}.",
            features=datasets.Features(features),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return compute_metrics(self._group, *self._arguments(predictions, references), names=self._metrics)

    def _arguments(self, predictions: Any, references: Any) -> tuple[Any, Any]:
        if self._group != "ood":
            return predictions, references
        logits, known = as_tensor(predictions, "predictions"), as_tensor(references, "references")
        if set(known.tolist()) != {0, 1}:
            found = sorted(set(known.tolist()))[:5]
            raise ValueError(
                f"references must be 1 (known class) and 0 (unknown class), and both must occur, got {found}."
            )
        return logits[known == 1], logits[known == 0]
