"""Fit of the clean examples: MultiMix and Dense MultiMix mix less while a model underfits."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..distributed import GlobalBatch
from ..functional import clean_loss, count_valid

DECAY = 0.9  # weight of earlier mini-batches in the running mean
WORST = 100.0  # nats; a first mini-batch counts at most as much
LAG = 2  # mini-batches between a mean on the device and its use on the host
START = 3.0  # epochs of training in which the fit has no influence


def mixing_weight(misfit: Tensor | float, min_fit: float) -> Tensor:
    """Return the weight of mixing, in [0, 1], for a model that fits its training data as well as given.

    With p = exp(-misfit), the geometric mean of the probabilities of the correct classes, the weight is 0 below
    `min_fit`, 1 above its square root, and linear in the misfit in between.

    Args:
        misfit: See [`misfit`].
        min_fit: Probability below which nothing is mixed, in (0, 1).

    Example:
        >>> mixing_weight(-torch.tensor([0.1, 0.25, 0.5, 1.0]).log(), min_fit=0.25)
        tensor([0., 0., 1., 1.])
    """
    return torch.as_tensor(2 + misfit * (2 / math.log(min_fit))).clamp(0, 1)


def misfit(logits: Tensor, labels: Tensor, loss: Tensor | None = None, batch: GlobalBatch | None = None) -> Tensor:
    """Return the Kullback-Leibler divergence of the predictions from the labels of clean examples, without a gradient.

    This is the cross-entropy minus the entropy of the labels, which is 0 for class indices. Labels are not smoothed.

    Args:
        logits: As for [`clean_loss`].
        labels: As for [`clean_loss`] with "cross_entropy".
        loss: The result of [`clean_loss`] without label smoothing, if it is known.
        batch: The mini-batches of all ranks, to return the value of their examples together.

    Returns:
        A scalar, in nats; 0 or NaN if all labels are ignored.

    Example:
        >>> misfit(torch.zeros(2, 10), torch.tensor([3, 7]))
        tensor(2.3026)
        >>> probabilities = torch.tensor([[0.7, 0.3], [0.4, 0.6]])
        >>> misfit(probabilities.log(), probabilities).abs() < 1e-6
        tensor(True)
    """
    loss = (clean_loss(logits, labels, validate_args=False) if loss is None else loss).detach()
    if not labels.is_floating_point() and batch is None:
        return loss
    valid = count_valid(labels, logits)
    if labels.is_floating_point():
        probabilities = labels.to(loss.dtype)  # with class weights, they sum to the weight of an example
        entropies = torch.special.entr(probabilities).sum() - torch.special.entr(probabilities.sum(dim=-1)).sum()
        loss = loss - entropies / valid
    if batch is None:
        return loss
    total, all_valid = batch.total(torch.stack([valid * loss.nan_to_num(), valid])).unbind()
    return total / all_valid


class RunningMean:
    """Running mean of a scalar on the device. Neither its updates nor its reads wait for the device.

    Pickles and deep copies are empty: a wrapped model trains with a deep copy of its method.

    Attributes:
        value: The mean on the device; None before the first update.
    """

    STATE = ("mean", "earlier_means")

    def __init__(self) -> None:
        self.value: Tensor | None = None
        self._earlier: deque[tuple[Tensor, torch.Event | None]] = deque(maxlen=LAG + 1)  # on the host

    def __reduce__(self) -> tuple[Any, ...]:
        return RunningMean, ()

    def update(self, x: Tensor) -> Tensor:
        """Include the number of a mini-batch, and return the mean. NaN and numbers above `WORST` are left out."""
        if self.value is None:
            self.value = x.nan_to_num(nan=WORST).clamp(max=WORST)
        else:
            value = self.value.to(x)  # a restored mean may be on another device, or of another type
            self.value = value.lerp(torch.where(x <= WORST, x, value), 1 - DECAY)
        if self.value.device.type == "cpu":
            self._earlier.append((self.value, None))
        elif not self.value.is_meta:
            host, event = self.value.to("cpu", non_blocking=True), torch.Event(self.value.device)
            event.record()
            self._earlier.append((host, event))
        return self.value

    def read(self) -> float | None:
        """Return the mean of `LAG` updates ago; None after fewer updates.

        The lag is fixed, so that the result does not depend on the speed of the device. The device has computed this
        mean already, unless it is more than `LAG` mini-batches behind.
        """
        if len(self._earlier) <= LAG:
            return None
        host, event = self._earlier[0]
        if event is not None:
            event.synchronize()
        return float(host)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the mean, and the earlier means from the oldest to the newest; empty before the first update."""
        if self.value is None:
            return {}
        for _, event in self._earlier:
            if event is not None:
                event.synchronize()
        mean = self.value.cpu()
        earlier = torch.stack([host.to(mean.dtype) for host, _ in self._earlier])
        return dict(zip(self.STATE, (mean, earlier), strict=True))

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        self.value = state.get("mean")
        self._earlier.clear()
        self._earlier.extend((host, None) for host in state.get("earlier_means", ()))
