"""Files of options in YAML or JSON, as the first argument of a command."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

OPTION_FILES = (".yaml", ".yml", ".json")


def expand_option_file(arguments: Sequence[str]) -> list[str]:
    """Replace an option file, the first argument, by its options. The options after it take precedence.

    Raises:
        ValueError: The file does not contain options.
    """
    given = list(arguments)
    if not given or not given[0].endswith(OPTION_FILES):
        return given
    options = read_option_file(Path(given[0]))
    found: list[str] = []
    for name, value in options.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        found += [f"--{name}", *(json.dumps(v) if isinstance(v, dict) else str(v) for v in values)]
    return found + given[1:]


def read_option_file(path: Path) -> dict[str, Any]:
    """Read options from a YAML or JSON file.

    Raises:
        ValueError: The file does not exist or does not contain options.
    """
    import yaml

    if not path.is_file():
        raise ValueError(f"The option file {path} does not exist: give a file with lines of the form `name: value`.")
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or "it cannot be read as text"
        at = f" in line {mark.line + 1}" if mark else ""
        raise ValueError(f"{path} is not valid YAML: {reason}{at}.") from None
    if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
        raise ValueError(f"{path} must contain options as lines of the form `name: value`.")
    for name, value in options.items():
        values = value if isinstance(value, list) else [value]
        if value == [] or any(isinstance(v, list) or (isinstance(v, dict) and _has_dict(v)) for v in values):
            raise ValueError(f"{path}: the option {name} must be a value, a list of values or a mapping of values.")
    return options


def _has_dict(values: dict[Any, Any]) -> bool:
    return any(isinstance(value, dict) for value in values.values())


def expand_arguments(arguments: Sequence[str], option: str) -> list[str]:
    """Expand an optional positional argument, the value of `option`, and an optional option file after it."""
    given = list(arguments)
    if not given or given[0].startswith("-") or given[0].endswith(OPTION_FILES):
        return expand_option_file(given)
    return [*expand_option_file(given[1:]), option, given[0]]
