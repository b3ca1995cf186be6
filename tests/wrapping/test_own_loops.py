"""Trainings in which mixing does not happen, or whose loss is not finite: an error or one warning, never nothing."""

import copy
import logging
import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import ViTForImageClassification

from mm_hf import ERM, CutMix, DenseMultiMix, ManifoldMixup, Mixup, MultiMix, RecursiveMix, TransMix, wrap_model
from mm_hf.wrapping.finite import SCALER_STEPS, LossRecord, NonFiniteLossError, nonfinite_weight
from tests.helpers import models

DENSE = DenseMultiMix(num_mixed=5, input_mixing="none")


@pytest.fixture
def warnings(caplog):
    """Return a function that returns the warnings of mm_hf since its last call."""

    def messages():
        found = [r.getMessage() for r in caplog.records if r.name.startswith("mm_hf") and r.levelno >= logging.WARNING]
        caplog.clear()
        return found

    logging.getLogger("mm_hf").setLevel(logging.WARNING)
    return messages


def batch(name="vit"):
    return {**models.batch(name), "labels": models.labels()}


def train(model, loss_of, steps=3):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()


# ---- mixing that does not happen ----


def outside(model):
    return F.cross_entropy(model(**models.batch("vit")).logits, models.labels())


def discarded(model):
    return F.cross_entropy(model(**batch()).logits, models.labels())


def summed(model):
    return model(**batch()).loss + model(**batch()).loss


@pytest.mark.parametrize(
    ("loss_of", "message"),
    [
        (outside, "was called in training mode without labels: nothing is mixed"),
        (discarded, "no backward pass used the loss that it returned: nothing is mixed"),
        (lambda model: model(**batch()).loss, None),
        (summed, None),
        (lambda model: model(**batch()).loss + F.mse_loss(model(**models.batch("vit")).logits, torch.ones(6, 5)), None),
    ],
    ids=["outside", "discarded", "used", "summed", "with an unlabeled term"],
)
@pytest.mark.parametrize("mixing", [DENSE, Mixup(), ERM()], ids=lambda mixing: mixing.name)
def test_loop_that_does_not_use_the_loss_of_the_model_is_reported_once(warnings, loss_of, message, mixing):
    model = models.build("vit").train()
    wrap_model(model, mixing)
    train(model, loss_of)
    found = warnings()
    if message is None or type(mixing) is ERM:
        assert found == []
    else:
        assert len(found) == 1 and message in found[0]


@pytest.mark.parametrize(
    ("mixing", "inputs", "reason"),
    [
        (DENSE, {"pixel_values": models.batch("vit", b=1)["pixel_values"], "labels": models.labels(1)}, "one example"),
        (DENSE, {**models.batch("vit"), "labels": torch.full((6,), -100)}, "all labels were ignored"),
        (Mixup(), {**models.batch("vit"), "labels": torch.full((6,), -100)}, "all labels were ignored"),
        (
            MultiMix(pooled_weight=0.0, input_mixing="mixup", input_mixing_start=9),
            batch(),
            "input mixing did not begin",
        ),
        (DenseMultiMix(dense_weight=0.0, input_mixing="mixup", input_mixing_prob=0.0), batch(), "probability 0"),
    ],
)
def test_training_that_mixes_nothing_is_reported_at_its_end(warnings, mixing, inputs, reason):
    model = models.build("vit").train()
    with wrap_model(model, mixing):
        for _ in range(3):
            model(**inputs).loss.backward()
        assert not any("mixed no mini-batch" in message for message in warnings())
    (found,) = warnings()
    assert f"The training with {mixing.name} mixed no mini-batch" in found and reason in found


@pytest.mark.parametrize(
    "mixing", [DENSE, MultiMix(num_mixed=5), Mixup(), CutMix(), TransMix(), ManifoldMixup(), ERM()]
)
def test_training_that_mixes_is_not_reported(warnings, mixing):
    with wrap_model(models.build("vit").train(), mixing) as handle:
        model = handle._state.model
        for _ in range(3):
            model(**batch()).loss.backward()
        model(pixel_values=torch.zeros(1, 3, 32, 32), labels=torch.zeros(1, dtype=torch.long)).loss.backward()
    assert warnings() == []


