"""How one training went."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .style import COLOURS, legend_below, panel_grid, saved_figure

LABELS = {
    "loss": "training",
    "eval_loss": "evaluation",
    "loss_clean": "training: clean examples",
    "loss_pooled": "training: mixed examples",
    "loss_dense": "training: mixed locations",
    "loss_mixup": "training: mixed inputs",
}
# The first one that was measured is drawn beside the loss.
SCORES = ("accuracy", "f1", "macro_f1", "mean_iou", "nll")


def plot_history(history: list[dict[str, Any]], path: str | Path) -> Figure:
    """The loss in training and in evaluation, its terms, and the first known metric, against optimisation steps.

    Args:
        history: `trainer.state.log_history`.
        path: Image file to write, .png or .pdf.

    Returns:
        The figure, written and closed.

    Raises:
        ValueError: The loss was logged less than twice.

    Example:
        >>> import tempfile
        >>> history = [{"step": s, "loss": 2 / s, "eval_loss": 3 / s, "eval_accuracy": 1 - 1 / s} for s in (1, 2)]
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     figure = plot_history(history, f"{directory}/training.png")
        >>> [axes.get_ylabel() for axes in figure.axes]
        ['loss', 'accuracy, evaluation set']
    """
    logged = {name: _curve(history, name) for name in _losses(history)}
    if len(logged.get("loss", [[]])[0]) < 2:
        raise ValueError("history has fewer than two entries with a loss: there is no curve to draw.")
    score = next((name for name in SCORES if len(_curve(history, f"eval_{name}")[0]) > 1), None)
    with saved_figure(path) as figures:
        figure, cells = panel_grid(2 if score else 1, 2.4)
        figures.append(figure)
        for (name, curve), colour in zip(logged.items(), COLOURS, strict=False):
            cells[0].plot(*curve, color=colour, linewidth=1.2, label=LABELS.get(name, name))
        cells[0].set_ylabel("loss")
        if score:
            cells[1].plot(*_curve(history, f"eval_{score}"), color=COLOURS[2], linewidth=1.2)
            cells[1].set_ylabel(f"{score.replace('_', ' ')}, evaluation set")
        for cell in cells:
            cell.set_xlabel("optimisation step")
            cell.grid(True)
            cell.set_axisbelow(True)
        handles, texts = cells[0].get_legend_handles_labels()
        legend_below(figure, handles, texts)
    return figure


def _losses(history: list[dict[str, Any]]) -> list[str]:
    named = {name for entry in history for name in entry if name.startswith("loss_") and name != "loss_terms"}
    evaluated = ["eval_loss"] if any("eval_loss" in entry for entry in history) else []
    return ["loss", *evaluated, *sorted(named)]


def _curve(history: list[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    points = [(entry["step"], entry[name]) for entry in history if name in entry]
    return [step for step, _ in points], [value for _, value in points]
