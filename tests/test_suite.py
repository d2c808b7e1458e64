"""The suite against the single metrics, and what is made of a student's and its teacher's values."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_dfd.evaluation.features import FeatureExtractor, FeatureKind
from lightning_dfd.evaluation.metrics import (
    ColourStatistics,
    FrameConsistency,
    FrechetVideoDistance,
    MotionAmount,
    PromptDiversity,
    TemporalFlickering,
    VendiScore,
    VideoSuite,
    relative_to_teacher,
    score,
)

PROMPTS = ["a cat", "a dog"] * 3
SEEDS = [0, 0, 1, 1, 2, 2]


def make_videos(count: int, seed: int, frames: int = 3) -> Tensor:
    return torch.rand(count, 3, frames, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1


class Means(FeatureExtractor):
    """Cheap features that count how often, and of how many frames, they were asked for."""

    fingerprint = "1"

    def __init__(self, kind: FeatureKind = "frame", name: str = "channel-means") -> None:
        self.kind, self.name = kind, name
        self.seen: list[int] = []

    def __call__(self, videos: Tensor) -> Tensor:
        self.seen.append(videos.shape[2])
        features = torch.cat([videos.mean((3, 4)), videos[..., :2, :].mean((3, 4))], 1).transpose(1, 2)
        return features.mean(1) if self.kind == "video" else features


def filled(suite: VideoSuite, frames: int = 3) -> VideoSuite:
    suite.update_real(make_videos(7, 1, frames))
    sampled = make_videos(6, 2, frames)
    for part in (slice(0, 4), slice(4, 6)):
        suite.update(sampled[part], PROMPTS[part], SEEDS[part])
    return suite


@pytest.mark.parametrize("frames", [3, 20])
def test_values_are_those_of_the_single_metrics(frames: int) -> None:
    real, sampled = make_videos(7, 1, frames), make_videos(6, 2, frames)
    distance, colour = FrechetVideoDistance(Means("video"), min_samples=5), ColourStatistics()
    for metric in (distance, colour):
        metric.update(real, real=True)
        metric.update(sampled, real=False)
    expected = {"channel_means_fd": distance.compute(), "videos": 6, "real_videos": 7}
    expected |= {name: value for name, value in colour.compute().items() if not name.endswith("_ratio")}
    for name, whole in {"flickering": TemporalFlickering(), "motion": MotionAmount()}.items():
        whole.update(sampled)
        expected[name] = whole.compute()
    for name, prompted in {"diversity": PromptDiversity(Means()), "vendi": VendiScore(Means())}.items():
        prompted.update(sampled, PROMPTS, SEEDS)
        expected[name] = prompted.compute()
    consistency = FrameConsistency(Means())
    spaced = torch.linspace(0, frames - 1, min(frames, 16)).round().long()  # consistency is of the frames of eq. 26
    consistency.update(sampled[:, :, spaced])
    expected["consistency"] = consistency.compute()

    suite = filled(VideoSuite(Means("video"), Means(), min_videos=5), frames)
    values = suite.compute()
    assert values == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-9)
    assert set(suite.compute(diversity=False)) == set(values) - {"diversity", "vendi"}


def test_features_are_made_once_a_batch() -> None:
    distance, diversity = Means("video"), Means()
    filled(VideoSuite(distance, diversity, min_videos=5))
    assert (len(distance.seen), len(diversity.seen)) == (3, 2)  # one batch of real videos, two of sampled ones
    both = Means()
    filled(VideoSuite(both, both, min_videos=5))
    assert both.seen == [3, 3, 3]
    both = Means()
    filled(VideoSuite(both, both, min_videos=5), frames=20)  # the distance is of whole videos
    assert both.seen == [20, 20, 16, 20, 16]


def test_a_batch_may_lie_where_the_last_one_lay() -> None:
    real, sampled, place = make_videos(7, 1), make_videos(6, 2), torch.empty(3, 3, 3, 4, 4)
    suite = VideoSuite(extractor := Means(), extractor, min_videos=5)
    suite.update_real(real)
    for part in (slice(0, 3), slice(3, 6)):
        suite.update(place.copy_(sampled[part]), PROMPTS[part], SEEDS[part])
    assert suite.compute() == pytest.approx(filled(VideoSuite(Means(), Means(), min_videos=5)).compute(), rel=1e-9)


def test_consistency_is_there_whenever_features_are_of_frames() -> None:
    def frame_means(videos: Tensor) -> Tensor:  # its kind is known after the first call
        return videos.mean((3, 4)).transpose(1, 2)

    def video_means(videos: Tensor) -> Tensor:
        return videos.mean((2, 3, 4))

    values = filled(VideoSuite(frame_means, frame_means, min_videos=5)).compute()
    consistency = FrameConsistency(frame_means)
    consistency.update(make_videos(6, 2))
    assert values["consistency"] == pytest.approx(consistency.compute().item(), rel=1e-9)
    assert "consistency" not in filled(VideoSuite(video_means, video_means, min_videos=5)).compute()

    suite = VideoSuite(Means("video"), Means("video"), min_videos=5)
    suite.update_real(make_videos(7, 1))
    suite.update(make_videos(6, 2), [], [])  # of no prompts: they count for all but the diversities
    assert {"channel_means_fd", "motion"} < set(suite.compute(diversity=False))
    assert len(suite.extractors["diversity"].extractor.seen) == 0


def test_real_side_goes_through_a_file_and_survives_reset(tmp_path: Path) -> None:
    whole = filled(VideoSuite(Means(), Means(), min_videos=5))
    expected = whole.compute()
    save_file(whole.real_state(), tmp_path / "real.safetensors")
    suite = VideoSuite(Means(), Means(), min_videos=5)
    suite.load_real_state(load_file(tmp_path / "real.safetensors"))
    for one in (suite, whole):
        one.reset()
        one.update(make_videos(6, 2), PROMPTS, SEEDS)
        assert one.compute() == pytest.approx(expected, rel=1e-9)


def test_too_few_videos_are_refused() -> None:
    with pytest.raises(ValueError, match="7 real and 6 generated videos; needs 8"):
        filled(VideoSuite(Means(), Means(), min_videos=8)).compute()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("i3d-logits", "fvd"),
        ("vjepa2", "vjepa2_fd"),
        ("efficientnet-lite0", "efficientnet_lite0_fd"),
        ("fvd", "fvd_fd"),
    ],
)
def test_only_i3d_makes_an_fvd(name: str, expected: str) -> None:
    suite = VideoSuite(Means(name=name), Means(), min_videos=5)
    assert suite.distance_name == expected
    assert suite.fingerprint() == {"distance": f"{name} 1", "diversity": "channel-means 1"}


def test_a_student_is_related_to_its_teacher() -> None:
    teacher = {"fvd": 100.0, "diversity": 0.4, "saturation": 0.5, "clipped_share": 0.0, "videos": 64.0}
    student = {"fvd": 200.0, "diversity": 0.2, "saturation": 0.6, "clipped_share": 0.1, "videos": 64.0, "vendi": 2.0}
    found = relative_to_teacher(student, teacher)
    assert found.pop("score") == pytest.approx(math.log(2) + math.log(2) + math.log(1.2))
    assert found == pytest.approx({"fvd_ratio": 2.0, "diversity_ratio": 0.5, "saturation_ratio": 1.2})
    assert relative_to_teacher(student, {}) == {}
    del student["diversity"]
    assert "score" not in relative_to_teacher(student, teacher)
    assert relative_to_teacher({"clip_fd": 3.0}, {"clip_fd": 2.0}) == {"clip_fd_ratio": 1.5}


def test_score_by_hand() -> None:
    assert score(1, 1, 1) == 0
    assert score(0.5, 1, 1) == 0  # nearer to real videos than the teacher is no merit of a copy
    assert score(math.e, 1 / math.e, math.e) == pytest.approx(3)
    assert score(1, math.e, 1) == pytest.approx(1)  # diversity gained is as far from the teacher as diversity lost
    for broken in (0.0, -1.0, math.nan, math.inf):
        assert score(broken, 1, 1) == score(1, broken, 1) == score(1, 1, broken) == math.inf
