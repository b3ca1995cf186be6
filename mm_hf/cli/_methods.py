"""The option --mixing: the mixing methods and their settings, read without importing PyTorch."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Collection, Sequence

from ..methods.settings import Setting, nearest, read_methods

METHOD_NAMES = f"methods: {', '.join(read_methods())}"
METHODS_HELP = textwrap.fill(f"{METHOD_NAMES}; --mixing METHOD --help shows its settings", 100)
DEFAULT_METHOD = "dense_multimix"


def method_name(arguments: Sequence[str]) -> str:
    """Return the value of --mixing, or its default."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--mixing", default=DEFAULT_METHOD, nargs="?")
    return str(first.parse_known_args(list(arguments))[0].mixing)


def other_settings(method: str, own: Collection[str]) -> dict[str, str]:
    """Return the settings that only other methods have, each with the end of its error message.

    Args:
        method: Name of the method.
        own: Names of its settings.
    """
    owners: dict[str, list[str]] = {}
    for name, settings in read_methods().items():
        for other in settings:
            if other not in own:
                owners.setdefault(f"--{other}", []).append(name)
    return {
        option: f"is a setting of {' and '.join(names)}, not of --mixing {method}, whose settings are {', '.join(own)}."
        for option, names in owners.items()
    }


def check_method(name: str) -> dict[str, Setting]:
    """Return the settings of a mixing method.

    Raises:
        ValueError: The name is unknown.
    """
    methods = read_methods()
    if name not in methods:
        raise ValueError(
            f"There is no mixing method {name!r}{nearest(name, methods)}. The methods are {', '.join(methods)}."
        )
    return methods[name]
