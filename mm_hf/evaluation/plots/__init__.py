"""Pictures of what a model does: how it trained, what its labels are about, how sure and how robust it is.

They need the extra `plots`: `pip install 'mm-hf[plots]'`.
"""

from .attention import plot_image_attention, plot_token_attention
from .confidence import plot_ood, plot_reliability
from .differences import plot_cost, plot_differences, plot_validation
from .embeddings import plot_alignment_uniformity, plot_embeddings
from .history import plot_history
from .plots import plot_attention, plot_training
from .shift import plot_corruptions

__all__ = [
    "plot_alignment_uniformity",
    "plot_attention",
    "plot_corruptions",
    "plot_cost",
    "plot_differences",
    "plot_embeddings",
    "plot_history",
    "plot_image_attention",
    "plot_ood",
    "plot_reliability",
    "plot_token_attention",
    "plot_training",
    "plot_validation",
]
