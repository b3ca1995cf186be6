"""Options of commands: dataclasses, files of options, and the fields of TrainingArguments."""

from __future__ import annotations

import argparse
import difflib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser, TrainingArguments

from ..comparison.task import DECIDED


class ShortHelp(argparse.RawDescriptionHelpFormatter):
    """One spelling of each option, a short name for its value, and its default."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=min(shutil.get_terminal_size().columns, 110))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
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


class Refusing(HfArgumentParser):
    """A parser whose errors are ValueErrors, which the command tells as sentences."""

    def error(self, message: str) -> Any:
        """Refuse the command line."""
        raise ValueError(f"{message[:1].upper()}{message[1:]}. --help lists the options.")


def parser_of(command: str, usage: str, description: str, epilog: str, **groups: Any) -> Refusing:
    """A parser with a group of options for each dataclass, under the group's title."""
    parser = Refusing(
        [],
        prog=f"mm-hf {command}",
        usage=usage,
        description=description,
        epilog=epilog,
        formatter_class=ShortHelp,
        allow_abbrev=False,
    )
    for title, options in groups.items():
        options._argument_group_name = title.replace("_", " ")
        parser._add_dataclass_arguments(options)
        parser.dataclass_types = [*parser.dataclass_types, options]
    return parser


def parse(parser: Refusing, arguments: Sequence[str], command: str) -> tuple[Any, ...]:
    """The dataclasses of a command line, and the training arguments that were given, as a dict.

    Raises:
        ValueError: An option that neither has, or a value that does not fit.
    """
    *parsed, rest = parser.parse_args_into_dataclasses(
        with_file(arguments), return_remaining_strings=True, look_for_args_file=False
    )
    return (*parsed, training_arguments(rest, command, parser))


def with_file(arguments: Sequence[str]) -> list[str]:
    """Arguments with a file of options, their first one, replaced by these; options behind it override them.

    Raises:
        ValueError: The file does not hold options.
    """
    given = list(arguments)
    if not given or not given[0].endswith((".yaml", ".yml", ".json")):
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


def training_arguments(rest: Sequence[str], command: str, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """What was given of the fields of TrainingArguments.

    Raises:
        ValueError: Another option, or one that the command decides.
    """
    trainer = Refusing([TrainingArguments], allow_abbrev=False, add_help=False)  # type: ignore[list-item]
    for action in trainer._actions:
        action.default = argparse.SUPPRESS
        action.required = False
    found, unknown = trainer.parse_known_args(list(rest))
    values = vars(found)
    if unknown:
        own = {s for p in (parser, trainer) for action in p._actions for s in action.option_strings}
        near = difflib.get_close_matches(unknown[0], own, n=1)
        hint = f"did you mean {near[0]}?" if near else "--help lists the options."
        raise ValueError(f"{unknown[0]} is no option of {command} and no field of TrainingArguments: {hint}")
    decided = [name for name in values if name in DECIDED]
    if decided:
        instead = "give --seeds" if "seed" in decided[0] else "leave it out"
        raise ValueError(f"--{decided[0]} is decided by {command} itself, the same for all runs: {instead}.")
    return values
