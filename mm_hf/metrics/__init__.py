"""Metrics of classification that need probabilities: `evaluate.Metric`s that work offline, and one function for all.

>>> from mm_hf.metrics import classification_metrics
>>> from transformers import EvalPrediction
>>> import numpy as np
>>> prediction = EvalPrediction(predictions=np.array([[4.0, 0.0], [0.0, 4.0]]), label_ids=np.array([0, 1]))
>>> classification_metrics(prediction)["accuracy"]
1.0
"""

from .classification import Accuracy, CalibrationError, NegativeLogLikelihood, classification_metrics

__all__ = ["Accuracy", "CalibrationError", "NegativeLogLikelihood", "classification_metrics"]
