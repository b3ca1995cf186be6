"""Let a model's own forward compute the mixing loss while it trains, and nothing else change."""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from ..locations import LocationOutput, Plan
from ..locations.recording import logits_of
from ..locations.sharded import is_sharded
from ..methods import Mixing
from .labels import at_locations, check_shapes
from .state import MixingState

STATE = "mm_hf_state"
REPLACED = (STATE, "forward", "_original_forward", "_is_accelerate_prepared")


class MixingHandle:
    """Returned by [`wrap_model`]: undoes the wrapping by `remove()` or at the end of a `with` block.

    Attributes:
        mixing: The method.
        plan: How the model's locations are found; None before the first training step (or `example_inputs`), and for
            methods that need none.
        num_mixed: The number of mixed examples a step that "auto" has come to. Setting it, as a resumed training does, ends
            the search.
        epoch: How many epochs the training has behind it, in fractions; None at first. `MultiMixTrainer` keeps it, a loop
            of one's own sets it at the start of each epoch: `DenseMultiMix(input_mixing_start=...)` counts in it.
    """

    def __init__(self, model: nn.Module, state: MixingState):
        self._model: nn.Module | None = model
        self._state = state

    @property
    def mixing(self) -> Mixing:
        return self._state.mixing

    @property
    def plan(self) -> Plan | None:
        return self._state.plan

    @property
    def num_mixed(self) -> int | None:
        """What the clock decided, with `num_mixed="auto"`; None before it has, and for a number that was given."""
        return None if self._state.auto_num_mixed is None else self._state.auto_num_mixed.num_mixed

    @num_mixed.setter
    def num_mixed(self, value: int | None) -> None:
        if self._state.auto_num_mixed is not None:
            self._state.auto_num_mixed.num_mixed = value

    @property
    def epoch(self) -> float | None:
        return self._state.epoch

    @epoch.setter
    def epoch(self, value: float | None) -> None:
        self._state.epoch = value

    @property
    def installed(self) -> bool:
        """Whether the model still trains by this wrapping: it was not removed, and no other took its place."""
        return self._model is not None and self._model.__dict__.get(STATE) is self._state

    def prepare(self, inputs: Mapping[str, Any]) -> None:
        """Probe and check the model with a batch now (it happens by itself at the first training step)."""
        assert self._model is not None, "This model has been unwrapped."
        self._state.prepare(self._model, inputs)

    def pop_logs(self) -> dict[str, float]:
        """Means, since the last call, of the loss's terms and of what the method tells about its mixing."""
        return self._state.pop_logs()

    def remove(self) -> None:
        """Give the model back as it was. A second call does nothing."""
        model, self._model = self._model, None
        if model is None:
            return
        # What accelerate put around our forward goes with it; preparing the model again puts it around the model's own.
        for name in REPLACED:
            model.__dict__.pop(name, None)
        model.__dict__.update(self._state.before)
        if self._state.hooks is not None:
            self._state.hooks.remove(model)
        if self._state.blocks is not None:
            self._state.blocks.remove()

    def __enter__(self) -> MixingHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def wrap_model(
    model: nn.Module,
    mixing: Mixing,
    *,
    label_smoothing: float = 0.0,
    processing_class: Any = None,
    example_inputs: Mapping[str, Any] | None = None,
    plan: Plan | None = None,
) -> MixingHandle:
    """Train a model with a mixing method: in training mode and with labels, its loss is the method's.

    The model stays the same object with the same parameters; in evaluation mode, or without labels, its own forward
    runs untouched. Call this before `accelerator.prepare`, and say `handle.epoch = epoch` at the start of each epoch: without it
    methods that change with the epoch (`DenseMultiMix`, which mixes inputs, too, after three) stay as at the beginning.

    Args:
        model: A Transformers classification model, also under PEFT.
        mixing: The method, for example `DenseMultiMix()`.
        label_smoothing: In [0, 1]; spread over the classes after mixing.
        processing_class: The tokenizer of a text model: it knows which tokens are special and so no locations.
        example_inputs: A batch to probe the model with now, labels included. Without it the first training step does.
        plan: How the model's locations are found, from another process or a checkpoint ([`~mm_hf.training.hub.load_plan`]). It is
            proved on the first batch, in place of a search.

    Returns:
        A handle: `handle.remove()` gives the model back as it was; it is a context manager, too.

    Raises:
        ValueError: The model is wrapped already, or was prepared by accelerate before.
        LocationError: (now with `example_inputs`, else at the first training step) the model does not show what the
            method needs.

    Example:
        >>> import torch
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> from mm_hf import DenseMultiMix, wrap_model
        >>> config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        ...                    image_size=32, patch_size=8, num_labels=10)
        >>> model = ViTForImageClassification(config).train()
        >>> images, labels = torch.randn(8, 3, 32, 32), torch.randint(10, (8,))
        >>> with wrap_model(model, DenseMultiMix(num_mixed=100)):
        ...     model(pixel_values=images, labels=labels).loss.backward()
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch module, got {type(model).__name__}.")
    if not isinstance(mixing, Mixing):
        raise ValueError(f"mixing must be a mixing method such as DenseMultiMix(), got {mixing!r}.")
    if STATE in model.__dict__:
        raise ValueError(
            f"This {type(model).__name__} is already wrapped with {model.__dict__[STATE].mixing.name}: call remove() on "
            "the handle of the first wrap_model before wrapping it again."
        )
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or "forward" in model.__dict__:
        raise ValueError(
            f"wrap_model must come before accelerator.prepare (or DistributedDataParallel): this {type(model).__name__} "
            "has been prepared, or its forward replaced, and mixing would be lost or run outside mixed precision."
        )
    state = MixingState(mixing, label_smoothing, processing_class, plan)
    state.before = {name: model.__dict__[name] for name in REPLACED if name in model.__dict__}
    model.__dict__[STATE] = state
    model.__dict__["forward"] = types.MethodType(_mixing_forward(type(model).forward), model)
    handle = MixingHandle(model, state)
    if example_inputs is not None:
        try:
            handle.prepare(example_inputs)
        except Exception:
            handle.remove()
            raise
    return handle


def _mixing_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """A forward with the original's signature. It knows the class's forward only, never a model: see `MixingState`."""

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
    """The model's own forward without labels, and the method's loss put in the place of the model's."""
    state: MixingState = model.__dict__[STATE]
    labels = inputs.pop("labels")
    inputs.pop("num_items_in_batch", None)  # the loss is a mean over this batch, whatever the accumulation
    as_tuple = inputs.pop("return_dict", None) is False
    if not state.is_ready(model):
        _prepare(model, state, {**inputs, "labels": labels})
    method, inputs, targets = _choose(model, state, inputs, labels)
    try:
        outputs, location_output = _forward(model, state, method, original, inputs, targets)
    finally:
        if state.blocks is not None:
            state.blocks.end()
    loss = _loss(model, state, method, location_output, targets)
    rest = {k: v for k, v in outputs.items() if k != "loss"}
    if "loss" in {field.name for field in dataclasses.fields(outputs)}:
        outputs = type(outputs)(**{"loss": loss, **rest})
    else:  # a model that is made for use only (DeiT with its teacher): it gets a place for its loss
        outputs = SequenceClassifierOutput(loss=loss, logits=logits_of(outputs))
    return outputs.to_tuple() if as_tuple else outputs


