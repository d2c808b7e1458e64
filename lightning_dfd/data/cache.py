"""Latents and prompt embeddings on disk, so that training needs neither the VAE nor the text encoder.

    cache.json                what the cache was made from, and its clips; written last
    latents/<id>.safetensors  "latents" of one clip, without batch axis; id from the clip's name. With image-to-video
                              teachers also the conditioning of its first frame, under its own names
    prompts/<id>.safetensors  the conditioning of one caption, without batch axis; id from its text

Every tensor file carries what it was made from and a checksum, so that a damaged or exchanged one is never trained on.

Axis legend: B batch, C = 3 colour channels, F frames, H height, W width.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from lightning_dfd.backbones.base import Backbone
from lightning_dfd.data.listing import Clip, Problem, first_problems
from lightning_dfd.data.stream import Sample
from lightning_dfd.data.video import Facts, VideoError, look, middle_rate, note_guessed_colours, read_video
from lightning_dfd.files import SampleError, replacing
from lightning_dfd.types import Conditioning, VideoSize

FORMAT = 4
INDEX = "cache.json"
LATENTS = "latents"
CHECKSUM, BUCKET = "checksum", "bucket"  # in a file's metadata, besides what it was made from
MAKE_IT = "make it with: lightning cache -c RECIPE"
MAKE_AGAIN = "make it again with: lightning cache -c RECIPE"
DELETE_IT = "delete the file and " + MAKE_AGAIN
ELSEWHERE = "name another folder or delete this one"


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
        return _id(json.dumps(self.settings(), sort_keys=True))

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
        differing = [
            f"{key} is {have.get(key, 'absent')} in the cache and {want.get(key, 'absent')} here"
            for key in dict.fromkeys((*have, *want))
            if have.get(key) != want.get(key)
        ]
        if differing:
            raise ValueError(f"{folder} holds the cache of something else: {', '.join(differing)}; {remedy}")


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


@dataclass(frozen=True)
class Process:
    """One of `count` processes that write a cache together.

    `gather` is called once by all of them and gives each the list of what all gave it, in the order of ranks.
    """

    rank: int
    count: int
    gather: Callable[[Any], list[Any]]


ALONE = Process(0, 1, lambda value: [value])


Encode = Callable[[Sequence[str]], Conditioning]


@dataclass(frozen=True)
class CacheReport:
    """What `write_cache` did: clips written, clips that were there already, clips left out."""

    written: int
    kept: int
    problems: tuple[Problem, ...]


# ---- writing ----------------------------------------------------------------------------------------------------


def write_cache(
    backbone: Backbone,
    clips: Sequence[Clip],
    folder: str | Path,
    size: VideoSize | Sequence[VideoSize],
    fps: float | None,
    negative_prompts: Sequence[str] = ("",),
    progress: bool = True,
    batch_size: int = 1,
    more_captions: Sequence[str] = (),
    process: Process = ALONE,
) -> CacheReport:
    """Encode clips and captions into `folder`. A second run encodes only what is missing or has changed.

    Several processes may do it together: each takes its share, and the first writes the index when all are done.

    Args:
        backbone: the teacher; it encodes on the device it was moved to.
        clips: from `list_clips`.
        folder: where the cache lies or will lie.
        size: frames and pixels of every clip, or several among which each gets what suits it best.
        fps: frames per second, None for frames as stored.
        negative_prompts: embedded besides the captions, for guidance.
        progress: show a progress bar.
        batch_size: videos that the VAE encodes at once.
        more_captions: embedded besides those of the clips; the empty one, for caption dropout.
        process: which share is this process's, and how the processes meet.

    Raises:
        ValueError: the folder holds the cache of another teacher, size or frame rate; the size does not fit the
            teacher; no clip could be read.
    """
    folder = Path(folder)
    sizes = (size,) if isinstance(size, VideoSize) else tuple(size)
    for one in sizes:
        backbone.check_size(one)
    source = CacheSource(backbone.identity(), sizes, fps)
    known = None
    if (folder / INDEX).exists():
        known = LatentCache.open(folder)
        known.source.refuse(folder, source, ELSEWHERE)
    own = clips[process.rank :: process.count]
    progress = progress and process.rank == 0
    left_out: dict[str, Problem] = {}
    facts: dict[str, Facts] = {}
    todo = [clip for clip in own if not _is_current(folder, clip, source)]
    kept = len(own) - len(todo)
    with tqdm(total=len(own), initial=kept, desc="latents", disable=not progress) as bar:
        for group, group_size in _groups(todo, source, batch_size, left_out, facts):
            _encode_group(backbone, group, group_size, folder, source, left_out)
            bar.update(len(group))
    written = len(own) - kept - len(left_out)
    captions = dict.fromkeys([*(text for clip in clips for text in clip.captions), *more_captions])
    texts: list[tuple[Encode, str, str]]
    texts = [(backbone.encode_prompts, caption, _id(caption)) for caption in captions]
    texts += [(backbone.encode_negative, prompt, _negative_id(prompt)) for prompt in dict.fromkeys(negative_prompts)]
    for encode, text, name in tqdm(texts[process.rank :: process.count], desc="prompts", disable=not progress):
        _write_prompt(encode, text, _prompt_path(folder, name), source)
    # the others' reports; when they are here, their files are too
    rates = [one.rate for one in facts.values()]
    guessed = sum(one.guessed_colours for one in facts.values())
    reports = process.gather((written, kept, left_out, rates, guessed))
    left_out = {name: problem for report in reports for name, problem in report[2].items()}
    problems = tuple(left_out[clip.name] for clip in clips if clip.name in left_out)
    done = [clip for clip in clips if clip.name not in left_out]
    if not done:
        raise ValueError(f"nothing to cache: none of {len(clips)} clips could be read{first_problems(problems)}")
    if process.rank == 0:
        note_guessed_colours(clips[0].root, sum(report[4] for report in reports))
        rate = middle_rate(rate for report in reports for rate in report[3])
        _write_index(folder, source, done, problems, rate if rate or not known else known.rate)
    return CacheReport(sum(report[0] for report in reports), sum(report[1] for report in reports), problems)


def _groups(
    clips: Sequence[Clip],
    source: CacheSource,
    batch_size: int,
    left_out: dict[str, Problem],
    facts: dict[str, Facts],
) -> Iterator[tuple[list[Clip], VideoSize]]:
    """Clips that the VAE can encode at once, with their size, which is added to `facts`; those that have none are added
    to `left_out`."""
    waiting: dict[VideoSize, list[Clip]] = {size: [] for size in source.sizes}
    for clip in clips:
        try:
            facts[clip.name] = look(clip.source, source.sizes, source.fps)
        except VideoError as error:
            left_out[clip.name] = Problem.of(clip, error)
            continue
        size = facts[clip.name].size
        waiting[size].append(clip)
        if len(waiting[size]) == batch_size:
            yield waiting[size], size
            waiting[size] = []
    yield from ((group, size) for size, group in waiting.items() if group)


def _is_current(folder: Path, clip: Clip, source: CacheSource) -> bool:
    """Whether a clip's latents are there, whole, and of the file as it is now."""
    try:
        made_from = _made_from(clip, source)
    except VideoError:  # the video is gone: `_encode_group` meets the same error and reports it
        return False
    found = _metadata(_latents_path(folder, _id(clip.name))) or {}
    return {key: value for key, value in found.items() if key != BUCKET} == made_from


