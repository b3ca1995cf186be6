"""Code blocks and commands of the documentation run as written, on small data and models with the documented names.

`<!-- fragment: REASON -->` before a block excludes it. Other tests run tutorial.md, method.md, your_model.md,
mistakes.md and errors.md.
"""

import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import blocks
import pytest

from tests.helpers import documented
from tests.helpers.pushing import ANN

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"

FRAGMENT = re.compile(r"<!-- fragment: (.*?) -->\n+```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OTHER_TESTS = {"tutorial.md", "method.md", "your_model.md", "mistakes.md", "errors.md"}
PAGES = [page for page in (ROOT / "README.md", *sorted(DOCS.glob("*.md"))) if page.name not in OTHER_TESTS]
pytestmark = pytest.mark.end_to_end


def parts_of(page):
    """Return the Python blocks and the commands of a page in their order, without fragments.

    Each has its line, and the number of the section, within which variables are kept.
    """
    excluded = {match.start(3) for match in FRAGMENT.finditer(page)}
    parts = []
    for fence in blocks.FENCE.finditer(page):
        if fence.start(2) in excluded:
            continue
        line, section = page.count("\n", 0, fence.start()) + 2, page.count("\n## ", 0, fence.start())
        if fence[1] == "python":
            parts.append(("python", fence[2], line, section))
        elif fence[1] in ("", "bash"):
            parts += [("command", command, line, section) for command in documented.commands_in(fence[2])]
    return parts


PARTS = {page: parts_of(page.read_text()) for page in PAGES}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("documented")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        documented.write_files()
        documented.shorten(patch)
        yield directory


def missing_packages(code):
    names = re.findall(r"^\s*(?:from|import) (\w+)", code, flags=re.MULTILINE)
    return [name for name in names if find_spec(name) is None]


@pytest.mark.parametrize("page", [page for page in PAGES if PARTS[page]], ids=lambda page: page.name)
def test_blocks_and_commands_run(page, files, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", ANN)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: name)
    shutil.rmtree("outputs", ignore_errors=True)  # of another page
    sections = {}
    for kind, code, line, section in PARTS[page]:
        variables = sections.setdefault(section, documented.StandIns())
        if kind == "python":
            if missing_packages(code):
                continue
            variables.provide(code)
            exec(compile("\n" * (line - 1) + code, str(page), "exec", dont_inherit=True), variables)
            continue
        if code.split()[0] in documented.ELSEWHERE or " ..." in code:
            continue
        if any(name in code for name in documented.MISSING_DATA):
            continue
        returned, printed = documented.run_command(code)
        expected = 2 if f"$ {code}" in page.read_text() else 0
        assert returned == expected, f"{page.name}, line {line}: {code}\n{printed}"
        if expected:  # the reason of a failed download depends on the network
            assert printed.strip().split(" failed:")[0] in page.read_text(), printed


def test_fragments_are_few():
    fragments = [match[1] for page in PAGES for match in FRAGMENT.finditer(page.read_text())]
    assert len(fragments) <= 3 and all(len(reason) > 10 for reason in fragments)


def test_a_wrong_block_or_command_is_found(files):
    page = "```python\n1 / 0\n```\n\n<!-- fragment: it is shown only -->\n```python\n...\n```\n\n"
    page += "```\nmm-hf trian \\\n  x\n```\n"
    assert parts_of(page) == [("python", "1 / 0\n", 2, 0), ("command", "mm-hf trian   x", 11, 0)]
    assert documented.run_command("mm-hf trian")[0] == 2
