"""LoRA adapters of PEFT: added to a pretrained model for training, and merged into it when they are loaded."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import ADAPTER_FILE, LoraOptions

if TYPE_CHECKING:
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


def read_adapter(directory: str | Path) -> dict[str, Any] | None:
    """Return the configuration of the adapter in a directory, or None if the directory has none."""
    file = Path(directory) / ADAPTER_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def load_merged(load: Callable[[str], Any], directory: str, adapter: dict[str, Any]) -> Any:
    """Load the base model of an adapter, and merge the adapter into it.

    Args:
        load: Function that loads a model by name.
        directory: Directory of the adapter.
        adapter: Its configuration, from [`read_adapter`].

    Raises:
        ValueError: PEFT is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise ValueError(f"{directory} contains a PEFT adapter, and PEFT is not installed: pip install peft.")
    from peft import PeftModel

    base = load(str(adapter["base_model_name_or_path"]))
    return PeftModel.from_pretrained(base, directory).merge_and_unload()


def find_adapter_changes(checkpoint: Path, lora: LoraOptions) -> list[str]:
    """Return the LoRA settings of a checkpoint that differ from the given ones, as sentences."""
    saved = read_adapter(checkpoint) or {}
    names = {"r": "lora_r", "lora_alpha": "lora_alpha"} if saved and lora.lora_r else {"r": "lora_r"}
    changes = {name: (saved.get(key), getattr(lora, name)) for key, name in names.items()}
    return [f"{name}={old}, which is now {new}" for name, (old, new) in changes.items() if old != new]
