"""How videos change over time, one value per video.

Axis legend: B videos [B, 3, F, H, W] in [-1, 1]; F frames, D features. All need F >= 2.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lightning_dfd.evaluation.metrics.functional.videos import check_videos, unit_range


def motion(videos: Tensor) -> Tensor:
    """Mean absolute difference of consecutive frames, [B], of values in 0..1; 0 for a still."""
    check_videos(videos, min_frames=2)
    return unit_range(videos).diff(dim=2).abs().mean((1, 2, 3, 4))


def temporal_flickering(videos: Tensor) -> Tensor:
    """VBench's temporal flickering, [B]: (255 - d) / 255, d the mean absolute difference of consecutive frames.

    1 for a still, and so 1 - `motion`: VBench itself means it for videos without motion. Values are of 0..255, as in
    the 8-bit files that it reads, but not rounded. Source: Huang et al., 2311.17982, `vbench/temporal_flickering.py`.
    """
    return 1 - motion(videos)


def frame_consistency(features: Tensor) -> Tensor:
    """VBench's subject consistency (features of DINO) and background consistency (features of CLIP).

    For each frame but the first, half the cosine to the first frame plus half that to the frame before, negative
    cosines counted as 0; averaged over frames. Source: Huang et al., 2311.17982, `vbench/subject_consistency.py`.

    Args:
        features: [B, F, D].

    Returns:
        [B] in [0, 1]; 1 if all frames have one direction.

    Raises:
        ValueError: if there are fewer than two frames.
    """
    if features.ndim != 3 or features.shape[1] < 2:
        raise ValueError(f"got features of shape {list(features.shape)}; need [B, F, D] with two frames or more.")
    units = F.normalize(features.double(), dim=-1, eps=1e-300)
    later = units[:, 1:]
    to_first = (later * units[:, :1]).sum(-1).clamp(min=0.0)
    to_previous = (later * units[:, :-1]).sum(-1).clamp(min=0.0)
    return (to_first + to_previous).mean(1) / 2
