"""Models without a hidden layer, whose features are their inputs."""

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.modeling_outputs import SequenceClassifierOutput

from mm_hf import DenseMultiMix, LocationError, MultiMix, check_model, wrap_model
from tests.functional import literal


class Linear(nn.Module):
    """Logistic regression of images."""

    def __init__(self, activation=None):
        super().__init__()
        self.config = PretrainedConfig(num_labels=3)
        self.fc, self.activation = nn.Linear(12, 3), activation or nn.Identity()

    def forward(self, pixel_values, labels=None, **kwargs):
        logits = self.activation(self.fc(pixel_values.flatten(1)))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return {"pixel_values": torch.randn(5, 3, 2, 2), "labels": torch.tensor([0, 1, 2, 1, 0])}


def raises(message, model, mixing, batch):
    with pytest.raises(LocationError, match=message), wrap_model(model.train(), mixing):
        model(**batch)


def test_multimix_trains_a_linear_model(batch, monkeypatch):
    model, mixing = Linear().train(), MultiMix(num_mixed=7, clean_weight=0.0)
    factors = torch.rand(5, 7)
    factors = factors / factors.sum(dim=0)
    monkeypatch.setattr(mixing, "sample", lambda *args, **kwargs: factors)
    with wrap_model(model, mixing):
        loss = model(**batch).loss
    features = batch["pixel_values"].flatten(1)
    expected = literal.multimix(features, batch["labels"], factors, classify=model.fc)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_linear_model_has_no_locations(batch):
    raises("Linear gives no per-location logits: it is linear in its inputs", Linear(), DenseMultiMix(), batch)
    found = check_model(Linear(), batch, rounds=1)
    assert found.mixed_error < 1e-5 and not found.problems["multimix"] and "linear in its inputs" in found.reason


@pytest.mark.parametrize("activation", [nn.Softmax(dim=-1), nn.Tanh()])
def test_activation_behind_a_linear_model_is_named(activation, batch):
    name = type(activation).__name__.lower()
    raises(f"its logits are {name} of the output of 'fc'", Linear(activation), MultiMix(), batch)


def test_positive_logits_are_not_taken_for_an_activation(batch):
    """The logits of a module that is not linear equal their own ReLU if they are positive."""

    class Square(nn.Module):
        def forward(self, x):
            return x.square()

    raises("'activation' returns them and is not linear", Linear(Square()), MultiMix(), batch)
