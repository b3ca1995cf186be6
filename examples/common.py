"""Options, data, models, and training shared by the example scripts."""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import transformers
from datasets import DatasetDict, load_dataset
from transformers import AutoConfig, HfArgumentParser, TrainingArguments, set_seed

from mm_hf import Mixing, MultiMixTrainer, get_method
from mm_hf.cli._options import expand_option_file
from mm_hf.data.models import configuration, from_pretrained
from mm_hf.methods import METHODS
from mm_hf.methods.settings import nearest

logger = logging.getLogger("mm_hf.examples")


def image_size(processor: Any) -> tuple[int, int]:
    """Return the height and width that an image processor resizes to; a square if it has only a shortest edge."""
    size = dict(processor.size)
    side: int = size.get("shortest_edge", 224)
    return size.get("height", side), size.get("width", side)


@dataclass
class ModelArguments:
    """Model to train. The scripts' own classes set the default of `model_type`."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Pretrained model: a Hub name or a directory. Default: train a model from scratch."},
    )
    model_type: str = field(default="", metadata={"help": "Architecture of a model trained from scratch."})
    config_overrides: str | None = field(
        default=None,
        metadata={
            "help": "Configuration of a model trained from scratch: hidden_size=192,num_hidden_layers=6, or JSON for "
            'lists: {"depths": [1, 1]}'
        },
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the Hub."})
    cache_dir: str | None = field(default=None, metadata={"help": "Directory for downloads."})
    token: str | None = field(
        default=None, metadata={"help": "Hub token. Default: the token stored by `hf auth login`."}
    )
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Replace the head if its number of classes differs."}
    )

    @property
    def hub(self) -> dict[str, Any]:
        """Keyword arguments of `from_pretrained` that concern the Hub."""
        return {
            "revision": self.model_revision,
            "cache_dir": self.cache_dir,
            "token": self.token,
            "trust_remote_code": False,
        }


@dataclass
class DataArguments:
    """Data to train on. The scripts' own classes add files and columns."""

    dataset_name: str | None = field(default=None, metadata={"help": "Hub name or an offline dataset."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    train_val_split: float | None = field(
        default=None,
        metadata={
            "help": "Share of the training set for validation. Default: use the validation or test split, or else 0.15."
        },
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Maximum number of training examples."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Maximum number of validation examples."})


@dataclass
class MixingArguments:
    """Mixing method."""

    mixing: str = field(
        default="dense_multimix",
        metadata={"help": f"Mixing method ({', '.join(sorted(METHODS))}); erm is plain training."},
    )


@dataclass
class ScriptArguments(TrainingArguments):
    """Training arguments of Transformers, and how to resume."""

    allow_changed_settings: bool = field(
        default=False,
        metadata={"help": "Resume although the method, batch size, seed or data differ from those of the checkpoint."},
    )


Model = TypeVar("Model", bound=ModelArguments)
Data = TypeVar("Data", bound=DataArguments)


class _Parser(HfArgumentParser):
    """Parser that raises ValueError for an invalid command line."""

    def error(self, message: str) -> Any:
        """Raise a ValueError."""
        raise ValueError(f"{message[:1].upper()}{message[1:]}. --help lists the options.")


def _with_value_of_resume(arguments: list[str]) -> list[str]:
    """Add the value "true", the last checkpoint, to `--resume_from_checkpoint` without a value."""
    found = []
    for argument, following in zip(arguments, [*arguments[1:], "--"]):
        bare = argument == "--resume_from_checkpoint" and following.startswith("--")
        found += [argument, "true"] if bare else [argument]
    return found


def reports_errors(main: Callable[[], None]) -> Callable[[], None]:
    """Decorate the main function of a script to print user errors as one sentence, with exit code 2."""

    @functools.wraps(main)
    def run() -> None:
        try:
            main()
        except (ValueError, OSError) as error:
            if os.environ.get("MM_HF_DEBUG"):
                raise
            print(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}", file=sys.stderr)
            sys.exit(2)

    return run


def parse_arguments(
    arguments: list[str], model_class: type[Model], data_class: type[Data], training_class: Any = ScriptArguments
) -> tuple[Model, Data, Any, Mixing]:
    """Parse an option file and options, which override it, including the fields of the selected mixing method.

    Raises:
        ValueError: An option is unknown or its value invalid, or there is nothing to do.
    """
    given = _with_value_of_resume(expand_option_file(arguments))
    first = HfArgumentParser([MixingArguments], add_help=False, allow_abbrev=False)  # type: ignore[list-item]
    method = get_method(first.parse_known_args(given)[0].mixing)
    classes: Any = (model_class, data_class, training_class, MixingArguments, method)
    parser = _Parser(classes, allow_abbrev=False)
    *parsed, unknown = parser.parse_args_into_dataclasses(given, return_remaining_strings=True)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        raise ValueError(f"{unknown[0]} is not an option{nearest(unknown[0], known)}: --help lists the options.")
    model_args, data_args, training_args, _, mixing = parsed
    tasks = [
        getattr(training_args, name) for name in ("do_train", "do_eval", "do_predict") if hasattr(training_args, name)
    ]
    if tasks and not any(tasks):
        raise ValueError("There is nothing to do: give --do_train, --do_eval or both.")
    return model_args, data_args, training_args, mixing


def set_up(training_args: TrainingArguments, mixing: Mixing) -> None:
    """Configure logging and set the seeds."""
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
        # The option is a string: "true" selects the last checkpoint, any other value is a directory.
        checkpoint = training_args.resume_from_checkpoint
        result = trainer.train(
            resume_from_checkpoint=str(checkpoint).lower() == "true" or checkpoint,
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
