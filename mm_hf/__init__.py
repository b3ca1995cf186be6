"""MultiMix and Dense MultiMix for Hugging Face Transformers.

Importing this package imports torch; Transformers and the rest come with the first name that needs them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "CutMix": ".methods",
    "DenseMultiMix": ".methods",
    "ERM": ".methods",
    "LocationError": ".locations",
    "LocationOutput": ".locations",
    "ManifoldMixup": ".methods",
    "Mixing": ".methods",
    "MixingHandle": ".wrapper",
    "Mixup": ".methods",
    "MultiMix": ".methods",
    "MultiMixTrainer": ".trainer",
    "Plan": ".locations",
    "TransMix": ".methods",
    "clean_loss": ".functional",
    "dense_multimix_loss": ".functional",
    "extract": ".locations",
    "get_method": ".methods",
    "load_mixing": ".hub",
    "multimix_loss": ".functional",
    "probe": ".locations",
    "sample_factors": ".functional",
    "wrap_model": ".wrapper",
}
__all__ = [*_EXPORTS, "__version__"]

if TYPE_CHECKING:
    from .functional import clean_loss, dense_multimix_loss, multimix_loss, sample_factors
    from .hub import load_mixing
    from .locations import LocationError, LocationOutput, Plan, extract, probe
    from .methods import ERM, CutMix, DenseMultiMix, ManifoldMixup, Mixing, Mixup, MultiMix, TransMix, get_method
    from .trainer import MultiMixTrainer
    from .wrapper import MixingHandle, wrap_model


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
