"""What every metric expects of videos, and the scales they are measured in.

Axis legend: B videos, C = 3 channels, F frames, H height, W width. Videos are [B, C, F, H, W], float in [-1, 1].
"""

from __future__ import annotations

from torch import Tensor


def check_videos(videos: Tensor, min_frames: int = 1) -> None:
    """Refuse what is no batch of videos [B, 3, F, H, W] of floats with at least `min_frames` frames.

    Raises:
        ValueError: naming the shape and dtype that came.
    """
    shaped = videos.ndim == 5 and videos.shape[1] == 3
    if not shaped or not videos.is_floating_point():
        raise ValueError(
            f"got {videos.dtype} videos of shape {list(videos.shape)}; need float [B, 3, F, H, W] in [-1, 1]. "
            "Permute the axes to this order and scale bytes by `videos / 127.5 - 1`."
        )
    if videos.shape[2] < min_frames:
        raise ValueError(f"got videos of {videos.shape[2]} frame(s); need at least {min_frames}. Use longer videos.")


def unit_range(videos: Tensor) -> Tensor:
    """Float32 in [0, 1]; what lies outside of [-1, 1] is cut, as on writing a file."""
    return (videos.float() * 0.5 + 0.5).clamp(0.0, 1.0)
