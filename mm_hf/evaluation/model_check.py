"""Which methods train a model of one's own, whether what they rest on holds for it, and what a step costs."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..functional.factors import sample_factors
from ..locations import LocationError, Plan, extract, probe, resolve_attention
from ..locations.head import check_head, is_affine
from ..locations.hooks import temporary_hooks
from ..locations.modes import evaluation_mode
from ..locations.plan import EVERY, as_tokens, pooled_logits
from ..locations.recording import Recording, logits_of, record
from ..locations.tolerance import relative_error
from ..methods import ERM, METHODS, Mixing
from ..wrapping.wrapper import wrap_model

MIXED = 1000
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5}  # of relative errors; other dtypes: 2e-2


@dataclass
class ModelCheck:
    """What was found of one model.

    Attributes:
        model_class: Its class.
        plan: How its logits come about from its locations; None if it gives none.
        locations: How many locations the longest example of the batch has.
        pooled_error: How far the logits, made anew of the locations' features, are from the model's own on another
            batch, relatively.
        mixed_error: How far the head's logits of 1,000 mixed features are from the mixed logits, relatively; None if its
            head is not linear.
        attention: What `attention="auto"` is for it.
        problems: For each method, what stands in its way; "" for one that trains.
        cost: For each method that trains, the time of its forward and backward pass, relative to plain training's.
        reason: Why there is no plan.
    """

    model_class: str
    plan: Plan | None = None
    locations: int = 0
    pooled_error: float | None = None
    mixed_error: float | None = None
    attention: str | None = None
    problems: dict[str, str] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)
    reason: str = ""


def check_model(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    other_inputs: Mapping[str, Any] | None = None,
    processing_class: Any = None,
    rounds: int = 5,
) -> ModelCheck:
    """Try all methods on a model, and measure what they rest on: mixing features is mixing logits, at every location.

    Nothing of it remains: weights, running statistics, gradients, modes and random state are as before.

    Args:
        model: A Transformers classification model, not wrapped.
        inputs: A batch as its forward takes it, `labels` among them.
        other_inputs: Another batch, of another size if possible, on which the plan that the first one showed must hold.
            Default: the first one.
        processing_class: The tokenizer of a text model, which knows its special tokens.
        rounds: How often a step of each method is timed, in turn.

    Raises:
        ValueError: The model's own forward or backward pass fails on the batch.

    Example:
        >>> import torch
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        ...                    image_size=32, patch_size=8, num_labels=3)
        >>> batch = {"pixel_values": torch.randn(4, 3, 32, 32), "labels": torch.tensor([0, 1, 2, 0])}
        >>> found = check_model(ViTForImageClassification(config), batch, rounds=1)
        >>> found.locations, found.attention, found.pooled_error < 1e-5, found.mixed_error < 1e-5
        (16, 'cls', True, True)
        >>> [name for name, problem in found.problems.items() if problem]
        []
    """
    found = ModelCheck(type(model).__name__)
    forward_inputs = {k: v for k, v in inputs.items() if k != "labels"}
    others = {k: v for k, v in (other_inputs or inputs).items() if k != "labels"}
    with _untouched(model):
        try:
            _step(model, model, inputs)
        except Exception as error:
            raise ValueError(f"{found.model_class} cannot be trained on this batch by itself: {error}") from error
        found.mixed_error = mixed_error(model, forward_inputs)
        try:
            found.plan = plan = probe(model, forward_inputs, processing_class)
            found.attention = resolve_attention("auto", plan)
            found.pooled_error, found.locations = pooled_error(model, plan, others)
        except LocationError as error:
            found.reason = _first_sentence(error)
        for name, method in METHODS.items():
            found.problems[name], cost = _tried(
                model, inputs, method(), processing_class, 0 if name == ERM.name else rounds
            )
            if cost is not None:
                found.cost[name] = cost
    return found


def mixed_error(model: nn.Module, inputs: Mapping[str, Any]) -> float | None:
    """How far the head's logits of mixed features are from the mixed logits, relatively; None for a head not linear."""
    try:
        recording = record(model, inputs)
        check_head(recording)
    except LocationError:
        return None
    heads = _heads(recording)
    return max((_mixed_error(recording, call) for call in heads), default=None)


