"""Video files to tensors, by PyAV alone.

Axis legend: C = 3 colour channels, F frames, H height, W width.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.stream import Disposition
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_dfd.data.colours import colours_of, to_rgb, why_unreadable
from lightning_dfd.data.timing import frames_within, nearest_in_time
from lightning_dfd.files import SampleError, ShardMember
from lightning_dfd.types import VideoSize

# What FFmpeg may take a file for: no playlists, which would make it open other files, in the folder or out of it.
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpegts,mpeg,mpegvideo,m4v,flv,asf,ogg,mxf,dv,rm,nut,ivf,obu,"
    "yuv4mpegpipe,h264,hevc"
)
# The suffixes under which such files go.
VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".qt", ".mkv", ".webm", ".avi", ".divx", ".gif", ".mpg", ".mpeg", ".mpe", ".m1v"),
    *(".m2v", ".vob", ".ts", ".mts", ".m2ts", ".m2t", ".flv", ".f4v", ".wmv", ".asf", ".ogv", ".ogg", ".ogm"),
    *(".3gp", ".3g2", ".mj2", ".mxf", ".dv", ".rm", ".rmvb", ".nut", ".ivf", ".obu", ".y4m", ".h264", ".264"),
    *(".h265", ".265", ".hevc"),
)
# Streams that are pictures of a video, or of music.
PICTURES = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
MAX_PIXELS = 1 << 26  # of a frame, four times 4K: a file of few bytes can claim a picture of gigabytes


class VideoError(SampleError):
    """A video that cannot be used; the message names the file and the reason in one line."""


class _Opened(NamedTuple):
    container: av.container.InputContainer
    stream: av.video.stream.VideoStream


def read_video(path: str | Path | ShardMember, size: VideoSize, fps: float | None) -> Tensor:
    """The first `size.frames` frames of a video, uint8 [C, F, H, W], in the colours of `colours.to_rgb`.

    Of several video streams the largest is read. Frames are scaled to cover height x width and then cropped at the
    centre. No more frames are decoded than are needed.

    Args:
        path: the video file, or the part of a file that is one.
        size: frames and pixels of the result.
        fps: frames per second of the result: for every time i / fps, counted from the first frame, the frame
            whose time is nearest (the earlier of two). None for consecutive frames as stored.

    Raises:
        VideoError: the file is missing, broken, without video, too short, stored askew, or in colours that cannot be
            read.
    """
    frames = []
    with _open(path) as (container, stream):
        for frame in islice(_chosen(container, stream, fps), size.frames):
            reason = _why_unusable(frame, stream, size)
            if reason:
                raise VideoError(f"{path}: {reason}")
            frames.append(cover_and_crop(_pixels(frame), size.height, size.width))
    _require_frames(path, len(frames), size.frames, fps)
    return torch.stack(frames, dim=1)


def check_video(path: str | Path | ShardMember, size: VideoSize, fps: float | None) -> None:
    """A cheap test before training: the file opens, its first frame decodes, and it claims to be long enough.

    A file whose end is missing may pass and then fail in `read_video`.

    Raises:
        VideoError: the file is missing, broken, without video, stored mirrored, or by its own account too short.
    """
    best_size(path, (size,), fps)


@dataclass(frozen=True)
class Facts:
    """What a video is by its first frame and its own account.

    Attributes:
        size: of those asked about, the one that suits it best.
        rate: frames per second as stored, on average; None where it is not said.
        guessed_colours: a HD video without a colour tag, which is read as BT.709.
    """

    size: VideoSize
    rate: Fraction | None
    guessed_colours: bool


def best_size(path: str | Path | ShardMember, sizes: Sequence[VideoSize], fps: float | None) -> VideoSize:
    """Which of several sizes suits a video best. See `look`."""
    return look(path, sizes, fps).size


def look(path: str | Path | ShardMember, sizes: Sequence[VideoSize], fps: float | None) -> Facts:
    """A video's facts, without decoding more than its first frame.

    Of the sizes that it is long enough for, the nearest in shape (to a tenth), of these the longest, of these the
    nearest in area.

    Raises:
        VideoError: as `check_video`, for the size of the fewest frames.
    """
    shortest = min(sizes, key=lambda size: size.frames)
    with _open(path) as (container, stream):
        first = next(iter(container.decode(stream)), None)
        stated = _stated_frames(container, stream, fps)
        rate = stream.average_rate
        reason = "" if first is None else _why_unusable(first, stream, shortest)
        if first is not None and not reason and _is_mirrored(first):
            reason = "stored mirrored; re-encode it"
    if reason:
        raise VideoError(f"{path}: {reason}")
    if first is None:
        raise VideoError(f"{path}: no frame in it could be decoded")
    known = shortest.frames if stated is None else stated
    if known < shortest.frames:  # some formats can but guess how long they are
        known = _counted_frames(path, fps)
    _require_frames(path, known, shortest.frames, fps)
    rows, columns = (first.width, first.height) if first.rotation % 180 else (first.height, first.width)

    def misfit(size: VideoSize) -> tuple[float, int, float]:
        shape = abs(math.log(rows / columns * size.width / size.height))
        return round(shape, 1), -size.frames, abs(math.log(rows * columns / (size.height * size.width)))

    best = min((size for size in sizes if size.frames <= known), key=misfit)
    return Facts(best, rate or None, colours_of(first).guessed)


class Glance(NamedTuple):
    """What a video says of itself without a frame being decoded: `Facts.rate` and `Facts.guessed_colours`."""

    rate: Fraction | None
    guessed_colours: bool


def glance(path: str | Path | ShardMember) -> Glance:
    """Of a video that cannot be opened, nothing is known."""
    try:
        with _open(path) as (_, stream):
            known = stream.codec_context.format is not None
            return Glance(stream.average_rate or None, known and colours_of(stream.codec_context).guessed)
    except VideoError:
        return Glance(None, False)


def middle_rate(rates: Iterable[Fraction | None]) -> float | None:
    """Of the rates that are known, the middle one (the lower of two); None for none."""
    known = sorted(rate for rate in rates if rate)
    return float(known[(len(known) - 1) // 2]) if known else None


def note_guessed_colours(folder: Path | str, count: int) -> None:
    """Warn, once for a folder, that some of its videos are `Facts.guessed_colours`."""
    if count:
        rank_zero_warn(
            f"{folder}: {count} HD videos have no colour tag and are read as BT.709, as HD video mostly is; if their "
            "colours look wrong, re-encode them with a tag"
        )


def cover_and_crop(frame: Tensor, height: int, width: int) -> Tensor:
    """A frame, uint8 [C, H, W], scaled until it covers height x width, then cropped at the centre."""
    rows, columns = frame.shape[1:]
    scale = max(height / rows, width / columns)
    scaled = max(height, round(rows * scale)), max(width, round(columns * scale))
    if scaled != (rows, columns):
        smooth = F.interpolate(frame[None].float(), scaled, mode="bilinear", antialias=True, align_corners=False)
        frame = smooth[0].round().clamp(0, 255).to(torch.uint8)
    top, left = (scaled[0] - height) // 2, (scaled[1] - width) // 2
    return frame[:, top : top + height, left : left + width].contiguous()


@contextmanager
def _open(path: str | Path | ShardMember) -> Iterator[_Opened]:
    """The container and its largest video stream, decoded by one thread; errors inside become VideoError."""
    if isinstance(path, ShardMember):  # FFmpeg reads a file's bytes from here to there as if they were a file
        url = f"subfile,,start,{path.offset},end,{path.offset + path.size},,:{os.path.abspath(path.path)}"
    else:
        url = os.path.abspath(path)
    try:
        # a downloaded playlist under a video's name must not make FFmpeg fetch what it points to
        with av.open(
            url,
            options={"protocol_whitelist": "file,subfile", "format_whitelist": FORMATS},
            metadata_errors="replace",
        ) as container:
            stream = _best_stream(path, container)
            stream.codec_context.thread_count = 1
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
            yield _Opened(container, stream)
    except av.FFmpegError as error:
        raise VideoError(f"{path}: {error.strerror or type(error).__name__}") from error
    except (UnicodeDecodeError, OverflowError, MemoryError) as error:  # PyAV's own, about what a damaged file claims
        raise VideoError(f"{path}: {type(error).__name__} while decoding") from error


def _best_stream(path: str | Path | ShardMember, container: av.container.InputContainer) -> av.video.stream.VideoStream:
    """The largest, no cover picture; of equally large ones the default."""
    streams = [stream for stream in container.streams.video if not stream.disposition & PICTURES]
    if not streams:
        pictures = f", only {len(container.streams.video)} pictures" if container.streams.video else ""
        raise VideoError(f"{path}: no video stream in it{pictures}")
    known = [stream for stream in streams if stream.codec_context is not None]
    if not known:
        raise VideoError(f"{path}: its codec is not known")

    def rank(stream: av.video.stream.VideoStream) -> tuple[int, bool]:
        return stream.codec_context.width * stream.codec_context.height, bool(stream.disposition & Disposition.default)

    return max(known, key=rank)


def _chosen(
    container: av.container.InputContainer, stream: av.video.stream.VideoStream, fps: float | None
) -> Iterator[av.VideoFrame]:
    """The frames to be read, as long as there are any."""
    if fps is None:
        yield from container.decode(stream)
        return
    gap = 1 / stream.average_rate if stream.average_rate else Fraction(0)
    yield from nearest_in_time(_timed(container.decode(stream), gap), fps, gap, _lasts)


def _lasts(frame: av.VideoFrame) -> Fraction | None:
    return frame.duration * frame.time_base if frame.duration and frame.time_base is not None else None


def _timed(frames: Iterable[av.VideoFrame], gap: Fraction) -> Iterator[tuple[Fraction, av.VideoFrame]]:
    """Frames with their exact seconds since the first; a frame that has no time follows the last by `gap`."""
    start: Fraction | None = None
    time = -gap
    for frame in frames:
        if frame.pts is None or frame.time_base is None:
            time += gap
        else:
            shown = frame.pts * frame.time_base
            start = shown if start is None else start
            time = shown - start
        yield time, frame


def _why_unusable(frame: av.VideoFrame, stream: av.video.stream.VideoStream, size: VideoSize) -> str:
    """Why a frame must not be shown to a network; empty if it may."""
    if frame.is_corrupt:
        return "damaged, a frame of it did not decode whole"
    if frame.rotation % 90:
        return f"stored askew, by {frame.rotation} degrees; re-encode it upright"
    rows, columns = (frame.width, frame.height) if frame.rotation % 180 else (frame.height, frame.width)
    if rows * columns * max(size.height / rows, size.width / columns) ** 2 > MAX_PIXELS:
        return f"{rows}x{columns} pixels cannot be scaled to cover {size.height}x{size.width}; crop it"
    return why_unreadable(frame, stream.codec_context.codec_tag)


def _is_mirrored(frame: av.VideoFrame) -> bool:
    """For a frame that is never converted: PyAV ties a frame to its side data in a circle, which waits for the garbage
    collector, and if that runs in a forked worker, freeing the converter waits for threads that are not there."""
    sides: Any = frame.side_data  # whose type says that it yields names
    matrix = next((data for data in sides if data.type.name == "DISPLAYMATRIX"), None)
    if matrix is None:
        return False
    a, b, _, c, d, *_ = np.frombuffer(bytes(matrix), np.int32).astype(float)
    return bool(a * d - b * c < 0)


def _pixels(frame: av.VideoFrame) -> Tensor:
    """uint8 [C, H, W], turned as a player would show it: telephones store the turn beside the pixels."""
    array = np.rot90(to_rgb(frame), k=frame.rotation // 90)
    return torch.from_numpy(np.ascontiguousarray(array)).permute(2, 0, 1)


def _stated_frames(
    container: av.container.InputContainer, stream: av.video.stream.VideoStream, fps: float | None
) -> int | None:
    """How many frames the file says it has at `fps`; None where it does not say."""
    if fps is None and stream.frames:
        return int(stream.frames)
    if stream.duration is not None and stream.time_base is not None:
        seconds = stream.duration * stream.time_base
    elif container.duration is not None:
        seconds = Fraction(container.duration, av.time_base)
    else:
        return None
    rate = stream.average_rate if fps is None else Fraction(fps)
    if not rate or seconds <= 0:
        return None
    if fps is None:
        return -int(-seconds * rate // 1)
    gap = 1 / stream.average_rate if stream.average_rate else Fraction(0)
    return frames_within(seconds, seconds - gap, Fraction(fps))


def _counted_frames(path: str | Path | ShardMember, fps: float | None) -> int:
    """How many frames a file has at `fps` by the times of all its packets; nothing is decoded."""
    shown: list[tuple[Fraction, Fraction]] = []
    with _open(path) as (container, stream):
        unit = stream.time_base or Fraction(0)
        for packet in container.demux(stream):
            if packet.size and (packet.pts is not None or fps is None):
                shown.append(((packet.pts or 0) * unit, (packet.duration or 0) * unit))
        gap = 1 / stream.average_rate if stream.average_rate else Fraction(0)
    if fps is None or not shown:
        return len(shown)
    start, (last, lasts) = min(shown)[0], max(shown)
    return frames_within(last - start + (lasts or gap), last - start, Fraction(fps))


def _require_frames(path: str | Path | ShardMember, found: int, needed: int, fps: float | None) -> None:
    if found >= needed:
        return
    if not found:
        raise VideoError(f"{path}: no frame in it could be decoded")
    at, lower = ("", "frames") if fps is None else (f" at {fps:g} frames per second", "frames or raise fps")
    raise VideoError(f"{path}: too short, {found} frames{at} where {needed} are needed; lower {lower}, or remove it")
