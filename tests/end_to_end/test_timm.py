"""Models of timm in every command, with torchvision and timm installed (`make test-vision`)."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

timm = pytest.importorskip("timm")
pytest.importorskip("torchvision")
from timm.models import save_for_hf  # noqa: E402
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline  # noqa: E402

from mm_hf.cli import main  # noqa: E402

pytestmark = pytest.mark.vision
COLORS = {"blue": (0, 0, 250), "green": (0, 250, 0), "red": (250, 0, 0)}
OPTIONS = (
    "--per_device_train_batch_size 12 --num_train_epochs 1 --learning_rate 3e-3 --use_cpu --augmentation crop_flip"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return options that name directories of images with three classes."""
    directory, random = tmp_path_factory.mktemp("colors"), np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        for name, color in COLORS.items():
            (directory / split / name).mkdir(parents=True)
            for i in range(count):
                noise = np.clip(np.array(color) + random.integers(-60, 60, (40, 50, 3)), 0, 255)
                Image.fromarray(noise.astype(np.uint8)).save(directory / split / name / f"{i}.png")
    return ["--train_dir", str(directory / "train"), "--test_dir", str(directory / "test")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Return the directory of a model that timm saved, with 5 classes."""
    directory = tmp_path_factory.mktemp("timm")
    model = timm.create_model(
        "test_vit", num_classes=5, img_size=48, depth=1, pretrained_cfg_overlay={"input_size": (3, 48, 48)}
    )
    save_for_hf(model, directory, safe_serialization=True)
    return str(directory)


@pytest.fixture(scope="module")
def trained(folders, checkpoint, tmp_path_factory):
    directory = str(tmp_path_factory.mktemp("trained"))
    given = ["--model_name_or_path", checkpoint, "--ignore_mismatched_sizes", "true", "--output_dir", directory]
    assert main(["train", *given, *folders, *OPTIONS.split()]) == 0
    return directory


def test_checkpoint_of_timm_is_checked(checkpoint, capsys):
    assert main(["check", checkpoint, "--rounds", "0"]) == 0
    printed = capsys.readouterr().out
    assert "dense_multimix trains this model" in printed and "pixel_values 8 x 3 x 48 x 48" in printed


def test_trained_model_is_one_of_timm_with_the_same_predictions(trained, folders):
    red = sorted(Path(folders[3]).glob("red/*.png"))
    model = AutoModelForImageClassification.from_pretrained(trained).eval()
    inputs = AutoImageProcessor.from_pretrained(trained)([Image.open(path) for path in red])
    with torch.no_grad():
        logits = model(**inputs).logits
        plain = timm.create_model(f"local-dir:{trained}", pretrained=True).eval()
        assert torch.equal(plain(inputs["pixel_values"]), logits)
    predicted = pipeline("image-classification", trained, device="cpu")(str(red[0]), top_k=1)
    assert predicted[0]["label"] == model.config.id2label[int(logits[0].argmax())]
    assert json.loads((Path(trained) / "config.json").read_text())["label_names"] == list(COLORS)


def test_trained_model_is_analyzed(trained, folders, tmp_path, capsys):
    assert main(["analyze", trained, *folders, "--output_dir", str(tmp_path), "--use_cpu"]) == 0
    results = json.loads((Path(trained) / "test_results.json").read_text())
    assert f"accuracy: {100 * results['test_accuracy']:.2f} %" in capsys.readouterr().out


def test_model_of_timm_from_scratch_is_compared(folders, tmp_path):
    overrides = json.dumps({"architecture": "test_vit", "model_args": {"img_size": 32, "depth": 1}})
    given = ["--model_type", "timm_wrapper", "--config_overrides", overrides, "--methods", "erm", "dense_multimix"]
    options = [*given, *folders, *OPTIONS.split(), "--seeds", "1", "--output_dir", str(tmp_path)]
    assert main(["compare", *options]) == 0
    assert (tmp_path / "report.html").is_file()


def test_resumed_training_equals_uninterrupted_training(folders, checkpoint, tmp_path):
    given = ["--model_name_or_path", checkpoint, "--ignore_mismatched_sizes", "true", "--output_dir", str(tmp_path)]
    options = [*given, *folders, *OPTIONS.replace("epochs 1", "epochs 2").split(), "--save_total_limit", "3"]
    assert main(["train", *options]) == 0
    expected = AutoModelForImageClassification.from_pretrained(tmp_path).state_dict()
    shutil.rmtree(max(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2])))
    (tmp_path / "model.safetensors").unlink()
    assert main(["train", *options, "--resume_from_checkpoint"]) == 0
    resumed = AutoModelForImageClassification.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
