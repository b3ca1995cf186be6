"""Context managers that change a model for a moment and restore it on exit."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from .probe_inputs import num_labels_of


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

    Flags are set directly, because `eval` of some models merges weights. A module that overrides `train` and was in
    training mode is put back by its own method, because some (LeViT) cache values in evaluation mode and clear them in
    `train`.

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
                if mode and _overrides_train(module):
                    module.train()
            for module, mode in modes.items():
                module.training = mode


@contextmanager
def probing_mode(model: nn.Module) -> Iterator[torch.device]:
    """Set evaluation mode, without autocast and with gradients for frozen parameters, too; restore all of it on exit.

    Values that modules cache in evaluation mode are deleted on exit, too, because they refer to the graph of the probe.

    Yields:
        The device of the model's parameters.
    """
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    with (
        evaluation_mode(model) as device,
        _restore_caches(model),
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
def _restore_caches(model: nn.Module) -> Iterator[None]:
    """Restore attributes, and the contents of dictionaries among them, of modules that override `train`."""
    modules = [module for module in model.modules() if _overrides_train(module)]
    saved = [(module, _public_attributes(module)) for module in modules]
    contents = [(v, dict(v)) for _, attributes in saved for v in attributes.values() if type(v) is dict]
    try:
        yield
    finally:
        for dictionary, content in contents:
            dictionary.clear()
            dictionary.update(content)
        for module, attributes in saved:
            for name in _public_attributes(module).keys() - attributes.keys():
                delattr(module, name)
            vars(module).update(attributes)


def _overrides_train(module: nn.Module) -> bool:
    return type(module).train is not nn.Module.train


def _public_attributes(module: nn.Module) -> dict[str, Any]:
    """Return a module's attributes other than its parameters, buffers, submodules and hooks."""
    return {k: v for k, v in vars(module).items() if not k.startswith("_")}


@contextmanager
def nonzero_head_weights(model: nn.Module) -> Iterator[None]:
    """Temporarily fill weights of the head that are all zero: a zero-initialized head would fit any plan."""
    labels = num_labels_of(model)
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
