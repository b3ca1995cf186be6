"""Checksums of the files of a checkpoint, in the format of `sha256sum`."""

from __future__ import annotations

import hashlib
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..evaluation.files import write_text

CHECKSUM_FILE = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def write_checksums(directory: str | Path) -> Path:
    """Write the checksums of all files in a directory to `SHA256SUMS`, which `sha256sum -c SHA256SUMS` verifies.

    Args:
        directory: A complete checkpoint.

    Returns:
        The file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     _ = Path(directory, "a.txt").write_text("a")
        ...     print(write_checksums(directory).read_text())
        ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb  a.txt
        <BLANKLINE>
    """
    directory = Path(directory)
    target = directory / CHECKSUM_FILE
    own = (CHECKSUM_FILE, f"{CHECKSUM_FILE}.partial")  # the latter of a process that was killed
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name not in own)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing releases the interpreter lock
        digests = list(pool.map(file_digest, files))
    names = [file.relative_to(directory).as_posix() for file in files]
    write_text(target, "".join(f"{digest}  {name}\n" for digest, name in zip(digests, names, strict=True)))
    return target


def read_checksums(directory: str | Path) -> dict[str, str]:
    """Return the checksum of each file by its path relative to a checkpoint. Those of `Trainer` have none.

    Raises:
        ValueError: `SHA256SUMS` is damaged.
    """
    path = Path(directory) / CHECKSUM_FILE
    if not path.is_file():
        return {}
    lines = [_LINE.fullmatch(line) for line in path.read_bytes().decode(errors="replace").splitlines()]
    if not lines or None in lines:
        raise ValueError(f"{CHECKSUM_FILE} is damaged")
    return {match[2]: match[1] for match in lines if match is not None}


def file_digest(path: Path) -> str:
    """Return the SHA-256 digest of a file in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()
