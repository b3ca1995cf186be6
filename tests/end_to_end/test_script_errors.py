"""Command line of the example scripts: that of `mm-hf`. Errors are one sentence with exit code 2, before training."""

import dataclasses
import importlib
import json
import re
import runpy
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import yaml
from PIL import Image
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, TrainingArguments

from mm_hf.cli.scripts import options
from mm_hf.methods import DenseMultiMix
from tests.helpers.commands import COLUMNS, SCREEN, TINY, screen_lines
from tests.helpers.scripts import EXAMPLES

SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("run_*.py"))
WITH_TRAINER = [script for script in SCRIPTS if not script.endswith("no_trainer")]


AUDIO = (
    "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=16,num_mel_bins=32,max_length=32,"
    "frequency_stride=16,time_stride=16"
)
SEGFORMER = (
    '{"num_encoder_blocks":1,"depths":[1],"hidden_sizes":[8],"num_attention_heads":[1],"patch_sizes":[7],"strides":[4],'
    '"sr_ratios":[4],"mlp_ratios":[1],"decoder_hidden_size":8}'
)
SCENES = "--max_train_samples 4 --max_eval_samples 4 --image_size 48"


def write_data(directory):
    """Write images, recordings, texts and tokens of two classes."""
    random = np.random.default_rng(0)
    for i in range(8):
        for folder in ("images", "recordings"):
            (directory / folder / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(255, size=(8, 8), dtype=np.uint8)).save(
            f"{directory}/images/{'ab'[i % 2]}/{i}.png"
        )
        soundfile.write(f"{directory}/recordings/{'ab'[i % 2]}/{i}.wav", random.normal(size=800) / 9, 8000)
    rows = [{"text": f"very good film {i}", "label": "ab"[i % 2]} for i in range(8)]
    (directory / "texts.csv").write_text("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in rows))
    tokens = json.dumps({"tokens": ["good", "book"], "ner_tags": ["B-PER", "O"]}) + "\n"
    (directory / "tokens.jsonl").write_text(8 * tokens)


def run_alone(script, arguments, monkeypatch):
    """Run a script in this process as if it were the only file of its directory; return its exit code."""
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(EXAMPLES)])
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
    for name in [name for name in sys.modules if name.startswith("run_")]:
        monkeypatch.delitem(sys.modules, name)
    try:
        runpy.run_path(f"{script}.py", run_name="__main__")
    except SystemExit as stopped:
        return stopped.code
    return 0


