"""A trainer whose model would not mix, or whose loss is not finite, stops or warns."""

import logging
import math

import pytest
import torch
from torch.nn import functional as F
from transformers import TrainerCallback

from mm_hf import ERM, DenseMultiMix, Mixup, MultiMix, MultiMixTrainer
from mm_hf.training.checkpoints import find_checkpoint_error, last_complete_checkpoint
from mm_hf.wrapping.finite import NonFiniteLossError, nonfinite_weight
from tests.helpers import digits
from tests.helpers.digits import losses, run

DENSE = DenseMultiMix(num_mixed=5, input_mixing="none")


def weighted(logits, labels):
    return F.cross_entropy(logits, labels, weight=torch.linspace(1, 2, 10))


class PopsLabels(MultiMixTrainer):
    """The class weights of Transformers' documentation."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = weighted(outputs.get("logits"), labels)
        return (loss, outputs) if return_outputs else loss


class DiscardsLoss(MultiMixTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = weighted(outputs.get("logits"), inputs["labels"])
        return (loss, outputs) if return_outputs else loss


class EveryOtherStep(PopsLabels):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.state.global_step % 2:
            return super().compute_loss(model, inputs, return_outputs)
        return MultiMixTrainer.compute_loss(self, model, inputs, return_outputs)


class Penalized(MultiMixTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        loss = loss + 0.1 * outputs["logits"].square().mean()
        return (loss, outputs) if return_outputs else loss


class CallsModel(MultiMixTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class OwnStep(MultiMixTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        loss.backward()
        return loss.detach()


@pytest.mark.parametrize("trainer_class", [PopsLabels, DiscardsLoss, EveryOtherStep])
@pytest.mark.parametrize("mixing", [DENSE, Mixup()], ids=lambda mixing: mixing.name)
def test_training_step_without_the_loss_of_the_method_raises(tmp_path, trainer_class, mixing):
    trainer = run(tmp_path, trainer_class, trainer_args={"mixing": mixing})
    with pytest.raises(ValueError, match=f"without the loss of {mixing.name}, so that nothing is mixed. compute_loss"):
        trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0  # not affected
    run(tmp_path, trainer_class, trainer_args={"mixing": ERM()}).train()


@pytest.mark.parametrize("trainer_class", [Penalized, CallsModel, OwnStep])
def test_subclasses_that_use_the_loss_of_the_method_train(tmp_path, trainer_class):
    trainer = run(tmp_path, trainer_class, trainer_args={"mixing": DENSE}, gradient_accumulation_steps=2)
    trainer.train()
    assert losses(trainer)[0] > 3 and trainer.unmixed is None  # a clean and a dense term
    assert trainer.state.log_history[0]["loss_dense"] > 2


def test_loss_function_that_is_set_later_raises_before_training(tmp_path):
    trainer = run(tmp_path, trainer_args={"mixing": DENSE})
    trainer.compute_loss_func = lambda *_: None
    with pytest.raises(ValueError, match="compute_loss_func cannot be combined"):
        trainer.train()
    model = digits.vit()
    model.loss_function = weighted
    with pytest.raises(ValueError, match="loss_function was set to weighted"):
        run(tmp_path, model=model, trainer_args={"mixing": DENSE})


@pytest.mark.parametrize(
    ("mixing", "rows", "batch_size", "reason"),
    [
        (
            MultiMix(pooled_weight=0.0, input_mixing="mixup", input_mixing_start=9.0),
            96,
            32,
            "input mixing did not begin",
        ),
        (DENSE, 1, 32, "every mini-batch had one example"),
        (DENSE, 96, 32, None),
    ],
)
def test_training_that_mixes_nothing_is_reported_once(tmp_path, caplog, mixing, rows, batch_size, reason):
    logging.getLogger("mm_hf").setLevel(logging.WARNING)
    options = {"per_device_train_batch_size": batch_size, "max_steps": 2}
    trainer = run(tmp_path, train=digits.dataset(0, rows), trainer_args={"mixing": mixing}, **options)
    trainer.train()
    found = [record.getMessage() for record in caplog.records if "mixed no mini-batch" in record.getMessage()]
    assert len(found) == (reason is not None) and all(reason in message for message in found)
    trainer.train(), trainer.mixing_handle.remove()
    found = [record.getMessage() for record in caplog.records if "mixed no mini-batch" in record.getMessage()]
    assert len(found) == 2 * (reason is not None)  # once per run


class Breaks(TrainerCallback):
    """Makes a weight infinite after a step, as a step that is too large does."""

    def __init__(self, step, value=math.inf):
        self.step, self.value = step, value

    def on_optimizer_step(self, args, state, control, model, **kwargs):
        if state.global_step + 1 == self.step:
            model.classifier.weight.data[0, 0] = self.value


@pytest.mark.parametrize("waits", [False, True], ids=["at once", "when logs are read"])
def test_loss_that_is_not_finite_stops_the_training_and_keeps_the_last_checkpoint(tmp_path, monkeypatch, waits):
    if waits:  # as on a GPU
        monkeypatch.setattr("mm_hf.wrapping.state.MixingState.check_loss", lambda *_: None)
    options = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 3, "max_steps": 8, "save_total_limit": 1}
    trainer = run(tmp_path, trainer_args={"mixing": DENSE, "callbacks": [Breaks(3)]}, **options)
    with pytest.raises(NonFiniteLossError, match=r"training loss of step 4 is not finite \(loss nan") as error:
        trainer.train()
    checkpoint = last_complete_checkpoint(tmp_path)
    assert checkpoint == tmp_path / "checkpoint-2" and str(error.value).endswith(f"checkpoint, {checkpoint}, was kept.")
    assert ("classifier.weight is not finite since an earlier step" in str(error.value)) != waits
    resumed = run(tmp_path, trainer_args={"mixing": DENSE}, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8 and nonfinite_weight(resumed.model) is None


def test_checkpoint_of_weights_that_are_not_finite_is_not_saved(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 8}
    trainer = run(tmp_path, trainer_args={"mixing": DENSE, "callbacks": [Breaks(4)]}, **options)
    with pytest.raises(NonFiniteLossError, match="The weight classifier.weight is not finite after step 4"):
        trainer.train()
    assert find_checkpoint_error(tmp_path / "checkpoint-2") is None and not (tmp_path / "checkpoint-4").exists()


def test_training_without_logs_is_checked_at_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr("mm_hf.wrapping.state.MixingState.check_loss", lambda *_: None)
    options = {"logging_strategy": "no", "max_steps": 4}
    trainer = run(tmp_path, trainer_args={"mixing": DENSE, "callbacks": [Breaks(2)]}, **options)
    with pytest.raises(NonFiniteLossError, match="training loss of step 3 is not finite .* No checkpoint was saved"):
        trainer.train()