def _encode_group(
    backbone: Backbone,
    group: Sequence[Clip],
    size: VideoSize,
    folder: Path,
    source: CacheSource,
    left_out: dict[str, Problem],
) -> None:
    """Encode and write the clips of one batch; those that cannot be decoded are added to `left_out`."""
    videos: list[Tensor] = []
    stamps: list[tuple[str, dict[str, str]]] = []
    for clip in group:
        try:
            # looked at before decoding, so that a file that changes meanwhile is done again next time
            made_from = _made_from(clip, source)
            videos.append(read_video(clip.source, size, source.fps))
        except VideoError as error:
            left_out[clip.name] = Problem.of(clip, error)
        else:
            stamps.append((_id(clip.name), made_from))
    if not videos:
        return
    # A VAE in half precision computes no more bits than that, so its latents are stored as such: half the space.
    dtype = backbone.dtype if backbone.dtype in (torch.bfloat16, torch.float16) else torch.float32
    pixels = torch.stack(videos).float() / 127.5 - 1.0
    latents = backbone.encode_videos(pixels).to("cpu", dtype)
    images = backbone.encode_images(pixels[:, :, 0], size.frames).to("cpu", dtype)
    for row, (name, made_from) in enumerate(stamps):
        own = {LATENTS: latents[row]} | {name: value[row] for name, value in images.tensors.items()}
        if all(bool(torch.isfinite(value).all()) for value in own.values()):
            bucket = {BUCKET: str(source.sizes.index(size))}
            _save(own, _latents_path(folder, name), made_from | bucket)
        else:
            reason = "the teacher's encoders make numbers of it that are not finite; try model.dtype: float32"
            left_out[made_from["name"]] = Problem(made_from["name"], reason)


