"""Metrics of logits, features and models, a registry of them, and `evaluate.Metric`s that work offline.

Functions take arrays, tensors or nested lists, or a model and batches from a data loader. The libraries that some of
them need (scikit-learn, scipy, kornia: `pip install 'mm-hf[metrics]'`) are imported at the first call.

>>> from mm_hf.evaluation.metrics import classification_metrics
>>> from transformers import EvalPrediction
>>> import numpy as np
>>> prediction = EvalPrediction(predictions=np.array([[4.0, 0.0], [0.0, 4.0]]), label_ids=np.array([0, 1]))
>>> classification_metrics(prediction)["accuracy"]
1.0
"""

from .batches import predictions
from .classification import (
    Reliability,
    accuracy,
    balanced_accuracy,
    brier_score,
    calibration_error,
    macro_f1,
    negative_log_likelihood,
    reliability,
)
from .compute import classification_metrics, compute_metrics, example_scores, load_metric
from .corruptions import CORRUPTIONS, corrupt, corruption_accuracy
from .normalization import Normalization
from .ood import auroc, energy_score, fpr95, max_softmax_score, ood_metrics
from .registry import METRICS, MetricInfo, compared_metrics, get_metric, metrics_of, register_metric
from .representation import alignment, class_spread, features, pair_alignment, uniformity
from .robustness import fgsm, pgd, robust_accuracy

__all__ = [
    "CORRUPTIONS",
    "METRICS",
    "MetricInfo",
    "Normalization",
    "Reliability",
    "accuracy",
    "alignment",
    "auroc",
    "balanced_accuracy",
    "brier_score",
    "calibration_error",
    "class_spread",
    "classification_metrics",
    "compared_metrics",
    "compute_metrics",
    "corrupt",
    "corruption_accuracy",
    "energy_score",
    "example_scores",
    "features",
    "fgsm",
    "fpr95",
    "get_metric",
    "load_metric",
    "macro_f1",
    "max_softmax_score",
    "metrics_of",
    "negative_log_likelihood",
    "ood_metrics",
    "pair_alignment",
    "pgd",
    "predictions",
    "register_metric",
    "reliability",
    "robust_accuracy",
    "uniformity",
]
