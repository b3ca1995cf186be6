"""Runs of a comparison, from Python: alike for all methods, gone on with where they were stopped, held to plain training."""

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
from mm_hf.evaluation.metrics import Normalisation, classification_metrics, predictions
from mm_hf.locations import LocationError
from mm_hf.methods import METHODS
from tests.helpers import digits
from tests.helpers.commands import COSTS, TINY

NOTHING = EvaluationOptions(robustness_samples=0)


class Indexed(torch.utils.data.Dataset):
    """Examples that tell which of them were asked for, and in which epoch."""

    def __init__(self, start, stop):
        rows = digits.dataset(start, stop, extra=False)
        self.examples = [{"pixel_values": row["pixel_values"], "labels": int(row["label"])} for row in rows]
        self.asked, self.epochs = [], []

    def seed_augmentation(self, seed, epoch):
        self.epochs.append((seed, epoch))

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, i):
        self.asked.append(i)
        return self.examples[i]


class Stop(TrainerCallback):
    """Breaks a training off at a step, as a machine that is switched off would."""

    def __init__(self, step):
        self.step, self.steps = step, 0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1
        if state.global_step == self.step:
            raise KeyboardInterrupt


class Weights(TrainerCallback):
    """The weights that each training begins with; what was asked for before, to warm up, is forgotten."""

    def __init__(self, data):
        self.seen, self.data = [], data

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.seen.append((args.seed, weights_digest(model)))
        self.data.asked.clear()


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
def test_stopped_in_a_run_it_goes_on_from_the_last_checkpoint(mixing, tmp_path):
    task = small_task(training_args={"save_strategy": "epoch"})
    whole = run_comparison(task, {"method": mixing}, 1, tmp_path / "whole", measures=NOTHING, report=False)
    with pytest.raises(KeyboardInterrupt):
        run_comparison(
            task, {"method": mixing}, 1, tmp_path / "parts", measures=NOTHING, report=False, callbacks=[Stop(6)]
        )
    checkpoints = tmp_path / "parts" / "runs" / "method" / "seed-0" / "checkpoints"
    assert [path.name for path in checkpoints.glob("checkpoint-*")] == ["checkpoint-4"]
    (checkpoints / "checkpoint-7").mkdir()  # one that was being written
    steps = Stop(None)
    parts = run_comparison(
        task, {"method": mixing}, 1, tmp_path / "parts", measures=NOTHING, report=False, callbacks=[steps]
    )
    assert steps.steps == 4
    one, other = whole.runs["method"][0], parts.runs["method"][0]
    for metrics in (one.metrics, other.metrics):
        for cost in COSTS:
            del metrics[cost]
    assert one.metrics == other.metrics
    assert np.array_equal(one.arrays["logits"], other.arrays["logits"])
    assert [entry["epoch"] for entry in other.history if "eval_accuracy" in entry] == [1, 2]


def test_methods_of_a_seed_start_from_the_same_weights_and_see_the_same_data(tmp_path):
    task = small_task()
    weights = Weights(task.train_dataset)
    orders = []

    def keep(run):
        orders.append((run.method, run.seed, list(task.train_dataset.asked)))

    methods = {"erm": ERM(), "mixup": {}, "multimix": {"num_mixed": 10}, "dense": DenseMultiMix(num_mixed=10)}
    comparison = run_comparison(
        task, methods, [3, 5], tmp_path, measures=NOTHING, report=False, on_run=keep, callbacks=[weights]
    )
    for seed in (3, 5):
        (order,) = {tuple(asked) for _, s, asked in orders if s == seed}
        assert sorted(order) == sorted(2 * list(range(64)))
        assert len({digest for s, digest in weights.seen if s == seed}) == 1
    assert len({tuple(asked) for _, _, asked in orders}) == 2 and len({digest for _, digest in weights.seen}) == 2
    warm_up, *epochs = task.train_dataset.epochs
    assert warm_up == (0, 0) and epochs == [(seed, epoch) for seed in (3, 5) for _ in methods for epoch in (0, 1)]
    assert {(run.seed, run.initial_weights) for runs in comparison.runs.values() for run in runs} == set(weights.seen)
    assert comparison.seeds == [3, 5] and comparison.baseline == "erm"


def test_plain_training_is_plain_trainers(tmp_path):
    task = small_task()
    ours = run_comparison(task, {"erm": {}}, [4], tmp_path / "ours", measures=NOTHING, report=False).runs["erm"][0]
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


def test_augmentation_is_the_same_for_all_methods_and_other_in_each_epoch_and_seed():
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
    assert torch.equal(first, torch.rand(1))  # and it draws nothing from the global generator


