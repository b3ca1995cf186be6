"""The pictures of a comparison, as far as its runs have what they show."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...evaluation.plots import (
    plot_alignment_uniformity,
    plot_corruptions,
    plot_cost,
    plot_differences,
    plot_embeddings,
    plot_ood,
    plot_reliability,
    plot_validation,
)
from ..compare import Comparison
from ..evaluate import SEVERITIES
from ..run import Run
from .render import Picture
from .tables import MAIN, METRICS

MAP_EXAMPLES = 2000
TELLING_MIB = 64


def draw(comparison: Comparison, directory: Path) -> dict[str, Picture]:
    """Draw what there is to show into a directory; the pictures by name, with captions."""
    directory.mkdir(parents=True, exist_ok=True)
    found: dict[str, Picture] = {}
    for name, how in DRAWINGS.items():
        picture = how(comparison, directory / f"{name}.png")
        if picture is not None:
            found[name] = picture
    return found


def _all_have(comparison: Comparison, condition: Callable[[Run], Any]) -> bool:
    return all(condition(run) for runs in comparison.runs.values() for run in runs)


def _first(comparison: Comparison) -> dict[str, dict[str, np.ndarray]]:
    return {name: runs[0].arrays for name, runs in comparison.runs.items()}


def _seed_said(comparison: Comparison) -> str:
    return f" Seed {comparison.seeds[0]}." if len(comparison.runs) > 1 or len(comparison.seeds) > 1 else ""


def _finite(comparison: Comparison) -> bool:
    return all(np.isfinite(run.metrics["nll"]) for runs in comparison.runs.values() for run in runs)


def _differences(comparison: Comparison, path: Path) -> Picture | None:
    if not comparison.differences or not _finite(comparison):
        return None
    named = {METRICS[m].title: comparison.differences[m] for m in MAIN}
    assert comparison.baseline is not None
    plot_differences(
        named,
        path,
        baseline=comparison.baseline,
        better={METRICS[m].title: METRICS[m].better for m in MAIN},
        scales={METRICS[m].title: METRICS[m].scale for m in MAIN},
    )
    return Picture(
        path,
        f"Differences from {comparison.baseline} with 95 % intervals",
        f"Difference of each method from {comparison.baseline}, with its 95 % interval. Filled: the interval excludes zero. "
        "Differences in percent are percentage points.",
    )


def _training(comparison: Comparison, path: Path) -> Picture | None:
    if not _all_have(comparison, lambda run: any("eval_nll" in entry for entry in run.history)):
        return None
    plot_validation({name: [run.history for run in runs] for name, runs in comparison.runs.items()}, path)
    lines = "Thin lines are seeds, thick ones their mean." if len(comparison.seeds) > 1 else "One seed."
    return Picture(path, "Training curves", f"Validation NLL and accuracy during training. {lines}")


def _reliability(comparison: Comparison, path: Path) -> Picture | None:
    if not _finite(comparison):
        return None
    arrays = {name: [run.arrays for run in runs] for name, runs in comparison.runs.items()}
    pooled = {
        name: (np.concatenate([a["logits"] for a in each]), np.concatenate([a["labels"] for a in each]))
        for name, each in arrays.items()
    }
    plot_reliability(pooled, path)
    many = len(comparison.seeds) > 1
    return Picture(
        path,
        "Reliability diagrams",
        "How often predictions of some confidence are right. Bars above the diagonal: less sure than right; below: surer "
        "than right."
        + (" Predictions of all seeds together, whose calibration error is not the mean of those of the seeds." if many else ""),
        narrow=len(pooled) == 1,
    )  # fmt: skip


def _corruptions(comparison: Comparison, path: Path) -> Picture | None:
    if not _all_have(comparison, lambda run: run.corruptions):
        return None
    curves = {name: [run.corruptions for run in runs] for name, runs in comparison.runs.items()}
    plot_corruptions(curves, path, severities=SEVERITIES)
    return Picture(
        path, "Accuracy against severity of corruptions",
        "Accuracy on corrupted test images; severity 0 is the image as it is. The corruptions are those of "
        "`mm_hf.evaluation.metrics.corrupt`, and not comparable with ImageNet-C's.",
    )  # fmt: skip


def _ood(comparison: Comparison, path: Path) -> Picture | None:
    if not _all_have(comparison, lambda run: "ood_auroc" in run.metrics) or not _finite(comparison):
        return None
    arrays = _first(comparison)
    plot_ood({name: (a["logits"], a["ood_logits"]) for name, a in arrays.items()}, path)
    return Picture(
        path, "Scores of known and unknown classes",
        "The probability of the most probable class, for test examples of the known classes and for unknown ones."
        + _seed_said(comparison),
        narrow=len(arrays) == 1,
    )  # fmt: skip


def _embeddings(comparison: Comparison, path: Path) -> Picture | None:
    arrays = _first(comparison)
    if not all("features" in a and len(a["labels"]) >= 5 and a["features"].shape[1] > 1 for a in arrays.values()):
        return None
    n = len(next(iter(arrays.values()))["labels"])
    chosen = np.sort(np.random.default_rng(0).permutation(n)[:MAP_EXAMPLES])
    names = comparison.class_names
    plot_embeddings(
        {name: (a["features"][chosen], a["labels"][chosen]) for name, a in arrays.items()},
        path,
        class_names=names,
    )
    some = f"{MAP_EXAMPLES:,} of the test examples" if n > MAP_EXAMPLES else "The test examples"
    return Picture(
        path, "Maps of the test examples",
        f"{some} as the last layer sees them, by t-SNE: near points are alike; distances between far groups and their sizes "
        "mean nothing." + _seed_said(comparison),
        narrow=len(arrays) == 1,
    )  # fmt: skip


def _plane(comparison: Comparison, path: Path) -> Picture | None:
    if not _all_have(comparison, lambda run: "alignment" in run.metrics) or len(comparison.runs) < 2:
        return None
    plot_alignment_uniformity(
        {n: [(r.metrics["alignment"], r.metrics["uniformity"]) for r in runs] for n, runs in comparison.runs.items()},
        path,
    )
    return Picture(
        path, "Plane of alignment and uniformity",
        "Alignment: how close examples of a class are; uniformity: how evenly all fill the sphere. Small points are seeds.",
        narrow=True,
    )  # fmt: skip


def _cost(comparison: Comparison, path: Path) -> Picture | None:
    if comparison.baseline is None or len(comparison.runs) < 2:
        return None
    kinds = {"training time": ("train_seconds", "s"), "peak memory": ("peak_memory_mib", "MiB")}
    costs: dict[str, dict[str, list[float]]] = {}
    for kind, (metric, _) in kinds.items():
        values = comparison.values(metric)
        # A small model's memory is less than what the allocator takes and gives back by chance.
        least = 0.0 if kind != "peak memory" or torch.cuda.is_available() else TELLING_MIB
        if len(values) == len(comparison.runs) and values[comparison.baseline].mean() > least:
            costs[kind] = {name: list(v) for name, v in values.items()}
    if not costs:
        return None
    plot_cost(costs, path, baseline=comparison.baseline, units={kind: unit for kind, (_, unit) in kinds.items()})
    return Picture(
        path, "Cost relative to the baseline",
        f"{' and '.join(costs).capitalize()} of each method relative to {comparison.baseline}; points are seeds.",
        narrow=len(costs) == 1,
    )  # fmt: skip


DRAWINGS: dict[str, Callable[[Comparison, Path], Picture | None]] = {
    "differences": _differences,
    "reliability": _reliability,
    "corruptions": _corruptions,
    "ood": _ood,
    "embeddings": _embeddings,
    "alignment_uniformity": _plane,
    "cost": _cost,
    "training": _training,
}
