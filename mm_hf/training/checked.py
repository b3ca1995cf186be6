"""A trainer that verifies each step: the method computed its loss, which is finite, and a mini-batch was mixed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.utils import logging

from ..distributed import first_message
from ..methods import Mixing
from ..wrapping.finite import NonFiniteLossError, nonfinite_weight
from ..wrapping.wrapper import MixingHandle
from .checkpoints import find_checkpoint_error, list_checkpoints

logger = logging.get_logger(__name__)


class CheckedTrainer(Trainer):
    """A Trainer of a wrapped model that verifies its training. It is a base of [`MultiMixTrainer`].

    The model mixes only inside `train` and `compute_loss`. Without a handle, as with `ERM()`, the training is that of
    `Trainer`.
    """

    mixing: Mixing
    mixing_handle: MixingHandle | None
    _is_enabled = False
    _steps = 0  # training steps of the current or last `train`

    def _enable_mixing(self, enabled: bool) -> None:
        """Let the model mix in training mode, also a model that `model_init` makes later."""
        self._is_enabled = enabled
        if self.mixing_handle is not None:
            self.mixing_handle.enabled = enabled

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, and check the losses. A warning reports a training that mixed no mini-batch.

        Raises:
            NonFiniteLossError: A loss was not finite. The last checkpoint is kept.
        """
        if self.mixing_handle is None and self.model_init is None:
            return super().train(*args, **kwargs)
        self._steps = 0
        if self.mixing_handle is not None:
            self.mixing_handle.start_run()
        self._enable_mixing(True)
        try:
            output = super().train(*args, **kwargs)
            self._check_losses()
        except NonFiniteLossError as error:
            raise NonFiniteLossError(f"{error} {self._kept_checkpoint()}") from None
        finally:
            self._enable_mixing(False)
        if self.unmixed is not None and self.is_world_process_zero():
            logger.warning(f"The training with {self.mixing.name} mixed no mini-batch: {self.unmixed}.")
        return output

    @property
    def unmixed(self) -> str | None:
        """Clause that states why the last training mixed no mini-batch; None if it mixed one, or trained no step."""
        handle = self.mixing_handle
        return None if handle is None or not self._steps else handle.record.why_unmixed()

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run a training step, and check that its backward pass went through the loss of the method.

        Raises:
            ValueError: It did not.
        """
        handle = self.mixing_handle
        if handle is None:
            return super().training_step(model, *args, **kwargs)
        self._steps += 1
        before = handle.record.used
        loss = super().training_step(model, *args, **kwargs)
        if handle.record.used == before:
            raise ValueError(
                f"The training step was computed without the loss of {self.mixing.name}, so that nothing is mixed. "
                f"compute_loss of {type(self).__name__} must pass the labels to the model and use the loss that the "
                "model returns; or train with mixing=ERM()."
            )
        return loss

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        # All ranks are here together, and logs are read from the device anyway.
        if self.control.should_log or self.control.should_evaluate or self.control.should_save:
            self._check_losses()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.mixing_handle is not None:
            self._check_losses()
            self._check_weights()
        super()._save_checkpoint(model, trial)

    def _check_losses(self) -> None:
        """Raise an error on all ranks if a loss of one rank was not finite."""
        if self.mixing_handle is None:
            return
        message = None
        try:
            self.mixing_handle.check_losses()
        except NonFiniteLossError as error:
            message = str(error)
        _raise_on_all_ranks(message)

    def _check_weights(self) -> None:
        """Raise an error on all ranks if a weight is not finite, although all losses were."""
        name = None if self.model is None else nonfinite_weight(self.model)
        message = (
            f"The weight {name} is not finite after step {self.state.global_step}: a gradient was not finite, or the "
            "learning rate is too large. Lower the learning rate, or add warmup or max_grad_norm."
        )
        _raise_on_all_ranks(None if name is None else message)

    def _kept_checkpoint(self) -> str:
        found = list_checkpoints(str(self.args.output_dir))
        how: dict[str, Any] = self._checkpoint_format  # type: ignore[attr-defined]
        complete = next((path for path in found if find_checkpoint_error(path, **how) is None), None)
        return "No checkpoint was saved." if complete is None else f"The last checkpoint, {complete}, was kept."


def _raise_on_all_ranks(message: str | None) -> None:
    message = first_message(message)
    if message is not None:
        raise NonFiniteLossError(message)
