"""`Trainer` with a mixing method: ordinary arguments, ordinary checkpoints, ordinary evaluation."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.modelcard import TrainingSummary
from transformers.utils import logging

from ..methods import ERM, DenseMultiMix, Mixing, get_method
from ..wrapping.labels import check_labels
from ..wrapping.state import STATE
from ..wrapping.wrapper import MixingHandle, wrap_model
from .checkpoints import (
    LAST_FILE,
    explain_write_errors,
    find_checkpoint_error_on_any_rank,
    is_plain_checkpoint,
    last_complete_checkpoint,
    load_weights,
    refuse_missing,
)
from .hub import MIXING_FILE, load_method_state, load_num_mixed, save_method_state, save_mixing
from .model_card import card_tags, is_user_edited, tags_of, write_card
from .push import SafePushTrainer

logger = logging.get_logger(__name__)


class MultiMixTrainer(SafePushTrainer):
    """A [`~transformers.Trainer`] that trains with a mixing method.

    Everything else is Trainer's: evaluation and prediction run the model's own forward, checkpoints are those of the
    plain model (with `mixing.json` beside them), and `args` is an ordinary `TrainingArguments`. The loss of a mini-batch
    is a mean, and accumulated like one. `args.label_smoothing_factor` smooths the mixed labels.

    It also restores checkpoints exactly, and stops where weights are missing: see `mm_hf.training.checkpoints`. What is pushed to
    the Hub is the plain model, `mixing.json` and a model card; a push that fails never costs the training.

    Args:
        model: A classification model, or give `model_init`.
        args: Training arguments.
        mixing: The method or its name; default `DenseMultiMix()`. With `ERM()`, training is Trainer's own.
        trainer_kwargs: Trainer's other arguments.

    Attributes:
        mixing: The method.
        mixing_handle: The handle of the wrapped model (see [`wrap_model`]); None with `ERM()`.

    Raises:
        ValueError: An argument cannot be combined with mixing; the message says which and why.

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
        self.mixes = type(mixing) is not ERM  # a subclass has a loss of its own
        self.mixing_handle: MixingHandle | None = None
        if self.mixes and trainer_kwargs.get("compute_loss_func") is not None:
            raise ValueError(
                f"compute_loss_func cannot be combined with mixing={mixing.name!r}: it is given clean logits and labels, "
                "and the loss of mixed examples would not pass through it. Leave it out, or use mixing=ERM()."
            )
        # Set before: with `model_init`, Trainer's own constructor makes the model.
        self._wrapping: dict[str, Any] = {
            "label_smoothing": args.label_smoothing_factor if args is not None else 0.0,
            "processing_class": trainer_kwargs.get("processing_class"),
        }
        self._card: dict[str, Any] = {}  # what the last card was told, for those of later checkpoints
        super().__init__(model, args, **trainer_kwargs)
        if self.mixes and self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs are visible to one process, for which Trainer uses DataParallel; its copies of "
                "the model would not mix. Start one process for each GPU (accelerate launch, torchrun), or make one "
                "visible (CUDA_VISIBLE_DEVICES=0)."
            )
        if self.mixes and self.args.train_batch_size < mixing.requirements.min_examples:
            raise ValueError(
                "per_device_train_batch_size is 1, and one example has nothing to be mixed with: make it at least 2, or use "
                "mixing=ERM(). With several processes, gather_across_devices=True mixes the examples of all."
            )
        if self.mixing_handle is None:
            self._wrap_for_mixing(self.model)
        if self.mixes:
            # The mixing loss is the mean over this batch: Trainer has to divide it by the accumulation steps, though the
            # model's signature says that it would do so itself.
            self.loss_is_scaled_for_ga = False

    def _wrap_for_mixing(self, model: Any) -> None:
        state = model.__dict__.get(STATE)
        if state is not None and state.owned_by_trainer:  # a notebook cell that is run again
            MixingHandle(model, state).remove()
        if not self.mixes:
            return
        self.mixing_handle = wrap_model(model, self.mixing, **self._wrapping)
        model.__dict__[STATE].owned_by_trainer = True

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Make the model by `model_init`, and wrap it."""
        model = super().call_model_init(trial)
        self._wrap_for_mixing(model)
        return model

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, after a look at the labels of the whole data set where that is cheap.

        Args:
            resume_from_checkpoint: True for the newest checkpoint in `args.output_dir` that is whole; newer ones whose
                writing was interrupted are passed over with a warning. Or a checkpoint's directory.

        Raises:
            ValueError: The checkpoint is not whole, or none is; the message says what is missing.
        """
        if self.mixes:
            self._check_dataset()
        if resume_from_checkpoint:
            resume_from_checkpoint = self._whole_checkpoint(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _whole_checkpoint(self, wanted: str | bool) -> str:
        if wanted is True:
            found = last_complete_checkpoint(str(self.args.output_dir), **self._checkpoint_format)
            if found is None:
                raise ValueError(
                    f"resume_from_checkpoint=True, but there is no whole checkpoint in {self.args.output_dir}: start without it."
                )
            return str(found)
        flaw = find_checkpoint_error_on_any_rank(str(wanted), **self._checkpoint_format)
        if flaw is not None:
            raise ValueError(
                f"The training cannot go on from the checkpoint {wanted}: {flaw}. resume_from_checkpoint=True takes the newest "
                f"one in {self.args.output_dir} that is whole."
            )
        return str(wanted)

    def _check_dataset(self) -> None:
        """Refuse labels that are out of range now and not when their batch comes."""
        features = getattr(self.train_dataset, "features", None) or {}
        name = next((n for n in ("labels", "label", "label_ids") if n in features), None)
        model: Any = self.model
        dataset: Any = self.train_dataset
        transformed = (getattr(dataset, "format", None) or {}).get("type") == "custom"
        if name is None or model is None or transformed:  # a transform may make other labels of the column
            return
        classes = getattr(features[name], "num_classes", None)
        if classes is not None and classes > model.config.num_labels:
            raise ValueError(
                f"The data set has {classes} classes in its column {name!r} and {type(model).__name__} only "
                f"{model.config.num_labels} labels: build the model with num_labels={classes}."
            )
        dtype = str(getattr(features[name], "dtype", ""))
        if dtype.startswith(("int", "uint")) and hasattr(dataset, "with_format"):
            try:
                column = dataset.with_format("torch", columns=[name])[:][name]
            except TypeError:  # streamed: each batch is all there is
                return
            check_labels(model, column)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """In training, hand the batch to the wrapped model; in evaluation, do what Trainer does."""
        if self.mixing_handle is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self.mixing_handle.installed:
            raise ValueError(
                "Another trainer was made for this model since, and the model mixes as that one says: train with the newest "
                "trainer, or make this one again."
            )
        if inputs.get("labels") is None:
            check_labels(self.accelerator.unwrap_model(model), None)
        if not self.mixing_handle.prepared:  # before the first call of a compiled model, which fixes its hooks
            self.mixing_handle.prepare(inputs)
        self.mixing_handle.epoch = self.state.epoch
        outputs = model(**inputs)
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs[0]
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the terms of the loss, and what the method tells about its mixing, to each training log."""
        if self.mixing_handle is not None and "loss" in logs:
            logs.update(self.mixing_handle.pop_logs())
        super().log(logs, start_time)

    # ---- Saving and restoring ----

    @property
    def _checkpoint_format(self) -> dict[str, Any]:
        """What this training's checkpoints are made of."""
        return {
            "process": self.args.process_index,
            "processes": self.args.world_size,
            "model_only": self.args.save_only_model,
            "sharded": self.is_fsdp_enabled or self.is_deepspeed_enabled,
        }

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        directory = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        with explain_write_errors(directory, **self._checkpoint_format):
            if self.args.should_save:  # what an earlier training has left there is no longer whole from now on
                (directory / LAST_FILE).unlink(missing_ok=True)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.mixing_handle is not None:
            save_method_state(
                output_dir, self.mixing_handle.state_dict(), self.args.process_index, self.args.world_size
            )
        # The first process writes `trainer_state.json` next and may then delete older checkpoints: this one must be whole.
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
        refuse_missing(None, set(load_result.missing_keys) - ignorable)
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

        The arguments are those of `Trainer.create_model_card`. A card that a person has completed is kept.
        """
        self._card = {"language": language, "license": license, "tags": tags, **kwargs}
        if not self.is_world_process_zero():
            return
        path = Path(str(self.args.output_dir)) / "README.md"
        if is_user_edited(path):
            logger.info(f"{path} was written or completed by hand and is kept; delete it to have a new one made.")
            return
        tags = [tags] if isinstance(tags, str) else list(tags or [])
        tags = list(dict.fromkeys([*tags, *card_tags(self.mixing), *tags_of(path)]))
        # Trainer takes the names of readers (parquet, imagefolder) for those of data sets.
        given = {**kwargs, "dataset_tags": kwargs.get("dataset_tags") or []}
        summary = TrainingSummary.from_trainer(self, language, license, tags, **given)
        write_card(self, self.mixing, summary, None if self.mixing_handle is None else self.mixing_handle.num_mixed)
