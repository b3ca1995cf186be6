"""Kill trainings at random moments and while they write a checkpoint, resume them, and compare the weights bit for bit.

    python benchmarks/crash_recovery.py

A small ViT on scikit-learn's digits, float32 on the CPU, with dropout, by one process and by two (gloo). At random moments
all processes are sent SIGKILL; one that writes half of a file is killed alone. The training is then started again. One row a
kill is written to benchmarks/results/crash_recovery.csv. The processes are forked from one that has imported everything, with the
environment that torchrun gives; tests/benchmarks/test_crash_recovery.py kills under torchrun itself.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerState, TrainingArguments, ViTConfig, ViTForImageClassification

from mm_hf import DenseMultiMix, MultiMixTrainer
from mm_hf.data.offline import load_digits
from mm_hf.training.checkpoints import find_checkpoint_error, last_complete_checkpoint, list_checkpoints

STEPS, SAVE_STEPS = 60, 4
WRITTEN = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state", "trainer_state.json")
COLUMNS = ("processes", "moment", "newest checkpoint", "its flaw", "resumed from", "same weights")


# ---- what is killed ----


class Progress(TrainerCallback):
    """Says by a file's length how many steps are done."""

    def __init__(self, file: Path):
        self.file = file

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.file.write_bytes(b"." * state.global_step)


def train(directory: Path, steps: int = STEPS) -> dict[str, Any]:
    """Train, from the last whole checkpoint if there is one; the weights' digest and from where the training has gone on."""
    data = load_digits()["train"].select(range(192)).with_format("numpy")[:]
    images = torch.tensor(data["image"])[:, None] / 127.5 - 1
    rows = [{"pixel_values": image, "labels": int(label)} for image, label in zip(images, data["label"], strict=True)]
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=8, patch_size=2,
        num_channels=1, num_labels=10, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1,
    )  # fmt: skip
    arguments = TrainingArguments(
        str(directory), max_steps=steps, per_device_train_batch_size=16, learning_rate=1e-3, logging_steps=1, use_cpu=True,
        save_strategy="steps", save_steps=SAVE_STEPS, save_total_limit=1, disable_tqdm=True, ddp_find_unused_parameters=False,
    )  # fmt: skip
    trainer = MultiMixTrainer(
        ViTForImageClassification(config), arguments, mixing=DenseMultiMix(num_mixed=20), train_dataset=rows,
        callbacks=[Progress(directory / "steps")],
    )  # fmt: skip
    last = last_complete_checkpoint(directory, process=arguments.process_index, processes=arguments.world_size)
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=last is not None)
    digest = hashlib.sha256()
    for name, value in sorted(trainer.model.state_dict().items()):
        digest.update(name.encode() + value.numpy().tobytes())
    return {
        "digest": digest.hexdigest(),
        "from": None if last is None else last.name,
        "seconds": time.perf_counter() - started,
        "processes": arguments.world_size,
        "process": arguments.process_index,
    }


