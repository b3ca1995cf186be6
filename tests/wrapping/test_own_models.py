"""Models of one's own: any output, any signature of the forward, with and without a config."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel, Trainer
from transformers.modeling_outputs import ModelOutput, SequenceClassifierOutput

from mm_hf import ERM, DenseMultiMix, LocationError, Mixup, MultiMix, MultiMixTrainer, extract, wrap_model
from tests.helpers import digits

CLASSES = 3


class Body(nn.Module):
    """Patches of an image through a transformer layer."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(1, 16, 4, 4)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)

    def forward(self, x):
        return self.layer(self.patches(x).flatten(2).mT)


class Config(PretrainedConfig):
    model_type = "own"


class Own(PreTrainedModel):
    config_class = Config

    def __init__(self, config=None):
        super().__init__(config or Config(num_labels=CLASSES))
        self.body, self.classifier = Body(), nn.Linear(16, CLASSES)

    def logits(self, x):
        return self.classifier(self.body(x).mean(dim=1))


class Dictionary(Own):
    def forward(self, pixel_values, labels=None):
        logits = self.logits(pixel_values)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Tuple(Own):
    def forward(self, pixel_values, labels=None):
        logits = self.logits(pixel_values)
        return (logits,) if labels is None else (F.cross_entropy(logits, labels), logits)


class TupleWithNone(Own):
    def forward(self, pixel_values, labels=None):
        logits = self.logits(pixel_values)
        return None if labels is None else F.cross_entropy(logits, labels), logits


class KeywordOnly(Own):
    def forward(self, *, pixel_values, labels=None, **kwargs):
        logits = self.logits(pixel_values)
        loss = None if labels is None else self.loss_of(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def loss_of(self, logits, labels):
        return F.cross_entropy(logits, labels)


class OneField(Own):
    def forward(self, pixel_values, labels=None):
        return ModelOutput(scores=self.logits(pixel_values))


class WithoutConfig(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = Body()
        self.head = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, CLASSES))

    def forward(self, pixel_values, labels=None):
        logits = self.head(self.body(pixel_values).mean(dim=1))
        return logits if labels is None else (F.cross_entropy(logits, labels), logits)


class TiedWeights(Own):
    """The projection of the patches and that of the features share their weight."""

    def __init__(self, config=None):
        super().__init__(config)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight

    def forward(self, pixel_values, labels=None):
        logits = self.classifier(self.second(self.first(self.body(pixel_values)).mean(dim=1)))
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


MODELS = [Dictionary, Tuple, TupleWithNone, KeywordOnly, OneField, WithoutConfig, TiedWeights]
LABELS = torch.arange(6) % CLASSES


class Mean(MultiMix):
    """MultiMix whose mixed examples are all the mean of the batch, for a computation by hand."""

    def sample(self, num_examples, device, generator=None):
        return torch.full((num_examples, 7), 1 / num_examples)


def make(cls):
    torch.manual_seed(0)
    return cls().train(), torch.randn(6, 1, 16, 16)


def logits_of(output):
    if isinstance(output, dict):
        return output["logits"] if "logits" in output else output["scores"]
    return output if isinstance(output, torch.Tensor) else next(x for x in output if x is not None and x.ndim == 2)


@pytest.mark.parametrize("cls", MODELS)
def test_loss_of_own_models_equals_a_computation_by_hand(cls):
    model, images = make(cls)
    logits = logits_of(model(pixel_values=images))
    clean = F.cross_entropy(logits, LABELS)
    mixed = F.cross_entropy(logits.mean(0), F.one_hot(LABELS, CLASSES).float().mean(0))
    for mixing, expected in ((ERM(), clean), (Mean(), clean + mixed)):
        with wrap_model(model, mixing):
            output = model(pixel_values=images, labels=LABELS)
        loss = output["loss"] if isinstance(output, dict) else output[0]
        torch.testing.assert_close(loss, expected)
        assert torch.equal(logits_of(output) if cls is not OneField else output["logits"], logits)
        if cls is not OneField and cls is not WithoutConfig:
            assert isinstance(output, dict if cls in (Dictionary, KeywordOnly, TiedWeights) else tuple)


