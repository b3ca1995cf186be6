"""Number of mixed examples of `num_mixed="auto"`: the largest one whose mixing costs a small share of a training step.

Both costs are counted operations and not times, so that the number is the same in every run and on every rank. The
operations of the model are counted in the forward that probes it, on the first mini-batch or `example_inputs`; the
backward pass takes twice as many. `mm_hf.functional.cost` gives the cost of mixing, weighted by what an exponential
costs on the kind of device that trains.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch

from ..distributed import all_gather_object, is_distributed, raise_if_uneven_inputs
from ..locations.operations import ForwardSize
from ..methods import Mixing

logger = logging.getLogger(__name__)

BUDGET = 0.03  # share of a training step without mixing
LEAST, MOST = 32, 1000


@dataclass
class AutoNumMixed:
    """Number of mixed examples that `num_mixed="auto"` has selected.

    Attributes:
        num_mixed: The number; None before the first training step.
        share: Expected cost of mixing, as a share of the operations of a training step without mixing. None for a
            number that was restored from a checkpoint, and for a model whose operations cannot be counted.
    """

    num_mixed: int | None = None
    share: float | None = None
    _size: ForwardSize | None = None  # on this rank
    _forwards: list[tuple[int, ForwardSize]] = field(default_factory=list)  # examples and size on each rank

    def count(self, num_examples: int, size: ForwardSize) -> None:
        """Keep the size of the mini-batch and the operations of its forward on each rank."""
        self._size = size
        if self.num_mixed is None:
            self._forwards = _gather((num_examples, size))

    def reset(self) -> None:
        """Select the number again at the next step, from the examples of its mini-batch and the counted operations."""
        self.num_mixed, self.share, self._forwards = None, None, []

    def select(self, mixing: Mixing, num_examples: int, device: torch.device) -> int:
        """Return the number, which the first call selects: the smallest that the mini-batch of any rank allows.

        If PyTorch cannot count any operation of the model, because it consists of custom kernels, the number is
        `LEAST`. Operations that it cannot count make the number smaller, never larger.

        Args:
            mixing: The method.
            num_examples: Number of examples of this mini-batch, which is used after `reset`.
            device: The device that trains.
        """
        if self.num_mixed is not None:
            return self.num_mixed
        if not self._forwards:
            self._forwards = _gather((num_examples, self._size))
        steps = [3 * num_examples * size.operations for num_examples, size in self._forwards]
        each = [
            mixing.operations_per_mixed_example(num_examples, size.num_locations, size.num_classes, device)
            for num_examples, size in self._forwards
        ]
        shared = [
            mixing.operations_of_locations(
                num_examples, size.num_locations, size.num_classes, size.head_operations, device
            )
            for num_examples, size in self._forwards
        ]
        self.num_mixed = min(map(choose_num_mixed, steps, each, shared))
        if not all(steps):
            reason = "the smallest number, because PyTorch cannot count the operations of this model"
        else:
            self.share = max((self.num_mixed * e + s) / step for e, s, step in zip(each, shared, steps))
            reason = f"whose expected cost is {self.share:.1%} of the operations of a training step"
        logger.info("num_mixed='auto': %s mixed examples per step, %s.", f"{self.num_mixed:,}", reason)
        return self.num_mixed


def _gather(x: Any) -> list[Any]:
    if is_distributed():
        raise_if_uneven_inputs("num_mixed='auto' at the first mini-batch", "give wrap_model example_inputs")
    return all_gather_object(x)


def choose_num_mixed(step: float, each: float, shared: float = 0.0) -> int:
    """Return the largest number of mixed examples, of one significant digit, that costs at most `BUDGET` of a step.

    Args:
        step: Operations of a training step without mixing.
        each: Operations of each mixed example.
        shared: Operations that any number of mixed examples shares.

    Returns:
        A number between `LEAST` and `MOST`.

    Example:
        >>> choose_num_mixed(step=1e12, each=1e8), choose_num_mixed(step=1e12, each=1e9), choose_num_mixed(1e12, 1e7)
        (300, 32, 1000)
    """
    affordable = BUDGET * step - shared
    candidates = [digit * unit for unit in (10, 100, 1000) for digit in range(1, 10)]
    return max((n for n in candidates if LEAST < n <= MOST and n * each <= affordable), default=LEAST)
