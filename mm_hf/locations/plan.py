"""How one model's logits come about from its tokens, in a form that can be printed, saved and carried out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
}


class LocationError(ValueError):
    """A model does not show what the chosen method needs to see of it."""


@dataclass(frozen=True)
class Plan:
    """Where a model's tokens are, which of them its head reads, and how the head turns one into logits.

    Attributes:
        model_class: The class that was probed.
        source: Name of the module that the tokens enter or leave.
        side: "input" or "output" of that module.
        key: Which of the module's outputs, if it returns several: a field of its `ModelOutput` or an index.
        pool: What the head reads: "token[0]", "token[-1]", "token[last]" (the last one attended to), "mean[k:]" (of
            tokens k and on), "mean[mask]" (of those attended to), or two of these joined by "|" (concatenated).
        chain: Modules and activations from one token to its logits, in order.
        feed: How the first module of the chain takes one token: "vector" (d), "sequence" (1, d) or "map" (d, 1, 1).
        prefix: Number of tokens at the front that are no locations (CLS, distillation, registers).
        text: The tokens are those of `input_ids`: padding and special tokens are no locations.
        special_ids: Ids of the special tokens.
        attention: Name of the last attention module, or None where its weights cannot be read.
        attention_base: The attention implementation that computes it.
        query: Whose attention is the confidence: token 0 (CLS), "last", or None where no single token is read.
    """

    model_class: str
    source: str
    side: str
    key: str | int | None
    pool: str
    chain: tuple[str, ...]
    feed: str
    prefix: int
    text: bool
    special_ids: tuple[int, ...]
    attention: str | None
    attention_base: str | None
    query: int | str | None

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """The inverse of `to_dict`."""
        known = {f.name for f in fields(cls)}
        arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known}
        return cls(**arguments)

    def __str__(self) -> str:
        where = f"{self.side} of {self.source!r}" + ("" if self.key is None else f" [{self.key}]")
        if self.text:
            locations = f"tokens of input_ids other than padding and the special ids {list(self.special_ids)}"
        else:
            locations = f"all tokens after the first {self.prefix}" if self.prefix else "all tokens"
        if self.attention is None:
            attention = "not readable"
        else:
            who: dict[Any, str] = {None: "no single query is read by the head", "last": "query: the last token"}
            attention = f"{self.attention!r} ({self.attention_base}); {who.get(self.query, 'query: token 0')}"
        return "\n".join(
            [
                f"{self.model_class}:",
                f"  tokens     {where}",
                f"  pool       {self.pool}",
                f"  head       {' -> '.join(self.chain) or '(the tokens are logits already)'}, one {self.feed} a token",
                f"  locations  {locations}",
                f"  attention  {attention}",
            ]
        )


def as_tokens(source: Tensor) -> Tensor:
    """Tokens (b, n, d) of a sequence (b, n, d) or a feature map (b, d, h, w)."""
    return source.flatten(2).mT if source.ndim == 4 else source


def pool_tokens(tokens: Tensor, pool: str, attended: Tensor | None) -> Tensor:
    """What the head reads of tokens (b, n, d): (b, d), or (b, 2 d) for two pools joined by "|"."""
    if "|" in pool:
        return torch.cat([pool_tokens(tokens, part, attended) for part in pool.split("|")], dim=-1)
    weights = pool_rows(tokens, pool, attended).to(tokens.dtype)
    if pool.startswith("token"):
        return tokens[torch.arange(len(tokens), device=tokens.device), weights.argmax(dim=1)]
    if pool == "mean[mask]":
        return (tokens * weights[..., None]).sum(dim=1) / weights.sum(dim=1, keepdim=True)
    return tokens[:, int(pool[5:-2]) :].mean(dim=1)


def pool_rows(tokens: Tensor, pool: str, attended: Tensor | None) -> Tensor:
    """Which tokens a pool reads: (b, n) booleans."""
    if "|" in pool:
        parts = [pool_rows(tokens, part, attended) for part in pool.split("|")]
        return torch.stack(parts).any(dim=0)
    b, n = tokens.shape[:2]
    position = torch.arange(n, device=tokens.device).expand(b, n)
    if pool == "mean[mask]":
        assert attended is not None
        return attended.bool()
    if pool.startswith("mean"):
        return position >= int(pool[5:-2])
    if pool == "token[last]":
        assert attended is not None
        return position == last_attended(attended)[:, None]
    return position == int(pool[6:-1]) % n


def last_attended(attended: Tensor) -> Tensor:
    """Index (b,) of each example's last token that is attended to, whichever side the padding is on."""
    position = torch.arange(attended.shape[1], device=attended.device)
    return (attended.long() * position).argmax(dim=1)


def score_tokens(model: nn.Module, plan: Plan, tokens: Tensor) -> Tensor:
    """The model's own head applied to every token: (b, r, d) -> (b, r, c).

    The modules run as they are, in their mode: dropout in the head draws a mask for each token in training.
    """
    b, r, d = tokens.shape
    flat = tokens.reshape(b * r, d)
    if plan.feed == "sequence":
        flat = flat[:, None]
    elif plan.feed == "map":
        flat = flat[:, :, None, None]
    for step in plan.chain:
        # The modules are called and not their weights used: FSDP gathers, and adapters act, in the call.
        flat = ACTIVATIONS[step](flat) if step in ACTIVATIONS else model.get_submodule(step)(flat)
    return flat.reshape(b, r, -1)


def pooled_logits(model: nn.Module, plan: Plan, tokens: Tensor, attended: Tensor | None) -> Tensor:
    """The clean logits (b, c), computed the plan's way: the plan is right if these are the model's."""
    return score_tokens(model, plan, pool_tokens(tokens, plan.pool, attended)[:, None])[:, 0]
