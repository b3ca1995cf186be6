"""The confidence of each location in the label of its example, and rows of attention computed from query and keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..plan import EVERY, LocationError, Plan
from ..pools import MODULE_POOL

KINDS = ("auto", "cls", "mean", "gap", "cam", "uniform")
READ_KINDS = ("cls", "mean")  # read from the model's attention
NO_CLASSES = (
    'attention="cam" weights locations by the logit of the label, and the labels of a regression are no classes: use '
    'attention="auto", "gap" or "uniform".'
)


def confidence(
    kind: str,
    row: Tensor | None,
    tokens: Tensor,
    mask: Tensor,
    token_logits: Tensor | None,
    labels: Tensor | None,
) -> Tensor:
    """Return the confidence (b, r) >= 0 of each location, before masking and normalization.

    Args:
        kind: "cls" or "mean": the attention `row`. "gap": the positive part of the dot product of a location's features
            with their mean. "cam": the positive part of the label's logit at a location. "uniform": 1 everywhere.
        row: (b, r) attention over the locations, for "cls" and "mean".
        tokens: (b, r, d) features at the locations.
        mask: (b, r), the locations that are mixed.
        token_logits: (b, r, c), for "cam".
        labels: (b,) or (b, c), for "cam".

    Raises:
        ValueError: `kind` is "cam", and there are no labels, or they are those of a regression.
    """
    if kind in READ_KINDS:
        assert row is not None
        return row
    if kind == "gap":
        tokens = (tokens * mask[..., None]).float()
        return (tokens @ tokens.mean(dim=1, keepdim=True).mT)[..., 0].relu()
    if kind == "cam":
        assert token_logits is not None
        if labels is None:
            raise ValueError(
                'attention="cam" weights locations by the logit of the label, but labels is None: pass labels.'
            )
        if labels.ndim == 1 and labels.is_floating_point():
            raise ValueError(NO_CLASSES)
        if labels.ndim == 2:
            return (token_logits.float() * labels[:, None].float()).sum(dim=-1).relu()
        index = labels.clamp(min=0)[:, None, None].expand(-1, token_logits.shape[1], 1)
        return token_logits.float().gather(2, index)[..., 0].relu()
    return tokens.new_ones(tokens.shape[:2], dtype=torch.float32)


def row_of_tokens(row: Tensor, num_tokens: int, keys: str) -> Tensor:
    """Return the attention (b, n) over n tokens, given that over the keys.

    Args:
        row: (b, k), attention over the keys; (b g, k) for attention inside of g groups.
        num_tokens: n.
        keys: The tokens of the keys, see [`Plan`]. Tokens that an upsampling appends to its output have no key.

    Example:
        >>> row_of_tokens(torch.tensor([[0.5, 0.3, 0.2]]), 7, "repeat[2]")
        tensor([[0.5000, 0.5000, 0.3000, 0.3000, 0.2000, 0.2000, 0.0000]])
        >>> row_of_tokens(torch.tensor([[0.5, 0.5, 0.0]]), 2, "first")
        tensor([[0.5000, 0.5000]])
        >>> row_of_tokens(torch.tensor([[0.4, 0.1, 0.5], [0.2, 0.6, 0.2]]), 5, "strided[2]")
        tensor([[0.3000, 0.0500, 0.3000, 0.2500, 0.1000]])
    """
    groups = num_groups(keys)
    if groups > 1:
        grouped = row.unflatten(0, (-1, groups)) / groups
        own = grouped[:, :, 1:] if keys.startswith("chunks[") else grouped[:, :, 1:].mT
        return torch.cat([grouped[:, :, 0].sum(dim=1, keepdim=True), own.flatten(1)], dim=1)
    if keys.startswith("repeat["):
        row = row.repeat_interleave(int(keys[7:-1]), dim=1)
    return F.pad(row, (0, num_tokens - row.shape[1])) if keys else row


def num_groups(keys: str) -> int:
    """Return the number of groups of tokens inside of which the attention is computed, from the keys of a plan."""
    return int(keys.split("[")[1].removesuffix("]")) if keys.startswith(("chunks[", "strided[")) else 1


def normalize(weights: Tensor, mask: Tensor) -> Tensor:
    """Set weights (b, r) to zero off the mask, and divide them by their sum for each example that has any."""
    weights = weights * mask
    return weights / weights.sum(dim=1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)


def resolve_attention(kind: str, plan: Plan) -> str:
    """Return the kind of attention that a model uses: `kind` itself, or its choice for "auto".

    Args:
        kind: One of `KINDS`.
        plan: The model's plan.

    Raises:
        ValueError: There is no such kind.
        LocationError: The model does not have this kind of attention.
    """
    if kind not in KINDS:
        raise ValueError(f"attention must be one of {', '.join(KINDS)}, got {kind!r}.")
    name, readable = plan.model_class, plan.attention is not None
    if plan.pool == EVERY:
        if kind in ("auto", "uniform"):
            return "uniform"
        if kind == "mean" and readable:
            return kind
        raise LocationError(
            f"{name} labels every location, and attention={kind!r} distributes one label over the locations. Use "
            '"uniform"' + (' or "mean".' if readable else ".")
        )
    single = readable and plan.query != "mean"
    if kind == "auto":
        return "cls" if single and plan.pool.startswith(("token", MODULE_POOL)) else "gap"
    if kind == "cls" and not single:
        why = "its head reads no single token" if readable else "its attention cannot be read"
        others = ('"mean", ' if readable else "") + '"gap", "cam" or "uniform"'
        raise LocationError(
            f'attention="cls" needs a CLS token whose attention can be read, and {name} has none: {why}. '
            f'Use attention={others}, or "auto" to select one automatically.'
        )
    if kind == "mean" and not readable:
        raise LocationError(
            f'attention="mean" needs attention that can be read, and that of {name} cannot be read. Use '
            'attention="gap", "cam" or "uniform", or "auto" to select one automatically.'
        )
    return kind


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
    """Compute the attention of one query over the keys from their features, in float32 and without dropout.

    Args:
        module: The attention module; its attribute `is_causal` is the default of the argument.
        query: (b, h, n, d).
        key: (b, h, n, d), or with fewer heads for grouped queries.
        attention_mask: Boolean (True = attend) or additive, (b or 1, h or 1, n or 1, n); or flash
            attention's padding mask (b, n); or flex attention's block mask.
        index: The query: an integer, one integer per example (b,), or None for all queries.
        scaling: Factor on the scores. Default: `d**-0.5`.
        is_causal: Attend to earlier tokens only, if there is no mask.
        position_bias: Added to the scores, (b or 1, h or 1, n or 1, n).
        softcap: Limit of the scores' absolute value, as in Gemma 2.

    Returns:
        (b, h, 1, n), or (b, h, n, n) if `index` is None.
    """
    b, heads, n, d = query.shape

    def rows(x: Tensor) -> Tensor:
        """Select the rows of `index` in (b or 1, h or 1, n or 1, m)."""
        if index is None or x.shape[2] == 1:
            return x
        if isinstance(index, int):
            return x[:, :, index % n, None]
        return x.expand(b, -1, -1, -1)[torch.arange(b, device=x.device), :, index].unsqueeze(2)

    with torch.autocast(query.device.type, enabled=False):
        # A contiguous copy of the heads is a part of the conversion; the product would make one more.
        keys = key.to(torch.float32, memory_format=torch.contiguous_format)
        if heads != key.shape[1]:
            keys = keys.repeat_interleave(heads // key.shape[1], dim=1)
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
            if not isinstance(attention_mask, Tensor):  # flex attention
                attention_mask = _dense_block_mask(attention_mask, b, n, query.device)
            mask = attention_mask[:, None, None] if attention_mask.ndim == 2 else rows(attention_mask)
            if attention_mask.ndim == 2 or mask.dtype == torch.bool:
                scores = scores.masked_fill(~mask.bool(), torch.finfo(torch.float32).min)
            else:
                scores = scores + mask.float()
        return scores.softmax(dim=-1)


def _dense_block_mask(mask: Any, b: int, n: int, device: torch.device) -> Tensor:
    """Return flex attention's block mask, which holds a function of (example, head, query, key), as a tensor."""
    from torch.nn.attention.flex_attention import create_mask

    return create_mask(mask.mask_mod, b, 1, n, n, device=str(device))
