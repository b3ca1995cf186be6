"""`mm-hf train` from end to end: plain output, exact resumption, and errors before training."""

import json
import re
import shutil

import pytest
import torch
import yaml
from datasets import load_dataset
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    EvalPrediction,
    TrainingArguments,
    pipeline,
)

from mm_hf import DenseMultiMix
from mm_hf.cli import main, train
from mm_hf.data.build import ModelOptions, build_task
from mm_hf.data.splits import DataOptions
from mm_hf.evaluation.metrics import classification_metrics, predictions
from mm_hf.training.hub import load_mixing, load_plan
from tests.helpers.commands import TINY, command_error

OPTIONS = (
    f"--dataset_name digits --model_type vit --config_overrides {TINY} --max_train_samples 96 "
    "--max_validation_samples 40 --max_test_samples 80 --augmentation crop --per_device_train_batch_size 32 "
    "--learning_rate 3e-3 --use_cpu"
).split()
DATA = DataOptions("digits", max_train_samples=96, max_validation_samples=40, max_test_samples=80, augmentation="crop")


def run(*arguments):
    assert main(["train", *OPTIONS, *map(str, arguments)]) == 0


def weights(directory):
    return AutoModelForImageClassification.from_pretrained(directory).state_dict()


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("trained") / "model"
    run("--mixing", "dense_multimix", "--num_mixed", 30, "--num_train_epochs", 3, "--output_dir", directory)
    return directory


def test_output_is_a_plain_model_tested_once(trained):
    assert load_mixing(trained) == DenseMultiMix(num_mixed=30) and load_plan(trained).pool == "token[0]"
    results = json.loads((trained / "test_results.json").read_text())
    task = build_task(DATA, ModelOptions(model_name_or_path=str(trained)), trained=True)
    model = AutoModelForImageClassification.from_pretrained(trained)
    batch = [task.test_dataset[i] for i in range(80)]
    pixel_values = torch.stack([row["pixel_values"] for row in batch])
    labels = torch.tensor([row["labels"] for row in batch])
    logits, _ = predictions(model, [{"pixel_values": pixel_values, "labels": labels}])
    expected = classification_metrics(EvalPrediction(logits.numpy(), labels.numpy()))
    assert {name: results[f"test_{name}"] for name in expected} == pytest.approx(expected, abs=1e-5)
    history = json.loads((trained / "trainer_state.json").read_text())["log_history"]
    assert sum("eval_accuracy" in entry for entry in history) == 3 and not any("test_loss" in e for e in history)
    assert AutoImageProcessor.from_pretrained(trained).size["height"] == 8


def test_resumed_run_equals_uninterrupted_run(trained, tmp_path, capsys):
    given = ["--num_mixed", 30, "--num_train_epochs", 3, "--output_dir", tmp_path]
    run("--save_total_limit", 3, *given)
    shutil.rmtree(tmp_path / "checkpoint-9")
    assert "contains checkpoint-6 of an earlier training run: resume it with --resume_from_checkpoint" in command_error(
        capsys, "train", *OPTIONS, *given
    )
    assert (
        "was trained with other settings: method='dense_multimix', which is now 'mixup'. Use the same"
        in command_error(
            capsys, "train", *OPTIONS, "--mixing", "mixup", "--output_dir", tmp_path, "--resume_from_checkpoint"
        )
    )
    assert "was trained with other settings: seed=42, which is now 5. Use the same settings" in command_error(
        capsys, "train", *OPTIONS, *given, "--seed", 5, "--resume_from_checkpoint"
    )
    (tmp_path / "model.safetensors").unlink()
    run(*given, "--resume_from_checkpoint")
    assert re.search(
        r"epoch 3, step 9 of 9; loss .* \(clean .*, dense .*\); validation accuracy", capsys.readouterr().out
    )
    assert equal(weights(tmp_path), weights(trained))


