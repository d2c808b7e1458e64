"""Pictures of videos: grids that play, and sheets of frames.

Axis legend: N videos, F frames, H height, W width, C = 3 channels; all uint8.
"""

from __future__ import annotations

import io
import math

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


def to_frames(video: Tensor) -> Tensor:
    """[N, C, F, H, W] float in [-1, 1] to uint8 [N, F, H, W, C]."""
    scaled = ((video.float().clamp(-1, 1) + 1) * 127.5).round()
    return scaled.permute(0, 2, 3, 4, 1).to(torch.uint8).cpu()


def enlarge(frames: Tensor, to: int = 128) -> Tensor:
    """Repeat the pixels of small frames [..., H, W, C] until the height is at least about `to`."""
    factor = max(1, math.ceil(to / frames.shape[-3]))
    return frames.repeat_interleave(factor, -3).repeat_interleave(factor, -2)


def resized(frames: Tensor, to: int = 128) -> Tensor:
    """Frames [F, H, W, C] scaled until the height is about `to`: large ones smoothly, small ones by whole pixels."""
    height, width = frames.shape[1:3]
    if height <= to:
        return enlarge(frames, to)
    small = (to, max(1, round(width * to / height)))
    pixels = [F.interpolate(one.permute(2, 0, 1)[None].float(), small, mode="area")[0] for one in frames]
    return torch.stack(pixels).round().to(torch.uint8).permute(0, 2, 3, 1)


def video_grid(frames: Tensor, columns: int, gap: int = 4) -> Tensor:
    """One video [F, H', W', C] that plays N videos [N, F, H, W, C] side by side, `columns` to a row."""
    rows = math.ceil(len(frames) / columns)
    padded = F.pad(frames, (0, 0, 0, gap, 0, gap), value=255)
    empty = rows * columns - len(padded)
    if empty:
        padded = torch.cat([padded, padded.new_full((empty, *padded.shape[1:]), 255)])
    _, count, height, width, channels = padded.shape
    tiles = padded.view(rows, columns, count, height, width, channels)
    grid = tiles.permute(2, 0, 3, 1, 4, 5).reshape(count, rows * height, columns * width, channels)
    return grid[:, : grid.shape[1] // 2 * 2, : grid.shape[2] // 2 * 2]  # h264 wants even sides


def contact_sheet(frames: Tensor, shown: int = 5, gap: int = 2) -> Tensor:
    """One picture [H', W', C]: a row for each of N videos [N, F, H, W, C], with `shown` frames evenly spaced."""
    pick = torch.linspace(0, frames.shape[1] - 1, min(shown, frames.shape[1])).round().long()
    padded = F.pad(frames[:, pick], (0, 0, 0, gap, 0, gap), value=255)
    videos, columns, height, width, channels = padded.shape
    return padded.permute(0, 2, 1, 3, 4).reshape(videos * height, columns * width, channels)


def side_by_side(left: Tensor, right: Tensor, columns: int) -> Tensor:
    """Two sets of N videos [N, F, H, W, C], each in rows of `columns`, as one set in rows of twice as many."""
    rows = [part.view(-1, columns, *part.shape[1:]) for part in (left, right)]
    return torch.cat(rows, dim=1).flatten(0, 1)


def encode_gif(frames: Tensor, fps: float) -> bytes:
    """A video [F, H, W, C] as an animated GIF that plays for ever."""
    pictures = [Image.fromarray(frame.numpy()) for frame in frames]
    file = io.BytesIO()
    pictures[0].save(
        file, "GIF", save_all=True, append_images=pictures[1:], duration=round(1000 / fps), loop=0, optimize=False
    )
    return file.getvalue()
