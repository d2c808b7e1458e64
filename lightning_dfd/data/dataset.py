"""A folder of captioned videos: what is in it, and an endless seeded stream of it.

Axis legend: B batch, C = 3 colour channels, F frames, H height, W width.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from lightning_dfd.data.files import SampleError
from lightning_dfd.data.video import read_video
from lightning_dfd.types import Batch, Conditioning, VideoSize

VIDEO_SUFFIXES = (".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v", ".gif")
CAPTION_KEYS = ("text", "caption")


@dataclass(frozen=True)
class Clip:
    """One captioned file. `name` is its path relative to the root, with forward slashes."""

    name: str
    path: Path
    caption: str


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
        return Problem(clip.name, str(error).removeprefix(f"{clip.path}: "))


@dataclass(frozen=True)
class Listing:
    """What a folder holds: the clips that can be tried, and what was left out."""

    clips: tuple[Clip, ...]
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class Sample:
    """One captioned video: `video` uint8 [C, F, H, W], or from a cache `latents` [...] and `cond` of batch 1."""

    prompt: str
    video: Tensor | None = None
    latents: Tensor | None = None
    cond: Conditioning | None = None


def collate(samples: Sequence[Sample]) -> Batch:
    """B samples of one kind as a batch: pixels float [B, C, F, H, W] in [-1, 1], or latents float32 [B, ...]."""
    prompts = tuple(sample.prompt for sample in samples)
    videos = [sample.video for sample in samples if sample.video is not None]
    if videos:
        return Batch(prompts, video=torch.stack(videos).float() / 127.5 - 1.0)
    latents = [sample.latents for sample in samples if sample.latents is not None]
    conds = [sample.cond for sample in samples if sample.cond is not None]
    return Batch(prompts, latents=torch.stack(latents).float(), cond=Conditioning.cat(conds))


@dataclass(frozen=True)
class ClipVideos:
    """Clips as samples of pixels."""

    clips: tuple[Clip, ...]
    size: VideoSize
    fps: float | None

    def __len__(self) -> int:
        return len(self.clips)

    def load(self, index: int) -> Sample:
        """Sample number `index`. Raises VideoError."""
        clip = self.clips[index]
        return Sample(clip.caption, video=read_video(clip.path, self.size, self.fps))


# ---- what a folder holds --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """One line of a list, not yet checked: a name, and whatever stands in place of the caption."""

    name: Any
    caption: Any


def list_clips(root: str | Path, need_captions: bool = True) -> Listing:
    """The captioned videos of a folder.

    The list is `metadata.jsonl` or `metadata.csv` (imagefolder style: `file_name` relative to the folder, and
    `text` or `caption`); without one, every video with a caption in a .txt file of the same name beside it,
    subfolders included, hidden ones not. Only files that really lie inside the folder are read: absolute paths,
    `..` and links that lead out are problems, as are missing files and captions and text that is not UTF-8. Where
    captions are not needed, videos without one have an empty one.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: nothing in it can be used; says what was looked for and the first problems.
    """
    if not Path(root).is_dir():
        raise FileNotFoundError(f"no folder {str(root)!r}; data.folder must name a folder of captioned videos")
    root = Path(root).resolve()
    clips: dict[str, Clip] = {}
    problems: list[Problem] = []
    for row in _rows(root, need_captions):
        found = row if isinstance(row, Problem) else _check_row(root, row, need_captions)
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
            if not path.resolve().is_relative_to(root):
                raise ValueError(f"{path} is a link that leads out of the folder; put the file itself there")
            return read(path)
    return _sidecar_rows(root, need_captions)


def _jsonl_rows(path: Path) -> Iterator[_Row | Problem]:
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{path.name} line {number}"
        try:
            entry = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            yield Problem(where, "not UTF-8")
        except (ValueError, RecursionError) as error:
            yield Problem(where, f"malformed JSON ({error})")
        else:
            yield _row(where, entry) if isinstance(entry, dict) else Problem(where, "not a JSON object")


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
    return _Row(entry["file_name"], next((entry[key] for key in CAPTION_KEYS if key in entry), None))


def _sidecar_rows(root: Path, need_captions: bool) -> Iterator[_Row | Problem]:
    def hidden(path: Path) -> bool:
        return any(part.startswith(".") for part in path.relative_to(root).parts)

    found = (path for path in root.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES and not hidden(path))
    for path in sorted(found, key=lambda path: path.relative_to(root).as_posix()):
        name = path.relative_to(root).as_posix()
        text = path.with_suffix(".txt")
        if not need_captions and not text.exists():
            yield _Row(name, "")
            continue
        reason = _check_place(root, text.relative_to(root).as_posix())
        if reason:
            yield Problem(_printable(name), f"no caption: {text.name}: {reason}")
            continue
        yield _Row(name, text.read_bytes().removeprefix(b"\xef\xbb\xbf").decode("utf-8", errors="surrogateescape"))


def _check_row(root: Path, row: _Row, need_captions: bool) -> Clip | Problem:
    name = PurePosixPath(row.name).as_posix()
    reason = _check_place(root, row.name)
    if not reason and row.caption is not None and not isinstance(row.caption, str):
        reason = f"the caption is {type(row.caption).__name__}, not text"
    caption = row.caption.strip() if isinstance(row.caption, str) else ""
    if not reason and not caption and need_captions:
        reason = "no caption"
    if not reason and not _is_utf8(caption):
        reason = "the caption is not UTF-8"
    return Problem(_printable(row.name), reason) if reason else Clip(name, root / name, caption)


def _check_place(root: Path, name: str) -> str:
    """Why the file `name` under `root` must not or cannot be read; empty if it can."""
    if not name or "\0" in name or not _is_utf8(name):
        return "not a file name in UTF-8"
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor:
        return "absolute path; name files relative to the folder"
    if ".." in PureWindowsPath(name).parts:
        return "'..' leads out of the folder"
    try:
        place = (root / name).resolve()
        is_file = place.is_file()
    except OSError as error:
        return f"cannot be followed ({error.strerror})"
    except RuntimeError as error:  # links in a circle, before Python 3.13
        return f"cannot be followed ({error})"
    if not place.is_relative_to(root):
        return "a link that leads out of the folder; put the file itself there"
    if not is_file:
        return "no such file"
    return "" if os.access(place, os.R_OK) else "may not be read by this user"


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _printable(text: str) -> str:
    return text.encode("utf-8", errors="backslashreplace").decode("utf-8")


# ---- an endless stream of it ----------------------------------------------------------------------------------


def load_or_next(load: Callable[[int], Sample], order: Sequence[int], position: int, bad: set[int]) -> Sample:
    """The sample at `position` of `order`, or the next one (round the end) that can be loaded.

    Indices that fail are warned of and remembered in `bad`, so that a process tries each only once.

    Raises:
        ValueError: none can be loaded.
    """
    for offset in range(len(order)):
        index = order[(position + offset) % len(order)]
        if index in bad:
            continue
        try:
            return load(index)
        except SampleError as error:
            bad.add(index)
            warnings.warn(f"left out: {error}", stacklevel=2)
    raise ValueError(f"nothing left to load: all {len(order)} clips failed, each with a warning above")


class SeededStream(IterableDataset[Sample]):
    """An endless stream whose item k depends on the seed and k alone.

    Epoch e = k // count is a permutation drawn from (seed, e). Batch b of a rank holds the items from
    (b * world_size + rank) * batch_size on, so that two ranks see together what one rank with twice the batch
    sees. A DataLoader with any number of workers yields the batches that it yields without workers, if its
    batch_size is the stream's: worker w of W makes the batches w, w + W, ... A clip that cannot be decoded is
    left out and the next of its epoch takes its place.

    Args:
        load: from an index below `count` to its sample; may raise SampleError.
        count: how many different samples there are.
        seed: of the permutations.
        batch_size: items in a batch of one rank.
        start: batches of this rank that a run has consumed before.
        rank: this process among those that train together.
        world_size: how many they are.

    Raises:
        ValueError: `count` or `batch_size` is below 1; when iterated, all `count` loads in a row failed.
    """

    def __init__(
        self,
        load: Callable[[int], Sample],
        count: int,
        seed: int,
        batch_size: int,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if count < 1 or batch_size < 1:
            raise ValueError(f"need at least one clip and one item a batch, got {count} and {batch_size}")
        self.load = load
        self.count = count
        self.seed = seed
        self.batch_size = batch_size
        self.start = start
        self.rank = rank
        self.world_size = world_size
        self._bad: set[int] = set()
        self._epoch = -1
        self._order: list[int] = []

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        batch = self.start + first
        while True:
            begin = (batch * self.world_size + self.rank) * self.batch_size
            for k in range(begin, begin + self.batch_size):
                yield self.item(k)
            batch += step

    def item(self, k: int) -> Sample:
        """Item k of the stream that all ranks share."""
        epoch, position = divmod(k, self.count)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self.order(epoch)
        return load_or_next(self.load, self._order, position, self._bad)

    def order(self, epoch: int) -> list[int]:
        """The permutation of the indices that is epoch number `epoch`."""
        digest = hashlib.sha256(f"{self.seed}/{epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        return torch.randperm(self.count, generator=generator).tolist()


class OrderedSamples(Dataset[Sample]):
    """A finite number of samples in order; one that cannot be decoded is replaced by the next that can."""

    def __init__(self, load: Callable[[int], Sample], count: int) -> None:
        self.load = load
        self.count = count
        self._bad: set[int] = set()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return load_or_next(self.load, range(self.count), index, self._bad)
