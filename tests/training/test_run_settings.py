"""A training run resumes with other settings only if this is allowed, and one directory belongs to one run."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from transformers import Trainer

from mm_hf import ERM, CutMix, DenseMultiMix, MultiMixTrainer, load_mixing
from mm_hf.cli import scripts
from mm_hf.evaluation.files import exclusive_directory, remove_links, replaced_file
from mm_hf.training.hub import load_num_mixed, load_plan
from mm_hf.training.run_settings import find_changes, labels_digest
from tests.helpers import digits

DENSE = DenseMultiMix(num_mixed=10)


def trainer(directory, mixing=DENSE, rows=None, model=None, **changes):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 16, **changes}
    rows = digits.dataset(0, 64) if rows is None else rows
    return MultiMixTrainer(
        model or digits.vit(), digits.arguments(directory, **options), mixing=mixing, train_dataset=rows
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    directory = tmp_path_factory.mktemp("written")
    trainer(directory).train()
    return directory


CHANGES = {
    "method": ({"mixing": ERM()}, "method='dense_multimix', which is now 'erm'"),
    "other method": ({"mixing": CutMix()}, "method='dense_multimix', which is now 'cutmix'"),
    "setting of the method": ({"mixing": DenseMultiMix(num_mixed=11)}, "num_mixed=10, which is now 11"),
    "batch size": ({"per_device_train_batch_size": 8}, "per_device_train_batch_size=16, which is now 8"),
    "accumulation": ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps=1, which is now 2"),
    "seed": ({"seed": 8}, "seed=7, which is now 8"),
    "examples": ({"rows": digits.dataset(0, 65)}, "train_examples=64, which is now 65"),
    "order": ({"rows": digits.dataset(0, 64).shuffle(seed=1)}, "the labels of the training examples or their order"),
    "labels": ({"model": digits.vit(num_labels=11)}, "num_labels=10, which is now 11"),
}


@pytest.mark.parametrize("changes", CHANGES)
def test_resuming_with_other_settings_raises_an_error_that_names_them(written, tmp_path, changes, caplog):
    output = shutil.copytree(written, tmp_path / "output")
    options, text = CHANGES[changes]
    with pytest.raises(ValueError, match=r"checkpoint-2 was trained with other settings: ") as caught:
        trainer(output, **{"max_steps": 3, **options}).train(resume_from_checkpoint=True)
    assert text in str(caught.value) and "allow_changed_settings=True" in str(caught.value)
    if changes != "labels":  # weights of other classes cannot be restored
        resumed = trainer(output, **{"max_steps": 3, **options})
        resumed.train(resume_from_checkpoint=True, allow_changed_settings=True)
        assert resumed.state.global_step == 3
        assert any("with other settings" in r.message and text in r.message for r in caplog.records)


def test_resuming_with_the_same_settings_reports_nothing(written, tmp_path, caplog):
    output = shutil.copytree(written, tmp_path / "output")
    moved = digits.dataset(0, 64).map(lambda row: row)  # another fingerprint, the same examples
    resumed = trainer(output, rows=moved, max_steps=4, learning_rate=0.1, logging_steps=2)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert not [r.message for r in caplog.records if "settings" in r.message]


def test_settings_that_the_checkpoint_lacks_had_their_defaults(written, tmp_path):
    checkpoint = shutil.copytree(written / "checkpoint-2", tmp_path / "checkpoint-2")
    values = json.loads((checkpoint / "mixing.json").read_text())
    del values["mixing"]["kernel"], values["mixing"]["clean_weight"]  # as an earlier version wrote it
    (checkpoint / "mixing.json").write_text(json.dumps(values))
    assert find_changes(checkpoint, DENSE, {}) == []
    changed = DenseMultiMix(num_mixed=10, kernel="compile", clean_weight=0.5)
    assert find_changes(checkpoint, changed, {}) == [
        "clean_weight=1.0, which is now 0.5", "kernel='eager', which is now 'compile'"
    ]  # fmt: skip
    weighted = DenseMultiMix(num_mixed=10, class_weights=[1.0] * 10)
    assert find_changes(checkpoint, weighted, {}) == [f"class_weights=None, which is now {[1.0] * 10}"]


def test_number_of_processes_is_compared(written):
    assert find_changes(written / "checkpoint-2", DENSE, {"num_processes": 2}) == ["num_processes=1, which is now 2"]


def test_the_example_scripts_have_the_override(written, tmp_path):
    output = shutil.copytree(written, tmp_path / "output")
    options = {"output_dir": str(output), "resume_from_checkpoint": "true", "do_train": True, "max_steps": 3}
    options |= {"per_device_train_batch_size": 16, "seed": 8, "use_cpu": True, "save_strategy": "no"}
    for allowed in (False, True):
        args = scripts.ScriptArguments(**options, allow_changed_settings=allowed)
        resumed = MultiMixTrainer(digits.vit(), args, mixing=DENSE, train_dataset=digits.dataset(0, 64))
        if allowed:
            scripts.train_and_evaluate(resumed, {})
            assert resumed.state.global_step == 3
        else:
            with pytest.raises(ValueError, match="seed=7, which is now 8"):
                scripts.train_and_evaluate(resumed, {})


def test_a_checkpoint_of_plain_trainer_has_no_settings_to_compare(tmp_path):
    args = digits.arguments(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    Trainer(digits.vit(), args, train_dataset=digits.dataset()).train()
    assert find_changes(tmp_path / "checkpoint-1", DENSE, {"seed": 1}) == []


def test_labels_digest_depends_on_labels_and_order_only():
    rows = digits.dataset(0, 20)
    assert (
        labels_digest(rows)
        == labels_digest(rows.remove_columns("pixel_values"))
        == labels_digest(rows.select(range(20)))
    )
    assert (
        labels_digest(rows) != labels_digest(rows.shuffle(seed=1)) and labels_digest(rows.to_iterable_dataset()) is None
    )
    assert labels_digest([{"labels": 1}]) is None and labels_digest(None) is None


# ---- mixing.json ----

DAMAGED = {
    "list": "[]",
    "null": "null",
    "number": "3",
    "empty": "",
    "half": '{"mixing": {"meth',
    "deep": "[" * 100_000,
    "no method": '{"locations": null}',
    "method is a list": '{"mixing": [1]}',
    "unknown method": '{"mixing": {"method": "hypermix"}, "locations": null, "mm_hf_version": "9.0"}',
    "unknown setting": '{"mixing": {"method": "erm", "depth": 2}, "locations": null, "mm_hf_version": "9.0"}',
    "wrong value": '{"mixing": {"method": "multimix", "num_mixed": "many"}, "locations": null}',
    "binary": "\\x00\\xff",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_mixing_file_raises_one_sentence(name, tmp_path):
    (tmp_path / "mixing.json").write_bytes(DAMAGED[name].encode("latin-1").decode("unicode_escape").encode("latin-1"))
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "mixing.json"))) as caught:
        load_mixing(tmp_path)
    assert str(caught.value).count("\n") == 0 and len(str(caught.value)) < 600
    if name in ("unknown method", "unknown setting"):
        assert "9.0 wrote it" in str(caught.value)


@pytest.mark.parametrize("locations", ["[]", "3", '{"a": 1}', '{"source": 1}', '"x"'])
def test_a_damaged_plan_raises_one_sentence(locations, tmp_path):
    (tmp_path / "mixing.json").write_text(f'{{"mixing": {{"method": "erm"}}, "locations": {locations}}}')
    with pytest.raises(ValueError, match="The entry 'locations' of .*mixing.json cannot be read"):
        load_plan(tmp_path)
    assert load_num_mixed(tmp_path) is None


# ---- Directories and links ----


def test_a_new_run_in_a_directory_with_checkpoints_is_reported(written, tmp_path, caplog):
    output = shutil.copytree(written, tmp_path / "output")
    trainer(output, max_steps=1, save_strategy="no").train()
    messages = reports_of_earlier_runs(caplog)
    assert len(messages) == 1 and f"{output} contains checkpoint-2 of an earlier training run" in messages[0]


def reports_of_earlier_runs(caplog):
    return [r.message for r in caplog.records if "of an earlier training run" in r.message]


@pytest.mark.parametrize("mixing", [DENSE, ERM()])
def test_own_checkpoints_of_a_trainer_are_not_those_of_an_earlier_run(mixing, tmp_path, caplog):
    first = trainer(tmp_path, mixing=mixing)
    first.train()
    first.train()
    first.train(resume_from_checkpoint=True)
    first.train()
    assert not reports_of_earlier_runs(caplog)
    other = trainer(tmp_path, mixing=mixing, max_steps=1, save_steps=1)
    other.train()
    assert [message.split()[2] for message in reports_of_earlier_runs(caplog)] == ["checkpoint-2"]
    first.train()  # the other one has written to its directory
    assert [message.split()[2] for message in reports_of_earlier_runs(caplog)] == ["checkpoint-2", "checkpoint-1"]


def test_checkpoint_that_a_trainer_has_resumed_is_not_of_an_earlier_run(written, tmp_path, caplog):
    resumed = trainer(shutil.copytree(written, tmp_path / "output"), max_steps=3)
    resumed.train(resume_from_checkpoint=True)
    resumed.train()
    assert not reports_of_earlier_runs(caplog)


def test_two_runs_at_the_same_time_cannot_have_one_directory(tmp_path):
    made = trainer(tmp_path)
    with exclusive_directory(tmp_path), pytest.raises(ValueError, match=r"Another training run writes to output_dir="):
        made.train()
    trainer(tmp_path, max_steps=1, save_strategy="no").train()
    code = (
        f"import sys, time; sys.path.insert(0, {os.getcwd()!r}); from mm_hf.evaluation.files import exclusive_directory"
    )
    code += f"\nwith exclusive_directory({str(tmp_path)!r}):\n    print('ready', flush=True)\n    time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    with pytest.raises(BlockingIOError), exclusive_directory(tmp_path):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    with exclusive_directory(tmp_path):  # a killed process leaves no lock
        pass


def test_a_worker_of_the_process_does_not_keep_the_directory(tmp_path):
    with exclusive_directory(tmp_path):
        ready, written = os.pipe()
        worker = os.fork()  # inherits all open files
        if worker == 0:
            os.write(written, b".")
            time.sleep(60)
            os._exit(0)
        os.read(ready, 1)
    try:
        with exclusive_directory(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)


def test_checkpoints_are_not_written_through_links(tmp_path):
    elsewhere, output = tmp_path / "elsewhere", tmp_path / "output"
    elsewhere.mkdir()
    output.mkdir()
    kept = {name: elsewhere / name for name in ("model.safetensors", "mixing.json", "optimizer.pt", "README.md")}
    for path in kept.values():
        path.write_text("kept")
    (output / "checkpoint-1").symlink_to(elsewhere)
    (output / "checkpoint-2").mkdir()
    for name, path in kept.items():
        (output / "checkpoint-2" / name).symlink_to(path)
        (output / name).symlink_to(path)
    (output / "mixing.json.partial").symlink_to(kept["mixing.json"])
    made = trainer(output, save_steps=1)
    made.train()
    made.save_model()
    made.create_model_card()
    assert sorted(path.name for path in elsewhere.iterdir()) == sorted(kept)
    assert {path.read_text() for path in kept.values()} == {"kept"}
    assert not [path for path in output.rglob("*") if path.is_symlink()]
    assert json.loads((output / "mixing.json").read_text())["training"]["train_examples"] == 64


def fail(file):
    file.write(b"new")
    raise OSError("disk full")


def test_a_replaced_file_is_complete_or_unchanged(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(OSError, match="disk full"), replaced_file(path) as file:
        fail(file)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.json"]
    with replaced_file(path) as file:
        file.write(b"new")
    assert path.read_text() == "new" and path.stat().st_mode & 0o777 == (tmp_path / "a.json").stat().st_mode & 0o777


def test_only_links_with_the_suffixes_of_written_files_are_removed(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("train.csv", "model.safetensors"):
        (tmp_path / name).symlink_to(tmp_path / "data")
    remove_links(tmp_path, (".safetensors",))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "train.csv"]
