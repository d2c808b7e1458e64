"""`lightning sample`: videos of a role as files, written one by one, with a record of their origin.

Axis legend: B batch, N videos, F frames, H height, W width, C = 3 channels; pictures are uint8 [F, H, W, C].
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from lightning_dfd.data import VideoDataModule, read_first_frame, write_video
from lightning_dfd.data.listing import CAPTION_KEYS
from lightning_dfd.evaluation.generation import TEACHER_STEPS, Request, condition, generate_latents, image_clip
from lightning_dfd.evaluation.pictures import contact_sheet, resized, to_frames, video_grid
from lightning_dfd.files import expanded, output_folder, write_text
from lightning_dfd.training.module import DistillationModule
from lightning_dfd.types import Role, VideoSize

RECORD, LIST, GRID, SHEET = "samples.json", "metadata.jsonl", "grid.mp4", "contact.png"
VIDEO = re.compile(r"\d{4,}\.mp4")
CAPTIONS = 8  # of the data, where no prompts are given
ROWS, COLUMNS, TILE = 12, 8, 128  # of the grid: most prompts, most seeds, and about the height of a video


# ---- what is asked for, all of it checked before anything is loaded ----------------------------------------------


@dataclass(frozen=True)
class Wanted:
    """What to show; `prompts` None for captions of the data, `images` None for the data's clips or for no images."""

    prompts: tuple[str, ...] | None
    seeds: tuple[int, ...]
    images: tuple[Path, ...] | None


