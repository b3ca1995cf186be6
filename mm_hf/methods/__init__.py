"""Mixing methods, one per file. The first access to a name imports all files, which registers the methods by name.

The import is lazy because commands read `settings` without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "ERM": "erm",
    "METHODS": "base",
    "AlignMixup": "align_mixup",
    "CutMix": "cutmix",
    "DenseMultiMix": "dense_multimix",
    "InputMixing": "mixing_function",
    "ManifoldMixup": "manifold_mixup",
    "Mixing": "base",
    "MixingLoss": "base",
    "Mixup": "mixup",
    "MultiMix": "multimix",
    "RecursiveMix": "recursivemix",
    "RegMixup": "regmixup",
    "Requirements": "base",
    "TransMix": "transmix",
    "ZetaMixup": "zeta_mixup",
    "balanced_weights": "class_weights",
    "check_class_weights": "class_weights",
    "default_methods": "base",
    "get_method": "base",
    "with_defaults": "base",
}
__all__ = list(_EXPORTS)

if TYPE_CHECKING:
    from .align_mixup import AlignMixup
    from .base import METHODS, Mixing, MixingLoss, Requirements, default_methods, get_method, with_defaults
    from .class_weights import balanced_weights, check_class_weights
    from .cutmix import CutMix
    from .dense_multimix import DenseMultiMix
    from .erm import ERM
    from .manifold_mixup import ManifoldMixup
    from .mixing_function import InputMixing
    from .mixup import Mixup
    from .multimix import MultiMix
    from .recursivemix import RecursiveMix
    from .regmixup import RegMixup
    from .transmix import TransMix
    from .zeta_mixup import ZetaMixup


def load_methods() -> None:
    """Import all files of methods."""
    for module in sorted(set(_EXPORTS.values())):
        importlib.import_module(f".{module}", __name__)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    load_methods()
    value = getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    globals()[name] = value
    return value
