"""The command `mm-hf`. Each module here without a leading underscore is one of its commands.

The first line of a module's docstring describes the command in `mm-hf --help`; its function `main(arguments) -> int`
runs the command. Only the module of the requested command is imported.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

EXTRAS = ("analysis", "examples", "trackers")  # named in hints, in this order
IMPORTED_AS = {"sklearn": "scikit-learn", "PIL": "pillow"}
# Arguments of `MultiMixTrainer.train` in its errors, which are options of the same names.
ARGUMENTS = re.compile(r"(?<![\w-])(allow_changed_settings|resume_from_checkpoint)(?:=True)?\b")
# Printed when a command is interrupted.
RESUME_HINTS = {
    "compare": " Finished runs are kept: run the same command again to resume.",
    "train": " To resume from the last checkpoint, run the same command with --resume_from_checkpoint.",
}


@functools.cache
def commands() -> dict[str, str]:
    """Return the one-line description of each command."""
    files = sorted(path for path in Path(__file__).parent.glob("*.py") if not path.name.startswith("_"))
    descriptions = {}
    for path in files:
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        descriptions[path.stem] = docstring.splitlines()[0] if docstring else ""
    return descriptions


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Command-line arguments without the program name. Default: those of this process.

    Returns:
        The exit code: 0, 2 for a user error, 130 if interrupted, or another one that the command defines.

    Example:
        >>> main(["--version"])
        mm_hf ...
        0
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    known = commands()
    if not given or given[0] in ("-h", "--help", "--help-all", "help"):
        print(_overview(known))
        return 0
    name, rest = given[0], given[1:]
    if name == "--version":
        from .. import __version__

        print(f"mm_hf {__version__}")
        return 0
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(known)}."
        return _print_error("mm-hf", f"unknown command {name!r}: {hint}")
    return run(
        f"mm-hf {name}", lambda: importlib.import_module(f".{name}", __name__).main(rest), RESUME_HINTS.get(name, "")
    )


def run(program: str, start: Callable[[], int | None], resume_hint: str = "") -> int:
    """Run a program, and print its errors as one sentence.

    Args:
        program: Name of the program in the messages.
        start: Function that runs it and returns its exit code; None stands for 0.
        resume_hint: End of the message if the program is interrupted.

    Returns:
        The exit code of the program, 2 for a user error, or 130 if interrupted.

    Example:
        >>> run("mm-hf train", lambda: 0)
        0
    """
    try:
        return start() or 0
    except ImportError as error:
        if os.environ.get("MM_HF_DEBUG"):
            raise
        package = (error.name or "mm_hf").partition(".")[0]
        if package == "mm_hf":
            return _print_error(program, str(error))
        name = IMPORTED_AS.get(package, package)
        return _print_error(program, f"{name} is required but not installed: {_install_hint(name)}.")
    except (ValueError, OSError) as error:
        if os.environ.get("MM_HF_DEBUG"):
            raise
        return _print_error(program, ARGUMENTS.sub(r"--\1", str(error)))
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted.{resume_hint}", file=sys.stderr)
        return 130


def _install_hint(name: str) -> str:
    """Return the command that installs a package: the extra of mm-hf that contains it, or the package."""
    try:
        requirements = metadata.requires("mm-hf") or []
    except metadata.PackageNotFoundError:  # not installed, but on the path
        requirements = []
    for extra in EXTRAS:
        pattern = rf"""{re.escape(name)}\b(?!-).*;.*\bextra == ["']{extra}["']"""
        if any(re.match(pattern, requirement) for requirement in requirements):
            return f"pip install 'mm-hf[{extra}]'"
    return f"pip install {name}"


def _end_progress_bars() -> None:
    """Complete the line of each open progress bar, after which a message starts a new one."""
    if "tqdm" in sys.modules:
        from tqdm import tqdm

        for bar in list(getattr(tqdm, "_instances", ())):
            bar.close()


def _overview(known: dict[str, str]) -> str:
    width = max(map(len, known))
    lines = "\n".join(f"  {name:<{width}}  {description}" for name, description in known.items())
    return f"""usage: mm-hf COMMAND [options]

MultiMix and Dense MultiMix for Hugging Face Transformers.

commands:
{lines}

mm-hf COMMAND --help shows the options of a command. MM_HF_DEBUG=1 shows the traceback of an error."""


def _print_error(program: str, message: str) -> int:
    _end_progress_bars()
    line = re.sub(r"\s*[\r\n]\s*", " ", message.strip())  # names in it may have line breaks
    print(f"{program}: {line}", file=sys.stderr)
    return 2
