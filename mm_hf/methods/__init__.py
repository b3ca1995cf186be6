"""Mixing methods, one per file. The first access to a name imports all files, which registers the methods by name.

The import is lazy because commands read `settings` without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "ERM": "erm",
    "METHODS": "base",
    "CutMix": "cutmix",
    "DenseMultiMix": "dense_multimix",
    "ManifoldMixup": "manifold_mixup",
    "Mixing": "base",
    "MixingLoss": "base",
    "Mixup": "mixup",
    "MultiMix": "multimix",
    "RecursiveMix": "recursivemix",
    "Requirements": "base",
    "TransMix": "transmix",
    "get_method": "base",
}
__all__ = list(_EXPORTS)

if TYPE_CHECKING:
    from .base import METHODS, Mixing, MixingLoss, Requirements, get_method
    from .cutmix import CutMix
    from .dense_multimix import DenseMultiMix
    from .erm import ERM
    from .manifold_mixup import ManifoldMixup
    from .mixup import Mixup
    from .multimix import MultiMix
    from .recursivemix import RecursiveMix
    from .transmix import TransMix


def load_methods() -> None:
    """Import all files of methods."""
    for module in set(_EXPORTS.values()):
        importlib.import_module(f".{module}", __name__)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    load_methods()
    value = getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    globals()[name] = value
    return value
