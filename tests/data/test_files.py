"""Data as it is found on disk: each row of the tables in docs/data.md, and what is rejected."""

import io
import json
import re
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, DatasetDict
from PIL import Image
from pyarrow import parquet

from mm_hf.data.check import find_problems
from mm_hf.data.folders import image_extensions
from mm_hf.data.images import ImageDataset, ImageTransform
from mm_hf.data.models import model_factory
from mm_hf.data.options import DataOptions
from mm_hf.data.splits import load_splits

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
TEXTS = [{"text": f"text {i}", "label": ("bad", "good")[i % 2]} for i in range(8)]


def image(path, shade=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(path)


def folders(root, names=("cat", "dog"), suffixes=(".png",), pattern="{split}/{name}/{i}{suffix}"):
    for split, count in (("train", 4), ("test", 2)):
        for name in names:
            for i in range(count):
                image(root / pattern.format(split=split, name=name, i=i, suffix=suffixes[i % len(suffixes)]))
    return DataOptions(train_dir=str(root / "train"), test_dir=str(root / "test"))


def by_name(options, root):
    return DataOptions(dataset_name=str(root))


def depths(root):
    folders(root)
    image(root / "train" / "cat" / "2020" / "may" / "deep.png")
    (root / "train" / "cat" / "0.png").unlink()
    return folders(root / ".", ("cat", "dog"))


def hidden(root):
    options = folders(root)
    image(root / "train" / ".cache" / "0.png")
    image(root / "train" / "cat" / "._0.png")
    for name in (".DS_Store", "Thumbs.db", "notes.txt", "cat/labels.csv"):
        (root / "train" / name).write_text("no image")
    return options


def linked(root):
    """Link a class elsewhere, and from there a directory above, which is not followed."""
    options = folders(root)
    (root / "train" / "dog").rename(root / "dogs")
    (root / "train" / "dog").symlink_to(root / "dogs", target_is_directory=True)
    (root / "dogs" / "back").symlink_to(root / "train", target_is_directory=True)
    return options


def linked_tables(root):
    tables(root / "elsewhere", write_csv)
    (root / "set").mkdir()
    (root / "set" / "data").symlink_to(root / "elsewhere", target_is_directory=True)
    return DataOptions(dataset_name=str(root / "set"))


def metadata(root, write=lambda rows, path: path.with_suffix(".csv").write_text(csv(rows)), label="label"):
    for split, count in (("train", 8), ("test", 4)):
        rows = [{"file_name": f"images/{i}.png", label: ("cat", "dog")[i % 2]} for i in range(count)]
        for row in rows:
            image(root / split / row["file_name"])
        write(rows, root / split / "metadata")
    return DataOptions(train_dir=str(root / "train"), test_dir=str(root / "test"))


def csv(rows, separator=","):
    lines = [separator.join(map(str, row.values())) for row in rows]
    return "\n".join([separator.join(rows[0]), *lines]) + "\n"


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def tables(root, write, rows=TEXTS, names=("train", "test")):
    root.mkdir(parents=True, exist_ok=True)
    for name in names:
        write(rows, root / name)
    return DataOptions(dataset_name=str(root))


def saved(root):
    rows = Dataset.from_list(TEXTS)
    DatasetDict(train=rows, test=rows).save_to_disk(root)
    return DataOptions(dataset_name=str(root))


def paths(root):
    rows = [{"photo": f"files/{i}.png", "label": ("cat", "dog")[i % 2]} for i in range(4)]
    for row in rows:
        image(root / row["photo"])
    return tables(root, write_csv, rows)


def contents(root, values=(b"", b""), column="image", **options):
    """Write Parquet files with the contents of image files, without metadata of `datasets`."""
    rows = {column: list(values) * 4, "label": ["cat", "dog"] * 4}
    root.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        parquet.write_table(pa.table(rows), root / f"{split}.parquet")
    return DataOptions(dataset_name=str(root), train_val_split=0.25, **options)


def content(suffix="png"):
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, suffix)
    return file.getvalue()


def write_jsonl(rows, path):
    path.with_suffix(".jsonl").write_text(lines(rows))


def write_json(rows, path):
    path.with_suffix(".json").write_text(json.dumps(rows))


def labels(values, write=write_jsonl):
    rows = [{"text": f"text {i}", "label": values[i % 2]} for i in range(8)]
    return lambda root: tables(root, write, rows)


