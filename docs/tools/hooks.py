"""What MkDocs does beside its plugins: the list of how-tos, two files from the root of the repository, formulas."""

from __future__ import annotations

import importlib
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
# Pages made of files that belong in the root.
FROM_ROOT = {"contributing.md": "CONTRIBUTING.md", "changes.md": "CHANGELOG.md"}
PAGES = {"README.md": "index.md", **{source: page for page, source in FROM_ROOT.items()}}
PUBLIC = [
    "mm_hf", "mm_hf.functional", "mm_hf.locations", "mm_hf.methods", "mm_hf.evaluation.metrics", "mm_hf.evaluation.plots", "mm_hf.comparison",
]  # fmt: skip
LINK = re.compile(r"(?<=\]\()[\w./-]+")


def on_config(config: Any) -> Any:
    """Put pages that the navigation does not name under "How-to", and those of the root at its end."""
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
    """Add the pages that are files of the root, and the files outside of docs/ that pages link to."""
    for page, source in FROM_ROOT.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for page in list(files.documentation_pages()):
        for target in LINK.findall(page.content_string):
            name, source = _in_site(page.src_uri, target)
            if name.startswith("source/") and files.get_file_from_path(name) is None:
                files.append(File.generated(config, name, content=(ROOT / source).read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to files outside of docs/ lead to what the site has of them; columns that have nothing to show are left out."""
    hidden = {"toc": not re.search(r"^##|^:::", markdown, flags=re.MULTILINE), "navigation": page.parent is None}
    page.meta["hide"] = [part for part, empty in hidden.items() if empty]
    source, start = page.file.src_uri, posixpath.dirname(page.file.src_uri) or "."
    return LINK.sub(lambda match: posixpath.relpath(_in_site(source, match[0])[0], start), markdown)


def _in_site(page: str, target: str) -> tuple[str, str]:
    """Where the site has the target of a page's link, and where the repository has it."""
    start = "" if page in FROM_ROOT else posixpath.join("docs", posixpath.dirname(page))
    path = posixpath.normpath(posixpath.join(start, target))
    if path.startswith("docs/"):
        return path.removeprefix("docs/"), path
    if path in PAGES:
        return PAGES[path], path
    return (f"source/{path}" if (ROOT / path).is_file() else target), path


def on_page_content(html: str, **_: Any) -> str:
    """Formulas as MathML, which browsers draw by themselves, in place of TeX, for which a script would be loaded."""
    html = re.sub(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', _formula("block"), html, flags=re.DOTALL)
    return re.sub(r'<span class="arithmatex">\\\((.*?)\\\)</span>', _formula("inline"), html, flags=re.DOTALL)


def _formula(display: str) -> Any:
    return lambda match: convert(unescape(match[1]), display=display)


def on_post_build(config: Any) -> None:
    """Warn, which a strict build fails by, of a public class or function that no page of the reference has."""
    pages = [path.read_text(encoding="utf-8") for path in (Path(config.site_dir) / "api").glob("*.html")]
    told = {name for page in pages for name in re.findall(r'id="mm_hf\.(?:[\w.]+\.)?(\w+)"', page)}
    for module in map(importlib.import_module, PUBLIC):
        for name in module.__all__:
            if callable(getattr(module, name)) and name not in told:
                LOG.warning("%s.%s is public and on no page of docs/api.", module.__name__, name)
