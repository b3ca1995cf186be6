"""The command `mm-hf`. Each file here without an underscore is one of its commands.

The first line of the file's docstring is what `mm-hf --help` says of it; its function `main(arguments) -> int` does it. Only
the file of the command that was called is imported.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

EXTRA = "analysis"
GOES_ON = {
    "compare": " Finished runs are kept: the same command goes on from there.",
    "train": " The same command with --resume_from_checkpoint goes on from the last checkpoint, if there is one.",
}


def commands() -> dict[str, str]:
    """All commands, and what each does, in one line."""
    files = sorted(path for path in Path(__file__).parent.glob("*.py") if not path.name.startswith("_"))
    found = {}
    for path in files:
        documentation = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        found[path.stem] = documentation.splitlines()[0] if documentation else ""
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code: 0, 2 for what the person who called it has to change, 130 when stopped.

    Args:
        arguments: As on a command line, without the program. Default: those of this process.

    Example:
        >>> main(["--version"])
        mm_hf ...
        0
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    known = commands()
    if not given or given[0] in ("-h", "--help", "help"):
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
        return _refuse("mm-hf", f"there is no command {name!r}; {hint}")
    program = f"mm-hf {name}"
    try:
        return importlib.import_module(f".{name}", __name__).main(rest)
    except ImportError as error:
        if os.environ.get("MM_HF_DEBUG"):
            raise
        if error.name is None or error.name.partition(".")[0] == "mm_hf":
            return _refuse(program, str(error))
        return _refuse(program, f"{error.name} is not installed, and this needs it: pip install 'mm-hf[{EXTRA}]'.")
    except (ValueError, OSError) as error:
        if os.environ.get("MM_HF_DEBUG"):
            raise
        return _refuse(program, " ".join(str(error).split()) if isinstance(error, OSError) else str(error))
    except KeyboardInterrupt:
        print(f"\n{program}: stopped.{GOES_ON.get(name, '')}", file=sys.stderr)
        return 130


def _overview(known: dict[str, str]) -> str:
    width = max(map(len, known))
    lines = "\n".join(f"  {name:<{width}}  {says}" for name, says in known.items())
    return f"""usage: mm-hf COMMAND [options]

MultiMix and Dense MultiMix for Hugging Face Transformers.

commands:
{lines}

mm-hf COMMAND --help tells more. MM_HF_DEBUG=1 shows where an error comes from."""


def _refuse(program: str, sentence: str) -> int:
    print(f"{program}: {sentence}", file=sys.stderr)
    return 2
