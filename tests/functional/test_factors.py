import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mm_hf.functional import devices
from mm_hf.functional.factors import alpha_for, sample_factors, sample_sparse_factors


def dirichlet_moments(alpha, num_examples):
    """Return mean, variance and standard deviation of one coordinate of a symmetric Dirichlet distribution."""
    mean = 1 / num_examples
    variance = mean * (1 - mean) / (num_examples * alpha + 1)
    return mean, variance, math.sqrt(variance)


@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from([1e-4, 0.016, 0.5, 1.0, 30.0, (0.5, 2.0)]),
    st.sampled_from([None, 1, 3]),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 2**32),
)
def test_columns_lie_on_the_simplex(b, n, alpha, r, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    factors = sample_factors(b, n, alpha, num_locations=r, dtype=dtype, generator=generator)
    assert factors.shape == ((b, n) if r is None else (r, b, n))
    assert factors.dtype == dtype and (factors >= 0).all()
    torch.testing.assert_close(factors.sum(dim=-2), torch.ones_like(factors.sum(dim=-2)))


@pytest.mark.parametrize("alpha", [0.016, 0.05, 0.1, 0.5, 1.0, 2.0])
def test_factors_have_a_dirichlet_distribution(alpha):
    b, n = 8, 40_000
    factors = sample_factors(b, n, alpha, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, variance, deviation = dirichlet_moments(alpha, b)
    assert (factors.mean(dim=1) - mean).abs().max() < 5 * deviation / n**0.5
    torch.testing.assert_close(factors.var(dim=1), torch.full((b,), variance, dtype=torch.float64), rtol=0.06, atol=0.0)
    # Any two coordinates are negatively correlated by the same amount; a marginal is a Beta distribution.
    covariance = torch.cov(factors)
    off_diagonal = covariance[~torch.eye(b, dtype=torch.bool)]
    assert (off_diagonal + mean * variance / (1 - mean)).abs().max() < 6 * variance / n**0.5
    assert stats.kstest(factors[0].numpy(), stats.beta(alpha, alpha * (b - 1)).cdf).pvalue > 1e-3


def test_small_alpha_selects_one_example_uniformly():
    # torch's Dirichlet clamps gamma variates that underflow: with alpha = 1e-4 it returns uniform mixtures.
    factors = sample_factors(4, 8_000, 1e-4, generator=torch.Generator().manual_seed(0))
    largest, where = factors.max(dim=0)
    assert (largest > 0.99).float().mean() > 0.99
    assert stats.chisquare(where.bincount(minlength=4).numpy()).pvalue > 1e-3


def test_alpha_interval_is_sampled_per_column_and_location():
    torch.manual_seed(0)
    wide = sample_factors(64, 4000, (0.01, 10.0), num_locations=2)
    narrow = sample_factors(64, 4000, 5.0, num_locations=2)
    spread = [factors.square().sum(dim=1).log().std(dim=1) for factors in (wide, narrow)]
    assert (spread[0] > 5 * spread[1]).all()
    assert (wide[0] - wide[1]).abs().max() > 0.5


@pytest.mark.parametrize("k", [2, 3, 8])
@pytest.mark.parametrize("b", [16, 128])
def test_effective_examples_do_not_depend_on_the_batch_size(k, b):
    factors = sample_factors(b, 20_000, alpha_for(k, b), generator=torch.Generator().manual_seed(0))
    assert abs(1 / factors.square().sum(dim=0).mean() - k) < 0.05 * k


def test_alpha_is_one_for_batches_too_small_for_the_effective_examples():
    assert alpha_for(3, 5) == 1.0 and alpha_for(3, 2) == 1.0 and alpha_for(3, 1) == 1.0
    assert (sample_factors(1, 4, alpha_for(3, 1)) == 1).all()


def test_factors_are_drawn_from_the_global_generator():
    torch.manual_seed(3)
    first = sample_factors(4, 5, (0.5, 2.0))
    torch.manual_seed(3)
    assert torch.equal(first, sample_factors(4, 5, (0.5, 2.0)))
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    assert torch.equal(*(sample_factors(4, 5, 0.3, generator=g) for g in generators))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_factors_are_drawn_in_float32(dtype):
    half = sample_factors(4, 50, 0.016, dtype=dtype, generator=torch.Generator().manual_seed(1))
    full = sample_factors(4, 50, 0.016, generator=torch.Generator().manual_seed(1))
    assert torch.equal(half, full.to(dtype))


@pytest.mark.parametrize("alpha", [0, -1.0, (0.5, 0.1), (0.0, 1.0), float("nan"), float("inf")])
def test_alpha_must_be_positive(alpha):
    with pytest.raises(ValueError, match="alpha must be a positive number or an interval"):
        sample_factors(4, 5, alpha)


@pytest.mark.parametrize("name", ["num_examples", "num_mixed", "num_locations"])
def test_sizes_must_be_positive(name):
    sizes = {"num_examples": 4, "num_mixed": 5, "num_locations": 3, name: 0}
    with pytest.raises(ValueError, match=f"{name} must be at least 1"):
        sample_factors(alpha=1.0, **sizes)


def test_effective_examples_must_exceed_one():
    with pytest.raises(ValueError, match="effective_examples must be greater than 1"):
        alpha_for(1, 8)


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.5, 1.0, 2.0])
def test_largest_factors_have_the_distribution_of_numpys(alpha):
    b, n = 16, 20_000
    torch.manual_seed(0)
    ours = sample_factors(b, n, alpha).amax(dim=0).numpy()
    theirs = np.random.default_rng(0).dirichlet([alpha] * b, n).max(axis=1)
    assert abs(ours.mean() - theirs.mean()) < 5 * np.hypot(ours.std(), theirs.std()) / n**0.5
    assert stats.ks_2samp(ours, theirs).pvalue > 1e-3


