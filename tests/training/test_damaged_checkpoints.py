"""A damaged checkpoint is never read: an older one is used, or an error names the file."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import Trainer

from mm_hf import DenseMultiMix, MultiMixTrainer
from mm_hf.training.checkpoints import find_checkpoint_error, find_weights_error, last_complete_checkpoint
from mm_hf.training.checksums import CHECKSUM_FILE, read_checksums, write_checksums
from tests.helpers import digits

WRITTEN = [
    "SHA256SUMS",
    "config.json",
    "mixing.json",
    "mixing_state.safetensors",
    "model.safetensors",
    "optimizer.pt",
    "rng_state.pth",
    "scheduler.pt",
    "trainer_state.json",
    "training_args.bin",
]
NOT_READ = {"training_args.bin"}


def trainer(directory, make=MultiMixTrainer, **changes):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 16, **changes}
    method = {"mixing": DenseMultiMix(num_mixed=10)} if make is MultiMixTrainer else {}
    arguments = digits.arguments(directory, learning_rate=1e-2, **options)
    return make(digits.vit(), arguments, train_dataset=digits.dataset(0, 64), **method)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    directory = tmp_path_factory.mktemp("written")
    trainer(directory).train()
    return directory


def flip(content, start, length):
    changed = bytearray(content)
    for i in range(start, min(start + length, len(changed))):
        changed[i] ^= 0xFF
    return bytes(changed)


def zero(content, start, length):
    return content[:start] + bytes(len(content[start : start + length])) + content[start + length :]


def truncate(content, start, length):
    return content[:start]


def extend(content, start, length):
    return content + bytes(length)


def delete(content, start, length):
    return None


DAMAGES = [flip, zero, truncate, extend, delete]


def test_every_file_of_a_checkpoint_is_tested(written):
    checkpoint = written / "checkpoint-4"
    assert sorted(path.name for path in checkpoint.iterdir()) == sorted(WRITTEN)
    assert set(read_checksums(checkpoint)) == {*WRITTEN} - {CHECKSUM_FILE}
    verified = subprocess.run(["sha256sum", "-c", CHECKSUM_FILE], cwd=checkpoint, capture_output=True)
    assert verified.returncode == 0


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(WRITTEN), st.sampled_from(DAMAGES), st.floats(0, 1), st.sampled_from([1, 64, 10**6]))
def test_a_damaged_checkpoint_is_not_read(written, tmp_path, name, damage, position, length):
    """The newest checkpoint is selected only if all files that are read have their original content."""
    output = tmp_path / "output"
    shutil.rmtree(output, ignore_errors=True)
    shutil.copytree(written, output)
    file = output / "checkpoint-4" / name
    content = file.read_bytes()
    changed = damage(content, int(position * (len(content) - 1)), length)
    if changed is None:
        file.unlink()
    else:
        file.write_bytes(changed)
    selected = last_complete_checkpoint(output)
    unchanged = changed == content
    # Weights are restored without the config. Damaged checksums reject or do not cover intact files.
    harmless = name in (*NOT_READ, CHECKSUM_FILE, "config.json")
    if selected == output / "checkpoint-4":
        assert unchanged or harmless
    else:
        assert selected == output / "checkpoint-2" and not unchanged
    if not (unchanged or harmless or changed is None):
        assert name in find_checkpoint_error(output / "checkpoint-4")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "rng_state.pth", "mixing.json"])
def test_training_resumes_from_the_checkpoint_before_a_damaged_one(written, tmp_path, name, caplog):
    output = shutil.copytree(written, tmp_path / "output")
    file = output / "checkpoint-4" / name
    content = file.read_bytes()
    file.write_bytes(zero(content, len(content) // 2, len(content)) if name != "mixing.json" else b"[]")
    resumed = trainer(output)
    resumed.train(resume_from_checkpoint=True)
    skipped = [record.message for record in caplog.records if record.message.startswith("Skipping")]
    assert len(skipped) == 1 and f"{output}/checkpoint-4: {name}" in skipped[0]
    expected = load_file(written / "checkpoint-4" / "model.safetensors")
    digits.same_weights(load_file(output / "checkpoint-4" / "model.safetensors"), expected)
    assert find_checkpoint_error(output / "checkpoint-4") is None  # written again


def test_a_damaged_best_model_raises_an_error(written, tmp_path):
    output = shutil.copytree(written, tmp_path / "output")
    best = trainer(output)
    best.state.best_model_checkpoint = str(output / "checkpoint-2")
    best._load_best_model()
    digits.same_weights(
        digits.weights(best.model), digits.weights(type(best.model).from_pretrained(output / "checkpoint-2"))
    )
    file = output / "checkpoint-2" / "model.safetensors"
    file.write_bytes(flip(file.read_bytes(), 5000, 64))
    assert find_weights_error(output / "checkpoint-2").startswith(
        "model.safetensors is damaged: it differs from SHA256"
    )
    with pytest.raises(ValueError, match=r"The best model in .*checkpoint-2 cannot be loaded: model.safetensors"):
        best._load_best_model()


@pytest.mark.parametrize("damage", [truncate, zero, flip])
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_pytorch_files_without_checksums_are_verified(written, tmp_path, name, damage):
    """Each part of these files has its own checksum."""
    checkpoint = shutil.copytree(written / "checkpoint-4", tmp_path / "checkpoint-4")
    (checkpoint / CHECKSUM_FILE).unlink()
    content = (checkpoint / name).read_bytes()
    assert find_checkpoint_error(checkpoint) is None
    (checkpoint / name).write_bytes(damage(content, len(content) // 3, 200))
    assert find_checkpoint_error(checkpoint).startswith(f"{name}, of ")


def test_files_that_a_user_changed_are_read_without_the_checksums(written, tmp_path):
    output = shutil.copytree(written, tmp_path / "output")
    checkpoint = output / "checkpoint-4"
    digits.vit(seed=5).save_pretrained(checkpoint)
    with pytest.raises(ValueError, match=r"delete that file if you changed model.safetensors"):
        trainer(output, max_steps=5).train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / CHECKSUM_FILE).unlink()
    trainer(output, max_steps=5).train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize(
    "lost", [["rng_state.pth"], ["optimizer.pt"], ["optimizer.pt", "scheduler.pt"], ["mixing.json"]]
)
def test_a_checkpoint_that_lost_files_is_used_if_it_is_named_or_the_only_one(written, tmp_path, lost, caplog):
    output = shutil.copytree(written, tmp_path / "output")
    for name in lost:
        (output / "checkpoint-4" / name).unlink()
    assert last_complete_checkpoint(output) == output / "checkpoint-2"
    assert f"checkpoint-4: {' and '.join(lost)} {'is' if len(lost) == 1 else 'are'} missing" in caplog.text
    shutil.rmtree(output / "checkpoint-2")
    caplog.clear()
    for where in (True, str(output / "checkpoint-4")):
        resumed = trainer(output, max_steps=5)
        resumed.train(resume_from_checkpoint=where)
        assert resumed._initial_global_step == 4 and resumed.state.global_step == 5
    warnings = [r.message for r in caplog.records if "checkpoint-4" in r.message and r.levelname == "WARNING"]
    expected = f"The checkpoint {output}/checkpoint-4 has no {', '.join(lost)}: what they contain starts anew"
    assert len(warnings) == 2 and all(message.startswith(expected) for message in warnings)


def test_a_checkpoint_of_the_model_only_is_resumed_with_a_warning(tmp_path, caplog):
    for make in (MultiMixTrainer, Trainer):
        output = tmp_path / make.__name__
        trainer(output, make, save_only_model=True, max_steps=4).train()
        if make is Trainer:  # it does not restore a ViT, but its checkpoint is complete
            shutil.copy(tmp_path / "MultiMixTrainer" / "checkpoint-4" / "model.safetensors", output / "checkpoint-4")
        for options in ({}, {"save_only_model": True}):
            caplog.clear()
            resumed = trainer(output, max_steps=5, save_strategy="no", **options)
            resumed.train(resume_from_checkpoint=True)
            assert resumed._initial_global_step == 4
            warnings = [r.message for r in caplog.records if r.levelname == "WARNING" and "checkpoint-4" in r.message]
            assert len(warnings) == 1 and "has no optimizer.pt, scheduler.pt, rng_state.pth" in warnings[0]


def test_checkpoints_of_plain_trainer_are_resumed(tmp_path):
    trainer(tmp_path, Trainer).train()
    assert find_checkpoint_error(tmp_path / "checkpoint-4") is None
    resumed = trainer(tmp_path, max_steps=6)
    resumed.train(resume_from_checkpoint=True)
    assert resumed._initial_global_step == 4 and resumed.state.global_step == 6


def test_checksums_are_those_of_all_files(tmp_path):
    (tmp_path / "part").mkdir()
    for name in ("a.bin", "part/b.bin", "empty"):
        (tmp_path / name).write_bytes(os.urandom(3_000_000) if name != "empty" else b"")
    write_checksums(tmp_path)
    write_checksums(tmp_path)  # without its own
    assert subprocess.run(["sha256sum", "-c", CHECKSUM_FILE], cwd=tmp_path, capture_output=True).returncode == 0
    assert set(read_checksums(tmp_path)) == {"a.bin", "part/b.bin", "empty"}
    assert read_checksums(Path(tmp_path, "part")) == {}


def test_checksums_need_no_copy_of_large_files(tmp_path):
    torch.save(torch.zeros(10**6), tmp_path / "optimizer.pt")
    write_checksums(tmp_path)
    assert (tmp_path / CHECKSUM_FILE).stat().st_size < 100


def test_the_best_model_is_found_after_the_directory_was_moved(tmp_path, written):
    output = shutil.copytree(written, tmp_path / "moved")
    best = trainer(output)
    best.state.best_model_checkpoint = "/elsewhere/checkpoint-2"
    best._load_best_model()
    expected = load_file(output / "checkpoint-2" / "model.safetensors")
    assert best.state.best_model_checkpoint == str(output / "checkpoint-2")
    assert torch.equal(best.model.classifier.weight, expected["classifier.weight"])
