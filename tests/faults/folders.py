"""Captions and lists as users have them: missing, empty, endless, in other encodings, and leading out of the folder.

Every maker finds `good.mp4` in the folder, captioned by `good.txt`, and a whole `bad.mp4` that nothing captions.
"""

from __future__ import annotations

import csv
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lightning_dfd.data import write_video
from tests.faults.videos import CAPTION, FPS, Expected, Maker, scene

GOOD = "good"  # the caption of the good clip
GOOD_LINE = json.dumps({"file_name": "good.mp4", "text": GOOD}).encode()


def _caption_file(content: bytes | Callable[[np.random.Generator], bytes], usable: bool, caption: str = "") -> Maker:
    """A .txt beside the video."""

    def make(root: Path, rng: np.random.Generator) -> Expected:
        (root / "bad.txt").write_bytes(content(rng) if callable(content) else content)
        return Expected("bad.mp4", usable, caption=caption or None)

    return make


def _entry(usable: bool, name: str = "bad.mp4", said: str = "bad.mp4", **values: Any) -> Maker:
    """A line of metadata.jsonl, its file's name and whatever stands for the caption."""

    def make(root: Path, rng: np.random.Generator) -> Expected:
        line = json.dumps({"file_name": name, **values}).encode()
        (root / "metadata.jsonl").write_bytes(_shuffled([GOOD_LINE, line], rng))
        caption = values.get("text")
        return Expected(said, usable, caption=caption if usable and isinstance(caption, str) else None)

    return make


def _line(content: bytes, usable: bool = False, said: str = "metadata.jsonl line") -> Maker:
    """A line of metadata.jsonl that is something else."""

    def make(root: Path, rng: np.random.Generator) -> Expected:
        (root / "metadata.jsonl").write_bytes(_shuffled([GOOD_LINE, content], rng))
        return Expected(said, usable)

    return make


def _csv(content: str | bytes, said: str, usable: bool = False, caption: str | None = None) -> Maker:
    """Rows below a header and the good clip's."""

    def make(root: Path, rng: np.random.Generator) -> Expected:
        body = content if isinstance(content, bytes) else content.encode()
        (root / "metadata.csv").write_bytes(b"file_name,text\ngood.mp4,good\n" + body)
        return Expected(said, usable, caption=caption)

    return make


def _whole_list(name: str, content: bytes) -> Maker:
    """A list of which nothing can be used; the folder is refused by an error that names it."""

    def make(root: Path, rng: np.random.Generator) -> Expected:
        (root / name).write_bytes(content)
        return Expected(name)

    return make


def _shuffled(lines: list[bytes], rng: np.random.Generator) -> bytes:
    return b"\n".join(lines[i] for i in rng.permutation(len(lines)))


def _link(target: Callable[[Path], Path], name: str = "away.mp4") -> Maker:
    """A link in the folder, named by a line and found by itself where there is no list."""

    def make(root: Path, rng: np.random.Generator) -> Expected:
        write_video(root.parent / "outside.mp4", scene(rng), FPS)
        (root / name).symlink_to(target(root))
        if rng.integers(2):
            line = json.dumps({"file_name": name, "text": CAPTION}).encode()
            (root / "metadata.jsonl").write_bytes(_shuffled([GOOD_LINE, line], rng))
        else:
            (root / name).with_suffix(".txt").write_text(CAPTION)
        return Expected(name)

    return make


def linked_folder(root: Path, rng: np.random.Generator) -> Expected:
    outside = root.parent / "elsewhere"
    outside.mkdir()
    write_video(outside / "x.mp4", scene(rng), FPS)
    (root / "sub").symlink_to(outside)
    line = json.dumps({"file_name": "sub/x.mp4", "text": CAPTION}).encode()
    (root / "metadata.jsonl").write_bytes(_shuffled([GOOD_LINE, line], rng))
    return Expected("sub/x.mp4")


def linked_caption(root: Path, rng: np.random.Generator) -> Expected:
    (root.parent / "secret.txt").write_text("a secret")
    (root / "bad.txt").symlink_to(root.parent / "secret.txt")
    return Expected("bad.mp4")


def linked_list(root: Path, rng: np.random.Generator) -> Expected:
    name = ("metadata.jsonl", "metadata.csv")[int(rng.integers(2))]
    (root.parent / name).write_bytes(GOOD_LINE)
    (root / name).symlink_to(root.parent / name)
    return Expected(name)


def name_not_utf8(root: Path, rng: np.random.Generator) -> Expected:
    name = os.fsdecode(b"caf\xe9" + rng.bytes(1).hex().encode() + b".mp4")
    (root / "bad.mp4").rename(root / name)
    (root / name).with_suffix(".txt").write_text(CAPTION)
    return Expected("caf")


def name_with_newline(root: Path, rng: np.random.Generator) -> Expected:
    (root / "bad.mp4").rename(root / "bad\nname.mp4")
    (root / "bad\nname.txt").write_text(CAPTION)
    return Expected("bad", None)


def caption_is_a_folder(root: Path, rng: np.random.Generator) -> Expected:
    (root / "bad.txt").mkdir()
    return Expected("bad.mp4")


