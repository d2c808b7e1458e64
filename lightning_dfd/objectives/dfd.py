"""Data forcing: what the teacher is shown, and under which guidance (Data-Forcing Distillation, 2606.18478).

Axis legend: B batch; latents are [B, ...]; t is [B].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_dfd.diffusion.noise import append_dims


def forced_samples(forced: bool, t: Tensor, time_range: Sequence[float] | None = None) -> Tensor:
    """Which samples of a step are data-forced: bool [B], none if the step is not, else those with low <= t <= high.

    The paper forces at all times, which is `time_range` None.
    """
    low, high = time_range or (0.0, 1.0)
    return (t >= low) & (t <= high) & forced


def teacher_data(gen: Tensor, real: Tensor, forced: Tensor) -> Tensor:
    """The latents from which the teacher scores: the student's own, or where `forced` ([B], bool) the real ones of
    the same condition (eq. 6). Both are noised with the same t and eps; the fake score always sees `gen`."""
    return torch.where(append_dims(forced, gen), real, gen).detach()


def teacher_guidance(forced: Tensor, normal: float, where_forced: float | None) -> float | Tensor:
    """The teacher's guidance: `normal` if the forced branch has none of its own, else [B] float32."""
    if where_forced is None:
        return normal
    scale = torch.full(forced.shape, normal, device=forced.device)
    return torch.where(forced, where_forced, scale)


def nearest_real(gen: Tensor, real: Tensor, drawn: Sequence[Sequence[Tensor]], count: int) -> Tensor:
    """For each sample the nearest to `gen` of up to `count` real clips: latents [B, ...] on the device of `real`.

    Pairs that are close are what data forcing rests on (eq. 7); with several real clips of a caption to choose from
    they are closer. Distance is the mean square over a sample; the batch's own clip wins against equals.

    Args:
        real: the batch's own clips, always candidates.
        drawn: for each sample other clips of its caption [...]; the own one among them is passed over.
    """
    pairs = []
    for made, own, clips in zip(gen.detach(), real, drawn, strict=True):
        others = [clip.to(own) for clip in clips]
        others = [clip for clip in others if not torch.equal(clip, own)][: count - 1]
        candidates = torch.stack([own, *others])
        distances = (candidates.float() - made.float()).square().flatten(1).mean(1)
        pairs.append(candidates[int(distances.argmin())])
    return torch.stack(pairs)


def paired_gap(real: Tensor, gen: Tensor) -> Tensor:
    """Mean |real - gen|, a scalar. Data forcing holds only while pairs stay close (eq. 7): a large gap at its
    start means that the student was not distilled first, or that its inputs are unpaired."""
    return (real.float() - gen.detach().float()).abs().mean()
