"""Data as it is found on disk: each row of the tables in docs/data.md, and what is rejected."""

import re
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import Dataset, DatasetDict

from mm_hf.data.images import ImageDataset, ImageTransform
from mm_hf.data.models import model_factory
from mm_hf.data.options import DataOptions
from mm_hf.data.splits import load_splits
from tests.helpers.data_files import (
    TEXTS,
    by_name,
    class_labels,
    content,
    contents,
    depths,
    folders,
    hidden,
    image,
    labels,
    lines,
    linked,
    linked_tables,
    metadata,
    paths,
    saved,
    tables,
    write_csv,
    write_json,
    write_jsonl,
    write_tsv,
)

PAGE = Path(__file__).parents[2] / "docs" / "data.md"


CASES = {
    "one subdirectory of images per class": (folders, ["cat", "dog"]),
    "images at different depths below the class": (depths, ["cat", "dog"]),
    "paths with brackets, `*`, `?`, spaces and non-ASCII characters": (
        lambda root: folders(root / "été [1] *?"),
        ["cat", "dog"],
    ),
    "a directory with the subdirectories `train` and `test`": (
        lambda root: by_name(folders(root / "set [1]"), root / "set [1]"),
        ["cat", "dog"],
    ),
    "`.png`, `.JPG`, `.webp`, `.tif`, `.bmp`, `.gif` and the other formats of PIL with pixels": (
        lambda root: folders(root, suffixes=(".PNG", ".JPG", ".webp", ".tif")),
        ["cat", "dog"],
    ),
    "links to files and directories": (linked, ["cat", "dog"]),
    "hidden files, files that are no images": (hidden, ["cat", "dog"]),
    "`metadata.csv` with the columns `file_name` and `label`": (metadata, ["cat", "dog"]),
    "`metadata.jsonl`": (
        lambda root: metadata(root, write_jsonl),
        ["cat", "dog"],
    ),
    "a column of image paths": (paths, ["cat", "dog"]),
    'a column of the contents of image files, binary or `{"bytes", "path"}`': (
        lambda root: contents(root, [content(), content("jpeg")]),
        ["cat", "dog"],
    ),
    "CSV": (lambda root: tables(root, write_csv), ["bad", "good"]),
    "TSV": (
        lambda root: tables(root, write_tsv),
        ["bad", "good"],
    ),
    "JSON lines": (
        lambda root: tables(root, write_jsonl),
        ["bad", "good"],
    ),
    "JSON": (
        lambda root: tables(root, write_json),
        ["bad", "good"],
    ),
    "Parquet": (
        lambda root: tables(root, lambda rows, path: Dataset.from_list(rows).to_parquet(path.with_suffix(".parquet"))),
        ["bad", "good"],
    ),
    "`save_to_disk`": (saved, ["bad", "good"]),
    "tables whose names have other words, `data/reviews-test [2].csv`": (
        lambda root: by_name(
            tables(root / "data", write_csv, names=("reviews-train [1]", "reviews-train [2]", "reviews-test [2]")), root
        ),
        ["bad", "good"],
    ),
    "tables in linked directories": (linked_tables, ["bad", "good"]),
    "strings": (labels(("up", "down")), ["down", "up"]),
    "integers": (labels((7, 3)), ["3", "7"]),
    "floats that are integers": (labels((1.0, 0.0)), ["0", "1"]),
    "booleans": (labels((True, False)), ["false", "true"]),
    "dates": (labels(("2021-01-01", "2020-12-31 10:00")), ["2020-12-31 10:00", "2021-01-01"]),
    "`ClassLabel`": (class_labels, ["bad", "good"]),
    "class names with any character": (
        lambda root: folders(root, ("$x_1", "_a & <b>", "yes: no", "猫 [1]")),
        ["$x_1", "_a & <b>", "yes: no", "猫 [1]"],
    ),
}


@pytest.mark.parametrize(("make", "names"), CASES.values(), ids=CASES)
def test_row_of_the_page_is_loaded(make, names, tmp_path):
    options = make(tmp_path)
    options.train_val_split = 0.25
    splits = load_splits(options)
    assert splits.class_names == names
    for rows in (splits.train, splits.validation, splits.test):
        assert len(rows) and set(rows[splits.label]) <= set(range(len(names)))
    if splits.kind == "image":
        assert splits.train[0][splits.inputs[0]].size == (8, 8)
    else:
        assert isinstance(splits.test[0][splits.inputs[0]], str)


