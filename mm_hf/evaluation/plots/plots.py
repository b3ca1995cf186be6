"""Plots with matplotlib, each written to a file."""

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

from .style import COLOURS, method_styles


def plot_training(runs: Mapping[str, Sequence[list[dict[str, Any]]]], path: str | Path) -> None:
    """Cross-entropy of the clean training examples, and held-out accuracy, against optimisation steps.

    Args:
        runs: For each method, the `trainer.state.log_history` of its runs (seeds). A thin line is one run, the thick
            one their mean.
        path: Image file to write.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), constrained_layout=True)
    panels: list[tuple[Any, tuple[str, ...], str]] = [
        (left, ("loss_clean", "loss"), "training loss on clean images (nats)"),
        (right, ("eval_accuracy",), "accuracy on held-out images (%)"),
    ]
    for axes, keys, title in panels:
        for (colour, _), (name, histories) in zip(method_styles(runs).values(), runs.items(), strict=True):
            curves = [_curve(history, keys) for history in histories]
            scale = 100 if keys[0] == "eval_accuracy" else 1
            for steps, values in curves:
                axes.plot(steps, scale * values, color=colour, alpha=0.3, linewidth=0.8)
            # A log tells of clean images only where there were any: not with a mini-batch of mixed ones alone.
            known = [dict(zip(steps, values, strict=True)) for steps, values in curves]
            common = sorted(set.intersection(*(set(values) for values in known)))
            mean = [scale * np.mean([values[step] for values in known]) for step in common]
            axes.plot(common, mean, color=colour, linewidth=2, label=name)
        axes.set_xlabel("optimisation step")
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    left.set_yscale("log")
    left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    left.yaxis.set_minor_formatter(NullFormatter())
    right.legend(frameon=False, loc="lower right")
    seeds = max(len(histories) for histories in runs.values())
    figure.suptitle(f"mean of {seeds} seeds (thin lines: one seed each)" if seeds > 1 else "one seed", fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _curve(history: list[dict[str, Any]], keys: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    key = next(k for k in keys if any(k in entry for entry in history))
    points = [(entry["step"], entry[key]) for entry in history if key in entry]
    steps, values = zip(*points, strict=True)
    return np.array(steps), np.array(values)


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
    """What weighs the labels: each image's attention by patch, and the label that mixed patches inherit.

    Args:
        images: (b, h, w) or (b, h, w, 3), in [0, 1].
        labels: (b,) class indices.
        attention: (b, r), the confidence of the label at each location; r must be a square number.
        factors: (r, b, n) interpolation factors; the first `num_mixed` mixed examples are shown.
        class_names: Of all classes.
        path: Image file to write.
        num_mixed: Mixed examples to show.
    """
    b, r = attention.shape
    side = round(r**0.5)
    if side * side != r:
        raise ValueError(f"attention over {r} locations is no square grid of patches.")
    figure = plt.figure(figsize=(1.35 * b + 1.2, 9.2), constrained_layout=True)
    parts: Any = figure.subfigures(2, 1, height_ratios=[1, 1.75])
    top, bottom = parts
    maps = attention.view(b, side, side).numpy()
    axes: Any = top.subplots(2, b)
    cropped = images.numpy()
    scale = cropped.shape[1] / side
    for i in range(b):
        for row in range(2):
            axes[row, i].imshow(cropped[i], cmap="gray", interpolation="nearest")
            axes[row, i].set_xticks([])
            axes[row, i].set_yticks([])
        shown = axes[1, i].imshow(
            maps[i],
            cmap="inferno",
            alpha=0.8,
            vmin=0,
            vmax=maps.max(),
            extent=(-0.5, cropped.shape[2] - 0.5, cropped.shape[1] - 0.5, -0.5),
            interpolation="nearest",
        )
        axes[0, i].set_title(f"label {class_names[int(labels[i])]}", fontsize=9)
    axes[0, 0].set_ylabel("image", fontsize=9)
    axes[1, 0].set_ylabel("attention\nby patch", fontsize=9)
    top.colorbar(shown, ax=axes[1].tolist(), shrink=0.9, label="share of attention")
    top.suptitle("A mini-batch: how much of each label is said to be about which patch (attention of the CLS token)")

    # The locations with the most, a middling and the least attention in all, one row each.
    ranking = attention.mean(dim=0).argsort(descending=True)
    chosen = [int(ranking[0]), int(ranking[r // 2]), int(ranking[-1])]
    said = ["most attended patch", "middling patch", "least attended patch"]
    grid: Any = bottom.subplots(len(chosen), num_mixed + 1, width_ratios=[0.7, *[1] * num_mixed])
    one_hot = torch.nn.functional.one_hot(labels, len(class_names)).float()
    for row, (j, text) in enumerate(zip(chosen, said, strict=True)):
        y, x = divmod(j, side)
        where = grid[row, 0]
        where.imshow(cropped.mean(axis=0), cmap="gray", interpolation="nearest")
        where.add_patch(
            Rectangle((x * scale - 0.5, y * scale - 0.5), scale, scale, fill=False, edgecolor=COLOURS[1], linewidth=2)
        )
        where.set_xticks([])
        where.set_yticks([])
        where.set_ylabel(text, fontsize=9)
        plain = factors[j]
        weighted = attention[:, j, None] * plain
        weighted = weighted / weighted.sum(dim=0, keepdim=True).clamp(min=1e-30)
        for k in range(num_mixed):
            cell = grid[row, k + 1]
            position = np.arange(len(class_names))
            cell.bar(position, (one_hot.T @ weighted[:, k]).numpy(), color=COLOURS[1], label="weighted by attention")
            cell.bar(
                position,
                (one_hot.T @ plain[:, k]).numpy(),
                fill=False,
                edgecolor="black",
                linewidth=0.8,
                label="interpolation factors alone",
            )
            cell.set_ylim(0, 1)
            cell.set_xticks(position, class_names, fontsize=8)
            cell.set_yticks([0, 0.5, 1], ["0", "½", "1"] if k == 0 else [])
            cell.spines[["top", "right"]].set_visible(False)
            if row == 0 and k == 0:
                where.set_title("the patch, on the\nmean of all images", fontsize=8)
            if row == 0:
                cell.set_title(f"mixed example {k + 1}", fontsize=9)
            if row == len(chosen) - 1:
                cell.set_xlabel("class", fontsize=8)
    handles, texts = grid[0, 1].get_legend_handles_labels()
    bottom.legend(handles, texts, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    bottom.suptitle("The label that a mixed example inherits at one patch, from all images of the mini-batch")
    figure.savefig(path, dpi=130)
    plt.close(figure)
