"""The metrics that a run logs, `lightning evaluate` prints and the study tabulates: one set, one place.

Axis legend: B videos [B, 3, F, H, W] in [-1, 1].
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_dfd.evaluation.features.base import FeatureExtractor
from lightning_dfd.evaluation.metrics.adapt import Extractor, as_extractor
from lightning_dfd.evaluation.metrics.base import VideoMetric
from lightning_dfd.evaluation.metrics.colour import ColourStatistics
from lightning_dfd.evaluation.metrics.diversity import PromptDiversity, VendiScore
from lightning_dfd.evaluation.metrics.frechet import FrechetVideoDistance
from lightning_dfd.evaluation.metrics.functional.diversity import spaced_frames
from lightning_dfd.evaluation.metrics.temporal import FrameConsistency, MotionAmount, TemporalFlickering

FVD_EXTRACTOR = "i3d-logits"  # the only one whose Frechet distance is called FVD


class Remembering(FeatureExtractor):
    """An extractor that several metrics share: features of the latest videos are not computed again."""

    def __init__(self, extractor: FeatureExtractor) -> None:
        self.extractor, self.name, self.fingerprint = extractor, extractor.name, extractor.fingerprint
        self._videos: weakref.ref[Tensor] | None = None
        self._features: Tensor | None = None

    def __call__(self, videos: Tensor) -> Tensor:
        if self._features is None or self._videos is None or self._videos() is not videos:
            self._videos, self._features = weakref.ref(videos), self.extractor(videos)
        return self._features

    def forget(self) -> None:
        """Before another batch: it may lie in the same tensor."""
        self._videos = self._features = None

    @property
    def may_know_frames(self) -> bool:
        """Whether features are a frame's, or nothing is known yet, as of a function that was never called."""
        return getattr(self.extractor, "kind", "frame") == "frame"


class VideoSuite:
    """Frechet distance, diversity, colour, flickering and motion of one set of videos beside real ones.

    The distance is of whole videos; diversities and consistency are of 16 evenly spaced frames of each.

    Args:
        distance: extractor of the Frechet distance, as `as_extractor` takes it.
        diversity: extractor of the diversities; if its features are a frame's, also of the consistency of frames.
        min_videos: on either side; see `FrechetVideoDistance`.
    """

    def __init__(self, distance: Extractor, diversity: Extractor, min_videos: int = 64) -> None:
        by_distance = Remembering(as_extractor(distance))
        by_diversity = by_distance if diversity == distance else Remembering(as_extractor(diversity))
        self.extractors = {"distance": by_distance, "diversity": by_diversity}
        self.frechet = FrechetVideoDistance(by_distance, min_videos, reset_real=False)
        self.colour = ColourStatistics(reset_real=False)
        self.of_prompts = {"diversity": PromptDiversity(by_diversity), "vendi": VendiScore(by_diversity)}
        self.of_videos = {"flickering": TemporalFlickering(), "motion": MotionAmount()}
        self.consistency = FrameConsistency(by_diversity)  # stays empty if the extractor knows no frames

    @property
    def distance_name(self) -> str:
        """`fvd` for I3D's logits, else the extractor's name with `_fd`: never FVD for what is not."""
        name = self.extractors["distance"].name
        return "fvd" if name == FVD_EXTRACTOR else f"{name.replace('-', '_')}_fd"

    def fingerprint(self) -> dict[str, str]:
        """What decides the values besides the videos, for keys of kept statistics."""
        return {name: f"{one.name} {one.fingerprint}" for name, one in self.extractors.items()}

    @property
    def _metrics(self) -> tuple[VideoMetric, ...]:
        return self.frechet, self.colour, *self.of_prompts.values(), *self.of_videos.values(), self.consistency

    def to(self, device: torch.device) -> VideoSuite:
        for metric in self._metrics:
            metric.to(device)
        return self

    def update_real(self, videos: Tensor) -> None:
        """Add real videos."""
        self._forget()
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
        self._forget()
        self.frechet.update(videos, real=False)
        self.colour.update(videos, real=False)
        for one in self.of_videos.values():
            one.update(videos)
        frames = spaced_frames(videos)  # once, so that the metrics below share its features
        for metric in self.of_prompts.values() if len(prompts) else ():
            metric.update(frames, prompts, seeds)
        by_diversity = self.extractors["diversity"]
        if by_diversity.may_know_frames and by_diversity(frames).ndim == 3:
            self.consistency.update(frames)

    def _forget(self) -> None:
        for extractor in self.extractors.values():
            extractor.forget()

    def compute(self, diversity: bool = True) -> dict[str, float]:
        """Every value over all ranks, with `videos` and `real_videos`, how many were measured; every rank must call it.

        Args:
            diversity: whether to compute the diversities, which need two seeds of every prompt.

        Raises:
            ValueError: too few videos, or a prompt with a single seed.
        """
        values = {self.distance_name: self.frechet.compute(), **self.colour.compute()}
        values |= {name: metric.compute() for name, metric in self.of_videos.items()}
        with self.consistency.sync_context():  # a rank without videos has not seen what kind the features are
            consistent = bool(self.consistency.n)
        if consistent:
            values["consistency"] = self.consistency.compute()
        if diversity:
            values |= {name: metric.compute() for name, metric in self.of_prompts.items()}
        counts = {"videos": self.frechet.generated_count, "real_videos": self.frechet.real_count}
        # ratios to the data are left to the reader: to the teacher's values they say more
        kept = {name: float(value) for name, value in values.items() if not name.endswith("_ratio")}
        return kept | {name: float(count) for name, count in counts.items()}

    def reset(self) -> None:
        """Forget the sampled videos; what is kept of the real ones stays."""
        for metric in self._metrics:
            metric.reset()


def relative_to_teacher(student: Mapping[str, float], teacher: Mapping[str, float]) -> dict[str, float]:
    """`<name>_ratio`, the student's value over the teacher's, and, with all it needs, `score`; empty without a teacher.

    A measure of which the teacher has none, or 0, has no ratio.
    """
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
    Infinite where a ratio is 0, negative or NaN, so that no broken student is ever chosen.
    """
    if not all(ratio > 0 for ratio in (distance_ratio, diversity_ratio, saturation_ratio)):
        return math.inf
    return max(0.0, math.log(distance_ratio)) + abs(math.log(diversity_ratio)) + abs(math.log(saturation_ratio))
