"""What a folder of captioned videos holds: files, lists of them, and tar shards.

Nothing is opened here but lists, captions and the headers of shards; whether a video decodes shows when it is read.
"""

from __future__ import annotations

import csv
import io
import json
import os
import stat
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from lightning_dfd.data.shards import SHARDS, ShardEntry, read_shard
from lightning_dfd.data.video import VIDEO_SUFFIXES
from lightning_dfd.files import SampleError, ShardMember

CAPTION_KEYS = ("text", "caption")
SHORT_KEYS = ("short_text", "short_caption")


@dataclass(frozen=True)
class Clip:
    """One captioned video.

    Args:
        name: its path relative to the root, with forward slashes; of a shard's member the shard's path and its own.
            In Unicode's composed form (NFC), whichever the file system has.
        path: of the file that holds it.
        caption: the first of its captions.
        others: further captions, shorter ones for example.
        member: where in the file it lies, for members of shards.
    """

    name: str
    path: Path
    caption: str
    others: tuple[str, ...] = ()
    member: ShardMember | None = None

    @property
    def source(self) -> Path | ShardMember:
        """What `read_video` takes."""
        return self.member or self.path

    @property
    def root(self) -> Path:
        """The folder that it was listed from."""
        inside = len(PurePosixPath(self.member.name).parts) if self.member else 0
        return self.path.parents[len(PurePosixPath(self.name).parts) - inside - 1]

    @property
    def captions(self) -> tuple[str, ...]:
        return (self.caption, *self.others)


@dataclass(frozen=True)
class Problem:
    """Why a file, or a line of a list, is left out."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"

    @staticmethod
    def of(clip: Clip, error: SampleError) -> Problem:
        """A clip's problem, its folder not repeated in the reason."""
        return Problem(clip.name, str(error).removeprefix(f"{clip.source}: "))


@dataclass(frozen=True)
class Listing:
    """What a folder holds: the clips that can be tried, and what was left out."""

    clips: tuple[Clip, ...]
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class _Row:
    """One line of a list, not yet checked: a name, and whatever stands in place of the captions."""

    name: str
    captions: tuple[Any, ...]
    member: ShardMember | None = None


def list_clips(root: str | Path, need_captions: bool = True) -> Listing:
    """The captioned videos of a folder.

    The list is `metadata.jsonl` or `metadata.csv` (imagefolder style: `file_name` relative to the folder, and
    `text` or `caption`); without one, every video with a caption in a .txt file of the same name beside it and those
    in tar shards, subfolders included, hidden ones not. Further captions of a clip are those of `short_text` and of
    lists in place of text. A captioned file without a video suffix is a problem, unless a video has its caption.
    Only files that really lie inside the folder are read: absolute paths, `..` and links that lead out are problems,
    as are missing files and captions and text that is not UTF-8. In a snapshot of the hub's cache, links into that
    repository's blobs are followed. Where captions are not needed, videos without one have an empty one.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: nothing in it can be used; says what was looked for and the first problems.
    """
    if not Path(root).is_dir():
        raise FileNotFoundError(f"no folder {str(root)!r}; data.folder must name a folder of captioned videos")
    root = Path(root).resolve()
    clips: dict[str, Clip] = {}
    problems: list[Problem] = []
    places = _Places(root)
    for row in _rows(root, need_captions):
        found = row if isinstance(row, Problem) else _check_row(places, row, need_captions)
        if isinstance(found, Clip) and found.name in clips:
            found = Problem(found.name, "listed twice; the first line counts")
        if isinstance(found, Problem):
            problems.append(found)
        else:
            clips[found.name] = found
    if not clips:
        kind, beside = ("captioned video", " with a .txt beside them") if need_captions else ("video", "")
        raise ValueError(
            f"no {kind} in {root}: looked for metadata.jsonl or metadata.csv with file_name and text, and without them "
            f"for videos ({' '.join(VIDEO_SUFFIXES)}){beside}{first_problems(problems)}"
        )
    return Listing(tuple(clips.values()), tuple(problems))


def first_problems(problems: Sequence[Problem], show: int = 3) -> str:
    """The end of an error's line: how many problems there are, and the first few."""
    if not problems:
        return ""
    rest = "" if len(problems) <= show else f"; and {len(problems) - show} more"
    return f". {len(problems)} left out: " + "; ".join(str(problem) for problem in problems[:show]) + rest


def _rows(root: Path, need_captions: bool) -> Iterator[_Row | Problem]:
    for name, read in (("metadata.jsonl", _jsonl_rows), ("metadata.csv", _csv_rows)):
        path = root / name
        if path.is_file():
            if not _is_inside(path.resolve(), root):
                raise ValueError(f"{path} is a link that leads out of the folder; put the file itself there")
            return read(path)
    return _sidecar_rows(root, need_captions)


