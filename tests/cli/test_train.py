"""`mm-hf train` from end to end: what it leaves is plain, a resumed training is the whole one, mistakes come first."""

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

from mm_hf import ERM, DenseMultiMix, Mixup
from mm_hf.cli import main, train
from mm_hf.data.build import ModelOptions, build_task
from mm_hf.data.splits import DataOptions
from mm_hf.evaluation.metrics import classification_metrics, predictions
from mm_hf.training.hub import load_mixing, load_plan
from tests.helpers.commands import TINY, refused

OPTIONS = (
    f"--dataset_name digits --model_type vit --config_overrides {TINY} --max_train_samples 96 --max_validation_samples 40 "
    "--max_test_samples 80 --augmentation crop --per_device_train_batch_size 32 --learning_rate 3e-3 --use_cpu"
).split()
DATA = DataOptions("digits", max_train_samples=96, max_validation_samples=40, max_test_samples=80, augmentation="crop")


def run(*arguments):
    assert main(["train", *OPTIONS, *map(str, arguments)]) == 0


def weights(directory):
    return AutoModelForImageClassification.from_pretrained(directory).state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("trained") / "model"
    run("--mixing", "dense_multimix", "--num_mixed", 30, "--num_train_epochs", 3, "--output_dir", directory)
    return directory


def test_what_it_leaves_is_plain_and_tested_once(trained):
    assert load_mixing(trained) == DenseMultiMix(num_mixed=30) and load_plan(trained).pool == "token[0]"
    figures = json.loads((trained / "test_results.json").read_text())
    task = build_task(DATA, ModelOptions(model_name_or_path=str(trained)), trained=True)
    model = AutoModelForImageClassification.from_pretrained(trained)
    batch = [task.test_dataset[i] for i in range(80)]
    pixel_values = torch.stack([row["pixel_values"] for row in batch])
    labels = torch.tensor([row["labels"] for row in batch])
    logits, _ = predictions(model, [{"pixel_values": pixel_values, "labels": labels}])
    expected = classification_metrics(EvalPrediction(logits.numpy(), labels.numpy()))
    assert {name: figures[f"test_{name}"] for name in expected} == pytest.approx(expected, abs=1e-5)
    history = json.loads((trained / "trainer_state.json").read_text())["log_history"]
    assert sum("eval_accuracy" in entry for entry in history) == 3 and not any("test_loss" in e for e in history)
    assert AutoImageProcessor.from_pretrained(trained).size["height"] == 8


def test_a_resumed_training_is_the_whole_one(trained, tmp_path, capsys):
    given = ["--num_mixed", 30, "--num_train_epochs", 3, "--output_dir", tmp_path]
    run("--save_total_limit", 3, *given)
    shutil.rmtree(tmp_path / "checkpoint-9")
    assert "has checkpoint-6 of an earlier training: give --resume_from_checkpoint" in refused(
        capsys, "train", *OPTIONS, *given
    )
    assert "was trained with DenseMultiMix(num_mixed=30" in refused(
        capsys, "train", *OPTIONS, "--mixing", "mixup", "--output_dir", tmp_path, "--resume_from_checkpoint"
    )
    (tmp_path / "model.safetensors").unlink()
    run(*given, "--resume_from_checkpoint")
    assert re.search(
        r"epoch 3, step 9 of 9; loss .* \(clean .*, dense .*\); validation accuracy", capsys.readouterr().out
    )
    assert same(weights(tmp_path), weights(trained))


def test_a_checkpoint_that_is_not_whole_is_passed_over(trained, tmp_path):
    given = ["--num_mixed", 30, "--num_train_epochs", 3, "--output_dir", tmp_path]
    run("--save_total_limit", 3, *given)
    (tmp_path / "checkpoint-9" / "optimizer.pt").unlink()
    (tmp_path / "model.safetensors").unlink()
    run(*given, "--resume_from_checkpoint")
    assert (tmp_path / "checkpoint-9" / "optimizer.pt").exists()  # trained on from the one before
    assert same(weights(tmp_path), weights(trained))


def test_the_same_from_python(trained, tmp_path):
    """The command is thin: a task, a trainer, and Trainer's own methods."""
    task = build_task(DATA, ModelOptions(model_type="vit", config_overrides=TINY))
    args = TrainingArguments(
        str(tmp_path), num_train_epochs=3, per_device_train_batch_size=32, learning_rate=3e-3, use_cpu=True, disable_tqdm=True,
        eval_strategy="epoch", save_strategy="epoch",
    )  # fmt: skip
    trainer = task.trainer(args, DenseMultiMix(num_mixed=30))
    trainer.train()
    trainer.save_model()
    assert same(weights(tmp_path), weights(trained))


def test_a_task_by_itself_makes_no_training_arguments(monkeypatch):
    """The last ones made in a process decide on its devices: others than the command's would undo torchrun's processes."""
    monkeypatch.setattr("mm_hf.comparison.task.TrainingArguments", lambda *args, **kwargs: pytest.fail("made some"))
    build_task(DATA, ModelOptions(model_type="vit", config_overrides=TINY))


