"""Pictures of what a model does: how it trained, what its labels are about."""

from .plots import plot_attention, plot_training

__all__ = ["plot_attention", "plot_training"]
