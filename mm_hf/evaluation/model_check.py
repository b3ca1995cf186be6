"""Check a model: the methods that train it, the assumptions of mixing embeddings, and the cost of a step."""

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
from ..locations.recording import Call, Recording, logits_of, record
from ..locations.tolerance import relative_error
from ..methods import ERM, Mixing, default_methods
from ..wrapping.wrapper import wrap_model

NUM_MIXED = 1000  # mixed examples in the check of linearity


@dataclass
class ModelCheck:
    """Results of [`check_model`].

    Attributes:
        model_class: Name of the model's class.
        plan: How the model computes its logits from its locations; None if it gives no per-location logits.
        locations: Number of locations of the longest example in the batch.
        pooled_error: Relative error of the logits that the plan computes from the locations' features, on another
            batch.
        mixed_error: Relative error between the logits of 1,000 mixed features and the mixed logits; None if the head is
            not linear.
        attention: The kind of attention that `attention="auto"` selects.
        problems: For each method, the reason why it does not train the model; "" if it does.
        cost: For each method that trains the model, the time of its forward and backward pass relative to plain
            training.
        num_mixed: For each method with `num_mixed="auto"` that trains the model, the number that this batch selects.
        mixing_share: The expected cost of these mixed examples, as a share of the operations of a training step.
        reason: The reason why there is no plan, or "".
    """

    model_class: str
    plan: Plan | None = None
    locations: int = 0
    pooled_error: float | None = None
    mixed_error: float | None = None
    attention: str | None = None
    problems: dict[str, str] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)
    num_mixed: dict[str, int] = field(default_factory=dict)
    mixing_share: dict[str, float] = field(default_factory=dict)
    reason: str = ""


def check_model(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    other_inputs: Mapping[str, Any] | None = None,
    processing_class: Any = None,
    rounds: int = 5,
) -> ModelCheck:
    """Try all methods on a model, and measure whether mixing features equals mixing logits.

    Weights, running statistics, gradients, modes and random state are restored.

    Args:
        model: A Transformers classification model that is not wrapped.
        inputs: A batch with the arguments of its forward and `labels`.
        other_inputs: Another batch, on which the plan found on the first one is verified. It should have another size.
            Default: the first one.
        processing_class: The tokenizer of a text model, for its special tokens.
        rounds: Number of timed steps per method. The methods' steps alternate with plain ones.

    Returns:
        The results.

    Raises:
        ValueError: The model's own forward or backward pass fails on the batch.

    Example:
        >>> import torch
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        ...                    image_size=32, patch_size=8, num_labels=3)
        >>> batch = {"pixel_values": torch.randn(4, 3, 32, 32), "labels": torch.tensor([0, 1, 2, 0])}
        >>> result = check_model(ViTForImageClassification(config), batch, rounds=1)
        >>> result.locations, result.attention, result.pooled_error < 1e-5, result.mixed_error < 1e-5
        (16, 'cls', True, True)
        >>> [name for name, problem in result.problems.items() if problem]
        []
    """
    result = ModelCheck(type(model).__name__)
    forward_inputs = {k: v for k, v in inputs.items() if k != "labels"}
    others = {k: v for k, v in (other_inputs or inputs).items() if k != "labels"}
    with _restore_model(model):
        try:
            _training_step(model, model, inputs)
        except Exception as error:
            raise ValueError(f"{result.model_class} cannot be trained on this batch without mixing: {error}") from error
        result.mixed_error = mixed_error(model, forward_inputs)
        try:
            result.plan = plan = probe(model, forward_inputs, processing_class)
            result.attention = resolve_attention("auto", plan)
            result.pooled_error, result.locations = pooled_error(model, plan, others)
        except LocationError as error:
            result.reason = _first_line(error)
        for name, method in default_methods().items():
            timed = 0 if name == ERM.name else rounds
            result.problems[name] = _try_method(result, model, inputs, method, processing_class, timed)
    return result


