"""A model by name: the class follows from the configuration and the dataset, and the class names from the dataset."""

import json

import numpy as np
import pytest
import torch
import transformers
from datasets import ClassLabel, Dataset, Features, List, Value
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    BertConfig,
    BertForMaskedLM,
    SegformerConfig,
    SegformerModel,
    Trainer,
    ViTForImageClassification,
    set_seed,
)

from mm_hf import ERM, DenseMultiMix, MultiMixTrainer
from tests.helpers import digits, models

DENSE = DenseMultiMix(num_mixed=5, input_mixing="none")
NAMES = ["negative", "neutral", "positive"]


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """Directory of a ViT of 10 classes."""
    directory = tmp_path_factory.mktemp("vit")
    digits.vit(seed=3).save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """Directory of a language model, whose configuration names no classification class."""
    directory = tmp_path_factory.mktemp("bert")
    sizes = {k: v for k, v in models.TEXT.items() if k != "num_labels"}
    BertForMaskedLM(BertConfig(**sizes)).save_pretrained(directory)
    return str(directory)


def texts(kind="class"):
    """Sentences of random tokens with one class each, several, or one per token."""
    ids = np.random.default_rng(0).integers(5, 99, (8, 6)).tolist()
    feature, labels = {
        "class": (ClassLabel(names=NAMES), [i % 3 for i in range(8)]),
        "several": (List(Value("float32")), [[1.0, 0.0, 1.0]] * 8),
        "tokens": (List(ClassLabel(names=NAMES)), [[0, 1, 2, 0, 1, -100]] * 8),
    }[kind]
    rows = {"input_ids": ids, "attention_mask": [[1] * 6] * 8, "labels": labels}
    integers = List(Value("int64"))
    return Dataset.from_dict(rows, Features(input_ids=integers, attention_mask=integers, labels=feature))


def load(name, dataset=None, tmp_path="unused", **arguments):
    args = digits.arguments(tmp_path, max_steps=1)
    return MultiMixTrainer(name, args, **{"mixing": DENSE, "train_dataset": dataset, **arguments})


def test_an_image_model_by_name_trains_as_the_loaded_model(vit, tmp_path):
    args = digits.arguments(tmp_path, max_steps=2)
    found = MultiMixTrainer(vit, args, mixing=ERM(), train_dataset=digits.dataset())
    set_seed(args.seed)
    plain = Trainer(ViTForImageClassification.from_pretrained(vit), args, train_dataset=digits.dataset())
    for trainer in (found, plain):
        trainer.train()
    assert type(found.model) is ViTForImageClassification
    assert found.model.config.id2label == {i: str(i) for i in range(10)}  # of the dataset; the model has LABEL_0, ...
    for name, value in plain.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], value), name
    found.save_model()
    saved = AutoConfig.from_pretrained(tmp_path)
    assert saved.architectures == ["ViTForImageClassification"] and saved.label2id["7"] == 7


def test_a_head_of_another_size_is_replaced_reproducibly(vit):
    data = digits.dataset().filter(lambda row: row["label"] < 3).cast_column("label", ClassLabel(names=NAMES))
    first, second = (load(vit, data).model for _ in range(2))
    assert first.config.id2label == dict(enumerate(NAMES)) and first.classifier.out_features == 3
    assert torch.equal(first.classifier.weight, second.classifier.weight)
    saved = ViTForImageClassification.from_pretrained(vit)
    assert_close(first.vit.state_dict(), saved.vit.state_dict(), rtol=0, atol=0)
    load(vit, data).train()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("class", "BertForSequenceClassification"),
        ("several", "BertForSequenceClassification"),
        ("tokens", "BertForTokenClassification"),
    ],
)
def test_the_labels_of_the_dataset_select_the_class(bert, kind, expected, tmp_path):
    arguments = {"model_init_kwargs": {"num_labels": 3}} if kind == "several" else {}
    trainer = load(bert, texts(kind), tmp_path, **arguments)
    assert type(trainer.model).__name__ == expected and trainer.model.config.num_labels == 3
    if kind != "several":
        assert list(trainer.model.config.label2id) == NAMES
    trainer.train()


