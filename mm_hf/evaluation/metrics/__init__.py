"""What a trained model is worth: functions of logits, features and models, and `evaluate.Metric`s that work offline.

All take plain arrays or tensors, or a model and batches as a data loader gives them; libraries that only some of them
need (torchmetrics, kornia: `pip install 'mm-hf[metrics]'`) are imported when they are used.

>>> from mm_hf.evaluation.metrics import classification_metrics
>>> from transformers import EvalPrediction
>>> import numpy as np
>>> prediction = EvalPrediction(predictions=np.array([[4.0, 0.0], [0.0, 4.0]]), label_ids=np.array([0, 1]))
>>> classification_metrics(prediction)["accuracy"]
1.0
"""

from .batches import predictions
from .classification import (
    Accuracy,
    BrierScore,
    CalibrationError,
    MacroF1,
    NegativeLogLikelihood,
    Reliability,
    accuracy,
    brier_score,
    calibration_error,
    classification_metrics,
    macro_f1,
    negative_log_likelihood,
    reliability,
)
from .corruptions import CORRUPTIONS, corrupt, corruption_accuracy
from .normalisation import Normalisation
from .ood import OutOfDistribution, auroc, energy_score, fpr95, max_softmax_score, ood_metrics
from .representation import Representation, alignment, class_spread, features, pair_alignment, uniformity
from .robustness import fgsm, pgd, robust_accuracy

__all__ = [
    "CORRUPTIONS",
    "Accuracy",
    "BrierScore",
    "CalibrationError",
    "MacroF1",
    "NegativeLogLikelihood",
    "Normalisation",
    "OutOfDistribution",
    "Reliability",
    "Representation",
    "accuracy",
    "alignment",
    "auroc",
    "brier_score",
    "calibration_error",
    "class_spread",
    "classification_metrics",
    "corrupt",
    "corruption_accuracy",
    "energy_score",
    "features",
    "fgsm",
    "fpr95",
    "macro_f1",
    "max_softmax_score",
    "negative_log_likelihood",
    "ood_metrics",
    "pair_alignment",
    "pgd",
    "predictions",
    "reliability",
    "robust_accuracy",
    "uniformity",
]
