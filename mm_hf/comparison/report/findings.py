"""The results of a comparison in sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...evaluation.metrics.registry import compared_metrics
from ...evaluation.statistics import has_interval
from ..compare import Comparison

FINDINGS_HEADING = "Differences on the test set (significant: the 95 % interval excludes zero):"


def findings(comparison: Comparison) -> list[str]:
    """Return the significant differences from the baseline, one sentence for each method, and what limits them.

    Of a single method, the sentence gives its metrics.
    """
    if len(comparison.runs) == 1:
        sentences = [_single(comparison)]
    else:
        sentences = [_differences(comparison, name) for name in comparison.runs if name != comparison.baseline]
    sentences += [f"{name} was not trained: {error.splitlines()[0]}" for name, error in comparison.failed.items()]
    if len(comparison.runs) > 1 and len(comparison.seeds) == 1:
        sentences.append(
            "With one seed, the intervals cover the choice of test examples, but not the variation between "
            "training runs."
        )
    return sentences


def _single(comparison: Comparison) -> str:
    (name,) = comparison.runs
    means = [(info, comparison.mean(info.name)) for info in compared_metrics()]
    metrics = [f"{info.title} {info.format_mean(mean[name])} {info.unit}".rstrip() for info, mean in means if mean]
    seeds = len(comparison.seeds)
    ranges = f" (mean and range of {seeds} seeds)" if seeds > 1 and not has_interval(seeds) else ""
    return f"{name}: {_enumerate(metrics)}{ranges}."


def _differences(comparison: Comparison, name: str) -> str:
    intervals = {info: comparison.differences[info.name][name] for info in compared_metrics()}
    if any(math.isnan(interval.value) for interval in intervals.values()):
        return f"{name}: not compared, because some metrics are not finite (training may have diverged)."
    changes: dict[str, list[str]] = {"better": [], "worse": []}
    for info, interval in intervals.items():
        if interval.excludes_zero:
            difference = f"{info.format(interval.value, sign=True)} {info.difference_unit}".rstrip()
            side = "better" if info.is_improvement(interval.value) else "worse"
            changes[side].append(f"{info.title} ({difference})")
    sides = [f"{side} {_enumerate(metrics)}" for side, metrics in changes.items() if metrics]
    if not sides:
        return f"{name}: no reliable difference from {comparison.baseline}; use more seeds to detect a smaller one."
    return f"{name} compared with {comparison.baseline}: {'; '.join(sides)}."


def _enumerate(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
