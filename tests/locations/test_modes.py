import random

import numpy as np
import pytest
import torch
from torch import nn

from mm_hf.locations.modes import evaluation_mode, probing_mode, restore_random_state


class Frozen(nn.Sequential):
    """A model whose `train` does more than to set flags."""

    def train(self, mode=True):
        raise AssertionError("called")


def model():
    layers = Frozen(nn.Linear(2, 2), nn.Dropout(), nn.BatchNorm1d(2).eval())
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
