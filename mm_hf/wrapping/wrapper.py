"""Wrap a model so that its own forward computes the mixing loss in training."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..locations import Plan
from ..methods import ERM, Mixing
from .labels import check_task
from .own_loss import check_loss_function
from .progress import TrainingRecord
from .state import MixingState, states_in
from .step import mixing_forward

logger = logging.get_logger(__name__)


class MixingHandle:
    """Handle of a wrapped model, returned by [`wrap_model`]. As a context manager, it calls `remove()` at the end.

    Attributes:
        mixing: The method.
        plan: Plan of the model's locations; None before the first training step (or `example_inputs`), and for methods
            that need none.
        num_mixed: Number of mixed examples per step that `num_mixed="auto"` has selected in the first training step. A
            number that is set before, such as that of a resumed training, is used instead. After it is set to None, the
            next step selects it again, from the number of examples in its mini-batch.
        mixing_share: Expected cost of these mixed examples, as a share of the operations of a training step.
        epoch: Epochs of training so far, as a fraction; None at first. `MultiMixTrainer` sets it; a custom loop sets it
            at the start of each epoch, for methods that depend on it (`DenseMultiMix`).
    """

    def __init__(self, state: MixingState):
        self._state = state

    @property
    def mixing(self) -> Mixing:
        return self._state.mixing

    @property
    def plan(self) -> Plan | None:
        return self._state.plan

    @property
    def num_mixed(self) -> int | None:
        """Number of mixed examples that `num_mixed="auto"` has selected; None before, and for a given number."""
        return None if self._state.auto_num_mixed is None else self._state.auto_num_mixed.num_mixed

    @num_mixed.setter
    def num_mixed(self, value: int | None) -> None:
        if self._state.auto_num_mixed is not None:
            self._state.auto_num_mixed.reset()
            self._state.auto_num_mixed.num_mixed = value

    @property
    def mixing_share(self) -> float | None:
        """Expected cost of the mixed examples that `num_mixed="auto"` has selected; None if it is not known."""
        return None if self._state.auto_num_mixed is None else self._state.auto_num_mixed.share

    @property
    def epoch(self) -> float | None:
        return self._state.epoch

    @epoch.setter
    def epoch(self, value: float | None) -> None:
        self._state.epoch = value

    @property
    def enabled(self) -> bool:
        """If False, the model's own forward runs in training, too. `MultiMixTrainer` sets it to True in `train`."""
        return self._state.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._state.enabled = value

    @property
    def owned_by_trainer(self) -> bool:
        """True for the wrapping of a trainer, which a later trainer or `wrap_model` removes."""
        return self._state.owned_by_trainer

    @owned_by_trainer.setter
    def owned_by_trainer(self, value: bool) -> None:
        self._state.owned_by_trainer = value
        self._state.record.reported = value  # by the trainer

    @property
    def installed(self) -> bool:
        """True until the wrapping is removed or another one replaces it."""
        return self._state.installed

    @property
    def prepared(self) -> bool:
        """True once a batch was probed. The first training step after a change of the adapter probes again."""
        return self._state.ready

    def prepare(self, inputs: Mapping[str, Any]) -> None:
        """Probe and check the model with a batch now. Otherwise, the first training step does."""
        if not self.installed:
            raise ValueError("The wrapping of this model was removed: call wrap_model again.")
        if not self._state.is_ready(self._state.model):
            self._state.prepare(self._state.model, inputs)

    @property
    def record(self) -> TrainingRecord:
        """Counts of the mini-batches of this training, those that were mixed among them."""
        return self._state.record

    def start_run(self) -> None:
        """Begin a new training run: its mini-batches are counted anew, and a changed model is probed again."""
        self._state.start_run()

    def wraps(self, model: nn.Module) -> bool:
        """Return True if `model` is or contains the model that was wrapped."""
        return any(module is self._state.model for module in model.modules())

    @property
    def step(self) -> int | None:
        """Number of the current step in messages; None if the mini-batches are counted."""
        return self._state.step

    @step.setter
    def step(self, value: int | None) -> None:
        self._state.step = value

    def check_losses(self) -> None:
        """Raise an error if a training loss since the last call was not finite. Call it before saving a checkpoint.

        It reads the losses from the device, as `pop_logs` does, and reports those of this rank. On a CPU without other
        ranks, the forward raises the error itself.

        Raises:
            NonFiniteLossError: A loss was not finite. The message states the step, the term and the likely cause.
        """
        self._state.loss_record.check()

    def pop_logs(self) -> dict[str, float]:
        """Return the means since the last call of the loss terms and of the other values that the method logs.

        Raises:
            NonFiniteLossError: A loss since the last call was not finite.
        """
        return self._state.pop_logs()

    def state_dict(self) -> dict[str, Tensor]:
        """Return what the method remembers of earlier mini-batches; empty for most methods.

        `MultiMixTrainer` saves it in checkpoints; a custom loop saves it beside the random state, per rank.
        """
        return self._state.mixing.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        self._state.mixing.load_state_dict(state)

    def remove(self) -> None:
        """Restore the model as it was, and warn if no mini-batch was mixed. A second call does nothing."""
        self._state.remove()
        if self.record.losses:
            report_unmixed(self.record, self.mixing)

    def __enter__(self) -> MixingHandle:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        self.remove()
        if error is None:
            report_unmixed(self.record, self.mixing)


