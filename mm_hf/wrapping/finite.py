"""Training losses that are not finite: found without waiting for a device in each step, and reported with a cause."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

logger = logging.get_logger(__name__)

PENDING = 1000  # losses that are kept on the device at most
SCALER_STEPS = 20  # a gradient scaler that starts at 2^16 and halves at each skipped step is below 1 after 17


class NonFiniteLossError(ValueError):
    """A training loss, or a weight before a checkpoint is saved, is NaN or infinite."""


class LossRecord:
    """Losses of the last mini-batches, kept on their device until `check` reads them.

    In float16, a gradient scaler skips the steps whose gradient is not finite. There, only a series of such losses is
    an error.
    """

    def __init__(self) -> None:
        self._pending: list[tuple[int, bool, dict[str, Tensor]]] = []
        self._previous: float | None = None  # the last finite loss
        self._in_a_row = 0

    def add(self, step: int, terms: Mapping[str, Tensor], scaled: bool = False) -> None:
        """Add the detached losses of a mini-batch, the complete loss first.

        Args:
            step: Number of the step.
            terms: Scalars by name.
            scaled: A gradient scaler may skip this step.
        """
        self._pending.append((step, scaled, dict(terms)))
        if len(self._pending) >= PENDING:
            self.check()

    def is_bad(self) -> bool:
        """Return True if the last loss is not finite. It waits for the device."""
        return bool(self._pending) and not all(bool(x.isfinite()) for x in self._pending[-1][2].values())

    def check(self, cause: str | None = None) -> None:
        """Read the losses since the last call, which synchronizes the device once.

        Args:
            cause: Sentence with the likely cause of a loss that is not finite.

        Raises:
            NonFiniteLossError: One of them is not finite.
        """
        pending, self._pending = self._pending, []
        if not pending:
            return
        tensors = [term for _, _, terms in pending for term in terms.values()]
        values = iter(torch.stack([x.detach().to(tensors[0].device, torch.float32) for x in tensors]).tolist())
        for step, scaled, terms in pending:
            numbers = {name: next(values) for name in terms}
            if all(map(math.isfinite, numbers.values())):
                self._previous, self._in_a_row = next(iter(numbers.values())), 0
                continue
            self._in_a_row += 1
            if scaled and self._in_a_row < SCALER_STEPS:
                if self._in_a_row == 1:
                    logger.warning_once("A loss in float16 is not finite. The gradient scaler skips such steps.")
                continue
            raise NonFiniteLossError(self._describe(step, numbers, cause or likely_cause(numbers)))

    def _describe(self, step: int, numbers: Mapping[str, float], cause: str) -> str:
        shown = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        before = "" if self._previous is None else f", after {self._previous:.4g} in an earlier step"
        series = f", and so were the {self._in_a_row - 1} losses before" if self._in_a_row > 1 else before
        return f"The training loss of step {step} is not finite ({shown}){series}. {cause}"


def likely_cause(numbers: Mapping[str, float]) -> str:
    """Return the likely cause of losses that are not finite, from their names.

    Example:
        >>> likely_cause({"loss": float("nan"), "clean": 2.3, "dense": float("nan")})
        'The logits of the examples are finite, but those of their locations are not: ...
    """
    if math.isfinite(numbers.get("clean", math.nan)):
        return (
            "The logits of the examples are finite, but those of their locations are not: features of single patches "
            "or tokens overflow. Lower the learning rate, or train in bfloat16 or float32."
        )
    return (
        "The logits are not finite: the learning rate may be too large (lower it, or add warmup or max_grad_norm), an "
        "input may contain NaN, or float16 may overflow (use bfloat16)."
    )


def cause_in(model: nn.Module, inputs: Mapping[str, Any]) -> str | None:
    """Return the cause of a loss that is not finite if it is in the inputs or the weights. It waits for the device."""
    name = _nan_input(inputs)
    if name is not None:
        return f"The input {name} contains NaN: check the preprocessing of the data."
    weight = nonfinite_weight(model)
    if weight is not None:
        return f"{weight} is not finite since an earlier step: lower the learning rate, or add warmup or max_grad_norm."
    return None


def check_start(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Raise a ValueError for NaN in the first mini-batch or in the weights, before the model is probed with them."""
    name = _nan_input(inputs)
    if name is not None:
        raise ValueError(f"The input {name} of the first mini-batch contains NaN: check the preprocessing of the data.")
    name = next(
        (name for name, p in model.named_parameters() if p.is_floating_point() and _local(p).isnan().any()), None
    )
    if name is not None:
        raise ValueError(
            f"The weight {name} of {type(model).__name__} is NaN before the first training step: the model comes from "
            "a training that diverged, or its file is damaged. Load other weights."
        )


def _nan_input(inputs: Mapping[str, Any]) -> str | None:
    tensors = {k: v for k, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point()}
    return next((name for name, value in tensors.items() if value.isnan().any()), None)


def nonfinite_weight(model: nn.Module) -> str | None:
    """Return the name of a trainable parameter that is not finite, on this rank, or None. It waits for the device."""
    trainable = {name: _local(p) for name, p in model.named_parameters() if p.requires_grad and p.is_floating_point()}
    flags = [(name, p.isfinite().all()) for name, p in trainable.items()]
    if not flags:
        return None
    finite = torch.stack([flag.to(flags[0][1].device) for _, flag in flags]).tolist()
    return next((name for (name, _), is_finite in zip(flags, finite, strict=True) if not is_finite), None)


def _local(parameter: Tensor) -> Tensor:
    """Return this rank's part of a parameter."""
    local = getattr(parameter, "to_local", None)
    return parameter.detach() if local is None else local().detach()
