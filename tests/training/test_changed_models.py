"""A trainer whose model changes between two trainings trains the model that it has then."""

import peft
import pytest
import torch
from torch import nn
from transformers import Trainer

from mm_hf import ERM, CutMix, DenseMultiMix, MultiMix, MultiMixTrainer
from tests.helpers import digits

DENSE = DenseMultiMix(num_mixed=8, input_mixing="none")


def make(directory, mixing=DENSE, cls=MultiMixTrainer, **changes):
    args = digits.arguments(directory, max_steps=2, per_device_train_batch_size=8, **changes)
    options = {} if mixing is None else {"mixing": mixing}
    return cls(digits.vit(), args, train_dataset=digits.dataset(0, 16), **options)


def train_again(trainer):
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def replace_model(trainer):
    trainer.model = trainer.model_wrapped = digits.vit(seed=4)


def replace_head(trainer):
    torch.manual_seed(0)
    trainer.model.classifier = nn.Sequential(nn.Linear(32, 20), nn.GELU(), nn.Linear(20, 10))


def replace_norm(trainer):
    trainer.model.vit.layernorm = nn.LayerNorm(32)


def add_adapter(trainer):
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    trainer.model = trainer.model_wrapped = peft.get_peft_model(trainer.model, config)


def merge_adapter(trainer):
    add_adapter(trainer)
    train_again(trainer)
    trainer.model = trainer.model_wrapped = trainer.model.merge_and_unload()
    trainer.model.requires_grad_(True)


CHANGES = [replace_model, replace_head, replace_norm, add_adapter, merge_adapter]


@pytest.mark.parametrize("change", CHANGES)
def test_changed_model_is_trained_with_mixing(change, tmp_path):
    trainer = make(tmp_path)
    trainer.train()
    change(trainer)
    logs = train_again(trainer)
    assert len(logs) == 2 and all("loss_dense" in entry and "loss_clean" in entry for entry in logs)
    evaluated = trainer.evaluate(digits.dataset(0, 16))["eval_loss"]
    plain = Trainer(trainer.model, digits.arguments(tmp_path)).evaluate(digits.dataset(0, 16))["eval_loss"]
    assert evaluated == plain


@pytest.mark.parametrize("change", [replace_model, replace_head, replace_norm])
def test_changed_model_is_trained_by_erm_as_by_trainer(change, tmp_path):
    weights = []
    for cls, mixing in ((Trainer, None), (MultiMixTrainer, ERM())):
        trainer = make(tmp_path, mixing, cls)
        trainer.train()
        change(trainer)
        train_again(trainer)
        weights.append(digits.weights(trainer.model))
    digits.same_weights(*weights)


def test_replaced_model_leaves_the_earlier_one_plain(tmp_path):
    trainer = make(tmp_path)
    earlier = trainer.model
    trainer.train()
    replace_model(trainer)
    train_again(trainer)
    assert "forward" not in earlier.__dict__ and not any("mm_hf" in name for name in earlier.__dict__)


@pytest.mark.parametrize("mixing", [DENSE, MultiMix(num_mixed=8)])
@pytest.mark.parametrize("after", [nn.Tanh(), nn.Softmax(dim=-1)])
def test_head_that_is_replaced_by_one_that_cannot_be_mixed_is_rejected(mixing, after, tmp_path):
    trainer = make(tmp_path, mixing)
    trainer.train()
    trainer.model.classifier = nn.Sequential(nn.Linear(32, 10), after)
    with pytest.raises(ValueError, match="does not end in a linear layer"):
        train_again(trainer)


def test_labels_of_a_head_with_more_classes_are_valid(tmp_path):
    trainer = make(tmp_path)
    trainer.train()
    trainer.model.classifier = nn.Linear(32, 12)
    trainer.model.num_labels = trainer.model.config.num_labels = 12
    trainer.train_dataset = [{"pixel_values": torch.randn(1, 8, 8), "labels": i % 12} for i in range(12)]
    assert len(train_again(trainer)) == 2


def test_unchanged_model_is_probed_once(tmp_path, monkeypatch):
    """A compiled model has the hooks of its first call."""
    trainer = make(tmp_path, torch_compile=True, torch_compile_backend="eager")
    trainer.train()
    monkeypatch.setattr("mm_hf.wrapping.state.probe_with_size", lambda *args: pytest.fail("probed again"))
    assert all("loss_dense" in entry for entry in train_again(trainer))


@pytest.mark.parametrize("mixing", [DENSE, MultiMix(num_mixed=8), CutMix()])
def test_model_without_trainable_parameters_is_rejected(mixing, tmp_path):
    trainer = make(tmp_path, mixing)
    trainer.model.requires_grad_(False)
    with pytest.raises(ValueError, match="No parameter of the ViTForImageClassification requires a gradient: set"):
        trainer.train()
