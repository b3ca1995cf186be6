import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
from transformers import default_data_collator as transformers_default_collator

from mm_hf import ERM, CutMix, DenseMultiMix, ManifoldMixup, Mixup, MultiMix, MultiMixTrainer, TransMix
from mm_hf.training.hub import load_mixing
from tests.helpers import digits, models
from tests.helpers.digits import losses, run

DENSE = DenseMultiMix(num_mixed=20)


# ---- training ----


def test_training_reduces_the_loss_and_logs_its_terms(tmp_path):
    mixing = DenseMultiMix(num_mixed=20, input_mixing="none", min_fit=0.05)
    trainer = run(tmp_path, num_train_epochs=40, learning_rate=3e-3, trainer_args={"mixing": mixing})
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert np.mean(losses(trainer)[-3:]) < 0.8 * losses(trainer)[0]
    weights = [entry.get("mixing_weight") for entry in history]  # three steps per epoch
    assert weights[:9] == [None] * 9 and 0 < weights[9] < weights[-1] <= 1
    for entry in history:
        terms = entry["loss_clean"] + entry.get("mixing_weight", 1.0) * entry["loss_dense"]
        assert entry["loss"] == pytest.approx(terms, abs=2e-4)
        assert entry["loss_terms"] == 32 + 16 * 20
        assert 1 / 32 < entry["mean_largest_factor"] < 1
        assert 0 < entry["attention_entropy"] <= np.log(16) + 1e-5


def test_some_of_the_late_mini_batches_get_cutmix(tmp_path):
    always = dataclasses.replace(DENSE, min_fit=0.0)
    trainer = run(tmp_path, num_train_epochs=20, trainer_args={"mixing": always})
    trainer.train()
    history = [
        entry for entry in trainer.state.log_history if "loss" in entry
    ]  # one entry per step, three steps per epoch
    mixed = ["loss_cutmix" in entry for entry in history]
    # The share at epoch e is (1 - 3 / e) / 2, which adds up to 17 mini-batches.
    assert not any(mixed[:9]) and 8 < sum(mixed[9:]) < 27 and len(history) == 60
    for entry in history:
        terms = entry["loss_cutmix"] if "loss_cutmix" in entry else entry["loss_clean"] + entry["loss_dense"]
        assert entry["loss"] == pytest.approx(terms, abs=2e-4)


@pytest.mark.parametrize(
    "mixing",
    [
        MultiMix(num_mixed=20),
        DENSE,
        DenseMultiMix(num_mixed=20, preset="paper"),
        Mixup(),
        CutMix(),
        ManifoldMixup(),
        TransMix(),
    ],
    ids=lambda mixing: mixing.name,
)
def test_every_method_trains(tmp_path, mixing):
    trainer = run(tmp_path, num_train_epochs=3, trainer_args={"mixing": mixing})
    trainer.train()
    assert np.isfinite(losses(trainer)).all() and trainer.state.global_step == 9


def test_method_can_be_given_by_name(tmp_path):
    assert run(tmp_path, trainer_args={"mixing": "multimix"}).mixing == MultiMix()
    assert run(tmp_path).mixing == DenseMultiMix()


def test_last_batch_of_one_example_trains(tmp_path):
    trainer = run(tmp_path, train=digits.dataset(0, 33), trainer_args={"mixing": DENSE})
    trainer.train()
    assert np.isfinite(losses(trainer)).all() and len(losses(trainer)) == 2


# ---- features of Trainer ----


def test_early_stopping_loads_the_best_model(tmp_path):
    scores = iter([0.5, 0.9, 0.4, 0.3, 0.2])
    kept = {}

    class Keep(TrainerCallback):
        def on_evaluate(self, args, state, control, model, **kwargs):
            kept[state.global_step] = digits.weights(model)

    trainer = run(
        tmp_path,
        num_train_epochs=5,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="score",
        trainer_args={
            "mixing": DENSE,
            "compute_metrics": lambda _: {"score": next(scores)},
            "callbacks": [EarlyStoppingCallback(early_stopping_patience=2), Keep()],
        },
    )
    trainer.train()
    assert trainer.state.global_step == 12 and trainer.state.best_global_step == 6
    digits.same_weights(digits.weights(trainer.model), kept[6])


SOMETIMES = DenseMultiMix(
    num_mixed=20, alpha=(0.5, 2.0), input_mixing="mixup_cutmix", input_mixing_prob=0.4, input_mixing_start=0
)
# After three epochs, the weight of mixing is between 0 and 1 and changes, and some mini-batches get CutMix.
LATE = DenseMultiMix(num_mixed=20, input_mixing_start=1.0, min_fit=0.05)
SOMETIMES_TEXT = DenseMultiMix(num_mixed=20, input_mixing="mixup", input_mixing_prob=0.4, input_mixing_start=0)


