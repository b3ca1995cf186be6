"""A report as blocks, and the two files made of it: one HTML file with everything inside, and Markdown."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f4f5f7; color: #1f2430; font: 16px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 3rem 4rem; background: #fff; min-height: 100vh; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; padding-top: 1rem; border-top: 1px solid #e3e6eb; }
p { margin: .6rem 0; max-width: 46rem; }
.lead { color: #4b5363; }
ul.findings { margin: 1rem 0; padding: .9rem 1.2rem .9rem 2.2rem; background: #eef4fa; border-left: 4px solid #0072b2;
  border-radius: 3px; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; width: 100%; }
caption { text-align: left; color: #4b5363; padding-bottom: .4rem; }
th, td { padding: .34rem .5rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #eceef2; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid #1f2430; font-weight: 600; white-space: normal; vertical-align: bottom; }
td.better { background: #d9f0e5; }
td.worse { background: #fbe3d6; }
td.text { white-space: normal; text-align: left; overflow-wrap: anywhere; }
figure { margin: 1.2rem 0; }
figure img { display: block; width: 100%; height: auto; }
figure img.narrow { max-width: 32rem; }
figcaption { color: #4b5363; font-size: .88rem; margin-top: .4rem; max-width: 46rem; }
pre { background: #f4f5f7; padding: .8rem 1rem; overflow-x: auto; font-size: .82rem; border-radius: 3px; }
code { font-size: .9em; }
@media (max-width: 700px) { main { padding: 1.2rem; } }
@media print { body { background: #fff; } main { padding: 0; max-width: none; } h2 { break-after: avoid; }
  figure, table { break-inside: avoid; } }
"""


@dataclass
class Text:
    """A paragraph; `code` in backquotes."""

    text: str
    lead: bool = False


@dataclass
class Findings:
    """What a reader should take away, one sentence each."""

    sentences: Sequence[str]


@dataclass
class Cell:
    """A cell of a table: "better" or "worse" if it is marked, "text" if it is a sentence."""

    text: str
    mark: str = ""


@dataclass
class Table:
    """Rows of cells under headings."""

    headings: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""


@dataclass
class Picture:
    """An image file beside the report, what it shows in a few words, and what to see in it."""

    file: Path
    alternative: str
    caption: str
    narrow: bool = False


@dataclass
class Code:
    """Text as it is."""

    text: str


Block = Text | Findings | Table | Picture | Code


@dataclass
class Section:
    """A heading and what follows it."""

    title: str
    blocks: list[Block] = field(default_factory=list)


@dataclass
class Document:
    """A title, and sections; the first may have no heading."""

    title: str
    sections: list[Section]


def as_html(document: Document) -> str:
    """One page that needs nothing else: pictures inside, no scripts, no fonts from elsewhere."""
    parts = []
    for section in document.sections:
        if section.title:
            parts.append(f"<h2>{escape(section.title)}</h2>")
        parts += [_html(block) for block in section.blocks]
    body = "\n".join(parts)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(document.title)}</title>
<style>{CSS}</style>
</head>
<body>
<main>
<h1>{escape(document.title)}</h1>
{body}
</main>
</body>
</html>
"""


def _html(block: Block) -> str:
    if isinstance(block, Text):
        return f'<p class="lead">{_inline(block.text)}</p>' if block.lead else f"<p>{_inline(block.text)}</p>"
    if isinstance(block, Findings):
        items = "\n".join(f"<li>{_inline(sentence)}</li>" for sentence in block.sentences)
        return f'<ul class="findings">\n{items}\n</ul>'
    if isinstance(block, Code):
        return f"<pre>{escape(block.text)}</pre>"
    if isinstance(block, Picture):
        data = base64.b64encode(block.file.read_bytes()).decode()
        narrow = ' class="narrow"' if block.narrow else ""
        return (
            f'<figure><img{narrow} alt="{escape(block.alternative)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{_inline(block.caption)}</figcaption></figure>"
        )
    head = "".join(f'<th scope="col">{_inline(text)}</th>' for text in block.headings)
    rows = "\n".join(
        "<tr>"
        + "".join(
            f'<td class="{c.mark}">{_inline(c.text)}</td>' if c.mark else f"<td>{_inline(c.text)}</td>" for c in row
        )
        + "</tr>"
        for row in block.rows
    )
    caption = f"<caption>{_inline(block.caption)}</caption>" if block.caption else ""
    return (
        f'<div class="scroll"><table>{caption}<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>'
    )


def _inline(text: str) -> str:
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))


def as_markdown(document: Document, directory: Path) -> str:
    """The same for places that show Markdown; pictures are files beside it. Marked cells are bold."""
    parts = [f"# {document.title}"]
    for section in document.sections:
        if section.title:
            parts.append(f"## {section.title}")
        parts += [_markdown(block, directory) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def _markdown(block: Block, directory: Path) -> str:
    if isinstance(block, Text):
        return block.text
    if isinstance(block, Findings):
        return "\n".join(f"- {sentence}" for sentence in block.sentences)
    if isinstance(block, Code):
        return f"```\n{block.text}\n```"
    if isinstance(block, Picture):
        return f"![{block.alternative}]({block.file.relative_to(directory).as_posix()})\n\n*{block.caption}*"

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(text.replace("|", "\\|").replace("\n", " ") for text in cells) + " |"

    rule = line([":--", *["--:"] * (len(block.headings) - 1)])
    rows = [line([f"**{c.text}**" if c.mark in ("better", "worse") else c.text for c in row]) for row in block.rows]
    table = "\n".join([line(block.headings), rule, *rows])
    return f"{block.caption}\n\n{table}" if block.caption else table