def caption_is_a_pipe(root: Path, rng: np.random.Generator) -> Expected:
    os.mkfifo(root / "bad.txt")
    return Expected("bad.mp4")


def no_caption(root: Path, rng: np.random.Generator) -> Expected:
    return Expected("bad.mp4")


def listed_twice(root: Path, rng: np.random.Generator) -> Expected:
    (root / "metadata.jsonl").write_bytes(GOOD_LINE + b"\n" + GOOD_LINE.replace(b'"good"', b'"bad"'))
    return Expected("good.mp4")


def _endless(rng: np.random.Generator) -> bytes:
    words = ["cat", "dog", "runs", "über", "犬", "🐕"]
    return " ".join(words[i] for i in rng.integers(len(words), size=int(rng.integers(20_000, 200_000)))).encode()


def _long_csv_cell() -> bytes:
    text = io.StringIO()
    csv.writer(text).writerow(["bad.mp4", "word " * 60_000])
    return text.getvalue().encode()


CAPTIONS: dict[str, Maker] = {
    "no caption": no_caption,
    "empty": _caption_file(b"", False),
    "blank": _caption_file(b" \t\r\n\n", False),
    "byte order mark alone": _caption_file(b"\xef\xbb\xbf", False),
    "very long": _caption_file(_endless, True),
    "Latin-1": _caption_file("un café".encode("latin-1"), False),
    "UTF-16": _caption_file("a cat".encode("utf-16"), False),
    "noise": _caption_file(lambda rng: b"\xff" + rng.bytes(200), False),
    "zero bytes": _caption_file(b"a\0cat", None),  # type: ignore[arg-type]
    "several lines": _caption_file(b"a cat\nand a dog\n", True, "a cat\nand a dog"),
    "byte order mark": _caption_file(b"\xef\xbb\xbfa cat", True, "a cat"),
    "other scripts": _caption_file("قطة 猫 🐈‍⬛ é".encode(), True, "قطة 猫 🐈‍⬛ é"),
    "a folder": caption_is_a_folder,
    "a named pipe": caption_is_a_pipe,
    "a link out": linked_caption,
}

LISTS: dict[str, Maker] = {
    "caption missing": _entry(False),
    "caption null": _entry(False, text=None),
    "caption empty": _entry(False, text=""),
    "caption blank": _entry(False, text=" \n"),
    "caption a number": _entry(False, text=3),
    "caption an object": _entry(False, text={"a": 1}),
    "caption lone surrogate": _entry(False, text="a \ud800 cat"),
    "caption very long": _entry(True, text="word " * 50_000 + "end"),
    "caption not a number": _entry(False, text=float("nan")),
    "not UTF-8": _line(b'{"file_name": "bad.mp4", "text": "caf\xe9"}'),
    "cut off": _line(b'{"file_name": "bad.mp4", "te'),
    "not an object": _line(b'["bad.mp4", "a cat"]'),
    "nested": _line(b"[" * 100_000),
    "huge number": _line(b'{"file_name": "bad.mp4", "text": ' + b"9" * 10_000 + b"}"),
    "no file_name": _line(b'{"text": "a cat"}'),
    "file_name a number": _line(b'{"file_name": 7, "text": "a cat"}'),
    "zero bytes": _line(b"\0\0\0"),
    "listed twice": listed_twice,
    "missing file": _entry(False, "gone.mp4", "gone.mp4", text=CAPTION),
    "list in UTF-16": _whole_list("metadata.jsonl", GOOD_LINE.decode().encode("utf-16")),
    "list of noise": _whole_list("metadata.jsonl", bytes(range(256)) * 8),
    "list empty": _whole_list("metadata.jsonl", b"\n\n"),
    "csv empty": _whole_list("metadata.csv", b""),
    "csv of other columns": _whole_list("metadata.csv", b"a,b\ngood.mp4,good\n"),
    "csv in UTF-16": _whole_list("metadata.csv", "file_name,text\ngood.mp4,good\n".encode("utf-16")),
    "csv with an endless header": _whole_list("metadata.csv", b"file_name,text," + b"x" * 200_000 + b"\n"),
    "csv too many cells": _csv("bad.mp4,one, two\n", "metadata.csv line"),
    "csv too few cells": _csv("bad.mp4\n", "bad.mp4"),
    "csv not UTF-8": _csv(b"bad.mp4,caf\xe9\n", "bad.mp4"),
    "csv open quote": _csv('bad.mp4,"a cat\n', "bad.mp4", None, "a cat"),  # type: ignore[arg-type]
    "csv zero bytes": _csv(b"bad\0.mp4,a cat\n", "bad"),
    "csv very long cell": _csv(_long_csv_cell(), "metadata.csv line"),
    "csv return alone": _csv("bad.mp4,a cat\rgone.mp4,b\r", "gone.mp4", True, "a cat"),
}

