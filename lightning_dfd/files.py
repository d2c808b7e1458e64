"""Files that are either whole or not there, and the paths that users give."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class SampleError(ValueError):
    """A clip that cannot be used; the message names file and reason in one line. Training goes on without it."""


@dataclass(frozen=True)
class ShardMember:
    """A video that is some bytes of a file, a tar shard, and the time of its last change (seconds)."""

    path: Path
    name: str
    offset: int
    size: int
    mtime: int

    def __str__(self) -> str:
        return f"{self.path}/{self.name}"


# ---- paths that users give --------------------------------------------------------------------------------------


def expanded(path: str, key: str) -> str:
    """A path with `~` and environment variables replaced. What exists under the very name given stays as it is.

    Args:
        path: as given in a recipe, on the command line or in Python.
        key: the setting's name, for the error.

    Raises:
        ValueError: it names a variable that is not set, or a user who is not known.
    """
    if not (path.startswith("~") or "$" in path) or os.path.lexists(path):
        return path
    found = os.path.expanduser(os.path.expandvars(path))
    if found.startswith("~"):
        raise ValueError(f"{key} is {path}, and there is no home folder of {found.split('/')[0]!r}; write it out")
    unset = re.search(r"\$(\w+|\{[^}]*\})", found)
    if unset and not os.path.lexists(found):
        raise ValueError(f"{key} is {path}, and the variable {unset.group()} is not set; set it, or write the path out")
    return found


def require_writable(folder: str | Path, key: str) -> None:
    """Raise OSError, naming the setting, unless files can be written to `folder`. Makes no folder; a missing one is
    judged by the nearest one above it that is there. Addresses (`s3://...`) are not tried."""
    if "://" in str(folder):
        return
    folder = Path(folder).absolute()
    try:
        place = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
        if not place.is_dir():
            raise OSError(errno.ENOTDIR, f"{place} is not a folder")
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise OSError(f"{key} is {folder}, which cannot be written ({error.strerror}); name another folder") from error


def writable_folder(folder: str | Path, key: str) -> list[str]:
    """Make a folder where it is missing; returns the sorted names of what is in it.

    Raises:
        OSError: it cannot be created, read or written.
    """
    require_writable(folder, key)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        return sorted(os.listdir(folder))
    except OSError as error:
        raise OSError(f"{key} is {folder}, which cannot be read ({error.strerror}); name another folder") from error


def output_folder(output: str, record: str, in_the_way: Callable[[str], bool] = lambda name: True) -> Path:
    """The folder `output` of a command, created where it is missing; its content stays as it was.

    Args:
        output: as given.
        record: the file by which an earlier call's folder is known.
        in_the_way: whether something of another origin must not have this name.

    Raises:
        ValueError: it holds something else than an earlier call's output.
        OSError: it cannot be created, read or written.
    """
    if not output:
        raise ValueError("output is empty; name a folder")
    names = writable_folder(output, "output")
    foreign = [] if record in names else [name for name in names if in_the_way(name)]
    if foreign:
        raise ValueError(f"output {output} holds something else ({foreign[0]}); name a new or an empty folder")
    return Path(output)


# ---- what a file was made from ----------------------------------------------------------------------------------


def digest(content: object) -> str:
    """16 hex digits that stand for a text, or for values that JSON can write."""
    text = content if isinstance(content, str) else json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differing(here: Mapping[str, Any], there: Mapping[str, Any], where: str = "there") -> list[str]:
    """`key is <value> there and <value> here` for every key that both know and that differs."""
    return [
        f"{key} is {there[key]} {where} and {here[key]} here"
        for key in here
        if key in there and here[key] != there[key]
    ]


# ---- writing ----------------------------------------------------------------------------------------------------


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, which takes its place on success and is removed on failure.

    The folder is created where it is missing. The temporary file lies in the same folder, as `os.replace` is only
    atomic within one file system. It is there from the start, empty, with the permissions that the user's umask gives
    new files; those the result has, whatever wrote it: safetensors makes files that nobody else may read.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        mode = _touch(temporary)
        yield temporary
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def respect_umask(folder: Path) -> None:
    """Give all files in `folder`, which others' code wrote, the permissions of files that `open` creates there."""
    probe = folder / f".{os.getpid()}.tmp"
    try:
        mode = _touch(probe)
    finally:
        probe.unlink(missing_ok=True)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def _touch(path: Path) -> int:
    """Make an empty file; returns its permissions."""
    with path.open("wb") as file:
        return os.fstat(file.fileno()).st_mode & 0o777
