"""Files that are either whole or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


class SampleError(ValueError):
    """A clip that cannot be used; the message names file and reason in one line. Training goes on without it."""


@dataclass(frozen=True)
class Part:
    """Some bytes of a file that are a video of their own: a member of a shard, and when it was made (seconds)."""

    path: Path
    name: str
    offset: int
    size: int
    mtime: int

    def __str__(self) -> str:
        return f"{self.path}/{self.name}"


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, which takes its place on success and is removed on failure.

    The folder is made where it is missing. The temporary file lies in the same folder, as `os.replace` is only
    atomic within one file system.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
