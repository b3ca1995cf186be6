"""`mm-hf train --lora_r`: a plain PEFT adapter, which resumes, and which the other commands load."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoTokenizer,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from mm_hf.cli import main
from mm_hf.data import options
from mm_hf.data.build import build_task
from mm_hf.data.options import DataOptions, ModelOptions
from mm_hf.training.hub import load_mixing
from tests.helpers.commands import command_error

DATA = ["--dataset_name", "digits", "--max_train_samples", "64", "--max_validation_samples", "20"]
DATA += ["--max_test_samples", "40"]
BUDGET = ["--per_device_train_batch_size", "32", "--learning_rate", "1e-2", "--num_mixed", "20", "--use_cpu"]


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """Return the directory of a tiny pretrained ViT with another number of classes than the data."""
    directory = tmp_path_factory.mktemp("vit")
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4,
        num_labels=3, num_channels=1, initializer_range=0.5,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(directory)
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5])
    processor.save_pretrained(directory)
    return directory


def train(model, out, *given):
    line = ["--model_name_or_path", model, "--ignore_mismatched_sizes", "--output_dir", out, *given]
    return main(["train", *map(str, [*DATA, *BUDGET, *line])])


def adapter_of(directory):
    return load_file(directory / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def trained(vit, tmp_path_factory):
    out = tmp_path_factory.mktemp("lora") / "out"
    assert train(vit, out, "--lora_r", 4, "--num_train_epochs", 2, "--save_total_limit", 2) == 0
    return out


def test_adapter_is_plain_peft(trained, vit):
    assert not (trained / "model.safetensors").exists() and load_mixing(trained).num_mixed == 20
    config = AutoConfig.from_pretrained(trained)
    assert config.num_labels == 10
    base = AutoModelForImageClassification.from_pretrained(vit, config=config, ignore_mismatched_sizes=True)
    model = PeftModel.from_pretrained(base, trained)
    assert model.peft_config["default"].r == 4 and model.peft_config["default"].modules_to_save == ["classifier"]
    names = {name.rsplit(".lora_", 1)[0] for name in adapter_of(trained) if ".lora_A" in name}
    linear = [name for name, part in base.vit.named_modules() if type(part).__name__ == "Linear"]
    assert len(names) == 12 and len(linear) >= 12  # all linear layers of two blocks
    state = json.loads((trained / "trainer_state.json").read_text())
    assert "loss_dense" in state["log_history"][0]


def test_resumed_adapter_equals_that_of_an_uninterrupted_run(trained, vit, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "out")
    for file in ("checkpoint-4", "adapter_model.safetensors"):
        path = tmp_path / "out" / file
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    given = ["--num_train_epochs", 2, "--save_total_limit", 2, "--resume_from_checkpoint"]
    for other, change in [(["--lora_r", 8], "lora_r=4, which is now 8"), ([], "lora_r=4, which is now None")]:
        assert train(vit, tmp_path / "out", *other, *given) == 2
        assert f"was trained with {change}. Use the same LoRA settings." in capsys.readouterr().err
    assert train(vit, tmp_path / "out", "--lora_r", 4, *given) == 0
    again, first = adapter_of(tmp_path / "out"), adapter_of(trained)
    assert again.keys() == first.keys() and all(torch.equal(again[name], first[name]) for name in first)


def test_predict_and_analyze_load_the_adapter(trained, vit, tmp_path, capsys):
    image = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "digit.png")
    assert main(["predict", str(trained), str(tmp_path / "digit.png"), "--output_file", str(tmp_path / "a.csv")]) == 0
    (row,) = csv.DictReader((tmp_path / "a.csv").open())
    config = AutoConfig.from_pretrained(trained)
    base = AutoModelForImageClassification.from_pretrained(vit, config=config, ignore_mismatched_sizes=True)
    model = PeftModel.from_pretrained(base, trained).eval()
    pixels = AutoImageProcessor.from_pretrained(trained)(Image.fromarray(image), return_tensors="pt")
    best = model(**pixels).logits.softmax(dim=-1)[0].max(dim=0)
    assert row["label"] == config.id2label[int(best.indices)]
    assert float(row["probability"]) == pytest.approx(float(best.values), abs=1e-4)

    where = ["--output_dir", str(tmp_path / "analysis"), "--robustness_samples", "0", "--use_cpu"]
    assert main(["analyze", str(trained), *DATA, *where]) == 0
    expected = json.loads((trained / "test_results.json").read_text())["test_accuracy"]
    rows = csv.DictReader((tmp_path / "analysis" / "results.csv").open())
    assert {row["metric"]: float(row["value"]) for row in rows}["accuracy"] == pytest.approx(expected)
    message = command_error(capsys, "train", *DATA, *BUDGET, "--model_name_or_path", trained, "--lora_r", 2)
    assert "is an adapter itself: give its base model, or merge the adapter" in message


def test_adapter_of_a_text_model(reviews, tmp_path):
    data, model = reviews
    line = ["--dataset_name", data, "--label_column_name", "sentiment", "--model_name_or_path", model, "--lora_r", 2]
    line += ["--cache_dir", tmp_path / "cache", "--num_train_epochs", 1, "--lora_target_modules", "query", "value"]
    assert main(["train", *map(str, [*line, *BUDGET]), "--output_dir", str(tmp_path / "out")]) == 0
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert loaded.peft_config["default"].target_modules == {"query", "value"}
    (tmp_path / "one.txt").write_text("very good film")
    assert (
        main(["predict", str(tmp_path / "out"), str(tmp_path / "one.txt"), "--output_file", str(tmp_path / "b")]) == 0
    )
    (row,) = csv.DictReader((tmp_path / "b").open())
    tokens = AutoTokenizer.from_pretrained(tmp_path / "out")("very good film", return_tensors="pt")
    assert float(row["probability"]) == pytest.approx(float(loaded(**tokens).logits.softmax(dim=-1).max()), abs=1e-4)


def test_adapters_that_cannot_be_trained_are_rejected_before_the_imports(capsys, monkeypatch, vit):
    scratch = ["train", *DATA, "--model_type", "vit", "--lora_r", 4]
    assert "--lora_r requires a pretrained model, since only the adapter is saved" in command_error(capsys, *scratch)
    given = ["train", *DATA, "--model_name_or_path", vit]
    assert "--lora_r must be an integer of at least 1, got '0'" in command_error(capsys, *given, "--lora_r", 0)
    message = command_error(capsys, *given, "--lora_target_modules", "query")
    assert "--lora_target_modules requires an adapter: give --lora_r" in message
    found = options.importlib.util.find_spec
    monkeypatch.setattr(options.importlib.util, "find_spec", lambda name: None if name == "peft" else found(name))
    message = command_error(capsys, *given, "--lora_r", 4)
    assert "--lora_r requires PEFT, which is not installed: pip install peft." in message


def test_a_comparison_starts_from_the_merged_adapter(trained, vit):
    task = build_task(DataOptions("digits", max_train_samples=32), ModelOptions(model_name_or_path=str(trained)))
    config = AutoConfig.from_pretrained(trained)
    base = AutoModelForImageClassification.from_pretrained(vit, config=config, ignore_mismatched_sizes=True)
    adapted = PeftModel.from_pretrained(base, trained).eval()
    pixels = torch.stack([task.test_dataset[i]["pixel_values"] for i in range(8)])
    model = task.model_init().eval()
    assert type(model) is ViTForImageClassification and all(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(model(pixel_values=pixels).logits, adapted(pixel_values=pixels).logits)


def test_the_head_of_an_adapter_with_other_classes_is_replaced_on_request(trained, capsys):
    three = DataOptions("digits", ood_classes=["3", "4", "5", "6", "7", "8", "9"])
    with pytest.raises(ValueError, match=r"another number of classes than the dataset: give --ignore_mismatched_sizes"):
        build_task(three, ModelOptions(model_name_or_path=str(trained)))
    found = build_task(three, ModelOptions(model_name_or_path=str(trained), ignore_mismatched_sizes=True)).model_init()
    assert found.config.num_labels == 3 and found.classifier.out_features == 3
