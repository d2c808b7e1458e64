"""Small videos that the tests make."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from lightning_dfd.data import write_video


BLOCKS = np.array([(1, 1, 1), (1, 0, 0), (0, 0, 1), (0.5, 0.5, 0.5), (0.2, 0.6, 0.3), (0.9, 0.6, 0.5)])


def write_tagged(
    path: Path,
    signal: np.ndarray,
    matrix: tuple[float, float],
    tags: tuple[int, int, int],
    bits: int = 8,
    full: bool = False,
    height: int = 64,
    width: int = 96,
) -> Path:
    """Two frames of blocks side by side, of non-linear R'G'B' [blocks, 3].

    Args:
        matrix: what red and blue contribute to Y'.
        tags: FFmpeg's numbers of the matrix, the primaries and the transfer curve, 2 for none.
        bits: 8 or 10.
        full: range of the numbers.
    """
    red, blue = matrix
    luma = signal @ (red, 1 - red - blue, blue)
    chroma = (signal[:, 2] - luma) / (2 - 2 * blue), (signal[:, 0] - luma) / (2 - 2 * red)
    scale, top, middle = 2 ** (bits - 8), 2**bits - 1, 2 ** (bits - 1)
    rows = [top * luma, *(middle + top * value for value in chroma)]
    if not full:
        rows = [scale * (16 + 219 * luma), *(scale * (128 + 224 * value) for value in chroma)]
    kind = np.uint8 if bits == 8 else np.uint16
    planes = [
        np.repeat(np.round(values).clip(0, top).astype(kind)[None], side // len(values), 1).repeat(high, 0)
        for values, side, high in zip(rows, (width, width // 2, width // 2), (height, height // 2, height // 2))
    ]
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=8, options={"crf": "1"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p" if bits == 8 else "yuv420p10le"
        context = stream.codec_context
        context.colorspace, context.color_primaries, context.color_trc = tags
        context.color_range = 2 if full else 1
        for number in range(2):
            frame = av.VideoFrame(width, height, stream.pix_fmt)
            for plane, values in zip(frame.planes, planes, strict=True):
                padded = np.zeros((len(values), plane.line_size // kind().itemsize), kind)
                padded[:, : values.shape[1]] = values
                plane.update(padded.tobytes())
            frame.pts, frame.time_base = number, Fraction(1, 8)
            frame.colorspace, frame.color_range = tags[0], context.color_range
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


@pytest.fixture
def make_clip() -> Callable[..., Path]:
    """Write a clip of `frames` flat frames; its first frame is `shade` bright and every next 8 brighter."""

    def make(path: Path, shade: int = 20, frames: int = 9, fps: float = 8, height: int = 16, width: int = 24) -> Path:
        levels = np.arange(shade, shade + 8 * frames, 8, dtype=np.uint8)
        write_video(path, np.broadcast_to(levels[:, None, None, None], (frames, height, width, 3)), fps)
        return path

    return make
