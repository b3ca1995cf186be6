import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

from mm_hf import probe
from mm_hf.locations.modes import evaluation_mode, probing_mode, restore_random_state
from tests.helpers import zoo


def model():
    layers = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.BatchNorm1d(2).eval())
    layers[0].weight.requires_grad_(False)
    return layers


def draws():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def seed():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.mark.parametrize("mode", [evaluation_mode, probing_mode])
def test_modes_and_random_state_are_restored_after_an_error(mode):
    layers = model()
    seed()
    expected = draws()
    seed()

    def fail():
        with mode(layers) as device:
            assert device == torch.device("cpu") and not any(m.training for m in layers.modules())
            draws()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [m.training for m in layers.modules()] == [True, True, True, False]
    assert draws() == expected


def test_random_state_is_restored():
    seed()
    expected = draws()
    seed()
    with restore_random_state():
        draws()
    assert draws() == expected


@torch.no_grad()
def test_probing_mode_computes_gradients_for_frozen_parameters_without_autocast():
    layers = model()
    with torch.autocast("cpu", dtype=torch.bfloat16), probing_mode(layers):
        output = layers(torch.ones(3, 2))
        output.sum().backward()
    assert output.dtype == torch.float32 and layers[0].weight.grad is not None
    assert not layers[0].weight.requires_grad and layers[0].bias.requires_grad


LEVIT = "LevitForImageClassification"  # caches attention biases in evaluation mode and clears them in `train`


@pytest.fixture
def levit():
    return zoo.build(LEVIT).train()


def caches(model):
    return [cache for m in model.modules() for cache in getattr(m, "attention_bias_cache", {}).values()]


@torch.no_grad()
def test_values_cached_in_evaluation_mode_are_cleared_before_training_continues(levit):
    with evaluation_mode(levit):
        levit(**zoo.batch(LEVIT, levit))
        assert caches(levit)
    assert levit.training and not caches(levit)


@pytest.mark.parametrize("training", [True, False])
def test_probe_leaves_no_cached_values(levit, training):
    levit.train(training)
    probe(levit, zoo.batch(LEVIT, levit))
    assert levit.training == training and not caches(levit)


def test_probe_keeps_earlier_cached_values(levit):
    inputs = zoo.batch(LEVIT, levit)
    with torch.no_grad():
        expected = levit.eval()(**inputs).logits
        before = caches(levit)
    probe(levit, inputs)
    assert before and all(a is b for a, b in zip(before, caches(levit), strict=True))
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(levit)(**inputs).logits, expected)


def test_modules_that_override_train_keep_their_modes():
    class Part(nn.Linear):
        def train(self, mode=True):
            self.calls = getattr(self, "calls", 0) + 1
            return super().train(mode)

    layers = nn.Sequential(Part(2, 2), Part(2, 2).eval(), nn.Sequential(Part(2, 2), nn.Dropout().eval()))
    before = [m.training for m in layers.modules()]
    with evaluation_mode(layers):
        assert not any(m.training for m in layers.modules())
    assert [m.training for m in layers.modules()] == before
    assert layers[0].calls == 1 and layers[1].calls == 1  # the latter by `eval` above
