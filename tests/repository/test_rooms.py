"""The list of rooms in CONTRIBUTING.md against the imports of the code."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "mm_hf"
SECTION = re.search(r"^## The rooms$(.*?)^## ", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE | re.DOTALL)[1]
ROOMS = re.findall(r"^- `(\w+)(?:\.py|/)`", SECTION, re.MULTILINE)


def imports_of(path):
    """Yield the absolute names that a module imports from mm_hf, imports inside functions included."""
    package = ("mm_hf", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            yield from (".".join([*above, *filter(None, [node.module]), alias.name]) for alias in node.names)


def test_every_entry_of_the_package_is_a_room():
    entries = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert entries - {"__init__", "__main__", "__pycache__"} == set(ROOMS)
    assert len(ROOMS) <= 10


@pytest.mark.parametrize("room", ROOMS)
def test_room_imports_only_from_itself_and_rooms_above(room):
    allowed = {*ROOMS[: ROOMS.index(room) + 1], "__version__"}
    for path in [*(PACKAGE / room).rglob("*.py"), *PACKAGE.glob(f"{room}.py")]:
        for name in imports_of(path):
            assert not name.startswith("mm_hf.") or name.split(".")[1] in allowed, f"{path} imports {name}"