def _write_prompt(encode: Encode, prompt: str, path: Path, source: CacheSource) -> None:
    made_from = {"prompt": prompt, "source": source.digest}
    if _metadata(path) == made_from:
        return
    # one by one: some pipelines pad to the longest of a batch, some take a single prompt
    tensors = {name: value[0].cpu() for name, value in encode([prompt]).tensors.items()}
    if not all(bool(torch.isfinite(value).all()) for value in tensors.values()):
        raise ValueError(f"the teacher's encoders make numbers of the prompt {_short(prompt)} that are not finite; "
                         "try model.dtype: float32")  # fmt: skip
    _save(tensors, path, made_from)


def _write_index(
    folder: Path, source: CacheSource, clips: Sequence[Clip], problems: Sequence[Problem], rate: float | None
) -> None:
    entries = []
    for clip in clips:
        metadata = _metadata(_latents_path(folder, _id(clip.name))) or {BUCKET: "0"}
        ids, stamp = (_id(clip.name), _id(clip.caption)), None
        if "source_size" in metadata:
            stamp = int(metadata["source_size"]), int(metadata["source_mtime_ns"])
        entries.append(CacheEntry(clip.name, clip.caption, *ids, clip.others, int(metadata[BUCKET]), stamp))
    index = {
        "format": FORMAT,
        "identity": dict(source.identity),
        "sizes": [asdict(size) for size in source.sizes],
        "fps": source.fps,
        "rate": rate,
        "folder": clips[0].root.name,
        "entries": [asdict(entry) for entry in entries],
        "problems": [asdict(problem) for problem in problems],
    }
    with replacing(folder / INDEX) as temporary:
        temporary.write_text(json.dumps(index, indent=1, ensure_ascii=False), encoding="utf-8")


def _made_from(clip: Clip, source: CacheSource) -> dict[str, str]:
    """What a latents file says of its origin: the video file, or the shard's member, as it is now, and the source."""
    size, changed = _stamp(clip)
    return {
        "name": clip.name,
        "source_size": str(size),
        "source_mtime_ns": str(changed),
        "source": source.digest,
    }


def _stamp(clip: Clip) -> tuple[int, int]:
    """The bytes of a clip's video, and when it was last changed (ns). Raises VideoError if it is gone."""
    if clip.part:
        return clip.part.size, clip.part.mtime * 10**9
    try:
        stat = clip.path.stat()
    except OSError as error:
        raise VideoError(f"{clip.source}: {error.strerror}") from error
    return stat.st_size, stat.st_mtime_ns


