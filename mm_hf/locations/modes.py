"""Context managers that change a model for a moment and restore it on exit."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn


@contextmanager
def restore_random_state(device: torch.device | None = None) -> Iterator[None]:
    """Restore the random state of Python, NumPy and PyTorch on exit.

    Args:
        device: A CUDA device whose generator is restored, too. Default: the current one, if CUDA is in use.
    """
    python, numpy = random.getstate(), np.random.get_state()
    devices: list[Any]
    if device is None:
        devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    else:
        devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[torch.device]:
    """Set evaluation mode and restore the mode of every module, and the random state, on exit.

    The flags are set directly: `train` and `eval` of some models do more than that, which could not be undone.

    Yields:
        The device of the model's parameters.

    Example:
        >>> model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(4).eval())
        >>> with evaluation_mode(model):
        ...     [module.training for module in model]
        [False, False]
        >>> [module.training for module in model]
        [True, False]
    """
    modes = {module: module.training for module in model.modules()}
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    with restore_random_state(device):
        try:
            for module in modes:
                module.training = False
            yield device
        finally:
            for module, mode in modes.items():
                module.training = mode


@contextmanager
def probing_mode(model: nn.Module) -> Iterator[torch.device]:
    """Set evaluation mode, without autocast and with gradients for frozen parameters, too; restore all of it on exit.

    Yields:
        The device of the model's parameters.
    """
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    with (
        evaluation_mode(model) as device,
        torch.autocast(device.type, enabled=False),
        torch.enable_grad(),
    ):
        try:
            for parameter in frozen:
                parameter.requires_grad_(True)
            yield device
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)


@contextmanager
def nonzero_head_weights(model: nn.Module) -> Iterator[None]:
    """Temporarily fill weights of the head that are all zero: a zero-initialized head would fit any plan."""
    labels = model.config.num_labels  # type: ignore[union-attr]
    zero = [p for p in model.parameters() if p.ndim > 1 and p.shape[0] == labels and not p.any()]
    with torch.no_grad():
        for parameter in zero:
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).sin().view_as(parameter))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter in zero:
                parameter.zero_()
