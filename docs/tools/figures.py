"""Plot the figures of docs/method.md with factors, attention and logits computed by mm_hf, in a minute.

PYTHONPATH=. python docs/tools/figures.py [--output_dir docs/images]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from matplotlib import pyplot as plt
from torch import Tensor
from transformers import (
    Dinov2ForImageClassification,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from benchmarks.evidence.data.dinov2 import to_dinov2_input
from benchmarks.evidence.tasks.pretrained import partly_frozen_dinov2
from mm_hf import DenseMultiMix, LocationOutput, MultiMix, MultiMixTrainer, extract, sample_factors
from mm_hf.data.offline import FASHION_CLASSES, load_digits, load_fashion_mnist
from mm_hf.evaluation.plots.attention import patch_grid, plot_image_attention
from mm_hf.evaluation.plots.style import CLASS_COLORS, COLORS, WIDTH, method_styles, saved_figure
from mm_hf.functional.factors import SparseFactors, alpha_for
from mm_hf.methods.pairs import draw_factor, draw_partners

CPU = torch.device("cpu")
SHOWN = ("T-shirt", "trouser", "pullover", "dress", "bag", "ankle boot")
MIXED_BY = {
    "Mixup": None,
    "MultiMix (default)": MultiMix(num_mixed=1000),
    "effective_examples = 10": MultiMix(num_mixed=1000, effective_examples=10),
    "α from U[0.5, 2]": MultiMix(num_mixed=1000, alpha=(0.5, 2.0)),
}


def factors_of(method: MultiMix | None, b: int, generator: torch.Generator) -> Tensor:
    """Draw the factors (b, n) of a training step; those of Mixup are (b, b)."""
    if method is None:
        factor = draw_factor(1.0, generator)
        partner = draw_partners(b, generator, CPU)
        return torch.eye(b) * factor + torch.eye(b)[:, partner] * (1 - factor)
    factors = method.sample(b, CPU, generator)
    return factors.dense() if isinstance(factors, SparseFactors) else factors


def effective_number(factors: Tensor) -> float:
    """Return the effective number of examples in a mixed example: 1 over the mean sum of squared factors (b, n)."""
    return 1 / float(factors.square().sum(dim=0).mean())


def draw_factors(path: Path, b: int = 32) -> None:
    """Plot the factors of one step: columns are mixed examples, rows are examples of the mini-batch."""
    with saved_figure(path) as figures:
        figure, axes = plt.subplots(1, len(MIXED_BY), figsize=(WIDTH, 2.1), layout="constrained", sharey=True)
        for cell, (name, method) in zip(axes, MIXED_BY.items(), strict=True):
            factors = factors_of(method, b, torch.Generator().manual_seed(4))
            shown = cell.imshow(factors[:, :b], cmap="magma_r", vmin=0, vmax=1, interpolation="nearest")
            cell.set_title(f"{name}\n{factors.shape[1]:,} mixed examples")
            cell.set_xlabel(f"effective number: {effective_number(factors):.1f}")
            cell.spines[:].set_visible(False)
            cell.set_xticks([])
            cell.set_yticks([])
        axes[0].set_ylabel(f"{b} examples")
        figure.supxlabel(f"first {b} mixed examples, and effective number of examples in each", fontsize=8)
        figure.colorbar(shown, ax=axes, shrink=0.8, label="factor")
        figures.append(figure)


def draw_effective(path: Path) -> None:
    """Plot the effective number of examples in a mixed example against the batch size."""
    sizes = [8, 16, 32, 64, 128, 256, 512]
    methods = {
        "α from U[0.5, 2] (paper)": MultiMix(num_mixed=2000, alpha=(0.5, 2.0)),
        "α = 0.1": MultiMix(num_mixed=2000, alpha=0.1),
        "effective_examples = 10": MultiMix(num_mixed=2000, effective_examples=10),
        "effective_examples = 3 (default)": MultiMix(num_mixed=2000),
    }
    generator = torch.Generator().manual_seed(0)
    with saved_figure(path) as figures:
        figure, axes = plt.subplots(figsize=(0.75 * WIDTH, 2.6), layout="constrained")
        for (name, method), (color, marker) in zip(methods.items(), method_styles(methods).values(), strict=True):
            used = [b for b in sizes if b > 2 * (method.effective_examples or 0)]
            means = [effective_number(factors_of(method, b, generator)) for b in used]
            axes.plot(used, means, color=color, marker=marker, markersize=4, linewidth=1.2)
            axes.annotate(name, (used[-1], means[-1]), (6, 0), textcoords="offset points", va="center", color=color)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sizes, [str(b) for b in sizes])
        axes.set_yticks([2, 3, 10, 30, 100, 300], ["2", "3", "10", "30", "100", "300"])
        axes.minorticks_off()
        axes.set_xlabel("batch size")
        axes.set_ylabel("effective number of examples, 1 / E Σλ²")
        axes.grid(alpha=0.3)
        figures.append(figure)


def draw_simplex(path: Path, images: np.ndarray) -> None:
    """Plot three examples and the mixed examples between them."""
    corners = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, 0.75**0.5]])
    colors = np.array([plt.matplotlib.colors.to_rgb(c) for c in (COLORS[1], COLORS[2], COLORS[3])])
    generator = torch.Generator().manual_seed(28)
    panels = {
        "Mixup: 3 mixed examples per step,\none per pair": factors_of(None, 3, generator),
        "MultiMix, effective_examples = 1.5:\n1,000 mixed examples per step": sample_factors(
            3, 1000, alpha_for(1.5, 3), generator=generator
        ),
        "MultiMix, α from U[0.5, 2]:\n1,000 mixed examples per step": sample_factors(
            3, 1000, (0.5, 2.0), generator=generator
        ),
    }
    with saved_figure(path) as figures:
        figure, axes = plt.subplots(1, 3, figsize=(WIDTH, 2.15), layout="constrained")
        for cell, (name, factors) in zip(axes, panels.items(), strict=True):
            weights = factors.T.numpy()
            cell.plot(*corners[[0, 1, 2, 0]].T, color="#bbbbbb", linewidth=0.8, zorder=0)
            size = 70 if weights.shape[0] < 10 else 3
            cell.scatter(*(weights @ corners).T, s=size, c=np.clip(weights @ colors, 0, 1), linewidths=0)
            for i, corner in enumerate(corners):
                center = corner + (corner - corners.mean(axis=0)) * 0.22
                box = (center[0] - 0.11, center[0] + 0.11, center[1] - 0.11, center[1] + 0.11)
                cell.imshow(images[i], cmap="gray", extent=box, interpolation="nearest", zorder=2)
            cell.set(xlim=(-0.32, 1.32), ylim=(-0.25, 1.13), aspect="equal")
            cell.set_title(name)
            cell.axis("off")
        figures.append(figure)


def draw_identity(path: Path, model: ViTForImageClassification, pixels: Tensor) -> None:
    """Plot logits of mixed features against mixed logits, and the sizes of the tensors."""
    with torch.no_grad():
        features = model.vit(pixels).last_hidden_state[:, 0]
        factors = sample_factors(len(pixels), 1000, (0.5, 2.0), generator=torch.Generator().manual_seed(0))
        of_features = model.classifier(factors.T @ features)
        of_logits = factors.T @ model.classifier(features)
    difference = float((of_features - of_logits).abs().max())
    b, r, d, c, n = 32, 196, 384, 100, 1000
    numbers = {"mixed features\nn·r·d": n * r * d, "mixed logits\nn·r·c": n * r * c, "logits\nb·r·c": b * r * c}
    with saved_figure(path) as figures:
        figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 2.6), layout="constrained")
        left.plot(of_logits.flatten(), of_features.flatten(), ".", markersize=1.5, color=COLORS[2])
        left.set_xlabel("mixed logits")
        left.set_ylabel("logits of mixed features")
        left.set_title(f"{of_logits.numel():,} logits: maximum difference {difference:.0e}")
        left.set_aspect("equal")
        right.barh(list(numbers), list(numbers.values()), color=[COLORS[0], COLORS[0], COLORS[1]])
        for i, value in enumerate(numbers.values()):
            right.annotate(f"{value / 1e6:.1f} M", (value, i), (4, 0), textcoords="offset points", va="center")
        right.set_xscale("log")
        right.set_xlim(1e5, 1e9)
        right.invert_yaxis()
        right.set_xlabel("number of elements")
        right.set_title(f"ViT-S/16: b = {b}, r = {r}, d = {d}, c = {c}, n = {n:,}")
        figures.append(figure)


def draw_dense(
    path: Path, images: np.ndarray, labels: Tensor, output: LocationOutput, class_names: Sequence[str]
) -> None:
    """Plot a mixed example with other factors at each patch, and its label at each patch."""
    assert output.attention is not None
    b, r = output.attention.shape
    side, _ = patch_grid(r, *images.shape[1:3])
    patch = images.shape[1] // side
    factors = sample_factors(b, 1, alpha_for(3, b), num_locations=r, generator=torch.Generator().manual_seed(11))
    weights = output.attention.T[:, :, None] * factors
    weights = (weights / weights.sum(dim=1, keepdim=True))[:, :, 0].numpy()  # (r, b)
    mixed = np.zeros(images.shape[1:])
    for j in range(r):
        y, x = (patch * k for k in divmod(j, side))
        mixed[y : y + patch, x : x + patch] = np.tensordot(weights[j], images[:, y : y + patch, x : x + patch], 1)
    colors = [CLASS_COLORS[int(label)] for label in labels]
    with saved_figure(path) as figures:
        figure = plt.figure(figsize=(WIDTH, 4.4), layout="constrained")
        top, bottom = figure.subfigures(2, 1, height_ratios=[1.1, 1.2])
        cells = top.subplots(2, b)
        scale: Any = {"cmap": "inferno", "vmin": 0, "vmax": float(output.attention.max())}
        for i in range(b):
            cells[0, i].imshow(images[i], cmap="gray", interpolation="nearest")
            shown = cells[1, i].imshow(output.attention[i].view(side, side), interpolation="nearest", **scale)
            cells[0, i].set_title(class_names[int(labels[i])], color=colors[i], fontweight="bold")
        cells[0, 0].set_ylabel("examples")
        cells[1, 0].set_ylabel("attention")
        for cell in cells.flat:
            cell.set(xticks=[], yticks=[])
            cell.spines[:].set_visible(False)
        top.colorbar(shown, ax=cells[1].tolist(), label="weight")
        left, right = bottom.subplots(1, 2)
        left.imshow(mixed, cmap="gray", interpolation="nearest")
        left.set_title("mixed example: other factors at each patch\n(shown with pixels; the method mixes features)")
        left.set_xticks([])
        left.set_yticks([])
        right.set_title("label at each patch")
        for j in range(r):
            y, x = divmod(j, side)
            start = 0.0
            for i in range(b):
                width = 0.92 * float(weights[j, i])
                right.barh(y, width, left=x + start, height=0.86, color=colors[i], align="center")
                start += width
        right.set(xlim=(-0.1, side), ylim=(side - 0.4, -0.6), aspect="equal")
        right.axis("off")
        bottom.legend(
            [plt.Rectangle((0, 0), 1, 1, color=color) for color in colors],
            [class_names[int(label)] for label in labels],
            loc="outside right center", title="label",
        )  # fmt: skip
        figures.append(figure)


def train(model: Any, pixels: Tensor, labels: Sequence[int], **arguments: Any) -> Any:
    """Train a model with Dense MultiMix and return it."""
    examples = [{"pixel_values": x, "labels": y} for x, y in zip(pixels, labels, strict=True)]
    with tempfile.TemporaryDirectory() as directory:
        args = TrainingArguments(
            directory, warmup_steps=0.1, save_strategy="no", disable_tqdm=True, logging_strategy="no", **arguments
        )
        trainer = MultiMixTrainer(model, args, mixing=DenseMultiMix(), train_dataset=examples)
        trainer.train()
        trainer.mixing_handle.remove()
    return trainer.model.eval()


def vit_of_digits(data: Dataset, epochs: int) -> ViTForImageClassification:
    """Train a small ViT on digits of 8x8 pixels in 4x4 patches."""
    set_seed(0)
    config = ViTConfig(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128, image_size=8, patch_size=2,
        num_channels=1, initializer_range=0.1, num_labels=10,
    )  # fmt: skip
    return train(
        ViTForImageClassification(config), pixels_of(data), data["label"], num_train_epochs=epochs,
        per_device_train_batch_size=64, learning_rate=2e-3, lr_scheduler_type="cosine",
    )  # fmt: skip


def dinov2_of_clothes(data: Dataset) -> Dinov2ForImageClassification:
    """Fine-tune the last four blocks of DINOv2-small for two epochs on 200 images of Fashion-MNIST."""
    set_seed(0)
    chosen = data.shuffle(seed=0).select(range(200))
    return train(
        partly_frozen_dinov2(FASHION_CLASSES)(), clothes(chosen), chosen["label"], num_train_epochs=2,
        per_device_train_batch_size=32, learning_rate=1e-4,
    )  # fmt: skip


def pixels_of(data: Dataset) -> Tensor:
    """Return images (b, 1, h, w) with values in [-1, 1]."""
    return torch.tensor(np.stack(data["image"]), dtype=torch.float32)[:, None] / 127.5 - 1


def clothes(data: Dataset) -> Tensor:
    """Return images (b, 3, 112, 112), normalized, which DINOv2 divides into 8x8 patches."""
    return to_dinov2_input(pixels_of(data) / 2 + 0.5, side=112)


def first_of(data: Dataset, labels: Sequence[int]) -> Dataset:
    """Return the first example of each label."""
    found = np.array(data["label"])
    return data.select([int(np.flatnonzero(found == label)[0]) for label in labels])


def main() -> None:
    """Plot all figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("docs/images"), help="directory for the figures")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    draw_factors(args.output_dir / "factors.png")
    draw_effective(args.output_dir / "effective.png")
    digits = load_digits()
    draw_simplex(args.output_dir / "simplex.png", np.stack(first_of(digits["test"], (0, 1, 3))["image"]) / 255)
    vit = vit_of_digits(digits["train"], epochs=20)
    draw_identity(args.output_dir / "identity.png", vit, pixels_of(digits["test"].select(range(32))))

    fashion = load_fashion_mnist()
    dinov2 = dinov2_of_clothes(fashion["train"])
    shown = first_of(fashion["test"], [FASHION_CLASSES.index(name) for name in SHOWN])
    images = np.stack(shown["image"]) / 255
    with torch.no_grad():
        output = extract(dinov2, pixel_values=clothes(shown))
    plot_image_attention(images, output.attention, args.output_dir / "attention_image.png", titles=SHOWN)
    larger = images.repeat(4, axis=1).repeat(4, axis=2)  # as large as the model's input, in whole pixels per patch
    draw_dense(args.output_dir / "dense.png", larger, torch.tensor(shown["label"]), output, FASHION_CLASSES)


if __name__ == "__main__":
    main()
