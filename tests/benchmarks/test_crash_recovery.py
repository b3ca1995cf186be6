"""Training runs with one and two processes are killed and resumed.

benchmarks/crash_recovery.py kills them at more points.
"""

import signal

import pytest

from benchmarks import crash_recovery
from mm_hf.training.checkpoints import find_checkpoint_error
from tests.helpers import launch

pytestmark = pytest.mark.distributed


def test_killed_training_resumes_to_the_same_weights(tmp_path):
    _, reference = crash_recovery.finish(tmp_path / "uninterrupted", 1)
    directory = tmp_path / "killed"
    assert crash_recovery.kill_after(directory, 1, steps=10, seconds=0.01)
    codes, _ = crash_recovery.finish(directory, 1, "optimizer.pt")
    newest, error = crash_recovery.newest(directory, 1)
    assert codes == [-signal.SIGKILL] and error.startswith("optimizer.pt, of")
    codes, result = crash_recovery.finish(directory, 1)
    assert codes == [0] and result["digest"] == reference["digest"]
    assert result["from"] == f"checkpoint-{int(newest.removeprefix('checkpoint-')) - crash_recovery.SAVE_STEPS}"
    assert (
        f"Skipping the checkpoint {directory / newest}: {error}"
        in crash_recovery.beside(directory, "log.txt").read_text()
    )


def test_training_resumes_after_one_of_two_processes_is_killed_while_writing(tmp_path):
    """The other process waits for it: the job must terminate, and both must resume from the same checkpoint."""
    codes, reference = crash_recovery.finish(tmp_path / "uninterrupted", 2)
    assert codes == [0, 0]
    directory = tmp_path / "killed"
    done = launch.torchrun([crash_recovery.__file__, "--train", directory, "--die_writing", "rng_state_1"], timeout=240)
    assert done.returncode != 0 and "Signal 9 (SIGKILL) received" in done.stderr
    newest, error = crash_recovery.newest(directory, 2)
    assert find_checkpoint_error(directory / newest, rank=1, world_size=2).startswith("rng_state_1.pth, of")
    assert error == "trainer_state.json is missing"  # the first process writes it last
    codes, result = crash_recovery.finish(directory, 2)
    assert codes == [0, 0] and result["digest"] == reference["digest"] and reference["processes"] == 2
    assert result["from"] == f"checkpoint-{int(newest.removeprefix('checkpoint-')) - crash_recovery.SAVE_STEPS}"
    assert (
        crash_recovery.beside(directory, "log.txt")
        .read_text()
        .count(f"Skipping the checkpoint {directory / newest}: {error}")
        > 0
    )
