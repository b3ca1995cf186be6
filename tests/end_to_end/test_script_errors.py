"""Errors of the example scripts: one sentence with exit code 2, before training."""

import importlib

import common
import pytest
import yaml

SCRIPTS = [
    "run_image_classification",
    "run_text_classification",
    "run_token_classification",
    "run_audio_classification",
]
SCRIPTS += ["run_semantic_segmentation", "run_image_classification_no_trainer"]


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
    assert f"{script}.py: --num_mixd is not an option (did you mean --num_mixed?)" in error_of(
        script, ["--num_mixd", "3", "--dataset_name", "digits", "--tokenizer_name", "x", *where], capsys, monkeypatch
    )
    assert "There is no mixing method 'mixupp' (did you mean mixup?)" in error_of(
        script, ["--mixing", "mixupp", *where], capsys, monkeypatch
    )
    assert "missing.yaml does not exist" in error_of(script, ["missing.yaml"], capsys, monkeypatch)
    assert "invalid float value: 'fast'" in error_of(script, ["--learning_rate", "fast", *where], capsys, monkeypatch)


def test_nothing_to_do_is_an_error(capsys, monkeypatch, tmp_path):
    message = error_of(
        "run_image_classification", ["--dataset_name", "digits", "--output_dir", str(tmp_path)], capsys, monkeypatch
    )
    assert "There is nothing to do: give --do_train, --do_eval or both." in message


def test_options_after_a_file_override_it(tmp_path):
    from run_image_classification import parse_arguments

    options = {"dataset_name": "digits", "mixing": "mixup", "alpha": 0.5, "do_train": True, "output_dir": "out"}
    (tmp_path / "options.yaml").write_text(yaml.safe_dump(options))
    given = [str(tmp_path / "options.yaml"), "--alpha", "2", "--resume_from_checkpoint", "--use_cpu"]
    _, data, args, mixing = parse_arguments(given)
    assert mixing.alpha == 2 and data.dataset_name == "digits" and args.do_train
    assert args.resume_from_checkpoint == "true"
    assert common._with_value_of_resume(["--resume_from_checkpoint", "a"]) == ["--resume_from_checkpoint", "a"]
