"""Wrap a model so that its own forward computes the mixing loss in training."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..locations import Plan
from ..methods import Mixing
from .labels import check_task
from .state import STATE, MixingState
from .step import mixing_forward

REPLACED = (STATE, "forward", "_original_forward", "_is_accelerate_prepared")


class MixingHandle:
    """Handle of a wrapped model, returned by [`wrap_model`]. As a context manager, it calls `remove()` at the end.

    Attributes:
        mixing: The method.
        plan: Plan of the model's locations; None before the first training step (or `example_inputs`), and for methods
            that need none.
        num_mixed: Number of mixed examples per step that `num_mixed="auto"` has selected in the first training step. A
            number that is set before, such as that of a resumed training, is used instead.
        mixing_share: Expected cost of these mixed examples, as a share of the operations of a training step.
        epoch: Epochs of training so far, as a fraction; None at first. `MultiMixTrainer` sets it; a custom loop sets it
            at the start of each epoch, for methods that depend on it (`DenseMultiMix(input_mixing_start=...)`).
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
        """Number of mixed examples that `num_mixed="auto"` has selected; None before, and for a given number."""
        return None if self._state.auto_num_mixed is None else self._state.auto_num_mixed.num_mixed

    @num_mixed.setter
    def num_mixed(self, value: int | None) -> None:
        if self._state.auto_num_mixed is not None:
            self._state.auto_num_mixed.num_mixed, self._state.auto_num_mixed.share = value, None

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
    def installed(self) -> bool:
        """True until the wrapping is removed or another one replaces it."""
        return self._model is not None and self._model.__dict__.get(STATE) is self._state

    @property
    def prepared(self) -> bool:
        """True once a batch was probed. The first training step after a change of the adapter probes again."""
        return self._state.ready

    def prepare(self, inputs: Mapping[str, Any]) -> None:
        """Probe and check the model with a batch now. Otherwise, the first training step does."""
        if self._model is None:
            raise ValueError("The wrapping of this model was removed: call wrap_model again.")
        if not self._state.is_ready(self._model):
            self._state.prepare(self._model, inputs)

    def pop_logs(self) -> dict[str, float]:
        """Return the means since the last call of the loss terms and of the other values that the method logs."""
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
        """Restore the model as it was. A second call does nothing."""
        model, self._model = self._model, None
        if model is None:
            return
        # This also removes what accelerate put around our forward; preparing the model again puts it around the
        # original.
        for name in REPLACED:
            model.__dict__.pop(name, None)
        model.__dict__.update(self._state.before)
        if self._state.hooks is not None:
            self._state.hooks.remove(model)
        for hooks in (self._state.blocks, self._state.embeddings):
            if hooks is not None:
                hooks.remove()

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
    """Wrap a model so that its loss is the method's in training mode and with labels.

    The model stays the same object with the same parameters. In evaluation mode, or without labels, its own forward
    runs unchanged. Call this before `accelerator.prepare`, and set `handle.epoch = epoch` at the start of each epoch:
    without it, the epoch is 0 for methods that depend on it (`DenseMultiMix`, which also mixes inputs after three
    epochs).

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
        ValueError: The model is wrapped already, or was prepared by accelerate before.
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
    if STATE in model.__dict__:
        raise ValueError(
            f"This {type(model).__name__} is already wrapped with {model.__dict__[STATE].mixing.name}: call remove() "
            "on the handle of the first wrap_model before wrapping it again."
        )
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or "forward" in model.__dict__:
        raise ValueError(
            "wrap_model must come before accelerator.prepare (or DistributedDataParallel): this "
            f"{type(model).__name__} has been prepared, or its forward replaced, and mixing would be lost or run "
            "outside mixed precision."
        )
    check_task(model)
    state = MixingState(mixing, label_smoothing, processing_class, plan)
    state.before = {name: model.__dict__[name] for name in REPLACED if name in model.__dict__}
    model.__dict__[STATE] = state
    model.__dict__["forward"] = types.MethodType(mixing_forward(type(model).forward), model)
    handle = MixingHandle(model, state)
    if example_inputs is not None:
        try:
            handle.prepare(example_inputs)
        except Exception:
            handle.remove()
            raise
    return handle
