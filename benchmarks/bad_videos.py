"""Video files as users have them: damaged, unusual, or no videos at all.

Every maker writes one file beside a good clip and says what may become of it. All draw from the given generator, so
that a seed is a variant. Axis legend: F frames, H height, W width, C = 3 colour channels.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lightning_dfd.data import read_video, write_video
from lightning_dfd.data.video import cover_and_crop
from lightning_dfd.types import VideoSize

SIZE = VideoSize(9, 32, 48)
FPS = 8
CAPTION = "the other one"
# levels of 255 that a codec, and colours at half the size, may change in the mean; a wrong frame: above 45
LOSSY = 20.0
Frames = NDArray[np.uint8]  # [F, H, W, C]


@dataclass(frozen=True)
class Expected:
    """What may become of the file or line that a maker added.

    Args:
        name: what a message about it has to contain.
        usable: True if it has to be used, False if it must not be, None if either will do.
        video: what a reader must get out of it if it is used, uint8 [C, F, H, W]; None if any will do.
        tolerance: mean difference from `video`, in levels of 255, that the file's format is allowed.
        caption: that has to come with it.
        fps: rate at which the folder is read.
        undetectable: damage that may leave a legal stream with other pixels, which no decoder can notice.
    """

    name: str
    usable: bool | None = False
    video: Tensor | None = None
    tolerance: float = 4.0
    caption: str | None = None
    fps: float | None = None
    undetectable: bool = False


Maker = Callable[[Path, np.random.Generator], Expected]


def scene(rng: np.random.Generator, frames: int = 12, height: int = 48, width: int = 64) -> Frames:
    """Coarse random patches that move sideways, so that order, turning and damage all show."""
    patches = rng.integers(20, 236, (-(-height // 12), -(-width // 12), 3)).astype(np.uint8)
    picture = np.kron(patches, np.ones((12, 12, 1), np.uint8))[:height, :width]
    return np.stack([np.roll(picture, 3 * i, axis=1) for i in range(frames)])


def shown(frames: Frames, count: int = SIZE.frames) -> Tensor:
    """What `read_video` should make of frames: uint8 [C, F, H, W] of SIZE."""
    pixels = torch.from_numpy(np.ascontiguousarray(frames[:count])).permute(0, 3, 1, 2)
    return torch.stack([cover_and_crop(frame, SIZE.height, SIZE.width) for frame in pixels], dim=1)


def encode(
    path: Path,
    frames: Sequence[NDArray[Any]],
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    source: str = "rgb24",
    times: Sequence[int] | None = None,
    **options: Any,
) -> Path:
    """Write frames by any codec; `times` are in thousandths of a second, else the rate is FPS."""
    with av.open(str(path), "w", **options) as container:
        stream = container.add_stream(codec, rate=FPS)
        stream.height, stream.width, stream.pix_fmt = frames[0].shape[0], frames[0].shape[1], pix_fmt
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format=source)
            frame.pts = number if times is None else times[number]
            frame.time_base = Fraction(1, FPS) if times is None else Fraction(1, 1000)
            container.mux(stream.encode(frame.reformat(format=pix_fmt)))
        container.mux(stream.encode())
    return path


def _pristine(
    root: Path, rng: np.random.Generator, name: str = "bad.mp4", **options: Any
) -> tuple[Path, bytes, Tensor]:
    """A good file about to be damaged: its path, its bytes and what it shows."""
    path = root / name
    if path.suffix == ".mp4" and not options:
        write_video(path, scene(rng), FPS)
    else:
        encode(path, list(scene(rng)), **options)
    return path, path.read_bytes(), read_video(path, SIZE, None)


# ---- damaged ----------------------------------------------------------------------------------------------------


def _damage(change: Callable[[bytearray, np.random.Generator], None], usable: bool | None = None, **more: Any) -> Maker:
    def make(root: Path, rng: np.random.Generator) -> Expected:
        path, whole, video = _pristine(root, rng)
        content = bytearray(whole)
        change(content, rng)
        path.write_bytes(content)
        return Expected("bad.mp4", usable, video, **more)

    return make


def _place(content: bytearray, rng: np.random.Generator, length: int) -> slice:
    """Somewhere among the pixels, behind the encoder's own remarks."""
    low, high = content.find(b"mdat") + 700, content.find(b"moov") - 4 - length
    at = int(rng.integers(low, max(low + 1, high)))
    return slice(at, at + length)


def _flip(content: bytearray, rng: np.random.Generator) -> None:
    at = _place(content, rng, 1)
    content[at.start] ^= 1 << int(rng.integers(8))


def _flip_many(content: bytearray, rng: np.random.Generator) -> None:
    for _ in range(8):
        _flip(content, rng)


def _noise_in_pixels(content: bytearray, rng: np.random.Generator) -> None:
    content[_place(content, rng, 64)] = rng.bytes(64)


