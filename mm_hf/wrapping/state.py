"""What a wrapped model carries, and the look at the model and a first batch that all processes agree on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import all_gather_object, is_distributed, raise_if_uneven_inputs
from ..functional import Criterion
from ..locations import BlockHooks, Blocks, LocationError, LocationHooks, Plan, find_blocks, probe, resolve_attention
from ..locations.head import check_head
from ..locations.recording import record
from ..locations.sharded import unsharded
from ..methods import Mixing
from .auto_num_mixed import AutoNumMixed
from .labels import check_labels


class MixingState:
    """What a wrapped model carries: the method, how to see its locations, and what to log.

    It refers to no model, so that a deep copy of the model (EMA, early stopping) mixes with its own weights.
    """

    def __init__(self, mixing: Mixing, label_smoothing: float, processing_class: Any, plan: Plan | None = None):
        self.mixing = mixing
        self.label_smoothing = label_smoothing
        self.processing_class = processing_class
        self.owned_by_trainer = False
        self.ready = False
        self.adapters: Any = None
        self.criterion: Criterion = "cross_entropy"
        self.before: dict[str, Any] = {}
        self.plan: Plan | None = plan
        self.hooks: LocationHooks | None = None
        self.blocks: BlockHooks | None = None
        self.attention: str | None = None
        self.epoch: float | None = None
        self.sharded: bool | None = None  # known from the first training step on
        self.auto_num_mixed = AutoNumMixed() if mixing.is_auto else None
        self.sums: dict[str, Tensor | float] = {}
        self.counts: dict[str, int] = {}

    def prepare(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Look at the model and a batch once, before the first mixed step, and refuse what cannot be trained."""
        if self.is_ready(model):
            return
        labels: Any = inputs.get("labels")
        self.criterion = check_labels(model, labels)
        if self.label_smoothing and self.criterion != "cross_entropy":
            raise ValueError(
                f"label_smoothing spreads class probabilities, and {type(model).__name__} is trained by "
                f"{self.criterion}: leave it at 0."
            )
        forward_inputs = {k: v for k, v in inputs.items() if k != "labels"}
        self.mixing.check_inputs(forward_inputs)
        kind = self.mixing.attention_kind
        dense_labels = labels.ndim > 1 and not labels.is_floating_point() and self.criterion == "cross_entropy"
        if dense_labels and not self.mixing.takes_dense_labels:
            raise ValueError(
                f"{type(model).__name__} has a label for every location, and {self.mixing} mixes one label an example. Use "
                'DenseMultiMix(pooled_weight=0, input_mixing="none"), or ERM().'
            )
        if kind is not None:
            # After another adapter was chosen what is called has changed, and only a search tells.
            given = self.plan if self.hooks is None else None
            if self.hooks is not None:
                self.hooks.remove(model)
                self.hooks = None
            plan = _agreed_plan(model, forward_inputs, self.processing_class, given)
            self.attention = resolve_attention(kind, plan)
            self.plan, self.hooks = plan, LocationHooks(model, plan)
        elif self.mixing.needs_linear_head:
            with unsharded(model, forward_inputs) as whole_inputs:
                check_head(record(model, whole_inputs))
        if self.mixing.needs_blocks:
            if self.blocks is not None:
                self.blocks.remove()
                self.blocks = None
            self.blocks = BlockHooks(model, _agreed_blocks(model, forward_inputs))
        if not getattr(self.mixing, "detach_attention", True) and _recomputes(model):
            raise ValueError(
                "detach_attention=False does not work with gradient checkpointing, which recomputes the layer that the "
                "attention is read from. Switch one of the two off."
            )
        self.adapters = _adapters(model)
        self.ready = True

    def is_ready(self, model: nn.Module) -> bool:
        """Whether the model is as it was when it was looked at."""
        return self.ready and self.adapters == _adapters(model)

    def log(self, values: Mapping[str, Tensor | float]) -> None:
        """Add to the running means, on the device."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def pop_logs(self) -> dict[str, float]:
        """Means since the last call, as numbers; this waits for the device."""
        means = {name: float(total) / self.counts[name] for name, total in self.sums.items()}
        self.sums, self.counts = {}, {}
        return means


def _agreed_plan(model: nn.Module, inputs: Mapping[str, Any], processing_class: Any, given: Plan | None) -> Plan:
    """The plan that all processes have come to. They look at different batches, and one may show less than another."""
    with unsharded(model, inputs) as inputs:
        plans = _everywhere(lambda: probe(model, inputs, processing_class, given).to_dict())
        first = Plan.from_dict(plans[0])
        return probe(model, inputs, processing_class, first) if any(plan != plans[0] for plan in plans) else first


def _agreed_blocks(model: nn.Module, inputs: Mapping[str, Any]) -> Blocks:
    """The blocks that all processes mix in: each has proved those that it found."""
    with unsharded(model, inputs) as inputs:
        return Blocks(**_everywhere(lambda: dataclasses.asdict(find_blocks(model, inputs)))[0])


def _everywhere(look: Callable[[], dict[str, Any]]) -> list[dict[str, Any]]:
    """What each process found. An error of one stops all: one that went on would wait for the others for ever."""
    processes = torch.distributed.get_world_size() if is_distributed() else 1
    if processes == 1:
        return [look()]
    raise_if_uneven_inputs("Looking at the model at the first mini-batch", "give wrap_model example_inputs")
    try:
        found = look()
    except LocationError as error:
        found = {"error": str(error)}
    everywhere = all_gather_object(found)
    errors = [x["error"] for x in everywhere if "error" in x]
    if errors:
        raise LocationError(errors[0])
    return everywhere


def _adapters(model: nn.Module) -> Any:
    """The adapters of PEFT that are in use."""
    return getattr(model, "active_adapter", None) if hasattr(type(model), "get_base_model") else None


def _recomputes(model: nn.Module) -> bool:
    """Whether any of the model's layers is checkpointed: run again in the backward pass."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
