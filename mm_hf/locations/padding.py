"""Padding among tokens whose number differs from that of the attention mask, as in models that pool tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .modes import probing_mode
from .plan import LocationError, Plan, as_tokens
from .probe_inputs import mask_name
from .recording import Recording, original_forward
from .tolerance import tolerance

# Maps from the mask (b, m) of the input to that of n tokens.
MAPS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "first": lambda mask, n: F.pad(mask, (0, n - mask.shape[1]), value=True),  # other tokens follow, as of an image
    "strided": lambda mask, n: mask[:, :: math.ceil(mask.shape[1] / n)],  # tokens were pooled, all but the first one
}


def mapped_mask(inputs: Mapping[str, Any], n: int, name: str) -> Tensor | None:
    """Return the attention mask of the inputs for n tokens, by a map of `MAPS`, or None if it does not apply."""
    key = mask_name(inputs)
    if key is None or not name:
        return None
    mask = MAPS[name](inputs[key].bool(), n)
    return mask if mask.shape[1] == n else None


def find_padding_map(recording: Recording, plan: Plan, n: int) -> str:
    """Return the map of `MAPS` from the mask of texts to the n tokens at a plan's source, or "" if none is needed.

    Other embeddings in place of the padding change exactly the tokens that are padding.

    Raises:
        LocationError: No map explains which tokens change.
    """
    ids, key = recording.inputs.get("input_ids"), mask_name(recording.inputs)
    if ids is None or key is None or n == ids.shape[1] or recording.inputs[key].shape != ids.shape:
        return ""
    mask = recording.inputs[key].bool()
    before, after = (_tokens_at(recording, plan, shifted) for shifted in (torch.zeros_like(mask), ~mask))
    padding = (before - after).abs().amax(dim=-1) > tolerance(before.dtype, slack=10) * before.abs().max()
    if not padding.any():
        return ""
    for name in MAPS:
        found = mapped_mask(recording.inputs, n, name)
        if found is not None and torch.equal(~found, padding):
            return name
    raise LocationError(
        f"{type(recording.model).__name__} computes {n} tokens of texts of {ids.shape[1]}, and which of them are "
        "padding is unknown. MultiMix() needs the logits only and works with this model."
    )


def _tokens_at(recording: Recording, plan: Plan, shifted: Tensor) -> Tensor:
    """Return the tokens at a plan's source in one forward with other embeddings at the positions `shifted` (b, m)."""
    model, stored = recording.model, list[Tensor]()

    def shift(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        direction = torch.linspace(-1, 1, output.shape[-1], dtype=output.dtype, device=output.device)
        return output + shifted[..., None] * direction if output.shape[:2] == shifted.shape else output

    def store(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        found = (args[0] if args else next(iter(kwargs.values()))) if plan.side == "input" else output
        stored.append(found if plan.side == "input" or plan.key is None else output[plan.key])

    handles = [
        model.get_input_embeddings().register_forward_hook(shift),  # type: ignore[operator]
        model.get_submodule(plan.source).register_forward_hook(store, with_kwargs=True),
    ]
    try:
        with probing_mode(model), torch.no_grad():
            original_forward(model, recording.inputs)
    finally:
        for handle in handles:
            handle.remove()
    return as_tokens(stored[-1], plan.layout)
