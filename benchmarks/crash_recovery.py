"""Interrupt training runs, resume them, and compare the final weights bit for bit.

    python -m benchmarks.crash_recovery
    python -m benchmarks.crash_recovery --resume     # keep the rows of an earlier call, and continue after them

A small ViT with dropout is trained on scikit-learn's digits in float32 on the CPU, by one process and by two (gloo). At
random times all processes receive SIGKILL, or one of the two. A process that has written half of a file is killed
alone. The disk, a file system in memory, becomes full; this requires the permission to mount one. The training run is
then started again. benchmarks/results/crash_recovery.csv gets a row per interruption. The processes are forked from one
that has imported all modules, with the environment that torchrun sets; tests/benchmarks/test_crash_recovery.py uses
torchrun itself.
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
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerState, TrainingArguments, ViTConfig, ViTForImageClassification

from benchmarks import harness
from mm_hf import DenseMultiMix, MultiMixTrainer
from mm_hf.data.offline import load_digits
from mm_hf.training.checkpoints import find_checkpoint_error, last_complete_checkpoint, list_checkpoints

STEPS, SAVE_STEPS = 60, 4
WRITTEN = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state", "trainer_state.json")
FILE = "crash_recovery.csv"
DISK = 2**24  # bytes
COLUMNS = ("processes", "interruption", "newest checkpoint", "error", "resumed from", "same weights")


def beside(directory: Path, name: str) -> Path:
    """Return the path of a file of the benchmark beside an output directory, whose disk may be full."""
    return directory.with_name(f"{directory.name}-{name}")


# ---- The training run that is interrupted ----


class Progress(TrainerCallback):
    """Callback that reports the number of finished steps as the length of a file."""

    def __init__(self, file: Path):
        self.file = file

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.file.write_bytes(b"." * state.global_step)


def train(directory: Path, steps: int = STEPS) -> dict[str, Any]:
    """Train from the last complete checkpoint, if any; return a digest of the weights and the checkpoint's name."""
    data = load_digits()["train"].select(range(192)).with_format("numpy")[:]
    images = torch.tensor(data["image"])[:, None] / 127.5 - 1
    rows = [{"pixel_values": image, "labels": int(label)} for image, label in zip(images, data["label"], strict=True)]
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=8, patch_size=2,
        num_channels=1, num_labels=10, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1,
    )  # fmt: skip
    arguments = TrainingArguments(
        str(directory), max_steps=steps, per_device_train_batch_size=16, learning_rate=1e-3, logging_steps=1,
        use_cpu=True, save_strategy="steps", save_steps=SAVE_STEPS, save_total_limit=1, disable_tqdm=True,
        ddp_find_unused_parameters=False,
    )  # fmt: skip
    trainer = MultiMixTrainer(
        ViTForImageClassification(config), arguments, mixing=DenseMultiMix(num_mixed=20), train_dataset=rows,
        callbacks=[Progress(beside(directory, "steps"))],
    )  # fmt: skip
    last = last_complete_checkpoint(directory, rank=arguments.process_index, world_size=arguments.world_size)
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
    """Patch writing so that the process is killed halfway through a file of the first checkpoint after a step.

    Args:
        name: Beginning of the file's name.
        step: The step.
    """

    def write_half(path: Any, content: Callable[[], bytes]) -> None:
        path = Path(path)
        if path.name.startswith(name) and int(path.parent.name.removeprefix("checkpoint-")) > step:
            complete = content()
            path.write_bytes(complete[: len(complete) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

    def serialize(x: Any) -> bytes:
        file = io.BytesIO()
        torch_save(x, file)
        return file.getvalue()

    torch_save, save_to_json = torch.save, TrainerState.save_to_json
    save_pretrained = ViTForImageClassification.save_pretrained

    def save(x: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(path, str):
            write_half(path, lambda: serialize(x))
        torch_save(x, path, *args, **kwargs)

    def save_json(state: TrainerState, path: str) -> None:
        write_half(path, lambda: json.dumps(vars(state), default=str).encode())
        save_to_json(state, path)

    def save_weights(model: Any, directory: str, *args: Any, **kwargs: Any) -> None:
        save_pretrained(model, directory, *args, **kwargs)
        write_half(Path(directory) / "model.safetensors", (Path(directory) / "model.safetensors").read_bytes)

    torch.save, TrainerState.save_to_json = save, save_json
    ViTForImageClassification.save_pretrained = save_weights


def work(directory: Path, die: str | None = None, environment: dict[str, str] | None = None) -> None:
    """Train as one of the processes that the environment describes, and write the result to a file."""
    if environment is not None:
        os.environ.update(environment)
        log = os.open(beside(directory, "log.txt"), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(log, sys.stdout.fileno())
        os.dup2(log, sys.stderr.fileno())
    # Rounding depends on the number of threads, which Accelerate sets unless the environment does.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    if die is not None:
        die_writing(die, step=STEPS // 2)
    result = train(directory)
    if result["process"] == 0:
        beside(directory, "result.json").write_text(json.dumps(result))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


# ---- The process that interrupts it ----


def start(directory: Path, processes: int, die: str | None = None) -> list[Any]:
    """Start the processes of a training run."""
    directory.mkdir(parents=True, exist_ok=True)
    beside(directory, "result.json").unlink(missing_ok=True)
    os.environ["PYTHONPATH"] = ":".join(sys.path)  # for the fork server
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.crash_recovery"])
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


def wait(running: list[Any], seconds: float = 600) -> list[int | None]:
    """Return the exit codes of processes; kill those that run longer."""
    end = time.monotonic() + seconds
    for process in running:
        process.join(max(0.0, end - time.monotonic()))
    for process in running:
        process.kill()
    for process in running:
        process.join()
    return [process.exitcode for process in running]


def finish(directory: Path, processes: int, die: str | None = None) -> tuple[list[int | None], dict[str, Any]]:
    """Train to the end; return the exit codes and the result of [`train`]."""
    codes = wait(start(directory, processes, die))
    return codes, json.loads(beside(directory, "result.json").read_text()) if not any(codes) else {}


def start_until(directory: Path, processes: int, steps: int, seconds: float) -> list[Any]:
    """Start a training run; return its processes some seconds after a step."""
    file = beside(directory, "steps")
    running = start(directory, processes)
    while all(process.is_alive() for process in running) and not (file.exists() and file.stat().st_size >= steps):
        time.sleep(0.001)
    time.sleep(seconds)
    return running


def kill_after(directory: Path, processes: int, steps: int, seconds: float) -> bool:
    """Kill all processes of a new training run some seconds after a step; return False if one had finished."""
    codes = wait(start_until(directory, processes, steps, seconds), 0)
    if not set(codes) <= {0, -signal.SIGKILL}:
        raise RuntimeError(beside(directory, "log.txt").read_text()[-3000:])
    return set(codes) == {-signal.SIGKILL}


def kill_one_after(directory: Path, rank: int, steps: int, seconds: float) -> bool:
    """Kill one of two processes some seconds after a step; return False if it had finished. The other one fails."""
    running = start_until(directory, 2, steps, seconds)
    running[rank].kill()
    codes = wait(running)
    return codes[rank] == -signal.SIGKILL and codes[1 - rank] not in (0, -signal.SIGKILL)


def kill_writing(directory: Path, processes: int, name: str) -> bool:
    """Train until a process is killed after half of a file."""
    codes, _ = finish(directory, processes, name)
    return -signal.SIGKILL in codes and 0 not in codes


def fill_after(directory: Path, processes: int, steps: int, seconds: float, free: int) -> bool:
    """Leave a number of free bytes on the disk some seconds after a step; return False if the training finished."""
    mount(directory, DISK)
    running = start_until(directory, processes, steps, seconds)
    while len(list_checkpoints(directory)) > 1:  # the older one is about to be deleted
        time.sleep(0.001)
    mount(directory, DISK - shutil.disk_usage(directory).free + free, "remount")
    codes = wait(running)
    mount(directory, DISK, "remount")
    log = beside(directory, "log.txt").read_text()
    return all(codes) and "could not be written" in log


def mount(directory: Path, size: int, *options: str) -> None:
    """Mount a file system in memory, or change its size."""
    directory.mkdir(parents=True, exist_ok=True)
    how = ",".join([*options, f"size={size}"])
    subprocess.run(["mount", "-t", "tmpfs", "-o", how, "tmpfs", str(directory)], check=True)


def remove(directory: Path) -> None:
    """Remove a directory, also if a file system is mounted there."""
    if directory.is_mount():
        subprocess.run(["umount", str(directory)], check=True)
    shutil.rmtree(directory)
    for name in ("log.txt", "steps", "result.json"):
        beside(directory, name).unlink(missing_ok=True)


def newest(directory: Path, processes: int) -> tuple[str, str]:
    """Return the newest checkpoint and the first error that a process finds in it."""
    checkpoints = list_checkpoints(directory)
    if not checkpoints:
        return "none", ""
    errors = [find_checkpoint_error(checkpoints[0], rank=i, world_size=processes) for i in range(processes)]
    return checkpoints[0].name, next(filter(None, errors), "")


def interruptions(processes: int, step_seconds: float) -> Iterator[tuple[str, Callable[[Path], bool]]]:
    """Yield descriptions of interruptions, and functions of a directory that train and interrupt."""
    draw = random.Random(processes)

    def moment(function: Callable[..., bool], **keywords: Any) -> tuple[str, Callable[[Path], bool]]:
        step, share = draw.randrange(STEPS - 2), draw.uniform(0, 2)
        return f"{share:.2f} steps after step {step}", partial(
            function, steps=step, seconds=share * step_seconds, **keywords
        )

    for _ in range(10):
        when, interrupt = moment(kill_after, processes=processes)
        yield f"killed {when}", interrupt
    for name in WRITTEN:
        yield f"killed with half of {name} written", partial(kill_writing, processes=processes, name=name)
    for _ in range(3):
        free = draw.randrange(1, 60) * 4096
        when, interrupt = moment(fill_after, processes=processes, free=free)
        yield f"{free:,} bytes left on the disk {when}", interrupt
    for rank in (0, 1, 0, 1) if processes == 2 else ():
        when, interrupt = moment(kill_one_after, rank=rank)
        yield f"rank {rank} killed {when}", interrupt


def rows(processes: int, skipped: int, root: Path) -> Iterator[dict[str, Any]]:
    """Interrupt and resume training runs; yield a row per interruption after the first ones."""
    _, reference = finish(root / "uninterrupted", processes)
    for description, interrupt in list(interruptions(processes, reference["seconds"] / STEPS))[skipped:]:
        directory = root / "interrupted"
        while not interrupt(directory):
            remove(directory)  # the training run had finished
        found = newest(directory, processes)
        codes, result = finish(directory, processes)
        if any(codes):
            raise RuntimeError(beside(directory, "log.txt").read_text()[-3000:])
        same = result["digest"] == reference["digest"]
        values = (processes, description, *found, result["from"] or "the start", same)
        remove(directory)
        yield dict(zip(COLUMNS, values, strict=True))


def main() -> None:
    """Interrupt and resume training runs, or train as one of the processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resume", action="store_true", help="continue after the rows of the last call")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--die_writing", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train is not None:
        return work(args.train, args.die_writing)
    print(harness.machine())
    table = harness.read(FILE) if args.resume else []
    with tempfile.TemporaryDirectory() as root:
        for processes in (1, 2):
            finished = sum(row["processes"] == str(processes) for row in table)
            for row in rows(processes, finished, Path(root) / str(processes)):
                print(row, flush=True)
                table.append(row)
                harness.write(FILE, table)
    different = [row["interruption"] for row in table if str(row["same weights"]) != "True"]
    if different:
        raise SystemExit(f"Resumed to other weights: {'; '.join(different)}")


if __name__ == "__main__":
    main()
