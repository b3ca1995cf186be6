"""The plan: how a model computes its logits from its tokens, in a form that can be printed, saved and executed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .pools import MODULE_POOL, pool_tokens
from .registry import registered

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
}
STEPS: dict[str, Callable[[Tensor], Tensor]] = {**ACTIVATIONS, "flatten": lambda x: x.flatten(1)}
EVERY = "every"
REGISTERED = "registered"


class LocationError(ValueError):
    """A model lacks the structure that a method needs: a linear head, locations, readable attention or blocks."""


@dataclass(frozen=True)
class Plan:
    """Location of a model's tokens, the tokens that its head reads, and the head's steps from one token to logits.

    Attributes:
        model_class: Name of the model's class.
        source: Name of the module whose input or output are the tokens.
        side: "input" or "output" of that module.
        key: Field of its `ModelOutput`, or index, if the module returns several outputs.
        layout: Dimensions of the source: "sequence" (b, n, d), "channels" (b, d, n), "map" (b, d, h, w) or "grid"
            (b, h, w, d).
        pool: The tokens that the head reads (see `mm_hf.locations.pools`); "every" for a model that labels every
            location; "registered" for a head of a registered mechanism, see [`register`].
        chain: Modules, activations and constant scales from one token to its logits, in order; "a+b" is the mean of two
            heads. For a registered mechanism, its name.
        prefix: Number of tokens at the front that are not locations (CLS, distillation and register tokens).
        text: True if the tokens are those of `input_ids`: padding and special tokens are not locations.
        special_ids: Ids of the special tokens.
        padding: Map from the attention mask to the tokens, if they have another number (see `padding.MAPS`).
        attention: Name of the last self-attention module, or of the module by which the head pools the tokens; None if
            its weights cannot be read.
        attention_base: Source of the weights: rows computed from query and keys of an attention implementation
            ("sdpa"), the weights that it returns ("eager (weights)"), or the k-th call of a function in the module
            ("softmax[0]").
        query: The query whose attention is the confidence: 0 (CLS, or the query of a head that pools by attention),
            "pool" (the one token that the head reads), or "mean" (the mean over all queries, if the head reads no
            single token).
        keys: The tokens of the keys: "" for one token per key, in order; "first" if the tokens are those of the first
            keys, before padding or another sequence; "repeat[k]" if each key is upsampled to k tokens; "chunks[k]" and
            "strided[k]" for attention inside of k groups, each of a copy of the CLS token and of consecutive tokens or
            every k-th token, whose mean is read (see `attention.weights.row_of_tokens`).
    """

    model_class: str
    source: str
    side: str
    key: str | int | None
    layout: str
    pool: str
    chain: tuple[str, ...]
    prefix: int = 0
    text: bool = False
    special_ids: tuple[int, ...] = ()
    padding: str = ""
    attention: str | None = None
    attention_base: str | None = None
    query: int | str | None = None
    keys: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Convert to a dictionary of JSON types."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """Create a plan from a dictionary as `to_dict` returns it."""
        known = {f.name for f in fields(cls)}
        arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known}
        return cls(**arguments)

    def __str__(self) -> str:
        where = f"{self.side} of {self.source!r}" + ("" if self.key is None else f" [{self.key}]")
        if self.text:
            locations = f"tokens of input_ids except padding and the special ids {list(self.special_ids)}"
        else:
            locations = f"all tokens after the first {self.prefix}" if self.prefix else "all tokens"
            locations += f" except padding ({self.padding})" if self.padding else ""
        attention = "not readable"
        if self.attention is not None:
            first = "query: the one of the head" if self.pool == MODULE_POOL else "query: token 0"
            queries = {"pool": "query: the token that the head reads", "mean": "mean over all queries"}
            attention = f"{self.attention!r} ({self.attention_base}); {queries.get(str(self.query), first)}"
            attention += f"; keys: {self.keys}" if self.keys else ""
        head = f"registered as {self.chain[0]!r}" if self.pool == REGISTERED else " -> ".join(self.chain)
        return "\n".join(
            [
                f"{self.model_class}:",
                f"  tokens     {where}, a {self.layout}",
                f"  pool       {self.pool}",
                f"  head       {head or '(the tokens are logits)'}",
                f"  locations  {locations}",
                f"  attention  {attention}",
            ]
        )


def as_tokens(source: Tensor, layout: str) -> Tensor:
    """Return a tensor with a layout (see [`Plan`]) as tokens (b, n, d)."""
    if layout == "sequence":
        return source
    return source.flatten(1, -2) if layout == "grid" else source.flatten(2).mT


def score_tokens(model: nn.Module, plan: Plan, tokens: Tensor) -> Tensor:
    """Apply the model's own head to every token.

    The modules run in their current mode: in training, dropout in the head draws a mask for each token. Batch
    normalization uses its running statistics and does not update them, because they describe pooled tokens and not
    single ones.

    Args:
        model: The model.
        plan: Its plan.
        tokens: (b, r, d).

    Returns:
        Logits (b, r, c).
    """
    if plan.pool == REGISTERED:
        return registered(plan.chain[0]).score(model, tokens)
    b, r, d = tokens.shape
    with _running_statistics(model, plan):
        return _run_chain(model, plan.chain, _as_argument(tokens.reshape(b * r, 1, d), plan)).reshape(b, r, -1)


def pooled_logits(model: nn.Module, plan: Plan, tokens: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """Compute the logits (b, c) of tokens (b, n, d) by the plan; a correct plan reproduces the model's logits."""
    if plan.pool == REGISTERED:
        return registered(plan.chain[0]).pooled(model, tokens)
    if plan.pool == MODULE_POOL:
        return _run_chain(model, plan.chain, _as_argument(tokens, plan)).flatten(1)
    pools = plan.pool.split("+")
    logits = []
    for i, pool in enumerate(pools):
        chain = tuple(step.split("+")[i] if len(pools) > 1 and "+" in step else step for step in plan.chain)
        logits.append(
            _run_chain(model, chain, _as_argument(pool_tokens(tokens, pool, inputs)[:, None], plan)).flatten(1)
        )
    return torch.stack(logits).mean(dim=0)