def wanted(
    prompts: Sequence[str] | str | None,
    prompts_file: str | None,
    seeds: Sequence[int] | int | None,
    images: Sequence[str] | str | None,
) -> Wanted:
    """What the arguments of `lightning sample` ask for; a single value stands for a list of it.

    Raises:
        ValueError: one cannot be used; names the argument.
        OSError: the file of prompts cannot be read.
    """
    if prompts is not None and prompts_file is not None:
        raise ValueError("got both prompts and prompts_file; give one of them")
    texts = None if prompts is None else [prompts] if isinstance(prompts, str) else list(prompts)
    if prompts_file is not None:
        texts = read_prompts(Path(expanded(prompts_file, "prompts_file")))
    if texts is not None and (not texts or not all(text.strip() for text in texts)):
        raise ValueError(f"prompts is {prompts!r}; give one text or a list of them, none empty")
    numbers = [0, 1] if seeds is None else [seeds] if isinstance(seeds, int) else list(dict.fromkeys(seeds))
    if not numbers or not all(0 <= number < 2**63 for number in numbers):
        raise ValueError(f"seeds is {seeds}; give one number or a list of them, each between 0 and 2^63 - 1")
    files = None if images is None else [images] if isinstance(images, str) else list(images)
    if files is not None and len(files) != len(texts or ()):
        raise ValueError(f"got {len(files)} images for {len(texts or ())} prompts; give one for each prompt")
    paths = None if files is None else tuple(Path(expanded(file, "images")) for file in files)
    return Wanted(None if texts is None else tuple(texts), tuple(numbers), paths)


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file: of a .jsonl the `text` (or `caption`) of each line, else each line that is not empty.

    Raises:
        OSError: it cannot be read.
        ValueError: it is a table, is not UTF-8, holds no prompt, or a line of a .jsonl has none; names the line.
    """
    if path.suffix.lower() in (".csv", ".tsv", ".json", ".yaml", ".yml"):
        raise ValueError(f"prompts_file is {path}; write a text file with one prompt to a line, or a .jsonl with text")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines() would cut texts at U+2028 too
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts_file {path} is not UTF-8; save it as that") from error
    except OSError as error:
        raise OSError(f"prompts_file {str(path)!r} cannot be read: {error.strerror}") from error
    numbered = [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise ValueError(f"prompts_file {path} holds no prompt; write one to a line")
    if path.suffix.lower() != ".jsonl":
        return [line for _, line in numbered]
    return [_text_of(line, f"prompts_file {path}, line {number}") for number, line in numbered]


def _text_of(line: str, where: str) -> str:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    found = next((entry[key] for key in CAPTION_KEYS if key in entry), None) if isinstance(entry, dict) else None
    if not isinstance(found, str) or not found.strip():
        raise ValueError(f'{where}: no prompt; write {{"text": "a dog runs"}}')
    return found


def check_role(model: DistillationModule, role: Role | None, images: Sequence[Path] | None, size: VideoSize) -> None:
    """Raise ValueError for a role that the recipe does not train, and for images that the teacher does not take or that
    cannot be read."""
    if role == "ema" and model.student.ema_decay is None:
        raise ValueError("role is ema, and the recipe keeps no moving average (model.student.ema_decay is null)")
    model.backbone.check_size(size)
    if images is not None and not model.backbone.takes_image:
        raise ValueError(f"got images, and a {model.backbone.pipeline_name} takes none; leave them out")
    for image in images or ():
        read_first_frame(image, size.height, size.width)


def require_images(model: DistillationModule, requests: Sequence[Request], data: VideoDataModule) -> None:
    """Raise ValueError where a video needs an image and has none."""
    if model.backbone.takes_image:
        for request in requests:
            if request.image is None:
                image_clip(model.backbone, request, data)


# ---- the folder -------------------------------------------------------------------------------------------------


def samples_folder(output: str) -> Path:
    """`output_folder` of samples: other files may lie there, but no videos of another origin."""
    return output_folder(output, RECORD, _in_the_way)


def _in_the_way(name: str) -> bool:
    return name in (LIST, GRID, SHEET) or Path(name).suffix == ".mp4"


def clear(folder: Path) -> None:
    """Remove what an earlier call wrote, also one that was killed, and nothing else."""
    if not (folder / RECORD).is_file():
        return
    written = _written(folder)
    for path in folder.iterdir():
        unfinished = re.fullmatch(rf"\.({VIDEO.pattern}|{re.escape(GRID)})\.\d+\.tmp", path.name)
        if path.name in (LIST, GRID, SHEET) or path.name in written or unfinished:
            path.unlink()
    (folder / RECORD).unlink()


def _written(folder: Path) -> set[str]:
    """The names of the videos that an earlier call wrote, or was about to write."""
    try:
        count = int(json.loads((folder / RECORD).read_text(encoding="utf-8")).get("videos", 0))
        lines = (folder / LIST).read_text(encoding="utf-8").splitlines() if (folder / LIST).is_file() else []
        listed = {str(json.loads(line)["file_name"]) for line in lines}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / RECORD} or {LIST} beside it is damaged; name another folder") from error
    return {f"{number:04d}.mp4" for number in range(count)} | set(filter(VIDEO.fullmatch, listed))


def write_samples(
    folder: Path, videos: Iterator[Tensor], requests: Sequence[Request], record: dict[str, Any], fps: float
) -> None:
    """Write each of `videos` as it comes, [F, H, W, C] each, with a line of metadata.jsonl, so that the folder can be
    evaluated like any other; then a grid in which a row is a prompt, and a contact sheet.

    A call that is killed leaves what it has written, and its record says that it is not finished. The grid shows the
    first prompts and seeds, in small: with many videos all would not fit into memory.

    Args:
        record: what samples.json says, as it stands when the last video has come.
    """
    clear(folder)
    _write_record(folder, record | {"finished": False})
    seeds = len({request.seed for request in requests})
    tiles = []
    with (folder / LIST).open("w", encoding="utf-8") as listing:
        for number, (video, request) in enumerate(zip(videos, requests, strict=True)):
            name = f"{number:04d}.mp4"
            write_video(folder / name, video, fps)
            entry = {"file_name": name, "text": request.prompt, "seed": request.seed}
            listing.write(json.dumps(entry, ensure_ascii=False) + "\n")
            listing.flush()
            if number // seeds < ROWS and number % seeds < COLUMNS:
                tiles.append(resized(video, TILE))
    shown = torch.stack(tiles)
    write_video(folder / GRID, video_grid(shown, min(seeds, COLUMNS)), fps)
    Image.fromarray(contact_sheet(shown).numpy()).save(folder / SHEET)
    _write_record(folder, record | {"finished": True})


def _write_record(folder: Path, record: Mapping[str, Any]) -> None:
    write_text(folder / RECORD, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


# ---- the videos -------------------------------------------------------------------------------------------------


def record_of(
    model: DistillationModule, role: Role, requests: Sequence[Request], data: VideoDataModule, fps: float
) -> dict[str, Any]:
    """The origin of the videos, as far as model, data and requests say."""
    backbone = model.backbone
    record: dict[str, Any] = {
        "videos": len(requests),
        "role": role,
        "teacher": backbone.source,
        "pipeline": backbone.pipeline_name,
        "seeds": list(dict.fromkeys(request.seed for request in requests)),
        "frames": data.size.frames,
        "height": data.size.height,
        "width": data.size.width,
        "fps": fps,
    }
    if role == "teacher":
        taken = backbone.teacher_times(TEACHER_STEPS, backbone.latent_shape(data.size))
        count, guidance, kind = len(taken), float(model.dmd.guidance), "ode"
        record |= {"timesteps": [round(step.timestep, 3) for step in taken]}
        record["negative_prompt"] = model.dmd.negative_prompt
    else:
        count, guidance, kind = len(model.sampling.steps), 1.0, str(model.sampling.kind)
        record |= {"times": [round(time, 5) for time in model.sampling.steps]}
    calls = count * (1 + (guidance != 1))
    return record | {"steps": count, "kind": kind, "guidance": guidance, "network_calls_per_video": calls}


def sampled(
    model: DistillationModule,
    role: Role,
    requests: Sequence[Request],
    data: VideoDataModule,
    batch_size: int,
    record: dict[str, Any],
) -> Iterator[Tensor]:
    """The videos one by one, [F, H, W, C] each; `batch_size` are sampled together, and each is decoded by itself.

    `record` gets the seconds per video so far, without decoding.
    """
    seconds, done = 0.0, 0
    for start in tqdm(range(0, len(requests), batch_size), desc=f"sampling {role}", unit="batch"):
        chunk = requests[start : start + batch_size]
        cond = condition(model.backbone, chunk, data.size, data if model.backbone.takes_image else None)
        began = time.perf_counter()
        latents = generate_latents(model, role, chunk, cond, data.size)
        if latents.is_cuda:
            torch.cuda.synchronize()
        seconds, done = seconds + time.perf_counter() - began, done + len(chunk)
        record["sampling_seconds_per_video"] = seconds / done
        for one in latents.split(1):
            yield to_frames(model.backbone.decode_latents(one))[0]


def first_captions(data: VideoDataModule) -> list[str]:
    """Captions of the training clips, after `setup`."""
    return list(dict.fromkeys(clip.caption for clip in data.clips))[:CAPTIONS]
