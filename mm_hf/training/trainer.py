"""`Trainer` with a mixing method; arguments, checkpoints and evaluation are those of `Trainer`."""

from __future__ import annotations

import copy
import inspect
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, set_seed
from transformers.modelcard import TrainingSummary
from transformers.utils import logging

from ..methods import ERM, DenseMultiMix, Mixing, balanced_weights, get_method
from ..wrapping.wrapper import MixingHandle, remove_earlier, wrap_model
from .checked import CheckedTrainer
from .dataset_labels import check_dataset_labels, iterate_labels, missing_labels_message
from .hub import MIXING_FILE, load_num_mixed, restore_method_state, save_method_state, save_mixing
from .model_card import card_tags, existing_tags, is_repo_id, is_user_edited, write_card
from .pretrained import load_for_dataset
from .resumable import ResumableTrainer
from .run_settings import training_settings

logger = logging.get_logger(__name__)


class MultiMixTrainer(CheckedTrainer, ResumableTrainer):
    """A [`~transformers.Trainer`] that trains with a mixing method.

    The rest is that of `Trainer`: evaluation and prediction run the model's own forward, checkpoints are those of the
    plain model with `mixing.json` beside them, and `args` is a `TrainingArguments`. The loss of a mini-batch is a mean,
    and gradient accumulation averages it. `args.label_smoothing_factor` smooths the mixed labels.

    Resuming from a checkpoint is exact: the method's memory of earlier mini-batches is saved and restored with the
    random state, and missing weights raise an error (see `mm_hf.training.checkpoints`). The Hub receives the plain
    model, `mixing.json` and a model card; a failed push does not stop the training.

    Args:
        model: A classification model, or the Hub name or directory of a pretrained one, which is loaded in float32: the
            auto class follows from the configuration and `train_dataset`, whose class names (the feature `ClassLabel`)
            become those of the model, and a head with another number of classes is replaced. Or give `model_init`.
        args: Training arguments.
        mixing: The method or its name. Default: `DenseMultiMix()`. With `ERM()`, the training is that of `Trainer`.
        model_init_kwargs: Keyword arguments of `from_pretrained` for a model by name, such as `revision` or
            `attn_implementation`.
        trainer_args: Other arguments of `Trainer`, in its order.
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
        model: nn.Module | str | None = None,
        args: TrainingArguments | None = None,
        *trainer_args: Any,
        mixing: Mixing | str | None = None,
        model_init_kwargs: Mapping[str, Any] | None = None,
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
        named = inspect.signature(Trainer.__init__).bind_partial(self, model, args, *trainer_args, **trainer_kwargs)
        self.compute_loss_func = named.arguments.get("compute_loss_func")
        self._check_loss_function()
        self._labels_of: Any = named.arguments.get("train_dataset")  # for class names and balanced class weights
        # Set before Trainer's constructor, which makes the model if there is a `model_init`.
        self._wrapping: dict[str, Any] = {
            "label_smoothing": args.label_smoothing_factor if args is not None else 0.0,
            "processing_class": named.arguments.get("processing_class"),
        }
        self._last_batch_size: int | None = None
        self._test_dataset: Any = None  # the last one evaluated with the prefix "test", for the model card
        self._card: dict[str, Any] = {}  # arguments of the last model card, for those of later checkpoints
        loaded = self._load_by_name(model, args, named.arguments.get("model_init"), model_init_kwargs)
        super().__init__(loaded, args, *trainer_args, **trainer_kwargs)
        if self.mixes and self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs are visible to one process, for which Trainer uses DataParallel, whose copies "
                "of the model do not mix. Start one process per GPU (accelerate launch, torchrun), or make one GPU "
                "visible (CUDA_VISIBLE_DEVICES=0)."
            )
        if self.train_dataset is not None:
            self._check_batch_size(self.args.train_batch_size)
        if self.mixing_handle is None:
            self._wrap_for_mixing(self.model)
        if self.mixes:
            # The mixing loss is the mean over this batch: Trainer must divide it by the accumulation steps, although
            # the model's signature suggests that the model does so itself.
            self.loss_is_scaled_for_ga = False

    def _load_by_name(
        self, model: nn.Module | str | None, args: Any, model_init: Any, init_kwargs: Mapping[str, Any] | None
    ) -> nn.Module | None:
        """Return the model, loaded if it is a name."""
        if isinstance(model, str):
            if model_init is not None:
                raise ValueError(f"model={model!r} and model_init cannot be combined: leave one of them out.")
            set_seed(args.seed if args is not None else TrainingArguments.seed)  # for a new head, as with model_init
            return load_for_dataset(model, self._labels_of, init_kwargs)
        if init_kwargs is not None:
            raise ValueError(
                "model_init_kwargs are for models that are loaded by name, but model is "
                f"{'missing' if model is None else f'a {type(model).__name__}'}: leave them out, or give a name."
            )
        return model

    def _check_loss_function(self) -> None:
        if self.mixes and self.compute_loss_func is not None:
            raise ValueError(
                f"compute_loss_func cannot be combined with mixing={self.mixing.name!r}, because it computes the loss "
                "from clean logits and labels. Leave it out (class_weights of the method weigh rare classes; focal "
                "loss and other losses of single classes are not defined for mixed examples), or use mixing=ERM()."
            )

    def _check_batch_size(self, batch_size: int) -> None:
        least = self.mixing.requirements.min_examples
        if self.mixes and batch_size < least:
            raise ValueError(
                f"per_device_train_batch_size is {batch_size}, and {type(self.mixing).__name__} mixes examples with "
                f"each other: make it at least {least}, or use ERM(). With several processes, "
                "gather_across_devices=True of MultiMix and DenseMultiMix mixes the examples of all ranks."
            )

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the data loader of `Trainer`, after a check of the batch size, which Trainer may have changed."""
        size = self._train_batch_size  # of auto_find_batch_size or hyperparameter_search
        self._check_batch_size(size)
        if self.mixing_handle is not None and self._last_batch_size not in (None, size):
            self.mixing_handle.num_mixed = None  # num_mixed="auto" depends on the number of examples
        self._last_batch_size = size
        return super().get_train_dataloader()

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

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
        *,
        allow_changed_settings: bool = False,
    ) -> Any:
        """Train, after a check of all labels of the dataset if that is cheap.

        Args:
            resume_from_checkpoint: Directory of a checkpoint; or True for the newest complete checkpoint in
                `args.output_dir`, where damaged or incomplete newer ones are skipped with a warning.
            trial: As in `Trainer.train`.
            ignore_keys_for_eval: As in `Trainer.train`.
            allow_changed_settings: Resume although the method, the batch size, the number of processes, the seed, the
                data or the number of labels differ from those of the checkpoint. The differences are logged. `ERM()`
                always resumes from its own checkpoints, as `Trainer` does.

        Raises:
            ValueError: The checkpoint is damaged or was trained with other settings; no checkpoint is complete;
                another training run writes to `args.output_dir`; or the processes of a job would train independently.
        """
        if self.mixes and self.model is not None:
            if self.model_init is None and self.mixing_handle is not None and not self.mixing_handle.wraps(self.model):
                self.mixing_handle.remove()
                self._wrap_for_mixing(self.model)  # which was set after the constructor
            if not any(p.requires_grad for p in self.model.parameters()):
                raise ValueError(
                    f"No parameter of the {type(self.model).__name__} requires a gradient: set requires_grad of those "
                    "to train, such as the head, to True."
                )
            check_dataset_labels(self.train_dataset, self.model, self.data_collator)
        self._check_loss_function()
        return super().train(
            resume_from_checkpoint, trial, ignore_keys_for_eval, allow_changed_settings=allow_changed_settings
        )

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
        if not isinstance(inputs, Mapping):
            raise ValueError(
                f"data_collator returns a {type(inputs).__name__}: let it return a dictionary with the inputs of the "
                "model and `labels`."
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

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate as `Trainer` does. The model card reports the last evaluation with `metric_key_prefix="test"`."""
        if metric_key_prefix == "test":
            self._test_dataset = eval_dataset
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the terms of the loss and the method's other values to each training log."""
        if self.mixing_handle is not None and "loss" in logs:
            logs.update(self.mixing_handle.pop_logs())
        super().log(logs, start_time)

    # ---- Saving and restoring ----

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
            handle, directory = self.mixing_handle, str(output_dir or self.args.output_dir)
            plan, num_mixed = (None, None) if handle is None else (handle.plan, handle.num_mixed)
            save_mixing(directory, self.mixing, plan, num_mixed, training_settings(self))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.mixing_handle is not None and self.mixing_handle.num_mixed is None:
            self.mixing_handle.num_mixed = load_num_mixed(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        # Trainer calls this right before the first resumed batch: the method's state is restored with the random state.
        super()._load_rng_state(checkpoint)
        if checkpoint is not None and self.mixing_handle is not None:
            restore_method_state(self.mixing_handle, checkpoint, self.args.process_index, self.args.world_size)

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
        # Without a license, the summary asks the Hub for that of the base model, also if this is a local directory.
        base = kwargs.get("finetuned_from") or getattr(getattr(self.model, "config", None), "_name_or_path", None)
        asks = (self.args.push_to_hub or self.hub_model_id is not None) and is_repo_id(base)
        summary = TrainingSummary.from_trainer(self, language, license if asks else license or "", tags, **given)
        summary.license = summary.license or None
        num_mixed = None if self.mixing_handle is None else self.mixing_handle.num_mixed
        write_card(self, self.mixing, summary, num_mixed, self._test_dataset)
