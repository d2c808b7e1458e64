"""The Fréchet distance between real and generated videos.

Axis legend: B videos [B, 3, F, H, W] in [-1, 1], D features.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_dfd.evaluation.metrics.adapt import Extractor, as_extractor, video_features
from lightning_dfd.evaluation.metrics.base import VideoMetric
from lightning_dfd.evaluation.metrics.functional.frechet import Moments, frechet_distance

Side = Literal["real", "generated"]
PARTS = ("n", "total", "outer")  # the fields of `Moments`


def _gather_sums(state: Tensor, group: Any = None) -> list[Tensor]:
    """A rank without videos does not know how long features are: its sums, of length 1, take the others' shape."""
    parts = gather_all_tensors(state, group)
    shape = max((part.shape for part in parts), key=math.prod)
    return [part.expand(shape) for part in parts]


class FrechetVideoDistance(VideoMetric):
    """Fréchet distance of features of real and of generated videos; FVD proper with I3D's 400 logits.

    The estimate is biased upwards, more so the fewer the videos: two sets of 256 from one normal distribution of 400
    independent features are apart by 75 % of the trace of its covariance, two of 2048 by 10 %. So say the counts beside
    every value, and compare values of equal counts only. Non-finite features give NaN.

    Args:
        extractor: a name, a `FeatureExtractor`, or a module or function as `CallableExtractor` takes. Features of
            frames are averaged over the video.
        min_samples: `compute` refuses below so many videos on either side.
        reset_real: whether `reset` drops the real side as well.

    Example:
        >>> metric = FrechetVideoDistance(lambda videos: videos.mean((3, 4)).flatten(1), min_samples=4)
        >>> videos = torch.rand(8, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
        >>> metric.update(videos, real=True)
        >>> metric.update(videos.flip(0) * 0.5, real=False)
        >>> bool(metric.compute() > 0), metric.real_count
        (True, 8)
    """

    higher_is_better = False

    def __init__(self, extractor: Extractor, min_samples: int = 256, reset_real: bool = True) -> None:
        if min_samples < 2:
            raise ValueError(f"got min_samples={min_samples}; need 2 or more. A covariance needs two videos.")
        super().__init__()
        self.dist_sync_fn = _gather_sums
        self.extractor = as_extractor(extractor)
        self.min_samples = min_samples
        self.reset_real = reset_real
        # Real moments that were loaded. Every rank loads the same ones, so they must not be summed over ranks.
        self._loaded: Moments | None = None
        self._counted: tuple[int, int] | None = None
        for side in ("real", "generated"):
            for part, axes in zip(PARTS, range(3), strict=True):
                zeros = torch.zeros([1] * axes, dtype=torch.float64)
                self.add_state(f"{side}_{part}", zeros, dist_reduce_fx="sum")

    def _moments(self, side: Side) -> Moments:
        moments = Moments(*(getattr(self, f"{side}_{part}") for part in PARTS))
        if side == "generated" or self._loaded is None:
            return moments
        return moments + Moments(*(getattr(self._loaded, part).to(self.device) for part in PARTS))

    def update(self, videos: Tensor, real: bool) -> None:
        """Add videos [B, 3, F, H, W] to the real or to the generated side."""
        added = Moments.of(video_features(self.extractor, videos).to(self.device))
        side = "real" if real else "generated"
        so_far = Moments(*(getattr(self, f"{side}_{part}") for part in PARTS))
        for part, value in vars(so_far + added).items():
            setattr(self, f"{side}_{part}", value)
        self._counted = None

    def compute(self) -> Tensor:
        """The distance over all ranks, a float64 scalar in squared units of the features.

        Raises:
            ValueError: if either side has fewer than `min_samples` videos.
        """
        real, generated = self._moments("real"), self._moments("generated")
        self._counted = (int(real.n), int(generated.n))
        if min(self._counted) < self.min_samples:
            raise ValueError(
                f"FrechetVideoDistance has {self._counted[0]} real and {self._counted[1]} generated videos; needs "
                f"{self.min_samples} or more of each, as fewer make the distance mostly bias. Evaluate on more videos, "
                "or lower min_samples and compare values of equal counts only."
            )
        return frechet_distance(real.mean, real.covariance, generated.mean, generated.covariance)

    @property
    def real_count(self) -> int:
        """Real videos: after `compute` those of all ranks, while updating those of this rank; loaded ones included."""
        return self._counted[0] if self._counted else int(self._moments("real").n)

    @property
    def generated_count(self) -> int:
        """Generated videos: after `compute` those of all ranks, while updating those of this rank."""
        return self._counted[1] if self._counted else int(self._moments("generated").n)

    def real_state(self) -> dict[str, Tensor]:
        """The real side's moments over all ranks, to be kept on disk; every rank must call it.

        Returns:
            Float64 tensors on the CPU: `n` [], `total` [D] the sum of features, `outer` [D, D] of their outer products.
        """
        with self.sync_context(dist_sync_fn=self.dist_sync_fn):
            return {part: value.cpu().clone() for part, value in vars(self._moments("real")).items()}

    def load_real_state(self, state: dict[str, Tensor]) -> None:
        """Take `real_state()` of a metric with the same extractor for the real side; every rank may load the same.

        Replaces what the real side has. Real videos that come later are added to it.

        Raises:
            ValueError: if `state` is no such dict.
        """
        shapes = {name: list(value.shape) for name, value in state.items()}
        length = state["total"].numel() if "total" in state else 0
        if shapes != {"n": [], "total": [length], "outer": [length, length]}:
            raise ValueError(
                f"got tensors of shapes {shapes}; need n [], total [D] and outer [D, D]. Load what real_state() gave."
            )
        for part in PARTS:
            default = self._defaults[f"real_{part}"]
            assert isinstance(default, Tensor)
            setattr(self, f"real_{part}", default.clone())
        self._loaded = Moments(*(state[part].to(self.device, torch.float64) for part in PARTS))
        self._computed = self._counted = None

    def reset(self) -> None:
        """Forget the generated side and, with `reset_real`, the real side with what was loaded."""
        kept = {} if self.reset_real else {f"real_{part}": getattr(self, f"real_{part}") for part in PARTS}
        super().reset()
        for name, value in kept.items():
            setattr(self, name, value)
        if self.reset_real:
            self._loaded = None
        self._counted = None
