"""Files written completely or not at all, and never through symbolic links."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def replaced_file(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a new binary file that replaces a file when the context ends without an error.

    A reader finds either the old or the new content. A symbolic link is replaced itself: the file that it refers to
    does not change.

    Args:
        path: The file to write. Its directory must exist.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     with replaced_file(f"{directory}/notes.txt") as file:
        ...         _ = file.write(b"complete")
        ...     print(Path(directory, "notes.txt").read_text())
        complete
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)  # of a process that was killed
    try:
        with partial.open("xb") as file:  # creates a new file, without following a link
            yield file
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file as [`replaced_file`] does."""
    with replaced_file(path) as file:
        file.write(text.encode())


def remove_links(directory: str | Path, suffixes: Collection[str]) -> None:
    """Remove symbolic links in a directory whose files are written next by code that follows links.

    The files that they refer to are kept.

    Args:
        directory: The directory. It need not exist.
        suffixes: Suffixes of the files that are written, such as ".json".
    """
    for path in Path(directory).glob("*"):
        if path.suffix in suffixes:
            remove_link(path)


def remove_link(path: str | Path) -> None:
    """Remove a symbolic link before a file of its name is written by code that follows links."""
    if Path(path).is_symlink():
        Path(path).unlink()


@contextlib.contextmanager
def exclusive_directory(directory: str | Path) -> Iterator[None]:
    """Reserve a directory for the context, where the system has locks: not on Windows nor some network file systems.

    Args:
        directory: The directory; it is made if it does not exist.

    Raises:
        BlockingIOError: It is reserved already, by this or another process.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    Path(directory).mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory, os.O_RDONLY)
    _LOCKED.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:  # the file system has no locks
            pass
        yield
    finally:
        if descriptor in _LOCKED:
            _LOCKED.discard(descriptor)
            os.close(descriptor)


def _close_in_child() -> None:
    """Close the locks in a worker of a data loader, for example, which may outlive its process when that is killed."""
    for descriptor in _LOCKED:
        os.close(descriptor)
    _LOCKED.clear()


_LOCKED: set[int] = set()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