def test_label_maps_select_semantic_segmentation(tmp_path):
    sizes = {"depths": [1] * 4, "hidden_sizes": [8] * 4, "num_attention_heads": [1] * 4, "decoder_hidden_size": 8}
    SegformerModel(SegformerConfig(**sizes, num_labels=3)).save_pretrained(tmp_path)
    image = torch.zeros(3, 32, 32)
    for labels, expected in [
        (1, "SegformerForImageClassification"),
        (image[0].long(), "SegformerForSemanticSegmentation"),
    ]:
        model = load(str(tmp_path), [{"pixel_values": image, "labels": labels}] * 8, mixing=ERM()).model
        assert type(model).__name__ == expected


def test_without_an_example_the_configuration_selects_the_class(vit, bert):
    def rows():
        yield from digits.dataset()

    stream = Dataset.from_dict({"x": [1]}).to_iterable_dataset().map(rows)
    for data in (None, stream):
        assert type(load(vit, data).model) is ViTForImageClassification
    features = Features(input_ids=List(Value("int64")), labels=ClassLabel(names=NAMES))
    stream = Dataset.from_dict({"input_ids": [[7, 8]], "labels": [0]}, features).to_iterable_dataset()
    with pytest.raises(ValueError, match="AutoModelForSequenceClassification and AutoModelForTokenClassification can"):
        load(bert, stream)


def test_parameters_are_float32_unless_another_type_is_given(tmp_path):
    digits.vit().to(torch.bfloat16).save_pretrained(tmp_path)
    assert load(str(tmp_path)).model.dtype == torch.float32
    assert load(str(tmp_path), model_init_kwargs={"dtype": "auto"}).model.dtype == torch.bfloat16
    assert load(str(tmp_path), model_init_kwargs={"dtype": torch.float64}).model.dtype == torch.float64


def test_model_init_kwargs_override_the_configuration_and_the_classes(vit):
    given = {"hidden_dropout_prob": 0.25, "attn_implementation": "eager", "id2label": {0: "a", 1: "b"}}
    config = load(vit, digits.dataset(), model_init_kwargs=given).model.config
    assert config.hidden_dropout_prob == 0.25 and config._attn_implementation == "eager"
    assert config.id2label == {0: "a", 1: "b"} and config.num_labels == 2
    whole = AutoConfig.from_pretrained(vit, num_labels=4)
    assert load(vit, digits.dataset(), model_init_kwargs={"config": whole}).model.classifier.out_features == 4


def write(directory, config, name="config.json"):
    (directory / name).write_text(json.dumps(config))
    return str(directory)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (lambda folder: {"model": str(folder / "missing")}, r"missing' cannot be loaded: give a directory with config"),
        (lambda folder: {"model": "nobody/no-such-model"}, r"no-such-model' cannot be loaded: .* on the Hub \(.*\)\.$"),
        (lambda folder: {"model": write(folder, {"model_type": "vit"})}, r"cannot be loaded: give a directory with"),
        (lambda folder: {"model": write(folder, {"model_type": "vit_mae"})}, "is a vit_mae, for which Transformers ha"),
        (lambda folder: {"model": write(folder, {"model_type": "bert"})}, "is a bert, which .* and .* can load, and"),
        (lambda folder: {"model": write(folder, {}, "adapter_config.json")}, "is a PEFT adapter: load it with peft"),
        (
            lambda folder: {"model": write(folder, {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}})},
            "only by running the code in its repository, which mm_hf does not do",
        ),
        (
            lambda folder: {"model": str(folder), "model_init_kwargs": {"trust_remote_code": True}},
            "has trust_remote_code, but a model loaded by name runs no code",
        ),
        (lambda folder: {"model": str(folder), "model_init": digits.vit}, "and model_init cannot be combined"),
        (lambda folder: {"model": digits.vit(), "model_init_kwargs": {}}, "but model is a ViTForImageClassification"),
        (lambda folder: {"model_init": digits.vit, "model_init_kwargs": {}}, "but model is missing: leave them out"),
    ],
)
def test_what_cannot_be_loaded_by_name_is_rejected_in_one_sentence(case, message, tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.utils.hub, "is_offline_mode", lambda: True, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments = case(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        load(arguments.pop("model", None), **arguments)
    assert "\n" not in str(error.value)
