"""One training step inside a wrapped model's forward: from a batch to the method's loss.

`mm_hf.methods.base` draws the complete life of a batch; `_training_forward` is its part inside the model.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from ..locations import LocationOutput
from ..locations.recording import logits_of
from ..locations.sharded import is_sharded
from ..methods import Mixing
from .labels import at_locations, check_shapes
from .state import STATE, MixingState


def mixing_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward with the original's signature that computes the mixing loss in training.

    It refers to the class's forward and to no model, so that a deep copy of the model trains with its own weights.
    """

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            return original(self, *args, **kwargs)
        if args:
            bound = signature.bind(self, *args, **kwargs)
            kwargs = _flat_arguments(bound.arguments, signature)
        if kwargs.get("labels") is None:
            return original(self, **kwargs)
        return _training_forward(self, original, kwargs)

    signature = inspect.signature(original)
    # Not functools.wraps: accelerate's unwrap_model follows __wrapped__ past this function and would lose it, and a
    # bound __wrapped__ hides the first parameter from the Trainer, which would then drop the model's main input.
    forward.__signature__ = signature  # type: ignore[attr-defined]
    forward.__doc__ = original.__doc__
    return forward


def _flat_arguments(arguments: Mapping[str, Any], signature: inspect.Signature) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for position, (name, value) in enumerate(arguments.items()):
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            flat.update(value)
        elif position > 0:
            flat[name] = value
    return flat


def _training_forward(model: nn.Module, original: Callable[..., Any], inputs: dict[str, Any]) -> Any:
    """Run the model's own forward without labels and return its outputs with the method's loss."""
    state: MixingState = model.__dict__[STATE]
    labels = inputs.pop("labels")
    inputs.pop("num_items_in_batch", None)  # the loss is a mean over this batch, whatever the accumulation
    as_tuple = inputs.pop("return_dict", None) is False
    if not state.is_ready(model):
        _prepare(model, state, {**inputs, "labels": labels})
    method, inputs, labels = _mix(model, state, inputs, labels)
    try:
        outputs, output = _forward(model, state, method, original, inputs, labels)
    finally:
        for hooks in (state.blocks, state.embeddings):
            if hooks is not None:
                hooks.end()
    outputs = _with_loss(outputs, _loss(model, state, method, output, labels))
    return outputs.to_tuple() if as_tuple else outputs


# Random numbers are drawn, and the loss computed, outside compiled regions: inductor has generators of its own, which
# checkpoints do not restore, and does not speed up the loop over chunks.
@torch.compiler.disable
def _prepare(model: nn.Module, state: MixingState, inputs: dict[str, Any]) -> None:
    state.prepare(model, inputs)


@torch.compiler.disable
def _mix(
    model: nn.Module, state: MixingState, inputs: dict[str, Any], labels: Tensor
) -> tuple[Mixing, dict[str, Any], Tensor]:
    """Convert the labels, select the method of this mini-batch, and let it mix the inputs and the labels."""
    labels = state.convert_labels(labels)
    mixing = state.mixing
    if state.auto_num_mixed is not None:
        mixing = mixing.with_num_mixed(state.auto_num_mixed.select(mixing, labels.device))
    if state.sharded is None:
        state.sharded = is_sharded(model)
    method = mixing.for_batch(inputs, labels, epoch=state.epoch, same_on_all_ranks=state.sharded)
    inputs, labels = method.mix_inputs(inputs, labels, model, state.criterion)
    if state.blocks is not None and method.block_mixing is not None:
        state.blocks.begin(method.block_mixing)
    if inputs.get("input_ids") is not None and inputs.get("inputs_embeds") is not None:
        if state.embeddings is None:
            del inputs["input_ids"]
        else:
            state.embeddings.begin(inputs.pop("inputs_embeds"))
    return method, inputs, labels


def _forward(
    model: nn.Module,
    state: MixingState,
    method: Mixing,
    original: Callable[..., Any],
    inputs: dict[str, Any],
    labels: Tensor,
) -> tuple[Any, LocationOutput]:
    """Return the model's outputs, and what the method requires of them and of the locations."""
    requires = method.requirements
    if not requires.locations:
        outputs = original(model, **inputs, return_dict=True)
        return outputs, LocationOutput(logits_of(outputs))
    hooks, kind, detach = state.hooks, state.attention, requires.detach_attention
    assert hooks is not None and kind is not None
    with hooks.capture(inputs, kind, detach=detach):
        outputs = original(model, **inputs, return_dict=True)
        output = hooks.to_output(model, logits_of(outputs), inputs, kind, labels, detach, requires.token_logits)
    return outputs, output


@torch.compiler.disable
def _loss(model: nn.Module, state: MixingState, method: Mixing, output: LocationOutput, labels: Tensor) -> Tensor:
    """Return the method's loss and log its terms."""
    if state.blocks is not None and method.block_mixing is not None:
        state.blocks.check(model)
    check_shapes(model, output.logits, labels, state.criterion)
    if output.logits.ndim > 2:
        assert state.label_kind is not None
        output, labels = at_locations(output, labels, state.label_kind.ignored)
    result = method.loss(output, labels, label_smoothing=state.label_smoothing, criterion=state.criterion)
    state.log(result.logs)
    return result.loss


def _with_loss(outputs: Any, loss: Tensor) -> Any:
    if "loss" not in {field.name for field in dataclasses.fields(outputs)}:  # a model for inference (DeiT with teacher)
        return SequenceClassifierOutput(loss=loss, logits=logits_of(outputs))
    return type(outputs)(**{"loss": loss, **{k: v for k, v in outputs.items() if k != "loss"}})
