"""Mixing methods, one per file. Importing a file registers its method by name."""

from .base import METHODS, Mixing, MixingLoss, Requirements, get_method
from .cutmix import CutMix
from .dense_multimix import DenseMultiMix
from .erm import ERM
from .manifold_mixup import ManifoldMixup
from .mixup import Mixup
from .multimix import MultiMix
from .recursivemix import RecursiveMix
from .transmix import TransMix

__all__ = [
    "ERM",
    "METHODS",
    "CutMix",
    "DenseMultiMix",
    "ManifoldMixup",
    "Mixing",
    "MixingLoss",
    "Mixup",
    "MultiMix",
    "RecursiveMix",
    "Requirements",
    "TransMix",
    "get_method",
]
