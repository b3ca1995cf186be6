"""Read a checkpoint's weights back into a model, all of them or not at all."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import nn

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def is_plain_checkpoint(model: nn.Module, directory: str | Path) -> bool:
    """Whether a directory holds all weights of a Transformers model that is neither adapted, sharded nor quantised."""
    from transformers import PreTrainedModel

    return (
        isinstance(model, PreTrainedModel)
        and getattr(model, "quantization_method", None) is None
        and any((Path(directory) / name).is_file() for name in WEIGHT_FILES)
    )


def load_weights(model: nn.Module, directory: str | Path) -> None:
    """Load weights the way `from_pretrained` does, which knows the names that older files use.

    Transformers 5 renames parameters of some architectures (ViT among them) when it loads a model and gives them their
    old names back when it saves it. Trainer's own `load_state_dict` does neither and takes no offence at keys that are
    missing, so that a resumed training silently goes on from fresh weights.

    Raises:
        RuntimeError: Weights of the model are missing in the checkpoint, or do not fit.
    """
    cls: Any = type(model)
    loaded, info = cls.from_pretrained(
        directory, config=copy.deepcopy(model.config), dtype=model.dtype, output_loading_info=True
    )
    refuse_missing(directory, {*info["missing_keys"], *info["mismatched_keys"], *info["unexpected_keys"]})
    model.load_state_dict(loaded.state_dict())


def refuse_missing(directory: str | Path | None, keys: set[Any]) -> None:
    """Raise a RuntimeError that names the keys, if there are any."""
    if keys:
        names = sorted(map(str, keys))
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        where = "" if directory is None else f" {directory}"
        raise RuntimeError(
            f"The checkpoint{where} does not fit the model: {shown} would not be restored. Going on would train from "
            "fresh weights; check that the model is of the class and size that the checkpoint was saved from."
        )