def _forward(
    model: nn.Module,
    state: MixingState,
    method: Mixing,
    original: Callable[..., Any],
    inputs: dict[str, Any],
    targets: Tensor,
) -> tuple[Any, LocationOutput]:
    """The model's outputs, and what the method wants to see of its locations."""
    if method.attention_kind is None:
        outputs = original(model, **inputs, return_dict=True)
        return outputs, LocationOutput(logits_of(outputs))
    assert state.hooks is not None and state.attention is not None
    detach = getattr(method, "detach_attention", True)
    with state.hooks.capture(inputs, state.attention, detach=detach):
        outputs = original(model, **inputs, return_dict=True)
        location_output = state.hooks.to_output(
            model, logits_of(outputs), inputs, state.attention, targets, detach, method.scores_locations
        )
    return outputs, location_output


# Random numbers are drawn, and the loss computed, outside compiled regions: inductor has generators of its own, which
# checkpoints do not restore, and the walk over chunks is nothing that it could make faster.
@torch.compiler.disable
def _prepare(model: nn.Module, state: MixingState, inputs: dict[str, Any]) -> None:
    state.prepare(model, inputs)


@torch.compiler.disable
def _choose(
    model: nn.Module, state: MixingState, inputs: dict[str, Any], labels: Tensor
) -> tuple[Mixing, dict[str, Any], Tensor]:
    mixing = state.mixing
    if state.auto_num_mixed is not None:
        mixing = mixing.with_num_mixed(state.auto_num_mixed.begin(labels.device))
    if state.sharded is None:
        state.sharded = is_sharded(model)
    method = mixing.for_batch(inputs, labels, epoch=state.epoch, same_on_all_ranks=state.sharded)
    inputs, targets = method.mix_inputs(inputs, labels, model, state.criterion)
    if state.blocks is not None and method.block_mixing is not None:
        state.blocks.begin(method.block_mixing)
    return method, inputs, targets


@torch.compiler.disable
def _loss(model: nn.Module, state: MixingState, method: Mixing, output: LocationOutput, labels: Tensor) -> Tensor:
    if state.blocks is not None and method.block_mixing is not None:
        state.blocks.check(model)
    check_shapes(model, output.logits, labels, state.criterion)
    output, labels = at_locations(model, output, labels)
    timed = state.auto_num_mixed if isinstance(method, type(state.mixing)) else None
    if timed is not None:
        timed.loss_begins(labels.device)
    result = method.loss(output, labels, label_smoothing=state.label_smoothing, criterion=state.criterion)
    if timed is not None:
        timed.loss_ends(labels.device)
    state.log(result.logs)
    return result.loss
