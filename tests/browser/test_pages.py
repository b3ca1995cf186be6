"""Every page of the built documentation in Chromium at three widths. `make test-browser` runs these tests."""

import ast
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import mm_hf
from tests.helpers import browser

ROOT = Path(__file__).parents[2]
WIDTHS = (1400, 1900, 420)
RAW = re.compile(r"\*\*|`[^`\n]+`|\|\s*:?-{3,}|^#{2,6} \w|\]\([\w./#:-]+\)|```", re.MULTILINE)
ESCAPE = re.compile(r"\\[|<>*`]")
pytestmark = [
    pytest.mark.skipif(browser.CHROMIUM is None, reason="needs chromium"),
    pytest.mark.skipif(find_spec("mkdocs") is None, reason="needs the extra docs"),
]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    site = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(site)]
    done = subprocess.run(
        build, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return browser.measure(site, WIDTHS)


def test_pages_are_not_wider_than_the_window(measured):
    assert len(measured) > 30 * len(WIDTHS)
    found = {(row["page"], row["width"]): row["wide"] for row in measured if row["overflow"] > 0 or row["wide"]}
    assert not found


def test_no_markdown_is_left(measured):
    rows = [row for row in measured if row["page"] != "/errors.html"]  # messages as they are printed
    found = {(row["page"], text) for row in rows for text in row["raw"] if RAW.search(text)}
    assert not found


def test_no_escape_of_markdown_is_left(measured):
    found = {(row["page"], text) for row in measured for text in [*row["raw"], *row["codes"]] if ESCAPE.search(text)}
    assert not found


def test_images_load(measured):
    assert not {url for row in measured for url in row["images"]}


def test_tables_and_code_fit_beside_the_sidebars(measured):
    """On a narrow window they scroll."""
    found = {(row["page"], *map(str, cut)) for row in measured if row["width"] > 1000 for cut in row["cut"]}
    assert not found


def test_signatures_of_methods_show_their_defaults(measured):
    """Also those that the constructor sets: a shown None is the value of the attribute."""
    row = next(row for row in measured if row["page"] == "/api/methods.html")
    for method in (mm_hf.MultiMix(), mm_hf.DenseMultiMix()):
        shown = next(text for text in row["signatures"] if text.startswith(f"{type(method).__name__}("))
        defaults = dict(re.findall(r"(\w+): [^\n]* = ([^\n]+),\n", shown))
        assert len(defaults) > 10
        for name, value in defaults.items():
            assert ast.literal_eval(value) == getattr(method, name), name
