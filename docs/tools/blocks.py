"""Run the `python` blocks of a page in order in one namespace, and update the printed output in the page.

    python docs/tools/blocks.py docs/tutorial.md

A `text` block after a `python` block is its output.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TRAINER_LINE = re.compile(r"^\{'(?:loss|train_runtime|eval_loss)'.*\n", re.MULTILINE)


class Block(NamedTuple):
    """Block of code and its output in the page."""

    code: str
    printed: str | None
    line: int
    place: tuple[int, int] | None
    """Start and end of the output in the page."""


def blocks_of(page: str) -> list[Block]:
    """Return the Python blocks of a page."""
    fences = list(FENCE.finditer(page))
    blocks = []
    for fence, after in zip(fences, [*fences[1:], None]):
        if fence[1] != "python":
            continue
        follows = after is not None and after[1] == "text"
        line = page.count("\n", 0, fence.start()) + 2
        blocks.append(Block(fence[2], after[2] if follows else None, line, after.span(2) if follows else None))
    return blocks


def run(page: str, name: str, namespace: dict[str, Any] | None = None) -> Iterator[tuple[Block, str]]:
    """Run the blocks of a page, and yield each with its output."""
    namespace = {"__name__": "__main__"} if namespace is None else namespace
    for block in blocks_of(page):
        printed = io.StringIO()
        code = compile("\n" * (block.line - 1) + block.code, name, "exec")
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
        yield block, TRAINER_LINE.sub("", printed.getvalue())


def update(path: Path) -> None:
    """Write the output of the blocks to the page."""
    page = text = path.read_text(encoding="utf-8")
    shift = 0
    for block, printed in run(page, str(path)):
        if block.place is not None:
            start, end = (place + shift for place in block.place)
            text = text[:start] + printed + text[end:]
            shift += len(printed) - (block.place[1] - block.place[0])
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        update(Path(argument))
