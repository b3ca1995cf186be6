"""`MultiMixTrainer(mixing=ERM())` does what plain `Trainer` does, in situations that Transformers' own tests cover."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, EarlyStoppingCallback, Trainer, TrainerCallback

from mm_hf import ERM, MultiMixTrainer
from tests.helpers import digits

TIMES = ("runtime", "per_second", "total_flos")
ADDED = {"mixing.json", "SHA256SUMS"}
ROWS = [{"x": torch.tensor([i / 32.0, 1.0 - i / 64]), "labels": torch.tensor(i % 3)} for i in range(32)]
TEXTS = [{"input_ids": torch.arange(5, 14) + i % 7, "labels": i % 3} for i in range(32)]


class Module(nn.Module):
    """A model that is no `PreTrainedModel`, and records the order of the examples in a buffer that grows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.2), nn.Linear(4, 3))
        self.register_buffer("order", torch.zeros(0))

    def load_state_dict(self, state_dict, strict=True):
        self.order = torch.empty_like(state_dict.get("order", self.order))
        return super().load_state_dict(state_dict, strict)

    def forward(self, x, labels=None):
        if self.training:
            self.order = torch.cat([self.order, x[:, 0].detach()])
        logits = self.layer(x)
        return {"loss": None if labels is None else nn.functional.cross_entropy(logits, labels), "logits": logits}


def text_model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return BertForSequenceClassification(BertConfig(vocab_size=40, num_labels=3, **sizes))


class OutOfMemory(TrainerCallback):
    """Fail like a GPU without enough memory, for batches of more than two examples."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.train_batch_size > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate")


class Runs:
    """Training runs of one kind of trainer in one directory."""

    def __init__(self, plain, text, directory):
        self.plain, self.text, self.directory = plain, text, directory

    def train(self, resume=None, callbacks=None, frozen=False, model=None, **options):
        options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 9, "learning_rate": 0.1, **options}
        options = {"per_device_train_batch_size": 4, "logging_steps": 2, **options}
        arguments = digits.arguments(options.pop("where", self.directory), **options)
        model = model or (text_model() if self.text else Module())
        if frozen:
            next(model.parameters()).requires_grad_(False)
        rows = TEXTS if self.text else ROWS
        given = {"train_dataset": rows, "eval_dataset": rows[:8], "callbacks": callbacks}
        given["compute_metrics"] = lambda p: {"right": float((p.predictions.argmax(-1) == p.label_ids).mean())}
        made = (
            Trainer(model, arguments, **given)
            if self.plain
            else MultiMixTrainer(model, arguments, mixing=ERM(), **given)
        )
        made.train(resume_from_checkpoint=resume)
        return made

    def checkpoint(self, step):
        return str(self.directory / f"checkpoint-{step}")


def resume_in_an_epoch(runs):
    runs.train()
    return runs.train(resume=runs.checkpoint(3))


def resume_after_an_epoch(runs):
    runs.train(max_steps=12)
    return runs.train(resume=runs.checkpoint(9), max_steps=12)


def resume_the_newest(runs):
    runs.train(max_steps=6)
    return runs.train(resume=True)


def resume_elsewhere(runs):
    runs.train(max_steps=6)
    return runs.train(resume=runs.checkpoint(6), where=runs.directory / "other")


def resume_with_another_batch_size(runs):
    runs.train(max_steps=3)
    return runs.train(resume=True, per_device_train_batch_size=8, gradient_accumulation_steps=2, seed=3)


def resume_an_accumulated_run(runs):
    runs.train(gradient_accumulation_steps=2)
    return runs.train(resume=runs.checkpoint(3), gradient_accumulation_steps=2)


def resume_frozen_parameters(runs):
    runs.train(frozen=True)
    return runs.train(resume=runs.checkpoint(3), frozen=True)


def resume_sharded_weights(runs):
    runs.train()
    if runs.text:
        (runs.directory / "checkpoint-3" / "model.safetensors").unlink()
        saved = text_model()
        saved.save_pretrained(runs.directory / "checkpoint-3", max_shard_size="2KB")
    return runs.train(resume=runs.checkpoint(3))


def resume_the_model_only(runs):
    runs.train(save_only_model=True)
    return runs.train(resume=True, save_only_model=True, max_steps=12)


def resume_without_random_state(runs):
    runs.train(max_steps=6)
    (runs.directory / "checkpoint-6" / "rng_state.pth").unlink()
    return runs.train(resume=runs.checkpoint(6))


def find_a_batch_size_and_resume(runs):
    runs.train(callbacks=[OutOfMemory()], auto_find_batch_size=True, max_steps=6)
    return runs.train(resume=True, auto_find_batch_size=True)


def load_the_best_model(runs):
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 3, "save_total_limit": 1}
    options |= {"metric_for_best_model": "right"}
    return runs.train(callbacks=[EarlyStoppingCallback(1)], **options)


def replace_a_run(runs):
    runs.train()
    return runs.train(max_steps=6, seed=11)


def resume_nothing(runs):
    return runs.train(resume=True)


def resume_a_missing_checkpoint(runs):
    runs.train(max_steps=3)
    return runs.train(resume=runs.checkpoint("3-bogus"))


def resume_without_weights(runs):
    runs.train(max_steps=3)
    (runs.directory / "checkpoint-3" / "model.safetensors").unlink()
    return runs.train(resume=runs.checkpoint(3))


SITUATIONS = [
    resume_in_an_epoch, resume_after_an_epoch, resume_the_newest, resume_elsewhere, resume_with_another_batch_size,
    resume_an_accumulated_run, resume_frozen_parameters, resume_sharded_weights, resume_the_model_only,
    resume_without_random_state, find_a_batch_size_and_resume, load_the_best_model, replace_a_run,
]  # fmt: skip
ERRORS = {
    resume_nothing: "No valid checkpoint found in output directory",
    resume_a_missing_checkpoint: "Can't find a valid checkpoint at",
    resume_without_weights: "Can't find a valid checkpoint at",
}


def history(trainer):
    return [{k: v for k, v in entry.items() if not k.endswith(TIMES)} for entry in trainer.state.log_history]


def files(directory):
    return {
        str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file() and path.name not in ADDED
    }


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_plain_training_is_that_of_trainer(situation, text, tmp_path):
    plain = situation(Runs(True, text, tmp_path / "output"))
    (tmp_path / "output").rename(tmp_path / "plain")  # the same directory, so that the states have the same paths
    own = situation(Runs(False, text, tmp_path / "output"))
    digits.same_weights(digits.weights(own.model), digits.weights(plain.model))
    assert history(own) == history(plain)
    assert files(tmp_path / "output") == files(tmp_path / "plain")
    for name in ("global_step", "epoch", "train_batch_size", "best_metric", "best_model_checkpoint", "max_steps"):
        assert getattr(own.state, name) == getattr(plain.state, name), name


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("situation", ERRORS)
def test_errors_begin_with_the_words_of_trainer(situation, plain, tmp_path):
    with pytest.raises(ValueError, match=f"^{ERRORS[situation]}"):
        situation(Runs(plain, False, tmp_path))
