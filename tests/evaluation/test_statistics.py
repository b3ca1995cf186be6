"""Intervals compared with scipy, with cases computed by hand, and with simulations of known truth."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from mm_hf.evaluation.metrics import (
    METRICS,
    accuracy,
    brier_score,
    calibration_error,
    compared_metrics,
    example_scores,
    negative_log_likelihood,
)  # fmt: skip
from mm_hf.evaluation.statistics import (
    Interval,
    Range,
    binned_gap,
    confidence_half_width,
    has_interval,
    mean_and_spread,
    mean_interval,
    paired_bootstrap,
    seed_spread,
    weighted_mean,
)


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=8), st.sampled_from([0.5, 0.9, 0.95]))
def test_mean_interval_equals_scipy(values, level):
    interval = mean_interval(values, level)
    low, high = scipy.stats.t.interval(level, len(values) - 1, np.mean(values), max(scipy.stats.sem(values), 1e-300))
    assert interval.value == pytest.approx(np.mean(values))
    assert (interval.low, interval.high) == (pytest.approx(low, abs=1e-9), pytest.approx(high, abs=1e-9))


def test_one_seed_has_no_interval():
    interval = mean_interval([0.5])
    assert interval.value == 0.5 and np.isnan([interval.low, interval.high]).all()
    assert not interval.excludes_zero and confidence_half_width([[1.0]]) is None
    with pytest.raises(ValueError, match="one or more seeds"):
        mean_interval([])


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=6))
def test_spread_of_a_mean_is_its_interval_from_three_seeds_on_and_the_range_of_two(values):
    found, array = mean_and_spread(values), np.array(values)
    assert found.value == array.mean()
    ends = seed_spread(np.stack([array, 2 * array], axis=1))
    if len(values) == 1:
        assert np.isnan([found.low, found.high]).all() and ends is None and not isinstance(found, Range)
        return
    assert isinstance(found, Range) == (len(values) == 2) == (not has_interval(len(values)))
    if len(values) == 2:
        assert (found.low, found.high) == (min(values), max(values)) and not found.excludes_zero
    else:
        independent = scipy.stats.t.interval(0.95, len(values) - 1, array.mean(), scipy.stats.sem(array))
        if array.std() > 0:
            np.testing.assert_allclose((found.low, found.high), independent, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(ends, [[found.low, 2 * found.low], [found.high, 2 * found.high]], atol=1e-9)


def test_excludes_zero():
    assert Interval(1, 0.5, 2).excludes_zero and Interval(-1, -2, -0.5).excludes_zero
    assert not Interval(0.1, -1, 1).excludes_zero and not Interval(0, 0, 0).excludes_zero


def test_reduced_example_scores_equal_the_metrics():
    generator = np.random.default_rng(0)
    logits, labels = 3 * generator.normal(size=(200, 5)), generator.integers(5, size=200)
    scores, ones = example_scores(logits, labels), np.ones((1, 200))
    functions = {"accuracy": accuracy, "nll": negative_log_likelihood, "brier": brier_score}
    functions["calibration_error"] = calibration_error
    for name, metric in functions.items():
        assert METRICS[name].statistic.reduce(scores[name], ones)[0] == pytest.approx(metric(logits, labels), abs=2e-6)


def test_counts_equal_repeated_examples():
    generator = np.random.default_rng(1)
    logits, labels = 3 * generator.normal(size=(60, 4)), generator.integers(4, size=60)
    drawn = generator.integers(60, size=60)
    counts = np.bincount(drawn, minlength=60)[None].astype(float)
    scores, repeated = example_scores(logits, labels), example_scores(logits[drawn], labels[drawn])
    for info in compared_metrics():
        reduce, name = info.statistic.reduce, info.name
        assert reduce(scores[name], counts) == pytest.approx(reduce(repeated[name], np.ones((1, 60))), abs=1e-12)


@given(st.integers(1, 4), st.integers(1, 30), st.integers(0, 99))
def test_identical_methods_have_zero_difference_and_interval(seeds, n, seed):
    generator = np.random.default_rng(seed)
    for shape, statistic in (((seeds, n), weighted_mean), ((seeds, n, 2), binned_gap)):
        scores = generator.random(shape)
        assert paired_bootstrap(scores, scores.copy(), statistic=statistic, replicates=20) == Interval(0, 0, 0)


def test_constant_difference_has_an_interval_of_width_zero():
    scores = np.random.default_rng(0).random((3, 50))
    interval = paired_bootstrap(scores + 0.25, scores, replicates=200)
    assert [interval.value, interval.low, interval.high] == pytest.approx([0.25] * 3)
    assert interval.excludes_zero


def test_bootstrap_with_one_seed_equals_scipy():
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(2, 1, 300))
    ours = paired_bootstrap(a, b, replicates=4000)
    theirs = scipy.stats.bootstrap(
        ((a - b)[0],), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(1)
    )
    assert ours.value == pytest.approx((a - b).mean())
    assert [ours.low, ours.high] == pytest.approx(list(theirs.confidence_interval), abs=0.01)


def test_bootstrap_is_seeded_and_swapping_methods_negates_the_interval():
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(2, 4, 100))
    there, back = paired_bootstrap(a, b, seed=3), paired_bootstrap(b, a, seed=3)
    assert there == paired_bootstrap(a, b, seed=3) != paired_bootstrap(a, b, seed=4)
    assert [back.value, back.low, back.high] == pytest.approx([-there.value, -there.high, -there.low])


def test_bootstrap_in_chunks_of_replicates(monkeypatch):
    monkeypatch.setattr("mm_hf.evaluation.statistics.CHUNK", 500)
    a = np.random.default_rng(0).normal(size=(2, 100))
    interval = paired_bootstrap(a, np.zeros_like(a), replicates=23)
    assert interval.low < interval.value < interval.high


@pytest.mark.parametrize(
    ("seeds", "of_seeds", "lowest"),
    [(2, 0.0, 0.95), (2, 1.0, 0.93), (3, 0.05, 0.95), (3, 1.0, 0.93), (5, 0.0, 0.95), (5, 0.2, 0.93), (10, 0.1, 0.93)],
)
def test_interval_has_its_nominal_coverage_from_two_seeds_on(seeds, of_seeds, lowest):
    """Each score has shared effects of its seed and example, effects that differ between methods, and noise."""
    generator = np.random.default_rng(7)
    truth, n, trials, covered = 0.3, 80, 300, 0
    for trial in range(trials):
        shared = generator.normal(size=(seeds, 1)) + generator.normal(size=(1, n))
        effect = truth + of_seeds * generator.normal(size=(seeds, 1)) + 0.5 * generator.normal(size=(1, n))
        method = shared + effect + 0.3 * generator.normal(size=(seeds, n))
        interval = paired_bootstrap(
            method, shared + 0.3 * generator.normal(size=(seeds, n)), replicates=300, seed=trial
        )
        covered += interval.low <= truth <= interval.high
    # Few seeds whose effects are small could be estimated by the examples alone: the interval is too wide for these.
    assert lowest <= covered / trials <= (0.99 if seeds * of_seeds >= 1 or seeds >= 5 else 1)


def test_invalid_arguments_raise_value_error():
    with pytest.raises(ValueError, match=r"same seeds and examples, got \(2, 3\) and \(2, 4\)"):
        paired_bootstrap(np.zeros((2, 3)), np.zeros((2, 4)))
    with pytest.raises(ValueError, match="level in"):
        paired_bootstrap(np.zeros((2, 3)), np.zeros((2, 3)), level=95)
    with pytest.raises(ValueError, match="number of classes, 2, got 3"):
        example_scores([[0.0, 1.0]], [3])
    assert np.isnan(paired_bootstrap(np.full((2, 3), np.nan), np.zeros((2, 3))).value)
