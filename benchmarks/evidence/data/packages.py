"""Short descriptions of Debian packages and the section of the archive that each package is in."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache

import numpy as np

SECTIONS = (
    "libs", "libdevel", "python", "doc", "perl", "devel", "utils", "haskell", "net", "rust", "golang", "javascript",
    "java", "science", "admin", "ruby", "gnu-r", "games", "x11", "text",
)  # fmt: skip
MINIMUM = 20_000  # packages; an index that was never updated has only those that are installed


def parse_index(index: str) -> Iterator[tuple[str, str, str]]:
    """Yield source package, section and short description of the packages of `SECTIONS` in an index.

    The name of the package is removed from its description, since it often contains the name of the section.
    """
    for stanza in index.split("\n\n"):
        fields = dict(re.findall(r"^(Package|Source|Section|Description(?:-en)?): (.*)$", stanza, re.MULTILINE))
        description = fields.get("Description", fields.get("Description-en", ""))
        section = fields.get("Section", "").rpartition("/")[2]
        if section in SECTIONS and description:
            name = fields["Package"]
            text = re.sub(rf"\b{re.escape(name)}\b", "", description, flags=re.IGNORECASE)
            yield fields.get("Source", name).partition(" ")[0], section, " ".join(text.split())


@cache
def descriptions() -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return descriptions, class indices and source packages of Debian's package index, without duplicate texts.

    Raises:
        FileNotFoundError: apt-cache does not exist, or the package index has not been downloaded.
    """
    if shutil.which("apt-cache") is None:
        raise FileNotFoundError("This task needs Debian's package index, and apt-cache is not installed.")
    index = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True).stdout
    rows = {text: (source, section) for source, section, text in sorted(parse_index(index)) if text}
    if len(rows) < MINIMUM:
        raise FileNotFoundError(
            f"This task needs Debian's package index, and apt-cache has only {len(rows)} packages: apt-get update."
        )
    sources, sections = zip(*rows.values(), strict=True)
    return list(rows), np.array([SECTIONS.index(section) for section in sections]), np.array(sources)


def split_by_source(sources: np.ndarray, sizes: list[int], seed: int = 0) -> list[np.ndarray]:
    """Draw random subsets of packages such that all packages of a source are in at most one of them.

    A source that would exceed the size of a subset is left out. With the same seed, a larger last subset contains a
    smaller one up to that.

    Raises:
        ValueError: There are too few packages.
    """
    names, inverse = np.unique(sources, return_inverse=True)
    groups = np.split(np.argsort(inverse, kind="stable"), np.cumsum(np.bincount(inverse))[:-1])
    remaining = iter(np.random.default_rng(seed).permutation(len(names)))
    found = []
    for size in sizes:
        part: list[int] = []
        while len(part) < size:
            group = next(remaining, None)
            if group is None:
                raise ValueError(f"sizes must add up to less than {len(sources)}, the number of packages, got {sizes}.")
            if len(part) + len(groups[group]) <= size:
                part += groups[group].tolist()
        found.append(np.array(part))
    return found
