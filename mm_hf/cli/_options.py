"""Options of commands: dataclasses, files of options, and the fields of TrainingArguments."""

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

from ..comparison.task import FIXED_ARGUMENTS

FILES = (".yaml", ".yml", ".json")
ALIKE = {
    name: f", the same for all runs: {'give --seeds' if 'seed' in name else 'leave it out'}."
    for name in FIXED_ARGUMENTS
}  # what comparisons decide, and what is said to who gives it
TRAINING = """training: all fields of transformers.TrainingArguments
  --num_train_epochs 20 --per_device_train_batch_size 64 --learning_rate 1e-3 --warmup_steps 0.1 --bf16 ..."""
SMALL_VIT = """--model_type vit --config_overrides \\
    hidden_size=64,num_hidden_layers=4,num_attention_heads=4,intermediate_size=128,image_size=8,patch_size=2,num_channels=1"""
# What most people never need, and --help leaves to --help-all.
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


class ShortHelp(argparse.RawDescriptionHelpFormatter):
    """One spelling of each option, a short name for its value, and its default."""

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
        said = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else default
        return f"{text} [{said}]".replace("%", "%%") if "%%" not in text else f"{text} [{said}]"


def _is_flag(action: argparse.Action) -> bool:
    return action.nargs == "?" and action.const is True


class CommandParser(HfArgumentParser):
    """A parser whose errors are ValueErrors, which the command tells as sentences, and whose help comes in two lengths.

    Attributes:
        trains: Whether the fields of TrainingArguments are options, too.
    """

    trains = False

    def error(self, message: str) -> Any:
        """Refuse the command line."""
        raise ValueError(f"{message[:1].upper()}{message[1:]}. --help lists the options.")

    def format_help(self) -> str:
        """The options that most people need."""
        said = {}
        for action in self._actions:
            # HfArgumentParser gives a flag that is on a second option, --no_..., to switch it off: [yes|no] says that.
            if action.dest in ADVANCED_OPTIONS or action.option_strings[:1] == [f"--no_{action.dest}"]:
                said[action], action.help = action.help, argparse.SUPPRESS
        try:
            return super().format_help()
        finally:
            for action, text in said.items():
                action.help = text

    def format_all(self) -> str:
        """All options, the fields of TrainingArguments at the end."""
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
    """A parser with a group of options for each dataclass, under the group's title.

    Args:
        command: Its name.
        usage: How it is called.
        description: What it does, with an example.
        epilog: What is said below the options.
        trains: Whether the fields of TrainingArguments are options, too.
        groups: Dataclasses by the titles of their groups.
    """
    parser = CommandParser(
        [], prog=f"mm-hf {command}", usage=usage, description=description, epilog=epilog, formatter_class=ShortHelp,
        allow_abbrev=False, add_help=False,
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
    shown.add_argument("-h", "--help", action="help", help="These options.")
    if more:
        shown.add_argument(
            "--help-all", nargs=0, action=_HelpAll, dest=argparse.SUPPRESS, default=argparse.SUPPRESS,
            help=f"All options: {' and '.join(more)}.",
        )  # fmt: skip
    return parser


def parse(
    parser: CommandParser,
    arguments: Sequence[str],
    command: str,
    decided: Mapping[str, str],
    elsewhere: Mapping[str, str] = {},
) -> tuple[Any, ...]:
    """The dataclasses of a command line, and the training arguments that were given, as a dict.

    Args:
        parser: Of [`make_parser`].
        arguments: Of the command line, files of options replaced.
        command: What messages call the command.
        decided: Fields of TrainingArguments that the command decides itself, and what is said to who gives them.
        elsewhere: Options that belong elsewhere, and what is said of them.

    Raises:
        ValueError: An option that neither has, or a value that does not fit.
    """
    *parsed, rest = parser.parse_args_into_dataclasses(
        list(arguments), return_remaining_strings=True, look_for_args_file=False
    )
    for option in rest:
        if option in elsewhere:
            raise ValueError(f"{option} {elsewhere[option]}")
    training = training_arguments(rest, command, parser)
    for name in training:
        if name in decided:
            raise ValueError(f"--{name} is decided by {command} itself{decided[name]}")
    return (*parsed, training)


def with_file(arguments: Sequence[str]) -> list[str]:
    """Arguments with a file of options, their first one, replaced by these; options behind it override them.

    Raises:
        ValueError: The file does not hold options.
    """
    given = list(arguments)
    if not given or not given[0].endswith(FILES):
        return given
    text = Path(given[0]).read_text(encoding="utf-8")
    try:
        options = yaml.safe_load(text)  # JSON is YAML
    except yaml.YAMLError as error:
        raise ValueError(f"{given[0]} is no YAML: {str(error).splitlines()[0]}.") from None
    if not isinstance(options, dict):
        raise ValueError(f"{given[0]} must hold options, one a line, as `name: value`.")
    found: list[str] = []
    for name, value in options.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        found += [f"--{name}", *(json.dumps(v) if isinstance(v, dict) else str(v) for v in values)]
    return found + given[1:]


def with_name(arguments: Sequence[str], option: str) -> list[str]:
    """Arguments whose first one may be a name, the value of `option`, and the next one a file of options."""
    given = list(arguments)
    if not given or given[0].startswith("-") or given[0].endswith(FILES):
        return with_file(given)
    return [*with_file(given[1:]), option, given[0]]


def _training_parser() -> Any:
    """A parser of the fields of TrainingArguments, which keeps those only that are given."""
    parser: Any = CommandParser([TrainingArguments], allow_abbrev=False, add_help=False, formatter_class=ShortHelp)  # type: ignore[list-item]
    for action in parser._actions:
        action.default = argparse.SUPPRESS
        action.required = False
    parser._option_names = {f.name for f in dataclasses.fields(TrainingArguments) if f.init}
    return parser


def training_arguments(rest: Sequence[str], command: str, parser: CommandParser) -> dict[str, Any]:
    """What was given of the fields of TrainingArguments.

    Raises:
        ValueError: Another option.
    """
    trainer = _training_parser()
    found, unknown = trainer.parse_known_args(list(rest)) if parser.trains else (argparse.Namespace(), list(rest))
    if unknown:
        own = {
            s for p in (parser, trainer)[: 1 + parser.trains] for action in p._actions for s in action.option_strings
        }
        near = difflib.get_close_matches(unknown[0], own, n=1)
        hint = f"did you mean {near[0]}?" if near else "--help lists the options."
        fields = " and no field of TrainingArguments" if parser.trains else ""
        raise ValueError(f"{unknown[0]} is no option of {command}{fields}: {hint}")
    return vars(found)
