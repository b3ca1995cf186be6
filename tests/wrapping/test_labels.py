"""Labels of every kind: their criterion, their conversion, and errors in any mini-batch."""

import copy
import logging

import pytest
import torch
import transformers
from torch.nn import functional as F

from mm_hf import ERM, DenseMultiMix, LocationError, Mixup, MultiMix, wrap_model
from mm_hf.functional import arguments
from mm_hf.wrapping.labels import LabelKind, convert_labels
from tests.helpers import models

INDICES = torch.tensor([0, 3, 1, 4, 2, 3])
ONE_HOT = F.one_hot(INDICES, 5).float()
SEVERAL = ONE_HOT.maximum(ONE_HOT.roll(1, 0))
SOFT = 0.6 * ONE_HOT + 0.4 * ONE_HOT.roll(1, 0)
NUMBERS = torch.linspace(-1, 1, 6)
METHODS = [MultiMix(num_mixed=5), DenseMultiMix(num_mixed=5), Mixup()]


def vit(**config):
    return models.build("vit", **config)


def training_loss(model, labels, mixing=None):
    """Return the loss of the wrapped model, whose submodules stay in evaluation mode, without dropout."""
    with wrap_model(model, mixing or ERM()):
        model.training = True
        try:
            return model(**models.batch("vit"), labels=labels).loss
        finally:
            model.training = False


# ---- the criterion ----

OWN_DECISIONS = {
    "class indices": ({}, INDICES),
    "class indices (b, 1)": ({}, INDICES[:, None]),
    "class indices, configured": ({"problem_type": "single_label_classification"}, INDICES),
    "one-hot": ({}, ONE_HOT),
    "multi-hot": ({}, SEVERAL),
    "smoothed multi-hot": ({}, 0.1 + 0.8 * SEVERAL),
    "multi-hot, configured": ({"problem_type": "multi_label_classification"}, SEVERAL),
    "soft, configured as multi-label": ({"problem_type": "multi_label_classification"}, SOFT),
    "number": ({"num_labels": 1}, NUMBERS),
    "number (b, 1)": ({"num_labels": 1}, NUMBERS[:, None]),
    "integers with one output": ({"num_labels": 1}, INDICES),
    "numbers": ({"problem_type": "regression"}, torch.randn(6, 5, generator=torch.Generator().manual_seed(0))),
}


@pytest.mark.parametrize(("config", "labels"), OWN_DECISIONS.values(), ids=OWN_DECISIONS.keys())
def test_criterion_and_configuration_are_those_of_the_model_itself(config, labels):
    model, plain = vit(**config), vit(**config)
    expected = plain(**models.batch("vit"), labels=labels).loss
    torch.testing.assert_close(training_loss(model, labels), expected)
    assert model.config.problem_type == plain.config.problem_type


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32], ids=str
)
@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_integers_and_booleans_of_every_width_are_class_indices(dtype, shape):
    classes = INDICES % 2 if dtype == torch.bool else INDICES
    for mixing in (ERM(), *METHODS):
        losses = []
        for labels in (classes, classes.to(dtype).view(shape)):
            torch.manual_seed(0)
            losses.append(training_loss(vit(), labels, mixing))
        assert torch.equal(*losses)


def test_class_index_near_the_top_of_a_type_is_not_ignored():
    kind = LabelKind("Model", 200)
    assert convert_labels(torch.tensor([156, 199], dtype=torch.uint8), kind).tolist() == [156, 199]
    with pytest.raises(ValueError, match="Label 200 does not fit Model with 200 labels"):
        convert_labels(torch.tensor([0, 200], dtype=torch.uint8), kind)


def test_boolean_multi_hot_labels_are_multi_label_classification():
    expected = training_loss(vit(), SEVERAL)
    model = vit()
    torch.testing.assert_close(training_loss(model, SEVERAL.bool()), expected)
    assert training_loss(vit(problem_type="multi_label_classification"), SEVERAL.int()) == expected


# ---- class probabilities, for which the model itself has no loss ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("problem", [None, "single_label_classification"])
def test_class_probabilities_are_trained_by_cross_entropy(dtype, problem):
    model = vit(problem_type=problem)
    labels = (torch.rand(6, 5, generator=torch.Generator().manual_seed(0)).softmax(dim=1)).to(dtype)
    total = F.cross_entropy(model(**models.batch("vit")).logits, labels.float(), reduction="sum")
    expected = total / labels.double().sum()  # half precision rounds the sums of the rows
    assert training_loss(model, labels).item() == pytest.approx(expected.item(), rel=1e-5)
    assert model.config.problem_type == problem
    for mixing in METHODS:
        assert training_loss(model, labels, mixing).isfinite()


def test_class_probabilities_leave_the_configuration_and_the_evaluation_as_they_are(caplog):
    model, plain = vit(), vit()
    before = copy.deepcopy(model.config.to_dict())
    logging.getLogger("transformers").propagate = True
    with wrap_model(model, DenseMultiMix(num_mixed=5)):
        with caplog.at_level("WARNING"):
            for _ in range(2):
                model.train()(**models.batch("vit"), labels=SOFT)
        assert caplog.text.count("are class probabilities") == 1
        assert model.config.to_dict() == before
        for labels in (SOFT, SEVERAL):
            own, expected = (m.eval()(**models.batch("vit"), labels=labels).loss for m in (model, plain))
            assert torch.equal(own, expected)
        assert model.config.problem_type == plain.config.problem_type == "multi_label_classification"
        model.train()(**models.batch("vit"), labels=INDICES)  # the training keeps its criterion


def test_class_indices_and_probabilities_may_alternate():
    model = vit()
    with wrap_model(model, Mixup()):
        for labels in (INDICES, SOFT, ONE_HOT, INDICES[:, None]):
            assert model.train()(**models.batch("vit"), labels=labels).loss.isfinite()