def mixed_error(model: nn.Module, inputs: Mapping[str, Any]) -> float | None:
    """Measure the relative error between the head's logits of mixed features and the mixed logits.

    Args:
        model: A Transformers classification model.
        inputs: Keyword arguments of its forward.

    Returns:
        The largest error of all heads, or None if the head is not linear.
    """
    try:
        recording = record(model, inputs)
        check_head(recording)
    except LocationError:
        return None
    return max((_mixed_error(recording, call) for call in _linear_heads(recording)), default=None)


def _linear_heads(recording: Recording) -> list[Call]:
    """Return the calls of affine layers that give logits, of the example or of each token."""
    labels = recording.logits.shape[-1 if recording.logits.ndim < 4 else 1]
    results = [(c, c.results.get(None)) for c in recording.calls if c.argument is not None]
    heads = [c for c, result in results if result is not None and result.ndim < 4 and result.shape[-1] == labels]
    return [c for c in heads if is_affine(recording, c, of_inputs=c.returns(recording.logits))]


@torch.no_grad()
def _mixed_error(recording: Recording, call: Call) -> float:
    x, module = call.argument, recording.model.get_submodule(call.name)
    assert x is not None
    factors = sample_factors(len(x), NUM_MIXED, 1.0, device=x.device)

    def mix(z: Tensor) -> Tensor:
        return torch.einsum("bn,b...->n...", factors.to(z.dtype), z)

    return relative_error(module(mix(x)), mix(module(x)))


@torch.no_grad()
def pooled_error(model: nn.Module, plan: Plan, inputs: Mapping[str, Any]) -> tuple[float, int]:
    """Measure the relative error of the plan's logits against the model's own, in evaluation mode.

    Args:
        model: A Transformers classification model.
        plan: Its plan.
        inputs: Keyword arguments of its forward.

    Returns:
        The larger one of two errors, of the logits that `extract` returns and of those that the plan computes from the
        features; and the number of locations of the longest example.
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


def _try_method(
    result: ModelCheck,
    model: nn.Module,
    inputs: Mapping[str, Any],
    method: Mixing,
    processing_class: Any,
    rounds: int,
) -> str:
    """Train one step with a method, and set its cost and its number of mixed examples in the result.

    Returns:
        The reason why it fails, or "".
    """
    with wrap_model(model, method, processing_class=processing_class) as handle:
        try:
            loss = _training_step(model, model, inputs)  # not timed, because it includes the probe
        except ValueError as error:
            return _first_line(error)
        except Exception as error:  # any failure is a result of the check
            return f"{type(error).__name__}: {_first_line(error)}"
        if not bool(loss.isfinite()):
            return "The loss is not finite."
        if handle.num_mixed is not None:
            result.num_mixed[method.name] = handle.num_mixed
        if handle.mixing_share is not None:
            result.mixing_share[method.name] = handle.mixing_share
        plain = functools.partial(type(model).forward, model)
        ratios = [_step_seconds(model, model, inputs) / _step_seconds(model, plain, inputs) for _ in range(rounds)]
        if ratios:
            result.cost[method.name] = statistics.median(ratios)
    return ""


def _step_seconds(model: nn.Module, forward: Callable[..., Any], inputs: Mapping[str, Any]) -> float:
    device = next(model.parameters()).device
    start = time.perf_counter()
    _training_step(model, forward, inputs)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _training_step(model: nn.Module, forward: Callable[..., Any], inputs: Mapping[str, Any]) -> Tensor:
    """Run forward and backward in training mode and return the loss."""
    model.train()
    model.zero_grad(set_to_none=True)
    loss = forward(**inputs, return_dict=True)["loss"]
    loss.backward()
    return loss.detach()


@contextmanager
def _restore_model(model: nn.Module) -> Iterator[None]:
    """Restore gradients, buffers (running statistics), modes and random state on exit."""
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    buffers = {buffer: buffer.clone() for buffer in model.buffers()}
    for parameter in gradients:
        parameter.grad = None  # Steps must not accumulate into the stored gradient in place.
    try:
        with evaluation_mode(model):
            yield
    finally:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        for buffer, value in buffers.items():
            buffer.copy_(value)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