def error_of(script, arguments, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", [f"{script}.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(script).main()
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in printed
    return printed.splitlines()[-1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_user_errors_are_one_sentence(script, capsys, monkeypatch, tmp_path):
    where = ["--output_dir", str(tmp_path)]
    for given, sentence in [
        (["--num_mixd", "3", *where], r"--num_mixd is not an option of .*did you mean --num_mixed\?"),
        (["--mixing", "mixupp", *where], r"There is no mixing method 'mixupp' \(did you mean mixup\?\)"),
        (["--mixing", "mixup", "--num_mixed", "3"], "--num_mixed is a setting of dense_multimix and multimix, not of"),
        (["missing.yaml"], "missing.yaml does not exist"),
        (["--learning_rate", "fast", *where], "--learning_rate must be a number, got 'fast'"),
    ]:
        message = error_of(script, given, capsys, monkeypatch)
        assert message.startswith(f"{script}.py: ") and re.search(sentence, message), message


@pytest.mark.parametrize("script", WITH_TRAINER)
def test_nothing_to_do_is_an_error(script, capsys, monkeypatch, tmp_path):
    message = error_of(script, ["--dataset_name", "digits", "--output_dir", str(tmp_path)], capsys, monkeypatch)
    assert "There is nothing to do: give --do_train, --do_eval or both." in message


@pytest.mark.parametrize("script", WITH_TRAINER)
def test_trackers_that_are_not_installed_are_an_error(script, capsys, monkeypatch, tmp_path):
    given = ["--do_train", "--output_dir", str(tmp_path), "--report_to", "wandb"]
    assert "--report_to wandb is not an installed tracker." in error_of(script, given, capsys, monkeypatch)


MISSING = [  # script, package, extra, options
    ("run_image_classification", "sklearn", "analysis", f"--config_overrides {TINY} --train_dir images"),
    ("run_image_classification", "kornia", "analysis", f"--config_overrides {TINY} --augmentation randaugment"),
    ("run_image_classification_no_trainer", "sklearn", "analysis", f"--config_overrides {TINY}"),
    ("run_audio_classification", "soundfile", "examples", "--train_dir recordings"),
    ("run_audio_classification", "scipy", "analysis", f"--config_overrides {AUDIO} --train_dir recordings"),
    ("run_text_classification", "sklearn", "analysis", "--train_file texts.csv --model_name_or_path MODEL"),
    ("run_text_classification", "peft", "", "--train_file texts.csv --model_name_or_path MODEL --lora_r 2"),
    ("run_token_classification", "seqeval", "examples", "--train_file tokens.jsonl --model_name_or_path MODEL"),
    ("run_semantic_segmentation", "kornia", "analysis", f"--dataset_name digit_scenes --augmentation crop {SCENES}"),
]


@pytest.mark.parametrize(("script", "package", "extra", "options"), MISSING)
def test_missing_packages_are_an_error_before_training(
    script, package, extra, options, reviews, capsys, monkeypatch, tmp_path
):
    """Each error is one sentence with the command that installs the package."""
    if "--train" not in options and "--dataset" not in options:
        options += " --train_dir images"
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr("transformers.Trainer.train", lambda *_, **__: pytest.fail("the training started"))
    monkeypatch.setattr("torch.optim.AdamW.step", lambda *_, **__: pytest.fail("the training started"))
    given = ["--output_dir", "out", *options.replace("MODEL", str(reviews[1])).split()]
    given += ["--do_train", "--do_eval"] if script in WITH_TRAINER else []
    message = error_of(script, given, capsys, monkeypatch)
    name = {"sklearn": "scikit-learn", "peft": "--lora_r requires PEFT, which"}.get(package, package)
    assert message.startswith(f"{script}.py: {name} is ")
    assert f"pip install 'mm-hf[{extra}]'" in message if extra else "pip install peft" in message


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_fits_one_screen_and_help_all_has_all_options(script, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    module = importlib.import_module(script)
    shutil.copy(EXAMPLES / f"{script}.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert run_alone(script, ["--help"], monkeypatch) == 0
    short = capsys.readouterr().out
    assert run_alone(script, ["--help-all"], monkeypatch) == 0
    listed = set(re.findall(r"^  --(\w+)", capsys.readouterr().out, flags=re.MULTILINE))
    assert screen_lines(short) <= SCREEN and "--help-all" in short
    classes = [module.ModelArguments, module.DataTrainingArguments, DenseMultiMix]
    classes += [getattr(module, "LoopArguments", TrainingArguments)]
    expected = {field.name for one in classes for field in dataclasses.fields(one) if field.init}
    assert expected <= listed
    for name in ("mixing", "num_mixed", "dataset_name", "model_name_or_path", "output_dir"):
        assert f"  --{name} " in short


def test_options_after_a_file_override_it(tmp_path):
    from run_image_classification import parse_arguments

    given = {"dataset_name": "digits", "mixing": "mixup", "alpha": 0.5, "do_train": True, "output_dir": "out"}
    (tmp_path / "options.yaml").write_text(yaml.safe_dump(given))
    line = [str(tmp_path / "options.yaml"), "--alpha", "2", "--resume_from_checkpoint", "--use_cpu", "--lr", "0.5"]
    _, data, args, mixing = parse_arguments(line)
    assert mixing.alpha == 2 and data.dataset_name == "digits" and args.do_train and args.learning_rate == 0.5
    assert args.resume_from_checkpoint == "last" and isinstance(args, options.ScriptArguments)
    assert parse_arguments([*line, "--resume_from_checkpoint", "a"])[2].resume_from_checkpoint == "a"


VIT = f"{TINY},initializer_range=0.1"
BERT = "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=16"
RUNS = {  # data, and configurations of two models
    "run_image_classification": ("--train_dir images --augmentation none", VIT, VIT.replace("=16", "=32")),
    "run_image_classification_no_trainer": ("--train_dir images --augmentation none", VIT, VIT.replace("=16", "=32")),
    "run_audio_classification": ("--train_dir recordings", AUDIO, AUDIO.replace("hidden_size=16", "hidden_size=32")),
    "run_text_classification": ("--train_file texts.csv --tokenizer_name MODEL", BERT, BERT.replace("=16", "=32")),
    "run_token_classification": ("--train_file tokens.jsonl --tokenizer_name MODEL", BERT, BERT.replace("=16", "=32")),
    "run_semantic_segmentation": (f"--dataset_name digit_scenes {SCENES}", SEGFORMER, SEGFORMER.replace("[8]", "[16]")),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_all_scripts_resume_alike(script, reviews, capsys, monkeypatch, tmp_path):
    """Bare --resume_from_checkpoint resumes the newest checkpoint. Other uses of a directory are errors, all alike."""
    data, config, other = RUNS[script]
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    given = [*data.replace("MODEL", str(reviews[1])).split(), "--config_overrides", config, "--output_dir", "out"]
    given += ["--max_train_samples", "4", "--per_device_train_batch_size", "2", "--num_mixed", "4"]
    with_trainer = script in WITH_TRAINER
    epoch = "--do_train --save_strategy epoch --use_cpu --report_to none" if with_trainer else ""
    given += (epoch or "--checkpointing_steps epoch").split()
    main, again = importlib.import_module(script).main, ["--resume_from_checkpoint"]

    def run(*options):
        monkeypatch.setattr("sys.argv", [f"{script}.py", *given, *options])
        main()

    def error(*options):
        return error_of(script, [*given, *options], capsys, monkeypatch).removeprefix(f"{script}.py: ")

    nothing = "No valid checkpoint found in output directory (out): start without --resume_from_checkpoint."
    assert error(*again) == nothing
    capsys.readouterr()
    run("--num_train_epochs", "1")
    printed = capsys.readouterr().err  # not a terminal: no progress bars, which would print a line per step
    assert "it/s" not in printed and "examples/s" not in printed and "Warning" not in printed
    first, second, third = ["checkpoint-2", "checkpoint-4", "checkpoint-6"] if with_trainer else (
        ["epoch_0", "epoch_1", "epoch_2"]
    )  # fmt: skip
    assert error("--num_train_epochs", "2") == (
        f"out contains {first} of an earlier training run: resume it with --resume_from_checkpoint, or choose another "
        "--output_dir."
    )
    run("--num_train_epochs", "2", *again)
    assert (tmp_path / "out" / second).is_dir()
    for option, value, change in [
        ("per_device_train_batch_size", "4", "per_device_train_batch_size=2, which is now 4"),
        ("num_mixed", "5", "num_mixed=4, which is now 5"),
        ("seed", "9", "seed=42, which is now 9"),
        ("max_train_samples", "3", "train_examples=4, which is now 3"),
    ]:
        message = error("--num_train_epochs", "3", *again, f"--{option}", value)
        assert (
            message.startswith(f"The checkpoint out/{second} was trained with other settings: ") and change in message
        )
        assert message.endswith("Use the same settings, or resume with --allow_changed_settings, which is not exact.")
    message = error("--num_train_epochs", "3", *again, "--config_overrides", other)
    assert re.fullmatch(
        rf"The checkpoint out/{second} does not fit the model: .*Use a model of the class and size .*", message
    )
    run("--num_train_epochs", "3", *again, "--seed", "9", "--allow_changed_settings")
    assert (tmp_path / "out" / third).is_dir()
    assert error("--output_dir", "texts.csv") == "--output_dir texts.csv is a file: choose a directory."


@pytest.mark.parametrize("script", ["run_image_classification", "run_image_classification_no_trainer"])
def test_script_that_is_copied_alone_trains_and_resumes(script, tmp_path, monkeypatch, capsys):
    """The recipe stands beside the script, options follow it, and a second run needs --resume_from_checkpoint."""
    shutil.copy(EXAMPLES / f"{script}.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    recipe = {"dataset_name": "digits", "config_overrides": TINY, "max_train_samples": 32, "max_eval_samples": 16}
    recipe |= {"augmentation": "none", "num_train_epochs": 1, "per_device_train_batch_size": 16, "output_dir": "out"}
    with_trainer = script == "run_image_classification"
    recipe |= (
        {"do_train": True, "do_eval": True, "save_strategy": "epoch"}
        if with_trainer
        else {"checkpointing_steps": "epoch"}
    )
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert run_alone(script, ["recipe.yaml", "--num_mixed", 8], monkeypatch) == 0
    assert AutoModelForImageClassification.from_pretrained("out").config.hidden_size == 16
    first = "checkpoint-2" if with_trainer else "epoch_0"
    capsys.readouterr()
    again = ["recipe.yaml", "--num_mixed", 8, "--num_train_epochs", 2]
    assert run_alone(script, again, monkeypatch) == 2
    assert f"out contains {first} of an earlier training run: resume it with" in capsys.readouterr().err
    assert run_alone(script, [*again, "--resume_from_checkpoint"], monkeypatch) == 0
    assert (tmp_path / "out" / ("checkpoint-4" if with_trainer else "epoch_1")).is_dir()


def test_text_script_that_is_copied_alone_trains(reviews, tmp_path, monkeypatch):
    data, model = reviews
    shutil.copy(EXAMPLES / "run_text_classification.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    given = f"--train_file {data}/train.jsonl --label_column_name sentiment --model_name_or_path {model}".split()
    given += ["--do_train", "--num_train_epochs", "1", "--save_strategy", "no", "--output_dir", "out"]
    assert run_alone("run_text_classification", given, monkeypatch) == 0
    assert set(AutoModelForSequenceClassification.from_pretrained("out").config.label2id) == {"up", "down"}


def test_scripts_and_documented_imports_need_no_extra():
    """`pip install .` installs none of these packages; a script that needs one names it when it runs."""
    scripts = sorted(path.stem for path in EXAMPLES.glob("run_*.py"))
    code = f"""
import sys
optional = "kornia matplotlib peft psutil rich scipy seqeval sklearn soundfile tensorboard torchvision".split()
sys.modules.update(dict.fromkeys(optional))
sys.path.insert(0, {str(EXAMPLES)!r})
import mm_hf.data.images
for script in {scripts!r}:
    __import__(script)
sys.argv = ["run_token_classification.py", "--dataset_name", "x", "--do_train"]
import run_token_classification as script
from mm_hf.cli import run
print(run("run_token_classification.py", lambda: bool(script.entity_metrics([], False))))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "2"
    assert "seqeval is required but not installed: pip install 'mm-hf[examples]'." in done.stderr
