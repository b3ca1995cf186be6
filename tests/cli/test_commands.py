"""Command line: help texts, error messages, option files, texts and directories of images."""

import io
import json
import subprocess
import sys

import pytest
import yaml
from datasets import Dataset, DatasetDict
from rich.console import Console
from tqdm import tqdm

from mm_hf import cli
from mm_hf.cli import commands, main
from mm_hf.cli._options import ADVANCED_OPTIONS, ShortHelpFormatter
from mm_hf.cli._progress import ProgressTable
from mm_hf.comparison import Run, as_methods
from mm_hf.data import offline
from mm_hf.data.splits import DataOptions, align, load_splits
from mm_hf.methods.settings import read_methods
from tests.helpers.commands import COLUMNS, OPTIONS, SCREEN, command_error, read_results, screen_lines


def test_help_lists_all_commands_without_importing_torch():
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "mm_hf", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "transformers" not in done.stderr and "| torch" not in done.stderr
    for name, description in commands().items():
        assert f"{name}  " in done.stdout and description.endswith(".") and description in done.stdout
    assert set(commands()) >= {"analyze", "check", "compare", "models", "train"}


@pytest.mark.parametrize("name", commands())
def test_command_help_is_short_and_help_all_is_complete(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    assert screen_lines(text) <= SCREEN
    for word in ("example", "--help-all", "mm-hf " + name):
        assert word in text
    trains = name in ("analyze", "compare", "train")
    if trains:
        assert "data:" in text and "model:" in text and "--dataset_name X" in text and "--dataset-name" not in text
        assert "--max_test_samples" not in text and "--weight_decay" not in text
    with pytest.raises(SystemExit):
        main([name, "--help-all"])
    everything = capsys.readouterr().out
    assert everything.startswith(text[: text.index("\n\n")]) and len(everything) > len(text)
    assert ("--max_test_samples N" in everything and "--weight_decay N" in everything) == trains


@pytest.mark.parametrize("method", read_methods())
def test_help_with_each_method_fits_one_screen_and_shows_its_main_settings(method, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    texts = []
    for option in ("--help", "--help-all"):
        with pytest.raises(SystemExit):
            main(["train", "--mixing", method, option])
        texts.append(capsys.readouterr().out)
    short, everything = texts
    settings = set(read_methods()[method])
    assert screen_lines(short) <= SCREEN and all(f"\n  --{name} " in everything for name in settings)
    assert all(f"\n  --{name} " in short for name in settings - ADVANCED_OPTIONS)
    assert f"settings of {method}:" in short or settings == {"class_weights"}


def test_short_help_shows_as_many_sentences_as_fit_a_line_and_the_default():
    formatter = ShortHelpFormatter("program")
    assert formatter._split_lines("One two. Three four. [5]", 24) == ["One two. Three four. [5]"]
    assert formatter._split_lines("One two. Three four. [5]", 23) == ["One two. [5]"]
    assert formatter._split_lines("One two. Three four.", 19) == ["One two."]
    assert formatter._split_lines("One two three.", 8) == ["One two", "three."]


def test_invalid_command_lines_print_one_sentence(capsys, tmp_path):
    assert "did you mean compare?" in command_error(capsys, "comapre")
    assert f"the commands are {', '.join(commands())}." in command_error(capsys, "fly")
    message = command_error(capsys, "compare", *OPTIONS, "--methods", "erm", "nomix")
    assert "no mixing method 'nomix'" in message and "dense_multimix" in message
    message = command_error(capsys, "compare", *OPTIONS, "--methods", "multimix:strength=2")
    assert "has no setting strength" in message and "num_mixed" in message
    message = command_error(capsys, "compare", *OPTIONS, "--learnig_rate", "1")
    assert "--learnig_rate is not an option of mm-hf compare or a field of TrainingArguments" in message
    assert "did you mean --learning_rate?" in message
    assert "--seed is set by mm-hf compare: use --seeds." in command_error(capsys, "compare", *OPTIONS, "--seed", "1")
    assert "--seed is set by mm-hf analyze: remove it." in command_error(
        capsys, "analyze", "model", "--dataset_name", "digits", "--seed", "1"
    )
    assert "The model is missing" in command_error(capsys, "compare", "--dataset_name", "digits")
    assert "The dataset is missing" in command_error(capsys, "compare", "--model_type", "vit")
    assert "is not an architecture of Transformers" in command_error(
        capsys, "compare", "--dataset_name", "digits", "--model_type", "vat"
    )
    assert "--keep_models must be one of best, none, all, got 'some'" in command_error(
        capsys, "compare", *OPTIONS, "--keep_models", "some"
    )
    assert "baseline must be one of the methods" in command_error(
        capsys, "compare", *OPTIONS, "--baseline", "plain", "--output_dir", tmp_path
    )
    assert "mm-hf analyze MODEL requires a directory" in command_error(capsys, "analyze", "--dataset_name", "digits")
    assert "none.yaml does not exist" in command_error(capsys, "compare", tmp_path / "none.yaml")


@pytest.mark.parametrize("content", ["[]", "null", "{", '{"mixing": {"method": "unknown"}}'])
def test_a_damaged_mixing_file_is_reported_before_the_evaluation(capsys, tmp_path, content):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    (tmp_path / "mixing.json").write_text(content)
    message = command_error(capsys, "analyze", tmp_path, "--dataset_name", "digits")
    assert str(tmp_path / "mixing.json") in message and message.count("\n") <= 1


def test_data_without_a_test_split_are_rejected(capsys, tmp_path):
    data = offline.load_digits()
    for split in ("train", "test"):
        where = tmp_path / ("train" if split == "train" else "validation")
        for i, row in enumerate(data[split].select(range(60))):
            folder = where / f"digit-{row['label'] % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            row["image"].save(folder / f"{i}.png")
    given = ["--train_dir", str(tmp_path / "train"), "--validation_dir", str(tmp_path / "validation")]
    others = OPTIONS[2:]
    message = command_error(capsys, "compare", *given, *others, "--output_dir", tmp_path / "out")
    assert "no test split 'test'; the splits are train, validation" in message
    assert "--test_split validation" in message
    options = dict(zip(["train_dir", "validation_dir"], given[1::2])) | {"test_split": "validation"}
    splits = load_splits(DataOptions(**options))
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (51, 9, 60)
    assert splits.kind == "image" and splits.class_names == ["digit-0", "digit-1"]


def test_missing_package_error_names_the_extra(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "kornia", None)
    message = command_error(capsys, "compare", *OPTIONS)
    assert "kornia is required but not installed: pip install 'mm-hf[analysis]'" in message


def test_error_message_starts_a_new_line_after_a_progress_bar(capsys):
    def start():
        bar = tqdm(total=2)
        bar.update()
        raise ValueError("The data are damaged.")

    assert cli.run("mm-hf train", start) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "mm-hf train: The data are damaged."


@pytest.mark.parametrize("command", ["compare", "train", "analyze"])
def test_trackers_that_are_not_installed_are_an_error_before_training(command, capsys, tmp_path):
    given = ["unused_model", *OPTIONS[:2]] if command == "analyze" else OPTIONS[:6]
    message = command_error(capsys, command, *given, "--output_dir", tmp_path / "out", "--report_to", "wandb")
    assert "--report_to wandb is not an installed tracker. Installed trackers: " in message


@pytest.mark.parametrize(
    ("package", "install"),
    [
        ("kornia", "'mm-hf[analysis]'"),
        ("sklearn.metrics", "'mm-hf[analysis]'"),
        ("rich", "'mm-hf[analysis]'"),
        ("peft", "'mm-hf[examples]'"),
        ("soundfile", "'mm-hf[examples]'"),
        ("seqeval", "'mm-hf[examples]'"),
        ("tensorboard", "'mm-hf[trackers]'"),
        ("torchvision", "torchvision"),
        ("datasets", "datasets"),
    ],
)
def test_missing_package_error_names_an_extra_that_contains_the_package(package, install, capsys):
    def start():
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    assert cli.run("mm-hf predict", start) == 2
    name = {"sklearn.metrics": "scikit-learn"}.get(package, package)
    assert capsys.readouterr().err == f"mm-hf predict: {name} is required but not installed: pip install {install}.\n"


def test_option_files(tmp_path, capsys):
    options = {"methods": ["erm", "multimix:alpha=[0.5,2],num_mixed=3"], "seeds": 1, "use_cpu": True, "nothing": None}
    (tmp_path / "options.yaml").write_text(yaml.safe_dump(options))
    (tmp_path / "list.yaml").write_text("- 1\n")
    from mm_hf.cli._option_files import expand_option_file

    given = expand_option_file([str(tmp_path / "options.yaml"), "--seeds", "2"])
    assert given == ["--methods", *options["methods"], "--seeds", "1", "--use_cpu", "True", "--seeds", "2"]
    assert as_methods(given[1:3])[options["methods"][1]].alpha == (0.5, 2)
    assert "must contain options as lines" in command_error(capsys, "compare", tmp_path / "list.yaml")


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_table_is_live_on_a_terminal_and_prints_lines_elsewhere(terminal, tmp_path):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    run = Run("erm", 0, {"accuracy": 0.9731, "nll": 0.1, "train_seconds": 2.0}, {}, [], [], "", tmp_path)
    with ProgressTable(["erm", "multimix:alpha=[1,2]"], [0, 1], console) as table:
        table.update("erm", 0, "40 %")
        first = table._table().columns[1]
        assert list(map(str, first.cells)) == ["40 %", "·"]
        table.finish(run)
        table.update("multimix:alpha=[1,2]", 0, "not possible: because [this] is so")
    text = console.file.getvalue()
    if terminal:
        assert "97.31 %" in text and "multimix:alpha=[1,2]" in text
    else:
        assert "erm, seed 0: accuracy 97.31 %, NLL 0.100 nats, 2.0 s (1 of 4 runs, about " in text
        assert "seed 0: not possible: because [this] is so" in text and "\x1b" not in text


@pytest.mark.end_to_end
def test_texts_are_compared_and_analyzed(reviews, tmp_path, capsys):
    data, model = reviews
    options = [
        "--dataset_name",
        str(data),
        "--label_column_name",
        "sentiment",
        "--cache_dir",
        str(tmp_path / "cache"),
        "--use_cpu",
    ]
    training = [
        "--model_name_or_path",
        str(model),
        "--num_train_epochs",
        "1",
        "--methods",
        "erm",
        "dense_multimix:num_mixed=10",
    ]
    out = tmp_path / "out"
    assert main(["compare", *options, *training, "--seeds", "1", "--output_dir", str(out)]) == 0
    rows = read_results(out / "results.csv")
    metrics = {row["metric"] for row in rows}
    assert {"accuracy", "nll", "alignment"} <= metrics and not {"fgsm_accuracy", "corruption_accuracy"} & metrics
    settings = json.loads((out / "settings.json").read_text())["task"]
    assert settings["inputs"] == "text" and settings["classes"] == 2 and settings["test_examples"] == 21
    report = (out / "report.md").read_text()
    assert "Robustness" not in report and "BertForSequenceClassification" in report
    best = out / "runs" / "erm" / "seed-0"
    assert main(["analyze", str(best / "model"), *options, "--output_dir", str(tmp_path / "one")]) == 0
    expected, found = (json.loads((p / "result.json").read_text())["metrics"] for p in (best, tmp_path / "one"))
    assert found == {name: expected[name] for name in found}


def test_columns_and_classes_are_inferred():
    rows = {"question": ["a", "b"] * 4, "answer": ["c", "d"] * 4, "label": [7, 3] * 4}
    data = DatasetDict(train=Dataset.from_dict(rows), test=Dataset.from_dict(rows))
    from mm_hf.data import splits as module

    def load(**options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "load_dataset", lambda *args, **kwargs: data)
            return load_splits(DataOptions("here", **options))

    found = load()
    assert (found.kind, found.inputs, found.class_names) == ("text", ["question", "answer"], ["3", "7"])
    assert set(found.train["label"]) == {0, 1}
    assert load(text_column_names=["answer"]).inputs == ["answer"]
    with pytest.raises(ValueError, match="no column 'title': choose one of its columns"):
        load(text_column_names=["title"])
    with pytest.raises(ValueError, match="give --label_column_name"):
        load(label_column_name="class")
    with pytest.raises(ValueError, match="no test split 'dev'.*--test_split test"):
        load(test_split="dev")
    aligned = align(load(), {"7": 0, "3": 1})
    assert aligned.class_names == ["7", "3"] and aligned.test["label"][:2] == [0, 1]
    with pytest.raises(ValueError, match="leaves 1 of 2 classes"):
        load(ood_classes=["3"])


def test_unknown_classes_are_excluded_from_training():
    splits = load_splits(DataOptions("digits", ood_classes=["4", "9"]))
    assert splits.class_names == list("01235678") and set(splits.train["label"]) == set(range(8))
    complete = load_splits(DataOptions("digits"))
    kept = [y for y in complete.test["label"] if y not in (4, 9)]
    assert len(splits.test) == len(kept) and len(splits.ood) == len(complete.test) - len(kept)
    assert [splits.class_names[y] for y in splits.test["label"]] == [str(y) for y in kept]


@pytest.mark.parametrize("words", [["--function=x\ny"], ["--dataset_name", "x\n y"], ["--no\r\nsuch", "1"]])
def test_line_breaks_of_arguments_are_not_printed(words, capsys):
    assert main(["train", *words]) == 2
    assert capsys.readouterr().err.count("\n") == 1
