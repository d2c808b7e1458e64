"""Folders of videos, whoever generated them: read at one size and rate, and measured.

Axis legend: B videos measured together, C = 3 channels, F frames, H height, W width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from lightning_dfd.data import Clip, Problem, VideoError, first_problems, list_clips, read_video
from lightning_dfd.data.video import glance, middle_rate, note_guessed_colours
from lightning_dfd.evaluation.metrics import VideoSuite
from lightning_dfd.types import VideoSize

SHOWN_CAPTIONS, SHOWN_VIDEOS = 4, 4
SAME_RATE = 1.01  # rates of up to this ratio count as one: 23.976 is 24

# ---- reading ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """How all folders are read; `fps` None is for frames as stored."""

    size: VideoSize
    fps: float | None
    batch_size: int
    min_videos: int
    device: torch.device


@dataclass(frozen=True)
class Source:
    """A folder: its clips in the order of their captions, and what was left out."""

    name: str
    folder: str
    clips: tuple[Clip, ...]
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class Video:
    """A decoded clip, uint8 [C, F, H, W]."""

    caption: str
    pixels: Tensor


@dataclass(frozen=True)
class VideoBatch:
    """Videos, float [B, C, F, H, W] in [-1, 1]; all of them, or none, of captions with several videos."""

    videos: Tensor
    captions: list[str]
    several: bool


class Rates(NamedTuple):
    """Frames per second: at which videos are read, None for frames as stored; and shown, None where it is not known."""

    read: float | None
    shown: float | None


def one_rate(sources: Sequence[Source], fps: float | None) -> tuple[Rates, list[str]]:
    """The rate at which all folders are read, and what to say of it: frames as stored compare only between videos of
    one rate. Asked for none where they differ, it is the lowest of the folders' middle rates."""
    seen = {one.name: [glance(clip.source) for clip in one.clips] for one in sources}
    for one in sources:
        note_guessed_colours(one.folder, sum(video.guessed_colours for video in seen[one.name]))
    if fps is not None:
        return Rates(fps, fps), []
    found = {name: sorted(video.rate for video in videos if video.rate) for name, videos in seen.items()}
    middle = {name: rate for name, rates in found.items() if (rate := middle_rate(rates))}
    if not middle:
        return Rates(None, None), []
    lowest = min(middle.values())
    ends = [end for rates in found.values() for end in (rates[:1] + rates[-1:])]
    if max(ends) <= SAME_RATE * min(ends):
        return Rates(None, lowest), []
    said = ", ".join(
        f"{name} {float(rates[0]):.4g}" + (f" to {float(rates[-1]):.4g}" if rates[-1] > rates[0] else "")
        for name, rates in found.items()
        if rates
    )
    note = f"videos differ in frames per second ({said}), so all are read at {lowest:.4g}; --fps sets another rate"
    return Rates(lowest, lowest), [note]


def source(name: str, folder: str, min_videos: int) -> Source:
    """What a folder holds, captioned or not; nothing is decoded yet.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it has too few videos.
    """
    if not folder or not Path(folder).is_dir():
        raise FileNotFoundError(f"{name}: there is no folder {folder!r}")
    try:
        listing = list_clips(folder, need_captions=False)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    require_enough(len(listing.clips), min_videos, name, folder, listing.problems)
    clips = sorted(listing.clips, key=lambda clip: clip.caption)
    return Source(name, folder, tuple(clips), listing.problems)


def require_enough(count: int, min_videos: int, name: str, folder: str, problems: Sequence[Problem]) -> None:
    """Raise ValueError if there are too few."""
    if count < min_videos:
        raise ValueError(
            f"{name}: {count} usable videos in {folder}, fewer than min_videos={min_videos}; add some, or lower it and "
            f"compare distances of equal numbers of videos only{first_problems(problems)}"
        )


def decode(one: Source, reading: Reading, problems: list[Problem]) -> Iterator[Video]:
    """A folder's videos in the order of their captions. What cannot be decoded is added to `problems`.

    Raises:
        ValueError: at the end, if too few could be decoded.
    """
    count = 0
    for clip in tqdm(one.clips, desc=f"reading {one.name}", unit="video"):
        try:
            pixels = read_video(clip.source, reading.size, reading.fps)
        except VideoError as error:
            problems.append(Problem.of(clip, error))
            continue
        count += 1
        yield Video(clip.caption, pixels)
    require_enough(count, reading.min_videos, one.name, one.folder, problems)


def batches(videos: Iterable[Video], reading: Reading) -> Iterator[VideoBatch]:
    """Videos that come in the order of captions, those of captions with several videos apart from the others."""
    waiting: dict[bool, list[Video]] = {True: [], False: []}

    def taken_batch(several: bool) -> VideoBatch:
        taken, waiting[several] = waiting[several], []
        pixels = torch.stack([video.pixels for video in taken]).to(reading.device)
        return VideoBatch(pixels.float() / 127.5 - 1.0, [video.caption for video in taken], several)

    for caption, group in groupby(videos, key=lambda video: video.caption):
        first = list(islice(group, 2))
        several = bool(caption) and len(first) == 2
        for video in chain(first, group):
            waiting[several].append(video)
            if len(waiting[several]) == reading.batch_size:
                yield taken_batch(several)
    yield from (taken_batch(several) for several in (True, False) if waiting[several])


# ---- measuring --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """One folder.

    Attributes:
        values: by metric; none for the real one.
        seeds: of each caption with several videos, how many.
        shown: a few videos by caption, uint8 [C, F, H, W].
        notes: what the reader must know of it.
    """

    values: dict[str, float]
    seeds: Counter[str]
    shown: dict[str, list[Tensor]]
    notes: list[str]


def measure(suite: VideoSuite, one: Source, reading: Reading, real: bool = False) -> Measured:
    """Read a folder and measure it; the real one is only added to the suite."""
    suite.reset()
    problems = list(one.problems)
    seeds: Counter[str] = Counter()
    shown: dict[str, list[Tensor]] = {}

    def watched() -> Iterator[Video]:
        for video in decode(one, reading, problems):
            if len(shown) < SHOWN_CAPTIONS:
                shown.setdefault(video.caption, [])
            room = SHOWN_VIDEOS if video.caption else SHOWN_VIDEOS * SHOWN_CAPTIONS
            if video.caption in shown and len(shown[video.caption]) < room:
                shown[video.caption].append(video.pixels)
            yield video

    for batch in batches(watched(), reading):
        if real:
            suite.update_real(batch.videos)
            continue
        captions = batch.captions if batch.several else []
        # every file is a seed of its own: what was drawn for it need not be known
        suite.update(batch.videos, captions, range(seeds.total(), seeds.total() + len(captions)))
        seeds.update(captions)
    notes = [f"{one.name}: {first_problems(problems).removeprefix('. ')}"] if problems else []
    if not seeds and not real:
        notes.append(f"{one.name}: no caption has several videos, so there are no diversities")
    return Measured({} if real else suite.compute(diversity=bool(seeds)), seeds, shown, notes)


def unlike(found: Mapping[str, Measured]) -> list[str]:
    """Which values of these folders must not be compared."""
    notes = []
    counts = {name: int(measured.values["videos"]) for name, measured in found.items()}
    if len(set(counts.values())) > 1:
        said = ", ".join(f"{name} {count}" for name, count in counts.items())
        notes.append(f"distances are of unequal numbers of videos ({said}): the fewer, the larger for the same quality")
    seeds = [measured.seeds for measured in found.values() if measured.seeds]
    if any(other != seeds[0] for other in seeds[1:]):
        notes.append("diversities are of other captions, or other numbers of videos of a caption, in each folder")
    return notes
