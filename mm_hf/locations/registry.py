"""Register heads that the probe cannot find."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Registration:
    """Description of a model class by its user: see [`register`]."""

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
    model_class: str,
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
    """Register how a class of models computes logits at its locations. Each probe verifies it.

    Args:
        model_class: Name of the class, as `type(model).__name__`.
        source: Name of the module whose input or output are the tokens.
        score: Function of the model and tokens (b, r, d) that returns the logits (b, r, c) of each token by itself.
        pooled: Function of the model and all tokens (b, n, d) that returns the model's own logits (b, c), which
            verifies that the head reads these tokens. A probe raises a `LocationError` if it does not.
        side: "output" or "input" of the source.
        key: Field or index of the output, if the source returns several.
        layout: Dimensions of the source: "sequence" (b, n, d), "channels" (b, d, n), "map" (b, d, h, w) or "grid"
            (b, h, w, d).
        prefix: Number of tokens at the front that are not locations.
        query: The token whose attention weights the labels with `attention="cls"`: 0, or "mean" for the mean over all.

    Example:
        V-JEPA 2 pools its tokens by attention. Its logits are not those of a single token or of a mean.

        >>> def score(model, tokens):  # each token as a sequence of one
        ...     b, r, d = tokens.shape
        ...     return model.classifier(model.pooler(tokens.reshape(b * r, 1, d))).view(b, r, -1)
        >>> def pooled(model, tokens):  # the model's head on all tokens
        ...     return model.classifier(model.pooler(tokens))
        >>> name = "VJEPA2ForVideoClassification"
        >>> register(name, source="vjepa2", key="last_hidden_state", score=score, pooled=pooled)
    """
    _registered[model_class] = Registration(source, side, key, layout, score, pooled, prefix, query)


def registered(model_class: str) -> Registration:
    """Return the registration of a class.

    Raises:
        KeyError: The class has none.
    """
    return _registered[model_class]


def is_registered(model_class: str) -> bool:
    """Return True if a class has a registration."""
    return model_class in _registered
