"""Loading the weights of a checkpoint into a model without missing any."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

INDEX_SUFFIX = ".index.json"
WEIGHT_FILES = (
    "model.safetensors",
    f"model.safetensors{INDEX_SUFFIX}",
    "pytorch_model.bin",
    f"pytorch_model.bin{INDEX_SUFFIX}",
)
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")

logger = logging.getLogger(__name__)


class WeightsError(RuntimeError, ValueError):
    """The weights of a checkpoint do not fit a model. `Trainer` raises a RuntimeError; a user error is a ValueError."""


def first_lines(error: RuntimeError) -> str:
    """Return the first error of PyTorch's list of errors in loading a state dict, and the number of the others.

    Example:
        >>> first_lines(RuntimeError("Error(s) in loading state_dict for A:\\n\\tsize mismatch for x.\\n\\tfor y."))
        'size mismatch for x (and 1 more)'
    """
    heading, *errors = str(error).strip().split("\n\t")
    if not errors:
        return heading.rstrip(".")
    return errors[0].strip().rstrip(".") + (f" (and {len(errors) - 1} more)" if len(errors) > 1 else "")


def shards(index: Path) -> list[Path]:
    """Return the files that an index of sharded weights lists."""
    return [index.parent / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]


def is_plain_checkpoint(model: nn.Module, directory: str | Path) -> bool:
    """Return True if a directory has all weights of a model: it is no adapter and not quantized."""
    return getattr(model, "quantization_method", None) is None and _weight_file(directory) is not None


def load_weights(model: nn.Module, directory: str | Path) -> None:
    """Load the weights of a checkpoint into a model in place, each tensor in its own precision.

    Transformers 5 renames parameters of some architectures, for example ViT, when it loads a model, and restores the
    old names when it saves one. Trainer's own `load_state_dict` does neither and ignores missing keys, so that a
    resumed training run silently starts from new weights. Here, keys of the checkpoint that the model does not have are
    converted as `from_pretrained` converts them. The model is not built again: its head, its class and its precisions
    can differ from those of its config.

    Args:
        model: The model to load into.
        directory: The checkpoint.

    Raises:
        WeightsError: Weights of the model are missing in the checkpoint or have other shapes there.
    """
    file = _weight_file(directory)
    if file is None:
        raise WeightsError(f"The checkpoint {directory} has no weights of a complete model.")
    saved = read_weights(file)
    own = model.state_dict(keep_vars=True)
    others = {name: saved.pop(name) for name in saved.keys() - own.keys()}
    converted, unexpected = _convert(model, others) if others else ({}, set())
    saved |= converted
    raise_if_missing(directory, _missing(model, own, saved))
    if unexpected:  # for example of an older version of the class
        logger.warning("The model has no weights %s, which are in %s.", ", ".join(sorted(unexpected)), directory)
    try:
        model.load_state_dict(saved, False)
    except RuntimeError as error:  # other shapes, unless the model's own `load_state_dict` accepts them
        raise WeightsError(
            f"The checkpoint {directory} does not fit the model: {first_lines(error)}. Use a model of the class and "
            "size that it was saved from."
        ) from error


def read_weights(file: Path) -> dict[str, Tensor]:
    """Read a file of weights, or all files of an index, to the CPU."""
    if file.name.endswith(INDEX_SUFFIX):
        return {name: value for shard in shards(file) for name, value in read_weights(shard).items()}
    if file.suffix == ".safetensors":
        return load_file(file)
    return dict(torch.load(file, map_location="cpu", weights_only=True))


def raise_if_missing(directory: str | Path | None, keys: Iterable[str]) -> None:
    """Raise a WeightsError that names the keys, if there are any."""
    names = sorted(keys)
    if names:
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        where = "" if directory is None else f" {directory}"
        raise WeightsError(
            f"The checkpoint{where} does not fit the model: {shown} would not be restored, and training would start "
            "from new weights. Use a model of the class and size that the checkpoint was saved from."
        )


def _weight_file(directory: str | Path) -> Path | None:
    return next((file for name in WEIGHT_FILES if (file := Path(directory) / name).is_file()), None)


def _missing(model: nn.Module, own: dict[str, Tensor], saved: dict[str, Tensor]) -> list[str]:
    """Return the weights that are not saved, neither by their name nor by that of a tied weight."""
    restored = {id(own[name]) for name in saved.keys() & own.keys()}
    missing = [name for name, value in own.items() if name not in saved and id(value) not in restored]
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    return [name for name in missing if name not in ignored]


def _convert(model: nn.Module, saved: dict[str, Tensor]) -> tuple[dict[str, Tensor], set[str]]:
    """Convert weights with the names of a saved model to those of the model in memory, as `from_pretrained` does.

    Transformers puts converted weights into a model as new parameters. The model's own parameters, which optimizers
    and tied weights refer to, are put back.

    Returns:
        The weights with the names of the model, and the names that the model does not have.
    """
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    if not isinstance(model, PreTrainedModel):
        return {}, set(saved)
    own = model.state_dict(keep_vars=True)
    conversions = model.__dict__.get("_weight_conversions")
    try:
        mapping: Any = get_model_conversion_mapping(model)
        config = LoadStateDictConfig(weight_mapping=mapping)
        info, _ = convert_and_load_state_dict_in_model(model, dict(saved), config)
        converted = {
            name: value.detach() for name, value in model.state_dict(keep_vars=True).items() if value is not own[name]
        }
    finally:
        model.__dict__["_weight_conversions"] = conversions
        for name, value in own.items():
            module, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(module), attribute, value)
    return converted, info.unexpected_keys
