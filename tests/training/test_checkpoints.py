"""Incomplete checkpoints are detected, skipped and reported; complete ones are kept."""

import json
import os
import pkgutil
import resource
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file

from mm_hf import ERM, DenseMultiMix, MultiMixTrainer
from mm_hf.cli import scripts
from mm_hf.training.checkpoints import find_checkpoint_error, find_missing_files, last_complete_checkpoint
from tests.helpers import digits

READ = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "mixing.json", "trainer_state.json"]


def trainer(directory, **changes):
    mixing = changes.pop("mixing", DenseMultiMix(num_mixed=10))
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 16, **changes}
    return MultiMixTrainer(
        digits.vit(), digits.arguments(directory, **options), mixing=mixing, train_dataset=digits.dataset()
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    directory = tmp_path_factory.mktemp("written")
    trainer(directory).train()
    return directory


@pytest.fixture
def output_dir(written, tmp_path):
    """Checkpoints 2 and 4, both complete."""
    return shutil.copytree(written, tmp_path / "output")


def truncate(file, bytes_left):
    os.truncate(file, bytes_left)


@pytest.mark.parametrize("name", READ)
def test_a_truncated_file_is_detected(output_dir, name):
    checkpoint = output_dir / "checkpoint-4"
    assert find_checkpoint_error(checkpoint) is None
    size = (checkpoint / name).stat().st_size
    ignored = 1 if name.endswith(".json") else 0  # the newline at its end
    for left in [size - 1 - ignored, size // 2, 9, 1, 0]:
        truncate(checkpoint / name, left)
        assert find_checkpoint_error(checkpoint).startswith(f"{name}, of {left:,} bytes, is damaged")
    (checkpoint / name).unlink()
    indispensable = name in ("model.safetensors", "trainer_state.json")
    assert find_checkpoint_error(checkpoint) == (f"{name} is missing" if indispensable else None)
    assert find_missing_files(checkpoint) == ([] if indispensable else [name])


def test_files_that_resuming_does_not_read_may_be_missing(output_dir):
    for name in ("training_args.bin", "config.json"):
        (output_dir / "checkpoint-4" / name).unlink()
    assert find_checkpoint_error(output_dir / "checkpoint-4") is None


def test_sharded_weights_and_adapters_are_checked(output_dir):
    checkpoint = output_dir / "checkpoint-4"
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "SHA256SUMS").unlink()
    digits.vit().save_pretrained(checkpoint, max_shard_size="30KB")
    shards = sorted(checkpoint.glob("model-*.safetensors"))
    assert len(shards) > 1 and find_checkpoint_error(checkpoint) is None
    kept = shards[1].read_bytes()
    truncate(shards[1], 100)
    assert find_checkpoint_error(checkpoint).startswith(f"{shards[1].name}, of 100 bytes, is damaged")
    shards[1].unlink()
    assert find_checkpoint_error(checkpoint) == f"{shards[1].name} is missing"
    shards[1].write_bytes(kept)
    truncate(checkpoint / "model.safetensors.index.json", 50)
    assert find_checkpoint_error(checkpoint).startswith("model.safetensors.index.json, of 50 bytes, is damaged")

    peft = pytest.importorskip("peft")
    for file in checkpoint.glob("model*"):
        file.unlink()
    assert find_checkpoint_error(checkpoint) == "model.safetensors is missing"
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    model = peft.get_peft_model(digits.vit(), config)
    model.add_adapter("other", config)
    model.save_pretrained(checkpoint)  # "other" in a subdirectory
    assert find_checkpoint_error(checkpoint) is None
    truncate(checkpoint / "other" / "adapter_model.safetensors", 20)
    assert find_checkpoint_error(checkpoint).startswith("other/adapter_model.safetensors, of 20 bytes, is damaged")


@pytest.mark.parametrize(
    ("files", "rank", "world_size", "missing"),
    [
        (["rng_state.pth"], 0, 1, None),
        ([], 0, 1, "rng_state.pth"),
        (["rng_state_0.pth", "rng_state_1.pth"], 1, 2, None),
        (["rng_state_0.pth"], 1, 2, "rng_state_1.pth"),
        (["rng_state_0.pth", "rng_state_2.pth"], 1, 3, "rng_state_1.pth"),
        # Saved by another number of ranks.
        (["rng_state_0.pth", "rng_state_1.pth"], 0, 1, None),
        (["rng_state.pth"], 1, 2, None),
        (["rng_state_0.pth", "rng_state_1.pth"], 2, 3, None),
        # On a disk of the second machine only.
        (["rng_state_1.pth"], 1, 2, None),
    ],
)
def test_each_rank_needs_its_random_state(output_dir, files, rank, world_size, missing):
    checkpoint = output_dir / "checkpoint-4"
    kept = (checkpoint / "rng_state.pth").read_bytes()
    (checkpoint / "rng_state.pth").unlink()
    for name in files:
        (checkpoint / name).write_bytes(kept)
    assert find_missing_files(checkpoint, rank=rank, world_size=world_size) == ([missing] if missing else [])
    assert find_checkpoint_error(checkpoint, rank=rank, world_size=world_size) is None
    assert find_missing_files(checkpoint, rank=rank, world_size=world_size, own_files_only=True) == (
        [missing] if missing else []
    )


def test_training_resumes_from_the_newest_complete_checkpoint_and_reports_skipped_ones(output_dir, written, caplog):
    truncate(output_dir / "checkpoint-4" / "optimizer.pt", 1000)
    (output_dir / "checkpoint-6").mkdir()
    resumed = trainer(output_dir)
    resumed.train(resume_from_checkpoint=True)
    assert [record.message for record in caplog.records if record.name == "mm_hf.training.checkpoints"] == [
        f"Skipping the checkpoint {output_dir}/checkpoint-6: model.safetensors is missing.",
        f"Skipping the checkpoint {output_dir}/checkpoint-4: optimizer.pt, of 1,000 bytes, is damaged (File is not "
        "a zip file).",
    ]
    assert [entry["step"] for entry in resumed.state.log_history if "loss" in entry] == [1, 2, 3, 4]
    expected = load_file(written / "checkpoint-4" / "model.safetensors")
    again = load_file(output_dir / "checkpoint-4" / "model.safetensors")
    assert again.keys() == expected.keys() and all(torch.equal(again[name], expected[name]) for name in expected)
    assert find_checkpoint_error(output_dir / "checkpoint-4") is None  # written again


def test_resuming_from_an_incomplete_checkpoint_raises(output_dir):
    truncate(output_dir / "checkpoint-4" / "trainer_state.json", 0)
    with pytest.raises(
        ValueError, match=r"Can't find a valid checkpoint at .*checkpoint-4: trainer_state.json, of 0 bytes, is damaged"
    ):
        trainer(output_dir).train(resume_from_checkpoint=str(output_dir / "checkpoint-4"))
    with pytest.raises(ValueError, match="nowhere: there is no such directory"):
        trainer(output_dir).train(resume_from_checkpoint="nowhere")
    (output_dir / "checkpoint-2" / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match=r"No valid checkpoint found in output directory \(.*output\): start without"):
        trainer(output_dir).train(resume_from_checkpoint=True)


def test_a_checkpoint_that_replaces_an_older_one_is_incomplete_until_it_is_written(output_dir, monkeypatch):
    """Otherwise new weights and an old optimizer would pass for a complete checkpoint."""
    errors = []

    def killed(self, directory):
        errors.append(find_checkpoint_error(directory))
        raise KeyboardInterrupt

    monkeypatch.setattr(MultiMixTrainer, "_save_optimizer_and_scheduler", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer(output_dir).train()
    assert errors == ["trainer_state.json is missing"]


def test_all_ranks_select_a_checkpoint_that_is_complete_on_each(output_dir, monkeypatch):
    """Simulate rank 0 of two ranks, where the disk of rank 1 lacks the newest checkpoint."""
    # The names; the error of checkpoint 4; the error, the missing and the lost files of checkpoint 2.
    answers = iter([["ignored"], "there is no such directory", None, [], []])

    def gather(everywhere, own):
        everywhere[:] = [own, next(answers)]

    monkeypatch.setattr("mm_hf.training.checkpoints.is_distributed", lambda: True)
    monkeypatch.setattr("mm_hf.distributed.is_distributed", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    assert last_complete_checkpoint(output_dir) == output_dir / "checkpoint-2"


@pytest.mark.parametrize("mixing", [DenseMultiMix(num_mixed=10), ERM()])
def test_a_finished_run_is_resumed_without_another_step(tmp_path, mixing):
    """Plain Trainer trains one more step if the last checkpoint is in the middle of an epoch."""
    first = trainer(tmp_path, mixing=mixing)
    first.train()
    resumed = trainer(tmp_path, mixing=mixing)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    digits.same_weights(digits.weights(resumed.model), digits.weights(first.model))


def test_example_scripts_resume_with_an_option(output_dir):
    resumed = trainer(output_dir, max_steps=5, resume_from_checkpoint="true", do_train=True)
    scripts.train_and_evaluate(resumed, {})
    assert resumed.state.global_step == 5 and resumed._initial_global_step == 4


# ---- full disks ----


def check_full_disk(directory, match, **changes):
    with pytest.raises(OSError, match=match) as caught:
        trainer(directory, save_total_limit=1, **changes).train()
    assert f"{directory}/checkpoint-2 is complete: fix the cause and resume with resume_from_checkpoint=True" in str(
        caught.value
    )
    assert (
        find_checkpoint_error(directory / "checkpoint-2") is None
        and find_checkpoint_error(directory / "checkpoint-4") is not None
    )


def test_a_full_disk_raises_an_error_with_advice(tmp_path, written):
    mounted = tmp_path / "small"
    mounted.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=420k", "none", mounted], capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        check_full_disk(
            mounted,
            r"(?s)checkpoint-4 could not be written: optimizer.pt, of .* is damaged .*\. The disk has 0\.0 MB free",
        )
        (mounted / "checkpoint-4" / "optimizer.pt").unlink()
        subprocess.run(["mount", "-o", "remount,size=2m", mounted], check=True)
        resumed = trainer(mounted, save_total_limit=1)
        resumed.train(resume_from_checkpoint=True)
        assert sorted(path.name for path in mounted.iterdir()) == ["checkpoint-4"]
        expected = load_file(written / "checkpoint-4" / "model.safetensors")
        digits.same_weights({**load_file(mounted / "checkpoint-4" / "model.safetensors")}, expected)
    finally:
        subprocess.run(["umount", mounted], check=True)


@pytest.mark.parametrize(("most", "name"), [(60_000, "model.safetensors"), (100_000, "optimizer.pt")])
def test_a_file_size_limit_raises_an_error_with_advice(tmp_path, monkeypatch, most, name):
    """Limit the size of files from the second checkpoint on: the same errors without a full disk."""
    save, limits = MultiMixTrainer._save_checkpoint, resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(self, *arguments):
        if self.state.global_step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
        save(self, *arguments)

    monkeypatch.setattr(MultiMixTrainer, "_save_checkpoint", limited)
    try:
        check_full_disk(tmp_path, rf"checkpoint-4 could not be written: {name}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


WRITES = [
    ("safetensors.torch", "save_file"),
    ("transformers.modeling_utils", "safe_save_file"),
    ("torch", "save"),
    ("transformers.trainer_callback.TrainerState", "save_to_json"),
    ("mm_hf.training.hub", "write_text"),
    ("mm_hf.training.checksums", "write_text"),
]


def fail_at(monkeypatch, number):
    """Make one write to a full disk fail: that of a number, counted over all kinds of files. Return their count."""
    count = [0]

    def failing(write):
        def wrapped(*arguments, **options):
            count[0] += 1
            if count[0] == number:
                raise OSError(28, "No space left on device")
            return write(*arguments, **options)

        return wrapped

    for owner, name in WRITES:
        path = f"{owner}.{name}"
        monkeypatch.setattr(path, failing(pkgutil.resolve_name(path)))
    return count


def test_nothing_is_lost_if_any_write_fails(tmp_path, written, monkeypatch):
    with monkeypatch.context() as patch:
        count = fail_at(patch, None)
        trainer(tmp_path / "all").train()
    assert count[0] >= 14  # the files of two checkpoints
    expected = load_file(written / "checkpoint-4" / "model.safetensors")
    for number in range(1, count[0] + 1):
        directory = tmp_path / str(number)
        with monkeypatch.context() as patch:
            fail_at(patch, number)
            with pytest.raises(OSError, match="No space left on device"):
                trainer(directory, save_total_limit=1).train()
        last = last_complete_checkpoint(directory)
        assert (last is None) == (number < count[0] // 2), number
        resumed = trainer(directory, save_total_limit=1)
        resumed.train(resume_from_checkpoint=last is not None)
        digits.same_weights(load_file(directory / "checkpoint-4" / "model.safetensors"), expected)
        assert find_checkpoint_error(directory / "checkpoint-4") is None


def test_an_error_after_writing_is_raised_unchanged(tmp_path, monkeypatch):
    def fails(**kwargs):
        raise PermissionError("older checkpoints may not be deleted")

    monkeypatch.setattr("transformers.trainer.rotate_checkpoints", fails)
    with pytest.raises(PermissionError, match="^older checkpoints may not be deleted$"):
        trainer(tmp_path, max_steps=2).train()


def test_an_error_in_the_first_checkpoint_advises_to_start_again(tmp_path):
    args = {"max_steps": 1, "save_steps": 1}
    (tmp_path / "checkpoint-1").write_text("in the way")
    with pytest.raises(OSError, match="There is no other checkpoint: fix the cause and start again"):
        trainer(tmp_path, **args).train()


def test_trainer_state_is_written_last_and_then_the_checksums(output_dir):
    state = json.loads((output_dir / "checkpoint-4" / "trainer_state.json").read_text())
    written = sorted((output_dir / "checkpoint-4").iterdir(), key=lambda file: file.stat().st_mtime_ns)
    assert state["global_step"] == 4
    assert [file.name for file in written[-2:]] == ["trainer_state.json", "SHA256SUMS"]
