"""The lines of a file that grows, as they come: each whole line once, whatever happens to the file."""

import os
from pathlib import Path

from trainer.watch.files import opened

CHUNK = 1 << 20  # bytes read at once; a longer line is left out
MARK = 64  # bytes before the place that was read to, by which a file of the same name and a longer one is told from the old one


class Tail:
    """`next` until it gives nothing. Memory is that of one chunk, however long the file is."""

    def __init__(self, root: Path, name: str) -> None:
        self.root, self.name, self.there = root, name, False
        self.clear()

    def clear(self) -> None:
        """From the beginning."""
        self.offset = self.size = self.left_out = 0
        self.changed_ns = 0
        self._file, self._mark, self._skipping = (0, 0), b"", False

    @property
    def behind(self) -> int:
        """Bytes that are not read yet; of a half-written line too."""
        return self.size - self.offset

    def next(self) -> list[bytes] | None:
        """Whole lines, none when there are no new ones; None when the file is gone or another one: what was read of it no longer holds."""
        try:
            with opened(self.root, self.name) as (handle, (device, inode, size, changed_ns)):
                self.there = True
                before = os.pread(handle, len(self._mark), self.offset - len(self._mark)) if self._mark else b""
                known = self._file != (0, 0)
                if known and ((device, inode) != self._file or size < self.offset or before != self._mark):
                    self.clear()
                    return None
                self._file, self.size, self.changed_ns = (device, inode), size, changed_ns
                return self._lines(os.pread(handle, CHUNK, self.offset) if size > self.offset else b"")
        except OSError:
            self.there, known = False, self._file != (0, 0)
            self.clear()
            return None if known else []

    def _lines(self, data: bytes) -> list[bytes]:
        end = data.rfind(b"\n") + 1
        if not end and len(data) < CHUNK:
            return []  # still being written
        if not end:
            self.left_out += not self._skipping
            self._skipping, end = True, len(data)
            begin = end
        else:
            begin = data.find(b"\n") + 1 if self._skipping else 0
            self._skipping = False
        self.offset += end
        self._mark = data[max(0, end - MARK) : end]
        return data[begin:end].split(b"\n")[:-1]