def _save(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    # safetensors refuses tensors that share memory, as the slices of a batch do
    whole = {name: value.contiguous().clone() for name, value in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(whole, temporary, metadata=metadata | {CHECKSUM: _checksum(whole, metadata)})
        except SafetensorError as error:  # of the file system, a full disk above all
            raise OSError(f"{path} could not be written ({error}); make room and run the command again: it goes on "
                          "where it stopped") from error  # fmt: skip


def _metadata(path: Path) -> dict[str, str] | None:
    """What a file says of its origin; None if it is missing or cut short."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
    except (OSError, SafetensorError):  # not whole: the caller writes it again
        return None
    return {key: value for key, value in metadata.items() if key != CHECKSUM} if CHECKSUM in metadata else None


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """CRC-32 of names, kinds, shapes and content of the tensors, and of what else the file says."""
    said = {key: value for key, value in metadata.items() if key != CHECKSUM}
    value = zlib.crc32(json.dumps(said, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        value = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


# ---- reading ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LatentCache:
    """A cache that `write_cache` has finished.

    Attributes:
        left_out: names of the clips that could not be used when it was made.
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
        """Raise ValueError, naming what differs, unless the cache was made for this teacher, these sizes and rate."""
        remedy = f"set data.cache to another folder and {MAKE_IT}"
        sizes = (size,) if isinstance(size, VideoSize) else tuple(size)
        self.source.refuse(self.folder, CacheSource(identity, sizes, fps), remedy)

    def __len__(self) -> int:
        return len(self.entries)

    def differences(self, clips: Sequence[Clip]) -> dict[str, list[str]]:
        """How a folder's clips differ from those that the cache was made from: kind of difference -> names. Nothing is
        opened; what was left out then is not new."""
        entries = {entry.name: entry for entry in self.entries}
        found: dict[str, list[str]] = {"new": [], "changed": [], "vanished": [], "with other captions": []}
        for clip in clips:
            entry = entries.pop(clip.name, None)
            if entry is None:
                found["new"] += [clip.name] * (clip.name not in self.left_out)
                continue
            try:
                same = entry.source in (None, _stamp(clip))
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
        return _latents_path(self.folder, self.entries[index].latents)

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
        """Whether the prompt was embedded when the cache was made."""
        return _prompt_path(self.folder, _id(prompt)).is_file()

    def conditioning(self, prompt: str) -> Conditioning:
        """The conditioning of one prompt, batch 1.

        Raises:
            CacheError: the prompt was not embedded when the cache was made, or its file is damaged.
        """
        return self._embedding(_id(prompt), prompt, "the prompt")

    def negative_conditioning(self, prompt: str) -> Conditioning:
        """The conditioning of one prompt to guide away from, batch 1.

        Raises:
            CacheError: it was not among the negative prompts when the cache was made, or its file is damaged.
        """
        return self._embedding(_negative_id(prompt), prompt, "the negative prompt")

    def _embedding(self, name: str, prompt: str, kind: str) -> Conditioning:
        made_from = {"prompt": prompt, "source": self.source.digest}
        tensors = _load(_prompt_path(self.folder, name), f"the embedding of {kind} {_short(prompt)}", made_from)
        return Conditioning({name: value[None] for name, value in tensors.items()})

    def _latents(self, entry: CacheEntry) -> tuple[Tensor, Conditioning]:
        path, made_from = _latents_path(self.folder, entry.latents), {"name": entry.name, "source": self.source.digest}
        return _split(_load(path, f"the latents of {entry.name!r}", made_from))


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
    return _split(_load(path, what, {}))[0]


def _split(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Conditioning]:
    """The content of a latents file: latents [...] float32, and the first frame's conditioning, of batch 1."""
    image = {name: value[None] for name, value in tensors.items() if name != LATENTS}
    return tensors[LATENTS].float(), Conditioning(image)


def _load(path: Path, what: str, made_from: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of a file, proved to be whole and made from what is asked."""
    if not path.is_file():
        raise CacheError(f"{path.parent.parent} does not hold {what}; {MAKE_AGAIN}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise CacheError(f"{path}, {what}, is damaged ({error}); {DELETE_IT}") from error
    if metadata.get(CHECKSUM) != _checksum(tensors, metadata):
        raise CacheError(f"{path}, {what}, is damaged (its checksum is wrong); {DELETE_IT}")
    if any(metadata.get(key) != value for key, value in made_from.items()):
        raise CacheError(f"{path} is not {what}, but made from something else; {DELETE_IT}")
    return tensors


def _short(text: str) -> str:
    """A caption as it can stand in a line."""
    return repr(text if len(text) <= 80 else f"{text[:77]}...")


def _latents_path(folder: Path, name: str) -> Path:
    return folder / "latents" / f"{name}.safetensors"


def _prompt_path(folder: Path, name: str) -> Path:
    return folder / "prompts" / f"{name}.safetensors"


def _negative_id(prompt: str) -> str:
    """As `_id`, for a prompt to guide away from: a caption of the same words may be embedded in another way."""
    return _id(f"negative prompt: {prompt}")


def _id(text: str) -> str:
    """16 hex digits that stand for a name or a caption."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
