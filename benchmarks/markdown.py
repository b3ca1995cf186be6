"""Tables and generated sections of Markdown pages."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

from mm_hf.evaluation.templates import markdown_table

BEGIN, END = "<!-- begin: {} -->", "<!-- end: {} -->"


def table_lines(rows: Sequence[Sequence[str]], align: str = "r") -> list[str]:
    """Return the lines of a Markdown table.

    Args:
        rows: Cells per row, as Markdown; the first row is the header.
        align: "l" or "r", alignment of all columns but the first, which is left-aligned.
    """
    header, *body = rows
    return markdown_table(header, body, "l" + align * (len(header) - 1), escape=False).splitlines()


def wrap_text(text: str) -> list[str]:
    """Wrap a paragraph to lines of at most 120 characters."""
    return textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False)


def replace_section(path: Path, name: str, lines: Sequence[str]) -> None:
    """Replace the lines between the begin and end markers of a section; append the section if the page lacks it.

    All other text of the page is kept.
    """
    text = path.read_text(encoding="utf-8") if path.exists() else "# Evidence\n"
    begin, end = BEGIN.format(name), END.format(name)
    body = "\n".join([begin, *lines, end])
    before, found, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    text = f"{before}{body}{after}" if found else f"{text.rstrip()}\n\n{body}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")  # another process may write the page at the same time
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