@pytest.mark.parametrize(
    ("architecture", "mixing"),
    [("vit", SOMETIMES), ("vit", LATE), ("bert", SOMETIMES_TEXT), ("vit", TransMix()), ("bert", ManifoldMixup())],
    ids=lambda value: getattr(value, "name", value),
)
@pytest.mark.parametrize("stop_at", [3, 4])
def test_resumed_training_equals_uninterrupted_training_bit_for_bit(tmp_path, architecture, mixing, stop_at):
    """At the end and in the middle of an epoch, with dropout and accumulation."""

    def trainer(directory, **more):
        model, train = digits.vit(dropout=0.1), digits.dataset()
        if architecture == "bert":
            batch = models.batch("bert", b=96)
            model = models.build("bert", scale=False)
            train = [{"labels": i % 5, **{k: v[i] for k, v in batch.items()}} for i in range(96)]
        args = {"num_train_epochs": epochs, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 2, **more}
        return MultiMixTrainer(model, digits.arguments(directory, **args), train_dataset=train, mixing=mixing)

    epochs, stop_at = (5, stop_at + 9) if mixing is LATE else (3, stop_at)
    whole = trainer(tmp_path / "whole")
    whole.train()
    stopped = trainer(tmp_path / "parts", save_strategy="steps", save_steps=stop_at)
    stopped.add_callback(StopAt(stop_at))
    stopped.train()
    assert stopped.state.global_step == stop_at
    resumed = trainer(tmp_path / "parts", save_strategy="steps", save_steps=stop_at)
    resumed.train(resume_from_checkpoint=True)
    digits.same_weights(digits.weights(resumed.model), digits.weights(whole.model))
    assert losses(resumed)[stop_at:] == losses(whole)[stop_at:]


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = True
            control.should_save = True


def test_resuming_with_missing_weights_raises(tmp_path):
    from safetensors.torch import load_file, save_file

    trainer = run(tmp_path, trainer_args={"mixing": DENSE}, save_strategy="steps", save_steps=1, max_steps=1)
    trainer.train()
    file = tmp_path / "checkpoint-1" / "model.safetensors"
    tensors = load_file(file)
    lost = sorted(tensors)[5]
    del tensors[lost]
    save_file(tensors, file, metadata={"format": "pt"})
    (file.parent / "SHA256SUMS").unlink()
    again = run(tmp_path, trainer_args={"mixing": DENSE}, max_steps=2)
    with pytest.raises(RuntimeError, match=r"(?s)does not fit the model.*would not be restored"):
        again.train(resume_from_checkpoint=True)


def test_training_twice_with_model_init_gives_the_same_weights(tmp_path):
    trainer = MultiMixTrainer(
        args=digits.arguments(tmp_path, max_steps=2),
        mixing=DENSE,
        model_init=lambda: digits.vit(),
        train_dataset=digits.dataset(),
    )
    trainer.train()
    first = digits.weights(trainer.model)
    trainer.train()
    digits.same_weights(first, digits.weights(trainer.model))
    assert "loss_dense" in trainer.state.log_history[0]


def test_new_trainer_replaces_the_mixing_of_the_model(tmp_path):
    model = digits.vit()
    run(tmp_path, model=model, trainer_args={"mixing": DENSE}, max_steps=1).train()
    trainer = run(tmp_path, model=model, trainer_args={"mixing": MultiMix(num_mixed=5)}, max_steps=1)
    trainer.train()
    assert "loss_pooled" in trainer.state.log_history[0] and "loss_dense" not in trainer.state.log_history[0]


def test_new_erm_trainer_removes_the_mixing_of_the_model(tmp_path):
    results = []
    for before in (False, True):
        model = digits.vit()
        if before:
            run(tmp_path, model=model, trainer_args={"mixing": DENSE})
        run(tmp_path, model=model, trainer_args={"mixing": ERM()}, max_steps=2).train()
        results.append(digits.weights(model))
    digits.same_weights(*results)


def test_trainer_raises_if_a_newer_trainer_replaced_its_mixing(tmp_path):
    model = digits.vit()
    older = run(tmp_path, model=model, trainer_args={"mixing": DENSE}, max_steps=1)
    run(tmp_path, model=model, trainer_args={"mixing": MultiMix(num_mixed=5)}, max_steps=1)
    with pytest.raises(ValueError, match="A newer trainer was made for this model"):
        older.train()


# ---- saved files ----


@pytest.mark.distributed
def test_saved_model_is_a_plain_model(tmp_path):
    trainer = run(tmp_path, trainer_args={"mixing": DenseMultiMix(num_mixed=20, alpha=(0.5, 2.0))}, max_steps=2)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(tags="digits")
    images = digits.dataset(1000, 1010)[:]["pixel_values"]
    torch.save(images, tmp_path / "images.pt")
    script = """
import sys
sys.modules["mm_hf"] = None  # importing it fails
import torch
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained(sys.argv[1])
torch.save(model(torch.load(sys.argv[1] + "/images.pt")).logits, sys.argv[1] + "/logits.pt")
"""
    threads = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums depend on the number of threads
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, cwd=tmp_path, env=threads)
    with torch.no_grad():
        expected = trainer.model.eval()(images).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=0, atol=0)
    assert load_mixing(tmp_path) == trainer.mixing
    saved = json.loads((tmp_path / "mixing.json").read_text())
    assert saved["locations"]["source"] == "vit"
    assert "mm_hf" not in json.loads((tmp_path / "config.json").read_text())
    card = (tmp_path / "README.md").read_text()
    assert "A `ViTForImageClassification`, trained from scratch with DenseMultiMix" in card
    assert "- dense-multimix\n" in card and "- digits\n" in card and "| `alpha` | `[0.5, 2.0]` |" in card


