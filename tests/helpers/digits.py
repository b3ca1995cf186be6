"""Small training sets of scikit-learn's digits, and tiny models for them."""

import functools

import torch
from datasets import ClassLabel, Dataset
from sklearn.datasets import load_digits
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification

from mm_hf import MultiMixTrainer

digits = functools.cache(load_digits)


@functools.cache
def dataset(start=0, stop=96, extra=True):
    data = digits()
    columns = {
        "pixel_values": (data.images[start:stop, None] / 8 - 1).astype("float32").tolist(),
        "label": data.target[start:stop].tolist(),
    }
    if extra:
        columns["writer"] = [f"writer {i}" for i in range(start, stop)]
    return Dataset.from_dict(columns).cast_column("label", ClassLabel(num_classes=10)).with_format("torch")


def vit(seed=0, dropout=0.0, **changes):
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=8,
        patch_size=2,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        **{"num_labels": 10, "num_channels": 1, **changes},
    )
    return ViTForImageClassification(config)


def arguments(directory, **changes):
    defaults = {
        "output_dir": str(directory),
        "per_device_train_batch_size": 32,
        "num_train_epochs": 1,
        "learning_rate": 1e-3,
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "seed": 7,
    }
    return TrainingArguments(**{**defaults, **changes})


def weights(model):
    return {name: p.detach().clone() for name, p in model.state_dict().items()}


def same_weights(a, b, rtol=0.0, atol=0.0):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def run(directory, trainer_class=MultiMixTrainer, model=None, train=None, trainer_args=None, **args):
    model = vit() if model is None else model
    trainer = trainer_class(
        model=model,
        args=arguments(directory, **args),
        train_dataset=dataset() if train is None else train,
        eval_dataset=dataset(1000, 1040),
        **(trainer_args or {}),
    )
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