def class_labels(root):
    rows = Dataset.from_dict({"text": list("abcd"), "label": [0, 1, 0, 1]})
    rows = rows.cast_column("label", ClassLabel(names=["bad", "good"]))
    DatasetDict(train=rows, test=rows).save_to_disk(root)
    return DataOptions(dataset_name=str(root))


def write_csv(rows, path):
    path.with_suffix(".csv").write_text(csv(rows))


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
        lambda root: tables(root, lambda rows, path: path.with_suffix(".tsv").write_text(csv(rows, "\t"))),
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


# ---- names as they are written ----


@pytest.mark.parametrize("names", [("false", "true"), ("FALSE", "TRUE"), ("False", "True"), ("no", "true")])
@pytest.mark.parametrize("separator", [",", "\t"])
def test_booleans_of_text_files_are_named_as_written(names, separator, tmp_path):
    suffix = {",": ".csv", "\t": ".tsv"}[separator]

    def write(rows, path):
        path.with_suffix(suffix).write_text(csv(rows, separator))

    assert load_splits(labels(names, write)(tmp_path)).class_names == list(names)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_booleans_are_false_and_true_in_all_files_that_have_them(suffix, tmp_path):
    write = {".json": write_json, ".jsonl": write_jsonl}.get(
        suffix, lambda rows, path: Dataset.from_list(rows).to_parquet(path.with_suffix(suffix))
    )
    splits = load_splits(labels((True, False), write)(tmp_path))
    assert [splits.class_names[y] for y in splits.test["label"]] == ["true", "false"] * 4


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


# ---- columns of images ----


@pytest.mark.parametrize("column", ["image", "anything"])
@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(
    "value", [content(), {"bytes": content(), "path": "x.png"}, {"bytes": content(), "path": None}]
)
def test_contents_of_image_files_are_images(value, named, column, tmp_path):
    options = contents(tmp_path, [value] * 2, column, image_column_name=column if named else None)
    splits = load_splits(options)
    assert splits.kind == "image" and splits.inputs == [column] and splits.test[3][column].size == (8, 8)
    assert list(find_problems(options)) == []


def test_contents_of_other_files_are_not_images(tmp_path):
    with pytest.raises(ValueError, match="The input columns among sound, label cannot be determined: give --image_col"):
        load_splits(contents(tmp_path, [b"RIFF", b"RIFF"], "sound"))


def test_columns_of_paths_are_found_among_others(tmp_path):
    rows = [{"id": i, "note": f"note {i}", "file": f"{i}.PNG", "label": "ab"[i % 2]} for i in range(4)]
    for row in rows:
        image(tmp_path / row["file"])
    options = tables(tmp_path, write_csv, rows)
    assert load_splits(options).inputs == ["file"] and list(find_problems(options)) == []
    options.text_column_names = ["file"]
    assert load_splits(options).kind == "text"
    options = tables(tmp_path, write_csv, [{"text" if k == "note" else k: v for k, v in row.items()} for row in rows])
    assert load_splits(options).inputs == ["text"]
    (tmp_path / "3.PNG").unlink()
    with pytest.raises(ValueError, match=r"names no image file in row 3 \('3.PNG'\): give paths .*--text_column_names"):
        load_splits(tables(tmp_path, write_csv, rows))


def test_all_missing_image_files_of_a_table_are_problems(tmp_path):
    rows = [{"file": f"{i}.png", "label": "ab"[i % 2]} for i in range(4)]
    for row in rows[:2]:
        image(tmp_path / row["file"])
    options = tables(tmp_path, write_csv, [*rows, {"file": "", "label": "a"}])
    found = [problem for problem in find_problems(options) if problem.startswith("train")]
    assert [problem.split(":")[0] for problem in found] == ["train, row 2", "train, row 3", "train, row 4"]
    assert "2.png cannot be read" in found[0] and "there is none" in found[2]


@pytest.mark.parametrize("first", ["images", "paths"])
def test_splits_may_have_images_and_paths_in_one_column(first, tmp_path):
    for i in range(8):
        image(tmp_path / "files" / f"{i}.png", i)
    labels = ["cat", "dog"] * 4
    found = {
        "paths": Dataset.from_dict({"image": [f"files/{i}.png" for i in range(8)], "label": labels}),
        "images": Dataset.from_dict(
            {"image": [str(tmp_path / "files" / f"{i}.png") for i in range(8)], "label": labels}
        ).cast_column("image", datasets.Image()),
    }
    other = "paths" if first == "images" else "images"
    DatasetDict(train=found[first], test=found[other]).save_to_disk(tmp_path)
    splits = load_splits(DataOptions(str(tmp_path), train_val_split=0.25))
    assert splits.kind == "image" and [row["image"].getpixel((0, 0))[0] for row in splits.test] == list(range(8))