# ---- user errors ----


def test_user_errors_are_raised_before_training(tmp_path):
    def trains(message, model=None, train=None, mixing=DENSE, **more):
        with pytest.raises(ValueError, match=message):
            run(tmp_path, model=model, train=train, trainer_args={"mixing": mixing, **more}, max_steps=1).train()

    rows = [{"pixel_values": row["pixel_values"], "labels": row["label"]} for row in digits.dataset(0, 8)]
    trains("has no labels", train=[{"pixel_values": row["pixel_values"]} for row in rows])
    trains("Give class indices as integers", train=[{**row, "labels": float(row["labels"])} for row in rows])
    trains("Label 12 does not fit ViTForImageClassification", train=[{**row, "labels": 12} for row in rows])
    trains("10 classes in its column 'label'", model=digits.vit(num_labels=4))
    late = digits.dataset(0, 64).cast_column("label", __import__("datasets").Value("int64"))
    late = late.with_format(None).map(lambda row, i: {"label": 11 if i == 63 else 1}, with_indices=True)
    trains("Label 11 does not fit", train=late.with_format("torch"))
    trains("There is no mixing method 'mixmax'", mixing="mixmax")
    trains("mixing must be a method", mixing=3)
    trains("compute_loss_func cannot be combined", compute_loss_func=lambda *_: None)
    multi = digits.vit(problem_type="multi_label_classification")
    trains("configured for multi_label_classification", model=multi, train=rows)
    trains("already wrapped", model=_wrapped())


def _wrapped():
    from mm_hf import wrap_model

    model = digits.vit()
    wrap_model(model, DENSE)
    return model


def test_compute_loss_func_works_with_erm(tmp_path):
    def weighted(outputs, labels, num_items_in_batch=None):
        return F.cross_entropy(outputs.logits, labels, weight=torch.linspace(1, 2, 10))

    results = []
    for trainer_class, extra in [(Trainer, {}), (MultiMixTrainer, {"mixing": ERM()})]:
        trainer = run(tmp_path, trainer_class, digits.vit(), trainer_args={**extra, "compute_loss_func": weighted})
        trainer.train()
        results.append(digits.weights(trainer.model))
    digits.same_weights(*results)


# ---- batch sizes and arguments ----


def test_batch_size_that_trainer_reduces_to_one_is_rejected(tmp_path):
    """`auto_find_batch_size` halves the batch size when memory is full."""
    model = digits.vit()

    def full(module, inputs):
        if model.training and len(inputs[0]) > 1:
            raise RuntimeError("CUDA out of memory.")

    model.vit.embeddings.register_forward_pre_hook(full)
    for mixing in (MultiMix(num_mixed=5), Mixup(), DENSE):
        trainer = run(tmp_path, model=model, trainer_args={"mixing": mixing}, auto_find_batch_size=True, max_steps=1)
        with pytest.raises(ValueError, match="per_device_train_batch_size is 1, and .*at least 2"):
            trainer.train()
    run(tmp_path, model=model, trainer_args={"mixing": ERM()}, auto_find_batch_size=True, max_steps=1).train()


def test_only_training_needs_two_examples(tmp_path):
    rows = digits.dataset(0, 4, extra=False)
    args = digits.arguments(tmp_path, per_device_train_batch_size=1, per_device_eval_batch_size=1)
    evaluated = MultiMixTrainer(digits.vit(), args, mixing=DENSE, eval_dataset=rows).evaluate()
    assert evaluated["eval_loss"] == Trainer(digits.vit(), args, eval_dataset=rows).evaluate()["eval_loss"]
    with pytest.raises(ValueError, match="per_device_train_batch_size is 1"):
        MultiMixTrainer(digits.vit(), args, mixing=DENSE, train_dataset=rows)


def test_positional_arguments_are_in_the_order_of_trainer(tmp_path):
    rows, args = digits.dataset(0, 8, extra=False), digits.arguments(tmp_path)
    collator = transformers_default_collator
    trainer = MultiMixTrainer(digits.vit(), args, collator, rows, rows, mixing=MultiMix(num_mixed=5))
    assert (trainer.data_collator, trainer.train_dataset, trainer.eval_dataset) == (collator, rows, rows)
    with pytest.raises(ValueError, match="compute_loss_func cannot be combined"):
        MultiMixTrainer(digits.vit(), args, collator, rows, rows, None, None, lambda *_: None)
