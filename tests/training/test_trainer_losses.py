"""Losses and weights of a training equal those of plain Trainer, or of a computation by hand."""

import pytest
import torch
from torch.nn import functional as F
from transformers import Trainer
from transformers import default_data_collator as transformers_default_collator

from mm_hf import ERM, DenseMultiMix, Mixup, MultiMix, MultiMixTrainer
from tests.helpers import digits, models
from tests.helpers.digits import losses, run

DENSE = DenseMultiMix(num_mixed=20)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("name", ["vit", "bert"])
def test_erm_equals_plain_trainer_with_and_without_accumulation(tmp_path, accumulation, name):
    """Including BERT, whose loss under accumulation is wrong in plain Trainer because it ignores num_items_in_batch."""
    results = []
    for trainer_class, extra in [(Trainer, {}), (MultiMixTrainer, {"mixing": ERM()})]:
        model, train = digits.vit(), digits.dataset()
        if name == "bert":
            batch = models.batch("bert", b=96)
            model = models.build("bert", scale=False)
            train = [{"labels": i % 5, **{k: v[i] for k, v in batch.items()}} for i in range(96)]
        size = 32 // accumulation
        trainer = run(
            tmp_path,
            trainer_class,
            model,
            train,
            extra,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
        )
        trainer.train()
        results.append((digits.weights(model), losses(trainer)))
    digits.same_weights(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_accumulated_erm_equals_the_complete_batch(tmp_path):
    results = []
    for size in (32, 8):
        model = digits.vit()
        args = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 32 // size, "optim": "sgd"}
        run(tmp_path, model=model, trainer_args={"mixing": ERM()}, **args).train()
        results.append(digits.weights(model))
    digits.same_weights(*results, rtol=1e-4, atol=1e-6)


class Halved(ERM):
    """ERM with half the loss."""

    def loss(self, *args, **how):
        return type(found := super().loss(*args, **how))(found.loss / 2)


def test_subclass_of_erm_trains_with_its_own_loss(tmp_path):
    results = []
    for mixing in (ERM(), Halved()):
        trainer = run(tmp_path, trainer_args={"mixing": mixing}, max_steps=1)
        trainer.train()
        results.append(losses(trainer)[0])
    assert results[1] == pytest.approx(results[0] / 2, rel=1e-4)


class Fixed(MultiMix):
    """MultiMix with the same factors in each mini-batch, so that the accumulated gradient can be computed by hand."""

    def sample(self, num_examples, device, generator=None):
        generator = torch.Generator().manual_seed(0)
        return torch.rand(num_examples, 20, generator=generator).softmax(dim=0)


def test_mixing_loss_is_accumulated_as_a_mean_over_mini_batches(tmp_path):
    model, by_hand = digits.vit(), digits.vit()
    data = digits.dataset(0, 32, extra=False)
    method = Fixed(num_mixed=20, clean_weight=0.5)
    trainer = run(
        tmp_path,
        model=model,
        train=data,
        trainer_args={"mixing": method},
        per_device_train_batch_size=8,
        gradient_accumulation_steps=4,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        train_sampling_strategy="sequential",
    )
    trainer.train()
    total = 0
    for start in range(0, 32, 8):
        images, labels = (data[start : start + 8][k] for k in ("pixel_values", "label"))
        logits = by_hand(images).logits
        factors = method.sample(8, "cpu")
        targets = factors.T @ F.one_hot(labels, 10).float()
        mixed = -(targets * (factors.T @ logits).log_softmax(-1)).sum(-1).mean()
        total = total + (0.5 * F.cross_entropy(logits, labels) + mixed) / 4
    total.backward()
    with torch.no_grad():
        for parameter in by_hand.parameters():
            parameter -= 0.1 * parameter.grad
    digits.same_weights(digits.weights(model), digits.weights(by_hand), rtol=1e-5, atol=1e-6)
    assert losses(trainer) == [pytest.approx(float(total.detach()), abs=1e-4)]


def test_label_smoothing_is_applied_by_the_mixing_loss(tmp_path):
    trainer = run(tmp_path, label_smoothing_factor=0.3, trainer_args={"mixing": Fixed()}, max_steps=1)
    plain = run(tmp_path, trainer_args={"mixing": Fixed()}, max_steps=1)
    trainer.train(), plain.train()
    images, labels = (digits.dataset()[:][k] for k in ("pixel_values", "label"))
    logits = digits.vit()(
        images[:1]
    ).logits  # nearly uniform for a new model, so that smoothing changes the loss little
    assert abs(losses(trainer)[0] - losses(plain)[0]) < 0.5 and losses(trainer)[0] != losses(plain)[0]
    assert F.cross_entropy(logits, labels[:1], label_smoothing=0.3).isfinite()


class MixingCollator:
    """Collator with mixup of the labels. Trainer also uses it in evaluation, unless the examples name their split."""

    def __init__(self, everywhere):
        self.everywhere = everywhere

    def __call__(self, rows):
        batch = transformers_default_collator([{k: v for k, v in row.items() if k != "train"} for row in rows])
        if self.everywhere or rows[0]["train"]:
            targets = F.one_hot(batch["labels"], 10).float()
            batch["labels"] = 0.7 * targets + 0.3 * targets.roll(1, 0)
        return batch


@pytest.mark.parametrize("everywhere", [True, False], ids=["soft labels in evaluation", "class indices in evaluation"])
@pytest.mark.parametrize("mixing", [DENSE, Mixup()], ids=lambda m: m.name)
def test_soft_labels_of_a_collator_train_by_cross_entropy_and_evaluate_as_in_trainer(tmp_path, mixing, everywhere):
    data = digits.dataset(0, 32, extra=False)
    train, test = (
        [{"pixel_values": row["pixel_values"], "labels": int(row["label"]), "train": split} for row in data]
        for split in (True, False)
    )
    args = digits.arguments(
        tmp_path, max_steps=3, per_device_train_batch_size=16, eval_strategy="steps", eval_steps=1, save_strategy="no",
        remove_unused_columns=False,
    )  # fmt: skip
    model = digits.vit()
    trainer = MultiMixTrainer(model, args, MixingCollator(everywhere), train, test, mixing=mixing)
    trainer.train()
    terms = [e.get("loss_clean", e.get("loss_mixup")) for e in trainer.state.log_history if "loss" in e]
    assert min(terms) > 1.5  # cross-entropy of 10 classes, and not the mean of 10 binary ones
    plain = digits.vit()
    plain.load_state_dict(model.state_dict())
    expected = Trainer(plain, args, MixingCollator(everywhere), None, test).evaluate()["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == expected
    assert model.config.problem_type == plain.config.problem_type