PATHS: dict[str, Maker] = {
    "absolute": _entry(False, "/etc/passwd", "/etc/passwd", text=CAPTION),
    "parent": _entry(False, "../outside.mp4", "../outside.mp4", text=CAPTION),
    "parent inside": _entry(False, "sub/../bad.mp4", "sub/../bad.mp4", text=CAPTION),
    "parent, backslash": _entry(False, "..\\outside.mp4", "outside.mp4", text=CAPTION),
    "drive": _entry(False, "C:\\bad.mp4", "C:", text=CAPTION),
    "network share": _entry(False, "\\\\host\\share\\bad.mp4", "host", text=CAPTION),
    "address": _entry(False, "http://127.0.0.1:9/bad.mp4", "http", text=CAPTION),
    "protocol": _entry(False, "file:///etc/passwd", "file:", text=CAPTION),
    "concat protocol": _entry(False, "concat:good.mp4|bad.mp4", "concat:", text=CAPTION),
    "home": _entry(False, "~/bad.mp4", "~/bad.mp4", text=CAPTION),
    "variable": _entry(False, "$HOME/bad.mp4", "$HOME", text=CAPTION),
    "the folder itself": _entry(False, ".", ".", text=CAPTION),
    "empty name": _entry(False, "", "", text=CAPTION),
    "zero byte": _entry(False, "bad\0.mp4", "bad", text=CAPTION),
    "endless name": _entry(False, "b" * 5000 + ".mp4", "bbbb", text=CAPTION),
    "endless path": _entry(False, "b/" * 5000 + "b.mp4", "b/b/", text=CAPTION),
    "a device": _entry(False, "/dev/zero", "/dev/zero", text=CAPTION),
    "link out": _link(lambda root: root.parent / "outside.mp4"),
    "link out, relative": _link(lambda root: Path("../outside.mp4")),
    "link to a device": _link(lambda root: Path("/dev/zero")),
    "link to itself": _link(lambda root: root / "away.mp4"),
    "link to nothing": _link(lambda root: root / "nothing.mp4"),
    "link over a link": _link(lambda root: _second_link(root)),
    "folder linked out": linked_folder,
    "list linked out": linked_list,
    "name not UTF-8": name_not_utf8,
    "name with a line break": name_with_newline,
}


def _shard(
    usable: bool | None,
    change: Callable[[bytearray, np.random.Generator], None] = lambda content, rng: None,
    suffix: str = ".tar",
    **member: Any,
) -> Maker:
    """A tar shard of one captioned video, its only member's header or its bytes changed."""

    def make(root: Path, rng: np.random.Generator) -> Expected:
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w") as tar:
            video = (root / "bad.mp4").read_bytes()
            parts = {"x.txt": member.get("text", CAPTION.encode()), "x.mp4": member.get("video", video)}
            for name, value in parts.items():
                info = tarfile.TarInfo(member.get("folder", "") + name)
                info.size = len(value)
                if "kind" in member and name == "x.mp4":
                    info.type, info.linkname, info.size = member["kind"], "/etc/passwd", 0
                tar.addfile(info, io.BytesIO(value))
        shard = bytearray(content.getvalue())
        change(shard, rng)
        (root / f"s{suffix}").write_bytes(shard)
        return Expected(f"s{suffix}", usable, caption=CAPTION if usable else None)

    return make


def _cut_shard(content: bytearray, rng: np.random.Generator) -> None:
    del content[int(rng.integers(600, 2000)) :]


def _no_end(content: bytearray, rng: np.random.Generator) -> None:
    while not any(content[-512:]):
        del content[-512:]


def _noise_in_header(content: bytearray, rng: np.random.Generator) -> None:
    at = content.find(b"x.mp4")
    content[at : at + 512] = rng.bytes(512)


def _huge_member(content: bytearray, rng: np.random.Generator) -> None:
    """A header that is right in itself, of a member of gigabytes."""
    at = content.find(b"x.mp4")
    info = tarfile.TarInfo("x.mp4")
    info.size = int(rng.integers(1 << 30, 1 << 34))
    content[at : at + 512] = info.tobuf()[:512]


SHARDS: dict[str, Maker] = {
    "whole": _shard(True),
    "cut off": _shard(False, _cut_shard),
    "noise in a header": _shard(False, _noise_in_header),
    "member larger than the shard": _shard(False, _huge_member),
    "end mark missing": _shard(True, _no_end),
    "empty": _shard(False, lambda content, rng: content.clear()),
    "noise": _shard(False, lambda content, rng: content.__setitem__(slice(None), rng.bytes(5000))),
    "compressed": _shard(False, suffix=".tar.gz"),
    "member leads out": _shard(False, folder="../"),
    "member absolute": _shard(False, folder="/tmp/"),
    "member a link": _shard(False, kind=tarfile.SYMTYPE),
    "member a hard link": _shard(False, kind=tarfile.LNKTYPE),
    "member a device": _shard(False, kind=tarfile.CHRTYPE),
    "member no video": _shard(False, video=b"no video"),
    "member empty": _shard(False, video=b""),
    "caption empty": _shard(False, text=b""),
    "caption not UTF-8": _shard(False, text=b"caf\xe9"),
}


def _second_link(root: Path) -> Path:
    (root / ".second.mp4").symlink_to(root.parent / "outside.mp4")
    return root / ".second.mp4"
