"""Writing a cache: clips and captions are encoded once, by one process or by several."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from lightning_dfd.backbones.base import Backbone
from lightning_dfd.data.cache.format import (
    BUCKET,
    FORMAT,
    INDEX,
    LATENTS,
    CacheEntry,
    CacheSource,
    clip_origin,
    latents_path,
    negative_id,
    prompt_origin,
    prompt_path,
    read_origin,
    save_tensors,
    short,
)
from lightning_dfd.data.cache.read import LatentCache
from lightning_dfd.data.listing import Clip, Problem, first_problems
from lightning_dfd.data.video import Facts, VideoError, look, middle_rate, note_guessed_colours, read_video
from lightning_dfd.distributed.ranks import Ranks
from lightning_dfd.files import digest, write_text
from lightning_dfd.types import Conditioning, VideoSize

ELSEWHERE = "name another folder or delete this one"

Encode = Callable[[Sequence[str]], Conditioning]


@dataclass(frozen=True)
class CacheReport:
    """What `write_cache` did: clips written, clips that already existed, clips left out."""

    written: int
    kept: int
    problems: tuple[Problem, ...]


def write_cache(
    backbone: Backbone,
    clips: Sequence[Clip],
    folder: str | Path,
    size: VideoSize | Sequence[VideoSize],
    fps: float | None,
    negative_prompts: Sequence[str] = ("",),
    batch_size: int = 1,
    more_captions: Sequence[str] = (),
    ranks: Ranks = Ranks(),  # noqa: B008 (frozen)
) -> CacheReport:
    """Encode clips and captions into `folder`. A second run encodes only what is missing or has changed.

    Several processes may do it together: each takes its share, and the first writes the index when all are done.

    Args:
        backbone: the teacher; it encodes on the device it was moved to.
        clips: from `list_clips`.
        folder: of the cache, new or from an earlier run.
        size: frames and pixels of every clip, or several among which each gets what suits it best.
        fps: frames per second, None for frames as stored.
        negative_prompts: embedded besides the captions, for guidance.
        batch_size: videos that the VAE encodes at once.
        more_captions: embedded besides those of the clips; the empty one, for caption dropout.
        ranks: this process among those that write together.

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
    own = _write_latents(backbone, ranks.share(clips), folder, source, batch_size, ranks.is_first)
    captions = dict.fromkeys([*(text for clip in clips for text in clip.captions), *more_captions])
    _write_prompts(backbone, captions, dict.fromkeys(negative_prompts), folder, source, ranks)
    # those that share a sequence report the same; when the reports are here, the files are too
    reports = ranks.gather(own)[:: ranks.sequence]
    left_out = {name: problem for report in reports for name, problem in report.left_out.items()}
    problems = tuple(left_out[clip.name] for clip in clips if clip.name in left_out)
    done = [clip for clip in clips if clip.name not in left_out]
    if not done:
        raise ValueError(f"nothing to cache: none of {len(clips)} clips could be read{first_problems(problems)}")
    if ranks.is_first:
        note_guessed_colours(clips[0].root, sum(report.guessed_colours for report in reports))
        rate = middle_rate(rate for report in reports for rate in report.rates)
        _write_index(folder, source, done, problems, rate if rate or not known else known.rate)
    return CacheReport(sum(report.written for report in reports), sum(report.kept for report in reports), problems)


@dataclass(frozen=True)
class _Share:
    """What one process did with its clips: `rates` are those of the videos it looked at, `guessed_colours` counts
    `Facts.guessed_colours`."""

    written: int = 0
    kept: int = 0
    left_out: Mapping[str, Problem] = field(default_factory=dict)
    rates: Sequence[Fraction | None] = ()
    guessed_colours: int = 0


