"""MultiMix and Dense MultiMix for Hugging Face Transformers.

Importing this package imports torch; Transformers and the rest come with the first name that needs them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "AlignMixup": ".methods",
    "AttentionMapCallback": ".training.callbacks",
    "CutMix": ".methods",
    "DenseMultiMix": ".methods",
    "ERM": ".methods",
    "InputMixing": ".methods",
    "LocationError": ".locations",
    "LocationOutput": ".locations",
    "ManifoldMixup": ".methods",
    "Mixing": ".methods",
    "MixingHandle": ".wrapping.wrapper",
    "Mixup": ".methods",
    "MultiMix": ".methods",
    "MultiMixTrainer": ".training.trainer",
    "Plan": ".locations",
    "RecursiveMix": ".methods",
    "RegMixup": ".methods",
    "TransMix": ".methods",
    "ZetaMixup": ".methods",
    "check_model": ".evaluation.model_check",
    "clean_loss": ".functional",
    "dense_multimix_loss": ".functional",
    "extract": ".locations",
    "get_method": ".methods",
    "load_mixing": ".training.hub",
    "multimix_loss": ".functional",
    "probe": ".locations",
    "sample_factors": ".functional",
    "wrap_model": ".wrapping.wrapper",
}
__all__ = [*_EXPORTS, "__version__"]

if TYPE_CHECKING:
    from .evaluation.model_check import check_model
    from .functional import clean_loss, dense_multimix_loss, multimix_loss, sample_factors
    from .locations import LocationError, LocationOutput, Plan, extract, probe
    from .methods import (
        ERM,
        AlignMixup,
        CutMix,
        DenseMultiMix,
        InputMixing,
        ManifoldMixup,
        Mixing,
        Mixup,
        MultiMix,
        RecursiveMix,
        RegMixup,
        TransMix,
        ZetaMixup,
        get_method,
    )
    from .training.callbacks import AttentionMapCallback
    from .training.hub import load_mixing
    from .training.trainer import MultiMixTrainer
    from .wrapping.wrapper import MixingHandle, wrap_model


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
