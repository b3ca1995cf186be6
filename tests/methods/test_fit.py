"""After three epochs, MultiMix and Dense MultiMix mix less while a model underfits."""

import contextlib
import copy
import functools
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from mm_hf import CutMix, DenseMultiMix, MultiMix, wrap_model
from mm_hf.distributed import GlobalBatch
from mm_hf.functional import count_valid, soft_targets
from mm_hf.locations import LocationOutput
from mm_hf.methods import fit
from mm_hf.methods.fit import DECAY, LAG, WORST, RunningMean, misfit, mixing_weight
from tests.helpers import models

LABELS = torch.tensor([0, 1, 2, 3, 4, -100])


def output_of(logits, locations=3):
    features = torch.randn(len(logits), locations, logits.shape[1], generator=torch.Generator().manual_seed(0))
    return LocationOutput(logits=logits, token_logits=features, attention=torch.ones(len(logits), locations))


def logits_with_probability(p, labels=LABELS, classes=5):
    """Return logits that give each label the probability p."""
    probabilities = torch.full((len(labels), classes), (1 - p) / (classes - 1), dtype=torch.float64)
    probabilities.scatter_(1, labels.clamp(min=0)[:, None], p)
    return probabilities.log().float().requires_grad_()


@given(st.floats(1e-6, 1), st.floats(0.01, 0.99))
def test_weight_is_0_below_min_fit_and_1_above_its_square_root(p, min_fit):
    weight = float(mixing_weight(-math.log(p), min_fit))
    if abs(p - min_fit) > 1e-6 and abs(p - math.sqrt(min_fit)) > 1e-6:
        assert (weight == 0) == (p < min_fit) and (weight == 1) == (p > math.sqrt(min_fit))
    assert 0 <= weight <= 1


@pytest.mark.parametrize("kind", ["index", "one_hot", "soft", "class_weights", "locations"])
def test_misfit_is_the_divergence_from_the_labels(kind):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    soft = torch.rand(6, 5, generator=generator, dtype=torch.float64).softmax(-1)
    weights = torch.ones(6, dtype=torch.float64)
    labels = {"index": LABELS, "one_hot": F.one_hot(LABELS.clamp(min=0), 5).double()}.get(kind, soft)
    if kind == "class_weights":
        weights = torch.rand(6, generator=generator, dtype=torch.float64) + 0.1
        labels = soft * weights[:, None]
    if kind == "locations":
        logits, labels = logits.view(2, 3, 5), LABELS.view(2, 3)
    targets, valid = soft_targets(labels, 5)
    weights = weights * valid.flatten()
    targets = targets.double().view(6, 5) / weights.clamp(min=1e-9)[:, None]
    divergence = F.kl_div(logits.view(6, 5).log_softmax(-1), targets, reduction="none").sum(-1)
    expected = (weights * divergence).sum() / weights.sum()
    torch.testing.assert_close(misfit(logits, labels), expected)


@given(st.lists(st.floats(0, 200) | st.sampled_from([math.nan, math.inf]), min_size=1, max_size=12))
def test_running_mean_leaves_out_what_is_not_finite_and_is_read_with_a_fixed_lag(numbers):
    mean, expected, history = RunningMean(), None, []
    for x in numbers:
        assert mean.read() == pytest.approx(history[-LAG - 1] if len(history) > LAG else None)
        if expected is None:
            expected = x if x <= WORST else WORST
        elif x <= WORST:
            expected = DECAY * expected + (1 - DECAY) * x
        history.append(expected)
        assert float(mean.update(torch.tensor(x, dtype=torch.float64))) == pytest.approx(expected)
    restored = RunningMean()
    restored.load_state_dict(mean.state_dict())
    assert restored.read() == mean.read()
    zero = torch.tensor(0.0, dtype=torch.float64)
    assert torch.equal(restored.update(zero), mean.update(zero)) and restored.read() == mean.read()


@pytest.mark.parametrize("method", [MultiMix(num_mixed=20), DenseMultiMix(num_mixed=20, pooled_weight=0.5)])
@pytest.mark.parametrize("p", [0.2, 0.37**0.75, 0.9])
@pytest.mark.parametrize("epoch", [None, 0.0, 2.99, 3.0, 50.0])
def test_mixed_terms_are_weighted_by_the_fit_after_three_epochs(method, p, epoch):
    method, logits = copy.deepcopy(method).for_batch({}, LABELS, epoch=epoch), logits_with_probability(p)
    result = method.loss(output_of(logits), LABELS, label_smoothing=0.1)
    expected = 1.0 if (epoch or 0) < 3 else {0.2: 0.0, 0.37**0.75: 0.5, 0.9: 1.0}[p]
    weight = result.logs.get("mixing_weight", torch.tensor(1.0))
    assert float(weight) == pytest.approx(expected, abs=1e-5) and ("mixing_weight" in result.logs) == (
        (epoch or 0) >= 3
    )
    terms = [name for name in ("pooled", "dense") if f"loss_{name}" in result.logs]
    mixed = sum(getattr(method, f"{name}_weight") * result.logs[f"loss_{name}"] for name in terms)
    torch.testing.assert_close(result.loss, result.logs["loss_clean"] + weight * mixed)
    if expected == 0:
        (gradient,) = torch.autograd.grad(result.loss, logits)
        clean = F.cross_entropy(logits, LABELS, label_smoothing=0.1)
        torch.testing.assert_close(gradient, torch.autograd.grad(clean, logits)[0])


