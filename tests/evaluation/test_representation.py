import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mm_hf import DenseMultiMix, LocationError, wrap_model
from mm_hf.evaluation.metrics import (
    alignment,
    class_spread,
    features,
    pair_alignment,
    predictions,
    representation,
    uniformity,
)
from tests.helpers import digits, models, zoo


@pytest.fixture(scope="module")
def data():
    generator = np.random.default_rng(0)
    return generator.normal(size=(41, 5)) + 1, generator.integers(0, 4, 41)


def pairs(x, y):
    """Yield the squared distance of every two examples on the sphere, and True for pairs of one class."""
    x = [v / math.sqrt(sum(a * a for a in v)) for v in x]
    for i in range(len(x)):
        for j in range(i):
            yield sum((a - b) ** 2 for a, b in zip(x[i], x[j])), y[i] == y[j]


@pytest.mark.parametrize("chunk", [1, 100, 2**22])
def test_metrics_equal_loops_over_all_pairs(data, chunk, monkeypatch):
    monkeypatch.setattr(representation, "CHUNK", chunk)
    x, y = data
    all_pairs = list(pairs(x, y))
    same, other = ([d for d, s in all_pairs if s == which] for which in (True, False))
    assert alignment(x, y) == pytest.approx(np.mean(same), rel=1e-12)
    assert uniformity(x) == pytest.approx(math.log(np.mean([math.exp(-2 * d) for d, _ in all_pairs])), rel=1e-12)
    assert uniformity(x, t=5) == pytest.approx(math.log(np.mean([math.exp(-5 * d) for d, _ in all_pairs])), rel=1e-12)
    intra, inter = np.mean(np.sqrt(same)), np.mean(np.sqrt(other))
    expected = {"intra_class_distance": intra, "inter_class_distance": inter, "class_spread": intra / inter}
    assert class_spread(x, y) == pytest.approx(expected, rel=1e-10)


def test_metrics_equal_the_authors_code(data):
    x = F.normalize(torch.tensor(data[0]), dim=1)
    y = F.normalize(torch.tensor(data[0][::-1].copy()), dim=1)
    assert pair_alignment(x, y) == pytest.approx(float((x - y).norm(p=2, dim=1).pow(2).mean()))
    assert uniformity(x) == pytest.approx(float(torch.pdist(x, p=2).pow(2).mul(-2).exp().mean().log()))


def test_metrics_do_not_depend_on_feature_length_or_dtype(data):
    x, y = data
    scaled = torch.tensor(x) * torch.linspace(1e-6, 1e6, 41)[:, None]
    assert alignment(scaled, y) == pytest.approx(alignment(x, y))
    collapsed = torch.randn(8).repeat(64, 1)  # float32, all equal
    classes = torch.arange(64) % 2
    assert alignment(collapsed, classes) == pytest.approx(0, abs=1e-12)
    assert uniformity(collapsed) == pytest.approx(0, abs=1e-12)
    assert class_spread(collapsed, classes)["intra_class_distance"] == pytest.approx(0, abs=1e-7)


def test_examples_with_ignored_labels_are_left_out(data):
    x, y = data
    some = y.copy()
    some[::3] = -100
    kept = some != -100
    assert alignment(x, some) == alignment(x[kept], y[kept])
    assert class_spread(x, some) == class_spread(x[kept], y[kept])


def test_invalid_features_raise_value_error(data):
    x, y = data
    with pytest.raises(ValueError, match="alignment needs two examples of one class"):
        alignment(x, np.arange(41))
    with pytest.raises(ValueError, match="41 examples have one class"):
        class_spread(x, np.zeros(41, int))
    with pytest.raises(ValueError, match="41 examples have 41 classes"):
        class_spread(x, np.arange(41))
    with pytest.raises(ValueError, match="at least two examples, got one"):
        uniformity(x[:1])
    with pytest.raises(ValueError, match="t must be positive"):
        uniformity(x, 0)
    with pytest.raises(ValueError, match="features must not be zero, but 1 of 41"):
        alignment(np.where(np.arange(41)[:, None] == 3, 0, x), y)
    with pytest.raises(ValueError, match="features must be finite, but 1 of 41"):
        uniformity(np.where(np.arange(41)[:, None] == 3, np.nan, x))
    with pytest.raises(ValueError, match=r"features must have the shape \(examples, features\), got \(41,\)"):
        uniformity(x[:, 0])
    with pytest.raises(ValueError, match=r"same shape, got \(41, 5\) and \(40, 5\)"):
        pair_alignment(x, x[1:])


def last_linear(model):
    return [m for m in model.modules() if isinstance(m, nn.Linear)][-1]


@pytest.mark.parametrize("name", sorted(models.MODELS))
def test_features_times_the_last_layer_are_the_logits(name):
    model = models.build(name)
    batches = [{**models.batch(name, seed=seed), "labels": models.labels(seed=seed)} for seed in (1, 2)]
    vectors, labels = features(model, iter(batches))
    logits, same_labels = predictions(model, batches)
    torch.testing.assert_close(last_linear(model)(vectors), logits, rtol=1e-4, atol=1e-5)
    assert len(vectors) == 12 and torch.equal(labels, same_labels)


@pytest.mark.parametrize("name", ["GPT2ForSequenceClassification", "FlaubertForSequenceClassification"])
def test_features_of_heads_that_score_tokens(name):
    model = zoo.build(name)
    inputs = zoo.batch(name, model)
    vectors, _ = features(model, [inputs])
    with torch.no_grad():
        logits = model.eval()(**{k: v for k, v in inputs.items() if k != "labels"}).logits
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == logits.shape[-1]]
    assert len(vectors) == len(logits)
    torch.testing.assert_close(layers[-1](vectors), logits, rtol=1e-4, atol=1e-5)


def test_features_leave_the_model_and_random_state_unchanged():
    model = digits.vit(dropout=0.5).train()
    model.vit.embeddings.eval()
    modes = [m.training for m in model.modules()]
    before = copy.deepcopy(model.state_dict())
    batch = {"pixel_values": torch.randn(4, 1, 8, 8)}
    state = torch.get_rng_state()
    plain, labels = features(model, [batch])
    assert labels is None and plain.shape == (4, 32) and not plain.requires_grad
    with wrap_model(model, DenseMultiMix(num_mixed=5)):
        assert torch.equal(features(model, [batch])[0], plain)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_features_of_a_zero_initialized_head():
    model = digits.vit()
    nn.init.zeros_(model.classifier.weight)
    assert features(model, [{"pixel_values": torch.randn(4, 1, 8, 8)}])[0].shape == (4, 32)
    assert not model.classifier.weight.any()


def test_features_raise_for_models_and_batches_without_features():
    model = digits.vit()
    images = torch.randn(4, 1, 8, 8)
    with pytest.raises(ValueError, match="batches is empty"):
        features(model, [])
    with pytest.raises(ValueError, match="1 of 2 batches have no labels"):
        features(model, [{"pixel_values": images, "labels": torch.zeros(4).long()}, {"pixel_values": images}])
    name = "DeiTForImageClassificationWithTeacher"
    model = zoo.build(name)
    with pytest.raises(LocationError, match="no last linear layer"):
        features(model, [zoo.batch(name, model)])
