"""Reading inside a folder that somebody else writes: no links, no pipes, never more than so many bytes; and text that can be shown."""

import os
import stat
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Stamp = tuple[int, int, int, int]  # device, inode, size, time of the last change in ns
_FILE = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


@contextmanager
def opened(root: Path, *parts: str) -> Iterator[tuple[int, Stamp]]:
    """A descriptor of a regular file below `root` (which may itself be a link: its name was given by the user); OSError for all else."""
    handles = [os.open(root, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)]
    try:
        for part in parts[:-1]:
            handles.append(os.open(part, _FILE | os.O_DIRECTORY, dir_fd=handles[-1]))
        handles.append(os.open(parts[-1], _FILE, dir_fd=handles[-1]))
        told = os.fstat(handles[-1])
        if not stat.S_ISREG(told.st_mode):
            raise OSError(f"{parts[-1]} is no file")
        yield handles[-1], (told.st_dev, told.st_ino, told.st_size, told.st_mtime_ns)
    finally:
        for handle in reversed(handles):
            os.close(handle)


def stamp(root: Path, *parts: str) -> Stamp | None:
    """None where there is no such file; links count as none."""
    try:
        told = os.lstat(root.joinpath(*parts))
    except (OSError, ValueError):
        return None
    return (told.st_dev, told.st_ino, told.st_size, told.st_mtime_ns) if stat.S_ISREG(told.st_mode) else None


def small(root: Path, *parts: str, limit: int) -> bytes | None:
    """The first `limit` bytes; None where there is no such file."""
    try:
        with opened(root, *parts) as (handle, _):
            return os.pread(handle, limit, 0)
    except (OSError, ValueError):
        return None


def names(folder: Path, limit: int = 20_000) -> list[str]:
    """What lies in a folder, at most `limit` names; none where it is no folder, or a link."""
    try:
        if folder.is_symlink():
            return []
        with os.scandir(folder) as entries:
            return [entry.name for entry, _ in zip(entries, range(limit), strict=False)]
    except (OSError, ValueError):
        return []


def plain(value: Any, limit: int = 200) -> str:
    """Text of at most `limit` characters that can be shown: no control characters, nothing that turns the direction of what follows."""
    try:
        text = value if isinstance(value, str) else "" if value is None else str(value) if isinstance(value, int | float) else "?"
    except ValueError:  # an integer of thousands of digits
        text = "?"
    cut = text[: limit + 1]
    shown = "".join(c if unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Cn") else " " for c in cut)
    return f"{shown[:limit]}…" if len(text) > limit else shown