def _heads(recording: Recording) -> list[Any]:
    """The linear layers that give logits, of the example or of each token."""
    labels = recording.logits.shape[-1 if recording.logits.ndim < 4 else 1]
    shapes = [(c, c.results.get(None)) for c in recording.calls if c.argument is not None]
    ends = [c for c, result in shapes if result is not None and result.ndim < 4 and result.shape[-1] == labels]
    return [c for c in ends if is_affine(recording, c)]


@torch.no_grad()
def _mixed_error(recording: Recording, call: Any) -> float:
    x, module = call.argument, recording.model.get_submodule(call.name)
    factors = sample_factors(len(x), MIXED, 1.0, device=x.device)
    mixed: Any = lambda z: torch.einsum("bn,b...->n...", factors.to(z.dtype), z)  # noqa: E731
    return relative_error(module(mixed(x)), mixed(module(x)))


@torch.no_grad()
def pooled_error(model: nn.Module, plan: Plan, inputs: Mapping[str, Any]) -> tuple[float, int]:
    """How far the logits made of the locations' features are from the model's own, relatively, in evaluation mode.

    Returns:
        The larger of two errors: of the logits that `extract` gives, and of those that the plan makes of the features;
        and how many locations the longest example has.
    """
    with evaluation_mode(model):
        output = extract(model, "uniform", **inputs)
        assert output.mask is not None
        error = relative_error(output.logits, logits_of(model(**inputs)))
        if plan.pool != EVERY:
            with temporary_hooks(model, plan) as hooks, hooks.capture(inputs, "uniform"):
                model(**inputs)
                assert hooks.source is not None
                pooled = pooled_logits(model, plan, as_tokens(hooks.source, plan.layout), inputs)
                error = max(error, relative_error(pooled, output.logits))
    return error, int(output.mask.sum(dim=1).max())


def _tried(
    model: nn.Module, inputs: Mapping[str, Any], method: Mixing, processing_class: Any, rounds: int
) -> tuple[str, float | None]:
    """What stands in the way of a method, or ""; and the median of the time of its step, relative to a plain one beside."""
    with wrap_model(model, method, processing_class=processing_class):
        try:
            loss = _step(model, model, inputs)  # probes, too, which comes once in a training
        except ValueError as error:
            return _first_sentence(error), None
        except Exception as error:  # what a model does not bear is found out here, and not when it trains
            return f"{type(error).__name__}: {_first_sentence(error)}", None
        if not bool(loss.isfinite()):
            return "The loss is not finite.", None
        plain = functools.partial(type(model).forward, model)
        ratios = [_seconds(model, model, inputs) / _seconds(model, plain, inputs) for _ in range(rounds)]
    return "", statistics.median(ratios) if ratios else None


def _seconds(model: nn.Module, forward: Callable[..., Any], inputs: Mapping[str, Any]) -> float:
    device = next(model.parameters()).device
    began = time.perf_counter()
    _step(model, forward, inputs)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _step(model: nn.Module, forward: Callable[..., Any], inputs: Mapping[str, Any]) -> Tensor:
    """Forward and backward in training mode."""
    model.train()
    model.zero_grad(set_to_none=True)
    loss = forward(**inputs, return_dict=True)["loss"]
    loss.backward()
    return loss.detach()


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Gives back modes, gradients, buffers (running statistics) and random state as they were."""
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    buffers = {buffer: buffer.clone() for buffer in model.buffers()}
    for parameter in gradients:
        parameter.grad = None  # not zeroed in place
    try:
        with evaluation_mode(model):
            yield
    finally:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        for buffer, value in buffers.items():
            buffer.copy_(value)


def _first_sentence(error: Exception) -> str:
    return str(error).splitlines()[0].split(". Tried were")[0]


def within_rounding(error: float | None, dtype: torch.dtype) -> bool:
    """Whether a relative error is one of rounding only, for a model of that dtype.

    Example:
        >>> holds(1e-7, torch.float32), holds(1e-3, torch.float32), holds(None, torch.float32)
        (True, False, False)
    """
    return error is not None and error <= TOLERANCE.get(dtype, 2e-2)
