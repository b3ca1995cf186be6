"""State of a wrapped model: the method, the hooks that it needs, and what to log."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import all_gather_object, is_distributed, raise_if_uneven_inputs
from ..functional import Criterion
from ..locations import BlockHooks, Blocks, LocationError, LocationHooks, Plan, find_blocks, resolve_attention
from ..locations.embeddings import EmbeddingHook, install_embedding_hook
from ..locations.head import check_head
from ..locations.operations import ForwardSize
from ..locations.probe import forward_size, probe_with_size
from ..locations.probe_inputs import batch_size
from ..locations.recording import record
from ..locations.sharded import unsharded
from ..methods import Mixing
from .auto_num_mixed import AutoNumMixed
from .labels import LabelKind, configure, convert_labels, has_location_shape, label_kind

STATE = "mm_hf_state"  # the attribute of a wrapped model


class MixingState:
    """State of a wrapped model: the method, the hooks that it needs, and what to log.

    It refers to no model, so that a deep copy of the model (EMA, early stopping) mixes with its own weights. The method
    is a deep copy, so that one method serves several models, each with its own memory of earlier mini-batches.
    """

    def __init__(self, mixing: Mixing, label_smoothing: float, processing_class: Any, plan: Plan | None = None):
        self.mixing = copy.deepcopy(mixing)
        self.label_smoothing = label_smoothing
        self.processing_class = processing_class
        self.owned_by_trainer = False
        self.ready = False
        self.adapters: Any = None
        self.label_kind: LabelKind | None = None
        self.before: dict[str, Any] = {}
        self.plan: Plan | None = plan
        self.hooks: LocationHooks | None = None
        self.blocks: BlockHooks | None = None
        self.embeddings: EmbeddingHook | None = None
        self.attention: str | None = None
        self.epoch: float | None = None
        self.sharded: bool | None = None  # determined at the first training step
        self.auto_num_mixed = AutoNumMixed() if mixing.is_auto else None
        self.sums: dict[str, Tensor | float] = {}
        self.counts: dict[str, int] = {}

    def is_ready(self, model: nn.Module) -> bool:
        """Return True if probed and the active adapter is unchanged."""
        return self.ready and self.adapters == _active_adapter(model)

    def prepare(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Probe the model with a batch and install the hooks that the method requires.

        Raises:
            ValueError: The labels or the inputs do not fit the model or the method.
            LocationError: The model does not provide what the method requires.
        """
        requires = self.mixing.requirements
        self._check_labels(model, inputs.get("labels"))
        inputs = {k: v for k, v in inputs.items() if k != "labels"}
        self.mixing.check_inputs(inputs, model)
        if not requires.detach_attention and _has_checkpointed_layers(model):
            raise ValueError(
                "detach_attention=False does not work with gradient checkpointing, which recomputes the layer that the "
                "attention is read from. Switch one of the two off."
            )
        size = ForwardSize(0, 1, 1)
        if requires.locations:
            size = self._install_hooks(model, inputs, requires.attention or "uniform")
        elif requires.linear_head:
            with unsharded(model, inputs) as whole_inputs:
                recording = record(model, whole_inputs)
                check_head(recording)
                size = forward_size(recording)
        if self.auto_num_mixed is not None:
            self.auto_num_mixed.count(batch_size(inputs), size)
        if requires.blocks:
            if self.blocks is not None:
                self.blocks.remove()
                self.blocks = None
            self.blocks = BlockHooks(model, _agreed_blocks(model, inputs))
        if requires.embeddings and inputs.get("input_ids") is not None:
            if self.embeddings is not None:
                self.embeddings.remove()
            with unsharded(model, inputs) as whole_inputs:
                self.embeddings = install_embedding_hook(model, whole_inputs)
        self.adapters = _active_adapter(model)
        self.ready = True

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
        if has_location_shape(labels) and not self.mixing.requirements.dense_labels:
            raise ValueError(
                f"{type(model).__name__} has a label for every location, and {self.mixing} mixes one label per "
                'example. Use DenseMultiMix(pooled_weight=0, input_mixing="none"), or ERM().'
            )

    def _install_hooks(self, model: nn.Module, inputs: Mapping[str, Any], kind: str) -> ForwardSize:
        given = self.plan if self.hooks is None else None  # another adapter has other modules: search again
        if self.hooks is not None:
            self.hooks.remove(model)
            self.hooks = None
        plan, size = _agreed_plan(model, inputs, self.processing_class, given)
        self.attention = resolve_attention(kind, plan)
        self.plan, self.hooks = plan, LocationHooks(model, plan)
        return size

    def log(self, values: Mapping[str, Tensor | float]) -> None:
        """Add values to the running means, on the device."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def pop_logs(self) -> dict[str, float]:
        """Return the means since the last call as numbers. This synchronizes the device."""
        means = {name: float(total) / self.counts[name] for name, total in self.sums.items()}
        self.sums, self.counts = {}, {}
        return means


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


def _active_adapter(model: nn.Module) -> Any:
    """Return the active adapter of a PEFT model."""
    return getattr(model, "active_adapter", None) if hasattr(type(model), "get_base_model") else None


def _has_checkpointed_layers(model: nn.Module) -> bool:
    """Return True if a layer of the model is run again in the backward pass."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
