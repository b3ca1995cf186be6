"""Directories of images, files with paths, and what is wrong with them."""

import json
import logging

import pytest
from PIL import Image

from mm_hf.data.folders import load_image_folders
from mm_hf.data.predict import find_files
from mm_hf.data.splits import DataOptions, load_splits
from mm_hf.training.pretrained import from_pretrained


def write_images(root, names, count=3):
    for name in names:
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("RGB", (8, 8), (i * 20, 0, 0)).save(root / name / f"{i}.png")
    return root


def test_classes_are_the_first_subdirectories(tmp_path):
    write_images(tmp_path / "set [1]" / "train", ["cats/indoors", "cats", "dogs/2020/may", ".cache"])
    (tmp_path / "set [1]" / "train" / "notes.txt").write_text("not an image")
    data = load_image_folders({"train": tmp_path / "set [1]" / "train"})
    assert data["train"].features["label"].names == ["cats", "dogs"]
    assert data["train"]["label"] == [0] * 6 + [1] * 3
    assert data["train"][8]["image"].size == (8, 8)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda root: None, "is not a directory"),
        (lambda root: root.mkdir(), "has no images"),
        (lambda root: write_images(root, ["."]), "has 3 images outside of the subdirectories"),
        (lambda root: (root / "cats").mkdir(parents=True), "has no images"),
    ],
)
def test_unusable_directory_is_named(tmp_path, prepare, message):
    prepare(tmp_path / "train")
    with pytest.raises(ValueError, match=rf"--train_dir .*train {message}.*subdirector.* class"):
        load_splits(DataOptions(train_dir=str(tmp_path / "train"), test_dir=str(tmp_path / "train")))


def test_classes_without_training_examples_are_reported(tmp_path, caplog):
    write_images(tmp_path / "train", ["cats", "dogs"], 6)
    write_images(tmp_path / "test", ["cats", "owls"])
    options = DataOptions(train_dir=str(tmp_path / "train"), test_dir=str(tmp_path / "test"))
    with caplog.at_level(logging.WARNING):
        assert load_splits(options).class_names == ["cats", "dogs", "owls"]
    assert (
        "The split 'test' has 1 classes without training examples, which the model cannot learn: owls." in caplog.text
    )


def csv_files(root, train, test="text,label\na,x\nb,y\n"):
    root.mkdir(exist_ok=True)
    (root / "train.csv").write_text(train)
    (root / "test.csv").write_text(test)
    return DataOptions(dataset_name=str(root))


def test_empty_label_is_reported_with_its_row(tmp_path):
    options = csv_files(tmp_path / "data", "text,label\na,x\nb,\nc,y\n")
    with pytest.raises(
        ValueError, match="column 'label' of the split 'train' is empty in 1 rows, the first of .* row 1"
    ):
        load_splits(options)


@pytest.mark.parametrize("content", ['text,label\n"a,x\nb,y\n', "", "text,label\na,x\nb,y,z,w\n"])
def test_unreadable_file_is_an_error_of_one_sentence(tmp_path, content):
    with pytest.raises(ValueError, match=r"data/train\.csv (has a damaged row in line \d+: |is empty: add)"):
        load_splits(csv_files(tmp_path / "data", content))


def test_column_of_image_paths_is_decoded(tmp_path):
    write_images(tmp_path / "data", ["images"], 4)
    rows = "file,label\n" + "".join(f"images/{i}.png,{'xy'[i % 2]}\n" for i in range(4))
    options = csv_files(tmp_path / "data", rows, rows)
    options.image_column_name, options.train_val_split = "file", 0.5
    splits = load_splits(options)
    assert splits.kind == "image" and splits.test[1]["file"].size == (8, 8)
    (tmp_path / "data" / "images" / "3.png").unlink()
    with pytest.raises(ValueError, match=r"column 'file' of the split '\w+' names no image file in row 3"):
        load_splits(options)


def test_files_to_predict_are_found_in_linked_directories(tmp_path):
    write_images(tmp_path, ["elsewhere", "given", "given/.cache"], 1)
    (tmp_path / "given" / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "given", target_is_directory=True)
    found = find_files([tmp_path / "given"], "image")
    assert found == [tmp_path / "given" / "0.png", tmp_path / "given" / "link" / "0.png"]


def test_code_in_a_models_repository_is_never_run(tmp_path):
    from transformers import AutoConfig, AutoModelForImageClassification

    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    config = {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForImageClassification": "evil.Model"}}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", **config}))
    for auto in (AutoConfig, AutoModelForImageClassification):
        with pytest.raises(
            ValueError, match="can be loaded only by running the code in its repository, which mm_hf does"
        ):
            from_pretrained(auto, str(tmp_path))
    assert not (tmp_path / "ran").exists()
