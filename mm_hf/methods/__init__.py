"""Mixing methods, one a file. Importing a file registers its method by name."""

from .base import METHODS, Mixing, MixingLoss, get_method
from .dense_multimix import DenseMultiMix
from .erm import ERM
from .mixup import Mixup
from .multimix import MultiMix

__all__ = ["ERM", "METHODS", "DenseMultiMix", "Mixing", "MixingLoss", "Mixup", "MultiMix", "get_method"]
