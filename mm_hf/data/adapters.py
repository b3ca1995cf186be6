"""LoRA adapters of PEFT, added to a pretrained model for training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..training.pretrained import read_adapter
from .options import LoraOptions

if TYPE_CHECKING:
    from transformers import Trainer

    from ..comparison import Task


def head_modules(model: Any) -> list[str]:
    """Return the names of the modules of a classification model outside of its base model: those of the head."""
    return [
        name
        for name, child in model.named_children()
        if child is not model.base_model and next(child.parameters(), None) is not None
    ]


def add_lora(model: Any, lora: LoraOptions, kind: str) -> Any:
    """Return the PEFT model that trains only a LoRA adapter and the head, which PEFT saves with the adapter.

    Args:
        model: Pretrained classification model.
        lora: Rank, scale and adapted modules; the rank is set.
        kind: "image" or "text".

    Raises:
        ValueError: The model has no such modules.
    """
    from peft import LoraConfig, get_peft_model

    heads = head_modules(model)
    config = LoraConfig(
        task_type="SEQ_CLS" if kind == "text" else None,
        r=int(lora.lora_r or 0),
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=lora.lora_target_modules or "all-linear",
        exclude_modules=heads,
        modules_to_save=heads,
    )
    return get_peft_model(model, config)


def with_lora(task: Task, lora: LoraOptions) -> Task:
    """Return a task whose models have a LoRA adapter."""
    make = task.model_init
    return replace(task, model_init=lambda: add_lora(make(), lora, task.settings["inputs"]))


def save_classes(trainer: Trainer) -> None:
    """Save the configuration of an adapted model beside its adapter, which does not name the classes."""
    if trainer.is_world_process_zero():
        adapted: Any = trainer.model
        adapted.config.save_pretrained(str(trainer.args.output_dir))


def find_adapter_changes(checkpoint: Path, lora: LoraOptions) -> list[str]:
    """Return the LoRA settings of a checkpoint that differ from the given ones, as sentences."""
    saved = read_adapter(checkpoint) or {}
    names = {"r": "lora_r", "lora_alpha": "lora_alpha"} if saved and lora.lora_r else {"r": "lora_r"}
    changes = {name: (saved.get(key), getattr(lora, name)) for key, name in names.items()}
    return [f"{name}={old}, which is now {new}" for name, (old, new) in changes.items() if old != new]