def _write_latents(
    backbone: Backbone, clips: Sequence[Clip], folder: Path, source: CacheSource, batch_size: int, shown: bool
) -> _Share:
    left_out: dict[str, Problem] = {}
    facts: dict[str, Facts] = {}
    todo = [clip for clip in clips if not _is_current(folder, clip, source)]
    kept = len(clips) - len(todo)
    with tqdm(total=len(clips), initial=kept, desc="latents", disable=not shown) as bar:
        for group, size in _groups(todo, source, batch_size, left_out, facts):
            _encode_group(backbone, group, size, folder, source, left_out)
            bar.update(len(group))
    rates = [one.rate for one in facts.values()]
    guessed = sum(one.guessed_colours for one in facts.values())
    return _Share(len(todo) - len(left_out), kept, left_out, rates, guessed)


def _write_prompts(
    backbone: Backbone,
    captions: Iterable[str],
    negative: Iterable[str],
    folder: Path,
    source: CacheSource,
    ranks: Ranks,
) -> None:
    texts: list[tuple[Encode, str, str]]
    texts = [(backbone.encode_prompts, caption, digest(caption)) for caption in captions]
    texts += [(backbone.encode_negative, prompt, negative_id(prompt)) for prompt in negative]
    for encode, text, name in tqdm(ranks.share(texts), desc="prompts", disable=not ranks.is_first):
        _write_prompt(encode, text, prompt_path(folder, name), source)


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
        origin = clip_origin(clip, source)
    except VideoError:  # the video is gone: `_encode_group` meets the same error and reports it
        return False
    found = read_origin(latents_path(folder, digest(clip.name))) or {}
    return {key: value for key, value in found.items() if key != BUCKET} == origin


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
    origins: list[dict[str, str]] = []
    for clip in group:
        try:
            # looked at before decoding, so that a file that changes meanwhile is done again next time
            origin = clip_origin(clip, source)
            videos.append(read_video(clip.source, size, source.fps))
        except VideoError as error:
            left_out[clip.name] = Problem.of(clip, error)
        else:
            origins.append(origin)
    if not videos:
        return
    # A VAE in half precision computes no more bits than that, so its latents are stored as such: half the space.
    dtype = backbone.dtype if backbone.dtype in (torch.bfloat16, torch.float16) else torch.float32
    pixels = torch.stack(videos).float() / 127.5 - 1.0
    latents = backbone.encode_videos(pixels).to("cpu", dtype)
    images = backbone.encode_images(pixels[:, :, 0], size.frames).to("cpu", dtype)
    for row, origin in enumerate(origins):
        own = {LATENTS: latents[row]} | {name: value[row] for name, value in images.tensors.items()}
        if all(bool(torch.isfinite(value).all()) for value in own.values()):
            bucket = {BUCKET: str(source.sizes.index(size))}
            save_tensors(own, latents_path(folder, digest(origin["name"])), origin | bucket)
        else:
            reason = "the teacher's encoders give numbers that are not finite; try model.dtype: float32"
            left_out[origin["name"]] = Problem(origin["name"], reason)


def _write_prompt(encode: Encode, prompt: str, path: Path, source: CacheSource) -> None:
    origin = prompt_origin(prompt, source)
    if read_origin(path) == origin:
        return
    # one by one: some pipelines pad to the longest of a batch, some take a single prompt
    tensors = {name: value[0].cpu() for name, value in encode([prompt]).tensors.items()}
    if not all(bool(torch.isfinite(value).all()) for value in tensors.values()):
        raise ValueError(
            f"the teacher's encoders give numbers that are not finite for the prompt {short(prompt)}; try model.dtype: "
            "float32"
        )
    save_tensors(tensors, path, origin)


def _write_index(
    folder: Path, source: CacheSource, clips: Sequence[Clip], problems: Sequence[Problem], rate: float | None
) -> None:
    entries = []
    for clip in clips:
        metadata = read_origin(latents_path(folder, digest(clip.name))) or {BUCKET: "0"}
        ids, stamp = (digest(clip.name), digest(clip.caption)), None
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
    write_text(folder / INDEX, json.dumps(index, indent=1, ensure_ascii=False))
