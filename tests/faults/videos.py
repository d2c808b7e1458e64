"""What the makers of bad files share: a scene, its encoding, and what may become of a file.

A maker writes one file beside a good clip and says what may become of it. All draws come from the given generator, so
a seed is a variant. Axis legend: F frames, H height, W width, C = 3 colour channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_dfd.data import read_video, write_video
from lightning_dfd.data.video import cover_and_crop
from lightning_dfd.types import VideoSize

SIZE = VideoSize(9, 32, 48)
FPS = 8
CAPTION = "the other one"
# levels of 255 that a codec, and colours at half the size, may change in the mean; a wrong frame: above 45
LOSSY = 20.0
Frames = NDArray[np.uint8]  # [F, H, W, C]


@dataclass(frozen=True)
class Expected:
    """What may become of the file or line that a maker added.

    Args:
        name: what a message about it has to contain.
        usable: True if it has to be used, False if it must not be, None if either will do.
        video: what a reader must get out of it if it is used, uint8 [C, F, H, W]; None if any will do.
        tolerance: mean difference from `video`, in levels of 255, that the file's format is allowed.
        caption: that has to come with it.
        fps: rate at which the folder is read.
        undetectable: damage that may leave a legal stream with other pixels, which no decoder can notice.
    """

    name: str
    usable: bool | None = False
    video: Tensor | None = None
    tolerance: float = 4.0
    caption: str | None = None
    fps: float | None = None
    undetectable: bool = False


Maker = Callable[[Path, np.random.Generator], Expected]


def scene(rng: np.random.Generator, frames: int = 12, height: int = 48, width: int = 64) -> Frames:
    """Coarse random patches that move sideways, so that order, turning and damage all show."""
    patches = rng.integers(20, 236, (-(-height // 12), -(-width // 12), 3)).astype(np.uint8)
    picture = np.kron(patches, np.ones((12, 12, 1), np.uint8))[:height, :width]
    return np.stack([np.roll(picture, 3 * i, axis=1) for i in range(frames)])


def shown(frames: Frames, count: int = SIZE.frames) -> Tensor:
    """What `read_video` should make of frames: uint8 [C, F, H, W] of SIZE."""
    pixels = torch.from_numpy(np.ascontiguousarray(frames[:count])).permute(0, 3, 1, 2)
    return torch.stack([cover_and_crop(frame, SIZE.height, SIZE.width) for frame in pixels], dim=1)


def encode(
    path: Path,
    frames: Sequence[NDArray[Any]],
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    source: str = "rgb24",
    times: Sequence[int] | None = None,
    **options: Any,
) -> Path:
    """Write frames by any codec; `times` are in thousandths of a second, else the rate is FPS."""
    with av.open(str(path), "w", **options) as container:
        stream = container.add_stream(codec, rate=FPS)
        stream.height, stream.width, stream.pix_fmt = frames[0].shape[0], frames[0].shape[1], pix_fmt
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format=source)
            frame.pts = number if times is None else times[number]
            frame.time_base = Fraction(1, FPS) if times is None else Fraction(1, 1000)
            container.mux(stream.encode(frame.reformat(format=pix_fmt)))
        container.mux(stream.encode())
    return path


def pristine(root: Path, rng: np.random.Generator, name: str = "bad.mp4", **options: Any) -> tuple[Path, bytes, Tensor]:
    """A good file about to be damaged: its path, its bytes and what it shows."""
    path = root / name
    if path.suffix == ".mp4" and not options:
        write_video(path, scene(rng), FPS)
    else:
        encode(path, list(scene(rng)), **options)
    return path, path.read_bytes(), read_video(path, SIZE, None)


def sound_track(container: Any, stream: Any, rng: np.random.Generator) -> None:
    for number in range(8):
        samples = rng.normal(0, 0.1, (1, 1024)).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 8000, number * 1024
        container.mux(stream.encode(frame))
    container.mux(stream.encode())
