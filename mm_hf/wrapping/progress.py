"""Record of a training: logged values, the mini-batches whose loss a method computed, and those that it mixed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..distributed import is_distributed

KEPT = 1000  # values of a name that are kept on the device at most


class LoggedMeans:
    """Means of values by name. The values stay on their device, without an operation, until they are read."""

    def __init__(self) -> None:
        self._kept: dict[str, list[Tensor | float]] = {}
        self._sums: dict[str, float] = {}  # of the values that were read
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        """Add the values of a mini-batch: numbers or scalar tensors."""
        for name, value in values.items():
            kept = self._kept.setdefault(name, [])
            kept.append(value.detach() if isinstance(value, Tensor) else value)
            if len(kept) >= KEPT:
                self._fetch(name)

    def pop(self) -> dict[str, float]:
        """Return the means since the last call. It waits for the device."""
        for name in self._kept:
            self._fetch(name)
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        self._kept, self._sums, self._counts = {}, {}, {}
        return means

    def _fetch(self, name: str) -> None:
        """Read the values of a name, all at once, and add them up."""
        values, self._kept[name] = self._kept[name], []
        numbers = [value for value in values if not isinstance(value, Tensor)]
        tensors = [value for value in values if isinstance(value, Tensor)]
        if tensors:
            numbers += torch.stack([x.to(tensors[0].device) for x in tensors]).tolist()
        self._sums[name] = self._sums.get(name, 0.0) + sum(numbers)
        self._counts[name] = self._counts.get(name, 0) + len(numbers)


class TrainingRecord:
    """Counts of a training, kept without waiting for the device.

    Attributes:
        losses: Mini-batches whose loss the method computed.
        used: Of these, those whose loss a backward pass has reached.
        unlabeled: Forwards in training mode without labels.
        single: Of the losses, those of mini-batches that cannot be mixed because they have one example.
        unmixed: Of the losses, those of other mini-batches that the method did not mix.
        has_mixed: A mini-batch with several valid examples was mixed. False until this has been read from the device.
        reported: The training was reported as one that mixed nothing, or a trainer does so.
    """

    def __init__(self) -> None:
        self.losses = self.used = self.unlabeled = self.single = self.unmixed = 0
        self.reported = False
        self.has_mixed = False
        self._version: int | None = None
        self._most_valid: Tensor | None = None  # the largest number of valid examples of a mixed mini-batch

    def add(self, mixes: bool, num_examples: int, num_valid: Tensor | None = None) -> None:
        """Add a mini-batch.

        Args:
            mixes: The method mixes it if it has labels.
            num_examples: Its size.
            num_valid: Number of its valid examples, a scalar tensor; None if all are.
        """
        self.losses += 1
        if not mixes:
            self.single += num_examples == 1
            self.unmixed += num_examples > 1
        elif num_valid is None:
            self.has_mixed = True
        elif not self.has_mixed:
            most = num_valid if self._most_valid is None else torch.maximum(self._most_valid, num_valid)
            self._most_valid = most.detach()
            if most.device.type == "cpu":
                self.read()

    def read(self) -> None:
        """Read whether a mini-batch was mixed, after which valid examples are not counted. It waits for the device."""
        if self._most_valid is not None and not self._most_valid.is_meta:
            # With one valid example per rank, the mini-batches of several ranks may be mixed as one.
            self.has_mixed = float(self._most_valid) > (0.5 if is_distributed() else 1.5)
            self._most_valid = None if self.has_mixed else self._most_valid

    def why_unmixed(self) -> str | None:
        """Return a clause that states why no mini-batch was mixed; None if one was. It waits for the device."""
        if not self.has_mixed:
            self.read()
        if self.has_mixed or (self._most_valid is not None and self._most_valid.is_meta):
            return None
        if self.losses == 0:
            return "no training step computed its loss from labels that the model received"
        if self.single == self.losses:
            return "every mini-batch had one example"
        if self.unmixed == self.losses:
            return (
                "its terms for mixed examples have the weight 0, and input mixing did not begin or has the "
                "probability 0"
            )
        return f"all labels were ignored in the {self.losses - self.single - self.unmixed} mini-batches to mix"

    @property
    def can_be_read(self) -> bool:
        """True if `why_unmixed` waits for no device."""
        return self._most_valid is None or self._most_valid.device.type == "cpu"

    def is_discarded(self, weight: Tensor) -> bool:
        """Return True if a weight has changed since the first loss, and no backward pass has reached a loss.

        Args:
            weight: A trainable parameter, before the forward of a mini-batch.
        """
        if self._version is None:
            self._version = weight._version
        return self.losses > 0 and self.used == 0 and weight._version != self._version

    def on_backward(self, gradient: Tensor) -> None:
        """Count a loss that a backward pass has reached: a hook of the loss."""
        self.used += 1
