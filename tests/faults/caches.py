"""Caches that were damaged after they were made. Every maker changes a whole cache of COUNT clips."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

COUNT = 4
Change = Callable[[Path, np.random.Generator], str]  # returns what a message has to contain


def _file(kind: str, change: Callable[[Path, np.random.Generator], Any]) -> Change:
    """Damage to one file of `latents` or `prompts`, of the first clip."""

    def damage(cache: Path, rng: np.random.Generator) -> str:
        entry = json.loads((cache / "cache.json").read_text(encoding="utf-8"))["entries"][0]
        path = cache / kind / f"{entry['latents' if kind == 'latents' else 'prompt']}.safetensors"
        change(path, rng)
        return str(entry["name"] if kind == "latents" else entry["caption"])

    return damage


def _cut(path: Path, rng: np.random.Generator) -> None:
    path.write_bytes(path.read_bytes()[: int(rng.uniform(0, 0.99) * path.stat().st_size)])


def _grow(path: Path, rng: np.random.Generator) -> None:
    path.write_bytes(path.read_bytes() + rng.bytes(int(rng.integers(1, 100))))


def _empty(path: Path, rng: np.random.Generator) -> None:
    path.write_bytes(b"")


def _noise(path: Path, rng: np.random.Generator) -> None:
    path.write_bytes(rng.bytes(path.stat().st_size))


def _flip(low: float, high: float) -> Callable[[Path, np.random.Generator], None]:
    """One bit between these shares of the file."""

    def change(path: Path, rng: np.random.Generator) -> None:
        content = bytearray(path.read_bytes())
        content[int(rng.uniform(low, high) * len(content))] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)

    return change


def _zeros(path: Path, rng: np.random.Generator) -> None:
    """As a file system leaves a block that it had not written yet when the power went."""
    content = bytearray(path.read_bytes())
    half = len(content) // 2
    content[half:] = bytes(len(content) - half)
    path.write_bytes(content)


def _folder(path: Path, rng: np.random.Generator) -> None:
    path.unlink()
    path.mkdir()


def _pipe(path: Path, rng: np.random.Generator) -> None:
    path.unlink()
    os.mkfifo(path)


def _other_file(path: Path, rng: np.random.Generator) -> None:
    """A whole file, but of another clip or caption."""
    other = next(other for other in sorted(path.parent.iterdir()) if other != path)
    path.write_bytes(other.read_bytes())


def _rewrite(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path, Any], None]:
    """A whole file by another program, with other tensors."""

    def write(path: Path, rng: np.random.Generator) -> None:
        save_file(change(load_file(path)), path)

    return write


def _index(content: Callable[[dict[str, Any]], Any]) -> Change:
    """Another cache.json: text, bytes, or what becomes of the old one."""

    def damage(cache: Path, rng: np.random.Generator) -> str:
        path = cache / "cache.json"
        new = content(json.loads(path.read_text(encoding="utf-8")))
        path.write_bytes(new if isinstance(new, bytes) else json.dumps(new).encode())
        return "cache.json"

    return damage


def _entry(**values: Any) -> Change:
    def content(index: dict[str, Any]) -> dict[str, Any]:
        index["entries"][0] |= values
        return index

    return _index(content)


def index_cut(cache: Path, rng: np.random.Generator) -> str:
    path = cache / "cache.json"
    path.write_bytes(path.read_bytes()[: int(rng.uniform(0, 0.95) * path.stat().st_size)])
    return "cache.json"


def index_gone(cache: Path, rng: np.random.Generator) -> str:
    (cache / "cache.json").unlink()
    return "cache.json"


def temporary_left(cache: Path, rng: np.random.Generator) -> str:
    """What a killed run leaves, which is to disturb nobody."""
    (cache / "latents" / ".0123456789abcdef.safetensors.1.tmp").write_bytes(rng.bytes(100))
    return ""


FILES: dict[str, Callable[[Path, np.random.Generator], None]] = {
    "gone": lambda path, rng: path.unlink(),
    "empty": _empty,
    "cut off": _cut,
    "grown": _grow,
    "noise": _noise,
    "bit flipped in the header": _flip(0.0, 0.1),
    "bit flipped in the numbers": _flip(0.6, 1.0),
    "half zeros": _zeros,
    "a folder": _folder,
    "a named pipe": _pipe,
    "another's file": _other_file,
    "other tensors": _rewrite(lambda tensors: {"x": torch.zeros(3)}),
    "no tensors": _rewrite(lambda tensors: {}),
    "half the shape": _rewrite(lambda tensors: {name: value[:1] for name, value in tensors.items()}),
    "not a number": _rewrite(lambda tensors: {name: value.float() * float("nan") for name, value in tensors.items()}),
    "integers": _rewrite(lambda tensors: {name: value.int() for name, value in tensors.items()}),
}

CHANGES: dict[str, Change] = {
    **{f"latents: {name}": _file("latents", change) for name, change in FILES.items()},
    **{f"prompt: {name}": _file("prompts", change) for name, change in FILES.items()},
    "index gone": index_gone,
    "index cut off": index_cut,
    "index empty": _index(lambda index: b""),
    "index noise": _index(lambda index: bytes(range(256))),
    "index nested": _index(lambda index: b"[" * 100_000),
    "index a list": _index(lambda index: [index]),
    "index of another format": _index(lambda index: index | {"format": 99}),
    "index without sizes": _index(lambda index: {key: value for key, value in index.items() if key != "sizes"}),
    "index without clips": _index(lambda index: index | {"entries": []}),
    "index of text clips": _index(lambda index: index | {"entries": "abc"}),
    "index fps a word": _index(lambda index: index | {"fps": "fast"}),
    "index size a word": _index(lambda index: index | {"sizes": [{"frames": "x", "height": 1, "width": 1}]}),
    "index identity a list": _index(lambda index: index | {"identity": [1, 2]}),
    "entry leads out": _entry(latents="../../../etc/passwd"),
    "entry absolute": _entry(prompt="/etc/passwd"),
    "entry without text": _entry(caption=None),
    "entry of more": _entry(surprise=1),
    "entry of no bucket": _entry(bucket=7),
    "entry with captions of numbers": _entry(others=[1]),
    "temporary file left": temporary_left,
}
