"""Damaged files of an output directory, and directories of earlier versions."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch

from mm_hf import ERM, CutMix, DenseMultiMix, Mixing, MultiMix
from mm_hf.comparison import run_comparison
from mm_hf.comparison.derived import BestWeights
from mm_hf.comparison.evaluate import EvaluationOptions
from mm_hf.comparison.record import DamagedFileError
from mm_hf.comparison.settings import check_settings, describe
from mm_hf.methods import default_methods, with_defaults
from tests.comparison.test_runs import NO_ROBUSTNESS, Stop, small_task

TASK = {"training_args": {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}}


def compare(directory, callbacks=(), report=False, **changes):
    methods = {"erm": ERM(), "few": MultiMix(num_mixed=5)}
    task = small_task(**{**TASK, **changes})
    return run_comparison(task, methods, 1, directory, evaluation=NO_ROBUSTNESS, report=report, callbacks=callbacks)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """Interrupt a comparison whose first method is finished after a checkpoint of the second one."""
    directory = tmp_path_factory.mktemp("interrupted")
    stop = Stop(3)
    stop.on_train_begin = lambda args, state, control, **kwargs: setattr(
        stop, "step", 3 if "few" in args.output_dir else 9
    )
    with pytest.raises(KeyboardInterrupt):
        compare(directory, [stop])
    return directory


RUN, CHECKPOINT = "runs/erm/seed-0", "runs/few/seed-0/checkpoints/checkpoint-2"
FILES = {
    "settings.json": "restore it, or choose another output_dir",
    f"{RUN}/result.json": f"delete .*{RUN} to train this run again",
    f"{RUN}/predictions.npz": f"delete .*{RUN} to train this run again",
    "runs/erm_temperature_scaling/seed-0/result.json": "delete .*temperature_scaling/seed-0 to train this run again",
    f"{CHECKPOINT}/comparison.json": f"delete .*{CHECKPOINT} to resume from an earlier checkpoint",
}
DAMAGES = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "no text": lambda content: b"\xff\xfe" + content,
    "list": lambda content: b"[1, 2]",
    "other object": lambda content: b'{"metrics": 1}',
    "deep": lambda content: b"[" * 100_000,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_damaged_file_is_named_with_the_remedy(interrupted, tmp_path, name, damage):
    directory = shutil.copytree(interrupted, tmp_path / "output")
    path = directory / name
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.raises(DamagedFileError, match=rf"{name} is damaged \((?s:.)*\): {FILES[name]}[^.]*\.$"):
        compare(directory)


def test_remedy_works_and_results_are_written_again(interrupted, tmp_path):
    directory = shutil.copytree(interrupted, tmp_path / "output")
    shutil.rmtree(directory / CHECKPOINT)
    (directory / "results.csv").write_bytes(b"\xff\x00")
    expected = compare(tmp_path / "complete")
    found = compare(directory)
    assert [(r["method"], r["metric"]) for r in found.rows()] == [(r["method"], r["metric"]) for r in expected.rows()]
    assert found.runs["few"][0].metrics["nll"] == expected.runs["few"][0].metrics["nll"]
    assert (directory / "results.csv").read_text().startswith("method,seed,metric,value")


def _flip(position):
    def damage(content):
        content = bytearray(content)
        content[int(position * len(content))] ^= 1
        return bytes(content)

    return damage


BEST_DAMAGES = {
    "text": lambda content: b"damaged",
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "one bit of a weight": _flip(0.5),
    "one bit of the last weight": lambda content: _flip(1 - 0.5 / len(content))(content),
    "another accuracy": lambda content: re.sub(rb'("accuracy":"0\.)\d', rb"\g<1>9", content),
    "without a checksum": lambda content: content.replace(b'"sha256"', b'"sha255"'),
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Interrupt a run of plain training after its first evaluation; return the task and the directory."""
    task = small_task(
        training_args={"max_steps": 4, "save_steps": 2, "eval_steps": 2}
        | dict.fromkeys(["save_strategy", "eval_strategy"], "steps")
    )
    directory = tmp_path_factory.mktemp("stopped")
    with pytest.raises(KeyboardInterrupt):
        run_comparison(task, ["erm"], 1, directory, evaluation=NO_ROBUSTNESS, callbacks=[Stop(3)])
    return task, directory