@pytest.fixture(params=["CPU", "accelerator"])
def kind_of_device(request, monkeypatch):
    """Draw as on each kind of device."""
    monkeypatch.setattr(devices, "is_accelerator", lambda device: request.param == "accelerator")


@pytest.mark.usefixtures("kind_of_device")
@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.5, 1.0, 2.0, (0.5, 2.0)])
def test_sparse_factors_are_dirichlet_on_uniform_sets_of_examples(alpha):
    b, s, n = 7, 3, 60_000
    generator = torch.Generator().manual_seed(1)
    factors = sample_sparse_factors(b, n, alpha, examples_per_mix=s, generator=generator, dtype=torch.float64)
    sets = factors.index.sort(dim=1).values
    assert (sets[:, 1:] > sets[:, :-1]).all()  # no example is repeated
    ids = sets @ torch.tensor([b * b, b, 1])
    _, counts = ids.unique(return_counts=True)
    assert len(counts) == 35 and stats.chisquare(counts.numpy()).pvalue > 1e-3  # 7 choose 3, equally likely
    torch.testing.assert_close(factors.weight.sum(dim=1), torch.ones(n, dtype=torch.float64))
    if isinstance(alpha, float):
        marginal, largest = stats.beta(alpha, alpha * (s - 1)), 0.999  # a small alpha's factors above round to 1
        for column in range(s):
            below = factors.weight[:, column].numpy()
            below = below[below < largest]
            assert abs(len(below) / n - marginal.cdf(largest)) < 5 * (0.25 / n) ** 0.5
            assert stats.kstest(below, lambda x: marginal.cdf(x) / marginal.cdf(largest)).pvalue > 1e-3
        covariance = torch.cov(factors.weight.T)[~torch.eye(s, dtype=torch.bool)]
        mean, variance, _ = dirichlet_moments(alpha, s)
        assert (covariance + mean * variance / (1 - mean)).abs().max() < 6 * variance / n**0.5
    # Factors do not depend on the position in the row: all examples have the same mean factor.
    dense = factors.dense()
    assert (dense.mean(dim=1) - 1 / b).abs().max() < 5 * float(dense.std()) / n**0.5


@pytest.mark.usefixtures("kind_of_device")
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("b", "n"), [(1, 1), (1, 7), (9, 1), (8, 9)])
def test_sparse_factors_of_complete_batches_contain_every_example(b, n, seed):
    generator = torch.Generator().manual_seed(seed)
    factors = sample_sparse_factors(b, n, 0.5, examples_per_mix=b, generator=generator)
    assert torch.equal(factors.index.sort(dim=1).values, torch.arange(b).expand(n, b))


@pytest.mark.parametrize("examples", [0, 9])
def test_examples_per_mix_must_not_exceed_the_batch(examples):
    with pytest.raises(ValueError, match=r"examples_per_mix must be between 1 and the number of examples \(8\)"):
        sample_sparse_factors(8, 5, 1.0, examples_per_mix=examples)


@pytest.mark.parametrize(("k", "s"), [(3, 8), (2, 6), (10, 22)])
def test_few_examples_per_mix_mix_as_strongly_as_the_complete_batch(k, s):
    complete = sample_factors(128, 20_000, alpha_for(k, 128), generator=torch.Generator().manual_seed(0))
    few = sample_sparse_factors(128, 20_000, alpha_for(k, s), examples_per_mix=s).dense()
    effective = [1 / float(f.square().sum(dim=0).mean()) for f in (complete, few)]
    assert abs(effective[0] - effective[1]) < 0.05 * k
    largest = [float(f.amax(dim=0).mean()) for f in (complete, few)]
    assert abs(largest[0] - largest[1]) < 0.05


@pytest.mark.usefixtures("kind_of_device")
def test_sparse_factors_are_drawn_from_the_global_generator():
    draws = []
    for _ in range(2):
        torch.manual_seed(3)
        draws.append(sample_sparse_factors(9, 5, (0.5, 2.0), examples_per_mix=4))
    assert torch.equal(draws[0].index, draws[1].index) and torch.equal(draws[0].weight, draws[1].weight)
