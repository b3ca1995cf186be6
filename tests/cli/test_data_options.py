"""Options of `mm-hf train` for the data: a stratified test split, a check of all rows, and a dry run."""

import numpy as np
import pytest
from PIL import Image

from mm_hf.cli import main
from mm_hf.data.check import find_problems
from mm_hf.data.options import DataOptions
from mm_hf.data.splits import load_splits
from tests.helpers.bad_inputs import VIT
from tests.helpers.commands import command_error


@pytest.fixture
def photos(tmp_path):
    random = np.random.default_rng(0)
    for name, count in (("cat", 30), ("dog", 10)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(count):
            path = tmp_path / "photos" / name / f"{i:02}.png"
            Image.fromarray(random.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    return tmp_path / "photos"


def test_test_fraction_takes_the_same_share_of_each_class(photos):
    splits = load_splits(DataOptions(train_dir=str(photos), test_fraction=0.2))
    assert np.bincount(splits.test["label"]).tolist() == [6, 2]
    assert len(splits.train) + len(splits.validation) == 32
    again = load_splits(DataOptions(train_dir=str(photos), test_fraction=0.2))
    assert again.test["label"][:] == splits.test["label"][:]
    with pytest.raises(ValueError, match="test_fraction 0.2 requires a dataset without the split 'test'"):
        load_splits(DataOptions("digits", test_fraction=0.2))


def test_check_data_lists_every_problem(photos, tmp_path, capsys):
    for name in ("cat/03.png", "dog/07.png"):
        (photos / name).write_bytes((photos / name).read_bytes()[:40])
    assert main(f"train --train_dir {photos} --test_fraction 0.2 {VIT} --check_data".split()) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "cat/03.png" in lines[0] and "dog/07.png" in lines[1] and "found 2 problems" in lines[-1]
    assert len(lines) == 3
    for split in ("train", "test"):
        (tmp_path / "table").mkdir(exist_ok=True)
        (tmp_path / "table" / f"{split}.csv").write_text("text,label\ngood,up\n,down\nfine,\n")
    found = list(find_problems(DataOptions(str(tmp_path / "table")), cache_dir=str(tmp_path / "cache")))
    assert sorted(found) == sorted(
        f"{split}, row {row}: the {what} is empty."
        for split in ("train", "test")
        for row, what in ((1, "text in the column 'text'"), (2, "label"))
    )


def test_dry_run_prints_the_plan_and_does_not_train(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("transformers.Trainer.train", lambda *args, **kwargs: pytest.fail("it trains"))
    line = f"train --train_dir {photos} --test_fraction 0.2 {VIT} --dry_run --epochs 4 --batch_size 9 --use_cpu"
    assert main([*line.split(), "--output_dir", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    for text in (
        "27 training, 5 validation and 8 test",
        "2 (cat, dog)",
        "ViTForImage",
        "plan: ",
        "steps: 12 of 9",
        "seconds for forward and backward passes",
    ):
        assert text in out, (text, out)
    assert "--test_fraction must lie in (0, 1), got '2'" in command_error(capsys, "train", "--test_fraction", "2")
