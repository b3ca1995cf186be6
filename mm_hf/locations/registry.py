"""Teach the probe a model that it cannot explain by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Registration:
    """What a person knows of a model class: where its tokens are, and what its head makes of them."""

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
    """Say how a class of models gives logits at its locations. What is said is proved at each probe, as always.

    Args:
        model_class: Name of the class, as `type(model).__name__`.
        source: Name of the module that the tokens enter or leave.
        score: Function of the model and tokens (b, r, d) that gives the logits (b, r, c) of each by itself.
        pooled: Function of the model and all tokens (b, n, d) that gives the model's own logits (b, c): the proof that
            these are the tokens that the head reads. A probe ends in a `LocationError` if it does not.
        side: "output" or "input" of the source.
        key: Which of its outputs, if there are several.
        layout: Dimensions of the source: "sequence" (b, n, d), "channels" (b, d, n), "map" (b, d, h, w) or "grid".
        prefix: Number of tokens at the front that are no locations.
        query: Whose attention weighs the labels with `attention="cls"`: 0, or "mean" of all.

    Example:
        V-JEPA 2 pools by attention over all tokens: none of them alone, and no mean of them, gives its logits.

        >>> def score(model, tokens):  # each token as if it were the only one
        ...     b, r, d = tokens.shape
        ...     return model.classifier(model.pooler(tokens.reshape(b * r, 1, d))).view(b, r, -1)
        >>> def pooled(model, tokens):  # what the model does with all of them
        ...     return model.classifier(model.pooler(tokens))
        >>> register("VJEPA2ForVideoClassification", source="vjepa2", key="last_hidden_state", score=score, pooled=pooled)
    """
    _registered[model_class] = Registration(source, side, key, layout, score, pooled, prefix, query)


def registered(model_class: str) -> Registration:
    """What was registered for a class.

    Raises:
        KeyError: Nothing was.
    """
    return _registered[model_class]


def is_registered(model_class: str) -> bool:
    """Whether something was registered for a class."""
    return model_class in _registered
