"""Reading a cache: its index, and the latents and embeddings of its clips."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_dfd.data.cache.format import (
    FORMAT,
    INDEX,
    LATENTS,
    MAKE_AGAIN,
    MAKE_IT,
    CacheEntry,
    CacheSource,
    clip_stamp,
    latents_path,
    load_tensors,
    negative_id,
    prompt_origin,
    prompt_path,
    short,
)
from lightning_dfd.data.listing import Clip
from lightning_dfd.data.stream import Sample
from lightning_dfd.data.video import VideoError
from lightning_dfd.files import digest
from lightning_dfd.types import Conditioning, VideoSize


@dataclass(frozen=True)
class LatentCache:
    """A cache that `write_cache` has finished.

    Attributes:
        left_out: names of the clips that could not be used when it was written.
        rate: the videos' own frames per second, the middle one; None where it is not known.
    """

    folder: Path
    source: CacheSource
    entries: tuple[CacheEntry, ...]
    left_out: frozenset[str] = frozenset()
    rate: float | None = None

    @classmethod
    def open(cls, folder: str | Path) -> LatentCache:
        """Read the cache's index.

        Raises:
            FileNotFoundError: there is no finished cache.
            ValueError: the index is damaged or of another format.
        """
        path = Path(folder) / INDEX
        if not path.is_file():
            raise FileNotFoundError(f"no finished cache in {str(folder)!r} ({INDEX} is missing); {MAKE_IT}")
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            if index["format"] != FORMAT:
                raise ValueError(f"format {index['format']!r}, this version reads {FORMAT}")
            fps = None if index["fps"] is None else float(index["fps"])
            if not all(isinstance(value, int) for size in index["sizes"] for value in size.values()):
                raise ValueError(f"the sizes are {index['sizes']}")
            sizes = tuple(VideoSize(**size) for size in index["sizes"])
            source = CacheSource(dict(index["identity"]), sizes, fps)
            left_out = frozenset(str(problem["name"]) for problem in index.get("problems", ()))
            rate = None if index.get("rate") is None else float(index["rate"])
            entries = tuple(_checked_entries(index["entries"], len(sizes)))
            return cls(Path(folder), source, entries, left_out, rate)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} cannot be read ({error}); delete it and {MAKE_AGAIN}") from error

    def require(self, identity: Mapping[str, str], size: VideoSize | Sequence[VideoSize], fps: float | None) -> None:
        """Raise ValueError, naming what differs, unless the cache is of this teacher, these sizes and rate."""
        remedy = f"set data.cache to another folder and {MAKE_IT}"
        sizes = (size,) if isinstance(size, VideoSize) else tuple(size)
        self.source.refuse(self.folder, CacheSource(identity, sizes, fps), remedy)

    def __len__(self) -> int:
        return len(self.entries)

    def differences(self, clips: Sequence[Clip]) -> dict[str, list[str]]:
        """How a folder's clips differ from those in the cache: kind of difference -> names. Nothing is
        opened; what was left out then is not new."""
        entries = {entry.name: entry for entry in self.entries}
        found: dict[str, list[str]] = {"new": [], "changed": [], "vanished": [], "with other captions": []}
        for clip in clips:
            entry = entries.pop(clip.name, None)
            if entry is None:
                found["new"] += [clip.name] * (clip.name not in self.left_out)
                continue
            try:
                same = entry.source in (None, clip_stamp(clip))
            except VideoError:  # between listing and now
                found["vanished"].append(clip.name)
                continue
            if not same:
                found["changed"].append(clip.name)
            elif clip.captions != (entry.caption, *entry.others):
                found["with other captions"].append(clip.name)
        found["vanished"] += entries
        return {kind: names for kind, names in found.items() if names}

    def captions(self, index: int) -> tuple[str, ...]:
        """All that a clip has."""
        return (self.entries[index].caption, *self.entries[index].others)

    def latents_path(self, index: int) -> Path:
        """The file of clip number `index`."""
        return latents_path(self.folder, self.entries[index].latents)

    def load(self, index: int, caption: str | None = None) -> Sample:
        """Clip number `index`: latents [...] float32 in the network's layout, and its conditioning of batch 1, with
        another caption than its first if one is given.

        Raises:
            CacheError: a file of the cache is missing, damaged, or another's.
        """
        entry = self.entries[index]
        latents, image = self._latents(entry)
        caption = entry.caption if caption is None else caption
        return Sample(caption, latents=latents, cond=self.conditioning(caption) | image)

    def image_conditioning(self, name: str) -> Conditioning:
        """The conditioning of a clip's first frame, batch 1, from the clip's name; empty for text-to-video.

        Raises:
            ValueError: there is no such clip, or its file is damaged.
        """
        for entry in self.entries:
            if entry.name == name:
                return self._latents(entry)[1]
        raise ValueError(f"{self.folder} holds no clip {name!r}; {MAKE_AGAIN}")

    def holds(self, prompt: str) -> bool:
        """Whether the prompt was embedded when the cache was written."""
        return prompt_path(self.folder, digest(prompt)).is_file()

    def conditioning(self, prompt: str) -> Conditioning:
        """The conditioning of one prompt, batch 1.

        Raises:
            CacheError: the prompt was not embedded when the cache was written, or its file is damaged.
        """
        return self._embedding(digest(prompt), prompt, "the prompt")

    def negative_conditioning(self, prompt: str) -> Conditioning:
        """The conditioning of one prompt to guide away from, batch 1.

        Raises:
            CacheError: it was not among the negative prompts when the cache was written, or its file is damaged.
        """
        return self._embedding(negative_id(prompt), prompt, "the negative prompt")

    def _embedding(self, name: str, prompt: str, kind: str) -> Conditioning:
        origin = prompt_origin(prompt, self.source)
        tensors = load_tensors(prompt_path(self.folder, name), f"the embedding of {kind} {short(prompt)}", origin)
        return Conditioning({name: value[None] for name, value in tensors.items()})

    def _latents(self, entry: CacheEntry) -> tuple[Tensor, Conditioning]:
        path, origin = latents_path(self.folder, entry.latents), {"name": entry.name, "source": self.source.digest}
        return _split(load_tensors(path, f"the latents of {entry.name!r}", origin))


def _checked_entries(entries: Sequence[Mapping[str, Any]], sizes: int) -> Iterator[CacheEntry]:
    """Entries as written; an id that is not 16 hex digits could name a file outside the folder."""
    if not entries:
        raise ValueError("it lists no clips")
    for values in entries:
        stamp = values.get("source")
        entry = CacheEntry(**{**values, "others": tuple(values["others"]), "source": stamp and tuple(stamp)})
        if stamp and not (len(stamp) == 2 and all(isinstance(number, int) for number in stamp)):
            raise ValueError(f"{stamp!r}, the source of {entry.name!r}, is not two numbers")
        for text in (entry.name, entry.caption, entry.latents, entry.prompt, *entry.others):
            if not isinstance(text, str):
                raise ValueError(f"{text!r}, of {entry.name!r}, is not text")
        for file in (entry.latents, entry.prompt):
            if not re.fullmatch(r"[0-9a-f]{16}", file):
                raise ValueError(f"{file!r}, a file of {entry.name!r}, is not 16 hex digits")
        if entry.bucket not in range(sizes):
            raise ValueError(f"{entry.bucket!r}, the bucket of {entry.name!r}, is not below {sizes}")
        yield entry


def read_latents(path: Path, what: str = "latents") -> Tensor:
    """One clip's latents [...], float32, from a cache's file. Raises CacheError if it is missing or damaged."""
    return _split(load_tensors(path, what, {}))[0]


def _split(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Conditioning]:
    """The content of a latents file: latents [...] float32, and the first frame's conditioning, of batch 1."""
    image = {name: value[None] for name, value in tensors.items() if name != LATENTS}
    return tensors[LATENTS].float(), Conditioning(image)
