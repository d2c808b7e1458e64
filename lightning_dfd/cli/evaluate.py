"""`lightning evaluate`: folders of videos, whoever made them, measured beside real ones.

Axis legend: B videos measured together, C = 3 channels, F frames, H height, W width.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from jsonargparse import ArgumentParser
from torch import Tensor
from tqdm import tqdm

from lightning_dfd.data import Clip, Problem, VideoError, first_problems, list_clips, read_video, write_video
from lightning_dfd.data.datamodule import UNKNOWN_RATE
from lightning_dfd.data.video import glance, middle_rate, note_guessed_colours
from lightning_dfd.evaluation import pages
from lightning_dfd.evaluation.metrics import VideoSuite, relative_to_teacher
from lightning_dfd.evaluation.pictures import enlarge, video_grid
from lightning_dfd.files import expanded, replacing, writable_folder
from lightning_dfd.types import VideoSize

TEACHER = "teacher"  # the others are related to the folder of this name
RECORD, PAGE = "evaluation.json", "index.html"
SHOWN_CAPTIONS, SHOWN_VIDEOS = 4, 4
SAME_RATE = 1.01  # rates of up to this ratio count as one: 23.976 is 24


def evaluate(
    videos: dict[str, str],
    real: str,
    output: str,
    frames: int = 16,
    height: int = 224,
    width: int = 224,
    fps: float | None = None,
    distance: str = "transnetv2",
    diversity: str = "efficientnet-lite0",
    min_videos: int = 64,
    runs: dict[str, str] | None = None,
    batch_size: int = 8,
    device: str = "cpu",
) -> None:
    """Measure folders of videos beside real ones: a table, evaluation.json and index.html.

    A folder is captioned as training data are: by metadata.jsonl (as `lightning sample` writes), metadata.csv or a
    .txt beside each video. Videos of one caption count as its seeds; captions with a single video are left out of the
    diversities.

    Args:
        videos: name -> folder of sampled videos, one or more; the others are related to the one named teacher
        real: folder of real videos
        output: folder for evaluation.json and index.html: new, empty, or of an earlier evaluation
        frames: frames read of each video, from its start; 2 or more
        height: pixels; videos are scaled to cover height x width and cropped at the centre
        width: pixels
        fps: frames per second at which all videos are read; null for frames as stored, or where folders differ in
            their rate, for the lowest of them
        distance: extractor of the Frechet distance: name, name=weights or package.module.Class; i3d-logits makes it FVD
        diversity: extractor of the diversities, likewise
        min_videos: a folder with fewer usable ones is refused, as distances would be mostly bias; 2 or more
        runs: name -> default_root_dir of a run, of which the page then shows the logged curves
        batch_size: videos measured together
        device: where features are computed: cpu, cuda or cuda:1

    Raises:
        FileNotFoundError: a folder is not there.
        ValueError: a folder has too few usable videos, or `output` holds something else.
        OSError: `output` cannot be made, or an extractor's weights are not there.
    """
    if not videos:
        raise ValueError("videos names no folder; give one or more, as --videos.student FOLDER")
    if min(frames, min_videos) < 2 or min(height, width, batch_size) < 1 or not (fps is None or fps > 0):
        raise ValueError("frames and min_videos must be 2 or more; height, width, batch_size and fps above 0")
    # all that can be wrong is found before hours of work
    real, output = expanded(real, "real"), expanded(output, "output")
    videos = {name: expanded(folder, f"videos.{name}") for name, folder in videos.items()}
    runs = {name: expanded(root, f"runs.{name}") for name, root in (runs or {}).items()}
    device_used = usable_device(device)
    real_source = source("real", real, min_videos)
    sources = {name: source(name, folder, min_videos) for name, folder in videos.items()}
    curves = {name: pages.logged_curves(Path(root)) for name, root in runs.items()}
    folder = usable_output(Path(output))
    suite = VideoSuite(distance, diversity, min_videos).to(device_used)
    rates, note = one_rate((real_source, *sources.values()), fps)
    reading = Reading(VideoSize(frames, height, width), rates.read, batch_size, min_videos, device_used)

    of_real = measure(suite, real_source, reading, real=True)
    found = {name: measure(suite, one, reading) for name, one in sources.items()}
    values = {name: measured.values for name, measured in found.items()}
    relative = {n: relative_to_teacher(own, values.get(TEACHER, {})) for n, own in values.items() if n != TEACHER}
    notes = [note for measured in (of_real, *found.values()) for note in measured.notes]
    stored = "as stored" + ("" if rates.shown is None else f", {rates.shown:g}")
    protocol = {"real": real, "size": str(reading.size), "fps": stored if rates.read is None else f"{rates.read:g}"}
    protocol |= {f"extractor of {use}": extractor for use, extractor in suite.fingerprint().items()}
    report = Report(dict(videos), protocol, values, relative, [*note, *notes, *unlike(found)])

    with replacing(folder / RECORD) as file:
        file.write_text(as_json(report), encoding="utf-8")
    with replacing(folder / PAGE) as file:
        write_page(file, report, {"real": of_real} | found, curves, rates.shown or UNKNOWN_RATE)
    print("\n".join([text_table(*table(report)), "", *(f"Note: {note}" for note in report.notes)]))
    print(f"Open {folder / PAGE}; the numbers are in {folder / RECORD}")


# ---- what is read ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """How all folders are read; `fps` None is for frames as stored."""

    size: VideoSize
    fps: float | None
    batch_size: int
    min_videos: int
    device: torch.device


@dataclass(frozen=True)
class Source:
    """A folder: its clips in the order of their captions, and what was left out."""

    name: str
    folder: str
    clips: tuple[Clip, ...]
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class Video:
    """A decoded clip, uint8 [C, F, H, W]."""

    caption: str
    pixels: Tensor


@dataclass(frozen=True)
class Part:
    """Videos, float [B, C, F, H, W] in [-1, 1]; all of them, or none, of captions with several videos."""

    videos: Tensor
    captions: list[str]
    several: bool


class Rates(NamedTuple):
    """Frames per second: at which videos are read, None for frames as stored; and shown, None where it is not known."""

    read: float | None
    shown: float | None


def one_rate(sources: Sequence[Source], fps: float | None) -> tuple[Rates, list[str]]:
    """The rate at which all folders are read, and what to say of it: frames as stored compare only between videos of
    one rate. Asked for none where they differ, it is the lowest of the folders' middle rates."""
    seen = {one.name: [glance(clip.source) for clip in one.clips] for one in sources}
    for one in sources:
        note_guessed_colours(one.folder, sum(video.guessed_colours for video in seen[one.name]))
    if fps is not None:
        return Rates(fps, fps), []
    found = {name: sorted(video.rate for video in videos if video.rate) for name, videos in seen.items()}
    middle = {name: rate for name, rates in found.items() if (rate := middle_rate(rates))}
    if not middle:
        return Rates(None, None), []
    lowest = min(middle.values())
    ends = [end for rates in found.values() for end in (rates[:1] + rates[-1:])]
    if max(ends) <= SAME_RATE * min(ends):
        return Rates(None, lowest), []
    said = ", ".join(
        f"{name} {float(rates[0]):.4g}" + (f" to {float(rates[-1]):.4g}" if rates[-1] > rates[0] else "")
        for name, rates in found.items()
        if rates
    )
    note = f"videos differ in frames a second ({said}), so all are read at {lowest:.4g}; --fps sets another rate"
    return Rates(lowest, lowest), [note]


