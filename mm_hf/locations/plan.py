"""How one model's logits come about from its tokens, in a form that can be printed, saved and carried out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .pools import pool_tokens

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
    """A model does not show what the chosen method needs to see of it."""


@dataclass(frozen=True)
class Plan:
    """Where a model's tokens are, which of them its head reads, and how the head turns one into logits.

    Attributes:
        model_class: The class that was probed.
        source: Name of the module that the tokens enter or leave.
        side: "input" or "output" of that module.
        key: Which of the module's outputs, if it returns several: a field of its `ModelOutput` or an index.
        layout: Dimensions of the source: "sequence" (b, n, d), "channels" (b, d, n), "map" (b, d, h, w) or "grid"
            (b, h, w, d).
        pool: What the head reads of the tokens (see `mm_hf.locations.pools`); "every" for a model that labels every
            location; "registered" for one that was taught by [`register`].
        chain: Modules, activations and constant scales from one token to its logits, in order; "a+b" is the mean of two
            heads.
        prefix: Number of tokens at the front that are no locations (CLS, distillation, registers).
        text: The tokens are those of `input_ids`: padding and special tokens are no locations.
        special_ids: Ids of the special tokens.
        attention: Name of the last self-attention module, or None where its weights cannot be read.
        attention_base: What computes the weights: an attention implementation ("sdpa"), its own report of them
            ("eager (weights)"), or the k-th call of a function inside the module ("softmax[0]").
        query: Whose attention is the confidence: token 0 (CLS), "pool" (the one token that the head reads), or "mean"
            (of all tokens, where the head reads no single one).
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
    attention: str | None = None
    attention_base: str | None = None
    query: int | str | None = None

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
        attention = "not readable"
        if self.attention is not None:
            who = {"pool": "query: the token that the head reads", "mean": "mean over all queries"}
            attention = f"{self.attention!r} ({self.attention_base}); {who.get(str(self.query), 'query: token 0')}"
        head = "as registered" if self.pool == REGISTERED else " -> ".join(self.chain)
        return "\n".join(
            [
                f"{self.model_class}:",
                f"  tokens     {where}, a {self.layout}",
                f"  pool       {self.pool}",
                f"  head       {head or '(what is there are logits already)'}",
                f"  locations  {locations}",
                f"  attention  {attention}",
            ]
        )


def as_tokens(source: Tensor, layout: str) -> Tensor:
    """Tokens (b, n, d) of a tensor of some layout."""
    if layout == "sequence":
        return source
    return source.flatten(1, -2) if layout == "grid" else source.flatten(2).mT


def score_tokens(model: nn.Module, plan: Plan, tokens: Tensor) -> Tensor:
    """The model's own head applied to every token: (b, r, d) -> (b, r, c).

    The modules run as they are, in their mode: dropout in the head draws a mask for each token in training. Only batch
    normalisation uses its running statistics, and leaves them alone: they are those of what the head reads in use.
    """
    if plan.pool == REGISTERED:
        from .registry import registered

        return registered(plan.model_class).score(model, tokens)
    b, r, d = tokens.shape
    with _running_statistics(model, plan):
        return _run_chain(model, plan.chain, _as_fed(tokens.reshape(b * r, d), plan)).reshape(b, r, -1)


def pooled_logits(model: nn.Module, plan: Plan, tokens: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """The clean logits (b, c), computed the plan's way: the plan is right if these are the model's."""
    if plan.pool == REGISTERED:
        from .registry import registered

        return registered(plan.model_class).pooled(model, tokens)
    pools = plan.pool.split("+")
    logits = []
    for i, pool in enumerate(pools):
        chain = tuple(step.split("+")[i] if len(pools) > 1 and "+" in step else step for step in plan.chain)
        logits.append(_run_chain(model, chain, _as_fed(pool_tokens(tokens, pool, inputs), plan)).flatten(1))
    return torch.stack(logits).mean(dim=0)


def _as_fed(vectors: Tensor, plan: Plan) -> Tensor:
    """Vectors (m, d) as the first module of the chain takes one token."""
    if plan.side == "output":
        return vectors
    shape = {"sequence": (1, -1), "channels": (-1, 1), "map": (-1, 1, 1), "grid": (1, 1, -1)}[plan.layout]
    return vectors.view(len(vectors), *shape)


def _run_chain(model: nn.Module, chain: tuple[str, ...], x: Tensor) -> Tensor:
    for step in chain:
        # Modules are called and not their weights used: FSDP gathers, and adapters act, in the call.
        if step in STEPS:
            x = STEPS[step](x)
        elif step.startswith("scale["):
            x = x * float(step[6:-1])
        else:
            outputs = [model.get_submodule(name)(x) for name in step.split("+")]
            x = outputs[0] if len(outputs) == 1 else torch.stack(outputs).mean(dim=0)
    return x


@contextmanager
def _running_statistics(model: nn.Module, plan: Plan) -> Iterator[None]:
    names = [name for step in plan.chain if step not in STEPS and "[" not in step for name in step.split("+")]
    modules = [module for name in names for module in model.get_submodule(name).modules()]
    training = [m for m in modules if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    for norm in training:
        norm.training = False
    try:
        yield
    finally:
        for norm in training:
            norm.training = True