def test_recursivemix_mixes_from_the_second_mini_batch_on(warnings):
    for steps, mixed in [(1, False), (8, True)]:
        model = models.build("vit").train()
        with wrap_model(model, RecursiveMix()):
            for _ in range(steps):
                model(**batch()).loss.backward()
        assert (warnings() == []) == mixed


def test_wrapping_that_no_forward_of_the_model_used_is_reported(warnings):
    model = models.build("vit").train()
    with wrap_model(model, DENSE):
        copy.deepcopy(model)(**batch()).loss.backward()
    assert "no training step computed its loss from labels that the model received" in warnings()[0]


def test_training_of_the_model_inside_of_a_wrapped_adapter_is_reported_once(warnings):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(models.build("vit").train(), peft.LoraConfig(target_modules=["q_proj"]))
    wrap_model(adapted, DENSE)
    train(adapted, lambda model: model(**batch()).loss)
    assert warnings() == []
    merged = adapted.merge_and_unload().requires_grad_(True)
    train(merged, lambda model: model(**batch()).loss)
    (found,) = warnings()
    assert "ViTForImageClassification inside of it was called in training mode: nothing is mixed" in found


# ---- the model's own loss ----


class Weighted(ViTForImageClassification):
    def forward(self, pixel_values, labels=None, **kwargs):
        output = super().forward(pixel_values, **kwargs)
        if labels is not None:
            output.loss = F.cross_entropy(output.logits, labels, weight=torch.linspace(1, 5, 5))
        return output


def focal(logits, labels, *args, **kwargs):
    loss = F.cross_entropy(logits, labels, reduction="none")
    return ((1 - (-loss).exp()) ** 2 * loss).mean()


def test_loss_function_that_the_user_has_set_is_rejected():
    model = models.build("vit").train()
    model.loss_function = focal
    with pytest.raises(ValueError, match="ViTForImageClassification.loss_function was set to focal"):
        wrap_model(model, DENSE)
    del model._loss_function
    wrap_model(model, DENSE)
    model.loss_function = focal  # after wrapping
    with pytest.raises(ValueError, match="loss_function was set to focal"):
        model(**batch())


def test_model_with_another_loss_is_reported_once(warnings):
    model = Weighted(models.build("vit").config).train()
    wrap_model(model, DENSE)
    train(model, lambda model: model(**batch()).loss)
    (found,) = warnings()
    assert "the model computes another loss (class weights, focal loss" in found


@pytest.mark.parametrize("name", sorted(models.MODELS))
def test_own_loss_of_a_classifier_is_not_reported(warnings, name):
    model = models.build(name).train()
    with wrap_model(model, Mixup()):
        model(**batch(name)).loss.backward()
    assert warnings() == []


# ---- outputs ----


@pytest.mark.parametrize("name", ["vit", "bert"])
@pytest.mark.parametrize("mixing", [DENSE, Mixup(), ManifoldMixup()], ids=lambda mixing: mixing.name)
def test_outputs_of_mixed_inputs_are_marked(name, mixing):
    model = models.build(name).train()
    wrap_model(model, mixing)
    outputs = model(**batch(name))
    assert getattr(outputs, "mixed_inputs", None) == (None if mixing is DENSE else mixing.name)
    assert len(model(**batch(name), return_dict=False)) == 2 and not hasattr(
        model.eval()(**batch(name)), "mixed_inputs"
    )
    # DistributedDataParallel rebuilds the outputs from their leaves.
    leaves, structure = tree_flatten(outputs)
    assert tree_unflatten(leaves, structure).keys() == outputs.keys()


# ---- losses that are not finite ----


class Overflowing(DenseMultiMix):
    """Dense MultiMix with an infinite dense term in the third mini-batch."""

    def loss(self, *args, **kwargs):
        result = super().loss(*args, **kwargs)
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 3:
            result.logs["loss_dense"] = result.logs["loss_dense"] * math.inf
            result.loss = result.loss * math.inf
        return result


