"""Early stopping and temperature scaling, derived from plain training, against the models of a plain Trainer."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from transformers import Trainer, TrainerCallback, set_seed

from mm_hf import ERM
from mm_hf.comparison import run_comparison
from mm_hf.comparison.derived import derived_names
from mm_hf.evaluation.metrics import classification_metrics, predictions
from mm_hf.evaluation.temperature import fit_temperature
from tests.comparison.test_runs import NO_ROBUSTNESS, Stop, small_task


def nll(logits, labels, temperature):
    return float(torch.nn.functional.cross_entropy(torch.as_tensor(logits) / temperature, torch.as_tensor(labels)))


@pytest.mark.parametrize("scale", [0.05, 1.0, 20.0])
def test_temperature_minimizes_the_nll(scale):
    generator = np.random.default_rng(0)
    labels = generator.integers(4, size=200)
    logits = scale * (generator.normal(size=(200, 4)) + 2 * np.eye(4)[labels])
    found = fit_temperature(logits, labels)
    other = minimize(lambda x: nll(logits, labels, float(np.exp(x[0]))), [np.log(scale)], method="Nelder-Mead")
    assert nll(logits, labels, found) <= other.fun + 1e-6 and found == pytest.approx(
        float(np.exp(other.x[0])), rel=0.01
    )


def test_temperature_of_perfect_or_diverged_logits_is_a_bounded_number():
    labels = np.array([0, 1, 0])
    assert 0.01 <= fit_temperature(np.eye(2)[labels], labels) < 0.05
    assert fit_temperature([[np.nan, 0.0], [1.0, 0.0], [0.0, 1.0]], labels) == 1.0
    assert fit_temperature([[4.0, 0.0], [4.0, 0.0], [0.0, 9.0]], [0, 1, -100]) > 50  # as likely as not


class Recorder(TrainerCallback):
    """Record the weights and the validation results of each epoch."""

    def __init__(self):
        self.found = []

    def on_evaluate(self, args, state, control, metrics=None, model=None, **kwargs):
        score = metrics["eval_accuracy"], -metrics["eval_loss"]
        self.found.append((score, state.epoch, {k: v.clone() for k, v in model.state_dict().items()}))


ARGS = {"num_train_epochs": 6, "learning_rate": 3e-2, "save_strategy": "epoch"}


@pytest.fixture(scope="module")
def plain():
    """Train by the plain Trainer and return the results of each epoch and the logits of its last model."""
    task = small_task(training_args=ARGS)
    args = task.arguments("unused", 0, save_strategy="no")
    set_seed(0)
    recorder, model = Recorder(), task.model_init()
    trainer = Trainer(
        model, args, train_dataset=task.train_dataset, eval_dataset=task.validation_dataset,
        compute_metrics=classification_metrics, callbacks=[recorder],
    )  # fmt: skip
    trainer.train()
    validation, labels = predictions(model, trainer.get_test_dataloader(task.validation_dataset))
    last, test_labels = predictions(model, trainer.get_test_dataloader(task.test_dataset))
    best = max(recorder.found, key=lambda each: each[0])
    model.load_state_dict(best[2])
    stopped, _ = predictions(model, trainer.get_test_dataloader(task.test_dataset))
    return {
        "validation": (validation, labels),
        "last": last,
        "stopped": stopped,
        "epoch": best[1],
        "labels": test_labels,
    }


@pytest.mark.parametrize("interrupted_at", [None, 19])
def test_derived_runs_are_those_of_a_plain_trainer(plain, tmp_path, interrupted_at):
    task = small_task(training_args=ARGS)
    options = {"evaluation": NO_ROBUSTNESS, "report": False}
    if interrupted_at:
        with pytest.raises(KeyboardInterrupt):
            run_comparison(task, ["erm"], 1, tmp_path, callbacks=[Stop(interrupted_at)], **options)
    comparison = run_comparison(task, ["erm"], 1, tmp_path, **options)
    assert list(comparison.runs) == ["erm", *derived_names("erm").values()] and list(comparison.trained) == ["erm"]
    runs = {name: run for name, (run,) in comparison.runs.items()}
    stopped, scaled = runs["erm_early_stopping"], runs["erm_temperature_scaling"]
    assert 0 < plain["epoch"] < 6, "the best epoch should not be the last one in this test"
    assert stopped.metrics["best_epoch"] == plain["epoch"]
    assert np.array_equal(stopped.arrays["logits"], plain["stopped"].numpy())
    temperature = scaled.metrics["temperature"]
    assert temperature == fit_temperature(*plain["validation"])
    assert np.allclose(scaled.arrays["logits"] * temperature, plain["last"].numpy(), rtol=1e-5)
    for run, logits in ((stopped, plain["stopped"]), (scaled, plain["last"] / temperature)):
        assert np.array_equal(run.arrays["labels"], plain["labels"].numpy())
        assert run.metrics["nll"] == pytest.approx(nll(logits, plain["labels"], 1.0), rel=1e-5)
        assert run.metrics["train_seconds"] == runs["erm"].metrics["train_seconds"]
    assert scaled.metrics["accuracy"] == runs["erm"].metrics["accuracy"]
    assert not list(tmp_path.glob("runs/*/*/best*"))


def test_report_has_rows_of_the_derived_runs_and_finished_ones_are_kept(tmp_path):
    task = small_task(training_args={"num_train_epochs": 2})
    methods = {"plain": ERM(), "mixup": {}}
    run_comparison(task, methods, 2, tmp_path, evaluation=NO_ROBUSTNESS, replicates=50)
    names = [f"plain_{kind}" for kind in ("early_stopping", "temperature_scaling")]
    report = (tmp_path / "report.md").read_text()
    accuracy, cost = report.split("## Accuracy and calibration")[1].split("##")[0], report.split("## Cost")[1]
    for name in names:
        assert accuracy.count(f"\n| {name} |") == 2  # of the means and of the differences
        assert f"\n| {name} |" not in cost
        assert f"{name}: no reliable difference from plain" in report or f"{name} compared with plain" in report
    assert "plain_early_stopping and plain_temperature_scaling are derived" in report
    results = (tmp_path / "results.csv").read_text()
    assert "plain_temperature_scaling,1,temperature," in results and "plain_early_stopping,0,best_epoch," in results
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/*/result.json")}
    again = run_comparison(task, methods, 2, tmp_path, evaluation=NO_ROBUSTNESS, report=False)
    assert list(again.runs) == ["plain", "mixup", *names]
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/*/result.json")}


def test_without_validation_examples_or_plain_training_nothing_is_derived(tmp_path):
    task = small_task(training_args={"max_steps": 1, "eval_strategy": "no"})
    only = run_comparison(task, ["mixup"], 1, tmp_path / "a", evaluation=NO_ROBUSTNESS, report=False)
    assert list(only.runs) == ["mixup"]
    # Without evaluations during the training, there is no best epoch; the temperature needs the last weights only.
    last = run_comparison(task, ["erm"], 1, tmp_path / "b", evaluation=NO_ROBUSTNESS, report=False)
    assert list(last.runs) == ["erm", "erm_temperature_scaling"]
    task.validation_dataset = None
    none = run_comparison(task, ["erm"], 1, tmp_path / "c", evaluation=NO_ROBUSTNESS, report=False)
    assert list(none.runs) == ["erm"]
    with pytest.raises(ValueError, match="'erm_early_stopping', the name of a baseline that is derived from plain"):
        run_comparison(task, {"erm": {}, "erm_early_stopping": ERM()}, 1, tmp_path / "d", evaluation=NO_ROBUSTNESS)
