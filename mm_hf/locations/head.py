"""What the logits leave: a linear layer, two whose mean they are, or one that scores every location."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from .modes import probing_mode
from .plan import ACTIVATIONS, LocationError
from .recording import Call, Recording
from .tolerance import is_close, returns, tolerance


def check_head(recording: Recording) -> None:
    """Raise a LocationError unless the logits leave an affine layer, as all that MultiMix does rests on it."""
    name = type(recording.model).__name__
    logits = recording.logits
    # A label for every location; interpolation to another size is linear, too.
    if logits.ndim > 2 and next(location_scorers(recording), None) is not None:
        return
    if affine_layer(recording, logits) is not None:
        return
    last_steps = [c for c in recording.calls if returns(c, logits)]
    for call in recording.calls:
        for result in call.results.values():
            for label, activation in ACTIVATIONS.items():
                if result.shape == logits.shape and is_close(activation(result), logits):
                    raise LocationError(
                        f"The head of {name} does not end in a linear layer: its logits are {label} of what leaves "
                        f"{call.name!r}. Interpolating features is interpolating logits for a linear layer only."
                    )
    if next(averaged_heads(recording), None) is not None:
        return
    for call in recording.calls:  # a head applied to every token, whose logits are picked or averaged afterwards
        scored_tokens = call.results.get(None)
        if (
            scored_tokens is not None
            and scored_tokens.ndim == 3
            and scored_tokens.shape[::2] == logits.shape
            and is_affine(recording, call)
        ):
            return
    found = f"they leave {last_steps[-1].name!r}, which is not linear" if last_steps else "they leave no module"
    raise LocationError(
        f"The head of {name} does not end in a linear layer that computes its logits: {found}. Interpolating features "
        "is interpolating logits for a linear layer only."
    )


def affine_layer(recording: Recording, target: Tensor) -> Call | None:
    """The innermost affine module whose one result is `target`: (b, c), or (b, n, c) of one that scores every token."""
    for call in recording.calls:
        result = call.results.get(None)
        if result is None or call.argument is None:
            continue
        if (returns(call, target) if target.ndim == 2 else is_close(result, target)) and is_affine(recording, call):
            return call
    return None


def is_affine(recording: Recording, call: Call) -> bool:
    """Whether the halfway point of two arguments gives the halfway point of the results."""
    x = call.argument
    if x is None or call.name == "" or x.data_ptr() in recording.input_pointers:
        return False
    module = recording.model.get_submodule(call.name)
    if not any(True for _ in module.parameters()):
        return False
    with probing_mode(recording.model), torch.no_grad():
        other = 3 * x.flip(0) + x.std()
        try:
            ends, middle = (module(x) + module(other)) / 2, module((x + other) / 2)
        except Exception:  # a module that needs more arguments is no last layer
            return False
    return isinstance(ends, Tensor) and is_close(ends, middle, 100 * tolerance(ends))


def averaged_heads(recording: Recording) -> Iterator[tuple[Call, Call]]:
    """Pairs of affine heads whose mean is the logits."""
    logits = recording.logits
    heads = [c for c in recording.calls if c.results.get(None) is not None and c.results[None].shape == logits.shape]
    heads.sort(key=lambda c: c.name.count("."))
    for a, b in itertools.combinations(heads, 2):
        if (
            is_close((a.results[None] + b.results[None]) / 2, logits)
            and is_affine(recording, a)
            and is_affine(recording, b)
        ):
            yield a, b


def location_scorers(recording: Recording) -> Iterator[Call]:
    """Affine layers that give logits at every location, of the dimensions that the model's have; the last first."""
    logits = recording.logits
    axis = -1 if logits.ndim == 3 else 1
    for call in reversed(recording.calls):
        result = call.results.get(None)
        if (
            result is not None
            and result.ndim == logits.ndim
            and result.shape[axis] == logits.shape[axis]
            and is_affine(recording, call)
        ):
            yield call
