"""Figures of a report, drawn for the metrics that all runs of a comparison have."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import softmax

from ...evaluation.metrics.registry import METRICS, compared_metrics
from ...evaluation.plots import (
    Mistake,
    plot_alignment_uniformity,
    plot_confusion,
    plot_corruptions,
    plot_cost,
    plot_differences,
    plot_embeddings,
    plot_mistakes,
    plot_ood,
    plot_reliability,
    plot_validation,
)
from ..compare import Comparison
from ..evaluate import SEVERITIES
from ..record import Run
from .tables import confusion_counts

EMBEDDED_EXAMPLES = 2000
MISTAKES = 8  # of each method
MIN_PEAK_MEMORY_MIB = 64


@dataclass(frozen=True)
class Figure:
    """An image file of a report.

    Args:
        file: The image.
        alt: Short description, for readers that do not display images.
        caption: What the figure shows.
        narrow: Display it at half of the page's width.
    """

    file: Path
    alt: str
    caption: str
    narrow: bool = False

    @property
    def base64(self) -> str:
        """The content of the image file in base64."""
        return base64.b64encode(self.file.read_bytes()).decode()

    @property
    def link(self) -> str:
        """The path of the image, relative to the directory of the report."""
        return f"{self.file.parent.name}/{self.file.name}"


def draw_figures(comparison: Comparison, directory: Path) -> dict[str, Figure]:
    """Draw all figures that the runs have the values for.

    Args:
        comparison: The finished runs.
        directory: The output directory of the images. It is created if it does not exist.

    Returns:
        The figures by name.
    """
    directory.mkdir(parents=True, exist_ok=True)
    figures = {name: draw(comparison, directory / f"{name}.png") for name, draw in _FIGURES.items()}
    return {name: figure for name, figure in figures.items() if figure is not None}


def _differences(comparison: Comparison, path: Path) -> Figure | None:
    if comparison.baseline is None or not comparison.differences or not _all_finite(comparison):
        return None
    metrics = {info.heading.partition("\u00a0")[0]: info for info in compared_metrics()}
    plot_differences(
        {title: comparison.differences[info.name] for title, info in metrics.items()},
        path,
        baseline=comparison.baseline,
        better={title: info.better for title, info in metrics.items()},
        scales={title: info.scale for title, info in metrics.items()},
    )
    return Figure(
        path,
        f"Differences from {comparison.baseline} with 95 % intervals",
        f"Difference of each method from {comparison.baseline} with its 95 % interval. Filled markers: the interval "
        "excludes zero. Differences of percentages are in percentage points.",
    )


def _reliability(comparison: Comparison, path: Path) -> Figure | None:
    if not _all_finite(comparison):
        return None
    pooled = {}
    for name, runs in comparison.runs.items():
        arrays = [run.arrays for run in runs]
        pooled[name] = (np.concatenate([a["logits"] for a in arrays]), np.concatenate([a["labels"] for a in arrays]))
    plot_reliability(pooled, path)
    caption = (
        "Accuracy of the predictions by confidence. Bars above the diagonal: underconfident; below: overconfident."
    )
    if len(comparison.seeds) > 1:
        caption += " The predictions of all seeds are pooled; their calibration error is not the mean over seeds."
    return Figure(path, "Reliability diagrams", caption, narrow=len(pooled) == 1)


def _confusion(comparison: Comparison, path: Path) -> Figure | None:
    if not _all_finite(comparison):
        return None
    matrices = {name: confusion_counts(comparison, name) for name in comparison.trained}
    plot_confusion(matrices, path, class_names=_names(comparison, len(next(iter(matrices.values())))))
    pooled = " The predictions of all seeds are pooled." if len(comparison.seeds) > 1 else ""
    return Figure(
        path,
        "Confusion matrices",
        f"Share of the test examples of each class (row) that are predicted as each class (column), in %.{pooled}",
        narrow=len(matrices) == 1,
    )


def _mistakes(comparison: Comparison, path: Path) -> Figure | None:
    if comparison.test_image is None or not _all_finite(comparison):
        return None
    mistakes = {name: _worst(comparison, arrays) for name, arrays in _arrays_of_first_seed(comparison).items()}
    if not any(mistakes.values()):
        return None
    plot_mistakes(mistakes, path)
    return Figure(
        path,
        "Misclassified test images",
        "Misclassified test images with the highest probability of the predicted class: class, predicted class and its "
        f"probability. Some may have a wrong label.{_seed(comparison)}",
    )


def _worst(comparison: Comparison, arrays: dict[str, np.ndarray]) -> list[Mistake]:
    """Return the mistakes of one run with the most confidence."""
    assert comparison.test_image is not None
    probabilities = softmax(arrays["logits"].astype(np.float64), axis=1)
    predictions, labels = probabilities.argmax(axis=1), arrays["labels"]
    names = _names(comparison, probabilities.shape[1]) or [str(i) for i in range(probabilities.shape[1])]
    wrong = np.flatnonzero((predictions != labels) & (labels >= 0))
    order = wrong[np.argsort(-probabilities[wrong, predictions[wrong]], kind="stable")][:MISTAKES]
    return [
        Mistake(
            names[labels[i]], names[predictions[i]], float(probabilities[i, predictions[i]]), comparison.test_image(i)
        )
        for i in order.tolist()
    ]


def _names(comparison: Comparison, classes: int) -> Sequence[str] | None:
    """Return the names of the classes, if there is one for each."""
    names = comparison.class_names
    return names if names is not None and len(names) == classes else None


def _corruptions(comparison: Comparison, path: Path) -> Figure | None:
    if not _all_have(comparison, lambda run: run.corruptions):
        return None
    curves = {name: [run.corruptions for run in runs] for name, runs in comparison.trained.items()}
    plot_corruptions(curves, path, severities=SEVERITIES)
    return Figure(
        path,
        "Accuracy against severity of corruptions",
        "Accuracy on corrupted test images; severity 0 is the original image. The corruptions are those of "
        "mm_hf.evaluation.metrics.corrupt; the values are not comparable with ImageNet-C.",
    )


def _ood(comparison: Comparison, path: Path) -> Figure | None:
    if not _all_have(comparison, lambda run: "ood_auroc" in run.metrics) or not _all_finite(comparison):
        return None
    arrays = _arrays_of_first_seed(comparison)
    plot_ood({name: (a["logits"], a["ood_logits"]) for name, a in arrays.items()}, path)
    return Figure(
        path,
        "Confidence on known and unknown classes",
        "Maximum softmax probability of test examples of known classes and of examples of unknown classes."
        + _seed(comparison),
        narrow=len(arrays) == 1,
    )


def _embeddings(comparison: Comparison, path: Path) -> Figure | None:
    arrays = _arrays_of_first_seed(comparison)
    if not all("features" in a and len(a["labels"]) >= 5 and a["features"].shape[1] > 1 for a in arrays.values()):
        return None
    examples = len(next(iter(arrays.values()))["labels"])
    chosen = np.sort(np.random.default_rng(0).permutation(examples)[:EMBEDDED_EXAMPLES])
    plot_embeddings(
        {name: (a["features"][chosen], a["labels"][chosen]) for name, a in arrays.items()},
        path,
        class_names=comparison.class_names,
    )
    subset = f"{EMBEDDED_EXAMPLES:,} of the test examples" if examples > EMBEDDED_EXAMPLES else "Test examples"
    return Figure(
        path,
        "Test examples in the embedding space",
        f"{subset} in the embedding space (inputs of the last layer), projected by t-SNE. Neighbors are similar; "
        f"distances between groups and the sizes of groups have no meaning.{_seed(comparison)}",
        narrow=len(arrays) == 1,
    )


def _alignment_uniformity(comparison: Comparison, path: Path) -> Figure | None:
    if not _all_have(comparison, lambda run: "alignment" in run.metrics) or len(comparison.trained) < 2:
        return None
    plot_alignment_uniformity(
        {
            n: [(r.metrics["alignment"], r.metrics["uniformity"]) for r in runs]
            for n, runs in comparison.trained.items()
        },
        path,
    )
    return Figure(
        path,
        "Alignment and uniformity",
        "Alignment: mean squared distance between examples of the same class. Uniformity: how evenly the examples "
        "cover the sphere. Lower is better for both. Small points: seeds.",
        narrow=True,
    )


def _cost(comparison: Comparison, path: Path) -> Figure | None:
    if comparison.baseline is None or len(comparison.trained) < 2:
        return None
    costs: dict[str, dict[str, list[float]]] = {}
    # On a CPU, the growth of a small model's process is dominated by what the allocator happens to reuse.
    least = {"train_seconds": 0.0, "peak_memory_mib": 0.0 if torch.cuda.is_available() else MIN_PEAK_MEMORY_MIB}
    for metric, minimum in least.items():
        values = {name: of for name, of in comparison.values(metric).items() if name in comparison.trained}
        if len(values) == len(comparison.trained) and values[comparison.baseline].mean() > minimum:
            costs[METRICS[metric].title] = {name: list(v) for name, v in values.items()}
    if not costs:
        return None
    units = {METRICS[metric].title: METRICS[metric].unit for metric in least}
    plot_cost(costs, path, baseline=comparison.baseline, units=units)
    return Figure(
        path,
        "Cost relative to the baseline",
        f"{' and '.join(costs).capitalize()} of each method relative to {comparison.baseline}. Points: seeds.",
        narrow=len(costs) == 1,
    )


def _training(comparison: Comparison, path: Path) -> Figure | None:
    if not _all_have(comparison, lambda run: any("eval_nll" in entry for entry in run.history)):
        return None
    plot_validation({name: [run.history for run in runs] for name, runs in comparison.trained.items()}, path)
    lines = "Thin lines: seeds; thick lines: their mean." if len(comparison.seeds) > 1 else "One seed."
    return Figure(path, "Training curves", f"Validation NLL and accuracy during training. {lines}")


def _all_have(comparison: Comparison, condition: Callable[[Run], Any]) -> bool:
    """Return True if all runs that were trained meet a condition."""
    return all(condition(run) for runs in comparison.trained.values() for run in runs)


def _all_finite(comparison: Comparison) -> bool:
    return _all_have(comparison, lambda run: np.isfinite(run.metrics["nll"]))


def _arrays_of_first_seed(comparison: Comparison) -> dict[str, dict[str, np.ndarray]]:
    return {name: runs[0].arrays for name, runs in comparison.trained.items()}


def _seed(comparison: Comparison) -> str:
    return f" Seed {comparison.seeds[0]}." if len(comparison.runs) > 1 or len(comparison.seeds) > 1 else ""


_FIGURES: dict[str, Callable[[Comparison, Path], Figure | None]] = {
    "differences": _differences,
    "reliability": _reliability,
    "confusion": _confusion,
    "mistakes": _mistakes,
    "corruptions": _corruptions,
    "ood": _ood,
    "embeddings": _embeddings,
    "alignment_uniformity": _alignment_uniformity,
    "cost": _cost,
    "training": _training,
}