def _zeros_in_pixels(content: bytearray, rng: np.random.Generator) -> None:
    content[_place(content, rng, 64)] = bytes(64)


def _hole(content: bytearray, rng: np.random.Generator) -> None:
    del content[_place(content, rng, 48)]


def _noise_in_index(content: bytearray, rng: np.random.Generator) -> None:
    at = content.find(b"moov") + int(rng.integers(8, 600))
    content[at : at + 48] = rng.bytes(48)


def _no_head(content: bytearray, rng: np.random.Generator) -> None:
    content[: int(rng.integers(8, 64))] = bytes(8)


def _cut(content: bytearray, rng: np.random.Generator) -> None:
    del content[int(rng.uniform(0.05, 0.95) * len(content)) :]


def _tail(content: bytearray, rng: np.random.Generator) -> None:
    content += rng.bytes(int(rng.integers(1, 5000)))


def _unknown_codec(content: bytearray, rng: np.random.Generator) -> None:
    at = content.rfind(b"avc1")
    content[at : at + 4] = b"xyz" + bytes([int(rng.integers(97, 122))])


def _cut_stream(suffix: str, codec: str, **options: Any) -> Maker:
    """Formats that play up to where they end."""

    def make(root: Path, rng: np.random.Generator) -> Expected:
        path, whole, video = _pristine(root, rng, f"bad{suffix}", codec=codec, **options)
        path.write_bytes(whole[: int(rng.uniform(0.1, 0.98) * len(whole))])
        return Expected(path.name, None, video)

    return make


def index_first(root: Path, rng: np.random.Generator) -> Expected:
    path, whole, video = _pristine(root, rng, codec="libx264", container_options={"movflags": "faststart"})
    path.write_bytes(whole[: int(rng.uniform(0.5, 0.98) * len(whole))])
    return Expected("bad.mp4", None, video)


# ---- no videos at all -------------------------------------------------------------------------------------------


def _bytes(content: Callable[[np.random.Generator], bytes], suffix: str = ".mp4") -> Maker:
    def make(root: Path, rng: np.random.Generator) -> Expected:
        (root / f"bad{suffix}").write_bytes(content(rng))
        return Expected(f"bad{suffix}")

    return make


def picture(root: Path, rng: np.random.Generator) -> Expected:
    kind = ("PNG", "JPEG", "BMP", "WEBP", "GIF")[int(rng.integers(5))]
    Image.fromarray(scene(rng, 1)[0]).save(root / "bad.mp4", format=kind)
    return Expected("bad.mp4")


def playlist(root: Path, rng: np.random.Generator) -> Expected:
    """Lists that make a player open other files: none may be followed, inside the folder or out of it."""
    outside = root.parent / "outside.mp4"
    write_video(outside, scene(rng), FPS)
    (root / "hidden").mkdir()
    (root / "hidden" / "link").symlink_to(outside)
    where = (str(outside), outside.as_uri(), "hidden/link", "../outside.mp4")[int(rng.integers(4))]
    text = (
        f"ffconcat version 1.0\nfile '{where}'\n",
        f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:2,\n{where}\n#EXT-X-ENDLIST\n",
        f'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet '
        f'mimeType="video/mp4"><Representation id="1"><BaseURL>{where}</BaseURL></Representation></AdaptationSet>'
        "</Period></MPD>",
    )[int(rng.integers(3))]
    (root / "bad.mp4").write_text(text)
    return Expected("bad.mp4")


def sound_only(root: Path, rng: np.random.Generator) -> Expected:
    with av.open(str(root / "bad.mp4"), "w") as container:
        _sound(container, container.add_stream("aac", rate=8000), rng)
    return Expected("bad.mp4")


def _sound(container: Any, stream: Any, rng: np.random.Generator) -> None:
    for number in range(8):
        samples = rng.normal(0, 0.1, (1, 1024)).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 8000, number * 1024
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


