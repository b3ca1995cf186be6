import subprocess
import sys

import evaluate
import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, log_loss
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
    multiclass_f1_score,
)
from transformers import EvalPrediction

from mm_hf.evaluation import metrics
from mm_hf.evaluation.metrics import (
    classification_metrics,
    load_metric,
    metrics_of,
    reliability,
)

NAMES = [info.name for info in metrics_of("classification")]
FUNCTIONS = [info.compute for info in metrics_of("classification")]


@pytest.fixture(scope="module")
def data():
    generator = np.random.default_rng(0)
    return generator.normal(size=(200, 4)) * 3, generator.integers(0, 4, 200)


def softmax(logits):
    return torch.tensor(logits).softmax(-1).numpy()


def expected_calibration_error(probabilities, labels, bins=15):
    """Return the mean over bins of |accuracy - confidence|, weighted by their number of examples, by a loop."""
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    where = np.clip(np.ceil(confidence * bins) - 1, 0, bins - 1)
    chosen = [where == k for k in range(bins) if (where == k).any()]
    return sum(abs(right[c].mean() - confidence[c].mean()) * c.mean() for c in chosen)


def brier(probabilities, labels):
    return np.mean([sum((p[k] - (k == y)) ** 2 for k in range(len(p))) for p, y in zip(probabilities, labels)])


