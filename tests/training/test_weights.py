"""Weights of a checkpoint are restored bit for bit, whatever the model is."""

import functools

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForSequenceClassification,
    Trainer,
    ViTForImageClassification,
)

from mm_hf import ERM, DenseMultiMix, MultiMixTrainer
from mm_hf.training.weights import load_weights
from tests.helpers import digits


def bert(seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return BertForSequenceClassification(BertConfig(vocab_size=40, num_labels=3, **sizes))


def replaced_head(model):
    width = model.classifier.in_features
    model.classifier = nn.Sequential(nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, model.config.num_labels))
    return model


class ArgumentsForImageClassification(ViTForImageClassification):
    """A class whose constructor takes more than a config."""

    def __init__(self, config, width, *, extra):
        super().__init__(config)
        self.extra = nn.Linear(width, extra)


class Composed(nn.Module):
    """A module that is no Transformers model and contains one."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, pixel_values, labels=None):
        return self.inner(pixel_values=pixel_values, labels=labels)


class FloatLinear(nn.Linear):
    def forward(self, features):
        return super().forward(features.float())


def mixed_precision(model):
    model.to(torch.bfloat16)
    model.classifier = FloatLinear(model.classifier.in_features, model.config.num_labels)
    return model


def mixtral(seed):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = MixtralConfig(vocab_size=20, intermediate_size=16, num_local_experts=2, num_labels=3, **sizes)
    return MixtralForSequenceClassification(config)


def gpt2(seed):
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=16, n_layer=1, n_head=2))


MODELS = {
    "plain": bert,
    "renamed": digits.vit,  # the names in files are not those in memory
    "replaced head": lambda seed: replaced_head(bert(seed)),
    "renamed, replaced head": lambda seed: replaced_head(digits.vit(seed)),
    "constructor with arguments": lambda seed: ArgumentsForImageClassification(digits.vit(seed).config, 4, extra=3),
    "mixed precision": lambda seed: mixed_precision(bert(seed)),
    "renamed, mixed precision": lambda seed: mixed_precision(digits.vit(seed)),
    "tied": gpt2,
    "merged experts": mixtral,
    "no Transformers model": lambda seed: Composed(digits.vit(seed)),
}


def save(model, directory, **options):
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(directory, **options)
    else:  # as Trainer does
        directory.mkdir(exist_ok=True)
        save_file(model.state_dict(), directory / "model.safetensors", metadata={"format": "pt"})


def check_restored(model, directory, expected):
    before = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    load_weights(model, directory)
    assert {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)} == before  # the optimizer's
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert state[name].dtype == value.dtype and torch.equal(state[name], value), name


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_restored_bit_for_bit(name, tmp_path):
    saved, model = MODELS[name](0), MODELS[name](1)
    save(saved, tmp_path)
    check_restored(model, tmp_path, saved.state_dict())


@pytest.mark.parametrize("name", ["plain", "renamed", "merged experts"])
def test_sharded_weights_are_restored_bit_for_bit(name, tmp_path):
    saved, model = MODELS[name](0), MODELS[name](1)
    save(saved, tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    check_restored(model, tmp_path, saved.state_dict())


def test_weights_of_older_files_are_restored(tmp_path):
    saved = bert(0)
    torch.save(saved.state_dict(), tmp_path / "pytorch_model.bin")
    check_restored(bert(1), tmp_path, saved.state_dict())


@pytest.mark.parametrize("name", ["plain", "renamed", "renamed, replaced head", "merged experts"])
def test_each_missing_weight_raises_an_error(name, tmp_path):
    save(MODELS[name](0), tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    for lost in tensors:
        save_file({k: v for k, v in tensors.items() if k != lost}, file, metadata={"format": "pt"})
        with pytest.raises(RuntimeError, match="would not be restored"):
            load_weights(MODELS[name](1), tmp_path)


def test_weights_of_another_shape_raise_an_error(tmp_path):
    save(digits.vit(), tmp_path)
    for other in ({"num_labels": 4}, {"hidden_size": 16}):
        model = digits.vit()
        model = ViTForImageClassification(type(model.config)(**{**model.config.to_dict(), "id2label": None, **other}))
        with pytest.raises(RuntimeError, match="does not fit the model"):
            load_weights(model, tmp_path)


class Growing(nn.Module):
    """A model that adapts a buffer to the checkpoint, as some do with statistics of the data."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(0))

    def load_state_dict(self, state_dict, strict=True):
        self.seen = torch.empty_like(state_dict["seen"])
        return super().load_state_dict(state_dict, strict)