@pytest.mark.parametrize("mixing", [DenseMultiMix(num_mixed=5), Mixup()], ids=lambda m: m.name)
@pytest.mark.parametrize("cls", MODELS)
def test_own_models_train_with_locations_and_mixed_inputs(cls, mixing):
    model, images = make(cls)
    with wrap_model(model, mixing):
        output = model(pixel_values=images, labels=LABELS)
        (output["loss"] if isinstance(output, dict) else output[0]).backward()
        assert model.body.patches.weight.grad.any()
    located = extract(model.eval(), pixel_values=images)
    assert located.token_logits.shape == (6, 16, CLASSES)


@pytest.mark.parametrize("cls", [Dictionary, Tuple, KeywordOnly, WithoutConfig, TiedWeights])
def test_own_models_train_and_evaluate_in_the_trainer(cls, tmp_path):
    model, images = make(cls)
    rows = [{"pixel_values": images[i % 6], "labels": i % CLASSES} for i in range(12)]
    args = digits.arguments(tmp_path, max_steps=2, per_device_train_batch_size=6, save_strategy="no")
    trainer = MultiMixTrainer(model, args, mixing=DenseMultiMix(num_mixed=5), train_dataset=rows, eval_dataset=rows)
    assert trainer.train().training_loss > 0
    plain = Trainer(model, args, eval_dataset=rows).evaluate()
    assert trainer.evaluate()["eval_loss"] == plain["eval_loss"]


class NoLinearLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16 * 16, CLASSES))

    def forward(self, pixel_values, labels=None):
        return pixel_values.flatten(1) @ self.weight


def test_unknown_number_of_classes_names_the_remedy():
    model, images = make(NoLinearLayer)
    with pytest.raises(LocationError, match="number of classes of NoLinearLayer is unknown.*PretrainedConfig"):
        wrap_model(model, Mixup(), example_inputs={"pixel_values": images, "labels": LABELS})
    model.config = PretrainedConfig(num_labels=CLASSES)
    with wrap_model(model, Mixup()):
        assert model(pixel_values=images, labels=LABELS).loss.isfinite()


class Probabilities(WithoutConfig):
    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, pixel_values, labels=None):
        logits = super().forward(pixel_values)
        return logits.sigmoid() if self.name == "sigmoid" else getattr(logits, self.name)(dim=-1)


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "sigmoid"])
def test_probabilities_in_place_of_logits_are_named(name):
    model, images = Probabilities(name).train(), torch.randn(6, 1, 16, 16)
    for mixing in (MultiMix(num_mixed=5), DenseMultiMix(num_mixed=5)):
        with pytest.raises(LocationError, match=f"its logits are {name} of the output of 'head.3'.*Return the output"):
            wrap_model(model, mixing, example_inputs={"pixel_values": images, "labels": LABELS})


class Averaged(Own):
    """The logits are the mean of two heads, and all of them are positive."""

    def __init__(self, config=None):
        super().__init__(config)
        self.other = nn.Linear(16, CLASSES)
        self.classifier.bias.data.fill_(9.0)
        self.other.bias.data.fill_(9.0)

    def forward(self, pixel_values, labels=None):
        tokens = self.body(pixel_values)
        return {"logits": (self.classifier(tokens.mean(dim=1)) + self.other(tokens[:, 0])) / 2}


def test_averaged_heads_with_positive_logits_are_no_activation():
    model, images = make(Averaged)
    with wrap_model(model, MultiMix(num_mixed=5), example_inputs={"pixel_values": images, "labels": LABELS}):
        assert model(pixel_values=images, labels=LABELS)["loss"].isfinite()


def test_identical_examples_train():
    model, images = make(Dictionary)
    images = images[:1].repeat(6, 1, 1, 1)
    for mixing in (MultiMix(num_mixed=5), DenseMultiMix(num_mixed=5), Mixup()):
        with wrap_model(model, mixing):
            assert model(pixel_values=images, labels=LABELS)["loss"].isfinite()