def test_each_metric_equals_an_independent_implementation(data):
    logits, labels = data
    results = classification_metrics(EvalPrediction(predictions=logits, label_ids=labels))
    assert results["accuracy"] == accuracy_score(labels, logits.argmax(1))
    assert results["macro_f1"] == pytest.approx(f1_score(labels, logits.argmax(1), average="macro"))
    assert results["nll"] == pytest.approx(log_loss(labels, softmax(logits)))
    assert results["brier"] == pytest.approx(brier(softmax(logits), labels))
    assert results["calibration_error"] == pytest.approx(expected_calibration_error(softmax(logits), labels), abs=1e-6)
    assert results["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, logits.argmax(1)))
    assert list(results) == NAMES and len(results) == 6


@pytest.mark.parametrize("seed", range(3))
def test_calibration_error_and_macro_metrics_equal_torchmetrics(seed):
    generator = torch.Generator().manual_seed(seed)
    logits, labels = 3 * torch.randn(500, 7, generator=generator), torch.randint(7, (500,), generator=generator)
    probabilities, classes = logits.softmax(-1), {"num_classes": 7}
    theirs = multiclass_calibration_error(probabilities, labels, n_bins=15, **classes)
    assert metrics.calibration_error(logits, labels) == pytest.approx(float(theirs), abs=1e-6)
    theirs = multiclass_f1_score(probabilities, labels, average="macro", **classes)
    assert metrics.macro_f1(logits, labels) == pytest.approx(float(theirs), abs=1e-6)
    theirs = multiclass_accuracy(probabilities, labels, average="macro", **classes)  # all classes occur
    assert metrics.balanced_accuracy(logits, labels) == pytest.approx(float(theirs), abs=1e-6)


def test_balanced_accuracy_averages_over_the_classes_among_the_labels():
    logits = np.eye(4)[[0, 0, 1, 3]]  # class 3 is predicted but never correct, class 2 does not occur
    assert metrics.balanced_accuracy(logits, [0, 0, 0, 1]) == pytest.approx((2 / 3 + 0) / 2)


def test_macro_f1_averages_over_the_classes_that_occur(data):
    logits, labels = data
    wide = np.concatenate([logits, np.full((200, 3), -50.0)], axis=1)  # three classes without labels or predictions
    assert metrics.macro_f1(wide, labels) == pytest.approx(f1_score(labels, logits.argmax(1), average="macro"))
    never_predicted = np.array([[1.0, 0.0, 0.0]] * 4)
    assert metrics.macro_f1(never_predicted, [0, 0, 1, 1]) == pytest.approx(1 / 3)


def test_confidence_of_exactly_one_falls_into_the_last_bin():
    logits = np.array([[90.0, 0.0], [90.0, 0.0], [3.0, 0.0], [3.0, 0.0]])
    labels = np.array([0, 1, 0, 0])
    expected = abs(3 / 4 - (1 + 1 / (1 + np.exp(-3.0))) / 2)
    assert metrics.calibration_error(logits, labels) == pytest.approx(expected, abs=1e-6)
    assert reliability(logits, labels).calibration_error == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("bins", [1, 4, 15])
def test_reliability_has_the_bins_and_gap_of_the_calibration_error(data, bins):
    logits, labels = data
    output = reliability(logits, labels, bins)
    assert output.calibration_error == pytest.approx(metrics.calibration_error(logits, labels, bins), abs=1e-6)
    probabilities = softmax(logits)
    for k in range(bins):
        inside = [i for i, p in enumerate(probabilities) if k / bins <= p.max() < (k + 1) / bins]
        assert output.share[k] == pytest.approx(len(inside) / 200)
        if inside:
            assert output.confidence[k] == pytest.approx(np.mean([probabilities[i].max() for i in inside]))
            assert output.accuracy[k] == pytest.approx(np.mean([logits[i].argmax() == labels[i] for i in inside]))
        else:
            assert np.isnan(output.confidence[k]) and np.isnan(output.accuracy[k])


def test_logits_in_a_tuple_and_ignored_labels(data):
    logits, labels = data
    ignored = labels.copy()
    ignored[::2] = -100
    half = classification_metrics(EvalPrediction(predictions=(logits, None), label_ids=ignored))
    assert half == classification_metrics(EvalPrediction(predictions=logits[1::2], label_ids=labels[1::2]))
    for name in NAMES:
        computed = load_metric(name).compute(predictions=logits, references=ignored)
        assert computed.items() <= half.items()


def test_metrics_of_labels_for_every_token(data):
    logits, labels = data
    shaped = EvalPrediction(predictions=logits.reshape(20, 10, 4), label_ids=labels.reshape(20, 10))
    assert classification_metrics(shaped) == classification_metrics(EvalPrediction(logits, labels))


def test_arrays_tensors_and_lists_give_equal_results(data):
    logits, labels = data
    for function in FUNCTIONS:
        assert function(logits, labels) == function(torch.tensor(logits), torch.tensor(labels))
        assert function(logits, labels) == function(logits.tolist(), labels.tolist())
        half = torch.tensor(logits).bfloat16()
        assert function(half, labels) == function(half.double(), labels)


@pytest.mark.parametrize("convert", [np.asarray, torch.tensor, lambda x: x.tolist()], ids=["array", "tensor", "list"])
def test_loaded_metrics_combine_offline(data, convert):
    logits, labels = data
    expected = classification_metrics(EvalPrediction(predictions=logits, label_ids=labels))
    together = evaluate.combine([load_metric(name) for name in NAMES])
    assert together.compute(predictions=convert(logits), references=convert(labels)) == pytest.approx(expected)
    # In batches, as in an evaluation loop.
    for part in (slice(0, 77), slice(77, 200)):
        together.add_batch(predictions=convert(logits[part]), references=convert(labels[part]))
    assert together.compute() == pytest.approx(expected)
    named = evaluate.combine([load_metric(name) for name in NAMES], force_prefix=True)
    assert named.compute(predictions=convert(logits), references=convert(labels))["brier_brier"] == expected["brier"]


def test_loaded_groups_of_features_and_unknown_classes_combine(data):
    logits, labels = data
    together = evaluate.combine([load_metric("ood"), load_metric("accuracy")])
    results = together.compute(predictions=logits, references=(labels > 1).astype(int))
    expected = metrics.ood_metrics(logits[labels > 1], logits[labels <= 1], "energy")
    assert results["ood_energy_auroc"] == expected["auroc"] and results["ood_energy_fpr95"] == expected["fpr95"]
    together = evaluate.combine([load_metric("representation"), load_metric("accuracy")])
    results = together.compute(predictions=logits, references=labels)
    assert results["alignment"] == pytest.approx(metrics.alignment(logits, labels))
    assert results["class_spread"] == pytest.approx(metrics.class_spread(logits, labels)["class_spread"])
    with pytest.raises(ValueError, match="references must be 1"):
        load_metric("ood").compute(predictions=logits, references=labels)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_invalid_logits_and_labels_raise_value_error(data, function):
    logits, labels = data
    with pytest.raises(
        ValueError, match=r"logits must have the shape \(examples, classes\), got \(200,\).*not its class"
    ):
        function(logits.argmax(1), labels)
    with pytest.raises(ValueError, match=r"labels must have the shape of logits.*\(200,\), got \(199,\)"):
        function(logits, labels[1:])
    with pytest.raises(ValueError, match=r"got \(200, 4\): one class index"):
        function(logits, softmax(logits))
    with pytest.raises(ValueError, match="labels must be class indices, integers, got torch.float64"):
        function(logits, labels.astype(float))
    with pytest.raises(ValueError, match="below the number of classes, 4, got 4"):
        function(logits, labels + (labels == 3))
    with pytest.raises(ValueError, match="at least 0"):
        function(logits, labels - 1)
    with pytest.raises(ValueError, match="All 200 labels are -100"):
        function(logits, np.full(200, -100))
    with pytest.raises(ValueError, match="logits must be an array of numbers"):
        function([[1.0, 2.0], [1.0]], [0, 0])


def test_loaded_metrics_raise_for_classes_instead_of_logits(data):
    logits, labels = data
    with pytest.raises(ValueError, match="expected format"):
        load_metric("accuracy").compute(predictions=logits.argmax(1), references=labels)
    with pytest.raises(ValueError, match="number"):
        load_metric("accuracy").compute(predictions=logits, references=labels[1:])
    with pytest.raises(ValueError, match="logits must be an array"):
        load_metric("accuracy").compute(predictions=[[0.0, 1.0], [1.0]], references=[0, 1])
    for bins in (0, -1):
        with pytest.raises(ValueError, match=f"num_bins must be at least 1, but is {bins}"):
            metrics.calibration_error(logits, labels, bins)


def test_nan_logits_give_nan(data):
    logits, labels = data
    broken = logits.copy()
    broken[3, 1] = np.nan
    values = classification_metrics(EvalPrediction(predictions=broken, label_ids=labels))
    assert all(np.isnan(x) for x in values.values())
    with pytest.raises(ValueError, match="contain NaN"):
        reliability(broken, labels)
    masked = logits.copy()  # an impossible class is valid
    masked[:, 3] = -np.inf
    kept = labels < 3
    assert metrics.negative_log_likelihood(masked[kept], labels[kept]) == pytest.approx(
        metrics.negative_log_likelihood(logits[kept, :3], labels[kept])
    )
    assert metrics.brier_score(masked[kept], labels[kept]) == pytest.approx(
        metrics.brier_score(logits[kept, :3], labels[kept])
    )


@pytest.mark.distributed
def test_importing_metrics_imports_no_optional_library():
    heavy = "['evaluate', 'kornia', 'matplotlib', 'sklearn', 'torchmetrics']"
    code = f"import sys, mm_hf.evaluation.metrics; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_exists():
    assert all(getattr(metrics, name) is not None for name in metrics.__all__)
