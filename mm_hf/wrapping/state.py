"""State of a wrapped model: the method, the hooks that it needs, and what to log."""

from __future__ import annotations

import copy
import dataclasses
import types
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..distributed import all_gather_object, is_distributed, raise_if_uneven_inputs, warn_if_ranks_train_apart
from ..functional import Criterion, weight_targets
from ..locations import BlockHooks, Blocks, LocationError, LocationHooks, Plan, find_blocks, resolve_attention
from ..locations.attachments import ModuleHooks, attach, detach
from ..locations.embeddings import EmbeddingHook, install_embedding_hook
from ..locations.head import check_head
from ..locations.operations import ForwardSize
from ..locations.probe import forward_size, probe_with_size
from ..locations.probe_inputs import batch_size, num_labels_of
from ..locations.recording import record
from ..locations.sharded import unsharded
from ..methods import Mixing, check_class_weights
from .auto_num_mixed import AutoNumMixed
from .finite import LossRecord, cause_in, check_start
from .first_batch import check_attention, check_layerdrop, check_words
from .labels import LabelKind, configure, convert_labels, has_location_shape, label_kind
from .own_loss import check_loss_function
from .progress import LoggedMeans, TrainingRecord

logger = logging.get_logger(__name__)

STATE = "mm_hf_state"  # the attribute of a wrapped model, of the model inside of it, and of the modules with a hook
# What Accelerate and the wrapping set on a model.
FORWARD_ATTRIBUTES = ("forward", "_original_forward", "_is_accelerate_prepared")
Structure = list[tuple[str, "weakref.ref[nn.Module]"]]