def test_files_of_options_and_options_that_override_them(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(train, "build_task", lambda data, model: seen.update(data=data, model=model) or 1 / 0)
    options = {"dataset_name": "digits", "mixing": "mixup", "alpha": 0.5, "do_train": True, "do_eval": True}
    options |= {"config_overrides": {"depths": [1, 1]}, "logging_steps": 5, "output_dir": str(tmp_path / "out")}
    (tmp_path / "options.yaml").write_text(yaml.safe_dump(options))
    made = []
    original = train.training_arguments
    monkeypatch.setattr(train, "training_arguments", lambda *args: made.append(original(*args)) or made[-1])
    with pytest.raises(ZeroDivisionError):
        main(["train", str(tmp_path / "options.yaml"), "--dataset_name", "fashion_mnist", "--eval_strategy", "no"])
    assert seen["data"].dataset_name == "fashion_mnist" and seen["model"].config_overrides == '{"depths": [1, 1]}'
    args = made[0]
    assert (args.logging_strategy, args.eval_strategy, args.save_strategy) == ("steps", "no", "epoch")
    assert args.output_dir == str(tmp_path / "out") and args.logging_steps == 5


def test_all_methods_can_be_chosen_with_their_settings():
    from dataclasses import fields

    from mm_hf.methods import METHODS

    for name, method in METHODS.items():
        assert train._chosen(["--num_mixed", "3", f"--mixing={name}"]) == name
        others = train._of_others(method)
        assert not {f"--{f.name}" for f in fields(method)} & set(others)
    assert train._of_others(Mixup)["--num_mixed"] == (
        "is a setting of multimix and dense_multimix, not of --mixing mixup, which has alpha."
    )
    assert "which has no settings" in train._of_others(ERM)["--alpha"]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--mixing", "dense_multimx"], "no mixing method 'dense_multimx' (did you mean dense_multimix?)"),
        (["--num_mixd", "3"], "--num_mixd is no option of mm-hf train .* did you mean --num_mixed?"),
        (["--mixing", "mixup", "--num_mixed", "3"], "--num_mixed is a setting of multimix and dense_multimix, not of"),
        (["--num_mixed", "-3"], "num_mixed must be"),
        (["--learning_rte", "1"], "did you mean --learning_rate?"),
        (["--report_to", "tensorbord"], "tensorbord is not installed or unknown to Transformers"),
        (["--do_eval", "no"], "--do_eval cannot be switched off"),
        (["--resume_from_checkpoint"], "there is no checkpoint in"),
        (["--resume_from_checkpoint", "nowhere"], "--resume_from_checkpoint nowhere is no directory"),
        (["--ood_dataset_name", "digits"], "mm-hf analyze MODEL --ood_dataset_name"),
        (["--attention_map_steps", "5"], "no tracker that takes pictures"),
        (["--dataset_name", "digts"], "no data set 'digts' (did you mean digits?): it is no directory here"),
        (["--model_name_or_path", "no/where"], "couldn't connect"),
        (["--image_column_name", "picture"], "no column 'picture', only image, label"),
        (["--num_train_epochs", "many"], "invalid float value: 'many'"),
    ],
)  # fmt: skip
def test_mistakes_are_sentences_before_any_training(given, sentence, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.Trainer.train", lambda *args, **kwargs: pytest.fail("it trains"))
    message = refused(capsys, "train", *OPTIONS, "--output_dir", tmp_path / "out", *given)
    assert re.search(re.escape(sentence).replace(r"\.\*", ".*"), message), message
    assert message.count("\n") == 1


def test_texts(reviews, tmp_path, capsys):
    data, model = reviews
    given = ["--dataset_name", data, "--label_column_name", "sentiment", "--model_name_or_path", model, "--use_cpu"]
    given += ["--cache_dir", tmp_path / "cache", "--num_train_epochs", 1, "--mixing", "multimix", "--num_mixed", 9]
    given += ["--report_to", "tensorboard", "--attention_map_steps", 2] if _has_tensorboard() else []
    assert main(["train", *map(str, given), "--output_dir", str(tmp_path / "out")]) == 0
    assert "21 test examples" in capsys.readouterr().out
    classify = pipeline("text-classification", str(tmp_path / "out"))
    assert classify("very good film")[0]["label"] in ("up", "down")
    rows = load_dataset(str(data), cache_dir=str(tmp_path / "cache"))["test"]
    right = sum(found["label"] == row["sentiment"] for found, row in zip(classify(rows["text"][:]), rows))
    figures = json.loads((tmp_path / "out" / "test_results.json").read_text())
    assert figures["test_accuracy"] == pytest.approx(right / len(rows))


def _has_tensorboard():
    from transformers.integrations import is_tensorboard_available

    return is_tensorboard_available()


def test_pushing(trained, tmp_path, monkeypatch):
    """What is told to Trainer, whose own pushing is tested elsewhere."""
    from mm_hf import MultiMixTrainer

    told = []
    monkeypatch.setattr(MultiMixTrainer, "init_hf_repo", lambda self, token=None: told.append(self.args.hub_model_id))
    monkeypatch.setattr(MultiMixTrainer, "push_to_hub", lambda self, *args, **kwargs: told.append(kwargs))
    run("--mixing", "erm", "--num_train_epochs", 1, "--output_dir", tmp_path, "--push_to_hub", "--hub_model_id", "me/it",
        "--save_strategy", "no")  # fmt: skip
    assert told[0] == "me/it"
    assert told[-1] == {"finetuned_from": None, "tasks": "image-classification", "dataset": "digits"}
