"""Videos of unusual formats, shapes and clocks. Most of them have to be used."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import av
import numpy as np

from lightning_dfd.data import write_video
from tests.faults.videos import FPS, LOSSY, SIZE, Expected, Maker, encode, scene, shown, sound_track


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
        sound_track(container, sound, rng)
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


UNUSUAL: dict[str, Maker] = {
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
