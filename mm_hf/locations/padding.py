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
from .probe_inputs import mask_name, pad_id
from .recording import Recording, original_forward
from .tolerance import tolerance


def _stride(mask: Tensor, n: int) -> int:
    return math.ceil(mask.shape[1] / n)


# Maps from the mask (b, m) of the input to that of n tokens.
MAPS: dict[str, Callable[[Tensor, int], Tensor]] = {
    # Other tokens follow, as those of an image.
    "first": lambda mask, n: F.pad(mask, (0, n - mask.shape[1]), value=True),
    # Virtual tokens of a prompt come first.
    "last": lambda mask, n: F.pad(mask, (n - mask.shape[1], 0), value=True),
    # After the first one, each token was pooled from as many; a token is padding if the last of these is.
    "strided": lambda mask, n: mask[:, :: _stride(mask, n)],
    "windows": lambda mask, n: F.pad(mask[:, _stride(mask, n) - 1 :: _stride(mask, n)], (1, 0), value=True)[:, :n],
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
    # Texts of consecutive lengths, so that no two maps agree on all of them.
    m, pad = ids.shape[1], pad_id(recording.model)
    mask = torch.arange(m, device=ids.device) < m // 2 + torch.arange(len(ids), device=ids.device)[:, None]
    inputs = {**recording.inputs, key: mask.to(recording.inputs[key].dtype)}
    inputs["input_ids"] = ids if pad is None else ids.masked_fill(~mask, pad)
    before, after = (_tokens_at(recording, inputs, plan, shifted) for shifted in (torch.zeros_like(mask), ~mask))
    padding = (before - after).abs().amax(dim=-1) > tolerance(before.dtype, slack=10) * before.abs().max()
    if not padding.any():
        return ""
    for name in MAPS:
        found = mapped_mask(inputs, n, name)
        if found is not None and torch.equal(~found, padding):
            return name
    raise LocationError(
        f"{type(recording.model).__name__} computes {n} tokens of texts of {ids.shape[1]}, and which of them are "
        "padding is unknown. MultiMix() needs the logits only and works with this model."
    )


def _tokens_at(recording: Recording, inputs: dict[str, Any], plan: Plan, shifted: Tensor) -> Tensor:
    """Return the tokens at a plan's source in one forward with other embeddings at the positions `shifted` (b, m).

    The embeddings are the first result with one vector per position.
    """
    model, stored = recording.model, list[Tensor]()

    def shift(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        direction = torch.linspace(-1, 1, output.shape[-1], dtype=output.dtype, device=output.device)
        return output + shifted[..., None] * direction

    def store(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        found = (args[0] if args else next(iter(kwargs.values()))) if plan.side == "input" else output
        stored.append(found if plan.side == "input" or plan.key is None else output[plan.key])

    embeds = next(c.name for c in recording.calls if c.result is not None and c.result.shape[:2] == shifted.shape)
    handles = [
        model.get_submodule(embeds).register_forward_hook(shift),
        model.get_submodule(plan.source).register_forward_hook(store, with_kwargs=True),
    ]
    try:
        with probing_mode(model), torch.no_grad():
            original_forward(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return as_tokens(stored[-1], plan.layout)
