"""MkDocs hooks: the "How-to" section, pages from the root of the repository, and formulas."""

from __future__ import annotations

import importlib
import inspect
import logging
import posixpath
import re
from html import unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

LOG = logging.getLogger("mkdocs.hooks")
ROOT = Path(__file__).parent.parent.parent
# Pages whose files are in the root of the repository.
FROM_ROOT = {"contributing.md": "CONTRIBUTING.md", "changes.md": "CHANGELOG.md"}
PAGES = {"README.md": "index.md", **{source: page for page, source in FROM_ROOT.items()}}
PUBLIC = [
    "mm_hf", "mm_hf.functional", "mm_hf.locations", "mm_hf.methods", "mm_hf.evaluation.metrics",
    "mm_hf.evaluation.plots", "mm_hf.comparison",
]  # fmt: skip
TABLE_ROW = re.compile(r"^\|.*$", re.MULTILINE)
LINK = re.compile(r"(?<=\]\()[\w./-]+")


def on_config(config: Any) -> Any:
    """Add pages that are not in the navigation to "How-to", and the pages of the root at the end."""
    listed = set(_pages(config.nav))
    pages = sorted(path.name for path in Path(config.docs_dir).glob("*.md"))
    how_to = next(section["How-to"] for section in config.nav if "How-to" in section)
    how_to += [page for page in pages if page not in listed]
    config.nav.append({"Project": list(FROM_ROOT)})
    return config


def _pages(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [page for part in (nav.values() if isinstance(nav, dict) else nav) for page in _pages(part)]


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the root, and linked files outside of docs/."""
    for page, source in FROM_ROOT.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for page in list(files.documentation_pages()):
        for target in LINK.findall(page.content_string):
            name, source = _in_site(page.src_uri, target)
            if name.startswith("source/") and files.get_file_from_path(name) is None:
                files.append(File.generated(config, name, content=(ROOT / source).read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite links to files outside of docs/, and hide empty columns."""
    hidden = {"toc": not re.search(r"^##|^:::", markdown, flags=re.MULTILINE), "navigation": page.parent is None}
    page.meta["hide"] = [part for part, empty in hidden.items() if empty]
    source, start = page.file.src_uri, posixpath.dirname(page.file.src_uri) or "."
    markdown = markdown.replace("<details>", '<details markdown="1">')  # GitHub renders Markdown in it, too
    markdown = TABLE_ROW.sub(lambda match: _unescape(match[0]), markdown)
    return LINK.sub(lambda match: posixpath.relpath(_in_site(source, match[0])[0], start), markdown)


def _unescape(row: str) -> str:
    """Remove escapes of a row of a table that GitHub needs and MkDocs prints."""
    parts = re.split(r"(`[^`\n]+`)", row)
    texts, codes = parts[::2], parts[1::2]
    found = [text.replace("\\<", "&lt;") for text in texts]
    return "".join(a + b for a, b in zip(found, [*(code.replace("\\|", "|") for code in codes), ""], strict=True))


def _in_site(page: str, target: str) -> tuple[str, str]:
    """Return the path of a link's target in the site and in the repository."""
    if page.startswith("source/"):  # the README.md of a linked directory
        start = posixpath.dirname(page).removeprefix("source/")
    else:
        start = "" if page in FROM_ROOT else posixpath.join("docs", posixpath.dirname(page))
    path = posixpath.normpath(posixpath.join(start, target))
    if path.startswith("docs/"):
        return path.removeprefix("docs/"), path
    if path in PAGES:
        return PAGES[path], path
    return (f"source/{path}" if (ROOT / path).is_file() else target), path


def on_page_content(html: str, **_: Any) -> str:
    """Convert formulas from TeX to MathML, which browsers display without a script."""
    html = re.sub(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', _formula("block"), html, flags=re.DOTALL)
    return re.sub(r'<span class="arithmatex">\\\((.*?)\\\)</span>', _formula("inline"), html, flags=re.DOTALL)


def _formula(display: str) -> Any:
    return lambda match: convert(unescape(match[1]), display=display)


def on_post_build(config: Any) -> None:
    """Warn about public classes and functions without an entry in the reference; a strict build then fails."""
    pages = [path.read_text(encoding="utf-8") for path in (Path(config.site_dir) / "api").glob("*.html")]
    documented = {name for page in pages for name in re.findall(r'id="mm_hf\.(?:[\w.]+\.)?(\w+)"', page)}
    for module in map(importlib.import_module, PUBLIC):
        for name in module.__all__:
            value = getattr(module, name)
            if (inspect.isclass(value) or inspect.isfunction(value)) and name not in documented:
                LOG.warning("%s.%s is public but has no entry in docs/api.", module.__name__, name)
