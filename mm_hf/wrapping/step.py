"""One training step inside a wrapped model's forward: from a batch to the method's loss.

`mm_hf.methods.base` draws the complete life of a batch; `_training_forward` is its part inside the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import logging

from ..functional import count_valid
from ..locations import LocationOutput
from ..locations.attachments import REPLACED_FORWARD
from ..locations.probe_inputs import batch_size
from ..locations.recording import logits_of, takes_return_dict
from ..locations.sharded import is_sharded
from ..methods import ERM, Mixing
from .labels import at_locations, check_shapes
from .own_loss import warn_of_own_loss
from .state import STATE, MixingState

# A key of outputs whose inputs or hidden states were mixed: the name of the method. Their logits are not those of the
# examples, for example for distillation.
MIXED_INPUTS = "mixed_inputs"

logger = logging.get_logger(__name__)


def mixing_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward with the original's signature that computes the mixing loss in training.

    It refers to the class's forward and to no model. In a copy of the model, where Accelerate's wrapper still calls it,
    it runs the class's forward.
    """

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state: MixingState | None = self.__dict__.get(STATE)
        if state is None or not state.enabled or not self.training:
            return original(self, *args, **kwargs)
        if args:
            bound = signature.bind(self, *args, **kwargs)
            kwargs = _flat_arguments(bound.arguments, signature)
        if kwargs.get("labels") is None:
            _note_unlabeled(self, state)
            return original(self, **kwargs)
        return _training_forward(self, state, as_dictionary, kwargs)

    def as_dictionary(self: nn.Module, **kwargs: Any) -> Any:
        return original(self, **kwargs, **named)

    signature = inspect.signature(original)
    named = {"return_dict": True} if takes_return_dict(original) else {}
    # Not functools.wraps: accelerate's unwrap_model follows __wrapped__ past this function and would lose it, and a
    # bound __wrapped__ hides the first parameter from the Trainer, which would then drop the model's main input.
    forward.__signature__ = signature  # type: ignore[attr-defined]
    forward.__doc__ = original.__doc__
    setattr(forward, REPLACED_FORWARD, original)
    return forward


def _flat_arguments(arguments: Mapping[str, Any], signature: inspect.Signature) -> dict[str, Any]:
    """Return bound arguments as keyword arguments, without the first one, the model."""
    flat: dict[str, Any] = {}
    for position, (name, value) in enumerate(arguments.items()):
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            flat.update(value)
        elif position > 0:
            flat[name] = value
    return flat


def _training_forward(
    model: nn.Module, state: MixingState, original: Callable[..., Any], inputs: dict[str, Any]
) -> Any:
    """Run the model's own forward without labels and return its outputs with the method's loss."""
    labels = inputs.pop("labels")
    inputs.pop("num_items_in_batch", None)  # the loss is a mean over this batch, whatever the accumulation
    as_tuple = inputs.pop("return_dict", None) is False
    if not state.is_ready(model):
        _prepare(model, state, original, inputs, labels)
    method, mixed, labels = _mix(model, state, inputs, labels)
    try:
        outputs, output = _forward(model, state, method, original, mixed, labels)
    finally:
        for hooks in (state.blocks, state.embeddings):
            if hooks is not None:
                hooks.end()
    outputs = _with_loss(outputs, _loss(model, state, method, output, labels, inputs))
    if not isinstance(outputs, Mapping):
        return outputs
    if as_tuple:
        return tuple(v for v in outputs.values() if v is not None)
    if state.mixed_inputs is not None:
        _mark(outputs, state.mixed_inputs)
    return outputs


def _mark(outputs: Any, name: str) -> None:
    """Mark outputs of mixed inputs: a plain dictionary by a key, other outputs by an attribute.

    DistributedDataParallel rebuilds other outputs from their keys, which must be fields of their class.
    """
    if type(outputs) is dict:
        outputs[MIXED_INPUTS] = name
    else:
        setattr(outputs, MIXED_INPUTS, name)


# Random numbers are drawn, and the loss computed, outside compiled regions: inductor has generators of its own, which
# checkpoints do not restore, and does not speed up the loop over chunks.
@torch.compiler.disable
def _prepare(
    model: nn.Module, state: MixingState, original: Callable[..., Any], inputs: dict[str, Any], labels: Any
) -> None:
    state.prepare(model, {**inputs, "labels": labels})
    if state.record.losses == 0:
        assert state.label_kind is not None
        warn_of_own_loss(model, original, inputs, labels, state.label_kind)


