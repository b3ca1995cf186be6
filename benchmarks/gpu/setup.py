"""Definitions shared by all parts: the device, the sizes, the time that is left, and the finished rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import harness

NOT_MEASURED = "not measured"
STEPS = 4  # in a round


@dataclass
class Setup:
    """Device and sizes of a run.

    Attributes:
        device: The device to measure.
        rehearse: Run in miniature, on a CPU.
        directory: Directory of the CSV files.
        epochs: Length of the training runs.
        minutes: Longest time of the current part.
        started: Beginning of the current part.
    """

    device: torch.device
    rehearse: bool
    directory: Path
    epochs: int = 100
    minutes: float = 10.0
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds_left(self) -> float:
        """Seconds until the part has to end."""
        return 60 * self.minutes - (time.monotonic() - self.started)

    def synchronize(self) -> None:
        """Wait until the device has finished."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def autocast(self) -> torch.autocast:
        """Return a context of mixed precision in bfloat16."""
        return torch.autocast(self.device.type, torch.bfloat16)


class Rows:
    """Rows of a CSV file, which is written after each row. A row with the same key as an earlier one replaces it."""

    def __init__(self, setup: Setup, name: str, keys: tuple[str, ...]):
        self.directory, self.name, self.keys = setup.directory, name, keys
        self.rows: list[Mapping[str, Any]] = list(harness.read(name, setup.directory))

    def has(self, **key: Any) -> bool:
        """Return True if there is a row with the key."""
        return self._key(key) in map(self._key, self.rows)

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a row, print it and write the file."""
        self.rows = [*(r for r in self.rows if self._key(r) != self._key(row)), row]
        print({k: v for k, v in row.items() if v != ""}, flush=True)
        harness.write(self.name, self.rows, self.directory)

    def _key(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(str(row[key]) for key in self.keys)


class _OperationCount(TorchDispatchMode):
    """Counter of the operations that launch kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.launches += not function.is_view and "empty" not in str(function)
        return function(*args, **(kwargs or {}))


def count_kernels(setup: Setup, step: Callable[[], object]) -> tuple[int, float | None]:
    """Count the kernels that a GPU runs in a step, and add up their milliseconds, by PyTorch's profiler.

    In a rehearsal, PyTorch's operations are counted, and there is no time.
    """
    if setup.device.type != "cuda":
        with _OperationCount() as counter:
            step()
        return counter.launches, None
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        setup.synchronize()
    on_device = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [event for event in on_device if not event.name.startswith(("Memcpy", "Memset"))]
    return len(kernels), sum(event.device_time_total for event in on_device) / 1e3


def measure(
    setup: Setup, step: Callable[[], object], rounds: int, warm_up: int = 3, counts: bool = True
) -> dict[str, Any]:
    """Return the median milliseconds, quartiles and peak memory of a step, and, if `counts`, the number of its kernels
    and their milliseconds on the device.

    A round runs `STEPS` steps, between two synchronizations with the device. Memory is that of PyTorch's allocator, in
    megabytes; a CPU has none.
    """
    seconds = []
    for i in range(-warm_up, rounds):
        if i == 0 and setup.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(setup.device)
        setup.synchronize()
        start = time.perf_counter()
        for _ in range(STEPS):
            step()
        setup.synchronize()
        if i >= 0:
            seconds.append((time.perf_counter() - start) / STEPS)
    milliseconds = torch.tensor(seconds, dtype=torch.float64) * 1e3
    low, middle, high = milliseconds.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    peak = torch.cuda.max_memory_allocated(setup.device) / 1e6 if setup.device.type == "cuda" else None
    kernels, device_ms = count_kernels(setup, step) if counts else ("", None)
    return {
        "ms": f"{middle:.2f}",
        "quartiles": f"{low:.2f} to {high:.2f}",
        "peak_mb": "" if peak is None else f"{peak:.0f}",
        "kernels": kernels,
        "device_ms": "" if device_ms is None else f"{device_ms:.2f}",
    }


def time_cell(row: Mapping[str, Any]) -> str:
    """Return the entry of a table for the time of a step."""
    return f"{row['ms']} ms ({row['quartiles']})"


def device_cell(row: Mapping[str, Any]) -> str:
    """Return the entry of a table for the time of a step's kernels; empty if it was not measured."""
    return f"{row['device_ms']} ms" if row["device_ms"] else ""


def memory_cell(row: Mapping[str, Any]) -> str:
    """Return the entry of a table for the peak memory; empty if it was not measured."""
    return f"{int(row['peak_mb']) / 1e3:.2f} GB" if row["peak_mb"] else ""


def describe(device: torch.device) -> str:
    """Return the name of the device and the versions."""
    import transformers

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return f"{name}, torch {torch.__version__}, transformers {transformers.__version__}"
