"""Number of mixed examples of `num_mixed="auto"`, determined by timing the first steps of a training."""

from __future__ import annotations

import logging
import statistics
import time
from typing import Any

import torch

from ..distributed import all_gather_object, is_distributed, raise_if_uneven_inputs

logger = logging.getLogger(__name__)

# A step may take 1.05 times the time of plain training. The rest of that is for work that does not depend on the number
# of mixed examples: the head at every location, and one row of attention.
BUDGET = 0.04
SIZES = (200, 1000)  # in turn: two sizes separate the cost per mixed example from the fixed cost
WARM_UP = 2  # steps in which caches fill and kernels are selected or compiled
ROUNDS = 4
MOST = 100_000


class AutoNumMixed:
    """Timer of the first steps of a training, which then determines the number of mixed examples per step.

    A complete step lies between two calls of `begin`, data and optimizer included. On a GPU, its own clock is read
    once, after the last timed step, so that no step before synchronizes.
    """

    def __init__(self, num_mixed: int | None = None):
        self.num_mixed = num_mixed
        self._begun = 0
        self._size = 0
        self._marks: list[Any] = []  # of this step: its beginning, the loss's, the loss's end
        self._steps: list[tuple[int, list[Any]]] = []  # sizes, and marks with the next step's beginning

    def __deepcopy__(self, memo: Any) -> AutoNumMixed:
        """Return a copy for a copy of the model (EMA), without the timings: events of a GPU cannot be copied."""
        return AutoNumMixed(self.num_mixed)

    def begin(self, device: torch.device) -> int:
        """Begin a step, and return its number of mixed examples."""
        if self.num_mixed is not None:
            return self.num_mixed
        now = _mark(device)
        if self._begun > WARM_UP and len(self._marks) == 3:  # fewer marks: the step had no mixed examples
            self._steps.append((self._size, [*self._marks, now]))
        if self._begun >= WARM_UP + ROUNDS * len(SIZES):
            # From this step on, the ranks ask each other until all of them have timed enough steps: with input mixing,
            # some mix in embedding space more often than others.
            timed = [size for size, _ in self._steps]
            enough = min(timed.count(size) for size in SIZES) >= ROUNDS
            self.num_mixed = _agreed(choose_size(self._seconds(device)) if enough else None)
            if self.num_mixed is not None:
                logger.info("num_mixed='auto': %s mixed examples per step.", f"{self.num_mixed:,}")
                return self.num_mixed
        self._size = SIZES[self._begun % len(SIZES)]
        self._begun += 1
        self._marks = [now]
        return self._size

    def loss_begins(self, device: torch.device) -> None:
        """Mark the end of the forward."""
        if self.num_mixed is None:
            self._marks.append(_mark(device))

    def loss_ends(self, device: torch.device) -> None:
        """Mark the end of the loss and its gradient."""
        if self.num_mixed is None:
            self._marks.append(_mark(device))

    def _seconds(self, device: torch.device) -> list[tuple[int, float, float]]:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return [
            (size, _between(loss, loss_end), _between(start, end)) for size, (start, loss, loss_end, end) in self._steps
        ]


def choose_size(steps: list[tuple[int, float, float]]) -> int:
    """Return the largest number of mixed examples whose loss takes `BUDGET` of a plain step.

    Args:
        steps: Number of mixed examples, seconds of the loss and seconds of the complete step, for each timed step.
            There are two different numbers of mixed examples.

    Returns:
        A number of two significant digits between the smaller of the two numbers and `MOST`.

    Example:
        >>> choose_size([(200, 0.003, 1.003), (1000, 0.007, 1.007)])  # 2 ms, and 5 microseconds for each
        7600
    """
    losses = {size: statistics.median(loss for s, loss, _ in steps if s == size) for size, _, _ in steps}
    small, large = min(losses), max(losses)
    each = max((losses[large] - losses[small]) / (large - small), 1e-12)
    fixed = max(losses[small] - small * each, 0.0)
    plain = statistics.median(whole - loss for _, loss, whole in steps)
    affordable = max(small, min(MOST, (BUDGET * plain - fixed) / each))
    unit = 10 ** (len(str(int(affordable))) - 2)
    return int(affordable * (1 + 1e-9)) // unit * unit


def _mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, end: Any) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3


def _agreed(size: int | None) -> int | None:
    """Return the smallest number of all ranks, or None until each has one."""
    if not is_distributed():
        return size
    raise_if_uneven_inputs("num_mixed='auto'", "give a number")
    sizes = all_gather_object(size)
    return None if None in sizes else min(sizes)