def test_other_settings_are_refused_and_more_seeds_and_methods_are_not(tmp_path):
    task = small_task(training_args={"num_train_epochs": 1})
    run_comparison(task, {"few": MultiMix(num_mixed=5)}, 1, tmp_path, measures=NOTHING, report=False)
    comparison = run_comparison(
        task, {"few": MultiMix(num_mixed=5), "erm": ERM()}, 2, tmp_path, measures=NOTHING, report=False
    )
    assert list(comparison.runs) == ["erm", "few"]  # the baseline first
    with pytest.raises(ValueError, match="methods few num_mixed was 5 there and is 6 now"):
        run_comparison(task, {"few": MultiMix(num_mixed=6)}, 1, tmp_path, measures=NOTHING)
    other = small_task(training_args={"num_train_epochs": 1, "learning_rate": 0.1})
    with pytest.raises(ValueError, match="training_args learning_rate was 0.002 there and is 0.1 now"):
        run_comparison(other, {"erm": {}}, 1, tmp_path, measures=NOTHING)
    with pytest.raises(ValueError, match="measures robustness_samples was 0 there and is 500 now"):
        run_comparison(task, {"erm": {}}, 1, tmp_path)


def test_models_that_are_kept(tmp_path):
    task = small_task(training_args={"num_train_epochs": 1, "save_strategy": "epoch"})
    for keep, models, checkpoints in (("none", 0, 0), ("best", 1, 0), ("all", 2, 2)):
        where = tmp_path / keep
        runs = run_comparison(
            task, {"erm": {}}, 2, where, measures=NOTHING, report=False, keep_models=keep
        ).runs["erm"]  # fmt: skip
        assert len(list(where.glob("runs/*/*/model/model.safetensors"))) == models
        assert len(list(where.glob("runs/*/*/checkpoints/checkpoint-*"))) == checkpoints
        if keep == "best":
            accuracy = [[e["eval_accuracy"] for e in run.history if "eval_accuracy" in e][-1] for run in runs]
            assert runs[int(np.argmax(accuracy))].model is not None
            assert AutoModelForImageClassification.from_pretrained(runs[int(np.argmax(accuracy))].model)


def test_a_method_that_cannot_train_the_model_does_not_stop_the_others(tmp_path):
    class CommandParser(Mixing):
        name = "refusing"

        def loss(self, output, labels, **kwargs):
            raise LocationError("No place for this method in this model.\nMore.")

    try:
        task = small_task(training_args={"max_steps": 1})
        comparison = run_comparison(task, ["erm", "refusing"], 1, tmp_path, measures=NOTHING)
        assert comparison.failed == {"refusing": "No place for this method in this model.\nMore."}
        assert "refusing was not trained: No place for this method" in (tmp_path / "report.md").read_text()
        with pytest.raises(LocationError):
            run_comparison(task, ["refusing"], 1, tmp_path / "alone", measures=NOTHING)
    finally:
        del METHODS["refusing"]


def test_a_training_that_diverges_is_reported(tmp_path):
    task = small_task(training_args={"max_steps": 6, "learning_rate": 1e20}, normalisation=Normalisation([0.5], [0.5]))
    comparison = run_comparison(task, ["erm", "multimix:num_mixed=5"], 1, tmp_path, measures=EvaluationOptions(8))
    assert np.isnan(comparison.runs["erm"][0].metrics["nll"])
    report = (tmp_path / "report.md").read_text()
    assert "| erm | nan |" in report and "The representation was not measured" in report
    assert not (tmp_path / "pictures" / "reliability.png").exists()


def test_methods_by_name_settings_and_object():
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
    with pytest.raises(ValueError, match="where a setting=value should be"):
        as_methods(["multimix:num_mixed"])
    with pytest.raises(ValueError, match="would share a folder"):
        as_methods({"a b": ERM(), "a-b": ERM()})
    assert slug("multimix:num_mixed=5") == "multimix-num_mixed-5"


def test_a_task_that_makes_no_sense_is_refused(tmp_path):
    with pytest.raises(ValueError, match="training_args has seed"):
        small_task(training_args={"seed": 1})
    with pytest.raises(ValueError, match="test_dataset is empty"):
        Task("none", lambda: None, [1], [])
    task = small_task(training_args={"max_steps": 1})
    draws = iter(range(9))
    inner = task.model_init
    task.model_init = lambda: digits.vit(next(draws)) if draws else inner()
    with pytest.raises(ValueError, match="did not start from the same weights"):
        run_comparison(task, ["erm", "mixup"], 1, tmp_path, measures=NOTHING, report=False)


def test_memory_that_a_block_takes_is_seen():
    with PeakMemory() as memory:
        taken = np.ones(2**26, dtype=np.uint8)
        assert taken.sum() == 2**26
        del taken
    assert 40 < memory.mib < 200
