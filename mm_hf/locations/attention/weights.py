"""Which location of an example its label is about: the attention that the head's own token pays, and its stand-ins."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

KINDS = ("auto", "cls", "mean", "gap", "cam", "uniform")


def confidence(
    kind: str, row: Tensor | None, tokens: Tensor, token_logits: Tensor | None, labels: Tensor | None
) -> Tensor:
    """Confidence (b, r) >= 0 of each location, before masking and normalisation.

    Args:
        kind: "cls" and "mean": the attention `row` (b, r). "gap": agreement of a location's features with their mean. "cam": the
            label's own logit at a location. "uniform": all the same. "gap" and "cam" keep what is positive.
        row: Attention over the locations, of the token that the head reads or the mean of all.
        tokens: (b, r, d) features at the locations.
        token_logits: (b, r, c), for "cam" only.
        labels: (b,) or (b, c), for "cam" only.
    """
    if kind in ("cls", "mean"):
        assert row is not None
        return row
    if kind == "gap":
        tokens = tokens.float()
        return (tokens @ tokens.mean(dim=1, keepdim=True).mT)[..., 0].relu()
    if kind == "cam":
        assert token_logits is not None
        if labels is None:
            raise ValueError('attention="cam" weighs locations by the logit of the label: pass labels.')
        if labels.ndim == 2:
            return (token_logits.float() * labels[:, None].float()).sum(dim=-1).relu()
        index = labels.clamp(min=0)[:, None, None].expand(-1, token_logits.shape[1], 1)
        return token_logits.float().gather(2, index)[..., 0].relu()
    return tokens.new_ones(tokens.shape[:2], dtype=torch.float32)


def normalise(weights: Tensor, mask: Tensor) -> Tensor:
    """Weights (b, r) set to zero off the mask and summing to 1 for each example that has any."""
    weights = weights * mask
    return weights / weights.sum(dim=1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)


def attention_rows(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Any,
    index: int | Tensor | None,
    *,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    **_: Any,
) -> Tensor:
    """Attention (b, h, 1, n) of query `index` over the keys, in float32 and without dropout; (b, h, n, n) for None.

    `query` is (b, h, n, d) and `key` (b, h or fewer, n, d); `attention_mask` boolean (True = attend) or additive,
    (b or 1, h or 1, n or 1, n), the padding mask (b, n) that flash attention takes, or flex attention's block mask.
    """
    b, heads, n, d = query.shape

    def rows(x: Tensor) -> Tensor:
        """The wanted rows of (b or 1, h or 1, n or 1, m)."""
        if index is None or x.shape[2] == 1:
            return x
        if isinstance(index, int):
            return x[:, :, index % n, None]
        return x.expand(b, -1, -1, -1)[torch.arange(b, device=x.device), :, index].unsqueeze(2)

    with torch.autocast(query.device.type, enabled=False):
        keys = key.float().repeat_interleave(heads // key.shape[1], dim=1)
        scores = rows(query).float() @ keys.mT * (d**-0.5 if scaling is None else scaling)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if position_bias is not None:
            scores = scores + rows(position_bias).float()
        if attention_mask is None:
            causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
            if causal and n > 1:
                position = torch.arange(n, device=key.device)
                scores = scores.masked_fill(~rows((position <= position[:, None])[None, None]), -torch.inf)
        else:
            if not isinstance(attention_mask, Tensor):  # flex attention: a function of (example, head, query, key)
                attention_mask = _dense_block_mask(attention_mask, b, n, query.device)
            mask = attention_mask[:, None, None] if attention_mask.ndim == 2 else rows(attention_mask)
            if attention_mask.ndim == 2 or mask.dtype == torch.bool:
                scores = scores.masked_fill(~mask.bool(), torch.finfo(torch.float32).min)
            else:
                scores = scores + mask.float()
        return scores.softmax(dim=-1)


def _dense_block_mask(mask: Any, b: int, n: int, device: torch.device) -> Tensor:
    from torch.nn.attention.flex_attention import create_mask

    return create_mask(mask.mask_mod, b, 1, n, n, device=str(device))
