"""Which location of an example its label is about: the attention that the head's own token pays, and its stand-ins."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

PREFIX = "mm_hf_"
KINDS = ("auto", "cls", "gap", "cam", "uniform")


def confidence(kind: str, row: Tensor | None, tokens: Tensor, token_logits: Tensor, labels: Tensor | None) -> Tensor:
    """Confidence (b, r) >= 0 of each location, before masking and normalisation.

    Args:
        kind: "cls": the attention `row` (b, r). "gap": agreement of a location's features with their mean. "cam": the
            label's own logit at a location. "uniform": all the same. "gap" and "cam" keep what is positive.
        row: Attention of the token that the head reads, over the locations.
        tokens: (b, r, d) features at the locations.
        token_logits: (b, r, c).
        labels: (b,) or (b, c), for "cam" only.
    """
    if kind == "cls":
        assert row is not None
        return row
    if kind == "gap":
        tokens = tokens.float()
        return (tokens @ tokens.mean(dim=1, keepdim=True).mT)[..., 0].relu()
    if kind == "cam":
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


class AttentionTap:
    """Reads one query's row of one attention module: the cost of one row, whatever the implementation computes.

    The module alone is given a copy of its config that names an attention function of ours. That function calls the
    one that would have run, and, while the tap is active, keeps the softmax of one row of scores, heads averaged.
    The model's own config, masks and all other modules stay as they are.
    """

    def __init__(self, module: nn.Module, base: str, query: int | str):
        self.query: Any = query
        self.active = False
        self.detach = True
        self.row: Tensor | None = None
        self._own_config: Any = module.config
        config: Any = copy.copy(self._own_config)
        config._attn_implementation_internal = _register(base)
        module.config = config
        module.mm_hf_tap = self  # type: ignore[assignment]

    def remove(self, module: nn.Module) -> None:
        """Give the module its own config back."""
        module.config = self._own_config
        del module.mm_hf_tap


def _register(base: str) -> str:
    """Make the attention function that taps `base` known to Transformers."""
    from transformers import AttentionInterface

    name = PREFIX + base

    def tapped(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        tap: Any = module.mm_hf_tap
        if tap.active:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not tap.detach):
                tap.row = attention_row(module, query, key, attention_mask, tap.query, **kwargs)
        return base_function(module, base)(module, query, key, value, attention_mask, **kwargs)

    if name not in AttentionInterface._global_mapping:
        AttentionInterface.register(name, tapped)
    return name


def base_function(module: nn.Module, base: str) -> Callable[..., Any]:
    """The attention function that a module runs: a registered one, or the eager one of its own file."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    # A module of an adapter or a subclass still runs the function of the file that defines its attention.
    files = [sys.modules[cls.__module__] for cls in type(module).__mro__ if cls.__module__ in sys.modules]
    eager: Any = next((f.eager_attention_forward for f in files if hasattr(f, "eager_attention_forward")), None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(base, eager)


def attention_row(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    index: int | Tensor,
    *,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Attention (b, n) of query `index` over the keys, heads averaged, in float32 and without dropout.

    `query` is (b, h, n, d) and `key` (b, h or fewer, n, d); `attention_mask` boolean (True = attend) or additive,
    (b or 1, h or 1, n or 1, n), or the padding mask (b, n) that flash attention takes.
    """
    b, heads, n, d = query.shape

    def at_query(x: Tensor) -> Tensor:
        """Row `index` of (b, h, n, m): (b, h, m)."""
        if isinstance(index, int):
            return x[:, :, index if x.shape[2] > 1 else 0]
        return x.expand(b, -1, -1, -1)[torch.arange(b, device=x.device), :, index if x.shape[2] > 1 else 0]

    with torch.autocast(query.device.type, enabled=False):
        keys = key.float().repeat_interleave(heads // key.shape[1], dim=1)
        scores = (keys @ at_query(query).float()[..., None])[..., 0] * (d**-0.5 if scaling is None else scaling)
        if position_bias is not None:
            scores = scores + at_query(position_bias).float()
        if attention_mask is None:
            causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
            if causal and n > 1:
                position = torch.as_tensor(index, device=key.device).view(-1, 1, 1) % n
                scores = scores.masked_fill(torch.arange(n, device=key.device) > position, -torch.inf)
        else:
            mask = attention_mask[:, None].bool() if attention_mask.ndim == 2 else at_query(attention_mask)
            if mask.dtype == torch.bool:
                scores = scores.masked_fill(~mask, torch.finfo(torch.float32).min)
            else:
                scores = scores + mask.float()
        return scores.softmax(dim=-1).mean(dim=1)


@contextmanager
def watch_attention() -> Iterator[list[tuple[nn.Module, str, int, int]]]:
    """Record the calls of attention functions: (module, implementation, number of queries, number of keys)."""
    from transformers import AttentionInterface

    calls: list[tuple[nn.Module, str, int, int]] = []
    mapping = AttentionInterface._global_mapping
    saved = dict(mapping)

    def watched(name: str, function: Callable[..., Any] | None) -> Callable[..., Any]:
        def call(module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
            base = name.removeprefix(PREFIX)
            calls.append((module, base, query.shape[2], key.shape[2]))
            return (function or base_function_of(module))(module, query, key, *args, **kwargs)

        return call

    def base_function_of(module: nn.Module) -> Callable[..., Any]:
        mapping.pop("eager", None)
        try:
            return base_function(module, "eager")
        finally:
            mapping["eager"] = eager

    eager = watched("eager", saved.get("eager"))
    mapping.update({name: watched(name, function) for name, function in saved.items()})
    mapping["eager"] = eager
    try:
        yield calls
    finally:
        mapping.clear()
        mapping.update(saved)
