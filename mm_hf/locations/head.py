"""Find the end of the head: a linear layer, two averaged ones, or one that scores every location."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from .modes import probing_mode
from .plan import ACTIVATIONS, LocationError
from .recording import Call, Recording
from .tolerance import is_close

PROBABILITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": partial(torch.softmax, dim=-1),
    "log_softmax": partial(torch.log_softmax, dim=-1),
    "sigmoid": torch.sigmoid,
}
WHY = "Interpolating features equals interpolating logits for a linear layer only."


def check_head(recording: Recording) -> None:
    """Check that an affine layer computes the logits, which all mixing of embeddings requires.

    Raises:
        LocationError: The logits are computed by something else.
    """
    logits = recording.logits
    if logits.ndim > 2 and next(location_scorers(recording), None) is not None:
        return  # A label for every location. Interpolation of the logits to another size is linear, too.
    if affine_layer(recording, logits) is not None:
        return
    if next(averaged_heads(recording), None) is not None or _scores_tokens(recording):
        return
    name = type(recording.model).__name__
    activations = {**ACTIVATIONS, **PROBABILITIES}
    for call in recording.calls:
        for result in call.results.values():
            if result.shape != logits.shape or is_close(result, logits):  # ReLU of positive logits is the logits
                continue
            for label, activation in activations.items():
                if is_close(activation(result), logits):
                    raise LocationError(
                        f"The head of {name} does not end in a linear layer: its logits are {label} of the output of "
                        f"{call.name!r}. {WHY} Return the output of the linear layer as the logits."
                    )
    last = next((call for call in reversed(recording.calls) if call.returns(logits)), None)
    found = "no module returns them" if last is None else f"{last.name!r} returns them and is not linear"
    raise LocationError(f"The head of {name} does not end in a linear layer that computes its logits: {found}. {WHY}")


def affine_layer(recording: Recording, target: Tensor) -> Call | None:
    """Return the innermost call of an affine module whose output is `target`, or None.

    Args:
        recording: The recorded forward.
        target: Logits (b, c), or (b, n, c) of a module that scores every token.
    """
    for call in recording.calls:
        result = call.results.get(None)
        if result is None or call.argument is None:
            continue
        # A linear model has its inputs as features, and their score is the logits.
        if target.ndim == 2 and call.returns(target) and is_affine(recording, call, of_inputs=True):
            return call
        if target.ndim > 2 and is_close(result, target) and is_affine(recording, call):
            return call
    return None


def is_linear_model(recording: Recording) -> bool:
    """Return True if the layer that computes the logits is called with the model's inputs."""
    last = affine_layer(recording, recording.logits)
    return last is not None and last.argument is not None and last.argument.data_ptr() in recording.input_pointers


def is_affine(recording: Recording, call: Call, of_inputs: bool = False) -> bool:
    """Return True if the called module maps the midpoint of two arguments to the midpoint of their results.

    Args:
        recording: The recorded forward.
        call: A call of a module.
        of_inputs: Accept a module that is called with the model's inputs. Such a module usually embeds them.
    """
    x = call.argument
    if x is None or call.name == "" or not x.is_floating_point():
        return False
    if x.data_ptr() in recording.input_pointers and not of_inputs:
        return False
    module = recording.model.get_submodule(call.name)
    if not any(True for _ in module.parameters()):
        return False
    with probing_mode(recording.model), torch.no_grad():
        other = 3 * x.flip(0) + x.std()
        try:
            ends, middle = (module(x) + module(other)) / 2, module((x + other) / 2)
        except Exception:  # A module that needs more arguments is not a last layer.
            return False
    return isinstance(ends, Tensor) and is_close(ends, middle, slack=100)


def averaged_heads(recording: Recording) -> Iterator[tuple[Call, Call]]:
    """Yield pairs of affine heads whose mean is the logits, outermost first."""
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
    """Yield affine layers that return logits at every location, shaped like the model's; the last one first."""
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


def _scores_tokens(recording: Recording) -> bool:
    """Return True if an affine layer scores every token, so that the logits are those of one token or a mean."""
    for call in recording.calls:
        result = call.results.get(None)
        fits = result is not None and result.ndim == 3 and result.shape[::2] == recording.logits.shape
        if fits and is_affine(recording, call):
            return True
    return False
