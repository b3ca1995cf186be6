"""Data, models, and training shared by the example scripts."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

import transformers
from datasets import DatasetDict, load_dataset
from transformers import AutoConfig, TrainingArguments, set_seed

from ...data.models import configuration
from ...methods import Mixing
from ...training.checkpoints import list_checkpoints
from ...training.pretrained import from_pretrained
from ...training.trainer import MultiMixTrainer
from .._options import check_output_dir, quiet
from .options import DataArguments, ModelArguments

logger = logging.getLogger("mm_hf.examples")


def image_size(processor: Any) -> tuple[int, int]:
    """Return the height and width that an image processor resizes to; a square if it has only a shortest edge."""
    size = dict(processor.size)
    side: int = size.get("shortest_edge", 224)
    return size.get("height", side), size.get("width", side)


def set_up(training_args: TrainingArguments, mixing: Mixing) -> None:
    """Configure logging and progress bars, and set the seeds.

    Raises:
        ValueError: The output directory of a new training run has checkpoints.
    """
    if training_args.do_train and training_args.resume_from_checkpoint is None:
        directory = Path(str(training_args.output_dir))
        check_output_dir(directory, list_checkpoints(directory))
    if training_args.disable_tqdm:
        quiet()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    transformers.utils.logging.set_verbosity(training_args.get_process_log_level())
    logger.info("mixing: %s", mixing)
    set_seed(training_args.seed)


def load_from_hub(data_args: DataArguments, model_args: ModelArguments) -> DatasetDict:
    """Load the dataset `--dataset_name` from the Hub."""
    return load_dataset(
        data_args.dataset_name, data_args.dataset_config_name, cache_dir=model_args.cache_dir, token=model_args.token
    )


def check_columns(data: DatasetDict, data_args: DataArguments, *options: str) -> None:
    """Raise a ValueError if the dataset does not have the columns that these options name."""
    for option in options:
        column = getattr(data_args, option)
        if column not in data["train"].column_names:
            raise ValueError(
                f"--{option} is {column!r}, but the dataset has the columns "
                f"{', '.join(data['train'].column_names)}: choose one of them."
            )


def train_and_validation(data: DatasetDict, data_args: DataArguments, seed: int) -> DatasetDict:
    """Return the splits `train` and `validation` with at most the maximum numbers of examples."""
    held_out = next((split for split in ("validation", "test") if split in data), None)
    if held_out is not None and data_args.train_val_split is None:
        data = DatasetDict(train=data["train"], validation=data[held_out])
    else:
        parts = data["train"].train_test_split(data_args.train_val_split or 0.15, seed=seed)
        data = DatasetDict(train=parts["train"], validation=parts["test"])
    for split, most in [("train", data_args.max_train_samples), ("validation", data_args.max_eval_samples)]:
        if most is not None and most < len(data[split]):
            data[split] = data[split].shuffle(seed=seed).select(range(most))
    return data


def load_model(auto_class: Any, model_args: ModelArguments, names: list[str], task: str, **settings: Any) -> Any:
    """Load a model of an auto class, or create one from scratch with `settings` as defaults of its configuration."""
    labels: dict[str, Any] = {
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
        "num_labels": len(names),
    }
    if model_args.model_name_or_path is None:
        config = configuration(model_args.model_type, model_args.config_overrides or "", **labels, **settings)
        return auto_class.from_config(config)
    config = from_pretrained(
        AutoConfig, model_args.model_name_or_path, **labels, finetuning_task=task, **model_args.hub
    )
    return from_pretrained(
        auto_class,
        model_args.model_name_or_path,
        config=config,
        ignore_mismatched_sizes=model_args.ignore_mismatched_sizes,
        **model_args.hub,
    )


def card_arguments(
    task: str,
    finetuned_from: str | None,
    data: str | None,
    dataset_name: str | None,
    offline: Collection[str | None],
    *tags: str,
) -> dict[str, Any]:
    """Return the arguments of `Trainer.create_model_card` and `Trainer.push_to_hub`.

    Args:
        task: Task of the pipeline, which is also a tag.
        finetuned_from: Name of the pretrained model.
        data: Training data: a dataset, a directory or a file.
        dataset_name: `--dataset_name`, a Hub name unless it is one of `offline`.
        offline: Names of datasets that are not on the Hub.
        tags: Additional tags.
    """
    return {
        "finetuned_from": finetuned_from,
        "tasks": task,
        "dataset": data,
        "dataset_tags": None if dataset_name in offline else dataset_name,
        "tags": [task, *tags],
    }


def train_and_evaluate(trainer: MultiMixTrainer, card: dict[str, Any]) -> None:
    """Train and save the model, evaluate it, and write a model card or push to the Hub."""
    training_args = trainer.args
    if training_args.do_train:
        checkpoint = training_args.resume_from_checkpoint
        result = trainer.train(
            resume_from_checkpoint=str(checkpoint).lower() in ("last", "true") or checkpoint,
            allow_changed_settings=getattr(training_args, "allow_changed_settings", False),
        )
        trainer.save_model()
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
    if training_args.do_eval:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if training_args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)
    if training_args.do_train and trainer.is_world_process_zero():
        logger.info("Wrote the model and its metrics to %s.", training_args.output_dir)
