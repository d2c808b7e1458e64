"""What the files of a cache say: their names, what they were made from, and their checksums."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_dfd.data.listing import Clip
from lightning_dfd.data.video import VideoError
from lightning_dfd.files import SampleError, differing, digest, replacing
from lightning_dfd.types import VideoSize

FORMAT = 4
INDEX = "cache.json"
LATENTS = "latents"
CHECKSUM, BUCKET = "checksum", "bucket"  # in a file's metadata, besides what it was made from
MAKE_IT = "make it with: lightning cache -c RECIPE"
MAKE_AGAIN = "make it again with: lightning cache -c RECIPE"
DELETE_IT = "delete the file and " + MAKE_AGAIN


class CacheError(SampleError):
    """A file of a cache that is missing or damaged; the message names it, what it is of, and the remedy."""


@dataclass(frozen=True)
class CacheSource:
    """What decides the content of a cache: the teacher's `Backbone.identity()`, the frame rate, and the size or sizes
    among which each clip gets the one that suits it best."""

    identity: Mapping[str, str]
    sizes: tuple[VideoSize, ...]
    fps: float | None

    @property
    def digest(self) -> str:
        """Tells files of one source from those that an interrupted run of another may have left."""
        return digest(self.settings())

    def settings(self) -> dict[str, Any]:
        """Everything by name, as a recipe's reader knows it."""
        several = {"buckets": ", ".join(str(size) for size in self.sizes)}
        return {
            **{f"teacher's {key}": value for key, value in self.identity.items()},
            **(asdict(self.sizes[0]) if len(self.sizes) == 1 else several),
            "fps": None if self.fps is None else float(self.fps),
        }

    def refuse(self, folder: Path, asked: CacheSource, remedy: str) -> None:
        """Raise ValueError, naming what differs and both values, unless `asked` is the same source."""
        have, want = self.settings(), asked.settings()
        keys = dict.fromkeys((*have, *want))
        there, here = ({key: settings.get(key, "absent") for key in keys} for settings in (have, want))
        found = differing(here, there, "in the cache")
        if found:
            raise ValueError(f"{folder} holds the cache of something else: {', '.join(found)}; {remedy}")


@dataclass(frozen=True)
class CacheEntry:
    """One clip of a cache; `latents` and `prompt` are the ids of its files, 16 hex digits. `others` are its further
    captions, `bucket` is the number of its size among the cache's, `source` the bytes of its video and when that was
    last changed (ns), where they are known."""

    name: str
    caption: str
    latents: str
    prompt: str
    others: tuple[str, ...] = ()
    bucket: int = 0
    source: tuple[int, int] | None = None


# ---- origins ----------------------------------------------------------------------------------------------------


def clip_origin(clip: Clip, source: CacheSource) -> dict[str, str]:
    """What a latents file says of its origin: the video file, or the shard's member, as it is now, and the source."""
    size, changed = clip_stamp(clip)
    return {
        "name": clip.name,
        "source_size": str(size),
        "source_mtime_ns": str(changed),
        "source": source.digest,
    }


def clip_stamp(clip: Clip) -> tuple[int, int]:
    """The bytes of a clip's video, and when it was last changed (ns). Raises VideoError if it is gone."""
    if clip.member:
        return clip.member.size, clip.member.mtime * 10**9
    try:
        stat = clip.path.stat()
    except OSError as error:
        raise VideoError(f"{clip.source}: {error.strerror}") from error
    return stat.st_size, stat.st_mtime_ns


def prompt_origin(prompt: str, source: CacheSource) -> dict[str, str]:
    """What an embedding's file says of its origin."""
    return {"prompt": prompt, "source": source.digest}


# ---- tensors ----------------------------------------------------------------------------------------------------


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    # safetensors refuses tensors that share memory, as the slices of a batch do
    whole = {name: value.contiguous().clone() for name, value in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(whole, temporary, metadata=metadata | {CHECKSUM: checksum(whole, metadata)})
        except SafetensorError as error:  # of the file system, a full disk above all
            raise OSError(f"{path} could not be written ({error}); make room and run the command again: it goes on "
                          "where it stopped") from error  # fmt: skip


def load_tensors(path: Path, what: str, origin: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of a file, proved to be whole and made from what is asked."""
    if not path.is_file():
        raise CacheError(f"{path.parent.parent} does not hold {what}; {MAKE_AGAIN}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise CacheError(f"{path}, {what}, is damaged ({error}); {DELETE_IT}") from error
    if metadata.get(CHECKSUM) != checksum(tensors, metadata):
        raise CacheError(f"{path}, {what}, is damaged (its checksum is wrong); {DELETE_IT}")
    if any(metadata.get(key) != value for key, value in origin.items()):
        raise CacheError(f"{path} is not {what}, but made from something else; {DELETE_IT}")
    return tensors


def read_origin(path: Path) -> dict[str, str] | None:
    """What a file says of its origin; None if it is missing or cut short."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
    except (OSError, SafetensorError):  # not whole: the caller writes it again
        return None
    return {key: value for key, value in metadata.items() if key != CHECKSUM} if CHECKSUM in metadata else None


def checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """CRC-32 of names, kinds, shapes and content of the tensors, and of what else the file says."""
    said = {key: value for key, value in metadata.items() if key != CHECKSUM}
    value = zlib.crc32(json.dumps(said, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        value = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


# ---- names ------------------------------------------------------------------------------------------------------


def latents_path(folder: Path, name: str) -> Path:
    return folder / "latents" / f"{name}.safetensors"


def prompt_path(folder: Path, name: str) -> Path:
    return folder / "prompts" / f"{name}.safetensors"


def negative_id(prompt: str) -> str:
    """As `_id`, for a prompt to guide away from: a caption of the same words may be embedded in another way."""
    return digest(f"negative prompt: {prompt}")


def short(text: str) -> str:
    """A caption as it can stand in a line."""
    return repr(text if len(text) <= 80 else f"{text[:77]}...")
