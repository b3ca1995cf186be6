"""Plots of the demo: training curves, and the attention and labels of mixed patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, NullFormatter
from torch import Tensor

from mm_hf.evaluation.plots.attention import patch_grid
from mm_hf.evaluation.plots.style import COLORS, history_curve, method_styles


def plot_training(regimes: Mapping[str, Mapping[str, Sequence[list[dict[str, Any]]]]], path: str | Path) -> None:
    """Plot the held-out negative log-likelihood against training steps, a panel per regime.

    Args:
        regimes: `trainer.state.log_history` of the runs (seeds) of each method, by regime. Thin lines are runs, thick
            lines means.
        path: Image file to write.
    """
    figure, panels = plt.subplots(1, len(regimes), figsize=(10, 3.8), constrained_layout=True, squeeze=False)
    for axes, (title, runs) in zip(panels[0], regimes.items(), strict=True):
        for (color, _), (name, histories) in zip(method_styles(runs).values(), runs.items(), strict=True):
            curves = [history_curve(history, "eval_nll") for history in histories]
            for steps, values in curves:
                axes.plot(steps, values, color=color, alpha=0.3, linewidth=0.8)
            mean = np.mean([values for _, values in curves], axis=0)
            axes.plot(curves[0][0], mean, color=color, linewidth=2, label=name)
        axes.set_xlabel("training step")
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    panels[0, 0].set_ylabel("held-out NLL (nats)")
    panels[0, -1].legend(frameon=False, loc="upper right")
    seeds = max(len(histories) for runs in regimes.values() for histories in runs.values())
    figure.suptitle(f"mean of {seeds} seeds (thin lines: one seed each)" if seeds > 1 else "one seed", fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_attention(
    images: Tensor,
    labels: Tensor,
    attention: Tensor,
    factors: Tensor,
    class_names: Sequence[str],
    path: str | Path,
    *,
    num_mixed: int = 4,
) -> None:
    """Plot the attention map of each image, and the labels of mixed examples at three patches.

    Args:
        images: Images (b, h, w) or (b, h, w, 3) with values in [0, 1].
        labels: Class indices (b,).
        attention: Attention (b, r) of the r patches.
        factors: Interpolation factors (r, b, n).
        class_names: Names of all classes.
        path: Image file to write.
        num_mixed: Number of mixed examples shown.

    Raises:
        ValueError: The locations do not form a grid over the images.
    """
    pixels = images.numpy()
    rows, columns = patch_grid(attention.shape[1], *pixels.shape[1:3])
    figure = plt.figure(figsize=(1.35 * len(pixels) + 1.2, 9.2), constrained_layout=True)
    parts: Any = figure.subfigures(2, 1, height_ratios=[1, 1.75])
    top, bottom = parts
    _plot_maps(top, pixels, attention.view(-1, rows, columns).numpy(), [class_names[int(label)] for label in labels])

    ranking = attention.mean(dim=0).argsort(descending=True)
    patches = {
        "most attended patch": int(ranking[0]),
        "median patch": int(ranking[len(ranking) // 2]),
        "least attended patch": int(ranking[-1]),
    }
    grid: Any = bottom.subplots(len(patches), num_mixed + 1, width_ratios=[0.7, *[1] * num_mixed])
    one_hot = torch.nn.functional.one_hot(labels, len(class_names)).float()
    for cells, (text, j) in zip(grid, patches.items(), strict=True):
        _mark_patch(cells[0], pixels, divmod(j, columns), (rows, columns))
        cells[0].set_ylabel(text, fontsize=9)
        weighted = attention[:, j, None] * factors[j]
        weighted = weighted / weighted.sum(dim=0, keepdim=True).clamp(min=1e-30)
        for k, cell in enumerate(cells[1:]):
            _plot_labels(
                cell, (one_hot.T @ weighted[:, k]).numpy(), (one_hot.T @ factors[j, :, k]).numpy(), class_names
            )
            cell.set_yticks([0, 0.5, 1], ["0", "½", "1"] if k == 0 else [])
    grid[0, 0].set_title("patch, on the\nmean image", fontsize=8)
    for k in range(num_mixed):
        grid[0, k + 1].set_title(f"mixed example {k + 1}", fontsize=9)
        grid[-1, k + 1].set_xlabel("class", fontsize=8)
    handles, texts = grid[0, 1].get_legend_handles_labels()
    bottom.legend(handles, texts, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    bottom.suptitle("Labels of mixed examples at three patches")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _plot_maps(figure: Any, pixels: np.ndarray, maps: np.ndarray, names: Sequence[str]) -> None:
    """Plot each image, and below it the image with its attention map."""
    height, width = pixels.shape[1:3]
    axes: Any = figure.subplots(2, len(pixels))
    for i, (image, name) in enumerate(zip(pixels, names, strict=True)):
        for cell in axes[:, i]:
            cell.imshow(image, cmap="gray", interpolation="nearest")
            cell.set(xticks=[], yticks=[])
        overlay = axes[1, i].imshow(
            maps[i], cmap="inferno", alpha=0.8, vmin=0, vmax=maps.max(),
            extent=(-0.5, width - 0.5, height - 0.5, -0.5), interpolation="nearest",
        )  # fmt: skip
        axes[0, i].set_title(f"label {name}", fontsize=9)
    axes[0, 0].set_ylabel("image", fontsize=9)
    axes[1, 0].set_ylabel("attention\nper patch", fontsize=9)
    figure.colorbar(overlay, ax=axes[1].tolist(), shrink=0.9, label="attention weight")
    figure.suptitle("Images of a mini-batch, and the attention of the CLS token")


def _mark_patch(axes: Any, pixels: np.ndarray, patch: tuple[int, int], grid: tuple[int, int]) -> None:
    """Plot the mean image with a frame around one patch (row, column) of a grid (rows, columns)."""
    height, width = pixels.shape[1] / grid[0], pixels.shape[2] / grid[1]
    corner = (patch[1] * width - 0.5, patch[0] * height - 0.5)
    axes.imshow(pixels.mean(axis=0), cmap="gray", interpolation="nearest")
    axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=COLORS[1], linewidth=2))
    axes.set(xticks=[], yticks=[])


def _plot_labels(axes: Any, weighted: np.ndarray, plain: np.ndarray, class_names: Sequence[str]) -> None:
    """Plot a mixed label with and without the attention weights."""
    position = np.arange(len(class_names))
    axes.bar(position, weighted, color=COLORS[1], label="weighted by attention")
    axes.bar(
        position, plain, fill=False, edgecolor="black", linewidth=0.8, label="interpolation factors without attention"
    )
    axes.set_ylim(0, 1)
    axes.set_xticks(position, class_names, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