def _as_argument(tokens: Tensor, plan: Plan) -> Tensor:
    """Reshape tokens (m, n, d) to the argument of the chain's first module; vectors (m, d) if it takes no sequence."""
    if plan.side == "output":
        return tokens[:, 0]
    if plan.layout == "sequence":
        return tokens
    if plan.layout == "grid":
        return tokens[:, :, None]
    channels = tokens.mT.contiguous()
    return channels if plan.layout == "channels" else channels[..., None]


def _run_chain(model: nn.Module, chain: tuple[str, ...], x: Tensor) -> Tensor:
    for step in chain:
        # Call the modules and never use their weights directly: FSDP and adapters act in the call.
        if step in STEPS:
            x = STEPS[step](x)
        elif step.startswith("scale["):
            x = x * float(step[6:-1])
        else:
            outputs = [_first(model.get_submodule(name)(x)) for name in step.split("+")]
            x = outputs[0] if len(outputs) == 1 else torch.stack(outputs).mean(dim=0)
    return x


def _first(output: Any) -> Tensor:
    """Return a module's output, or the first one of several, as attention modules return their weights, too."""
    return output[0] if isinstance(output, (tuple, list)) else output


def head_operations(model: nn.Module, plan: Plan) -> float:
    """Return the operations of the head at one location: a product and a sum for each weight of its matrices."""
    if plan.pool in (EVERY, REGISTERED):
        return 0.0
    return 2.0 * sum(p.numel() for module in _head_modules(model, plan) for p in module.parameters() if p.ndim > 1)


def _head_modules(model: nn.Module, plan: Plan) -> list[nn.Module]:
    names = [name for step in plan.chain if step not in STEPS and "[" not in step for name in step.split("+")]
    return [model.get_submodule(name) for name in names]


@contextmanager
def _running_statistics(model: nn.Module, plan: Plan) -> Iterator[None]:
    """Put the batch normalization layers of the head in evaluation mode."""
    modules = [module for part in _head_modules(model, plan) for module in part.modules()]
    training = [m for m in modules if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    for norm in training:
        norm.training = False
    try:
        yield
    finally:
        for norm in training:
            norm.training = True
