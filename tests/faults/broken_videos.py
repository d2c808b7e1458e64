"""Files that are damaged, too short, or no videos at all."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from lightning_dfd.data import write_video
from tests.faults.videos import FPS, SIZE, Expected, Maker, encode, pristine, scene, sound_track

# ---- damaged ----------------------------------------------------------------------------------------------------


def _damage(change: Callable[[bytearray, np.random.Generator], None], usable: bool | None = None, **more: Any) -> Maker:
    def make(root: Path, rng: np.random.Generator) -> Expected:
        path, whole, video = pristine(root, rng)
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
        path, whole, video = pristine(root, rng, f"bad{suffix}", codec=codec, **options)
        path.write_bytes(whole[: int(rng.uniform(0.1, 0.98) * len(whole))])
        return Expected(path.name, None, video)

    return make


def index_first(root: Path, rng: np.random.Generator) -> Expected:
    path, whole, video = pristine(root, rng, codec="libx264", container_options={"movflags": "faststart"})
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
        sound_track(container, container.add_stream("aac", rate=8000), rng)
    return Expected("bad.mp4")


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


BROKEN: dict[str, Maker] = {
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
}
