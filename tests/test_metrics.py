import evaluate
import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss
from transformers import EvalPrediction

from mm_hf.metrics import Accuracy, CalibrationError, NegativeLogLikelihood, classification_metrics


@pytest.fixture(scope="module")
def data():
    generator = np.random.default_rng(0)
    return generator.normal(size=(200, 4)) * 3, generator.integers(0, 4, 200)


def softmax(logits):
    return torch.tensor(logits).softmax(-1).numpy()


def expected_calibration_error(probabilities, labels, bins=15):
    """By hand: mean over bins of |accuracy - confidence|, weighted by how many fall into them."""
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    where = np.clip(np.ceil(confidence * bins) - 1, 0, bins - 1)
    chosen = [where == k for k in range(bins) if (where == k).any()]
    return sum(abs(right[c].mean() - confidence[c].mean()) * c.mean() for c in chosen)


def test_each_against_an_independent_figure(data):
    logits, labels = data
    results = classification_metrics(EvalPrediction(predictions=logits, label_ids=labels))
    assert results["accuracy"] == accuracy_score(labels, logits.argmax(1))
    assert results["nll"] == pytest.approx(log_loss(labels, softmax(logits)))
    assert results["calibration_error"] == pytest.approx(expected_calibration_error(softmax(logits), labels), abs=1e-6)


def test_tuples_of_outputs_and_ignored_labels(data):
    logits, labels = data
    ignored = labels.copy()
    ignored[::2] = -100
    half = classification_metrics(EvalPrediction(predictions=(logits, None), label_ids=ignored))
    assert half == classification_metrics(EvalPrediction(predictions=logits[1::2], label_ids=labels[1::2]))


def test_they_combine_offline(data):
    logits, labels = data
    both = evaluate.combine([Accuracy(), NegativeLogLikelihood(), CalibrationError()])
    assert both.compute(predictions=logits.tolist(), references=labels.tolist()) == pytest.approx(
        classification_metrics(EvalPrediction(predictions=logits, label_ids=labels))
    )
