"""The mathematics of MultiMix as pure functions: tensors in, a loss out. This room imports torch only."""

from .arguments import IGNORE_INDEX
from .criteria import Criterion
from .factors import sample_factors
from .losses import clean_loss, dense_multimix_loss, multimix_loss
from .targets import count_valid, soft_targets, weight_targets

__all__ = [
    "IGNORE_INDEX",
    "Criterion",
    "clean_loss",
    "count_valid",
    "dense_multimix_loss",
    "multimix_loss",
    "sample_factors",
    "soft_targets",
    "weight_targets",
]
