"""Runs of a comparison from Python: equal conditions for all methods, resuming, and equality with plain training."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageClassification, Trainer, TrainerCallback, ViTForImageClassification, set_seed

from mm_hf import ERM, DenseMultiMix, Mixing, MultiMix
from mm_hf.comparison import EvaluationOptions, PeakMemory, Task, as_methods, parse_method, run_comparison
from mm_hf.comparison.run import weights_digest
from mm_hf.comparison.task import slug
from mm_hf.data.build import ModelOptions, build_task
from mm_hf.data.splits import DataOptions
from mm_hf.evaluation.metrics import Normalization, classification_metrics, predictions
from mm_hf.locations import LocationError
from mm_hf.methods import METHODS
from tests.helpers import digits
from tests.helpers.commands import COSTS, TINY

NO_ROBUSTNESS = EvaluationOptions(robustness_samples=0)


class Indexed(torch.utils.data.Dataset):
    """Examples that record the requested indices and epochs."""

    def __init__(self, start, stop):
        rows = digits.dataset(start, stop, extra=False)
        self.examples = [{"pixel_values": row["pixel_values"], "labels": int(row["label"])} for row in rows]
        self.requested, self.epochs = [], []

    def seed_augmentation(self, seed, epoch):
        self.epochs.append((seed, epoch))

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, i):
        self.requested.append(i)
        return self.examples[i]


class Stop(TrainerCallback):
    """Interrupt training at a step."""

    def __init__(self, step):
        self.step, self.steps = step, 0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1
        if state.global_step == self.step:
            raise KeyboardInterrupt


class Weights(TrainerCallback):
    """Record the initial weights of each training run, and forget the examples requested by the warm-up."""

    def __init__(self, data):
        self.digests, self.data = [], data

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.digests.append((args.seed, weights_digest(model)))
        self.data.requested.clear()


def small_task(**changes):
    config = digits.vit(dropout=0.1).config
    args = {"num_train_epochs": 2, "per_device_train_batch_size": 16, "learning_rate": 2e-3, "use_cpu": True}
    args |= changes.pop("training_args", {})
    return Task(
        "digits",
        lambda: ViTForImageClassification(config),
        Indexed(0, 64),
        Indexed(64, 104),
        Indexed(104, 130),
        training_args=args,
        **changes,
    )


@pytest.mark.parametrize("mixing", [ERM(), DenseMultiMix(num_mixed=10)])
def test_interrupted_run_resumes_from_the_last_complete_checkpoint(mixing, tmp_path):
    task = small_task(training_args={"save_strategy": "epoch"})
    complete = run_comparison(
        task, {"method": mixing}, 1, tmp_path / "complete", evaluation=NO_ROBUSTNESS, report=False
    )
    with pytest.raises(KeyboardInterrupt):
        run_comparison(
            task, {"method": mixing}, 1, tmp_path / "parts", evaluation=NO_ROBUSTNESS, report=False, callbacks=[Stop(6)]
        )
    checkpoints = tmp_path / "parts" / "runs" / "method" / "seed-0" / "checkpoints"
    assert [path.name for path in checkpoints.glob("checkpoint-*")] == ["checkpoint-4"]
    (checkpoints / "checkpoint-7").mkdir()  # an incomplete checkpoint
    steps = Stop(None)
    parts = run_comparison(
        task, {"method": mixing}, 1, tmp_path / "parts", evaluation=NO_ROBUSTNESS, report=False, callbacks=[steps]
    )
    assert steps.steps == 4
    one, other = complete.runs["method"][0], parts.runs["method"][0]
    for metrics in (one.metrics, other.metrics):
        for cost in COSTS:
            del metrics[cost]
    assert one.metrics == other.metrics
    assert np.array_equal(one.arrays["logits"], other.arrays["logits"])
    assert [entry["epoch"] for entry in other.history if "eval_accuracy" in entry] == [1, 2]


def test_methods_share_initial_weights_and_order_of_data_for_each_seed(tmp_path):
    task = small_task()
    weights = Weights(task.train_dataset)
    orders = []

    def keep(run):
        orders.append((run.method, run.seed, list(task.train_dataset.requested)))

    methods = {"erm": ERM(), "mixup": {}, "multimix": {"num_mixed": 10}, "dense": DenseMultiMix(num_mixed=10)}
    comparison = run_comparison(
        task, methods, [3, 5], tmp_path, evaluation=NO_ROBUSTNESS, report=False, on_run=keep, callbacks=[weights]
    )
    for seed in (3, 5):
        (order,) = {tuple(asked) for _, s, asked in orders if s == seed}
        assert sorted(order) == sorted(2 * list(range(64)))
        assert len({digest for s, digest in weights.digests if s == seed}) == 1
    assert len({tuple(asked) for _, _, asked in orders}) == 2 and len({digest for _, digest in weights.digests}) == 2
    warm_up, *epochs = task.train_dataset.epochs
    assert warm_up == (0, 0) and epochs == [(seed, epoch) for seed in (3, 5) for _ in methods for epoch in (0, 1)]
    assert {(run.seed, run.initial_weights) for runs in comparison.runs.values() for run in runs} == set(
        weights.digests
    )
    assert comparison.seeds == [3, 5] and comparison.baseline == "erm"


def test_erm_equals_plain_trainer(tmp_path):
    task = small_task()
    ours = run_comparison(task, {"erm": {}}, [4], tmp_path / "ours", evaluation=NO_ROBUSTNESS, report=False).runs[
        "erm"
    ][0]
    set_seed(4)
    model = task.model_init()
    trainer = Trainer(
        model,
        task.arguments(str(tmp_path / "theirs"), 4),
        train_dataset=task.train_dataset,
        eval_dataset=task.validation_dataset,
        compute_metrics=classification_metrics,
    )
    trainer.train()
    logits, labels = predictions(model, trainer.get_test_dataloader(task.test_dataset))
    assert np.array_equal(ours.arrays["logits"], logits.numpy()) and np.array_equal(
        ours.arrays["labels"], labels.numpy()
    )
    assert ours.metrics["nll"] == trainer.evaluate(task.test_dataset)["eval_nll"]


def test_augmentation_depends_on_seed_and_epoch_only():
    task = build_task(
        DataOptions("digits", augmentation="randaugment", max_train_samples=8),
        ModelOptions(model_type="vit", config_overrides=TINY),
    )
    rows = task.train_dataset

    def batch(seed, epoch, disturbed):
        torch.manual_seed(disturbed)
        rows.seed_augmentation(seed, epoch)
        return torch.stack([example["pixel_values"] for example in rows.__getitems__([5, 2, 7])])

    assert torch.equal(batch(0, 0, 1), batch(0, 0, 2))
    assert not torch.equal(batch(0, 0, 1), batch(0, 1, 1)) and not torch.equal(batch(0, 0, 1), batch(1, 0, 1))
    torch.manual_seed(0)
    first = torch.rand(1)
    torch.manual_seed(0)
    rows.__getitems__([0, 1])
    assert torch.equal(first, torch.rand(1))  # the global generator is not used


def test_seeds_and_methods_can_be_added_but_settings_cannot_change(tmp_path):
    task = small_task(training_args={"num_train_epochs": 1})
    run_comparison(task, {"few": MultiMix(num_mixed=5)}, 1, tmp_path, evaluation=NO_ROBUSTNESS, report=False)
    comparison = run_comparison(
        task, {"few": MultiMix(num_mixed=5), "erm": ERM()}, 2, tmp_path, evaluation=NO_ROBUSTNESS, report=False
    )
    assert list(comparison.runs)[:2] == ["erm", "few"]  # the baseline first
    with pytest.raises(ValueError, match="methods few num_mixed was 5 and is now 6"):
        run_comparison(task, {"few": MultiMix(num_mixed=6)}, 1, tmp_path, evaluation=NO_ROBUSTNESS)
    other = small_task(training_args={"num_train_epochs": 1, "learning_rate": 0.1})
    with pytest.raises(ValueError, match="training_args learning_rate was 0.002 and is now 0.1"):
        run_comparison(other, {"erm": {}}, 1, tmp_path, evaluation=NO_ROBUSTNESS)
    with pytest.raises(ValueError, match="evaluation robustness_samples was 0 and is now 500"):
        run_comparison(task, {"erm": {}}, 1, tmp_path)


def test_keep_models(tmp_path):
    task = small_task(training_args={"num_train_epochs": 1, "save_strategy": "epoch"})
    for keep, models, checkpoints in (("none", 0, 0), ("best", 1, 0), ("all", 2, 2)):
        where = tmp_path / keep
        runs = run_comparison(
            task, {"erm": {}}, 2, where, evaluation=NO_ROBUSTNESS, report=False, keep_models=keep
        ).runs["erm"]  # fmt: skip
        assert len(list(where.glob("runs/*/*/model/model.safetensors"))) == models
        assert len(list(where.glob("runs/*/*/checkpoints/checkpoint-*"))) == checkpoints
        if keep == "best":
            accuracy = [[e["eval_accuracy"] for e in run.history if "eval_accuracy" in e][-1] for run in runs]
            assert runs[int(np.argmax(accuracy))].model is not None
            assert AutoModelForImageClassification.from_pretrained(runs[int(np.argmax(accuracy))].model)


def test_method_that_cannot_train_the_model_is_reported_and_others_run(tmp_path):
    class Impossible(Mixing):
        name = "impossible"

        def loss(self, output, labels, **kwargs):
            raise LocationError("No place for this method in this model.\nMore.")

    try:
        task = small_task(training_args={"max_steps": 1})
        comparison = run_comparison(task, ["erm", "impossible"], 1, tmp_path, evaluation=NO_ROBUSTNESS)
        assert comparison.failed == {"impossible": "No place for this method in this model.\nMore."}
        assert "impossible was not trained: No place for this method" in (tmp_path / "report.md").read_text()
        with pytest.raises(LocationError):
            run_comparison(task, ["impossible"], 1, tmp_path / "alone", evaluation=NO_ROBUSTNESS)
    finally:
        del METHODS["impossible"]


def test_diverged_run_is_reported(tmp_path):
    task = small_task(training_args={"max_steps": 6, "learning_rate": 1e20}, normalization=Normalization([0.5], [0.5]))
    comparison = run_comparison(task, ["erm", "multimix:num_mixed=5"], 1, tmp_path, evaluation=EvaluationOptions(8))
    assert np.isnan(comparison.runs["erm"][0].metrics["nll"])
    report = (tmp_path / "report.md").read_text()
    assert "| erm | nan |" in report and "The representation was not evaluated" in report
    assert not (tmp_path / "figures" / "reliability.png").exists()


def test_methods_are_parsed_from_specifications_settings_and_objects():
    assert parse_method("multimix:num_mixed=7,alpha=[0.5,2]") == (
        "multimix:num_mixed=7,alpha=[0.5,2]",
        MultiMix(num_mixed=7, alpha=(0.5, 2)),
    )
    assert parse_method("a=dense_multimix:preset=paper,detach_attention=false")[1].detach_attention is False
    assert as_methods({"erm": {}, "x": {"method": "multimix", "num_mixed": 3}})["x"] == MultiMix(num_mixed=3)
    with pytest.raises(ValueError, match="The methods are .*erm"):
        as_methods(["nomix"])
    with pytest.raises(ValueError, match="'erm' twice"):
        as_methods(["erm", "erm"])
    with pytest.raises(ValueError, match="instead of setting=value"):
        as_methods(["multimix:num_mixed"])
    with pytest.raises(ValueError, match="is empty or used twice"):
        as_methods({"a b": ERM(), "a-b": ERM()})
    assert slug("multimix:num_mixed=5") == "multimix-num_mixed-5"


def test_invalid_task_raises_value_error(tmp_path):
    with pytest.raises(ValueError, match="training_args has seed"):
        small_task(training_args={"seed": 1})
    with pytest.raises(ValueError, match="test_dataset is empty"):
        Task("none", lambda: None, [1], [])
    task = small_task(training_args={"max_steps": 1})
    draws = iter(range(9))
    inner = task.model_init
    task.model_init = lambda: digits.vit(next(draws)) if draws else inner()
    with pytest.raises(ValueError, match="did not start from the same weights"):
        run_comparison(task, ["erm", "mixup"], 1, tmp_path, evaluation=NO_ROBUSTNESS, report=False)


def test_peak_memory_of_a_with_statement():
    with PeakMemory() as memory:
        taken = np.ones(2**26, dtype=np.uint8)
        assert taken.sum() == 2**26
        del taken
    assert 40 < memory.mib < 200