def test_every_row_of_the_page_is_a_test():
    rows = re.findall(r"^\| (.+?) \| .* \|$", PAGE.read_text("utf-8"), re.MULTILINE)
    assert [row for row in rows if row not in ("images", "tables", "labels", "---")] == list(CASES)


def test_class_names_with_any_character_are_saved_and_reloaded(tmp_path):
    names = ["$x_1", "_a & <b>", "yes: no", "猫 [1]"]
    sizes = "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=16,image_size=8,patch_size=4"
    model_factory("image", names, model_type="vit", config_overrides=sizes)().save_pretrained(tmp_path)
    config = model_factory("image", names, name_or_path=str(tmp_path))().config
    assert list(config.id2label.values()) == names and config.label2id["猫 [1]"] == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: folders(root, ("cat",)), "only one class, cat: give the directory with one"),
        (lambda root: tables(root, write_csv, names=("a", "b")), "no test split 'test'; the splits"),
        (lambda root: (tables(root, write_csv), DataOptions(dataset_name=str(root / "train.csv")))[1], "no test split"),
        (lambda root: (image(root / "x.png"), DataOptions(dataset_name=str(root / "x.png")))[1], "none of the ext"),
        (lambda root: metadata(root, label="kind"), "No column with labels was found; the columns are kind, image"),
    ],
)  # fmt: skip
def test_unusable_data_is_an_error_of_one_sentence(make, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_splits(make(tmp_path))


def test_ambiguous_and_incomplete_metadata_are_errors(tmp_path):
    options = metadata(tmp_path)
    other = tmp_path / "train" / "metadata.jsonl"
    other.write_text(lines([{"file_name": "images/0.png", "label": "cat"}]))
    with pytest.raises(ValueError, match=r"train has several tables metadata\.csv, metadata\.jsonl: keep one of them"):
        load_splits(options)
    other.unlink()
    path = tmp_path / "test" / "metadata.csv"
    path.write_text(path.read_text().replace("images/2.png", ""))
    with pytest.raises(ValueError, match="test has metadata without a file_name in row 2: add it or remove the row"):
        load_splits(options)


@pytest.mark.parametrize(("column", "other"), [("text", "words"), ("label", "kind")])
def test_columns_that_a_split_lacks_are_named(column, other, tmp_path):
    rows = Dataset.from_list(TEXTS)
    DatasetDict(train=rows, test=rows.rename_column(column, other)).save_to_disk(tmp_path)
    with pytest.raises(
        ValueError, match=f"The split 'test' has no column '{column}'; its columns are .*{other}.*: use"
    ):
        load_splits(DataOptions(dataset_name=str(tmp_path)))


def test_every_image_of_a_linked_class_is_loaded_once(tmp_path):
    splits = load_splits(linked(tmp_path))
    labels = [*splits.train["label"], *splits.validation["label"]]
    assert sorted(labels) == [0] * 4 + [1] * 4


def test_missing_image_of_the_metadata_is_named(tmp_path):
    options = metadata(tmp_path)
    (tmp_path / "test" / "images" / "3.png").unlink()
    with pytest.raises(ValueError, match=r"test names 3\.png in its metadata, which does not exist"):
        load_splits(options)


def test_splits_of_different_forms_are_rejected(tmp_path):
    metadata(tmp_path / "a")
    options = folders(tmp_path)
    options.train_dir = str(tmp_path / "a" / "train")
    with pytest.raises(ValueError, match="--test_dir .* has no table metadata, which another split has"):
        load_splits(options)


def test_streamed_images_are_transformed_like_stored_ones(tmp_path):
    from transformers import ViTImageProcessorPil

    splits = load_splits(folders(tmp_path))
    transform = ImageTransform(ViTImageProcessorPil(size={"height": 8, "width": 8}))
    stored = ImageDataset(splits.test, transform)
    streamed = splits.test.to_iterable_dataset().map(transform, batched=True, remove_columns=["image", "label"])
    for row, expected in zip(streamed, stored, strict=True):
        assert np.array_equal(row["pixel_values"], expected["pixel_values"]) and row["labels"] == expected["labels"]
    assert isinstance(streamed, datasets.IterableDataset)