@pytest.mark.parametrize("damage", BEST_DAMAGES)
def test_damaged_best_weights_are_named_before_training(damage, stopped, tmp_path):
    task, directory = stopped
    directory = shutil.copytree(directory, tmp_path / "output")
    path = directory / RUN / "best.safetensors"
    content = BEST_DAMAGES[damage](path.read_bytes())
    assert content != path.read_bytes()
    path.write_bytes(content)
    with pytest.raises(
        DamagedFileError, match=rf"best.safetensors is damaged .*: delete .*{RUN} to train this run again"
    ):
        run_comparison(task, ["erm"], 1, directory, evaluation=NO_ROBUSTNESS, callbacks=[Stop(3)])  # the first step


def test_best_weights_damaged_during_the_training_are_not_used(tmp_path):
    best = BestWeights(tmp_path / "best.safetensors")
    best.best = (0.0, 0.0)
    model, state = torch.nn.Linear(3, 2), SimpleNamespace(is_world_process_zero=True, epoch=1.0)
    best.on_evaluate(None, state, None, metrics={"eval_accuracy": 0.5, "eval_loss": 1.0}, model=model)
    other = torch.nn.Linear(3, 2)
    best.load(other)
    assert torch.equal(other.weight, model.weight) and best.read() == ((0.5, -1.0), 1.0)
    best.path.write_bytes(_flip(0.99)(best.path.read_bytes()))
    with pytest.raises(DamagedFileError, match="its checksum differs"):
        best.load(other)


# ---- settings that an earlier version did not have ----


@pytest.mark.parametrize("name", default_methods())
def test_missing_settings_of_a_method_are_its_defaults(name):
    complete = default_methods()[name].to_dict()
    assert with_defaults({"method": name}) == complete
    for setting in complete.keys() - {"method"}:
        assert with_defaults({k: v for k, v in complete.items() if k != setting}) == complete


def test_missing_settings_of_a_preset_are_those_of_the_preset():
    complete = DenseMultiMix(preset="paper").to_dict()
    assert with_defaults({"method": "dense_multimix", "preset": "paper"}) == complete


@pytest.mark.parametrize(
    "saved", [{}, {"method": "later"}, {"method": "mixup", "later": 1}, {"method": "mixup", "alpha": -1}]
)
def test_settings_of_another_version_are_compared_as_they_are(saved):
    assert with_defaults(saved) == saved


def edit(directory, change):
    path = directory / "settings.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def settings_in(directory, methods, evaluation=NO_ROBUSTNESS, **task):
    task = small_task(**task)
    check_settings(directory, describe(task, methods, evaluation), task)


def test_settings_that_an_earlier_version_lacked_have_their_defaults(tmp_path):
    given = {"settings": {"augmentation": "none", "data": "digits"}, "default_settings": {"augmentation": "none"}}
    methods = {"few": MultiMix(num_mixed=5), "cutmix": CutMix()}
    evaluation = EvaluationOptions(epsilon=EvaluationOptions().epsilon)
    settings_in(tmp_path, methods, evaluation, **given)
    complete = (tmp_path / "settings.json").read_text()

    def forget(values):
        del values["methods"]["few"]["kernel"], values["task"]["augmentation"], values["evaluation"]["epsilon"]
        values["methods"]["cutmix"] = {"method": "cutmix"}

    edit(tmp_path, forget)
    settings_in(tmp_path, methods, evaluation, **given)
    assert json.loads((tmp_path / "settings.json").read_text()) == json.loads(complete)
    for changed, message in (
        ({"methods": {"few": MultiMix(num_mixed=5, kernel="compile")}}, "few kernel was 'eager' and is now 'compile'"),
        ({"evaluation": EvaluationOptions(epsilon=0.5)}, r"evaluation epsilon was 0\.03\d* and is now 0\.5"),
        ({"settings": {"augmentation": "crop", "data": "digits"}}, "augmentation was 'none' and is now 'crop'"),
    ):
        (tmp_path / "settings.json").write_text(complete)
        edit(tmp_path, forget)
        with pytest.raises(ValueError, match=message):
            settings_in(tmp_path, **{"methods": methods, "evaluation": evaluation, **given, **changed})


def test_setting_that_exists_no_longer_is_a_change(tmp_path):
    settings_in(tmp_path, {"few": MultiMix(num_mixed=5)})
    edit(tmp_path, lambda values: values["methods"]["few"].update(strength=3))
    with pytest.raises(ValueError, match="methods few strength was 3 and is now not set"):
        settings_in(tmp_path, {"few": MultiMix(num_mixed=5)})
    assert isinstance(Mixing.from_dict(MultiMix(num_mixed=5).to_dict()), MultiMix)
