"""Tests of the checks at the first mini-batch: inputs that cannot be mixed, and errors of a random later step."""

from types import SimpleNamespace

import pytest
import torch

from mm_hf import AlignMixup, DenseMultiMix, ManifoldMixup, MultiMix, extract, wrap_model
from tests.helpers import models, zoo

LITTLE = 1e-6  # no layer is skipped in a test
SKIPPING = [
    ("Wav2Vec2ForSequenceClassification", "layerdrop"),
    ("WavLMForSequenceClassification", "layerdrop"),
    ("OPTForSequenceClassification", "layerdrop"),
    ("BartForSequenceClassification", "decoder_layerdrop"),
]


@pytest.mark.parametrize("mixing", [DenseMultiMix(attention="auto"), ManifoldMixup(), AlignMixup(unaligned_prob=0)])
@pytest.mark.parametrize(("name", "setting"), SKIPPING)
def test_layerdrop_is_rejected_before_a_layer_is_skipped(name, setting, mixing):
    if isinstance(mixing, DenseMultiMix) and name.startswith("Wav"):
        mixing = DenseMultiMix(attention="mean")
    model = zoo.build(name, **{setting: LITTLE}).train()
    with (
        wrap_model(model, mixing),
        pytest.raises(ValueError, match=r"skips each layer with probability 1e-06 in training.* load the model with"),
    ):
        model(**zoo.batch(name, model), labels=torch.arange(4))


@pytest.mark.parametrize(
    "mixing", [MultiMix(num_mixed=5), *(DenseMultiMix(num_mixed=5, attention=a) for a in ("gap", "uniform"))]
)
@pytest.mark.parametrize(("name", "setting"), SKIPPING)
def test_model_that_skips_every_layer_trains_or_is_rejected_at_the_start(name, setting, mixing):
    model = zoo.build(name, **{setting: 1.0}).train()
    inputs = {
        **zoo.batch(name, model, padding="left" if name.startswith("OPT") else "right"),
        "labels": torch.arange(4),
    }
    try:
        handle = wrap_model(model, mixing, example_inputs=inputs)
    except ValueError as error:
        if "layerdrop" not in str(error) or not isinstance(mixing, DenseMultiMix):
            raise
        return
    with handle:
        for _ in range(2):
            assert model(**inputs).loss.isfinite()


def test_model_that_was_loaded_without_layerdrop_trains():
    name = "WavLMForSequenceClassification"
    model = zoo.build(name, layerdrop=0.0).train()
    with wrap_model(model, DenseMultiMix(num_mixed=5, attention="mean")):
        assert model(**zoo.batch(name, model), labels=torch.arange(4)).loss.isfinite()


@pytest.mark.parametrize(
    ("special", "valid"),
    [(range(99), False), (range(500), False), ([0, 2, 3, *range(10, 99)], False), (range(98), True), (range(4), True)],
)
def test_special_ids_that_cover_the_vocabulary_are_rejected(special, valid):
    model, inputs = models.build("bert").train(), models.batch("bert")
    inputs["input_ids"][0, 1] = 98  # the one word
    tokenizer = SimpleNamespace(all_special_ids=list(special))
    with wrap_model(model, MultiMix(num_mixed=5), processing_class=tokenizer):
        assert model(**inputs, labels=models.labels()).loss.isfinite()
    with wrap_model(model, DenseMultiMix(num_mixed=5), processing_class=tokenizer) as handle:
        if valid:
            assert model(**inputs, labels=models.labels()).loss.isfinite() and handle.pop_logs()["loss_dense"] > 0
            return
        with pytest.raises(
            ValueError, match=r"All tokens of the first mini-batch are special tokens.* ordinary tokens"
        ):
            model(**inputs, labels=models.labels())


@pytest.mark.parametrize("num_outputs", [1, 3])
def test_attention_by_class_is_rejected_for_a_regression(num_outputs):
    model, inputs = models.build("vit", num_labels=num_outputs, problem_type="regression").train(), models.batch("vit")
    labels = torch.randn(6) if num_outputs == 1 else torch.randn(6, num_outputs)
    with (
        wrap_model(model, DenseMultiMix(num_mixed=5, attention="cam")),
        pytest.raises(ValueError, match="the labels of a regression are no classes: use attention="),
    ):
        model(**inputs, labels=labels)
    if num_outputs == 1:
        with pytest.raises(ValueError, match="the labels of a regression are no classes"):
            extract(model.eval(), "cam", **inputs, labels=labels)


def test_padding_is_no_word():
    model, inputs = models.build("bert").train(), models.batch("bert")
    inputs["attention_mask"][:, 1:-1] = 0
    tokenizer = SimpleNamespace(all_special_ids=[2, 3, *inputs["input_ids"][:, -1].tolist()])
    with (
        wrap_model(model, DenseMultiMix(num_mixed=5), processing_class=tokenizer),
        pytest.raises(ValueError, match="All tokens of the first mini-batch are special tokens"),
    ):
        model(**inputs, labels=models.labels())
