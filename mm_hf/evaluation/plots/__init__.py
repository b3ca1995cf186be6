"""Plots of training, attention, confidence, robustness and embeddings, and of differences between methods.

They require the extra `plots`: `pip install 'mm-hf[plots]'`.
"""

from .attention import plot_image_attention, plot_token_attention
from .confidence import plot_ood, plot_reliability
from .confusion import Mistake, plot_confusion, plot_mistakes
from .differences import plot_cost, plot_differences, plot_validation
from .embeddings import plot_alignment_uniformity, plot_embeddings
from .history import plot_history
from .lengths import plot_lengths
from .shift import plot_corruptions

__all__ = [
    "Mistake",
    "plot_alignment_uniformity",
    "plot_confusion",
    "plot_corruptions",
    "plot_cost",
    "plot_differences",
    "plot_embeddings",
    "plot_history",
    "plot_image_attention",
    "plot_lengths",
    "plot_mistakes",
    "plot_ood",
    "plot_reliability",
    "plot_token_attention",
    "plot_validation",
]
