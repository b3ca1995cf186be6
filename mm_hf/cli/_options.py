"""Options of commands: dataclasses, option files, and the fields of TrainingArguments."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser, TrainingArguments

OPTION_FILES = (".yaml", ".yml", ".json")
TRAINING = """training: all fields of transformers.TrainingArguments
  --num_train_epochs 20 --per_device_train_batch_size 64 --learning_rate 1e-3 --warmup_steps 0.1 --bf16 ..."""
SMALL_VIT = """--model_type vit --config_overrides \\
    hidden_size=64,num_hidden_layers=4,num_attention_heads=4,intermediate_size=128,image_size=8,patch_size=2,num_channels=1"""
# Options that --help omits and --help-all includes.
ADVANCED_OPTIONS = frozenset(
    (
        *("dataset_config_name", "validation_dir", "test_dir", "max_length", "ood_dataset_name", "ood_classes"),
        *("image_column_name", "text_column_names", "label_column_name"),
        *("max_train_samples", "max_validation_samples", "max_test_samples"),
        *("tokenizer_name", "image_processor_name", "ignore_mismatched_sizes", "model_revision", "cache_dir", "token"),
        *("robustness_samples", "epsilon"),
        *("examples_per_mix", "detach_attention", "confidence_weighted", "gather_across_devices"),
    )
)


@dataclasses.dataclass
class RobustnessOptions:
    """Evaluation of robustness."""

    robustness_samples: int = dataclasses.field(
        default=500, metadata={"help": "Number of test images to attack and corrupt; 0 to skip."}
    )
    epsilon: float = dataclasses.field(
        default=8 / 255, metadata={"help": "Maximum FGSM perturbation of pixels in [0, 1]. Default: 8/255."}
    )


class CompactHelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help with one spelling of each option, a short metavar, and the default value."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=min(shutil.get_terminal_size().columns, 110))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return action.option_strings[-1] if action.option_strings else super()._format_action_invocation(action)
        several = " ..." if action.nargs in ("+", "*") else ""
        kind = "N" if action.type in (int, float) else (action.metavar or "X")
        if action.choices and len(list(action.choices)) < 6 and action.type is not int:
            kind = "|".join(str(choice) for choice in action.choices)
        return f"{action.option_strings[0]} {'[yes|no]' if _is_flag(action) else f'{kind}{several}'}"

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        default = action.default
        if default in (None, argparse.SUPPRESS, "", False) or "efault" in text or not action.option_strings:
            return text
        shown = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else default
        return f"{text} [{shown}]".replace("%", "%%") if "%%" not in text else f"{text} [{shown}]"


def _is_flag(action: argparse.Action) -> bool:
    return action.nargs == "?" and action.const is True


class CommandParser(HfArgumentParser):
    """Parser that raises ValueError for invalid command lines and has a short and a complete help text.

    Attributes:
        trains: True if the fields of TrainingArguments are options, too.
    """

    trains = False

    def error(self, message: str) -> Any:
        """Raise a ValueError for an invalid command line."""
        raise ValueError(f"{message[:1].upper()}{message[1:]}. --help lists the options.")

    def format_help(self) -> str:
        """Return the help text without the advanced options."""
        hidden = {}
        for action in self._actions:
            # HfArgumentParser adds --no_NAME for a flag that defaults to True; the help shows it as --NAME [yes|no].
            if action.dest in ADVANCED_OPTIONS or action.option_strings[:1] == [f"--no_{action.dest}"]:
                hidden[action], action.help = action.help, argparse.SUPPRESS
        try:
            return super().format_help()
        finally:
            for action, text in hidden.items():
                action.help = text

    def format_all(self) -> str:
        """Return the help text with all options, followed by the fields of TrainingArguments."""
        text = super().format_help()
        if not self.trains:
            return text
        trainer = _training_parser()
        formatter = self._get_formatter()
        formatter.start_section("training (fields of transformers.TrainingArguments)")
        formatter.add_arguments([a for a in trainer._actions if not a.option_strings[0].startswith("--no_")])
        formatter.end_section()
        return f"{text}\n{formatter.format_help()}"


class _HelpAll(argparse.Action):
    def __call__(self, parser: Any, *_: Any) -> None:
        print(parser.format_all())
        parser.exit()


def make_parser(
    command: str, usage: str, description: str, epilog: str, *, trains: bool = True, **groups: Any
) -> CommandParser:
    """Create a parser with one group of options per dataclass.

    Args:
        command: Name of the command.
        usage: Usage line.
        description: Text before the options: the purpose of the command, and an example.
        epilog: Text after the options.
        trains: Accept the fields of TrainingArguments as options, too.
        groups: Dataclasses by the titles of their groups.
    """
    parser = CommandParser(
        [], prog=f"mm-hf {command}", usage=usage, description=description, epilog=epilog,
        formatter_class=CompactHelpFormatter, allow_abbrev=False, add_help=False,
    )  # fmt: skip
    parser.trains = trains
    for title, options in groups.items():
        options._argument_group_name = title
        parser._add_dataclass_arguments(options)
        parser.dataclass_types = [*parser.dataclass_types, options]
    own = {f.name for options in groups.values() for f in dataclasses.fields(options)}
    more = [f"{len(own & ADVANCED_OPTIONS)} more"] if own & ADVANCED_OPTIONS else []
    more += [f"the {len(_training_parser()._option_names)} fields of TrainingArguments"] if trains else []
    shown = parser.add_argument_group("help")
    shown.add_argument("-h", "--help", action="help", help="Show this help.")
    if more:
        shown.add_argument(
            "--help-all", nargs=0, action=_HelpAll, dest=argparse.SUPPRESS, default=argparse.SUPPRESS,
            help=f"Show all options: {' and '.join(more)}.",
        )  # fmt: skip
    return parser


def parse(
    parser: CommandParser,
    arguments: Sequence[str],
    command: str,
    fixed: Mapping[str, str],
    misplaced: Mapping[str, str] = {},
) -> tuple[Any, ...]:
    """Parse a command line into dataclasses and a dict of the given training arguments.

    Args:
        parser: Parser from [`make_parser`].
        arguments: Command-line arguments after the expansion of option files.
        command: Name of the command in error messages.
        fixed: Fields of TrainingArguments that the command sets itself, with the remedy.
        misplaced: Options that belong elsewhere, with the end of the error message.

    Raises:
        ValueError: An option is unknown, or a value is invalid.
    """
    *parsed, rest = parser.parse_args_into_dataclasses(
        list(arguments), return_remaining_strings=True, look_for_args_file=False
    )
    for option in rest:
        if option in misplaced:
            raise ValueError(f"{option} {misplaced[option]}")
    training = training_arguments(rest, command, parser)
    for name in training:
        if name in fixed:
            raise ValueError(f"--{name} is set by {command}: {fixed[name]}.")
    return (*parsed, training)


def expand_option_file(arguments: Sequence[str]) -> list[str]:
    """Replace an option file, the first argument, by its options. The options after it take precedence.

    Raises:
        ValueError: The file does not contain options.
    """
    given = list(arguments)
    if not given or not given[0].endswith(OPTION_FILES):
        return given
    text = Path(given[0]).read_text(encoding="utf-8")
    try:
        options = yaml.safe_load(text)  # JSON is YAML
    except yaml.YAMLError as error:
        raise ValueError(f"{given[0]} is not valid YAML: {str(error).splitlines()[0]}.") from None
    if not isinstance(options, dict):
        raise ValueError(f"{given[0]} must contain options as lines of the form `name: value`.")
    found: list[str] = []
    for name, value in options.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        found += [f"--{name}", *(json.dumps(v) if isinstance(v, dict) else str(v) for v in values)]
    return found + given[1:]


def expand_arguments(arguments: Sequence[str], option: str) -> list[str]:
    """Expand an optional positional argument, the value of `option`, and an optional option file after it."""
    given = list(arguments)
    if not given or given[0].startswith("-") or given[0].endswith(OPTION_FILES):
        return expand_option_file(given)
    return [*expand_option_file(given[1:]), option, given[0]]


def _training_parser() -> Any:
    """Create a parser of the fields of TrainingArguments that returns only those that are given."""
    parser: Any = CommandParser(
        [TrainingArguments],  # type: ignore[list-item]
        allow_abbrev=False,
        add_help=False,
        formatter_class=CompactHelpFormatter,
    )
    for action in parser._actions:
        action.default = argparse.SUPPRESS
        action.required = False
    parser._option_names = {f.name for f in dataclasses.fields(TrainingArguments) if f.init}
    return parser


def training_arguments(rest: Sequence[str], command: str, parser: CommandParser) -> dict[str, Any]:
    """Parse the fields of TrainingArguments among the arguments that `parser` did not recognize.

    Raises:
        ValueError: There are other options among them.
    """
    trainer = _training_parser()
    found, unknown = trainer.parse_known_args(list(rest)) if parser.trains else (argparse.Namespace(), list(rest))
    if unknown:
        own = {
            s for p in (parser, trainer)[: 1 + parser.trains] for action in p._actions for s in action.option_strings
        }
        near = difflib.get_close_matches(unknown[0], own, n=1)
        hint = f"did you mean {near[0]}?" if near else "--help lists the options."
        fields = " or a field of TrainingArguments" if parser.trains else ""
        raise ValueError(f"{unknown[0]} is not an option of {command}{fields}: {hint}")
    return vars(found)
