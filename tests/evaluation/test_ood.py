import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve

from mm_hf.evaluation.metrics import auroc, energy_score, fpr95, max_softmax_score, ood_metrics
from mm_hf.evaluation.metrics.ood import threshold95


def by_sklearn(known, others):
    truth = [1] * len(known) + [0] * len(others)
    scores = [*known, *others]
    false, true, _ = roc_curve(truth, scores, drop_intermediate=False)
    return roc_auc_score(truth, scores), false[np.flatnonzero(true >= 0.95)[0]]


@given(st.lists(st.integers(0, 8), min_size=1, max_size=60), st.lists(st.integers(0, 8), min_size=1, max_size=60))
def test_auroc_and_fpr95_with_ties_equal_sklearn(known, others):
    area, false = by_sklearn(known, others)
    assert auroc(known, others) == pytest.approx(area, abs=1e-12)
    assert fpr95(known, others) == pytest.approx(false, abs=1e-12)


def test_auroc_and_fpr95_of_many_scores_equal_sklearn():
    generator = np.random.default_rng(0)
    known, others = generator.normal(1, 1, 1000), generator.normal(0, 1, 700)
    area, false = by_sklearn(known, others)
    assert auroc(known, others) == pytest.approx(area, abs=1e-12)
    assert fpr95(known, others) == pytest.approx(false, abs=1e-12)


def test_auroc_and_fpr95_equal_values_by_hand():
    assert auroc([1, 1], [1]) == 0.5
    assert auroc([2, 3], [1]) == 1.0 and auroc([1], [2, 3]) == 0.0
    assert auroc([3, 1], [2]) == 0.5
    # 19 of 20 known examples must pass, so the threshold is the second lowest score, which 7, 8 and 9 reach.
    known = [1, 7, *range(10, 28)]
    assert len(known) == 20 and threshold95(known) == 7
    assert fpr95(known, [5, 6, 7, 8, 9]) == 3 / 5
    assert threshold95(range(40)) == 2 and threshold95(range(41)) == 2 and threshold95(range(19)) == 0


def test_scores_equal_their_formulas_in_float64():
    logits = np.array([[2.0, 0.0, -1.0], [40.0, 0.0, 0.0], [60.0, 0.0, 0.0]])
    assert max_softmax_score(logits)[0] == pytest.approx(np.exp(2) / (np.exp(2) + 1 + np.exp(-1)))
    assert energy_score(logits)[0] == pytest.approx(np.log(np.exp(2) + 1 + np.exp(-1)))
    assert energy_score(logits, 2.0)[0] == pytest.approx(2 * np.log(np.exp(1) + 1 + np.exp(-0.5)))
    # Confident predictions in float32 have different scores.
    sure = torch.tensor([[20.0, 0.0]]), torch.tensor([[18.0, 0.0]])
    assert ood_metrics(*sure) == {"auroc": 1.0, "fpr95": 0.0}


def test_ood_metrics_of_logits_equal_sklearn():
    generator = np.random.default_rng(0)
    known, others = generator.normal(size=(300, 5)) * 3, generator.normal(size=(200, 5))
    for score, function in (
        ("max_softmax", lambda x: torch.tensor(x).softmax(-1).amax(-1).tolist()),
        ("energy", lambda x: np.log(np.exp(x).sum(-1)).tolist()),
    ):
        area, false = by_sklearn(function(known), function(others))
        assert ood_metrics(known, others, score) == pytest.approx({"auroc": area, "fpr95": false}, abs=1e-12)


def test_invalid_arguments_raise_value_error():
    with pytest.raises(ValueError, match="score must be one of max_softmax, energy, got 'odin'"):
        ood_metrics([[1.0, 2.0]], [[1.0, 2.0]], "odin")
    with pytest.raises(ValueError, match="same number of classes, got 2 and 3"):
        ood_metrics([[1.0, 2.0]], [[1.0, 2.0, 3.0]])
    with pytest.raises(ValueError, match=r"in_logits must have the shape \(examples, classes\), got \(2,\)"):
        ood_metrics([1.0, 2.0], [[1.0, 2.0]])
    with pytest.raises(
        ValueError, match=r"out_scores must have the shape \(examples,\) with at least one example, got \(0,\)"
    ):
        auroc([1.0], [])
    with pytest.raises(ValueError, match="in_scores must not contain NaN, but 1 values are NaN"):
        fpr95([float("nan"), 1.0], [1.0])
    with pytest.raises(ValueError, match="temperature must be positive"):
        energy_score([[1.0, 2.0]], 0.0)