@torch.compiler.disable
def _note_unlabeled(model: nn.Module, state: MixingState) -> None:
    """Warn once of a forward in training mode that can have no mixing loss."""
    record = state.record
    if not torch.is_grad_enabled() or state.owned_by_trainer or isinstance(state.mixing, ERM):
        return  # a trainer checks each of its steps
    record.unlabeled += 1
    if record.unlabeled == 1 and record.losses == 0:
        logger.warning(
            f"{type(model).__name__} is wrapped with {state.mixing.name} and was called in training mode without "
            "labels: nothing is mixed. Pass the labels to the model and train with the loss that it returns; a loss "
            "that is computed from its logits is that of plain training."
        )


def _warn_of_discarded_loss(model: nn.Module, state: MixingState) -> None:
    """Warn once if the model trains, and not by the losses that it returned."""
    weight = next((p for p in model.parameters() if p.requires_grad), None)
    if weight is not None and not state.owned_by_trainer and state.record.is_discarded(weight):
        if not state.warned_of_discarded_loss and not isinstance(state.mixing, ERM):
            logger.warning(
                f"{type(model).__name__} is wrapped with {state.mixing.name}, and its weights changed although no "
                "backward pass used the loss that it returned: nothing is mixed. Train with this loss; a loss that is "
                "computed from its logits is that of plain training."
            )
        state.warned_of_discarded_loss = True


@torch.compiler.disable
def _mix(
    model: nn.Module, state: MixingState, inputs: dict[str, Any], labels: Tensor
) -> tuple[Mixing, dict[str, Any], Tensor]:
    """Convert the labels, select the method of this mini-batch, and let it mix the inputs and the labels."""
    labels = state.convert_labels(labels)
    _warn_of_discarded_loss(model, state)
    mixing = state.mixing
    if state.auto_num_mixed is not None:
        mixing = mixing.with_num_mixed(state.auto_num_mixed.select(mixing, batch_size(inputs), labels.device))
    if state.sharded is None:
        state.sharded = is_sharded(model)
    method = mixing.for_batch(inputs, labels, epoch=state.epoch, same_on_all_ranks=state.sharded)
    mixed, labels = method.mix_inputs(inputs, labels, model, state.criterion)
    state.mixed_inputs = None if mixed is inputs and method.block_mixing is None else method.name
    if state.blocks is not None and method.block_mixing is not None:
        state.blocks.begin(method.block_mixing)
    if mixed.get("input_ids") is not None and mixed.get("inputs_embeds") is not None:
        if state.embeddings is None:
            del mixed["input_ids"]
        else:
            state.embeddings.begin(mixed.pop("inputs_embeds"))
    return method, mixed, labels


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
        outputs = original(model, **inputs)
        return outputs, LocationOutput(logits_of(outputs))
    hooks, kind, detach = state.hooks, state.attention, requires.detach_attention
    assert hooks is not None and kind is not None
    with hooks.capture(inputs, kind, detach=detach):
        outputs = original(model, **inputs)
        output = hooks.to_output(model, logits_of(outputs), inputs, kind, labels, detach, requires.token_logits)
    return outputs, output


@torch.compiler.disable
def _loss(
    model: nn.Module,
    state: MixingState,
    method: Mixing,
    output: LocationOutput,
    labels: Tensor,
    inputs: dict[str, Any],
) -> Tensor:
    """Return the method's loss and log its terms."""
    if state.blocks is not None and method.block_mixing is not None:
        state.blocks.check(model)
    check_shapes(model, output.logits, labels, state.criterion)
    if output.logits.ndim > 2:
        assert state.label_kind is not None
        output, labels = at_locations(output, labels, state.label_kind.ignored)
    if output.labels is not None:
        output.labels = state.weigh(output.labels)
    options: dict[str, Any] = {"label_smoothing": state.label_smoothing, "criterion": state.criterion}
    result = method.loss(output, state.weigh(labels), **options)
    mixes = method.mixes(len(labels)) or isinstance(state.mixing, ERM)
    # Other criteria ignore no label. Once a mini-batch was mixed, valid labels need not be counted.
    counts = mixes and state.criterion == "cross_entropy" and not state.record.has_mixed
    state.record.add(mixes, len(labels), count_valid(labels, output.logits, state.criterion) if counts else None)
    state.log_loss(result.loss, result.logs, output.logits)
    state.check_loss(inputs)
    return result.loss


def _with_loss(outputs: Any, loss: Tensor) -> Any:
    """Return a model's outputs with a loss: a dictionary as one, and a tuple as one that begins with the loss."""
    if isinstance(outputs, tuple):
        return (loss, *(x for x in outputs if x is not None))
    named = {k: v for k, v in outputs.items() if k != "loss"} if isinstance(outputs, Mapping) else {}
    if "loss" in getattr(outputs, "__dataclass_fields__", {}):
        return type(outputs)(loss=loss, **named)
    if type(outputs) is dict:
        return {"loss": loss, **named}
    return SequenceClassifierOutput(loss=loss, logits=logits_of(outputs))  # also a model for inference (DeiT)