def test_loss_that_is_not_finite_stops_the_training_at_its_step():
    model = models.build("vit").train()
    wrap_model(model, Overflowing(num_mixed=5, input_mixing="none"))
    with pytest.raises(
        NonFiniteLossError, match=r"step 3 is not finite \(loss inf, clean \d.*dense inf\), after \d"
    ) as e:
        train(model, lambda model: model(**batch()).loss, steps=9)
    assert "The logits of the examples are finite, but those of their locations are not" in str(e.value)
    assert nonfinite_weight(model) is None


def test_message_names_the_input_or_the_weight_that_is_not_finite():
    model = models.build("vit").train()
    wrap_model(model, DENSE)
    images = models.batch("vit")["pixel_values"]
    model(pixel_values=images, labels=models.labels()).loss.backward()
    images[2, 0, 0, 0] = math.nan
    with pytest.raises(NonFiniteLossError, match="The input pixel_values contains NaN: check the preprocessing"):
        model(pixel_values=images, labels=models.labels())
    model.classifier.weight.data[1, 1] = math.inf
    with pytest.raises(NonFiniteLossError, match="classifier.weight is not finite since an earlier step: lower the"):
        model(**batch())


@pytest.mark.parametrize("mixing", [DENSE, Mixup(), ManifoldMixup()], ids=lambda mixing: mixing.name)
def test_nan_before_the_first_step_is_named(mixing):
    model, inputs = models.build("vit").train(), batch()
    wrap_model(model, mixing)
    inputs["pixel_values"][1, 0, 3, 3] = math.nan
    with pytest.raises(ValueError, match="The input pixel_values of the first mini-batch contains NaN"):
        model(**inputs)
    model.vit.layernorm.bias.data[3] = math.nan
    with pytest.raises(ValueError, match="The weight vit.layernorm.bias of ViTForImageClassification is NaN before"):
        model(**batch())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_record_reports_the_first_loss_that_is_not_finite_when_it_is_read(bad):
    record = LossRecord()
    for step in range(1, 8):
        value = torch.tensor(bad if step in (4, 6) else float(step))
        record.add(step, {"loss": value, "clean": torch.tensor(1.0)})
    with pytest.raises(
        NonFiniteLossError, match="training loss of step 4 is not finite .*, after 3 in an earlier step"
    ):
        record.check()
    record.check()  # nothing new


def test_losses_in_float16_may_be_skipped_but_not_in_every_step(warnings):
    record = LossRecord()
    for step in range(200):
        record.add(step, {"loss": torch.tensor(math.nan if step % 3 else 1.0)}, scaled=True)
    record.check()
    for step in range(SCALER_STEPS):
        record.add(step, {"loss": torch.tensor(math.inf)}, scaled=True)
    with pytest.raises(NonFiniteLossError, match=f"and so were the {SCALER_STEPS - 1} losses before"):
        record.check()


def test_gradient_scaler_skips_steps_that_are_not_finite():
    model = models.build("vit").train()
    wrap_model(model, DENSE)
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.01), torch.amp.GradScaler("cpu")
    for step in range(6):
        inputs = batch()
        if step in (2, 3):
            inputs["pixel_values"] = inputs["pixel_values"] * 1e38
        with torch.autocast("cpu", torch.float16):
            loss = model(**inputs).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert scaler.get_scale() <= 65536 / 4 and nonfinite_weight(model) is None


def test_handle_reports_the_losses_that_are_read_later(monkeypatch):
    """On a GPU and with several ranks, reading them in each step would wait for the device."""
    model = models.build("vit").train()
    handle = wrap_model(model, Overflowing(num_mixed=5, input_mixing="none"))
    monkeypatch.setattr("mm_hf.wrapping.state.MixingState.check_loss", lambda *_: None)
    train(model, lambda model: model(**batch()).loss, steps=2)
    handle.check_losses()
    train(model, lambda model: model(**batch()).loss, steps=2)
    with pytest.raises(NonFiniteLossError, match="training loss of step 3 is not finite"):
        handle.check_losses()
    train(model, lambda model: model(**batch()).loss, steps=1)
    with pytest.raises(NonFiniteLossError, match="training loss of step 5 is not finite"):
        handle.pop_logs()
