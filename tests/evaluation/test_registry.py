"""One entry of the registry adds a metric to results, reports, commands, model cards and progress lines."""

import contextlib
import csv
import io
import sys

import evaluate
import numpy as np
import pytest
from rich.console import Console

from mm_hf import ERM
from mm_hf.cli import main
from mm_hf.cli._progress import ProgressTable
from mm_hf.comparison import Run, Task
from mm_hf.evaluation.metrics import (
    METRICS,
    MetricInfo,
    compute_metrics,
    get_metric,
    load_metric,
    metrics_of,
    register_metric,
)
from mm_hf.evaluation.metrics.base import vectors_and_labels
from mm_hf.evaluation.statistics import ExampleStatistic, Interval, Range
from tests.helpers.commands import OPTIONS


def in_top2(log_probabilities, labels):
    return (np.argsort(log_probabilities, axis=1)[:, -2:] == labels[:, None]).any(axis=1).astype(float)


def top2_accuracy(logits, labels):
    x, y = vectors_and_labels(logits, labels)
    return float(in_top2(x.numpy(), y.numpy()).mean())


@pytest.fixture
def top2():
    """Register a metric for the duration of a test."""
    info = register_metric(
        MetricInfo(
            "top2", "top-2 accuracy", "%", 100, 1, "higher", statistic=ExampleStatistic(in_top2), compute=top2_accuracy
        )
    )
    yield info
    del METRICS["top2"]


def test_new_metric_appears_in_all_outputs(top2, tmp_path, capsys):
    compared, analyzed, trained = tmp_path / "compared", tmp_path / "analyzed", tmp_path / "trained"
    assert main(["compare", *OPTIONS, "--seeds", "1", "--methods", "erm", "mixup", "--output_dir", str(compared)]) == 0
    output = capsys.readouterr().out
    assert "top-2 accuracy" in next(line for line in output.splitlines() if line.startswith("erm, seed 0: "))
    with (compared / "results.csv").open() as file:
        values = {row["method"]: float(row["value"]) for row in csv.DictReader(file) if row["metric"] == "top2"}
    report = (compared / "report.html").read_text()
    assert report.count("Top-2 accuracy (%)") == 2  # means and differences
    assert (compared / "report.md").read_text().count("Top-2 accuracy (%)") == 2
    assert top2.format(values["erm"]) in report
    assert f"{top2.format(values['mixup'] - values['erm'], sign=True)} [" in report

    (model,) = compared.glob("runs/erm/*/model")
    options = [*OPTIONS[:2], "--max_test_samples", "80", "--use_cpu", "--robustness_samples", "0"]
    assert main(["analyze", str(model), *options, "--output_dir", str(analyzed)]) == 0
    assert f"top-2 accuracy: {top2.with_unit(values['erm'])}" in capsys.readouterr().out
    assert "Top-2 accuracy (%)" in (analyzed / "report.md").read_text()

    training = [option for option in OPTIONS if option not in ("--robustness_samples", "20")]
    assert main(["train", *training, "--mixing", "erm", "--output_dir", str(trained)]) == 0
    assert "top-2 accuracy" in capsys.readouterr().out
    assert "top2" in (trained / "README.md").read_text()


def test_new_metric_appears_in_the_progress_table(top2, tmp_path):
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    run = Run("erm", 0, {"accuracy": 0.9, "top2": 0.95, "train_seconds": 2.0}, {}, [], [], "", tmp_path)
    with ProgressTable(["erm"], [0], console) as table:
        table.finish(run)
    assert "accuracy 90.00 %, top-2 accuracy 95.0 %, 2.0 s (1 of 1 runs)" in console.file.getvalue()


def test_new_metric_loads_as_an_evaluate_metric(top2):
    metric = load_metric("top2")
    assert isinstance(metric, evaluate.Metric)
    logits, labels = [[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]], [1, 2]
    assert metric.compute(predictions=logits, references=labels) == {"top2": 0.5}
    same_class = {"predictions": [[1.0, 0.0], [0.0, 1.0]], "references": [0, 0]}
    assert load_metric("alignment").compute(**same_class) == {"alignment": 2.0}  # class_spread would raise an error
    assert load_metric("classification").compute(predictions=logits, references=labels)["top2"] == 0.5