def _jsonl_rows(path: Path) -> Iterator[_Row | Problem]:
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{path.name} line {number}"
        entry = _json_row(where, line)
        yield entry if isinstance(entry, Problem) else _row(where, entry)


def _json_row(where: str, line: bytes) -> dict[str, Any] | Problem:
    """A JSON object, or why there is none."""
    try:
        entry = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return Problem(where, "not UTF-8")
    except (ValueError, RecursionError) as error:
        return Problem(where, f"malformed JSON ({error})")
    return entry if isinstance(entry, dict) else Problem(where, "not a JSON object")


def _csv_rows(path: Path) -> Iterator[_Row | Problem]:
    # wrong bytes become lone surrogates, which `_check_row` then finds in their own row
    text = path.read_bytes().removeprefix(b"\xef\xbb\xbf").decode("utf-8", errors="surrogateescape")
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        columns = reader.fieldnames or ()
    except csv.Error as error:
        raise ValueError(f"{path} is not a CSV list ({error})") from error
    if "file_name" not in columns or not set(CAPTION_KEYS) & set(columns):
        raise ValueError(f"{path} has the columns {list(columns)}; need file_name and one of {list(CAPTION_KEYS)}")
    try:
        for entry in reader:
            where = f"{path.name} line {reader.line_num}"
            cells: dict[Any, Any] = dict(entry)
            if None in cells:
                yield Problem(where, "more cells than columns; put captions with commas in double quotes")
            else:
                yield _row(where, cells)
    except csv.Error as error:
        yield Problem(f"{path.name} line {reader.line_num}", f"malformed CSV ({error}); the rest was not read")


def _row(where: str, entry: Mapping[str, Any]) -> _Row | Problem:
    if not isinstance(entry.get("file_name"), str):
        return Problem(where, "no file_name")
    return _Row(entry["file_name"], captions_of(entry))


