"""`Trainer` with a mixing method; arguments, checkpoints and evaluation are those of `Trainer`."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.modelcard import TrainingSummary
from transformers.utils import logging

from ..methods import ERM, DenseMultiMix, Mixing, balanced_weights, get_method
from ..wrapping.wrapper import MixingHandle, remove_earlier, wrap_model
from .checked import CheckedTrainer
from .checkpoints import (
    LAST_FILE,
    explain_write_errors,
    find_checkpoint_error_on_any_rank,
    is_plain_checkpoint,
    last_complete_checkpoint,
    load_weights,
    raise_if_missing,
)
from .dataset_labels import check_dataset_labels, iterate_labels, missing_labels_message
from .hub import MIXING_FILE, load_method_state, load_num_mixed, save_method_state, save_mixing
from .model_card import card_tags, existing_tags, is_user_edited, write_card
from .push import SafePushTrainer

logger = logging.get_logger(__name__)


class MultiMixTrainer(CheckedTrainer, SafePushTrainer):
    """A [`~transformers.Trainer`] that trains with a mixing method.

    The rest is that of `Trainer`: evaluation and prediction run the model's own forward, checkpoints are those of the
    plain model with `mixing.json` beside them, and `args` is a `TrainingArguments`. The loss of a mini-batch is a mean,
    and gradient accumulation averages it. `args.label_smoothing_factor` smooths the mixed labels.

    Resuming from a checkpoint is exact: the method's memory of earlier mini-batches is saved and restored with the
    random state, and missing weights raise an error (see `mm_hf.training.checkpoints`). The Hub receives the plain
    model, `mixing.json` and a model card; a failed push does not stop the training.

    Args:
        model: A classification model, or give `model_init`.
        args: Training arguments.
        mixing: The method or its name. Default: `DenseMultiMix()`. With `ERM()`, the training is that of `Trainer`.
        trainer_kwargs: Other arguments of `Trainer`.

    Attributes:
        mixing: The method.
        mixing_handle: Handle of the wrapped model (see [`wrap_model`]); None with `ERM()` without class weights. Its
            `mixing` has the numbers of class weights that are "balanced".

    Raises:
        ValueError: An argument cannot be combined with mixing.

    Example:
        >>> import tempfile, torch
        >>> from datasets import Dataset
        >>> from transformers import TrainingArguments, ViTConfig, ViTForImageClassification
        >>> from mm_hf import DenseMultiMix, MultiMixTrainer
        >>> config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        ...                    image_size=16, patch_size=8, num_channels=1, num_labels=2)
        >>> data = [{"pixel_values": torch.randn(1, 16, 16), "labels": i % 2} for i in range(8)]
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     args = TrainingArguments(directory, max_steps=1, disable_tqdm=True, use_cpu=True)
        ...     trainer = MultiMixTrainer(ViTForImageClassification(config), args, train_dataset=data,
        ...                               mixing=DenseMultiMix(num_mixed=10))
        ...     steps = trainer.train().global_step
        {'train_runtime': ...}
        >>> steps
        1
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *,
        mixing: Mixing | str | None = None,
        **trainer_kwargs: Any,
    ):
        if mixing is None:
            mixing = DenseMultiMix()
        elif isinstance(mixing, str):
            mixing = get_method(mixing)()
        if not isinstance(mixing, Mixing):
            raise ValueError(f"mixing must be a method such as DenseMultiMix() or the name of one, got {mixing!r}.")
        self.mixing = mixing
        # A subclass of ERM may define another loss.
        self.mixes = type(mixing) is not ERM or mixing.class_weights is not None
        self.mixing_handle: MixingHandle | None = None
        self.compute_loss_func = trainer_kwargs.get("compute_loss_func")
        self._check_loss_function()
        # Set before Trainer's constructor, which makes the model if there is a `model_init`.
        self._wrapping: dict[str, Any] = {
            "label_smoothing": args.label_smoothing_factor if args is not None else 0.0,
            "processing_class": trainer_kwargs.get("processing_class"),
        }
        self._labels_of: Any = trainer_kwargs.get("train_dataset")  # for balanced class weights
        self._card: dict[str, Any] = {}  # arguments of the last model card, for those of later checkpoints
        super().__init__(model, args, **trainer_kwargs)
        if self.mixes and self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs are visible to one process, for which Trainer uses DataParallel, whose copies "
                "of the model do not mix. Start one process per GPU (accelerate launch, torchrun), or make one GPU "
                "visible (CUDA_VISIBLE_DEVICES=0)."
            )
        if self.mixes and self.args.train_batch_size < mixing.requirements.min_examples:
            raise ValueError(
                f"per_device_train_batch_size is {self.args.train_batch_size}, and {type(mixing).__name__} mixes "
                f"examples with each other: make it at least {mixing.requirements.min_examples}, or use ERM(). "
                "With several processes, gather_across_devices=True of MultiMix and DenseMultiMix mixes the examples "
                "of all ranks."
            )
        if self.mixing_handle is None:
            self._wrap_for_mixing(self.model)
        if self.mixes:
            # The mixing loss is the mean over this batch: Trainer must divide it by the accumulation steps, although
            # the model's signature suggests that the model does so itself.
            self.loss_is_scaled_for_ga = False

    def _check_loss_function(self) -> None:
        if self.mixes and self.compute_loss_func is not None:
            raise ValueError(
                f"compute_loss_func cannot be combined with mixing={self.mixing.name!r}, because it computes the loss "
                "from clean logits and labels. Leave it out (class_weights of the method weigh rare classes; focal "
                "loss and other losses of single classes are not defined for mixed examples), or use mixing=ERM()."
            )

    def _wrap_for_mixing(self, model: Any) -> None:
        if not self.mixes:
            remove_earlier(model)
            return
        mixing = self.mixing
        if mixing.class_weights == "balanced":
            mixing = copy.copy(mixing)
            mixing.class_weights = balanced_weights(iterate_labels(self._labels_of), model.config.num_labels)
        self.mixing_handle = wrap_model(model, mixing, **self._wrapping)
        self.mixing_handle.owned_by_trainer = True
        self._enable_mixing(self._is_enabled)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Make the model with `model_init`, and wrap it."""
        model = super().call_model_init(trial)
        self._wrap_for_mixing(model)
        return model

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, after a check of all labels of the dataset if that is cheap.

        Args:
            resume_from_checkpoint: Directory of a checkpoint; or True for the newest complete checkpoint in
                `args.output_dir`, where incomplete newer ones are skipped with a warning.

        Raises:
            ValueError: The checkpoint is incomplete, or no checkpoint is complete.
        """
        if self.mixes and self.model is not None:
            check_dataset_labels(self.train_dataset, self.model, self.data_collator)
        if resume_from_checkpoint:
            resume_from_checkpoint = self._complete_checkpoint(resume_from_checkpoint)
        self._check_loss_function()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _complete_checkpoint(self, wanted: str | bool) -> str:
        if wanted is True:
            found = last_complete_checkpoint(str(self.args.output_dir), **self._checkpoint_format)
            if found is None:
                raise ValueError(
                    f"resume_from_checkpoint=True, but there is no complete checkpoint in {self.args.output_dir}: "
                    "start without it."
                )
            return str(found)
        error = find_checkpoint_error_on_any_rank(str(wanted), **self._checkpoint_format)
        if error is not None:
            raise ValueError(
                f"The training cannot resume from the checkpoint {wanted}: {error}. resume_from_checkpoint=True "
                f"selects the newest complete one in {self.args.output_dir}."
            )
        return str(wanted)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the loss of the wrapped model in training, and that of `Trainer` in evaluation."""
        if self.mixing_handle is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self.mixing_handle.installed:
            raise ValueError(
                "A newer trainer was made for this model and has replaced this one's mixing: train with the newer "
                "trainer, or make this one again."
            )
        if inputs.get("labels") is None:
            name = type(self.accelerator.unwrap_model(model)).__name__
            raise ValueError(missing_labels_message(self.train_dataset, name))
        if not self.mixing_handle.prepared:  # before the first call of a compiled model, which fixes its hooks
            self.mixing_handle.prepare(inputs)
        self.mixing_handle.epoch, self.mixing_handle.step = self.state.epoch, self.state.global_step + 1
        enabled = self._is_enabled
        self._enable_mixing(True)
        try:
            outputs = model(**inputs)
        finally:
            self._enable_mixing(enabled)
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs[0]
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the terms of the loss and the method's other values to each training log."""
        if self.mixing_handle is not None and "loss" in logs:
            logs.update(self.mixing_handle.pop_logs())
        super().log(logs, start_time)

    # ---- Saving and restoring ----

    @property
    def _checkpoint_format(self) -> dict[str, Any]:
        """Arguments of `find_checkpoint_error` for the checkpoints of this training."""
        return {
            "rank": self.args.process_index,
            "world_size": self.args.world_size,
            "model_only": self.args.save_only_model,
            "sharded": self.is_fsdp_enabled or self.is_deepspeed_enabled,
        }

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        directory = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        with explain_write_errors(directory, **self._checkpoint_format):
            if self.args.should_save:  # a checkpoint of an earlier training becomes incomplete
                (directory / LAST_FILE).unlink(missing_ok=True)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.mixing_handle is not None:
            save_method_state(
                output_dir, self.mixing_handle.state_dict(), self.args.process_index, self.args.world_size
            )
        # Rank 0 writes `trainer_state.json` next and may then delete older checkpoints: this one must be complete.
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            handle = self.mixing_handle
            plan, num_mixed = (None, None) if handle is None else (handle.plan, handle.num_mixed)
            save_mixing(str(output_dir or self.args.output_dir), self.mixing, plan, num_mixed)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        model = self.model if model is None else model
        assert model is not None
        if self.mixing_handle is not None and self.mixing_handle.num_mixed is None:
            self.mixing_handle.num_mixed = load_num_mixed(resume_from_checkpoint)
        if self._restores(model, resume_from_checkpoint):
            load_weights(model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        # Trainer calls this right before the first resumed batch: the method's state is restored with the random state.
        super()._load_rng_state(checkpoint)
        if checkpoint is not None and self.mixing_handle is not None:
            state = load_method_state(checkpoint, self.args.process_index, self.args.world_size)
            self.mixing_handle.load_state_dict(state)

    def _load_best_model(self) -> None:
        best, model = self.state.best_model_checkpoint, self.model
        if best is not None and model is not None and self._restores(model, best):
            load_weights(model, best)
        else:
            super()._load_best_model()

    def _restores(self, model: nn.Module, directory: str) -> bool:
        return not self._checkpoint_format["sharded"] and is_plain_checkpoint(model, directory)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        model: Any = self.model
        ignorable = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
        raise_if_missing(None, set(load_result.missing_keys) - ignorable)
        super()._issue_warnings_after_load(load_result)

    # ---- The Hub ----

    def _complete_checkpoint_push(self, checkpoint_folder: str) -> None:
        settings = Path(checkpoint_folder) / MIXING_FILE
        if settings.is_file():
            shutil.copy(settings, str(self.args.output_dir))
        self.create_model_card(**self._card)

    def create_model_card(  # type: ignore[override]
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the model card to `README.md`: how to use the model, results, method, settings, citation.

        The arguments are those of `Trainer.create_model_card`. A card that was edited is kept.
        """
        self._card = {"language": language, "license": license, "tags": tags, **kwargs}
        if not self.is_world_process_zero():
            return
        path = Path(str(self.args.output_dir)) / "README.md"
        if is_user_edited(path):
            logger.info(f"{path} was edited and is kept; delete it to write a new one.")
            return
        tags = [tags] if isinstance(tags, str) else list(tags or [])
        tags = list(dict.fromkeys([*tags, *card_tags(self.mixing), *existing_tags(path)]))
        # Trainer takes the names of readers (parquet, imagefolder) for names of datasets.
        given = {**kwargs, "dataset_tags": kwargs.get("dataset_tags") or []}
        summary = TrainingSummary.from_trainer(self, language, license, tags, **given)
        write_card(self, self.mixing, summary, None if self.mixing_handle is None else self.mixing_handle.num_mixed)
