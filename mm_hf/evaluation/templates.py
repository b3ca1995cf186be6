"""Jinja templates of model cards and reports, and Markdown tables.

Values are escaped for the format of the template, so that names of classes, datasets or files cannot change the page
around them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

# An underscore within a word, as in `macro_f1`, is plain text in GitHub-flavored Markdown.
_SPECIAL = re.compile(r"([\\`*\[\]<>&~$#]|(?<![^\W_])_|_(?![^\W_]))")
# A list item, a thematic break or the underline of a heading.
_BLOCK_START = re.compile(r"^(\d*)([-+.)=])(?=[\s=-]|$)")


def escape_markdown(text: object) -> Markup:
    """Return plain text as Markdown that displays it unchanged, on one line.

    Text that is Markdown already, marked by `markupsafe.Markup`, is returned as it is.

    Example:
        >>> print(escape_markdown("1. *class*_2 <b>"))
        1\\. \\*class\\*\\_2 \\<b\\>
    """
    if isinstance(text, Markup):
        return text
    return Markup(_BLOCK_START.sub(r"\1\\\2", _SPECIAL.sub(r"\\\1", _one_line(text))))


def code_span(text: object) -> Markup:
    """Return plain text as inline code in Markdown.

    Example:
        >>> print(code_span("id2label"), code_span("a`b"))
        `id2label` ``a`b``
    """
    line = _one_line(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    padding = " " if not line or "`" in (line[0], line[-1]) else ""
    return Markup(f"{fence}{padding}{line}{padding}{fence}")


def markdown_table(
    headings: Sequence[object], rows: Sequence[Sequence[object]], align: str = "", *, escape: bool = True
) -> Markup:
    """Return a table in GitHub-flavored Markdown.

    Args:
        headings: One for each column.
        rows: The cells, as many in each row as there are headings.
        align: "l" or "r" for each column. Default: all columns are left-aligned.
        escape: Escape cells by [`escape_markdown`]. With False, cells are Markdown already.

    Raises:
        ValueError: A row, or `align`, does not have one entry for each heading.

    Example:
        >>> print(markdown_table(["method", "accuracy"], [["erm", 97.1], ["a|b", 97.3]], "lr"))
        | method | accuracy |
        | --- | ---: |
        | erm | 97.1 |
        | a\\|b | 97.3 |
    """
    align = align or "l" * len(headings)
    if any(len(row) != len(headings) for row in [*rows, align]):
        raise ValueError(f"Rows and align must have {len(headings)} entries, one for each heading: {rows}, {align!r}.")
    rule = [{"l": "---", "r": "---:"}[letter] for letter in align]
    lines = [[_cell(cell, escape) for cell in row] for row in (headings, *rows)]
    return Markup("\n".join(f"| {' | '.join(cells)} |" for cells in [lines[0], rule, *lines[1:]]))


def _cell(value: object, escape: bool) -> str:
    return _one_line(escape_markdown(value) if escape else value).replace("|", "\\|")


def _one_line(text: object) -> str:
    return re.sub(r"\s*[\r\n\v\f\u2028\u2029]\s*", " ", str(text)).strip()


def csv_cell(value: object) -> object:
    """Return a cell of a CSV file that a spreadsheet does not evaluate as a formula.

    Example:
        >>> csv_cell("=1+1"), csv_cell("erm"), csv_cell(-1.5)
        ("'=1+1", 'erm', -1.5)
    """
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def code_block(text: object) -> Markup:
    """Return plain text as a code block in Markdown, whose fence is longer than any in the text.

    Example:
        >>> print(code_block("a"))
        ```
        a
        ```
    """
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", str(text))), default=0))
    return Markup(f"{fence}\n{text}\n{fence}")


def _paragraph(text: object) -> Markup:
    return Markup(re.sub(r"[ \t\n]+", " ", str(text)).strip(" "))


def _python_literal(text: object) -> Markup:
    return text if isinstance(text, Markup) else Markup(json.dumps(str(text), ensure_ascii=False))


def _html_code(text: object) -> Markup:
    return Markup("<code>{}</code>").format(text)


# For each format, how values are escaped (None: as Jinja does it) and the filters beside Jinja's own.
_FORMATS: dict[str, tuple[Callable[[object], Markup] | None, dict[str, Callable[..., Markup]]]] = {
    ".html": (None, {"code": _html_code}),
    ".md": (escape_markdown, {"code": code_span, "block": code_block, "paragraph": _paragraph}),
    ".py": (_python_literal, {}),
}


def render(template: str | Path, **values: Any) -> str:
    """Render a Jinja template, and escape every value for the format that the file name gives.

    Templates include others of their directory by name. The filter `code` formats a value as inline code. In Markdown,
    the filter `paragraph` joins lines of the template.

    Args:
        template: A file whose name ends in `.html.jinja`, `.md.jinja` or `.py.jinja`. In Python, values are written as
            string literals.
        values: The variables of the template. Those of type `markupsafe.Markup` are not escaped.

    Raises:
        jinja2.UndefinedError: The template reads a variable that is not given.
    """
    path = Path(template)
    escape, filters = _FORMATS[Path(path.stem).suffix]
    environment = Environment(
        loader=FileSystemLoader(path.parent),
        autoescape=True,  # does not escape again what `finalize` has escaped
        finalize=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= filters
    environment.globals["markdown_table"] = markdown_table
    return environment.get_template(path.name).render(values)