def test_incomplete_checkpoint_is_skipped(trained, tmp_path):
    given = ["--num_mixed", 30, "--num_train_epochs", 3, "--output_dir", tmp_path]
    run("--save_total_limit", 3, *given)
    (tmp_path / "checkpoint-9" / "optimizer.pt").unlink()
    (tmp_path / "model.safetensors").unlink()
    run(*given, "--resume_from_checkpoint")
    assert (tmp_path / "checkpoint-9" / "optimizer.pt").exists()  # written again after resuming from checkpoint-6
    assert equal(weights(tmp_path), weights(trained))


def test_python_api_gives_the_same_model(trained, tmp_path):
    """The command only combines a task, a trainer, and Trainer's own methods."""
    task = build_task(DATA, ModelOptions(model_type="vit", config_overrides=TINY))
    args = TrainingArguments(
        str(tmp_path), num_train_epochs=3, per_device_train_batch_size=32, learning_rate=3e-3, use_cpu=True,
        disable_tqdm=True, eval_strategy="epoch", save_strategy="epoch",
    )  # fmt: skip
    trainer = task.trainer(args, DenseMultiMix(num_mixed=30))
    trainer.train()
    trainer.save_model()
    assert equal(weights(tmp_path), weights(trained))


def test_building_a_task_creates_no_training_arguments(monkeypatch):
    """The last TrainingArguments of a process determine its devices; others would reset the ranks of torchrun."""
    monkeypatch.setattr("mm_hf.comparison.task.TrainingArguments", lambda *args, **kwargs: pytest.fail("created"))
    build_task(DATA, ModelOptions(model_type="vit", config_overrides=TINY))


def test_options_override_the_option_file(tmp_path, monkeypatch):
    parsed = {}
    monkeypatch.setattr(
        "mm_hf.data.build.build_task", lambda data, model: parsed.update(data=data, model=model) or 1 / 0
    )
    options = {"dataset_name": "digits", "mixing": "mixup", "alpha": 0.5, "do_train": True, "do_eval": True}
    options |= {
        "model_type": "vit",
        "config_overrides": {"depths": [1, 1]},
        "logging_steps": 5,
        "output_dir": str(tmp_path / "out"),
    }
    (tmp_path / "options.yaml").write_text(yaml.safe_dump(options))
    created = []
    original = train.training_arguments
    monkeypatch.setattr(train, "training_arguments", lambda *args: created.append(original(*args)) or created[-1])
    with pytest.raises(ZeroDivisionError):
        main(["train", str(tmp_path / "options.yaml"), "--dataset_name", "fashion_mnist", "--eval_strategy", "no"])
    assert parsed["data"].dataset_name == "fashion_mnist" and parsed["model"].config_overrides == '{"depths": [1, 1]}'
    args = created[0]
    assert (args.logging_strategy, args.eval_strategy, args.save_strategy) == ("steps", "no", "epoch")
    assert args.output_dir == str(tmp_path / "out") and args.logging_steps == 5