def test_the_mean_is_over_all_mini_batches_also_those_of_the_first_epochs():
    method = MultiMix(num_mixed=20)
    for p in (0.45, 0.6, 0.7):
        method.for_batch({}, LABELS, epoch=1.0).loss(output_of(logits_with_probability(p)), LABELS)
    result = method.for_batch({}, LABELS, epoch=3.0).loss(output_of(logits_with_probability(0.5)), LABELS)
    mean = functools.reduce(lambda mean, p: DECAY * mean - (1 - DECAY) * math.log(p), (0.6, 0.7, 0.5), -math.log(0.45))
    assert float(result.logs["mixing_weight"]) == pytest.approx(2 + 2 * mean / math.log(0.37), rel=1e-5)


def test_other_criteria_and_a_min_fit_of_0_are_always_mixed():
    logits, targets = torch.randn(6, 5, requires_grad=True), torch.randint(2, (6, 5)).float()
    method = MultiMix(num_mixed=20).for_batch({}, targets, epoch=9.0)
    assert "mixing_weight" not in method.loss(output_of(logits), targets, criterion="binary_cross_entropy").logs
    method = MultiMix(num_mixed=20, min_fit=0).for_batch({}, LABELS, epoch=9.0)
    assert "mixing_weight" not in method.loss(output_of(logits), LABELS).logs and method.state_dict() == {}
    assert MultiMix(clean_weight=0).min_fit == MultiMix(preset="paper").min_fit == 0


IMAGES, FOUR = {"pixel_values": torch.zeros(4, 1, 8, 8)}, torch.arange(4)


@pytest.mark.parametrize("p", [0.1, 0.25, 0.3, 0.35, 0.4, 0.49, 0.5, 1.0])
def test_share_of_input_mixing_follows_the_fit_after_three_epochs(p):
    method = DenseMultiMix(input_mixing="cutmix", input_mixing_prob=0.8, input_mixing_start=0, min_fit=0.25)
    method.load_state_dict({"mean": torch.tensor(-math.log(p)), "earlier_means": torch.full((3,), -math.log(p))})

    def share(epoch):
        torch.manual_seed(0)
        return sum(isinstance(method.for_batch(IMAGES, FOUR, epoch=epoch), CutMix) for _ in range(2000)) / 2000

    assert share(2.9) == share(None) == pytest.approx(0.8, abs=0.04)
    assert share(3.0) == pytest.approx(0.8 * min(1.0, max(0.0, 2 - math.log(p) / math.log(0.5))), abs=0.04)


def test_state_is_restored_and_copies_and_pickles_begin_without_it():
    method = MultiMix(num_mixed=20)
    for p in (0.2, 0.5, 0.9, 0.9):
        method.loss(output_of(logits_with_probability(p)), LABELS)
    other = MultiMix(num_mixed=20)
    other.load_state_dict(method.state_dict())
    assert other.state_dict().keys() == {"mean", "earlier_means"}
    for ours, theirs in zip(other.state_dict().values(), method.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    for copied in (copy.deepcopy(method), pickle.loads(pickle.dumps(method))):
        assert copied == method and copied.state_dict() == {}
    with pytest.raises(ValueError, match="has mean, earlier_means, but got images"):
        method.load_state_dict({"images": torch.zeros(1)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("restored", [torch.float32, torch.float64])
def test_the_mean_continues_in_another_floating_type(dtype, restored):
    first, method = MultiMix(num_mixed=20), MultiMix(num_mixed=20)
    for p in (0.45, 0.6, 0.7):
        first.loss(output_of(logits_with_probability(p).to(restored)), LABELS)
    method.load_state_dict(first.state_dict())
    for p in (0.8, 0.5):
        result = method.for_batch({}, LABELS, epoch=3.0).loss(output_of(logits_with_probability(p).to(dtype)), LABELS)
    probabilities = (0.6, 0.7, 0.8, 0.5)
    mean = functools.reduce(lambda mean, p: DECAY * mean - (1 - DECAY) * math.log(p), probabilities, -math.log(0.45))
    assert float(result.logs["mixing_weight"]) == pytest.approx(
        2 + 2 * mean / math.log(0.37), rel=0.01 if dtype == torch.bfloat16 else 1e-5
    )
    assert float(method.state_dict()["earlier_means"][-1]) == float(method.state_dict()["mean"])


def test_one_method_trains_models_of_several_floating_types():
    method, losses = DenseMultiMix(num_mixed=9, input_mixing="none"), {}
    with contextlib.ExitStack() as stack:
        trained = []
        for dtype in (torch.float64, torch.bfloat16, torch.float32):
            model = models.build("vit").to(dtype).train()
            trained.append((dtype, model, stack.enter_context(wrap_model(model, method))))
        for epoch in (0.0, 2.0, 4.0):
            for dtype, model, handle in trained:
                handle.epoch = epoch
                torch.manual_seed(0)
                images = models.batch("vit")["pixel_values"].to(dtype)
                losses[dtype] = model(pixel_values=images, labels=models.labels()).loss
                losses[dtype].backward()
        means = [float(handle.state_dict()["mean"]) for _, _, handle in trained]
    assert means == pytest.approx([means[0]] * 3, rel=0.02) and method.state_dict() == {}
    assert [float(losses[dtype].detach()) for dtype in losses] == pytest.approx(
        [float(losses[torch.float64].detach())] * 3, rel=0.02
    )


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("gathered", [False, True])
def test_valid_labels_are_counted_at_most_once(soft, gathered, monkeypatch):
    calls = []
    monkeypatch.setattr(fit, "count_valid", lambda *args: calls.append(1) or count_valid(*args))
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    labels = logits.flip(0).softmax(-1) if soft else LABELS
    batch = GlobalBatch([6], 0, 0, torch.Generator()) if gathered else None
    monkeypatch.setattr(GlobalBatch, "total", lambda self, x: x)  # of one rank
    torch.testing.assert_close(misfit(logits, labels, batch=batch), misfit(logits, labels))
    assert len(calls) == (soft or gathered) + soft
