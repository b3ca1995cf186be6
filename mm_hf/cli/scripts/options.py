"""Options of the example scripts. Their command line is that of `mm-hf`."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import TrainingArguments

from ...methods import Mixing, get_method
from ...methods.settings import check_required, settings_of
from .. import run
from .._methods import METHODS_HELP, method_name, other_settings
from .._option_files import expand_option_file
from .._options import check_is_directory, check_trackers, make_parser, parse, take
from ..train import EPILOG, TrainOptions


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
            "help": "Its configuration, such as hidden_size=192,num_hidden_layers=6. JSON for lists: "
            '{"depths": [1, 1]}.'
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
class ScriptArguments(TrainingArguments):
    """Training arguments of Transformers, and how to resume."""

    allow_changed_settings: bool = field(
        default=False,
        metadata={"help": "Resume although the method, batch size, seed or data differ from those of the checkpoint."},
    )


@dataclass
class Parts:
    """Parts of the run of a script."""

    do_train: bool = field(default=False, metadata={"help": "Train and save the model."})
    do_eval: bool = field(default=False, metadata={"help": "Evaluate the model on the validation set."})


RUN = ("mixing", "output_dir", "resume_from_checkpoint", "allow_changed_settings")  # options of `mm-hf train`


Model = TypeVar("Model", bound=ModelArguments)
Data = TypeVar("Data", bound=DataArguments)


def reports_errors(main: Callable[[], None]) -> Callable[[], None]:
    """Decorate the main function of a script to print user errors as one sentence, with exit code 2."""

    @functools.wraps(main)
    def script() -> None:
        code = run(Path(sys.argv[0]).name, main)
        if code:
            sys.exit(code)

    return script


def parse_arguments(
    arguments: list[str],
    model_class: type[Model],
    data_class: type[Data],
    training_class: Any = ScriptArguments,
    *,
    description: str | None = None,
) -> tuple[Model, Data, Any, Mixing]:
    """Parse an option file and options, which override it, including the settings of the selected mixing method.

    Args:
        arguments: Command-line arguments.
        model_class: Dataclass of the options of the model.
        data_class: Dataclass of the options of the data.
        training_class: Subclass of `TrainingArguments`, or a dataclass with all options of the training.
        description: Text before the options in the help: the docstring of the script.

    Raises:
        ValueError: An option is unknown or its value invalid, or there is nothing to do.
    """
    program, given = Path(sys.argv[0]).name, expand_option_file(arguments)
    method = method_name(given)
    mixing_class = get_method(method)
    settings = settings_of(mixing_class)
    trains = issubclass(training_class, TrainingArguments)
    own = {name: one for name, one in settings_of(TrainOptions).items() if name in RUN}
    own |= settings_of(Parts if trains else training_class)
    groups: dict[str, Any] = {"training": own, f"settings of {method}": settings, "data": data_class}
    parser = make_parser(
        program, f"{program} [OPTIONS.yaml] [options]", summary(description or ""), EPILOG if trains else METHODS_HELP,
        trains=trains, **groups, model=model_class,
    )  # fmt: skip
    values = parse(parser, given, program, {}, other_settings(method, settings))
    check_required(method, settings, values)
    taken = {"mixing", *settings, *settings_of(model_class), *settings_of(data_class)}
    training = {name: value for name, value in values.items() if name not in taken}
    check_is_directory(values.get("output_dir", own["output_dir"].default))
    if trains:
        if not sys.stderr.isatty():  # a progress bar would print a line per step
            training.setdefault("disable_tqdm", True)
        training.setdefault("dataloader_pin_memory", torch.accelerator.is_available())
    training_args = training_class(**{"output_dir": own["output_dir"].default, **training})
    if trains and not (training_args.do_train or training_args.do_eval or training_args.do_predict):
        raise ValueError("There is nothing to do: give --do_train, --do_eval or both.")
    if trains:
        check_trackers(training_args.report_to)
    mixing = mixing_class(**{name: values[name] for name in settings if name in values})
    return take(values, model_class), take(values, data_class), training_args, mixing


def summary(docstring: str) -> str:
    """Return the first paragraph of a script's docstring and its last example, which needs no download.

    Example:
        >>> print(summary("Train.\\n\\nFirst:\\n\\n    run one\\n\\nThen:\\n\\n    run two\\n"))
        Train.
        <BLANKLINE>
        example without downloads:
            run two
    """
    first, *others = docstring.strip().split("\n\n")
    examples = [paragraph for paragraph in others if paragraph.startswith("    ")]
    return f"{first}\n\nexample without downloads:\n{examples[-1]}" if examples else first