def die_writing(name: str, step: int) -> None:
    """In the first checkpoint after a step, write half of the file whose name begins so, and be killed."""

    def half(path: Any, content: Callable[[], bytes]) -> None:
        path = Path(path)
        if path.name.startswith(name) and int(path.parent.name.removeprefix("checkpoint-")) > step:
            whole = content()
            path.write_bytes(whole[: len(whole) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

    def serialised(x: Any) -> bytes:
        file = io.BytesIO()
        torch_save(x, file)
        return file.getvalue()

    torch_save, save_to_json = torch.save, TrainerState.save_to_json
    save_pretrained = ViTForImageClassification.save_pretrained

    def save(x: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(path, str):
            half(path, lambda: serialised(x))
        torch_save(x, path, *args, **kwargs)

    def save_json(state: TrainerState, path: str) -> None:
        half(path, lambda: json.dumps(vars(state), default=str).encode())
        save_to_json(state, path)

    def save_weights(model: Any, directory: str, *args: Any, **kwargs: Any) -> None:
        save_pretrained(model, directory, *args, **kwargs)
        half(Path(directory) / "model.safetensors", (Path(directory) / "model.safetensors").read_bytes)

    torch.save, TrainerState.save_to_json = save, save_json
    ViTForImageClassification.save_pretrained = save_weights


def work(directory: Path, die: str | None = None, environment: dict[str, str] | None = None) -> None:
    """Train as one of the processes that the environment speaks of, and write down what has come of it."""
    if environment is not None:
        os.environ.update(environment)
        log = os.open(directory / "log.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(log, sys.stdout.fileno())
        os.dup2(log, sys.stderr.fileno())
    # Other numbers of threads round otherwise, and Accelerate chooses one itself unless the environment does.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    if die is not None:
        die_writing(die, step=STEPS // 2)
    result = train(directory)
    if result["process"] == 0:
        (directory / "result.json").write_text(json.dumps(result))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


# ---- who kills it ----


def start(directory: Path, processes: int, die: str | None = None) -> list[Any]:
    """Start the processes of a training."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "result.json").unlink(missing_ok=True)
    os.environ["PYTHONPATH"] = ":".join(sys.path)  # for the process that forks
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kill"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)} if processes > 1 else {}
    started = []
    for rank in range(processes):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        started.append(context.Process(target=work, args=(directory, die, {**common, **own})))
        started[-1].start()
    return started


def wait(running: list[Any], seconds: float = 300) -> list[int | None]:
    """Their exit codes; a process that lasts longer is killed."""
    for process in running:
        process.join(seconds)
        process.kill()
        process.join()
    return [process.exitcode for process in running]


def finish(directory: Path, processes: int, die: str | None = None) -> tuple[list[int | None], dict[str, Any]]:
    """Train to the end: exit codes, and what [`train`] gave."""
    codes = wait(start(directory, processes, die))
    return codes, json.loads((directory / "result.json").read_text()) if not any(codes) else {}


def kill_after(directory: Path, processes: int, steps: int, seconds: float) -> bool:
    """Start a training and kill all its processes so long after so many steps; False if one was faster."""
    file = directory / "steps"
    running = start(directory, processes)
    while all(process.is_alive() for process in running) and not (file.exists() and file.stat().st_size >= steps):
        time.sleep(0.001)
    time.sleep(seconds)
    return set(wait(running, 0)) == {-signal.SIGKILL}


def newest(directory: Path, processes: int) -> tuple[str, str]:
    """The newest checkpoint and what the first process that finds something finds wrong with it."""
    checkpoints = list_checkpoints(directory)
    if not checkpoints:
        return "none", ""
    flaws = [find_checkpoint_error(checkpoints[0], process=i, processes=processes) for i in range(processes)]
    return checkpoints[0].name, next(filter(None, flaws), "")


def kills(processes: int, count: int, draw: random.Random, root: Path) -> Iterator[dict[str, Any]]:
    """Kill at so many random moments and once in the writing of each file."""
    _, reference = finish(root / "uninterrupted", processes)
    assert reference["processes"] == processes
    step_seconds = reference["seconds"] / STEPS
    moments = [(draw.randrange(STEPS - 2), draw.uniform(0, 2 * step_seconds)) for _ in range(count)]
    for i, moment in enumerate([*moments, *WRITTEN]):
        directory = root / f"killed-{i}"
        if isinstance(moment, str):
            said = f"half of {moment} written"
            codes, _ = finish(directory, processes, moment)
            assert -signal.SIGKILL in codes and 0 not in codes
        else:
            said = f"{1000 * moment[1]:.0f} ms after step {moment[0]}"
            while not kill_after(directory, processes, *moment):
                shutil.rmtree(directory)
        where = newest(directory, processes)
        codes, result = finish(directory, processes)
        assert not any(codes), (directory / "log.txt").read_text()[-3000:]
        same = result["digest"] == reference["digest"]
        values = (processes, said, *where, result["from"] or "the beginning", same)
        yield dict(zip(COLUMNS, values, strict=True))


def main() -> None:
    """Be killed, or kill."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=10)
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--die_writing", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train is not None:
        return work(args.train, args.die_writing)
    print(harness.machine())
    rows = []
    with tempfile.TemporaryDirectory() as root:
        for processes in (1, 2):
            for row in kills(processes, args.moments, random.Random(processes), Path(root) / str(processes)):
                print(row, flush=True)
                rows.append(row)
                harness.write("crash_recovery.csv", rows)
    assert all(row["same weights"] for row in rows)


if __name__ == "__main__":
    main()
