"""Register mechanisms of heads that the probe cannot find."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Registration:
    """A mechanism by which heads compute logits from tokens: see [`register`]."""

    name: str
    source: str
    side: str
    key: str | int | None
    layout: str
    score: Callable[[nn.Module, Tensor], Tensor]
    pooled: Callable[[nn.Module, Tensor], Tensor]
    prefix: int
    query: int | str | None


_registered: dict[str, Registration] = {}


def register(
    name: str,
    *,
    source: str,
    score: Callable[[nn.Module, Tensor], Tensor],
    pooled: Callable[[nn.Module, Tensor], Tensor],
    side: str = "output",
    key: str | int | None = None,
    layout: str = "sequence",
    prefix: int = 0,
    query: int | str | None = "mean",
) -> None:
    """Register a mechanism by which a head computes logits from tokens.

    A probe tries the registered mechanisms first, on every model that has the source. It uses one if `pooled`
    reproduces the model's logits, and otherwise continues with the others and with the heads that it finds by itself.

    Args:
        name: Name of the mechanism, which is saved in the plan. An earlier registration with this name is replaced.
        source: Name of the module whose input or output are the tokens, or the end of its name, such as
            "backbone.norm".
        score: Function of the model and tokens (b, r, d) that returns the logits (b, r, c) of each token by itself.
        pooled: Function of the model and all tokens (b, n, d) that returns the model's own logits (b, c), which
            verifies that the head reads these tokens.
        side: "output" or "input" of the source.
        key: Field or index of the output, if the source returns several.
        layout: Dimensions of the source: "sequence" (b, n, d), "channels" (b, d, n), "map" (b, d, h, w) or "grid"
            (b, h, w, d).
        prefix: Number of tokens at the front that are not locations.
        query: The token whose attention weights the labels with `attention="cls"`: 0, or "mean" for the mean over all.

    Example:
        A head that reads a smooth maximum of each feature: its logits are those of no token or mean of tokens.

        >>> def score(model, tokens):  # each token by itself
        ...     return model.classifier(tokens)
        >>> def pooled(model, tokens):  # the model's head on all tokens
        ...     return model.classifier(tokens.logsumexp(dim=1))
        >>> register("smooth maximum", source="vit.layernorm", score=score, pooled=pooled, prefix=1)
    """
    _registered[name] = Registration(name, source, side, key, layout, score, pooled, prefix, query)


def registered(name: str) -> Registration:
    """Return the registration of a mechanism.

    Raises:
        KeyError: There is none with this name.
    """
    return _registered[name]


def is_registered(name: str) -> bool:
    """Return True if a mechanism with this name is registered."""
    return name in _registered


def registrations() -> tuple[Registration, ...]:
    """Return all registered mechanisms, the latest first."""
    return tuple(reversed(_registered.values()))
