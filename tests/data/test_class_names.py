"""Names of classes: as they are written, and matched between splits."""

import pytest
from datasets import ClassLabel, Dataset, DatasetDict

from mm_hf.data.options import DataOptions
from mm_hf.data.splits import load_splits
from tests.helpers.data_files import labels, lines, write_csv, write_json, write_jsonl, write_tsv

WRITERS = {",": write_csv, "\t": write_tsv}


@pytest.mark.parametrize("names", [("false", "true"), ("FALSE", "TRUE"), ("False", "True"), ("no", "true")])
@pytest.mark.parametrize("separator", WRITERS)
def test_booleans_of_text_files_are_named_as_written(names, separator, tmp_path):
    assert load_splits(labels(names, WRITERS[separator])(tmp_path)).class_names == list(names)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_booleans_are_false_and_true_in_all_files_that_have_them(suffix, tmp_path):
    write = {".json": write_json, ".jsonl": write_jsonl}.get(
        suffix, lambda rows, path: Dataset.from_list(rows).to_parquet(path.with_suffix(suffix))
    )
    splits = load_splits(labels((True, False), write)(tmp_path))
    assert [splits.class_names[y] for y in splits.test["label"]] == ["true", "false"] * 4


@pytest.mark.parametrize(
    "names", [("+1", "-1"), ("1e5", "2"), ("inf", "nan"), ("Infinity", "-inf"), ("12E4", "7"), ("+01", "1")]
)
@pytest.mark.parametrize("separator", WRITERS)
def test_numbers_that_pandas_spells_differently_are_named_as_written(names, separator, tmp_path):
    assert load_splits(labels(names, WRITERS[separator])(tmp_path)).class_names == sorted(names)


@pytest.mark.parametrize(
    ("names", "warns"),
    [
        ((" cat", "cat"), True),
        (("cat\u00a0", "cat"), True),
        (("caf\u00e9", "cafe\u0301"), True),
        (("a b", "a  b"), True),
        (("cat", "Cat"), False),
        (("cat", "cats"), False),
    ],
)
def test_classes_that_differ_only_in_spaces_or_encoding_are_reported(names, warns, tmp_path, caplog):
    assert load_splits(labels(names)(tmp_path)).class_names == sorted(names)
    messages = [r.message for r in caplog.records if "differ only in spaces or the encoding of accents" in r.message]
    assert len(messages) == warns and all(ascii(name) in message for message in messages for name in names)


DATES = [
    ("2020-01-01", "2021-01-01"),
    ("2020-01-01T10:00:00Z", "2020-01-01 10:00:00Z"),
    ("2020-01-01 10:00", "2020-01-01 10:00:00"),
    ("2020-01-01", "unknown"),
]


@pytest.mark.parametrize("write", [write_csv, write_json, write_jsonl])
@pytest.mark.parametrize("names", DATES)
def test_dates_are_named_as_written(names, write, tmp_path):
    assert load_splits(labels(names, write)(tmp_path)).class_names == sorted(names)


def test_dates_in_one_split_and_rows_without_a_field_are_read(tmp_path):
    (tmp_path / "train.jsonl").write_text(
        lines([{"label": "a", "text": "2020-01-01"}, {"label": "b", "text": "x"}] * 8)
    )
    rows = [{"label": "a", "text": "x"}, {"label": "b", "text": "2020-01-02", "note": "y"}]
    (tmp_path / "test.jsonl").write_text(lines(rows))
    options = DataOptions(str(tmp_path))
    splits = load_splits(options)
    assert splits.test["text"][:] == ["x", "2020-01-02"] and set(splits.train["text"]) == {"2020-01-01", "x"}
    (tmp_path / "test.jsonl").write_text(lines([*rows, {"label": "a", "text": "2020-01-03"}]))
    assert load_splits(options).test["text"][-1] == "2020-01-03"


def split_labels(root, train, test):
    """Save splits of different labels: a list of names is that of a `ClassLabel` of the values 0 and 1."""
    rows = {}
    for split, values in (("train", train), ("test", test)):
        named = isinstance(values, ClassLabel)
        rows[split] = Dataset.from_dict(
            {"text": [f"text {i}" for i in range(8)], "label": [0, 1] * 4 if named else values * 4}
        )
        rows[split] = rows[split].cast_column("label", values) if named else rows[split]
    DatasetDict(rows).save_to_disk(root)
    return DataOptions(dataset_name=str(root))


@pytest.mark.parametrize("names", [["bad", "good"], ["good", "bad"], ["good", "fine"], ["good", "bad", "unused"]])
def test_class_labels_of_splits_are_matched_by_name(names, tmp_path):
    splits = load_splits(split_labels(tmp_path, ClassLabel(names=["bad", "fine", "good"]), ClassLabel(names=names)))
    assert splits.class_names == splits.test.features["label"].names == ["bad", "fine", "good"]
    assert [splits.class_names[y] for y in splits.test["label"]] == names[:2] * 4


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (ClassLabel(names=["a", "b"]), ClassLabel(names=["x", "b"]), "'test' has classes that the training .* not: x"),
        (ClassLabel(names=["a", "b"]), ["a", "b"], "is ClassLabel.* in the split 'train', and Value.* in 'test'"),
        (ClassLabel(names=["a", "b"]), [0, 1], "use one type of labels in all splits"),
        (["a", "b"], ClassLabel(names=["a", "b"]), "use one type of labels in all splits"),
        ([0, 1], [True, False], "use one type of labels in all splits"),
        ([0, 1], ["0", "1"], "use one type of labels in all splits"),
        ([0.5, 1.0], [0.0, 1.0], r"split 'train' has the label 0\.5, which is no class: use integers or names"),
        ([0.0, 1.0], [0.0, float("nan")], "split 'test' has the label nan, which is no class"),
    ],
)  # fmt: skip
def test_labels_of_different_types_and_classes_are_rejected(train, test, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_splits(split_labels(tmp_path, train, test))


@pytest.mark.parametrize(("train", "test"), [("Train", "Test"), ("training", "testing"), ("TRAIN", "eval")])
def test_splits_with_usual_words_are_found_in_saved_datasets(train, test, tmp_path):
    rows = Dataset.from_dict({"text": list("abcdef"), "label": list("uvuvuv")})
    DatasetDict({train: rows, "other": rows, test: rows.select([1, 0])}).save_to_disk(tmp_path)
    assert load_splits(DataOptions(str(tmp_path))).test["text"][:] == ["b", "a"]
    assert load_splits(DataOptions(str(tmp_path), test_split="other")).test["text"][:] == list("abcdef")


@pytest.mark.parametrize("names", [("first", "second"), ("Train", "training", "test")])
def test_missing_training_split_is_an_error(names, tmp_path):
    rows = Dataset.from_dict({"text": list("abcdef"), "label": list("uvuvuv")})
    DatasetDict(dict.fromkeys(names, rows)).save_to_disk(tmp_path)
    with pytest.raises(ValueError, match=f"There is no split 'train'; the splits are {', '.join(names)}: rename"):
        load_splits(DataOptions(str(tmp_path)))
