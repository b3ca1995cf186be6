"""Small batches for a probe, made from a batch of the data loader."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .plan import LocationError
from .pools import MASKS

PROBE_EXAMPLES = 4
SHORTENED, REORDERED = PROBE_EXAMPLES - 2, PROBE_EXAMPLES - 1  # the examples that `varied_examples` changes
NOT_INPUTS = ("labels", "num_items_in_batch")
SHORTEST = 6  # texts of fewer tokens are not varied


def batch_size(inputs: Mapping[str, Any]) -> int:
    """Return the number of examples in the keyword arguments of a forward.

    Raises:
        ValueError: No argument is a tensor with a batch dimension.
    """
    batch = next((len(v) for v in inputs.values() if isinstance(v, Tensor) and v.ndim > 0), None)
    if batch is None:
        raise ValueError(f"The inputs {sorted(inputs)} contain no tensor with a batch dimension.")
    return batch


def pad_id(model: nn.Module) -> int | None:
    """Return the id of the padding token, or None if the model's config has none."""
    config = config_of(model)
    return getattr(config.get_text_config() if hasattr(config, "get_text_config") else config, "pad_token_id", None)


def config_of(model: nn.Module | None) -> Any:
    """Return the configuration of a model, or None if it has none."""
    return getattr(model, "config", None)


def num_labels_of(model: nn.Module) -> int:
    """Return the number of labels of a model: that of its config, or else the outputs of its last linear layer.

    Raises:
        LocationError: The model has neither.

    Example:
        >>> num_labels_of(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3)))
        3
    """
    found = getattr(config_of(model), "num_labels", None)
    if found is None:
        outputs = [m.out_features for m in model.modules() if isinstance(getattr(m, "out_features", None), int)]
        found = outputs[-1] if outputs else None
    if not isinstance(found, int):
        raise LocationError(
            f"The number of classes of {type(model).__name__} is unknown: set model.config = "
            "transformers.PretrainedConfig(num_labels=...) to your number of classes."
        )
    return found


def few_examples(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the first examples of a batch, without labels."""
    batch = batch_size(inputs)
    # Clone, because tensors created in inference mode cannot be used in a backward pass.
    return {
        k: v[:PROBE_EXAMPLES].clone() if _has_examples(v, batch) else v
        for k, v in inputs.items()
        if k not in NOT_INPUTS
    }


def distinct_examples(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a few examples, the shortest and the longest among them, with masks that are all ones.

    Masks are set to ones because they are the same in all blocks and cannot be exchanged at one of them.
    """
    batch = batch_size(inputs)
    masks = [inputs[k] for k in MASKS if isinstance(inputs.get(k), Tensor) and inputs[k].ndim == 2]
    order = masks[0].sum(dim=1).argsort() if masks else torch.arange(batch)
    half = PROBE_EXAMPLES // 2
    chosen = torch.cat([order[:half], order[half:][-half:]])
    few = {k: v[chosen.to(v.device)] if _has_examples(v, batch) else v for k, v in inputs.items()}
    return {k: torch.ones_like(v) if k in MASKS and isinstance(v, Tensor) else v for k, v in few.items()}


def varied_examples(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a batch in which different pools read different tokens, or None if the inputs cannot be varied.

    In a batch without padding, the last token, the last word and the end-of-sentence token coincide; in later batches
    they may not. One example is shortened and padded. In another one, the end-of-sentence token is moved forward and
    the last token is masked.
    """
    batch = batch_size(inputs)
    repeated = {
        k: v[torch.arange(PROBE_EXAMPLES, device=v.device) % batch] if _has_examples(v, batch) else v
        for k, v in inputs.items()
    }
    ids = repeated.get("input_ids")
    if isinstance(ids, Tensor) and ids.ndim == 2:
        return _vary_text(repeated, ids, pad_id(model))
    return _shorten_masks(repeated)


def _shorten_masks(inputs: dict[str, Any]) -> dict[str, Any] | None:
    """Mask the last third of two examples."""
    name = mask_name(inputs)
    if name is None:
        return None
    mask = inputs[name].clone()
    mask[SHORTENED:, 2 * mask.shape[1] // 3 :] = 0
    return {**inputs, name: mask}


def _vary_text(inputs: dict[str, Any], ids: Tensor, pad: int | None) -> dict[str, Any] | None:
    length = ids.shape[1]
    name = mask_name(inputs)
    if name is not None and inputs[name].shape != ids.shape:
        name = None
    mask = torch.ones_like(ids).bool() if name is None else inputs[name].bool()
    shortened, reordered = mask[SHORTENED].nonzero()[:, 0], mask[REORDERED].nonzero()[:, 0]
    if min(len(shortened), len(reordered)) < SHORTEST:
        return None
    order = torch.arange(length, device=ids.device).repeat(PROBE_EXAMPLES, 1)  # where each position's token comes from
    # Remove two tokens from the middle, so that the first and the last ones stay.
    middle = len(shortened) // 2
    kept = torch.cat([shortened[: middle - 1], shortened[middle + 1 :]])
    pads_left = bool((~mask[:, 0]).any())
    place = slice(length - len(kept), length) if pads_left else slice(0, len(kept))
    order[SHORTENED, place] = kept
    padding = torch.zeros_like(mask)
    padding[SHORTENED] = True
    padding[SHORTENED, place] = False
    order[REORDERED, reordered[-3:]] = reordered[[-1, -3, -2]]

    varied = dict(inputs)
    for key, value in inputs.items():
        if isinstance(value, Tensor) and value.shape[:2] == ids.shape:
            index = order.view(*order.shape, *[1] * (value.ndim - 2)).expand_as(value)
            varied[key] = value.gather(1, index)
    if pad is not None:
        varied["input_ids"] = varied["input_ids"].masked_fill(padding, pad)
    if name is not None:
        varied[name] = varied[name].masked_fill(padding, 0)
        varied[name][REORDERED, reordered[-1]] = 0
    return varied


def mask_name(inputs: Mapping[str, Any]) -> str | None:
    """Return the name of the attention mask (b, n) among the keyword arguments of a forward, or None."""
    return next((k for k in MASKS if isinstance(inputs.get(k), Tensor) and inputs[k].ndim == 2), None)


def _has_examples(x: Any, batch: int) -> bool:
    return isinstance(x, Tensor) and x.ndim > 0 and len(x) == batch