class MixingState(ModuleHooks):
    """State of a wrapped model: the method, the hooks that it needs, and what to log.

    There is one per model. Each module that has something of the wrapping refers to it, so that a later wrapping finds
    and removes it wherever the module is by then. Copies and pickles of the modules do not.

    The method is a deep copy, so that one method serves several models, each with its own memory of earlier
    mini-batches.
    """

    def __init__(
        self, model: nn.Module, mixing: Mixing, label_smoothing: float, processing_class: Any, plan: Plan | None = None
    ):
        self.model = model
        self.mixing = copy.deepcopy(mixing)
        self.label_smoothing = label_smoothing
        self.processing_class = processing_class
        self.enabled = True
        self.owned_by_trainer = False
        self.ready = False
        self.adapters: Any = None
        self.structure: Structure = []
        self.label_kind: LabelKind | None = None
        self.before = {name: model.__dict__[name] for name in FORWARD_ATTRIBUTES if name in model.__dict__}
        self.modules: list[nn.Module] = []
        self._base_handle: Any = None
        self.warned_of_base_call = False
        self.plan: Plan | None = plan
        self.hooks: LocationHooks | None = None
        self.blocks: BlockHooks | None = None
        self.embeddings: EmbeddingHook | None = None
        self.attention: str | None = None
        self.epoch: float | None = None
        self.sharded: bool | None = None  # determined at the first training step
        self.class_weights = _class_weights(self.mixing)
        self.auto_num_mixed = AutoNumMixed() if mixing.is_auto else None
        self.logs = LoggedMeans()
        self.step: int | None = None  # set by a trainer; else mini-batches are counted
        self.mixed_inputs: str | None = None  # name of the method that mixed the inputs or hidden states of this batch
        self.warned_of_discarded_loss = False
        self.record = TrainingRecord()
        self.loss_record = LossRecord()

    def install(self, forward: Callable[..., Any]) -> None:
        """Replace the model's forward."""
        base = base_model(self.model)
        if base is not self.model:
            self._base_handle = base.register_forward_pre_hook(self._warn_of_base_call, with_kwargs=True)
        attach(self.model, forward=types.MethodType(forward, self.model))
        self._mark(self.model, base)

    def _warn_of_base_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Warn once if the model inside of a wrapped PEFT model trains without it, as after merging the adapter."""
        trains = module.training and kwargs.get("labels") is not None  # the wrapped forward passes none
        if trains and self.enabled and not self.warned_of_base_call and not torch.compiler.is_compiling():
            self.warned_of_base_call = True
            logger.warning(
                f"{type(self.model).__name__} is wrapped with {self.mixing.name}, and the {type(module).__name__} "
                "inside of it was called in training mode: nothing is mixed. Remove the handle and wrap the model that "
                "you train."
            )

    @property
    def installed(self) -> bool:
        """True until `remove`."""
        return self.model.__dict__.get(STATE) is self

    def remove(self) -> None:
        """Restore the model as it was. A second call does nothing."""
        if not self.installed:
            return
        if self.hooks is not None:
            self.hooks.remove()
        for hooks in (self.blocks, self.embeddings):
            if hooks is not None:
                hooks.remove()
        if self._base_handle is not None:
            self._base_handle.remove()
        for module in self.modules:
            if module.__dict__.get(STATE) is self:
                detach(module, STATE)
        # This also removes what Accelerate put around our forward; preparing the model again puts it around the
        # original.
        detach(self.model, *FORWARD_ATTRIBUTES)
        self.model.__dict__.update(self.before)

    def _mark(self, *modules: nn.Module) -> None:
        for module in modules:
            attach(module, **{STATE: self})
        self.modules.extend(modules)

    def is_ready(self, model: nn.Module) -> bool:
        """Return True if probed and the active adapter is unchanged."""
        return self.ready and self.adapters == _active_adapter(model)

    def prepare(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Probe the model with a batch and install the hooks that the method requires.

        Raises:
            ValueError: The labels or the inputs do not fit the model or the method.
            LocationError: The model does not provide what the method requires.
        """
        warn_if_ranks_train_apart()
        requires = self.mixing.requirements
        check_loss_function(model)
        self._check_labels(model, inputs.get("labels"))
        inputs = {k: v for k, v in inputs.items() if k != "labels"}
        check_start(model, inputs)
        self.mixing.check_inputs(inputs, model)
        if not requires.detach_attention and _has_checkpointed_layers(model):
            raise ValueError(
                "detach_attention=False does not work with gradient checkpointing, which recomputes the layer that the "
                "attention is read from. Switch one of the two off."
            )
        if requires.blocks:
            check_layerdrop(model, self.mixing.name)
        size = ForwardSize(0, 1, 1)
        if requires.locations:
            size = self._install_location_hooks(model, inputs, requires.attention or "uniform")
            assert self.plan is not None and self.attention is not None
            check_attention(self.attention, self.criterion)
            check_words(inputs, self.plan)
            check_layerdrop(model, self.mixing.name, self.plan, self.attention)
        elif requires.linear_head:
            with unsharded(model, inputs) as whole_inputs:
                recording = record(model, whole_inputs)
                check_head(recording)
                size = forward_size(recording)
        if self.auto_num_mixed is not None:
            self.auto_num_mixed.count(batch_size(inputs), size)
        if requires.blocks:
            self._install_block_hooks(model, inputs)
        if requires.embeddings and inputs.get("input_ids") is not None:
            self._install_embedding_hook(model, inputs)
        self.adapters, self.structure = _active_adapter(model), _structure(model)
        self.ready = True

    def start_run(self) -> None:
        """Begin a new training run. The model is probed again if its modules have changed, such as its head."""
        self.record, self.loss_record = TrainingRecord(), LossRecord()
        self.record.reported = self.owned_by_trainer
        if self.ready and self.structure != _structure(self.model):
            self.ready = False
            if self.label_kind is not None and self.label_kind.num_labels != num_labels_of(self.model):
                self.label_kind = None

    @property
    def criterion(self) -> Criterion:
        """Criterion that the labels call for."""
        return "cross_entropy" if self.label_kind is None else self.label_kind.criterion

    def convert_labels(self, labels: Any) -> Tensor:
        """Convert and check the labels of a mini-batch, after `prepare`."""
        assert self.label_kind is not None
        return convert_labels(labels, self.label_kind)

    def _check_labels(self, model: nn.Module, labels: Any) -> None:
        if self.label_kind is None:  # the model's loss in evaluation may configure another one later
            self.label_kind = label_kind(model, labels)
            configure(model, self.label_kind)
        labels = self.convert_labels(labels)
        if self.label_smoothing and self.criterion != "cross_entropy":
            raise ValueError(
                f"label_smoothing spreads class probabilities, and {type(model).__name__} is trained by "
                f"{self.criterion}: leave it at 0."
            )
        if self.class_weights is not None:
            self._check_class_weights(model, self.class_weights)
        if has_location_shape(labels) and not self.mixing.requirements.dense_labels:
            raise ValueError(
                f"{type(model).__name__} has a label for every location, and {self.mixing} mixes one label per "
                'example. Use DenseMultiMix(pooled_weight=0, input_mixing="none"), or ERM().'
            )

    def _check_class_weights(self, model: nn.Module, weights: Tensor) -> None:
        if self.criterion != "cross_entropy":
            raise ValueError(
                f"class_weights weigh examples by their one class, and {type(model).__name__} is trained by "
                f"{self.criterion}: leave them out."
            )
        assert self.label_kind is not None
        if len(weights) != self.label_kind.num_labels:
            raise ValueError(
                f"class_weights has {len(weights)} numbers, and {type(model).__name__} has "
                f"{self.label_kind.num_labels} labels: give one for each class."
            )

    def weigh(self, labels: Tensor) -> Tensor:
        """Return labels as targets that are multiplied by the class weights; unchanged without class weights."""
        if self.class_weights is None:
            return labels
        self.class_weights = self.class_weights.to(labels.device)
        return weight_targets(labels, self.class_weights)

    def _install_location_hooks(self, model: nn.Module, inputs: Mapping[str, Any], kind: str) -> ForwardSize:
        given = self.plan if self.hooks is None else None  # another adapter has other modules: search again
        if self.hooks is not None:
            self.hooks.remove()
            self.hooks = None
        plan, size = _agreed_plan(model, inputs, self.processing_class, given)
        self.attention = resolve_attention(kind, plan)
        self.plan, self.hooks = plan, LocationHooks(model, plan)
        self._mark(*self.hooks.modules)
        return size

    def _install_block_hooks(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        if self.blocks is not None:
            self.blocks.remove()
            self.blocks = None
        self.blocks = BlockHooks(model, _agreed_blocks(model, inputs))
        self._mark(*self.blocks.modules)

    def _install_embedding_hook(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        if self.embeddings is not None:
            self.embeddings.remove()
        with unsharded(model, inputs) as whole_inputs:
            self.embeddings = install_embedding_hook(model, whole_inputs)
        if self.embeddings is not None:
            self._mark(self.embeddings.module)

    def log_loss(self, loss: Tensor, values: Mapping[str, Tensor | float], logits: Tensor) -> None:
        """Log the loss of a mini-batch and its other values, on the device.

        Raises:
            NonFiniteLossError: The loss is not finite. On a GPU, and with several ranks, this is raised later.
        """
        self.logs.add(values)
        if loss.requires_grad:
            loss.register_hook(self.record.on_backward)
        terms = {k.removeprefix("loss_"): v for k, v in values.items() if k.startswith("loss_") and torch.is_tensor(v)}
        terms.pop("terms", None)
        step = self.record.losses if self.step is None else self.step
        self.loss_record.add(step, {"loss": loss.detach(), **terms}, _is_scaled(logits))

    def check_loss(self, inputs: Mapping[str, Any]) -> None:
        """Check the loss of a mini-batch at once where this waits for no device and no rank."""
        devices = {x.device.type for x in inputs.values() if isinstance(x, Tensor)}
        if devices <= {"cpu"} and not is_distributed() and self.loss_record.is_bad():
            self.loss_record.check(cause_in(self.model, inputs))

    def pop_logs(self) -> dict[str, float]:
        """Return the means since the last call as numbers. This synchronizes the device.

        Raises:
            NonFiniteLossError: A loss since the last call was not finite.
        """
        self.loss_record.check()
        self.record.read()
        return self.logs.pop()


def _class_weights(mixing: Mixing) -> Tensor | None:
    weights = check_class_weights(mixing.class_weights)  # a subclass may have set them unchecked
    if weights == "balanced":
        raise ValueError(
            'class_weights="balanced" is computed from the labels of a dataset, by MultiMixTrainer: give wrap_model '
            "the numbers, mm_hf.methods.balanced_weights(labels, num_labels)."
        )
    return None if weights is None else torch.tensor(weights)


def _agreed_plan(
    model: nn.Module, inputs: Mapping[str, Any], processing_class: Any, given: Plan | None
) -> tuple[Plan, ForwardSize]:
    """Return one plan for all ranks, and the size of this rank's forward.

    The ranks probe different batches, which may lead to different plans.
    """
    sizes: list[ForwardSize] = []

    def find() -> dict[str, Any]:
        plan, size = probe_with_size(model, inputs, processing_class, given)
        sizes.append(size)
        return plan.to_dict()

    with unsharded(model, inputs) as inputs:
        plans = _on_all_ranks(find)
        first = Plan.from_dict(plans[0])
        if any(plan != plans[0] for plan in plans):
            return probe_with_size(model, inputs, processing_class, first)
        return first, sizes[0]


def _agreed_blocks(model: nn.Module, inputs: Mapping[str, Any]) -> Blocks:
    """Return the blocks of rank 0. Each rank verifies those that it finds."""
    with unsharded(model, inputs) as inputs:
        return Blocks(**_on_all_ranks(lambda: dataclasses.asdict(find_blocks(model, inputs)))[0])


def _on_all_ranks(find: Callable[[], dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the result of each rank. An error on one rank raises on all ranks, which would otherwise deadlock."""
    ranks = torch.distributed.get_world_size() if is_distributed() else 1
    if ranks == 1:
        return [find()]
    raise_if_uneven_inputs("Probing the model at the first mini-batch", "give wrap_model example_inputs")
    try:
        found = find()
    except LocationError as error:
        found = {"error": str(error)}
    results = all_gather_object(found)
    errors = [result["error"] for result in results if "error" in result]
    if errors:
        raise LocationError(errors[0])
    return results


def states_in(model: nn.Module) -> list[MixingState]:
    """Return the states of all wrappings that left something in a model or its submodules."""
    found = [module.__dict__[STATE] for module in model.modules() if STATE in module.__dict__]
    return list(dict.fromkeys(found))


def base_model(model: nn.Module) -> nn.Module:
    """Return the model inside of a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(type(model), "get_base_model") else model  # type: ignore[operator]


def _active_adapter(model: nn.Module) -> Any:
    """Return the active adapter of a PEFT model."""
    return getattr(model, "active_adapter", None) if hasattr(type(model), "get_base_model") else None


def _structure(model: nn.Module) -> Structure:
    """Return the names and the identities of all modules."""
    return [(name, weakref.ref(module)) for name, module in model.named_modules()]


def _is_scaled(logits: Tensor) -> bool:
    """Return True in float16, where a gradient scaler skips steps."""
    kind = logits.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return logits.dtype == torch.float16 or (autocast and torch.get_autocast_dtype(kind) == torch.float16)


def _has_checkpointed_layers(model: nn.Module) -> bool:
    """Return True if a layer of the model is run again in the backward pass."""
    # timm's name is `grad_checkpointing`.
    names = ("gradient_checkpointing", "grad_checkpointing")
    return any(getattr(module, name, False) is True for module in model.modules() for name in names)
