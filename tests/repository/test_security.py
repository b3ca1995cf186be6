"""The promises of SECURITY.md: each names the tests that hold it."""

import io
import json
import pickle
import re
import socket
import sys
from pathlib import Path

import pytest
from datasets import config as datasets_config
from huggingface_hub import constants

from mm_hf.cli import main
from mm_hf.data.options import DataOptions
from mm_hf.data.splits import load_splits
from tests.helpers.bad_inputs import VIT, make_workspace, plant_code

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("security") / "files"
    make_workspace(root)
    return root


def test_every_promise_names_tests_that_exist():
    text = (ROOT / "SECURITY.md").read_text()
    promises = re.findall(r"^- (.*?)(?=^- |\Z)", text, re.MULTILINE | re.DOTALL)
    assert len(promises) >= 6
    for promise in promises:
        names = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", promise)
        assert names, promise
        for path, name in names:
            assert re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.MULTILINE), (path, name)


DATA = "--train_dir images/train --test_dir images/test"


@pytest.mark.parametrize(
    "line",
    [
        "check remote_code",
        "check remote_code --task image",
        "predict remote_code images/test",
        f"train {DATA} --model_name_or_path remote_code",
        f"train {DATA} --model_name_or_path vit --image_processor_name remote_code",
        f"compare {DATA} --model_name_or_path remote_code",
        f"analyze remote_code {DATA}",
        "train --dataset_name reviews --model_type bert --tokenizer_name remote_code",
        "train --dataset_name remote_code --model_type vit",
    ],
)
def test_code_of_a_model_or_a_dataset_does_not_run(line, files, capsys, monkeypatch):
    monkeypatch.chdir(files)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))  # consent to a prompt
    (files / "reviews").mkdir(exist_ok=True)
    for split in ("train", "test"):
        (files / "reviews" / f"{split}.csv").write_text("text,label\ngood,up\nbad,down\nfine,up\npoor,down\n")
    assert main(line.split()) == 2
    assert not (files / "remote_code" / "ran").exists()
    assert "Traceback" not in capsys.readouterr().err


@pytest.fixture
def connections(monkeypatch):
    """Return the hosts that are looked up or connected to. Each attempt fails."""
    found = []

    def record(*args, **kwargs):
        found.append(args)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", record)
    monkeypatch.setattr(socket.socket, "connect", record)
    for module in (constants, datasets_config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets_config, "HF_UPDATE_DOWNLOAD_COUNTS", True)
    return found


def test_local_files_need_no_network(files, connections, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(files)
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").write_text("text,label\ngood,up\nbad,down\nfine,up\npoor,down\n")
    load_splits(DataOptions(str(tmp_path)), cache_dir=str(tmp_path / "cache"))
    assert main(["check", "vit", "--rounds", "0", "--mixing", "erm"]) == 0
    assert main(["predict", "vit", "images/test"]) == 0
    train = f"train {DATA} {VIT} --mixing erm --max_steps 1 --use_cpu --save_strategy no --output_dir {tmp_path}/out"
    assert main(train.split()) == 0
    assert not connections


class Planted:
    """An object whose unpickling creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("command", ["check", "predict"])
def test_pickles_are_not_loaded(command, files, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(files)
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        (model / name).write_bytes((files / "vit" / name).read_bytes())
    (model / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Planted(tmp_path / "ran")}))
    assert main([command, str(model), *(["images/test"] if command == "predict" else [])]) == 2
    assert not (tmp_path / "ran").exists()
    assert "Traceback" not in capsys.readouterr().err


def test_planted_code_runs_if_it_is_trusted(tmp_path):
    """The planted code is valid: `trust_remote_code=True` runs it."""
    from transformers import AutoConfig

    plant_code(tmp_path / "remote_code")
    config = json.loads((tmp_path / "remote_code" / "config.json").read_text())
    assert config["auto_map"]
    with pytest.raises(Exception):  # noqa: B017
        AutoConfig.from_pretrained(str(tmp_path / "remote_code"), trust_remote_code=True)
    assert (tmp_path / "remote_code" / "ran").exists()
