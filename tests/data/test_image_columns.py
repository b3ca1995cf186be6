"""Columns of images in tables: paths and contents of files."""

import datasets
import pytest
from datasets import Dataset, DatasetDict
from PIL import Image

from mm_hf.data.check import find_problems
from mm_hf.data.folders import image_extensions
from mm_hf.data.options import DataOptions
from mm_hf.data.splits import load_splits
from tests.helpers.data_files import content, contents, folders, image, tables, write_csv


@pytest.mark.parametrize("column", ["image", "anything"])
@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(
    "value",
    [
        content(),
        {"bytes": content()},
        {"bytes": content(), "path": "x.png"},
        {"bytes": content(), "path": None},
        {"bytes": content(), "path": "https://example.com/x.png"},
    ],
)
def test_contents_of_image_files_are_images(value, named, column, tmp_path):
    options = contents(tmp_path, [value] * 2, column, image_column_name=column if named else None)
    splits = load_splits(options)
    assert splits.kind == "image" and splits.inputs == [column] and splits.test[3][column].size == (8, 8)
    assert list(find_problems(options)) == []


@pytest.mark.parametrize("other", [content(), None], ids=["some", "all"])
@pytest.mark.parametrize(
    "address",
    ["https://example.com/x.png", "s3://bucket/x.png", "hf://datasets/a/b/x.png", "zip://x.png::https://e.com/z.png"],
)
def test_addresses_of_images_are_errors_without_network_access(address, other, tmp_path, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *args: pytest.fail("network access"))
    values = [{"bytes": other, "path": address}, {"bytes": None, "path": address}]
    options = contents(tmp_path / "contents", values, image_column_name="image")
    match = (
        rf"has '{address}' in row {0 if other is None else 1}, which is no file of this machine: download the images"
    )
    for use in (load_splits, lambda options: list(find_problems(options))):
        with pytest.raises(ValueError, match=match):
            use(options)
    rows = [{"image": address, "label": "ab"[i % 2]} for i in range(4)]
    with pytest.raises(ValueError, match="names no image file in row 0"):
        load_splits(tables(tmp_path / "paths", write_csv, rows))


@pytest.mark.parametrize("value", [None, {"bytes": None, "path": None}])
def test_missing_contents_of_an_image_are_named(value, tmp_path):
    good = {"bytes": content(), "path": None}
    with pytest.raises(ValueError, match="has no image in row 1: add it or remove the row"):
        load_splits(contents(tmp_path, [good, value]))


def test_paths_with_spaces_around_them_are_no_texts(tmp_path):
    image(tmp_path / "0.png")
    rows = [{"image": " 0.png", "label": "ab"[i % 2]} for i in range(4)]
    with pytest.raises(ValueError, match=r"names no image file in row 0 \(' 0.png'\)"):
        load_splits(tables(tmp_path, write_csv, rows))


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
