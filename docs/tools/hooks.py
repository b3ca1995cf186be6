"""What MkDocs does beside its plugins: the list of how-tos, two files from the root of the repository, formulas."""

from __future__ import annotations

import importlib
import logging
import re
from html import unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

LOG = logging.getLogger("mkdocs.hooks")
ROOT = Path(__file__).parent.parent.parent
# Pages made of files that belong in the root, and the page that the site has for what they link to.
FROM_ROOT = {"contributing.md": "CONTRIBUTING.md", "changes.md": "CHANGELOG.md"}
PUBLIC = (
    "mm_hf",
    "mm_hf.functional",
    "mm_hf.locations",
    "mm_hf.methods",
    "mm_hf.metrics",
    "mm_hf.analysis",
    "mm_hf.comparison",
)
REPOSITORY_LINK = re.compile(r"(?<=\]\()(?:\.\./)?(CONTRIBUTING|CHANGELOG)\.md")


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
    """Add the pages that are files of the root."""
    for page, source in FROM_ROOT.items():
        text = (ROOT / source).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links from docs/ to files of the root lead to their pages; a page without sections needs no table of contents."""
    if not re.search(r"^##|^:::", markdown, flags=re.MULTILINE):
        page.meta["hide"] = ["toc"]
    names = {Path(source).stem: page for page, source in FROM_ROOT.items()}
    return REPOSITORY_LINK.sub(lambda match: names[match[1]], markdown)


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
