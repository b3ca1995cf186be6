"""Registry of metrics: names, units, formats and directions, and the function that computes each of them.

Whatever computes, titles, formats or orders metrics reads this registry: `classification_metrics`, `mm-hf train`,
`mm-hf compare` and `mm-hf analyze`, their reports and progress lines, model cards and plots. To add a metric, write a
function and add one entry to [`METRICS`]; from outside of this package, call [`register_metric`].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from ..statistics import ExampleStatistic, Interval, Range
from . import classification, ood, representation

Group = Literal["classification", "robustness", "ood", "representation", "cost", "task"]
MINUS = "\u2212"  # as wide as a plus sign


@dataclass(frozen=True)
class MetricInfo:
    """Name, format and direction of a metric, and how to compute it.

    Args:
        name: Key in dictionaries of metrics, for example in `trainer.evaluate()` after the prefix `eval_`.
        title: Name within a sentence, without the unit: "calibration error".
        unit: Unit of displayed values, "%" or "nats"; empty for a number without one.
        scale: Factor from stored to displayed values, 100 for a share that is displayed in percent.
        digits: Number of displayed digits after the decimal point.
        better: "higher", "lower", or "" for a metric without a better direction.
        statistic: Per-example scores and their reduction, for bootstrap intervals of differences between methods. None
            for a metric that is compared by its mean only.
        group: Section of a report, which determines the arguments of `compute`.
        compute: Function of logits and labels (group "classification"), of the logits of examples of known and of
            unknown classes ("ood"), or of features and labels ("representation"). It returns a number, or a dictionary
            of numbers if several entries share it. None for metrics that are measured while a model trains or runs.
        packages: Optional packages that `compute` imports, by the names of the imports.

    Raises:
        ValueError: `better` or `group` is unknown.

    Example:
        >>> info = MetricInfo("top2", "top-2 accuracy", unit="%", scale=100, digits=1, better="higher")
        >>> info.heading, info.with_unit(0.875)
        ('Top-2 accuracy (%)\\xa0↑', '87.5 %')
    """

    name: str
    title: str
    unit: str = ""
    scale: float = 1
    digits: int = 3
    better: Literal["higher", "lower", ""] = ""
    statistic: ExampleStatistic | None = None
    group: Group = "classification"
    compute: Callable[[Any, Any], float | Mapping[str, float]] | None = None
    packages: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.better not in ("higher", "lower", ""):
            raise ValueError(f"better must be 'higher', 'lower' or '', got {self.better!r} for {self.name!r}.")
        if self.group not in Group.__args__:  # type: ignore[attr-defined]
            groups = ", ".join(Group.__args__)  # type: ignore[attr-defined]
            raise ValueError(f"group must be one of {groups}, got {self.group!r} for {self.name!r}.")

    @property
    def label(self) -> str:
        """The title with the unit, for axes: "accuracy (%)"."""
        return f"{self.title} ({self.unit})" if self.unit else self.title

    @property
    def heading(self) -> str:
        """The label with a capital letter and an arrow to the better side, for columns of tables."""
        return self.label[0].upper() + self.label[1:] + {"higher": "\u00a0↑", "lower": "\u00a0↓", "": ""}[self.better]

    @property
    def difference_unit(self) -> str:
        """The unit of a difference: percentage points for a share."""
        return "points" if self.unit == "%" else self.unit

    def format(self, value: float, sign: bool = False) -> str:
        """Return a stored value as displayed, without its unit.

        Args:
            value: The value, before scaling.
            sign: Write a plus sign before positive numbers.
        """
        text = f"{self.scale * value:{'+' if sign else ''},.{self.digits}f}"
        return text.replace("-", MINUS) if float(text.replace(",", "")) else text.replace("-", "").replace("+", "")

    def with_unit(self, value: float) -> str:
        """Return a stored value as displayed, followed by its unit."""
        return f"{self.format(value)} {self.unit}".rstrip()

    def format_mean(self, interval: Interval) -> str:
        """Return a mean and half the width of its interval, or the ends of its range; the mean alone without both."""
        if interval.low != interval.low:
            return self.format(interval.value)
        if isinstance(interval, Range):
            return f"{self.format(interval.value)} ({self.format(interval.low)} to {self.format(interval.high)})"
        return f"{self.format(interval.value)} ± {self.format((interval.high - interval.low) / 2)}"

    def format_difference(self, interval: Interval) -> str:
        """Return a difference, with its sign, and the ends of its interval."""
        low, high = self.format(interval.low, sign=True), self.format(interval.high, sign=True)
        return f"{self.format(interval.value, sign=True)} [{low}, {high}]"

    def is_improvement(self, difference: float) -> bool:
        """Return True if a difference points to the better side."""
        return difference > 0 if self.better == "higher" else difference < 0


def _ood(score: str, prefix: str, known: Any, unknown: Any) -> dict[str, float]:
    return {f"{prefix}_{name}": value for name, value in ood.ood_metrics(known, unknown, score).items()}


_SOFTMAX, _ENERGY = partial(_ood, "max_softmax", "ood"), partial(_ood, "energy", "ood_energy")
_SPREAD, _OOD = representation.class_spread, ("scipy",)

METRICS: dict[str, MetricInfo] = {
    info.name: info
    for info in (
        MetricInfo(
            "accuracy", "accuracy", "%", 100, 2, "higher", classification.ACCURACY, compute=classification.accuracy
        ),
        MetricInfo(
            "nll", "NLL", "nats", 1, 3, "lower", classification.NLL, compute=classification.negative_log_likelihood
        ),
        MetricInfo("brier", "Brier score", "", 1, 3, "lower", classification.BRIER, compute=classification.brier_score),
        MetricInfo(
            "calibration_error", "calibration error", "%", 100, 2, "lower", classification.CALIBRATION,
            compute=classification.calibration_error,
        ),
        MetricInfo(
            "macro_f1", "macro F1", "%", 100, 2, "higher", compute=classification.macro_f1, packages=("sklearn",)
        ),
        MetricInfo(
            "balanced_accuracy", "balanced accuracy", "%", 100, 2, "higher", compute=classification.balanced_accuracy,
            packages=("sklearn",),
        ),
        MetricInfo("fgsm_accuracy", "FGSM accuracy", "%", 100, 1, "higher", group="robustness"),
        MetricInfo("corruption_accuracy", "corrupted accuracy", "%", 100, 1, "higher", group="robustness"),
        MetricInfo("ood_auroc", "AUROC, softmax", "%", 100, 1, "higher", group="ood", compute=_SOFTMAX, packages=_OOD),
        MetricInfo("ood_fpr95", "FPR95, softmax", "%", 100, 1, "lower", group="ood", compute=_SOFTMAX, packages=_OOD),
        MetricInfo(
            "ood_energy_auroc", "AUROC, energy", "%", 100, 1, "higher", group="ood", compute=_ENERGY, packages=_OOD
        ),
        MetricInfo(
            "ood_energy_fpr95", "FPR95, energy", "%", 100, 1, "lower", group="ood", compute=_ENERGY, packages=_OOD
        ),
        MetricInfo(
            "alignment", "alignment", better="lower", group="representation", compute=representation.alignment
        ),
        MetricInfo(
            "uniformity", "uniformity", better="lower", group="representation",
            compute=lambda features, labels: representation.uniformity(features),
        ),
        MetricInfo("intra_class_distance", "distance within classes", group="representation", compute=_SPREAD),
        MetricInfo("inter_class_distance", "distance between classes", group="representation", compute=_SPREAD),
        MetricInfo("class_spread", "class spread", better="lower", group="representation", compute=_SPREAD),
        MetricInfo("train_seconds", "training time", "s", 1, 1, "lower", group="cost"),
        MetricInfo("peak_memory_mib", "peak memory", "MiB", 1, 0, "lower", group="cost"),
        MetricInfo("loss_terms_per_step", "loss terms per step", "", 1, 0, group="cost"),
        # Metrics of tasks that the example scripts compute themselves.
        MetricInfo("f1", "F1", "%", 100, 2, "higher", group="task"),
        MetricInfo("precision", "precision", "%", 100, 2, "higher", group="task"),
        MetricInfo("recall", "recall", "%", 100, 2, "higher", group="task"),
        MetricInfo("micro_f1", "micro F1", "%", 100, 2, "higher", group="task"),
        MetricInfo("subset_accuracy", "subset accuracy", "%", 100, 2, "higher", group="task"),
        MetricInfo("matthews_correlation", "Matthews correlation", better="higher", group="task"),
        MetricInfo("mse", "mean squared error", better="lower", group="task"),
        MetricInfo("pearson", "Pearson correlation", better="higher", group="task"),
        MetricInfo("spearman", "Spearman correlation", better="higher", group="task"),
        MetricInfo("mean_iou", "mean IoU", "%", 100, 2, "higher", group="task"),
        MetricInfo("mean_accuracy", "mean accuracy", "%", 100, 2, "higher", group="task"),
        MetricInfo("overall_accuracy", "pixel accuracy", "%", 100, 2, "higher", group="task"),
    )
}  # fmt: skip


def register_metric(info: MetricInfo) -> MetricInfo:
    """Add a metric to the registry; reports, cards and progress lines then contain it.

    Args:
        info: The metric. Its name must be new.

    Returns:
        `info`.

    Raises:
        ValueError: A metric with this name is already registered.

    Example:
        >>> from mm_hf.evaluation.metrics.registry import METRICS, MetricInfo, get_metric, register_metric
        >>> info = register_metric(MetricInfo("zero", "zero", compute=lambda logits, labels: 0.0))
        >>> get_metric("zero").title
        'zero'
        >>> del METRICS["zero"]
    """
    if info.name in METRICS:
        raise ValueError(f"The metric {info.name!r} is already registered: choose another name.")
    METRICS[info.name] = info
    return info


def get_metric(name: str) -> MetricInfo:
    """Return the entry of a metric; for an unregistered one, an entry that displays its name and plain number.

    Args:
        name: Key in a dictionary of metrics, without a prefix such as `eval_`.

    Example:
        >>> get_metric("nll").label, get_metric("iou_sky").label
        ('NLL (nats)', 'iou sky')
    """
    return METRICS.get(name) or MetricInfo(name, name.replace("_", " "), digits=4, group="task")


def metrics_of(group: Group) -> list[MetricInfo]:
    """Return the registered metrics of a group, in order.

    Example:
        >>> [info.name for info in metrics_of("robustness")]
        ['fgsm_accuracy', 'corruption_accuracy']
    """
    return [info for info in METRICS.values() if info.group == group]


def compared_metrics() -> list[MetricInfo]:
    """Return the metrics with a per-example statistic: those whose differences between methods have intervals.

    Example:
        >>> [info.name for info in compared_metrics()]
        ['accuracy', 'nll', 'brier', 'calibration_error']
    """
    return [info for info in METRICS.values() if info.statistic is not None]
