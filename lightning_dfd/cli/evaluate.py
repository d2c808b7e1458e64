"""`lightning evaluate`: folders of videos, whoever generated them, measured beside real ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from jsonargparse import ArgumentParser

from lightning_dfd.data.datamodule import UNKNOWN_RATE
from lightning_dfd.evaluation import pages
from lightning_dfd.evaluation.folders import Reading, measure, one_rate, source
from lightning_dfd.evaluation.metrics import VideoSuite
from lightning_dfd.evaluation.report import Report, as_json, table, text_table, write_page
from lightning_dfd.files import expanded, output_folder, replacing, write_text
from lightning_dfd.types import VideoSize

RECORD, PAGE = "evaluation.json", "index.html"


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
        OSError: `output` cannot be created, or an extractor's weights are not there.
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
    folder = output_folder(output, RECORD)
    suite = VideoSuite(distance, diversity, min_videos).to(device_used)
    rates, note = one_rate((real_source, *sources.values()), fps)
    reading = Reading(VideoSize(frames, height, width), rates.read, batch_size, min_videos, device_used)

    of_real = measure(suite, real_source, reading, real=True)
    found = {name: measure(suite, one, reading) for name, one in sources.items()}
    stored = "as stored" + ("" if rates.shown is None else f", {rates.shown:g}")
    protocol = {"real": real, "size": str(reading.size), "fps": stored if rates.read is None else f"{rates.read:g}"}
    protocol |= {f"extractor of {use}": extractor for use, extractor in suite.fingerprint().items()}
    report = Report.of(videos, protocol, of_real, found, note)
    write_text(folder / RECORD, as_json(report))
    with replacing(folder / PAGE) as file:
        write_page(file, report, {"real": of_real} | found, curves, rates.shown or UNKNOWN_RATE)
    print("\n".join([text_table(*table(report)), "", *(f"Note: {note}" for note in report.notes)]))
    print(f"Open {folder / PAGE}; the numbers are in {folder / RECORD}")


def usable_device(name: str) -> torch.device:
    """The device of that name; ValueError if torch cannot use it."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"this torch cannot use device {name!r} here; give cpu, cuda or cuda:1") from error


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
