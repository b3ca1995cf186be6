"""The scripts for image classification and the demo, on a small budget."""

import ast
import contextlib
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from demo_training import Run, train
from PIL import Image
from rich.console import Console
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTConfig

from mm_hf import DenseMultiMix, MultiMix, extract
from mm_hf.data import offline
from mm_hf.data.images import ImageTransform
from mm_hf.data.models import image_processor
from mm_hf.training.hub import load_mixing
from tests.helpers.scripts import EXAMPLES, RECIPES, run_script

TINY = (
    "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64,num_channels=1,initializer_range=0.1"
)


@pytest.mark.parametrize("path", [*sorted(EXAMPLES.glob("run_*.py")), EXAMPLES / "demo.py"], ids=lambda path: path.stem)
def test_script_calls_main(path):
    """The other tests call `main()`, except the next one, which starts a script as a user would."""
    assert ast.unparse(ast.parse(path.read_text()).body[-1]) == "if __name__ == '__main__':\n    main()"


def test_image_classification_with_command_line_options(tmp_path):
    options = [
        *[
            "--dataset_name",
            "digits",
            "--max_train_samples",
            "128",
            "--max_eval_samples",
            "100",
            "--augmentation",
            "randaugment",
        ],
        *f"--config_overrides {TINY},image_size=8,patch_size=2 --mixing dense_multimix --num_mixed 50".split(),
        *[
            "--alpha",
            "0.1",
            "0.5",
            "--attention",
            "uniform",
            "--do_train",
            "--do_eval",
            "--max_steps",
            "4",
            "--logging_steps",
            "1",
        ],
        *f"--per_device_train_batch_size 32 --report_to none --output_dir {tmp_path}".split(),
    ]
    command = [sys.executable, str(EXAMPLES / "run_image_classification.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "'loss_dense'" in done.stdout
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert 0 <= results["eval_accuracy"] <= 1 and results["train_loss"] > 0
    for name in ("model.safetensors", "preprocessor_config.json", "trainer_state.json", "train_results.json"):
        assert (tmp_path / name).exists()
    assert load_mixing(tmp_path) == DenseMultiMix(num_mixed=50, alpha=(0.1, 0.5), attention="uniform")
    card = (tmp_path / "README.md").read_text()
    assert "dense-multimix" in card and "image-classification" in card
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert model.config.id2label[7] == "7"
    digit = np.array(offline.load_digits()["test"][0]["image"])
    pixels = AutoImageProcessor.from_pretrained(tmp_path)(Image.fromarray(digit), return_tensors="pt")["pixel_values"]
    assert model(pixels).logits.shape == (1, 10)


def test_image_classification_of_a_directory_with_a_file_of_options(tmp_path):
    data = offline.load_digits()["train"].select(range(120))
    for i, row in enumerate(data):
        folder = tmp_path / "images" / f"digit-{row['label'] % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        row["image"].save(folder / f"{i}.png")
    options = {
        "train_dir": str(tmp_path / "images"),
        "train_val_split": 0.25,
        "config_overrides": TINY + ",image_size=8,patch_size=4",
        "mixing": "multimix",
        "num_mixed": 20,
        "do_train": True,
        "do_eval": True,
        "num_train_epochs": 1,
        "output_dir": str(tmp_path / "out"),
        "report_to": "none",
    }
    (tmp_path / "options.yaml").write_text(yaml.safe_dump(options))
    run_script("run_image_classification", tmp_path / "options.yaml")
    assert load_mixing(tmp_path / "out") == MultiMix(num_mixed=20)
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "out").config.num_labels == 3


@pytest.mark.skipif(not offline.FASHION_MNIST.is_dir(), reason="needs the Debian package dataset-fashion-mnist")
def test_recipe_for_fashion_mnist(tmp_path):
    options = yaml.safe_load((RECIPES / "fashion_mnist.yaml").read_text())
    options |= {"output_dir": str(tmp_path / "out"), "max_steps": 3, "max_eval_samples": 100, "save_strategy": "no"}
    (tmp_path / "options.json").write_text(json.dumps(options))
    run_script("run_image_classification", tmp_path / "options.json")
    assert (tmp_path / "out" / "README.md").exists() and (tmp_path / "out" / "eval_results.json").exists()


def test_parser_accepts_the_recipes():
    from run_image_classification import parse_arguments

    for name in offline.OFFLINE_IMAGES:
        _, data_args, training_args, mixing = parse_arguments([str(RECIPES / f"{name}.yaml")])
        assert data_args.dataset_name == name and training_args.do_train
        assert mixing == DenseMultiMix()


@pytest.mark.parametrize(
    ("name", "locations", "paper"),
    [("cifar100_resnet18", 16, True), ("imagenet_resnet50", 49, True), ("imagenet_deit_small", 196, False)],
)
def test_recipes_for_gpus_have_the_documented_locations(tmp_path, name, locations, paper):
    from run_image_classification import load_model, parse_arguments

    path = tmp_path / f"{name}.yaml"
    path.write_text((RECIPES / path.name).read_text() + "use_cpu: true\n")
    model_args, data_args, training_args, mixing = parse_arguments([str(path)])
    assert mixing.clean_weight == (not paper) and mixing.num_mixed == 1000 and training_args.bf16
    assert data_args.dataset_name == name.split("_")[0].replace("imagenet", "imagenet-1k")
    model, processor = load_model(model_args, [str(i) for i in range(100)])
    batch = {"pixel_values": torch.randn(2, 3, processor.size["height"], processor.size["width"])}
    with torch.no_grad():
        assert extract(model, "auto", **batch).token_logits.shape == (2, locations, 100)


def test_split_of_digits_is_reproducible():
    data = offline.load_digits()
    assert (len(data["train"]), len(data["test"])) == (1347, 450)
    assert set(data["train"].column_names) == {"image", "label"}
    assert data["test"]["label"][:8] == offline.load_digits()["test"]["label"][:8]


def test_images_without_augmentation_are_the_same_in_training_and_evaluation():
    processor = image_processor(ViTConfig(image_size=8, num_channels=1), None)
    rows = offline.load_digits()["train"][:4]
    trained, evaluated = (
        ImageTransform(processor, augmentation="none", num_channels=1, train=train)(dict(rows))["pixel_values"]
        for train in (True, False)
    )
    for one, other in zip(trained, evaluated, strict=True):
        np.testing.assert_array_equal(one, other)


def test_missing_data_set_names_its_package(monkeypatch):
    monkeypatch.setattr(offline, "FASHION_MNIST", Path("/nowhere"))
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        offline.load_fashion_mnist()
    with pytest.raises(ValueError, match="no offline dataset 'cifar'"):
        offline.load_offline("cifar")


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_demo_prints_the_range_of_two_seeds_and_the_deviation_of_more(seeds):
    import demo

    runs = [
        {"accuracy": 0.9 + 0.01 * i, "nll": 0.3, "calibration_error": 0.05, "seconds": 2.0, "loss_terms_per_step": 64}
        for i in range(seeds)
    ]
    console = Console(file=io.StringIO(), width=120)
    demo.show_table(console, "table", {demo.PLAIN: runs, demo.OURS: runs})
    cell = {1: "90.0 ", 2: "90.5 (90.0 to 91.0)", 3: "91.0±1.0"}[seeds]
    assert f" {cell.strip()} " in console.file.getvalue()


def test_demo_on_a_small_budget(tmp_path):
    output = run_script("demo", "--seeds", 1, "--epochs", 2, "--processes", 1, "--output_dir", tmp_path)
    assert "Few images, long training: 400 images, 2 epochs" in output and "Nearly solved: 1,347 images" in output
    assert output.count("One seed shows no reliable difference: use --seeds 4.") == 2
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["seeds"] == [0] and results["versions"]["torch"] == torch.__version__
    for runs in [runs for regime in results["results"].values() for runs in regime.values()]:
        assert set(runs[0]) == {"accuracy", "nll", "calibration_error", "seconds", "loss_terms_per_step"}
    ours = results["results"]["Few images, long training"]["Dense MultiMix"][0]
    assert ours["loss_terms_per_step"] > 64
    for picture in ("training.png", "attention.png"):
        assert Image.open(tmp_path / picture).size[0] > 800
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "model")
    assert model.config.num_labels == 10
    AutoImageProcessor.from_pretrained(tmp_path / "model")

    steps = []
    run = Run("Few images, long training", 400, 2, "Dense MultiMix", 0, tmp_path / "alone")
    alone = train(run, lambda step, loss: steps.append(step))
    for name in ("accuracy", "nll", "calibration_error"):  # the process had trained another model before
        assert alone.metrics[name] == ours[name]
    assert steps == list(range(1, run.steps + 1))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("sent", "to_all"), [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_interrupted_demo_ends_its_processes(tmp_path, sent, to_all):
    """Ctrl-C reaches all processes of a terminal; `kill` and `timeout` reach the first one."""
    command = [sys.executable, "-u", "examples/demo.py", "--processes", "2", "--epochs", "8", "--output_dir", tmp_path]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        cwd=EXAMPLES.parent,
    ) as demo:
        assert demo.stdout is not None
        lines = list(itertools.islice(demo.stdout, 2))
        assert "accuracy" in lines[1]  # of the first completed run: all processes have started
        (os.killpg if to_all else os.kill)(demo.pid, sent)
        rest = demo.communicate(timeout=60)[0]
    assert demo.returncode == 130 and rest.strip().endswith("Interrupted.") and "Traceback" not in rest
    deadline = time.monotonic() + 10  # a terminated process is listed until it has ended
    while training_processes(demo.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not training_processes(demo.pid)


def training_processes(session):
    """Return the command lines of the processes of a session, without the resource tracker, which ends by itself."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended in between
            fields = stat.read_text().rpartition(")")[2].split()
            command = (stat.parent / "cmdline").read_text()
            if int(fields[3]) == session and fields[0] != "Z" and "resource_tracker" not in command:
                found.append(command)
    return found