def wrap_model(
    model: nn.Module,
    mixing: Mixing,
    *,
    label_smoothing: float = 0.0,
    processing_class: Any = None,
    example_inputs: Mapping[str, Any] | None = None,
    plan: Plan | None = None,
) -> MixingHandle:
    """Wrap a model so that its loss is the method's in training mode and with labels.

    The model stays the same object with the same parameters. In evaluation mode, or without labels, its own forward
    runs unchanged. Call this before `accelerator.prepare`, and set `handle.epoch = epoch` at the start of each epoch:
    without it, the epoch is 0 for methods that depend on it (`DenseMultiMix`, which after three epochs also mixes
    inputs, and mixes less while the model underfits). Copies and pickles of the model are plain models.

    One warning reports a loop that does not train with the loss of the model, a model whose own loss is not that of its
    logits, and, when the handle is removed, a training that mixed no mini-batch. The outputs of mini-batches whose
    inputs or hidden states were mixed have the attribute `mixed_inputs`: their logits are not those of the examples.

    Args:
        model: A Transformers classification model, also under PEFT.
        mixing: The method, for example `DenseMultiMix()`. The model trains with a deep copy of it.
        label_smoothing: In [0, 1], applied after mixing.
        processing_class: Tokenizer of a text model. It identifies special tokens, which are no locations.
        example_inputs: A batch with labels to probe the model with now. By default, the first training step does.
        plan: Plan of the model's locations, from another process or a checkpoint
            ([`~mm_hf.training.hub.load_plan`]). It is verified on the first batch, instead of a search.

    Returns:
        A handle, which is also a context manager: `handle.remove()` restores the model as it was.

    Raises:
        ValueError: The model is wrapped already, or something else has replaced its forward or its loss function.
        NonFiniteLossError: (at a training step on a CPU; elsewhere by `handle.pop_logs` and `handle.check_losses`) the
            loss is not finite.
        LocationError: The model is a language model; or, now with `example_inputs` and else at the first training step,
            it does not provide what the method requires.

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
    remove_earlier(model)
    _check_unprepared(model)
    check_task(model)
    state = MixingState(model, mixing, label_smoothing, processing_class, plan)
    check_loss_function(model)
    state.install(mixing_forward(type(model).forward))
    weakref.finalize(state, _report_at_exit, state.record, state.mixing)
    handle = MixingHandle(state)
    if example_inputs is not None:
        try:
            handle.prepare(example_inputs)
        except Exception:
            handle.remove()
            raise
    return handle


def report_unmixed(record: TrainingRecord, mixing: Mixing) -> None:
    """Warn once if a training mixed nothing."""
    if record.reported or isinstance(mixing, ERM):
        return
    reason = record.why_unmixed()
    if reason is not None:
        record.reported = True
        logger.warning(f"The training with {mixing.name} mixed no mini-batch: {reason}.")


def _report_at_exit(record: TrainingRecord, mixing: Mixing) -> None:
    """Report the training of a model whose handle was not removed."""
    if record.losses and record.can_be_read:
        report_unmixed(record, mixing)


def remove_earlier(model: nn.Module) -> None:
    """Remove what earlier trainers left in a model.

    Raises:
        ValueError: A handle of `wrap_model` is not removed.
    """
    for state in states_in(model):
        if not state.owned_by_trainer:
            raise ValueError(
                f"This {type(model).__name__} is already wrapped with {state.mixing.name} by wrap_model: call remove() "
                "on the handle that it returned, or load the model again."
            )
        state.remove()


def _check_unprepared(model: nn.Module) -> None:
    """Raise a ValueError for a model whose forward something else has replaced or contains."""
    name = type(model).__name__
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise ValueError(
            "wrap_model must come before torch.compile: wrap the original model (the attribute _orig_mod of this "
            f"{name}) and compile it again. Copies of compiled code would not mix."
        )
    if isinstance(model, nn.DataParallel):
        raise ValueError(
            "DataParallel computes the loss in copies of the model, which do not mix: wrap the model itself (the "
            f"attribute module of this {name}) and start one process per GPU (accelerate launch, torchrun)."
        )
    if hasattr(model, "_hf_hook"):
        raise ValueError(
            f"This {name} was dispatched over several devices or offloaded (device_map), which replaces its forward: "
            'load it on one device, for example with device_map={"": 0}, and wrap it before anything else.'
        )
    if isinstance(model, nn.parallel.DistributedDataParallel) or "forward" in model.__dict__:
        raise ValueError(
            f"wrap_model must come before accelerator.prepare (or DistributedDataParallel): this {name} has been "
            "prepared, or its forward replaced, and mixing would be lost or run outside mixed precision."
        )
