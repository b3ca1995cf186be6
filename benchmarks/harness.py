"""Timing, peak memory and CSV files of the benchmarks."""

from __future__ import annotations

import csv
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

RESULTS = Path(__file__).parent / "results"


def alternate(runs: Mapping[str, Callable[[], object]], steps: int, warm_up: int = 2) -> dict[str, np.ndarray]:
    """Time functions in alternation, so that drifts of the machine's speed affect all of them alike.

    Args:
        runs: Functions by name.
        steps: Number of timed rounds, in each of which every function runs once.
        warm_up: Number of rounds before that, which are not timed.

    Returns:
        Seconds per round for each function.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for step in range(-warm_up, steps):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if step >= 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: np.array(times) for name, times in seconds.items()}


def ratio(numerator: np.ndarray, denominator: np.ndarray, digits: int = 2) -> tuple[float, str]:
    """Return the median of the ratios per round, and their quartiles as text."""
    low, middle, high = np.percentile(numerator / denominator, [25, 50, 75])
    return round(float(middle), digits), f"{low:.{digits}f} to {high:.{digits}f}"


def in_process(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """Call a module's function in a new process; return its result and the peak resident memory in megabytes."""
    context = multiprocessing.get_context("spawn")
    queue: multiprocessing.Queue[Any] = context.Queue()
    process = context.Process(target=_call, args=(function, arguments, torch.get_num_threads(), queue))
    process.start()
    result, peak = queue.get()
    process.join()
    return result, peak / 1024


def peak_memory(function: Callable[..., None], *arguments: Any) -> float:
    """Return the peak resident memory in megabytes of a new process that calls a module's function."""
    return in_process(function, *arguments)[1]


def _call(function: Callable[..., Any], arguments: tuple[Any, ...], threads: int, queue: Any) -> None:
    torch.set_num_threads(threads)
    result = function(*arguments)
    # The peak of getrusage would include the parent process.
    status = Path("/proc/self/status").read_text()
    queue.put((result, next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))))


def write(name: str, rows: Sequence[Mapping[str, object]], directory: Path | None = None) -> None:
    """Write a CSV file, by default in benchmarks/results."""
    path = (directory or RESULTS) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    names = list(rows[0])  # raises without rows, before the file is touched
    partial = path.with_name(f"{name}.{os.getpid()}")  # another process may write the file at the same time
    with open(partial, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(partial, path)


def read(name: str, directory: Path | None = None) -> list[dict[str, Any]]:
    """Return the rows of a CSV file, by default in benchmarks/results; an empty list if it does not exist."""
    path = (directory or RESULTS) / name
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def machine() -> str:
    """Return a description of the machine for a table's caption."""
    return f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
