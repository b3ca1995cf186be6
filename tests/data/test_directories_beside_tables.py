"""Directories that contain images and tables."""

import pytest

from mm_hf.data.options import DataOptions
from mm_hf.data.splits import load_splits
from tests.helpers.data_files import folders, image, write_csv


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
