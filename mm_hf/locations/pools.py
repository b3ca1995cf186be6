"""Pools: the tokens that a head reads, by a name that can be printed and saved.

token[k]         token k; negative k counts from the end
token[last]      the last token in the attention mask
token[last!=i]   the last token whose id is not i (decoders: i is the padding token)
token[last==i]   the last token whose id is i (BART, T5: i is the end-of-sentence token)
token[after!=i]  the token after token[last!=i], if there is one (encoder-decoders, whose decoder reads shifted text)
mean[k:]         mean of the tokens from k on; mean[:k]: of the first k tokens
max[k:]          maximum of each feature over the tokens from k on
avgmax[k:]       mean of max[k:] and mean[k:]
mean[mask]       mean of the tokens in the attention mask
mean[nonzero]    mean of the tokens that are not zero (wav2vec 2.0 sets padding to zero)
module[0:]       all tokens, which the first module of the head pools itself: by attention, or as their maximum
p|q              two pools, concatenated
p+q              pools of two heads whose logits are averaged, in the order of the heads
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

MASKS = ("attention_mask", "pixel_attention_mask", "padding_mask")


MODULE_POOL = "module[0:]"


def attended(inputs: Mapping[str, Any], tokens: Tensor) -> Tensor:
    """Return the attention mask (b, n) of tokens (b, n, ...); all True if the inputs have no mask for n tokens."""
    for name in MASKS:
        mask = inputs.get(name)
        if isinstance(mask, Tensor) and mask.shape == tokens.shape[:2]:
            return mask.bool()
    return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)


def pool_tokens(tokens: Tensor, pool: str, inputs: Mapping[str, Any]) -> Tensor:
    """Pool tokens (b, n, d) into (b, d), or into (b, 2 d) for two pools joined by "|"."""
    if "|" in pool:
        return torch.cat([pool_tokens(tokens, part, inputs) for part in pool.split("|")], dim=-1)
    rows = pool_rows(tokens, pool, inputs)
    if pool.startswith("token"):
        return tokens[torch.arange(len(tokens), device=tokens.device), rows.int().argmax(dim=1)]
    weights = rows.to(tokens.dtype)[..., None]
    mean = (tokens * weights).sum(dim=1) / weights.sum(dim=1)
    if pool.startswith("mean"):
        return mean
    largest = tokens.masked_fill(~rows[..., None], -torch.inf).amax(dim=1)
    return largest if pool.startswith("max") else (mean + largest) / 2


def pool_rows(tokens: Tensor, pool: str, inputs: Mapping[str, Any]) -> Tensor:
    """Return the mask (b, n) of the tokens (b, n, d) that a pool reads."""
    for joint in ("+", "|"):
        if joint in pool:
            return torch.stack([pool_rows(tokens, part, inputs) for part in pool.split(joint)]).any(dim=0)
    b, n = tokens.shape[:2]
    position = torch.arange(n, device=tokens.device).expand(b, n)
    which = pool[pool.index("[") + 1 : -1]
    if which == "mask":
        return attended(inputs, tokens)
    if which == "nonzero":
        return tokens.detach().ne(0).any(dim=-1)
    if ":" in which:
        start, stop = (int(bound) if bound else default for bound, default in zip(which.split(":"), (0, n)))
        return (position >= start) & (position < stop)
    if which.startswith(("last", "after")):
        return position == _last(which, tokens, inputs)[:, None]
    return position == int(which) % n


def _last(which: str, tokens: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """Return the index (b,) of each example's last token of a kind, for padding on either side."""
    ids = inputs.get("input_ids")
    if which == "last":
        wanted = attended(inputs, tokens)
    elif ids is None:  # inputs_embeds: Transformers takes the very last token
        wanted = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    else:
        token = int(which[which.index("=") + 1 :].removeprefix("="))
        wanted = ids.eq(token) if "==" in which else ids.ne(token)
    n = wanted.shape[1]
    last = (wanted.long() * torch.arange(n, device=wanted.device)).argmax(dim=1)
    return (last + 1).clamp(max=n - 1) if which.startswith("after") else last
