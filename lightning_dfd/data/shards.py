"""Tar shards in WebDataset's layout: members `<key>.mp4`, `<key>.txt` or `<key>.json`, side by side.

A shard is not streamed. Its headers are read once, which gives the place of every member, and a video is then read
where it lies: item k of the training stream stays a function of seed and k, as with folders. Nothing is unpacked.
"""

from __future__ import annotations

import contextlib
import tarfile
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from lightning_dfd.files import ShardMember

COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")
SHARDS = (".tar", *COMPRESSED)
CAPTIONS = (".json", ".txt")  # the first that is there counts
LONGEST_CAPTION = 1 << 20  # bytes


@dataclass(frozen=True)
class ShardEntry:
    """A video in a shard, and the content of what captions it, by suffix."""

    name: str
    member: ShardMember
    captions: Mapping[str, bytes]


@dataclass(frozen=True)
class ShardProblem:
    """Why a member, or with an empty name a shard or its rest, is left out."""

    name: str
    reason: str


def read_shard(path: Path, suffixes: Sequence[str]) -> Iterator[ShardEntry | ShardProblem]:
    """The videos of a shard, by the suffixes of their names, in the shard's order; and what is wrong with it."""
    if path.name.lower().endswith(COMPRESSED):
        yield ShardProblem(
            "", "is compressed, so no video in it can be reached without all before it; unpack it to .tar"
        )
        return
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:", errorlevel=0) as tar:
            members: list[tarfile.TarInfo] = []
            with contextlib.suppress(tarfile.ReadError):  # the data of the last member are cut off
                for member in tar:
                    members.append(member)
            end = tar.offset
            yield from _entries(path, tar, members, suffixes)
            file.seek(end)
            mark = file.read(512)
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError) as error:
        yield ShardProblem("", f"no tar file, or damaged ({error})")
        return
    if mark != bytes(512):
        yield ShardProblem("", f"cut off or damaged at byte {end}; what follows is left out")


def _entries(
    path: Path, tar: tarfile.TarFile, members: Sequence[tarfile.TarInfo], suffixes: Sequence[str]
) -> Iterator[ShardEntry | ShardProblem]:
    size = path.stat().st_size
    texts: dict[str, dict[str, tarfile.TarInfo]] = {}
    for member in members:
        key, suffix = _key_and_suffix(member.name)
        if suffix in CAPTIONS and member.isreg():
            texts.setdefault(key, {})[suffix] = member
    videos = {key for key, suffix in map(_key_and_suffix, (member.name for member in members)) if suffix in suffixes}
    for member in members:
        key, suffix = _key_and_suffix(member.name)
        if suffix not in suffixes:
            if key in texts and key not in videos and suffix not in CAPTIONS and member.isreg():
                yield ShardProblem(member.name, f"{suffix} is not a video suffix; rename or convert it")
            continue
        reason = _why_not(member, size)
        if reason:
            yield ShardProblem(member.name, reason)
            continue
        found = ShardMember(path, member.name, member.offset_data, member.size, int(member.mtime))
        captions = {}
        for text in texts.get(key, {}).values():
            opened = tar.extractfile(text) if text.offset_data + text.size <= size else None
            captions[_key_and_suffix(text.name)[1]] = b"" if opened is None else opened.read(LONGEST_CAPTION)
        yield ShardEntry(member.name, found, captions)


def _key_and_suffix(name: str) -> tuple[str, str]:
    """WebDataset's rule: the key ends at the first dot of the last part of the path. What counts is the last suffix."""
    folder, _, last = unicodedata.normalize("NFC", name).rpartition("/")
    return f"{folder}/{last.partition('.')[0]}", f".{last.rpartition('.')[2].lower()}"


def _why_not(member: tarfile.TarInfo, size: int) -> str:
    """Why a member must not or cannot be read; empty if it can."""
    name = member.name
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor or ".." in PureWindowsPath(name).parts:
        return "its name leads out of the shard; name members relative to it"
    if not member.isreg() or member.issparse():
        return "no regular file"
    if not member.size or member.offset_data + member.size > size:
        return f"cut off, {max(0, min(member.size, size - member.offset_data))} of {member.size} bytes are there"
    return ""