def test_settings_of_other_methods_are_rejected():
    from mm_hf.methods import METHODS
    from mm_hf.methods.settings import settings_of

    for name, method in METHODS.items():
        assert train.method_name(["--num_mixed", "3", f"--mixing={name}"]) == name
        others = train.other_settings(name, settings_of(method))
        assert not {f"--{setting}" for setting in settings_of(method)} & set(others)
    assert train.other_settings("mixup", ["alpha", "class_weights"])["--num_mixed"] == (
        "is a setting of dense_multimix and multimix, not of --mixing mixup, whose settings are alpha, class_weights."
    )
    assert (
        "not of --mixing erm, whose settings are class_weights."
        in train.other_settings("erm", ["class_weights"])["--alpha"]
    )


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--mixing", "dense_multimx"], "no mixing method 'dense_multimx' (did you mean dense_multimix?)"),
        (["--num_mixd", "3"], "--num_mixd is not an option of mm-hf train .* did you mean --num_mixed?"),
        (["--mixing", "mixup", "--num_mixed", "3"], "--num_mixed is a setting of dense_multimix and multimix, not of"),
        (["--num_mixed", "-3"], "num_mixed must be"),
        (["--learning_rte", "1"], "did you mean --learning_rate?"),
        (["--report_to", "tensorbord"], "--report_to tensorbord is not an installed tracker"),
        (["--do_eval", "no"], "--do_eval must not be False"),
        (["--resume_from_checkpoint"], "No valid checkpoint found in output directory ("),
        (["--resume_from_checkpoint", "nowhere"], "--resume_from_checkpoint nowhere is not a directory"),
        (["--ood_dataset_name", "digits"], "mm-hf analyze MODEL --ood_dataset_name"),
        (["--attention_map_steps", "5"], "no tracker that accepts images"),
        (["--dataset_name", "digts"], "no dataset 'digts' (did you mean digits?): it is neither a directory"),
        (["--model_name_or_path", "no/where"], "couldn't connect"),
        (["--image_column_name", "picture"], "no column 'picture': choose one of its columns image, label"),
        (["--num_train_epochs", "many"], "--num_train_epochs must be a number, got 'many'"),
    ],
)  # fmt: skip
def test_errors_are_one_sentence_before_training(given, sentence, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.Trainer.train", lambda *args, **kwargs: pytest.fail("it trains"))
    message = command_error(capsys, "train", *OPTIONS, "--output_dir", tmp_path / "out", *given)
    assert re.search(re.escape(sentence).replace(r"\.\*", ".*"), message), message
    assert message.count("\n") == 1


def test_text_model(reviews, tmp_path, capsys):
    data, model = reviews
    given = ["--dataset_name", data, "--label_column_name", "sentiment", "--model_name_or_path", model, "--use_cpu"]
    given += ["--cache_dir", tmp_path / "cache", "--num_train_epochs", 1, "--mixing", "multimix", "--num_mixed", 9]
    given += ["--report_to", "tensorboard", "--attention_map_steps", 2] if _has_tensorboard() else []
    assert main(["train", *map(str, given), "--output_dir", str(tmp_path / "out")]) == 0
    assert "21 test examples" in capsys.readouterr().out
    classify = pipeline("text-classification", str(tmp_path / "out"))
    assert classify("very good film")[0]["label"] in ("up", "down")
    rows = load_dataset(str(data), cache_dir=str(tmp_path / "cache"))["test"]
    correct = sum(found["label"] == row["sentiment"] for found, row in zip(classify(rows["text"][:]), rows))
    results = json.loads((tmp_path / "out" / "test_results.json").read_text())
    assert results["test_accuracy"] == pytest.approx(correct / len(rows))


def _has_tensorboard():
    from transformers.integrations import is_tensorboard_available

    return is_tensorboard_available()


def test_push_passes_card_arguments_to_trainer(trained, tmp_path, monkeypatch):
    """Other tests cover the push itself."""
    from mm_hf import MultiMixTrainer

    calls = []
    monkeypatch.setattr(MultiMixTrainer, "init_hf_repo", lambda self, token=None: calls.append(self.args.hub_model_id))
    monkeypatch.setattr(MultiMixTrainer, "push_to_hub", lambda self, *args, **kwargs: calls.append(kwargs))
    run("--mixing", "erm", "--num_train_epochs", 1, "--output_dir", tmp_path, "--save_strategy", "no", "--push_to_hub",
        "--hub_model_id", "me/it")  # fmt: skip
    assert calls[0] == "me/it"
    assert calls[-1] == {"finetuned_from": None, "tasks": "image-classification", "dataset": "digits"}


def test_training_that_mixes_nothing_is_reported(tmp_path, caplog):
    run(
        "--mixing",
        "multimix",
        "--pooled_weight",
        0,
        "--input_mixing",
        "mixup",
        "--max_steps",
        2,
        "--output_dir",
        tmp_path,
    )
    (found,) = [r.getMessage() for r in caplog.records if "mixed no mini-batch" in r.getMessage()]
    assert "The training with multimix mixed no mini-batch" in found and "input mixing did not begin" in found
