"""Random sequences of what a user does with one model, against a model that was never wrapped."""

import copy
import logging
import pickle
import tempfile

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule
from transformers import Trainer

from mm_hf import ERM, DenseMultiMix, ManifoldMixup, Mixup, MultiMixTrainer, wrap_model
from tests.helpers import digits
from tests.wrapping.test_state import LORA, traces

peft = pytest.importorskip("peft")
METHODS = {
    "erm": ERM(),
    "dense": DenseMultiMix(num_mixed=5, input_mixing="none"),
    "mixup": Mixup(),
    "manifold": ManifoldMixup(),
}
DATA = digits.dataset(0, 8, extra=False)
INPUTS = {"pixel_values": DATA[:]["pixel_values"], "labels": DATA[:]["label"]}


def step(model, loss):
    """Take a step of gradient descent, and return the loss."""
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
    return loss.detach()


def seeded(function, *args, **kwargs):
    torch.manual_seed(5)
    return function(*args, **kwargs)


class OneModel(RuleBasedStateMachine):
    """`model` is wrapped and trained, `plain` is a model with the same weights that was never wrapped."""

    def __init__(self):
        super().__init__()
        self.model, self.plain = digits.vit(), digits.vit()
        self.handle, self.trainers = None, []

    @property
    def is_adapted(self):
        return isinstance(self.model, peft.PeftModel)

    def replace(self, change):
        self.model, self.plain = (seeded(change, model) for model in (self.model, self.plain))

    @rule(method=st.sampled_from(sorted(METHODS)))
    def wrap(self, method):
        if self.handle is None:
            self.handle = wrap_model(self.model, METHODS[method])
        else:
            with pytest.raises(ValueError, match="already wrapped with .* by wrap_model"):
                wrap_model(self.model, METHODS[method])

    @rule()
    def remove(self):
        if self.handle is not None:
            self.handle.remove()
            self.handle = None
            assert traces(self.model) == []

    @rule()
    def train_step(self):
        loss = seeded(self.model.train(), **INPUTS).loss
        plain = self.plain.train()
        if self.handle is None:
            expected = seeded(plain, **INPUTS).loss
        else:
            with wrap_model(plain, self.handle.mixing):
                expected = seeded(plain, **INPUTS).loss
        torch.testing.assert_close(loss, expected)
        step(self.model, loss), step(self.plain, expected)

    @rule()
    def evaluate(self):
        with torch.no_grad():
            found, expected = (m.eval()(pixel_values=INPUTS["pixel_values"]) for m in (self.model, self.plain))
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)

    @rule(function=st.sampled_from([copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]))
    def go_on_with_a_copy(self, function):
        self.replace(function)
        self.handle = None
        assert traces(self.model) == []

    @precondition(lambda self: not self.is_adapted)
    @rule()
    def add_adapter(self):
        self.replace(lambda model: peft.get_peft_model(model, peft.LoraConfig(**LORA)))

    @precondition(lambda self: self.is_adapted)
    @rule(merges=st.booleans())
    def end_adapter(self, merges):
        if self.handle is not None:  # else it would stay on the adapted model
            self.remove()
        self.replace(lambda model: model.merge_and_unload() if merges else model.unload())
        for model in (self.model, self.plain):
            model.requires_grad_(True)

    @rule(method=st.sampled_from(sorted(METHODS)))
    def train_with_a_trainer(self, method):
        mixing = METHODS[method]
        with tempfile.TemporaryDirectory() as directory:
            args = digits.arguments(directory, max_steps=1, label_names=["labels"], per_device_train_batch_size=8)
            if self.handle is not None:
                with pytest.raises(ValueError, match="already wrapped with .* by wrap_model"):
                    MultiMixTrainer(self.model, args, mixing=mixing, train_dataset=DATA)
                return
            trainer = MultiMixTrainer(self.model, args, mixing=mixing, train_dataset=DATA)
            trainer.train()
            if method == "erm":
                Trainer(self.plain, args, train_dataset=DATA).train()
            else:
                reference = MultiMixTrainer(self.plain, args, mixing=mixing, train_dataset=DATA)
                reference.train()
                reference.mixing_handle.remove()
        self.trainers.append(trainer)

    @rule()
    def train_with_an_earlier_trainer(self):
        if self.trainers and self.trainers[-1].mixing_handle is not None:
            trainer = self.trainers[-1]
            if not trainer.mixing_handle.installed:
                with pytest.raises(ValueError, match="A newer trainer was made for this model"):
                    trainer.train()

    def teardown(self):
        logging.getLogger("mm_hf").setLevel(logging.WARNING)


OneModel.TestCase.settings = settings(
    max_examples=8, stateful_step_count=10, deadline=None, suppress_health_check=list(HealthCheck)
)
test_sequences_of_wrapping_training_copying_and_adapting = pytest.mark.filterwarnings("ignore")(OneModel.TestCase)
