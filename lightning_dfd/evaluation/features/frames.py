"""What happens to a video before a network sees it: frames are chosen, resized and normalised.

Axis legend: B videos, C = 3 channels, F frames, H height, W width, N = B * F.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FRAMES_AT_ONCE = 16  # bounds a ViT-L's memory; on a CPU larger batches are slower


def evenly(videos: Tensor, count: int) -> Tensor:
    """`count` >= 2 frames at even distances, the first and the last among them; short videos repeat frames.

    Args:
        videos: [B, C, F, H, W].

    Returns:
        [B, C, count, H, W].
    """
    last, steps = videos.shape[2] - 1, count - 1
    # in integers, as rounding of floats could choose other frames on other devices
    return videos[:, :, [(2 * i * last + steps) // (2 * steps) for i in range(count)]]


def consecutive(videos: Tensor, count: int) -> Tensor:
    """The `count` frames in the middle of videos [B, C, F, H, W], at their own rate; if short, as `evenly`."""
    if videos.shape[2] < count:
        return evenly(videos, count)
    start = (videos.shape[2] - count) // 2
    return videos[:, :, start : start + count]


def as_frames(videos: Tensor) -> Tensor:
    """[B, C, F, H, W] to [N, C, H, W]."""
    return videos.transpose(1, 2).flatten(0, 1)


def as_videos(frames: Tensor, count: int) -> Tensor:
    """[N, ...] to [B, count, ...]."""
    return frames.reshape(-1, count, *frames.shape[1:])


def of_each_frame(videos: Tensor, features: Callable[[Tensor], Tensor]) -> Tensor:
    """`features`, [N, C, H, W] to [N, D], of all frames of [B, C, F, H, W], some at a time: [B, F, D]."""
    frames = as_frames(videos)
    parts = [features(frames[start : start + FRAMES_AT_ONCE]) for start in range(0, len(frames), FRAMES_AT_ONCE)]
    return as_videos(torch.cat(parts), videos.shape[2])


def stretch(frames: Tensor, height: int, width: int, antialias: bool) -> Tensor:
    """Frames [N, C, H, W] at [N, C, height, width], bilinear; nothing is cropped, the aspect ratio is not kept."""
    return F.interpolate(frames, (height, width), mode="bilinear", antialias=antialias, align_corners=False)


def cover(frames: Tensor, side: int, mode: Literal["bilinear", "bicubic"]) -> Tensor:
    """Frames [N, C, H, W] in [-1, 1], the shorter side scaled to `side`, then the square in the middle.

    Antialiased and clipped as Pillow does it, with which these networks were trained.
    """
    rows, columns = frames.shape[-2:]
    scale = side / min(rows, columns)
    size = max(side, round(rows * scale)), max(side, round(columns * scale))
    scaled = F.interpolate(frames, size, mode=mode, antialias=True, align_corners=False).clamp(-1, 1)
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    return scaled[..., top : top + side, left : left + side]


def normalise(frames: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Frames [N, C, H, W] from [-1, 1] to (x - mean) / std, both given for [0, 1]."""
    return ((frames + 1) / 2 - frames.new_tensor(mean).view(3, 1, 1)) / frames.new_tensor(std).view(3, 1, 1)
