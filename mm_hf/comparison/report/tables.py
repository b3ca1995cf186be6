"""Names, units and directions of the figures, and cells of tables."""

from __future__ import annotations

from dataclasses import dataclass

from ...evaluation.statistics import Interval

MINUS = "\u2212"  # as wide as a plus


@dataclass(frozen=True)
class Metric:
    """How a figure is shown.

    Attributes:
        title: Name and unit.
        scale: What the figure is multiplied with.
        digits: Behind the decimal point.
        better: "higher", "lower" or "" where neither is.
    """

    title: str
    scale: float = 1
    digits: int = 3
    better: str = ""

    @property
    def heading(self) -> str:
        """Name, unit and an arrow to the better side."""
        return self.title + {"higher": "\u00a0↑", "lower": "\u00a0↓", "": ""}[self.better]

    @property
    def noun(self) -> str:
        """The name within a sentence, without a unit."""
        name = self.title.partition(" (")[0]
        return name if name[:2].isupper() or name.startswith("Brier") else name[:1].lower() + name[1:]

    @property
    def unit(self) -> str:
        """The unit behind a number, with a space."""
        _, opened, unit = self.title.partition(" (")
        return f" {unit.rstrip(')')}" if opened else ""

    @property
    def points(self) -> str:
        """The unit behind a difference: a difference of shares is in percentage points."""
        return " points" if self.unit == " %" else self.unit

    def number(self, value: float, sign: bool = False) -> str:
        """A figure in this unit."""
        text = f"{self.scale * value:{'+' if sign else ''},.{self.digits}f}"
        return text.replace("-", MINUS) if float(text.replace(",", "")) else text.replace("-", "").replace("+", "")

    def mean(self, interval: Interval) -> str:
        """A mean and half of its interval."""
        if interval.low != interval.low:
            return self.number(interval.value)
        return f"{self.number(interval.value)} ± {self.number((interval.high - interval.low) / 2)}"

    def difference(self, interval: Interval) -> str:
        """A difference and its interval."""
        low, high = self.number(interval.low, sign=True), self.number(interval.high, sign=True)
        return f"{self.number(interval.value, sign=True)} [{low}, {high}]"

    def helps(self, interval: Interval) -> bool:
        """Whether a difference is to the better side."""
        return interval.value > 0 if self.better == "higher" else interval.value < 0


METRICS = {
    "accuracy": Metric("Accuracy (%)", 100, 2, "higher"),
    "nll": Metric("NLL (nats)", 1, 3, "lower"),
    "brier": Metric("Brier score", 1, 3, "lower"),
    "calibration_error": Metric("Calibration error (%)", 100, 2, "lower"),
    "macro_f1": Metric("Macro F1 (%)", 100, 2, "higher"),
    "fgsm_accuracy": Metric("FGSM accuracy (%)", 100, 1, "higher"),
    "corruption_accuracy": Metric("Corrupted accuracy (%)", 100, 1, "higher"),
    "ood_auroc": Metric("AUROC, softmax (%)", 100, 1, "higher"),
    "ood_fpr95": Metric("FPR95, softmax (%)", 100, 1, "lower"),
    "ood_energy_auroc": Metric("AUROC, energy (%)", 100, 1, "higher"),
    "ood_energy_fpr95": Metric("FPR95, energy (%)", 100, 1, "lower"),
    "alignment": Metric("Alignment", 1, 3, "lower"),
    "uniformity": Metric("Uniformity", 1, 3, "lower"),
    "intra_class_distance": Metric("Distance within classes", 1, 3),
    "inter_class_distance": Metric("Distance between classes", 1, 3),
    "class_spread": Metric("Class spread", 1, 3, "lower"),
    "train_seconds": Metric("Training (s)", 1, 1, "lower"),
    "peak_memory_mib": Metric("Peak memory (MiB)", 1, 0, "lower"),
    "loss_terms_per_step": Metric("Loss terms a step", 1, 0),
}
MAIN = ("accuracy", "nll", "brier", "calibration_error")
GROUPS = {
    "robustness": ("fgsm_accuracy", "corruption_accuracy"),
    "ood": ("ood_auroc", "ood_fpr95", "ood_energy_auroc", "ood_energy_fpr95"),
    "representation": ("alignment", "uniformity", "intra_class_distance", "inter_class_distance", "class_spread"),
    "cost": ("train_seconds", "peak_memory_mib", "loss_terms_per_step"),
}
