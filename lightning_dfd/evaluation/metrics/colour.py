"""Colour of generated videos beside that of real ones.

Axis legend: B videos [B, 3, F, H, W] in [-1, 1].
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dfd.evaluation.metrics.base import VideoMetric
from lightning_dfd.evaluation.metrics.functional.colour import (
    BINS,
    clipped_share,
    colourfulness,
    contrast,
    histogram_distance,
    saturation,
    saturation_histogram,
)
from lightning_dfd.evaluation.metrics.functional.videos import check_videos

MEASURES = {
    "saturation": saturation,
    "colourfulness": colourfulness,
    "contrast": contrast,
    "clipped_share": clipped_share,
}


class ColourStatistics(VideoMetric):
    """Means of the colour measures over generated videos, and their ratios to those over real ones.

    Distilled students tend to oversaturate. Content decides the absolute values, so the reference should be videos of
    the same prompts: the data's or the teacher's.

    Args:
        reset_real: whether `reset` drops the real side as well.
    """

    real: Tensor
    generated: Tensor

    def __init__(self, reset_real: bool = True) -> None:
        super().__init__()
        self.reset_real = reset_real
        # Real sums that were loaded. Every rank loads the same ones, so they must not be summed over ranks.
        self._loaded: Tensor | None = None
        # Sums over videos: the measures in their order, the histogram's shares, and the number of videos.
        zeros = torch.zeros(len(MEASURES) + BINS + 1, dtype=torch.float64)
        self.add_state("real", zeros, dist_reduce_fx="sum")
        self.add_state("generated", zeros.clone(), dist_reduce_fx="sum")

    def update(self, videos: Tensor, real: bool) -> None:
        """Add videos [B, 3, F, H, W] to the reference or to the generated side."""
        check_videos(videos)
        values = torch.stack([measure(videos) for measure in MEASURES.values()], 1).double()
        rows = torch.cat([values, saturation_histogram(videos), torch.ones_like(values[:, :1])], 1)
        side = "real" if real else "generated"
        setattr(self, side, getattr(self, side) + rows.sum(0).to(self.device))

    def compute(self) -> dict[str, Tensor]:
        """Float64 scalars over all ranks.

        Returns:
            `saturation`, `colourfulness`, `contrast` and `clipped_share` of the generated videos, each also as
            `<name>_ratio` to the real ones, and `saturation_distance`, the Wasserstein-1 distance of the pixels'
            saturations, in units of saturation. A ratio to a reference of 0 is infinite, of 0 to 0 NaN.

        Raises:
            ValueError: if either side has no videos.
        """
        real_sums = self._real_sums()
        counts = int(real_sums[-1]), int(self.generated[-1])
        if not min(counts):
            raise ValueError(
                f"ColourStatistics has {counts[0]} real and {counts[1]} generated videos; needs 1 or more of each. "
                "Pass videos of the same prompts, from the data or the teacher, to update(videos, real=True)."
            )
        real, generated = real_sums / real_sums[-1], self.generated / self.generated[-1]
        result = {}
        for index, name in enumerate(MEASURES):
            result[name] = generated[index]
            result[f"{name}_ratio"] = generated[index] / real[index]
        bins = slice(len(MEASURES), -1)
        result["saturation_distance"] = histogram_distance(generated[bins], real[bins])
        return result

    def _real_sums(self) -> Tensor:
        return self.real if self._loaded is None else self.real + self._loaded.to(self.device)

    def real_state(self) -> dict[str, Tensor]:
        """The real side's sums over all ranks, float64 on the CPU, to be kept on disk; every rank must call it."""
        with self.sync_context():
            return {"sums": self._real_sums().cpu().clone()}

    def load_real_state(self, state: dict[str, Tensor]) -> None:
        """Take `real_state()` for the real side, in place of what it has; every rank may load the same.

        Raises:
            ValueError: if `state` is no such dict.
        """
        shapes = {name: list(value.shape) for name, value in state.items()}
        if shapes != {"sums": list(self.real.shape)}:
            raise ValueError(
                f"got tensors of shapes {shapes}; need sums {list(self.real.shape)}. Load what real_state() gave."
            )
        self.real = torch.zeros_like(self.real)
        self._loaded = state["sums"].to(self.device, torch.float64)
        self._computed = None

    def reset(self) -> None:
        """Forget the generated side and, with `reset_real`, the real side with what was loaded."""
        real = self.real
        super().reset()
        if self.reset_real:
            self._loaded = None
        else:
            self.real = real
