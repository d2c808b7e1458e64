"""Frames to a video file, by PyAV.

Axis legend: C = 3 colour channels, F frames, H height, W width.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Literal

import av
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_dfd.files import replacing

BT709 = 1  # FFmpeg's number for the matrix, the primaries and the transfer curve alike
LIMITED_RANGE = 1  # FFmpeg's AVCOL_RANGE_MPEG


PixelFormat = Literal["yuv420p", "yuv444p"]


def write_video(
    path: str | Path, frames: Tensor | NDArray[np.uint8], fps: float, pix_fmt: PixelFormat = "yuv420p"
) -> None:
    """Write frames, uint8 [F, H, W, C], as an H.264 mp4. The same frames give the same bytes.

    The file appears only when it is complete. `yuv420p` plays everywhere, and halves the resolution of colours, which
    pales small shapes; `yuv444p` keeps it.

    Raises:
        ValueError: the frames are not uint8 [F, H, W, 3] with F >= 1 and even sides, or fps is not positive.
        OSError: the file cannot be written.
    """
    array = frames.detach().cpu().numpy() if isinstance(frames, Tensor) else np.asarray(frames)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3 or not array.shape[0]:
        raise ValueError(
            f"{path}: got frames {array.dtype} {list(array.shape)}; need uint8 [F, H, W, 3] with at least one frame"
        )
    height, width = array.shape[1:3]
    if height % 2 or width % 2 or not height or not width:
        raise ValueError(f"{path}: H.264 needs even sides, got {height}x{width}; crop or pad the frames by one pixel")
    if not fps > 0:
        raise ValueError(f"{path}: fps must be above 0, got {fps}")
    try:
        with replacing(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
            stream = _h264_stream(container, height, width, fps, pix_fmt)
            for pixels in array:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
                container.mux(stream.encode(frame.reformat(format=pix_fmt, dst_colorspace="ITU709")))
            container.mux(stream.encode())
    except av.FFmpegError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _h264_stream(
    container: av.container.OutputContainer, height: int, width: int, fps: float, pix_fmt: PixelFormat
) -> av.video.stream.VideoStream:
    """A stream near enough to lossless that small shapes stay sharp, with its colours labelled as they are."""
    # x264's macroblock tree reads memory that it never wrote where frames are tiny: other bytes in every process
    options = {"crf": "12", "x264-params": "mbtree=0"}
    stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=options)
    stream.height, stream.width, stream.pix_fmt = height, width, pix_fmt
    context = stream.codec_context
    context.thread_count = 1  # the order in which threads end must not decide the bytes
    context.colorspace = context.color_primaries = context.color_trc = BT709
    context.color_range = LIMITED_RANGE
    return stream
