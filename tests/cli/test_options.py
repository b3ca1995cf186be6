"""Options: the early parser against HfArgumentParser, and errors before torch and Transformers are imported."""

import dataclasses
import subprocess
import sys

import pytest
from transformers import HfArgumentParser, TrainingArguments
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from mm_hf.cli import _options, compare, main, train
from mm_hf.comparison.task import FIXED_ARGUMENTS, parse_method
from mm_hf.data import images, offline, options
from mm_hf.methods import METHODS, DenseMultiMix, default_methods
from mm_hf.methods.settings import read_methods, settings_of
from tests.helpers.commands import command_error

VALUES = {"int": "3", "float": "0.5", "bool": "no", "str": "text"}


def test_settings_that_are_read_from_the_source_equal_those_of_the_class():
    own = {name: method for name, method in METHODS.items() if method.__module__.startswith("mm_hf.")}
    assert list(read_methods()) == sorted(own)
    for name, method in own.items():
        found, expected = read_methods()[name], settings_of(method)
        assert list(found) == list(expected)
        for one in expected.values():
            other = found[one.name]
            assert (other.types, other.choices, other.optional, other.many) == (
                one.types, one.choices, one.optional, one.many,
            )  # fmt: skip
            limits = {k: v for k, v in one.metadata.items() if k != "help"}
            assert {k: v for k, v in other.metadata.items() if k not in ("help", "compare")} == limits


def test_names_that_are_read_from_the_source_equal_those_of_the_classes():
    assert set(_options.training_settings()) == {f.name for f in dataclasses.fields(TrainingArguments) if f.init}
    assert set(_options.FIXED_OPTIONS) == set(FIXED_ARGUMENTS)
    assert tuple(offline.OFFLINE) == options.OFFLINE_NAMES
    assert settings_of(options.DataOptions)["augmentation"].choices == images.AUGMENTATIONS
    assert set(options.architectures()) >= set(CONFIG_MAPPING_NAMES)


def test_training_arguments_are_parsed_as_by_hf_argument_parser():
    kinds = {one.name: one for one in _options.training_settings().values()}
    given = []
    for one in kinds.values():
        value = one.choices[-1] if one.choices else VALUES[one.types[0]] if one.types else None
        if one.name.startswith("log_level"):
            value = "error"
        if value is not None and one.name not in ("include_num_input_tokens_seen", "trackio_static_space_id", "debug"):
            given += [f"--{one.name}", str(value)]
    parser = _options.make_parser("mm-hf train", "", "", "")
    found = _options.parse(parser, given, "mm-hf train", {})
    expected = vars(HfArgumentParser([TrainingArguments]).parse_args(given))
    assert len(found) > 90
    assert {name: found[name] for name in found} == {name: expected[name] for name in found}


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        ("--lr 1e-3", "learning_rate", 1e-3),
        ("--batch_size 7", "per_device_train_batch_size", 7),
        ("--epochs 2", "num_train_epochs", 2.0),
        ("--report_to tensorboard", "report_to", "tensorboard"),
        ("--report_to tensorboard wandb", "report_to", ["tensorboard", "wandb"]),
        ("--label_names a", "label_names", ["a"]),
        ("--num-train-epochs 2", "num_train_epochs", 2.0),
        ("--bf16", "bf16", True),
        ("--bf16 no", "bf16", False),
        ("--no_remove_unused_columns", "remove_unused_columns", False),
        ("--learning_rate=0.1", "learning_rate", 0.1),
    ],
)
def test_spellings_of_training_arguments(given, name, value):
    parser = _options.make_parser("mm-hf train", "", "", "")
    assert _options.parse(parser, given.split(), "mm-hf train", {}) == {name: value}


@pytest.mark.parametrize("value", ["yes", "True", "t", "1"])
def test_settings_that_are_flags_take_the_words_of_the_parser(value):
    other = {"yes": "no", "True": "False", "t": "f", "1": "0"}[value]
    assert parse_method(f"dense_multimix:confidence_weighted={value}")[1] == DenseMultiMix()
    assert parse_method(f"dense_multimix:confidence_weighted={other}")[1] == DenseMultiMix(confidence_weighted=False)
    with pytest.raises(ValueError, match="confidence_weighted must be yes or no, got 'maybe'"):
        parse_method("dense_multimix:confidence_weighted=maybe")


TYPES = [0, 1.5, float("nan"), float("inf"), -1, True, None, "", "x", [], [1.0], ["a"], {}, (), object(), b"x"]


@pytest.mark.parametrize("name", sorted(default_methods()))
def test_settings_of_any_type_are_accepted_or_named_in_a_value_error(name):
    for setting in settings_of(METHODS[name]):
        for value in TYPES:
            message = error_of(METHODS[name], **{setting: value})
            assert message is None or setting in message or "_weight must be positive" in message, (setting, value)