def no_packets(root: Path, rng: np.random.Generator) -> Expected:
    with av.open(str(root / "bad.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=FPS)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        container.start_encoding()
    return Expected("bad.mkv")


def folder(root: Path, rng: np.random.Generator) -> Expected:
    (root / "bad.mp4").mkdir()
    return Expected("bad.mp4")


def pipe(root: Path, rng: np.random.Generator) -> Expected:
    os.mkfifo(root / "bad.mp4")  # opening it would wait for ever
    return Expected("bad.mp4")


def bomb(root: Path, rng: np.random.Generator) -> Expected:
    """A GIF of few bytes whose one picture would take a gigabyte."""
    side = int(rng.integers(11000, 16000))
    head = b"GIF89a" + struct.pack("<HHBBB", side, side, 0x80, 0, 0) + bytes(3) + b"\xff\xff\xff"
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, side, side, 0) + b"\x02\x02\x44\x01\x00"
    (root / "bad.gif").write_bytes(head + frame * SIZE.frames + b"\x3b")
    return Expected("bad.gif")


# ---- too short --------------------------------------------------------------------------------------------------


def one_frame(root: Path, rng: np.random.Generator) -> Expected:
    write_video(root / "bad.mp4", scene(rng, 1), FPS)
    return Expected("bad.mp4")


def too_short(root: Path, rng: np.random.Generator) -> Expected:
    suffix = (".mp4", ".mkv", ".avi")[int(rng.integers(3))]
    encode(root / f"bad{suffix}", list(scene(rng, int(rng.integers(2, SIZE.frames)))))
    return Expected(f"bad{suffix}")


def too_short_at_rate(root: Path, rng: np.random.Generator) -> Expected:
    write_video(root / "bad.mp4", scene(rng), FPS * int(rng.integers(2, 5)))
    return Expected("bad.mp4", fps=FPS)


# ---- unusual, but to be used ------------------------------------------------------------------------------------


def _good(
    suffix: str, codec: str, pix_fmt: str, height: int = 48, width: int = 64, tolerance: float = LOSSY, **more: Any
) -> Maker:
    def make(root: Path, rng: np.random.Generator) -> Expected:
        frames = scene(rng, 12, height, width)
        path = encode(root / f"bad{suffix}", list(frames), codec, pix_fmt, **more)
        return Expected(path.name, True, shown(frames), tolerance)

    return make


def odd_sides(root: Path, rng: np.random.Generator) -> Expected:
    height, width = 2 * int(rng.integers(10, 40)) + 1, 2 * int(rng.integers(10, 40)) + 1
    return _good(".mkv", "ffv1", "yuv444p", height, width)(root, rng)


def alpha(root: Path, rng: np.random.Generator) -> Expected:
    frames = scene(rng)
    opaque = np.full((*frames.shape[:3], 1), 255, np.uint8)
    suffix, codec, pix_fmt = ((".mov", "qtrle", "argb"), (".mov", "png", "rgba"), (".mkv", "ffv1", "bgra"))[
        int(rng.integers(3))
    ]
    path = encode(root / f"bad{suffix}", list(np.concatenate([frames, opaque], -1)), codec, pix_fmt, source="rgba")
    return Expected(path.name, True, shown(frames))


def ten_bit(root: Path, rng: np.random.Generator) -> Expected:
    codec, pix_fmt = (("libx264", "yuv420p10le"), ("libx265", "yuv420p12le"), ("ffv1", "gbrp10le"))[
        int(rng.integers(3))
    ]
    options = {"options": {"x265-params": "log-level=none"}} if codec == "libx265" else {}
    return _good(".mkv", codec, pix_fmt, 48, 64, **options)(root, rng)


def grey(root: Path, rng: np.random.Generator) -> Expected:
    frames = scene(rng)[..., :1].repeat(3, -1)
    path = encode(root / "bad.mkv", list(frames), "ffv1", ("gray", "gray16le")[int(rng.integers(2))])
    return Expected(path.name, True, shown(frames))


def turned(root: Path, rng: np.random.Generator) -> Expected:
    """As telephones store it: the turn stands beside the pixels, in the track's matrix."""
    frames, quarters = scene(rng), int(rng.integers(1, 4))
    write_video(root / "bad.mp4", frames, FPS)
    _set_matrix(root / "bad.mp4", *((0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0))[quarters - 1])
    return Expected("bad.mp4", True, shown(np.rot90(frames, -quarters, (1, 2))), LOSSY)


def turned_askew(root: Path, rng: np.random.Generator) -> Expected:
    write_video(root / "bad.mp4", scene(rng), FPS)
    angle = rng.uniform(0.3, 1.2)
    _set_matrix(root / "bad.mp4", np.cos(angle), np.sin(angle), -np.sin(angle), np.cos(angle))
    return Expected("bad.mp4")


def mirrored(root: Path, rng: np.random.Generator) -> Expected:
    frames = scene(rng)
    write_video(root / "bad.mp4", frames, FPS)
    _set_matrix(root / "bad.mp4", -1, 0, 0, 1)
    return Expected("bad.mp4", None, shown(frames[:, :, ::-1]), LOSSY)


def _set_matrix(path: Path, a: float, b: float, c: float, d: float) -> None:
    content = bytearray(path.read_bytes())
    at = content.find(b"tkhd") + 4 + 40
    fixed = [round(value * (1 << 16)) for value in (a, b, 0, c, d, 0)]
    content[at : at + 36] = struct.pack(">9i", fixed[0], fixed[1], 0, fixed[3], fixed[4], 0, 0, 0, 1 << 30)
    path.write_bytes(content)


def variable_rate(root: Path, rng: np.random.Generator) -> Expected:
    frames = scene(rng, 24)
    times = np.cumsum(rng.integers(20, 200, 24)) - 20
    times -= times[0]
    encode(root / "bad.mkv", list(frames), times=times.tolist())
    wanted = [int(np.abs(times - 1000 * i / FPS).argmin()) for i in range(SIZE.frames)]
    return Expected("bad.mkv", True, shown(frames[wanted]), LOSSY, fps=FPS)


def late_start(root: Path, rng: np.random.Generator) -> Expected:
    """A recording that was cut out of a long one, whose clock begins late."""
    frames, start = scene(rng), int(rng.integers(1000, 10**7))
    encode(root / "bad.mkv", list(frames), times=[start + 125 * i for i in range(12)])
    return Expected("bad.mkv", True, shown(frames), LOSSY, fps=FPS)


def sound_first(root: Path, rng: np.random.Generator) -> Expected:
    frames = scene(rng)
    with av.open(str(root / "bad.mkv"), "w") as container:
        sound = container.add_stream("aac", rate=8000)
        stream = container.add_stream("libx264", rate=FPS)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        _sound(container, sound, rng)
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv420p")))
        container.mux(stream.encode())
    return Expected("bad.mkv", True, shown(frames), LOSSY)


def wrong_suffix(root: Path, rng: np.random.Generator) -> Expected:
    frames = scene(rng)
    write_video(root.parent / "right.mp4", frames, FPS)
    name = f"bad{('.gif', '.avi', '.webm', '.MOV')[int(rng.integers(4))]}"
    (root.parent / "right.mp4").rename(root / name)
    return Expected(name, True, shown(frames), LOSSY)


def extreme_shape(root: Path, rng: np.random.Generator) -> Expected:
    frames = np.zeros((12, 2, 2 * int(rng.integers(1000, 4000)), 3), np.uint8) + np.uint8(rng.integers(30, 220))
    encode(root / "bad.mkv", list(frames), "ffv1", "yuv444p")
    return Expected("bad.mkv", None, shown(frames))


MAKERS: dict[str, Maker] = {
    "empty file": _bytes(lambda rng: b""),
    "noise": _bytes(lambda rng: rng.bytes(int(rng.integers(1, 20000)))),
    "noise as matroska": _bytes(lambda rng: b"\x1aE\xdf\xa3" + rng.bytes(3000), ".mkv"),
    "zeros": _bytes(lambda rng: bytes(int(rng.integers(1, 20000)))),
    "web page": _bytes(lambda rng: b"<!DOCTYPE html><html><title>404 Not Found</title></html>"),
    "LFS pointer": _bytes(
        lambda rng: b"version https://git-lfs.github.com/spec/v1\noid sha256:" + rng.bytes(32).hex().encode()
    ),
    "archive": _bytes(lambda rng: b"PK\x03\x04" + rng.bytes(500)),
    "picture": picture,
    "playlist": playlist,
    "sound only": sound_only,
    "no packets": no_packets,
    "folder": folder,
    "named pipe": pipe,
    "bomb": bomb,
    "cut off": _damage(_cut, usable=False),
    "cut off, index first": index_first,
    "cut off, matroska": _cut_stream(".mkv", "ffv1"),
    "cut off, webm": _cut_stream(".webm", "libvpx"),
    "cut off, avi": _cut_stream(".avi", "mpeg4"),
    "cut off, gif": _cut_stream(".gif", "gif", pix_fmt="rgb8"),
    "one bit flipped": _damage(_flip, undetectable=True),
    "eight bits flipped": _damage(_flip_many, undetectable=True),
    "noise in pixels": _damage(_noise_in_pixels, undetectable=True),
    "zeros in pixels": _damage(_zeros_in_pixels, undetectable=True),
    "hole in pixels": _damage(_hole, undetectable=True),
    "noise in index": _damage(_noise_in_index, undetectable=True),
    "head overwritten": _damage(_no_head),
    "unknown codec": _damage(_unknown_codec, usable=False),
    "noise at the end": _damage(_tail, usable=True),
    "one frame": one_frame,
    "too short": too_short,
    "too short at the rate": too_short_at_rate,
    "turned askew": turned_askew,
    "mirrored": mirrored,
    "extreme shape": extreme_shape,
    "odd sides": odd_sides,
    "turned": turned,
    "alpha": alpha,
    "ten bits": ten_bit,
    "grey": grey,
    "variable rate": variable_rate,
    "late start": late_start,
    "sound first": sound_first,
    "wrong suffix": wrong_suffix,
    "webm": _good(".webm", "libvpx-vp9", "yuv420p"),
    "avi": _good(".avi", "mpeg4", "yuv420p", tolerance=24.0),
    "lossless rgb": _good(".mkv", "ffv1", "gbrp10le"),
    "motion jpeg": _good(".mov", "mjpeg", "yuvj444p"),
}