def test_inputs_of_another_kind_in_a_split_are_rejected(tmp_path):
    rows = Dataset.from_dict({"text": ["x"] * 8, "label": ["a", "b"] * 4})
    numbers = rows.remove_columns("text").add_column("text", [1] * 8)
    DatasetDict(train=rows, test=numbers).save_to_disk(tmp_path / "texts")
    with pytest.raises(ValueError, match="column 'text' of the split 'test' has no texts, but .*int64.*: give --text"):
        load_splits(DataOptions(str(tmp_path / "texts")))
    image(tmp_path / "0.png")
    images = rows.remove_columns("text").add_column("text", [str(tmp_path / "0.png")] * 8)
    DatasetDict(train=images.cast_column("text", datasets.Image()), test=numbers).save_to_disk(tmp_path / "images")
    with pytest.raises(
        ValueError, match="column 'text' of the split 'test' has no images, but .*int64.*: give --image"
    ):
        load_splits(DataOptions(str(tmp_path / "images")))


@pytest.mark.parametrize("suffix", [".h5", ".hdf", ".grib", ".bufr", ".mpg", ".mpeg", ".ps", ".eps", ".wmf", ".emf"])
def test_files_without_pixels_are_no_images(suffix, tmp_path):
    options = folders(tmp_path)
    (tmp_path / "train" / f"data{suffix}").write_bytes(b"no image")
    (tmp_path / "train" / "cat" / f"data{suffix}").write_bytes(b"no image")
    splits = load_splits(options)
    assert len(splits.train) + len(splits.validation) == 8


def test_extensions_are_those_of_the_formats_that_pil_writes_as_images(tmp_path):
    """Each format that PIL writes with pixels and reads under its own name counts."""
    Image.init()
    for suffix, name in Image.EXTENSION.items():
        path = tmp_path / f"x{suffix}"
        try:
            Image.new("RGB", (8, 8)).save(path)
            with Image.open(path) as found:
                found.load()
        except (OSError, KeyError, ValueError):
            continue
        assert suffix in image_extensions() or name in ("EPS", "PDF", "MPO"), suffix
    assert {".png", ".jpg", ".webp", ".tif", ".bmp", ".gif", ".ppm", ".tga", ".psd"} <= image_extensions()


# ---- directories beside tables ----


@pytest.mark.parametrize("name", ["labels.csv", "train.csv", "train/labels.jsonl", "test/notes.csv", "old/train.csv"])
def test_directories_of_images_win_over_tables_beside_them(name, tmp_path, caplog):
    folders(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("id,label\n1,x\n2,y\n")
    splits = load_splits(DataOptions(str(tmp_path)))
    assert splits.kind == "image" and splits.class_names == ["cat", "dog"]
    assert f"has directories of images: the tables beside them are ignored ({name})" in caplog.text


def test_tables_of_all_splits_win_over_directories(tmp_path):
    folders(tmp_path)
    for split in ("train", "test"):
        rows = [{"file": f"{split}/{name}/{i}.png", "label": f"a {name}"} for name in ("cat", "dog") for i in range(2)]
        write_csv(rows, tmp_path / split)
    assert load_splits(DataOptions(str(tmp_path))).class_names == ["a cat", "a dog"]


def test_table_of_images_in_directories_without_classes_is_used(tmp_path):
    rows = [{"file": f"train/images/{i}.png", "label": ("cat", "dog")[i % 2]} for i in range(8)]
    for row in rows:
        image(tmp_path / row["file"])
    write_csv(rows, tmp_path / "labels")
    splits = load_splits(DataOptions(str(tmp_path), test_fraction=0.25))
    assert splits.kind == "image" and splits.class_names == ["cat", "dog"]


def test_directory_of_one_split_and_table_of_another_are_rejected(tmp_path):
    folders(tmp_path)
    (tmp_path / "test").rename(tmp_path / "files")
    write_csv([{"file": "files/cat/0.png", "label": "cat"}], tmp_path / "test")
    with pytest.raises(
        ValueError, match=r"the directory train of images and the table test\.csv: use one form for all"
    ):
        load_splits(DataOptions(str(tmp_path)))


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