def error_of(kind, **values):
    """Return the message of the ValueError that the values raise, or None."""
    try:
        kind(**values)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train --num_mixd 3", "did you mean --num_mixed?"),
        ("train --mixing mixupp", "did you mean mixup?"),
        ("train --num_mixed -3", "--num_mixed must be an integer of at least 1 or 'auto', got '-3'."),
        ("train --num_mixed 3 --lr fast", "--learning_rate must be a number, got 'fast'."),
        ("train --lr_scheduler_type line", "--lr_scheduler_type must be one of linear, cosine"),
        ("train --bf16 maybe", "--bf16 must be yes or no, got 'maybe'."),
        ("train missing.yaml", "The option file missing.yaml does not exist"),
        ("train --train_dir missing", "--train_dir missing is not a directory"),
        ("train --dataset_name ./missing", "--dataset_name ./missing does not exist"),
        ("train --dataset_name digits --model_name_or_path ./missing", "--model_name_or_path ./missing does not exist"),
        ("train --dataset_name digits --model_type vat", "did you mean vit?"),
        ("train --dataset_name digits --model_type vit --config_overrides hidden_size", "instead of name=value"),
        ("train --dataset_name digits --model_type vit --config_overrides {1}", "is not valid JSON"),
        ("train --dataset_name digits --model_type vit --resume_from_checkpoint nowhere", "is not a directory"),
        ("train --augmentation flip", "--augmentation must be one of none, crop, crop_flip, randaugment, got 'flip'."),
        ("train --train_val_split 1.5", "--train_val_split must lie in (0, 1), got '1.5'."),
        ("train --num_train_epochs", "--num_train_epochs expected one argument"),
        ("train digits", "'digits' is not an option of mm-hf train: options begin with --"),
        ("compare --methods erm mixup:alpha=-1", "alpha must be a positive number, got '-1'."),
        ("compare --methods multimix:num_mixd=1", "multimix has no setting num_mixd (did you mean num_mixed?)"),
        ("compare --methods erm --baseline plain", "baseline must be one of the methods, erm, got 'plain'"),
        ("compare --seeds many", "--seeds must be an integer, got 'many'."),
        ("analyze ./missing --dataset_name digits", "--model_name_or_path ./missing does not exist"),
        ("check ./missing", "--model ./missing does not exist"),
        ("check somewhere/model --batch_size 1", "--batch_size must be an integer of at least 2, got '1'."),
        ("check somewhere/model --task video", "--task must be one of image, text, audio, got 'video'."),
        ("models --task movie", "--task must be one of text, image, audio, video, got 'movie'."),
    ],
)
def test_mistake_in_the_command_line_is_reported_before_anything_runs(line, message, capsys, monkeypatch):
    for module, function in ((train, "_train"), (compare, "_compare")):
        monkeypatch.setattr(module, function, lambda *_: pytest.fail("it runs"))
    assert message in command_error(capsys, *line.split())


def test_mistake_in_the_command_line_is_reported_without_importing_torch():
    code = "import sys\nfrom mm_hf.cli import main\n{}\nprint([m for m in ('torch', 'numpy') if m in sys.modules])"
    run = "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass"
    for line in ("train --num_mixd 3", "compare --methods erm mixup:alpha=-1", "train --help"):
        done = subprocess.run(
            [sys.executable, "-c", code.format(run), *line.split()], capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-1] == "[]", (line, done.stdout, done.stderr)


def test_option_files_with_other_contents_are_rejected(tmp_path, capsys):
    cases = {
        "list": "- 1\n", "bytes": b"\xff\xfe\x00", "deep": "[" * 5000, "nested": "methods: [[1], [2]]",
        "number": "3: 4", "empty": "", "tab": "a:\t- b: c: d", "date": "a: 2020-13-45",
    }  # fmt: skip
    for name, content in cases.items():
        path = tmp_path / f"{name}.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        message = command_error(capsys, "train", path)
        assert str(path) in message, (name, message)
    assert main(["models", "vit", str(tmp_path / "list.yaml")]) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train --mixing input_mixing", "input_mixing requires function: Import path of the mixing function"),
        ("compare --methods erm input_mixing", "input_mixing requires function: Import path of the mixing function"),
        ("check . --mixing input_mixing", "--mixing input_mixing requires function, and mm-hf check tries the"),
        (
            "train --mixing mixup --class_weights focal",
            "or one number of at least 0 for each class; focal loss and other",
        ),
        (
            "compare --methods erm mixup:class_weights=[1,-1]",
            "class_weights must be 'balanced' or one number of at least",
        ),
        ("compare --methods erm --lengths 0 4", "--lengths must be an integer of at least 1, got '0'"),
    ],
)
def test_required_settings_class_weights_and_lengths_are_checked_before_the_imports(line, message, capsys):
    assert message in command_error(capsys, *line.split())
