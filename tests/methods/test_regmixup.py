"""RegMixup against two separate forwards of the model."""

import pytest
import torch
from torch.nn import functional as F

from mm_hf import MultiMixTrainer, RegMixup, wrap_model
from mm_hf.distributed import rank_generator
from mm_hf.methods import pairs
from tests.helpers import digits, models


def literal(model, name, labels, alpha, weight, seed):
    """Return the loss of the clean forward plus that of the mixed one, on the method's draws."""
    inputs = models.batch(name)
    torch.manual_seed(seed)
    generator = rank_generator("cpu")
    factor = pairs.draw_factor(alpha, generator)
    partner = pairs.draw_partners(len(labels), generator, labels.device)
    key = "pixel_values"
    if name == "bert":
        key = "inputs_embeds"
        inputs[key] = model.get_input_embeddings()(inputs.pop("input_ids"))
    mixed = {**inputs, key: factor * inputs[key] + (1 - factor) * inputs[key][partner]}
    if name == "bert":
        mixed["attention_mask"] = inputs["attention_mask"] | inputs["attention_mask"][partner]
    logits = model(**mixed).logits
    second = factor * F.cross_entropy(logits, labels) + (1 - factor) * F.cross_entropy(logits, labels[partner])
    return F.cross_entropy(model(**inputs).logits, labels) + weight * second


@pytest.mark.parametrize("name", ["vit", "bert"])
@pytest.mark.parametrize(("alpha", "weight"), [(20.0, 1.0), (0.4, 0.3), (10, 0)])
def test_loss_and_gradients_are_those_of_two_forwards(name, alpha, weight):
    model, twin, labels = models.build(name), models.build(name), models.labels()
    expected = literal(twin, name, labels, alpha, weight, seed=4)
    expected.backward()
    with wrap_model(model, RegMixup(alpha, weight)) as handle:
        torch.manual_seed(4)
        model.training = True
        output = model(**models.batch(name), labels=labels)
        output.loss.backward()
        model.training = False
        torch.testing.assert_close(output.loss, expected)
        for (key, ours), (_, theirs) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
            if theirs.grad is not None:
                torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=key)
        logs = handle.pop_logs()
        assert logs["loss_clean"] + weight * logs["loss_mixup"] == pytest.approx(output.loss.item(), rel=1e-5)
        assert output.logits.shape == (12, 5) and logs["loss_terms"] == 12
        assert torch.equal(model(**models.batch(name)).logits, models.build(name)(**models.batch(name)).logits)


@pytest.mark.parametrize("problem", [None, "multi_label_classification", "regression"])
def test_soft_and_other_labels_train(problem):
    labels = torch.rand(6, 5) if problem else torch.rand(6, 5).softmax(dim=1)
    model = models.build("vit", problem_type=problem).train()
    with wrap_model(model, RegMixup()):
        model(**models.batch("vit"), labels=labels).loss.backward()


def test_label_smoothing_applies_to_both_halves():
    model, labels = models.build("vit"), models.labels()
    with wrap_model(model, RegMixup(mixup_weight=0.0), label_smoothing=0.3):
        model.training = True
        loss = model(**models.batch("vit"), labels=labels).loss
        model.training = False
    torch.testing.assert_close(loss, F.cross_entropy(model(**models.batch("vit")).logits, labels, label_smoothing=0.3))


def test_trainer_trains_a_model_with_batch_normalization_and_smaller_last_mini_batches(tmp_path):
    from tests.methods.test_recursivemix import resnet

    args = digits.arguments(tmp_path, per_device_train_batch_size=10, max_steps=3)
    images = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 5} for i in range(24)]
    trainer = MultiMixTrainer(resnet(), args, mixing=RegMixup(), train_dataset=images)
    trainer.train()
    assert all(0 < loss < 20 for loss in digits.losses(trainer))


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf"), True, "1"])
def test_invalid_weight_is_rejected(weight):
    with pytest.raises(ValueError, match="mixup_weight must be a finite number of at least 0, got"):
        RegMixup(mixup_weight=weight)
    with pytest.raises(ValueError, match="alpha must be a positive number, got 0"):
        RegMixup(alpha=0)
