"""Plot of one training run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..metrics.registry import METRICS
from .style import COLORS, history_curve, legend_below, panel_grid, saved_figure

LABELS = {
    "loss": "training",
    "eval_loss": "evaluation",
    "loss_clean": "training: clean examples",
    "loss_pooled": "training: mixed examples",
    "loss_dense": "training: mixed locations",
}


def plot_history(history: list[dict[str, Any]], path: str | Path) -> Figure:
    """Plot the training and evaluation losses, the loss terms, and one evaluation metric against training steps.

    The metric is the first one in `mm_hf.evaluation.metrics.METRICS` that was evaluated at least twice.

    Args:
        history: `trainer.state.log_history`.
        path: Image file to write, .png or .pdf.

    Returns:
        The figure, written and closed.

    Raises:
        ValueError: The loss was logged fewer than two times.

    Example:
        >>> import tempfile
        >>> history = [{"step": s, "loss": 2 / s, "eval_loss": 3 / s, "eval_accuracy": 1 - 1 / s} for s in (1, 2)]
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     figure = plot_history(history, f"{directory}/training.png")
        >>> [axes.get_ylabel() for axes in figure.axes]
        ['loss', 'evaluation accuracy (%)']
    """
    curves = {name: history_curve(history, name) for name in _losses(history)}
    if len(curves["loss"][0]) < 2:
        raise ValueError("history must have at least two entries with a loss to plot a curve.")
    evaluated = (info for info in METRICS.values() if len(history_curve(history, f"eval_{info.name}")[0]) > 1)
    metric = next(evaluated, None)
    with saved_figure(path) as figures:
        figure, cells = panel_grid(2 if metric else 1, 2.4)
        figures.append(figure)
        for (name, curve), color in zip(curves.items(), COLORS, strict=False):
            cells[0].plot(*curve, color=color, linewidth=1.2, label=LABELS.get(name) or _term_label(name))
        cells[0].set_ylabel("loss")
        if metric:
            steps, values = history_curve(history, f"eval_{metric.name}")
            cells[1].plot(steps, [metric.scale * value for value in values], color=COLORS[2], linewidth=1.2)
            cells[1].set_ylabel(f"evaluation {metric.label}")
        for cell in cells:
            cell.set_xlabel("training step")
            cell.grid(True)
            cell.set_axisbelow(True)
        legend_below(figure, *cells[0].get_legend_handles_labels())
    return figure


def _term_label(name: str) -> str:
    """Return the label of a loss that has the name of an input-space method, such as "training: cutmix"."""
    return f"training: {name.removeprefix('loss_').replace('_', ' ')}"


def _losses(history: list[dict[str, Any]]) -> list[str]:
    terms = {name for entry in history for name in entry if name.startswith("loss_") and name != "loss_terms"}
    evaluated = ["eval_loss"] if any("eval_loss" in entry for entry in history) else []
    return ["loss", *evaluated, *sorted(terms)]