def usable_device(name: str) -> torch.device:
    """The device of that name; ValueError if torch cannot use it."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"this torch cannot use device {name!r} here; give cpu, cuda or cuda:1") from error


def usable_output(folder: Path) -> Path:
    """The folder, made where it is missing; one that holds something else than an evaluation is refused."""
    names = writable_folder(folder, "output")
    if names and RECORD not in names:
        raise ValueError(f"output {folder} holds something else ({names[0]}); name a new or an empty folder")
    return folder


def source(name: str, folder: str, min_videos: int) -> Source:
    """What a folder holds, captioned or not; nothing is decoded yet.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it has too few videos.
    """
    if not folder or not Path(folder).is_dir():
        raise FileNotFoundError(f"{name}: there is no folder {folder!r}")
    try:
        listing = list_clips(folder, need_captions=False)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    require(len(listing.clips), min_videos, name, folder, listing.problems)
    clips = sorted(listing.clips, key=lambda clip: clip.caption)
    return Source(name, folder, tuple(clips), listing.problems)


def require(count: int, min_videos: int, name: str, folder: str, problems: Sequence[Problem]) -> None:
    """Raise ValueError if there are too few."""
    if count < min_videos:
        raise ValueError(
            f"{name}: {count} usable videos in {folder}, fewer than min_videos={min_videos}; add some, or lower it and "
            f"compare distances of equal numbers of videos only{first_problems(problems)}"
        )


def decode(one: Source, reading: Reading, problems: list[Problem]) -> Iterator[Video]:
    """A folder's videos in the order of their captions. What cannot be decoded is added to `problems`.

    Raises:
        ValueError: at the end, if too few could be decoded.
    """
    count = 0
    for clip in tqdm(one.clips, desc=f"reading {one.name}", unit="video"):
        try:
            pixels = read_video(clip.source, reading.size, reading.fps)
        except VideoError as error:
            problems.append(Problem.of(clip, error))
            continue
        count += 1
        yield Video(clip.caption, pixels)
    require(count, reading.min_videos, one.name, one.folder, problems)


def batches(videos: Iterable[Video], reading: Reading) -> Iterator[Part]:
    """Videos that come in the order of captions, those of captions with several videos apart from the others."""
    waiting: dict[bool, list[Video]] = {True: [], False: []}

    def part(several: bool) -> Part:
        taken, waiting[several] = waiting[several], []
        pixels = torch.stack([video.pixels for video in taken]).to(reading.device)
        return Part(pixels.float() / 127.5 - 1.0, [video.caption for video in taken], several)

    for caption, group in groupby(videos, key=lambda video: video.caption):
        first = list(islice(group, 2))
        several = bool(caption) and len(first) == 2
        for video in chain(first, group):
            waiting[several].append(video)
            if len(waiting[several]) == reading.batch_size:
                yield part(several)
    yield from (part(several) for several in (True, False) if waiting[several])


# ---- what is measured -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """One folder.

    Attributes:
        values: by metric; none for the real one.
        seeds: of each caption with several videos, how many.
        shown: a few videos by caption, uint8 [C, F, H, W].
        notes: what the reader must know of it.
    """

    values: dict[str, float]
    seeds: Counter[str]
    shown: dict[str, list[Tensor]]
    notes: list[str]


@dataclass(frozen=True)
class Report:
    """What is written: folders and values by name, how they were measured, and what to know of them."""

    videos: dict[str, str]
    protocol: dict[str, str]
    values: dict[str, dict[str, float]]
    relative: dict[str, dict[str, float]]
    notes: list[str]


def measure(suite: VideoSuite, one: Source, reading: Reading, real: bool = False) -> Measured:
    """Read a folder and measure it; the real one is only added to the suite."""
    suite.reset()
    problems = list(one.problems)
    seeds: Counter[str] = Counter()
    shown: dict[str, list[Tensor]] = {}

    def watched() -> Iterator[Video]:
        for video in decode(one, reading, problems):
            if len(shown) < SHOWN_CAPTIONS:
                shown.setdefault(video.caption, [])
            room = SHOWN_VIDEOS if video.caption else SHOWN_VIDEOS * SHOWN_CAPTIONS
            if video.caption in shown and len(shown[video.caption]) < room:
                shown[video.caption].append(video.pixels)
            yield video

    for part in batches(watched(), reading):
        if real:
            suite.update_real(part.videos)
            continue
        captions = part.captions if part.several else []
        # every file is a seed of its own: what was drawn for it need not be known
        suite.update(part.videos, captions, range(seeds.total(), seeds.total() + len(captions)))
        seeds.update(captions)
    notes = [f"{one.name}: {first_problems(problems).removeprefix('. ')}"] if problems else []
    if not seeds and not real:
        notes.append(f"{one.name}: no caption has several videos, so there are no diversities")
    return Measured({} if real else suite.compute(diversity=bool(seeds)), seeds, shown, notes)


def unlike(found: Mapping[str, Measured]) -> list[str]:
    """Which values of these folders must not be compared."""
    notes = []
    counts = {name: int(measured.values["videos"]) for name, measured in found.items()}
    if len(set(counts.values())) > 1:
        said = ", ".join(f"{name} {count}" for name, count in counts.items())
        notes.append(f"distances are of unequal numbers of videos ({said}): the fewer, the larger for the same quality")
    seeds = [measured.seeds for measured in found.values() if measured.seeds]
    if any(other != seeds[0] for other in seeds[1:]):
        notes.append("diversities are of other captions, or other numbers of videos of a caption, in each folder")
    return notes


# ---- what is written ------------------------------------------------------------------------------------------


def as_json(report: Report) -> str:
    """evaluation.json; what is no finite number is null, as JSON has no other word for it."""

    def finite(values: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float | None]]:
        return {
            name: {metric: value if math.isfinite(value) else None for metric, value in own.items()}
            for name, own in values.items()
        }

    record = {
        "protocol": report.protocol,
        "videos": report.videos,
        "values": finite(report.values),
        "relative_to_teacher": finite(report.relative),
        "notes": report.notes,
    }
    return json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: a row a metric, a column a folder, its relation to the teacher in brackets."""
    metrics = list(dict.fromkeys(name for own in report.values.values() for name in own))

    def cell(name: str, metric: str) -> str:
        value, ratio = report.values[name].get(metric), report.relative.get(name, {}).get(f"{metric}_ratio")
        said = "-" if value is None else f"{value:.0f}" if metric.endswith("videos") else f"{value:.4g}"
        return said if ratio is None else f"{said} (x {ratio:.2f})"

    rows = [[metric, *(cell(name, metric) for name in report.values)] for metric in metrics]
    scores = {name: own["score"] for name, own in report.relative.items() if "score" in own}
    if scores:
        rows.append(["score", *(f"{scores[name]:.3f}" if name in scores else "-" for name in report.values)])
    return ["", *report.values], rows


