"""How colourful videos are, one value per video.

Axis legend: B videos [B, 3, F, H, W] in [-1, 1], red, green, blue; what lies outside is cut before measuring.
Content decides most of these values: compare them only between videos of the same prompts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dfd.evaluation.metrics.functional.videos import unit_range

BINS = 32
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def _pixel_saturation(videos: Tensor) -> Tensor:
    """[B, F, H, W] in [0, 1]: (max - min) / max over the channels, 0 for black."""
    pixels = unit_range(videos)
    high = pixels.amax(1)
    # A floor below the first step of 8-bit colour: black divides by it, nothing else does.
    return (high - pixels.amin(1)) / high.clamp(min=1e-6)


def saturation(videos: Tensor) -> Tensor:
    """Mean saturation of the hue-saturation-value model over all pixels, [B] in [0, 1]."""
    return _pixel_saturation(videos).mean((1, 2, 3))


def saturation_histogram(videos: Tensor, bins: int = BINS) -> Tensor:
    """Share of pixels per saturation, [B, bins] float64, in bins of equal width from 0 to 1; rows sum to 1."""
    # Saturations of n/bins exactly, as of pure colours and greys, belong to the upper bin; 1 to the last.
    index = (_pixel_saturation(videos) * bins).long().clamp(0, bins - 1).flatten(1)
    return torch.stack([torch.bincount(row, minlength=bins) for row in index]).double() / index.shape[1]


def histogram_distance(a: Tensor, b: Tensor) -> Tensor:
    """Wasserstein-1 distance of two histograms over [0, 1], [..., bins] each: the mean way a pixel's value must move.

    Each is scaled to sum 1 first. In units of the value: 0.1 between saturations that differ by 0.1 everywhere.
    """
    a, b = (value.double() / value.double().sum(-1, keepdim=True) for value in (a, b))
    return (a - b).cumsum(-1).abs().sum(-1) / a.shape[-1]


def colourfulness(videos: Tensor) -> Tensor:
    """Colourfulness of a frame, averaged over frames, [B] (Hasler & Suesstrunk, 2003), of values in 0..255.

    sqrt(var rg + var yb) + 0.3 sqrt(mean(rg)^2 + mean(yb)^2), rg = R - G, yb = (R + G) / 2 - B. The authors call 15
    slightly, 45 averagely and 109 extremely colourful.
    """
    red, green, blue = (unit_range(videos) * 255).unbind(1)
    opponents = torch.stack([red - green, (red + green) / 2 - blue], 1).flatten(3)  # [B, 2, F, H W]
    spread = opponents.var(-1, correction=0).sum(1).sqrt()
    return (spread + 0.3 * opponents.mean(-1).square().sum(1).sqrt()).mean(-1)


def contrast(videos: Tensor) -> Tensor:
    """RMS contrast: standard deviation of a frame's luma, averaged over frames, [B] in [0, 0.5]."""
    pixels = unit_range(videos)
    luma = sum(weight * channel for weight, channel in zip(LUMA, pixels.unbind(1), strict=True))
    assert isinstance(luma, Tensor)
    return luma.flatten(2).std(-1, correction=0).mean(-1)


def clipped_share(videos: Tensor) -> Tensor:
    """Share of pixels, [B], of which at least one channel is written as 0 or 255 in 8 bits: within 0.5/255 of the end.

    True black and white count, and so do pure colours.
    """
    pixels = unit_range(videos)
    edge = 0.5 / 255
    return ((pixels < edge) | (pixels > 1 - edge)).any(1).float().mean((1, 2, 3))
