"""Convert a page to a notebook: `python` blocks become code cells, and the `text` block after one its output.

python docs/tools/notebook.py docs/tutorial.md
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from blocks import FENCE


def notebook_of(page: str) -> dict[str, Any]:
    """Return a page as a notebook of format 4."""
    cells: list[dict[str, Any]] = []
    end = 0
    for fence in FENCE.finditer(page):
        if fence[1] not in ("python", "text"):
            continue
        _add_text(cells, page[end : fence.start()])
        end = fence.end()
        if fence[1] == "python":
            cells.append(_cell("code", fence[2].strip("\n"), execution_count=None, outputs=[]))
        else:
            cells[-1]["outputs"] = [{"name": "stdout", "output_type": "stream", "text": _lines(fence[2])}]
    _add_text(cells, page[end:])
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 4}


def _add_text(cells: list[dict[str, Any]], text: str) -> None:
    if text.strip():
        cells.append(_cell("markdown", text.strip("\n")))


def _cell(kind: str, source: str, **fields: Any) -> dict[str, Any]:
    return {"cell_type": kind, "metadata": {}, "source": _lines(source), **fields}


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def write_notebook(page: Path) -> None:
    """Write the notebook of a page beside it."""
    notebook = notebook_of(page.read_text(encoding="utf-8"))
    text = json.dumps(notebook, indent=1, ensure_ascii=False)
    page.with_suffix(".ipynb").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        write_notebook(Path(argument))