def text_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines of text in columns."""
    lines = [headings, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headings))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def write_page(
    path: Path,
    report: Report,
    found: Mapping[str, Measured],
    runs: Mapping[str, Mapping[str, pages.Curve]],
    fps: float,
) -> None:
    """index.html: the table, some videos of each folder, the curves of runs, and how it was measured."""
    explained = "Lower is better for distances and the score. docs/metrics.md says what each row is."
    if report.relative and TEACHER in report.values:
        explained = f"In brackets: in relation to the teacher. {explained}"
    parts = [pages.table(*table(report)), pages.paragraphs([explained, *report.notes])]
    with TemporaryDirectory() as scratch:
        grids = []
        for number, (name, measured) in enumerate(found.items()):
            grid = Path(scratch) / f"{number}.mp4"
            write_video(grid, grid_of(measured.shown), fps)
            grids.append(pages.video(grid, name))
    captions: dict[str, list[str]] = {}
    for name, measured in found.items():
        captions.setdefault("; ".join(filter(None, measured.shown)), []).append(name)
    rows = [f"Rows of {', '.join(names)}: {said}" for said, names in captions.items() if said]
    parts += ["<h2>Videos</h2>", f'<div class="row">{"".join(grids)}</div>', pages.paragraphs(rows)]
    panels, levels = logged_panels(runs)
    if panels:
        parts += ["<h2>While training</h2>", pages.curves(panels, levels)]
    facts = {**report.protocol, **{f"videos of {name}": folder for name, folder in report.videos.items()}}
    parts += ["<h2>How it was measured</h2>", pages.table(["", ""], [list(item) for item in facts.items()])]
    pages.write_page(path, "Videos beside real ones", parts)


def grid_of(shown: Mapping[str, Sequence[Tensor]]) -> Tensor:
    """A video [F, H', W', C] with a row for each caption, or several for none; short rows end in white."""
    columns = min(SHOWN_VIDEOS, max(len(row) for row in shown.values()))
    tiles = []
    for row in shown.values():
        tiles += [*row, *[torch.full_like(row[0], 255)] * (-len(row) % columns)]
    return video_grid(enlarge(torch.stack(tiles).permute(0, 2, 3, 4, 1)), columns)


Panels = dict[str, dict[str, pages.Curve]]
Levels = dict[str, dict[str, float]]


def logged_panels(runs: Mapping[str, Mapping[str, pages.Curve]]) -> tuple[Panels, Levels]:
    """What runs logged of their students, by metric and run, and the levels of their teachers."""
    panels: Panels = {}
    levels: Levels = {}
    for run, logged in runs.items():
        for name, curve in logged.items():
            root, _, metric = name.rpartition("/")
            if metric.endswith(("_ratio", "videos", "_error")):  # the teacher's level says as much as a ratio
                continue
            if root == "val":
                panels.setdefault(metric, {})[run] = curve
            elif root == "val/teacher":
                levels.setdefault(metric, {})[f"teacher of {run}"] = curve[1][-1]
    return panels, levels


# ---- the command ----------------------------------------------------------------------------------------------


def make_parser(parser_class: type[ArgumentParser]) -> ArgumentParser:
    """The keys of `evaluate`, and -c for a file of them."""
    parser = parser_class(
        prog="lightning evaluate",
        usage="lightning evaluate --videos.NAME FOLDER [...] --real FOLDER --output FOLDER [--key value ...]",
        description="Example: lightning evaluate --videos.teacher samples_teacher --videos.student samples_student "
        "--real my_videos --output evaluation. Videos of one caption (metadata.jsonl, metadata.csv or .txt files, as "
        "for training) count as its seeds.",
    )
    parser.add_argument("-c", "--config", action="config", help="a YAML file with these keys")
    parser.add_function_arguments(evaluate)
    return parser


def main(arguments: Sequence[str], parser_class: type[ArgumentParser]) -> None:
    """`lightning evaluate` with these words."""
    given = make_parser(parser_class).parse_args(list(arguments)).as_dict()
    given.pop("config")
    evaluate(**given)