def captions_of(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    """Whatever stands for captions: of the first key for long ones, then of the first for short ones."""
    found: list[Any] = []
    for keys in (CAPTION_KEYS, SHORT_KEYS):
        value = next((entry[key] for key in keys if entry.get(key) is not None), None)
        found += value if isinstance(value, list) else [] if value is None else [value]
    return tuple(found)


def _sidecar_rows(root: Path, need_captions: bool) -> Iterator[_Row | Problem]:
    names = sorted(_names(root))
    by_name = {_composed(name): name for name in names}
    wanted = (*VIDEO_SUFFIXES, *SHARDS)
    captioned = {_composed(_stem(name)) for name in names if name.lower().endswith(wanted)}
    places = _Places(root)
    for name in names:
        stem = _composed(_stem(name))
        text = by_name.get(f"{stem}.txt")
        if not name.lower().endswith(wanted):
            if text not in (None, name) and stem not in captioned and (root / name).is_file():
                suffix = os.path.splitext(name)[1]
                why = f"{suffix} is not a video suffix" if suffix else "it has no suffix"
                yield Problem(_printable(name), f"{why}; rename or convert it")
        elif name.lower().endswith(SHARDS):
            yield from _shard_rows(root, name, need_captions)
        elif text is None and not need_captions:
            yield _Row(name, ())
        else:
            text = text or f"{_stem(name)}.txt"
            reason = places.why_not(text)
            if reason:
                yield Problem(_printable(name), f"no caption: {text.rpartition('/')[2]}: {reason}")
            else:
                with open(f"{root}/{text}", "rb") as file:
                    yield _Row(name, (_decoded(file.read()),))


def _names(root: Path) -> Iterator[str]:
    """Everything in a folder, by its path in it, with forward slashes; nothing hidden, and no folder by a link."""
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = Path(folder).relative_to(root).as_posix()
        before = "" if inside == "." else f"{inside}/"
        yield from (before + name for name in (*folders, *files) if not name.startswith("."))


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _shard_rows(root: Path, name: str, need_captions: bool) -> Iterator[_Row | Problem]:
    """The videos of one shard, or why it or some of its members are left out."""
    reason = _Places(root).why_not(name)
    if reason:
        yield Problem(_printable(name), reason)
        return
    for entry in read_shard(root / name, VIDEO_SUFFIXES):
        where = _printable(f"{name}/{entry.name}" if entry.name else name)
        if not isinstance(entry, ShardEntry):
            yield Problem(where, entry.reason)
        elif not entry.captions and not need_captions:
            yield _Row(f"{name}/{entry.name}", (), entry.member)
        elif ".json" in entry.captions:
            found = _json_row(where, entry.captions[".json"])
            yield (
                found if isinstance(found, Problem) else _Row(f"{name}/{entry.name}", captions_of(found), entry.member)
            )
        else:
            yield _Row(f"{name}/{entry.name}", tuple(_decoded(text) for text in entry.captions.values()), entry.member)


def _decoded(content: bytes) -> str:
    """Text of which `_check_row` will find what is not UTF-8."""
    return content.removeprefix(b"\xef\xbb\xbf").decode("utf-8", errors="surrogateescape")


def _check_row(places: _Places, row: _Row, need_captions: bool) -> Clip | Problem:
    name = unicodedata.normalize("NFC", PurePosixPath(row.name).as_posix())
    found = row.name if row.member else _as_stored(places.root, row.name)
    reason = "" if row.member else places.why_not(found)
    wrong = next((type(caption).__name__ for caption in row.captions if not isinstance(caption, str)), None)
    if not reason and wrong:
        reason = f"the caption is {wrong}, not text"
    captions = [caption.strip() for caption in row.captions if isinstance(caption, str) and caption.strip()]
    if not reason and not captions and need_captions:
        reason = "no caption"
    if not reason and not all(_is_utf8(caption) for caption in captions):
        reason = "the caption is not UTF-8"
    if reason:
        return Problem(_printable(row.name), reason)
    first, *others = dict.fromkeys(captions) or ("",)
    return Clip(name, row.member.path if row.member else places.root / found, first, tuple(others), row.member)


class _Places:
    """Which files may be read of a folder, whose own path holds no links.

    A regular file in a folder that no link leads to lies where its name says. Such folders are remembered, as a list
    may have a hundred thousand files; so this is made anew for every listing.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._plain: dict[str, bool] = {}

    def why_not(self, name: str) -> str:
        """Why the file `name` under the folder must not or cannot be read; empty if it can."""
        if not name or "\0" in name or not _is_utf8(name):
            return "not a file name in UTF-8"
        if PurePosixPath(name).is_absolute() or ((":" in name or "\\" in name) and PureWindowsPath(name).anchor):
            return "absolute path; name files relative to the folder"
        if ".." in name and ".." in PureWindowsPath(name).parts:
            return "'..' leads out of the folder"
        path = f"{self.root}/{name}"
        try:
            if not (stat.S_ISREG(os.lstat(path).st_mode) and self._is_plain(name.rpartition("/")[0])):
                place = Path(path).resolve()
                if not _is_inside(place, self.root):
                    return "a link that leads out of the folder; put the file itself there"
                if not place.is_file():
                    return "no such file"
        except FileNotFoundError:
            return "no such file"
        except OSError as error:
            return f"cannot be followed ({error.strerror})"
        except RuntimeError as error:  # links in a circle, before Python 3.13
            return f"cannot be followed ({error})"
        return "" if os.access(path, os.R_OK) else "may not be read by this user"

    def _is_plain(self, folder: str) -> bool:
        """Whether no link is on the way to a folder in this one."""
        if folder not in self._plain:
            path = os.path.normpath(f"{self.root}/{folder}")
            self._plain[folder] = os.path.realpath(path) == path
        return self._plain[folder]


def _is_inside(place: Path, root: Path) -> bool:
    """Whether a file, links followed, belongs to the folder `root`: it lies there or, where that is a snapshot in the
    hub's cache (`models--a--b/snapshots/<revision>`, or a folder in it), among the same repository's blobs."""
    if place.is_relative_to(root):
        return True
    for snapshots, repository in zip((root, *root.parents), root.parents, strict=False):
        if snapshots.name == "snapshots" and repository.name.startswith(("datasets--", "models--", "spaces--")):
            return place.is_relative_to(repository / "blobs")
    return False


def _composed(path: str) -> str:
    """A path in Unicode's composed form: file systems and lists differ in how they write an é."""
    return unicodedata.normalize("NFC", path)


def _as_stored(root: Path, name: str) -> str:
    """`name`, each part in that of Unicode's forms in which the file system has it."""
    path = PurePosixPath(name)
    if name.isascii() or "\0" in name or not _is_utf8(name) or path.is_absolute() or ".." in path.parts:
        return name
    found = PurePosixPath()
    for part in path.parts:
        forms = (found / form for form in (part, *(unicodedata.normalize(form, part) for form in ("NFC", "NFD"))))
        found = next((form for form in forms if os.path.lexists(root / form)), found / part)
    return str(found)


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _printable(text: str) -> str:
    return text.encode("utf-8", errors="backslashreplace").decode("utf-8")
