"""The metrics that a run logs, `lightning evaluate` prints and the study tabulates: one set, one place.

Axis legend: B videos [B, 3, F, H, W] in [-1, 1].
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_dfd.features.base import FeatureExtractor
from lightning_dfd.metrics.adapt import Extractor, as_extractor
from lightning_dfd.metrics.colour import ColourStatistics
from lightning_dfd.metrics.diversity import PromptDiversity, VendiScore
from lightning_dfd.metrics.frechet import FrechetVideoDistance
from lightning_dfd.metrics.functional.diversity import spaced_frames
from lightning_dfd.metrics.temporal import FrameConsistency, MotionAmount, TemporalFlickering

FVD_EXTRACTOR = "i3d-logits"  # the only one whose Frechet distance is called FVD


class Remembering(FeatureExtractor):
    """An extractor that several metrics share: features of the videos that came last are not made again."""

    def __init__(self, extractor: FeatureExtractor) -> None:
        self.extractor, self.name, self.fingerprint = extractor, extractor.name, extractor.fingerprint
        self._videos: weakref.ref[Tensor] | None = None
        self._features: Tensor | None = None

    def __call__(self, videos: Tensor) -> Tensor:
        if self._features is None or self._videos is None or self._videos() is not videos:
            self._videos, self._features = weakref.ref(videos), self.extractor(videos)
            self.kind = self.extractor.kind
        return self._features


class VideoSuite:
    """Frechet distance, diversity, colour, flickering and motion of one set of videos beside real ones.

    Args:
        distance: extractor of the Frechet distance.
        diversity: extractor of the diversities; if it is one of frames, also of the consistency of frames.
        min_videos: on either side; see `FrechetVideoDistance`.
    """

    def __init__(self, distance: Extractor, diversity: Extractor, min_videos: int = 64) -> None:
        first = as_extractor(distance)
        second = first if diversity == distance else as_extractor(diversity)
        self.extractors = {"distance": Remembering(first), "diversity": Remembering(second)}
        by_diversity = self.extractors["diversity"]
        self.frechet = FrechetVideoDistance(self.extractors["distance"], min_videos, reset_real=False)
        self.colour = ColourStatistics(reset_real=False)
        self.of_prompts = {"diversity": PromptDiversity(by_diversity), "vendi": VendiScore(by_diversity)}
        self.of_videos = {"flickering": TemporalFlickering(), "motion": MotionAmount()}
        if getattr(second, "kind", None) == "frame":
            self.of_videos["consistency"] = FrameConsistency(by_diversity)

    @property
    def distance_name(self) -> str:
        """`fvd` for I3D's logits, else the extractor's name with `_fd`: never FVD for what is not."""
        name = self.extractors["distance"].name
        return "fvd" if name == FVD_EXTRACTOR else f"{name.replace('-', '_')}_fd"

    def fingerprint(self) -> dict[str, str]:
        """What decides the values besides the videos, for keys of kept statistics."""
        return {name: f"{one.name} {one.fingerprint}" for name, one in self.extractors.items()}

    def to(self, device: torch.device) -> VideoSuite:
        for metric in (self.frechet, self.colour, *self.of_prompts.values(), *self.of_videos.values()):
            metric.to(device)
        return self

    def update_real(self, videos: Tensor) -> None:
        """Add real videos."""
        self.frechet.update(videos, real=True)
        self.colour.update(videos, real=True)

    def real_state(self) -> dict[str, Tensor]:
        """All that is kept of the real videos, over all ranks; every rank must call it."""
        states = {"frechet": self.frechet.real_state(), "colour": self.colour.real_state()}
        return {f"{part}.{name}": value for part, state in states.items() for name, value in state.items()}

    def load_real_state(self, state: Mapping[str, Tensor]) -> None:
        """Take what `real_state` gave, on every rank."""
        for part, metric in (("frechet", self.frechet), ("colour", self.colour)):
            metric.load_real_state(
                {name.partition(".")[2]: value for name, value in state.items() if name.startswith(f"{part}.")}
            )

    def update(self, videos: Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> None:
        """Add sampled videos, B of each; without prompts they count for all but the diversities."""
        self.frechet.update(videos, real=False)
        self.colour.update(videos, real=False)
        frames = spaced_frames(videos)  # once, so that the metrics below share its features
        for metric in self.of_prompts.values() if len(prompts) else ():
            metric.update(frames, prompts, seeds)
        for name, one in self.of_videos.items():
            one.update(frames if name == "consistency" else videos)

    def compute(self, diversity: bool = True) -> dict[str, float]:
        """Every value over all ranks, with `videos` and `real_videos`, how many were measured; the diversities can be
        left out, where no prompt has two seeds.

        Raises:
            ValueError: too few videos, or a prompt with a single seed.
        """
        values = {self.distance_name: self.frechet.compute(), **self.colour.compute()}
        values |= {name: metric.compute() for name, metric in self.of_videos.items()}
        if diversity:
            values |= {name: metric.compute() for name, metric in self.of_prompts.items()}
        counts = {"videos": self.frechet.generated_count, "real_videos": self.frechet.real_count}
        # ratios to the data are left to the reader: to the teacher's values they say more
        kept = {name: float(value) for name, value in values.items() if not name.endswith("_ratio")}
        return kept | {name: float(count) for name, count in counts.items()}

    def reset(self) -> None:
        """Forget the sampled videos; what is kept of the real ones stays."""
        for metric in (self.frechet, self.colour, *self.of_prompts.values(), *self.of_videos.values()):
            metric.reset()


def relative_to_teacher(student: Mapping[str, float], teacher: Mapping[str, float]) -> dict[str, float]:
    """`<name>_ratio`, the student's value over the teacher's, and, with all it needs, `score`; empty without a teacher."""
    ratios = {
        f"{name}_ratio": value / teacher[name]
        for name, value in student.items()
        if teacher.get(name) and name not in ("videos", "real_videos")
    }
    distance = next((name for name in ratios if name.endswith(("fvd_ratio", "_fd_ratio"))), None)
    if distance is None or "diversity_ratio" not in ratios or "saturation_ratio" not in ratios:
        return ratios
    return ratios | {"score": score(ratios[distance], ratios["diversity_ratio"], ratios["saturation_ratio"])}


def score(distance_ratio: float, diversity_ratio: float, saturation_ratio: float) -> float:
    """One number to choose a checkpoint by, lower is better; 0 is as good as the teacher.

    max(0, ln distance ratio) + |ln diversity ratio| + |ln saturation ratio|, each ratio student over teacher: a
    student pays for being further from real videos, for lost (or gained) diversity and for changed saturation alike.
    """
    if min(distance_ratio, diversity_ratio, saturation_ratio) <= 0:
        return math.inf
    return max(0.0, math.log(distance_ratio)) + abs(math.log(diversity_ratio)) + abs(math.log(saturation_ratio))