def test_the_models_own_loading_is_used(tmp_path):
    save_file({"seen": torch.arange(3.0)}, tmp_path / "model.safetensors")
    model = Growing()
    load_weights(model, tmp_path)
    assert model.seen.tolist() == [0, 1, 2]


def test_weights_that_the_model_does_not_have_are_reported(tmp_path, caplog):
    saved = bert(0)
    save_file({**saved.state_dict(), "bert.old.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    check_restored(bert(1), tmp_path, saved.state_dict())
    assert [record.message for record in caplog.records] == [
        f"The model has no weights bert.old.weight, which are in {tmp_path}."
    ]


# ---- Training runs ----

DENSE = DenseMultiMix(num_mixed=10)


def adapted(name):
    """Return a function that builds a model with an adapter of a name. Only one named "default" is saved at the top."""

    def build(seed):
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["classifier"])
        model = digits.vit(seed)
        return peft.get_peft_model(model, config, adapter_name=name)

    return build


TRAINED = {
    "renamed": (digits.vit, DENSE),
    "replaced head": (MODELS["replaced head"], ERM()),
    "renamed, replaced head": (MODELS["renamed, replaced head"], ERM()),
    "constructor with arguments": (MODELS["constructor with arguments"], DENSE),
    "mixed precision": (MODELS["mixed precision"], ERM()),
    "no Transformers model": (MODELS["no Transformers model"], ERM()),
    "adapter": (adapted("default"), DENSE),
    "named adapter": (adapted("other"), DENSE),
}
TEXTS = [{"input_ids": torch.arange(5, 14) + i % 7, "labels": i % 3} for i in range(16)]
BEST = {
    "load_best_model_at_end": True,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "metric_for_best_model": "epoch",
    "greater_is_better": False,
}


class First(MultiMixTrainer):
    """A trainer whose first evaluation is the best one."""

    def evaluate(self, *args, **kwargs):
        return {**super().evaluate(*args, **kwargs), "eval_epoch": self.state.epoch}


def train(name, directory, steps, resume=False, plain=False, **options):
    build, mixing = TRAINED[name]
    rows = TEXTS if name in ("replaced head", "mixed precision") else digits.dataset(0, 32, extra=False)
    options = {"max_steps": steps, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2, **options}
    arguments = digits.arguments(directory, per_device_train_batch_size=8, lr_scheduler_type="constant", **options)
    make = Trainer if plain else functools.partial(First, mixing=mixing)
    trainer = make(build(3), arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("name", TRAINED)
def test_resumed_training_is_bit_identical(name, tmp_path):
    expected = digits.weights(train(name, tmp_path / "complete", 4).model)
    train(name, tmp_path / "parts", 2)
    digits.same_weights(digits.weights(train(name, tmp_path / "parts", 4, resume=True).model), expected)
    if name == "replaced head":  # plain Trainer restores this one, too
        checkpoint = str(tmp_path / "parts" / "checkpoint-2")
        digits.same_weights(digits.weights(train(name, tmp_path / "plain", 4, checkpoint, plain=True).model), expected)


@pytest.mark.parametrize("name", TRAINED)
def test_the_best_model_is_restored_bit_for_bit(name, tmp_path):
    expected = digits.weights(train(name, tmp_path / "first", 2).model)
    trainer = train(name, tmp_path / "best", 4, **BEST)
    assert trainer.state.best_global_step == 2 and trainer.state.global_step == 4
    digits.same_weights(digits.weights(trainer.model), expected)