# ---- errors in any mini-batch ----


def changed(labels, row, value):
    return labels.clone().index_put_((torch.tensor(row),), torch.tensor(value, dtype=labels.dtype))


LATER = {
    "-1": ({}, INDICES, changed(INDICES, 2, -1), "Label -1 does not fit"),
    "too large": ({}, INDICES, changed(INDICES, 5, 7), "Label 7 does not fit"),
    "class numbers as floats": ({}, INDICES, INDICES.float(), "Give class indices as integers"),
    "strings": ({}, INDICES, ["cat", "dog"], "first one is 'cat'"),
    "NaN among probabilities": ({}, SOFT, changed(SOFT, 1, float("nan")), "no class probabilities"),
    "sum of 3": ({}, SOFT, 3 * SOFT, "no class probabilities"),
    "sum of 37": ({}, INDICES, 37 * SOFT, "no class probabilities"),
    "several after one class": ({}, INDICES, SEVERAL, "no class probabilities.*multi_label"),
    "negative probability": ({}, SOFT, SOFT + torch.tensor([-1.0, 1, 0, 0, 0]), "no class probabilities"),
    "probabilities after one-hot": ({}, ONE_HOT, SOFT, "first mini-batch had labels of 0 and 1"),
    "multi-label above 1": ({}, SEVERAL, 2 * SEVERAL, "labels lie in"),
    "multi-label NaN": ({}, SEVERAL, changed(SEVERAL, 0, float("nan")), "labels lie in"),
    "indices after multi-hot": ({}, SEVERAL, INDICES, "labels have the shape"),
    "infinite number": ({"num_labels": 1}, NUMBERS, changed(NUMBERS, 3, float("inf")), "a label is inf"),
}


@pytest.mark.parametrize(("config", "first", "later", "message"), LATER.values(), ids=LATER.keys())
@pytest.mark.parametrize("mixing", METHODS, ids=lambda m: m.name)
def test_invalid_labels_of_a_later_mini_batch_raise_a_value_error(mixing, config, first, later, message):
    model = vit(**config).train()
    with wrap_model(model, mixing):
        model(**models.batch("vit"), labels=first)
        with pytest.raises(ValueError, match=message):
            model(**models.batch("vit"), labels=later)


def test_multi_hot_labels_with_one_class_each_in_the_first_mini_batch_are_multi_label():
    model, plain = vit(), vit()
    training_loss(model, ONE_HOT)
    assert model.config.problem_type == "multi_label_classification"
    with wrap_model(model, ERM()):
        for labels in (ONE_HOT, SEVERAL):
            model.training = True
            loss = model(**models.batch("vit"), labels=labels).loss
            torch.testing.assert_close(loss, plain(**models.batch("vit"), labels=labels).loss)


@pytest.mark.parametrize("labels", [INDICES, SOFT, SEVERAL, NUMBERS], ids=["indices", "soft", "multi-hot", "numbers"])
def test_labels_on_a_device_are_asserted_without_synchronization(labels, monkeypatch):
    asserted = []
    monkeypatch.setattr(arguments, "WITHOUT_ASSERT", ())
    monkeypatch.setattr(torch, "_assert_async", lambda condition, message: asserted.append(message))
    kind = {6: LabelKind("Model", 1, "regression"), 5: LabelKind("Model", 5)}[6 if labels is NUMBERS else 5]
    if labels is SEVERAL:
        kind = LabelKind("Model", 5, "multi_label_classification", "type")
    convert_labels(labels.to("meta"), kind)  # operations that read a value fail on meta tensors
    assert asserted and all("invalid label" in message for message in asserted)


# ---- language models ----

TEXT = {"vocab_size": 30, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
GPT2 = {"vocab_size": 30, "n_embd": 32, "n_layer": 1, "n_head": 2}
T5 = {"vocab_size": 30, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
CTC = {**TEXT, "conv_dim": (8,), "conv_kernel": (3,), "conv_stride": (2,), "num_conv_pos_embedding_groups": 2}
LANGUAGE_MODELS = {
    "LlamaForCausalLM": TEXT,
    "GPT2LMHeadModel": GPT2,
    "GPT2DoubleHeadsModel": GPT2,
    "BertForMaskedLM": TEXT,
    "BertLMHeadModel": TEXT,
    "DistilBertForMaskedLM": {"vocab_size": 30, "dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 48},
    "T5ForConditionalGeneration": T5,
    "Wav2Vec2ForCTC": CTC,
}


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
@pytest.mark.parametrize("num_labels", [2, 30])
def test_language_models_are_rejected_by_their_task(name, num_labels):
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**LANGUAGE_MODELS[name], num_labels=num_labels))
    for mixing in (DenseMultiMix(), Mixup(), ERM()):
        with pytest.raises(LocationError, match=f"{name} predicts tokens of a vocabulary.*no labels to mix"):
            wrap_model(model, mixing)


class OwnGenerator(transformers.LlamaForCausalLM):
    """A language model whose name does not name its task."""


def test_own_language_models_and_adapters_of_them_are_rejected():
    from peft import LoraConfig, get_peft_model

    config = transformers.LlamaConfig(**TEXT, num_labels=30)
    adapter = LoraConfig(r=2, target_modules=["q_proj"])
    for model in (OwnGenerator(config), get_peft_model(transformers.LlamaForCausalLM(config), adapter)):
        with pytest.raises(LocationError, match="predicts tokens of a vocabulary"):
            wrap_model(model, DenseMultiMix())
    classifier = transformers.LlamaForSequenceClassification(config)
    for model in (classifier, get_peft_model(classifier, adapter)):
        wrap_model(model, DenseMultiMix()).remove()