@pytest.mark.parametrize("name", ["macro_f1", "balanced_accuracy"])
def test_metrics_without_a_statistic_are_entries_only(name):
    assert METRICS[name] in metrics_of("classification") and METRICS[name].statistic is None


def block(monkeypatch, package):
    """Make imports of a package fail, as if it were not installed."""
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)


@pytest.mark.parametrize("package", ["sklearn", "scipy", "kornia", "matplotlib", "psutil", "rich", "torchmetrics"])
def test_metrics_name_the_packages_that_they_import(package, monkeypatch):
    logits, labels = np.random.default_rng(0).normal(size=(12, 3)), np.arange(12) % 3
    block(monkeypatch, package)
    for info in METRICS.values():
        if info.compute is None or (package == "scipy" and "sklearn" in info.packages):  # which requires it
            continue
        arguments = (logits, logits + 1) if info.group == "ood" else (logits, labels)
        with pytest.raises(ImportError) if package in info.packages else contextlib.nullcontext():
            info.compute(*arguments)


def test_missing_packages_of_metrics_are_an_error_before_their_use(monkeypatch):
    task = Task("noise", lambda: pytest.fail("a model was made"), [0], [0])
    block(monkeypatch, "sklearn")
    for name in ("classification", "macro_f1"):
        with pytest.raises(ImportError, match="sklearn"):
            load_metric(name)
    assert load_metric("nll").compute(predictions=[[0.0, 0.0]], references=[0])["nll"] == pytest.approx(np.log(2))
    with pytest.raises(ImportError, match="sklearn"):
        task.trainer(task.arguments("unused", 0), ERM())


def test_values_are_formatted_by_their_entry():
    accuracy, memory = get_metric("accuracy"), get_metric("peak_memory_mib")
    assert (accuracy.heading, accuracy.label) == ("Accuracy (%)\u00a0↑", "accuracy (%)")
    assert get_metric("inter_class_distance").heading == "Distance between classes"
    assert accuracy.with_unit(0.9731) == "97.31 %" and memory.with_unit(1234.4) == "1,234 MiB"
    assert accuracy.format(-0.5, sign=True) == "\u221250.00" and accuracy.format(-1e-9, sign=True) == "0.00"
    assert accuracy.format_mean(Interval(0.5)) == "50.00"
    assert accuracy.format_mean(Interval(0.5, 0.4, 0.6)) == "50.00 ± 10.00"
    assert accuracy.format_mean(Range(0.5, 0.4, 0.6)) == "50.00 (40.00 to 60.00)"
    assert accuracy.format_difference(Interval(0.1, -0.1, 0.3)) == "+10.00 [\u221210.00, +30.00]"
    assert (accuracy.difference_unit, get_metric("nll").difference_unit) == ("points", "nats")
    assert accuracy.is_improvement(0.1) and not get_metric("nll").is_improvement(0.1)


def test_unregistered_metrics_have_a_plain_entry():
    info = get_metric("iou_sky")
    assert (info.title, info.with_unit(0.25), info.better) == ("iou sky", "0.2500", "")


def test_invalid_entries_raise_value_error():
    with pytest.raises(ValueError, match="'accuracy' is already registered"):
        register_metric(METRICS["accuracy"])
    with pytest.raises(ValueError, match="better must be 'higher', 'lower' or '', got 'up' for 'x'"):
        MetricInfo("x", "x", better="up")
    with pytest.raises(ValueError, match="group must be one of classification, .*, got 'speed' for 'x'"):
        MetricInfo("x", "x", group="speed")
    with pytest.raises(ValueError, match="name must be one of classification, ood, representation or of accuracy, .*"):
        load_metric("train_seconds")


def test_rejected_arguments_leave_out_single_metrics_if_errors_are_collected():
    errors = []
    values = compute_metrics("representation", [[1.0, 0.0], [0.0, 1.0]], [0, 0], errors=errors)
    assert list(values) == ["alignment", "uniformity"] and "different classes" in str(errors[0])
    with pytest.raises(ValueError, match="different classes"):
        compute_metrics("representation", [[1.0, 0.0], [0.0, 1.0]], [0, 0])
