"""Metrics against independent plain implementations: SciPy's sqrtm, colorsys, and loops."""

from __future__ import annotations

import colorsys
import copy
import itertools
import pickle
import warnings
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_dfd.evaluation.features.base import FeatureExtractor
from lightning_dfd.evaluation.metrics import (
    CallableExtractor,
    ColourStatistics,
    FrameConsistency,
    FrechetVideoDistance,
    MotionAmount,
    PromptDiversity,
    TemporalFlickering,
    VendiScore,
    adapt,
    as_extractor,
)
from lightning_dfd.evaluation.metrics import functional as FM
from lightning_dfd.evaluation.metrics.base import VideoMetric

Array = NDArray[np.float64]


pytestmark = pytest.mark.filterwarnings("ignore:The ``compute`` method of metric .* was called before")


def make_videos(count: int, frames: int = 3, seed: int = 0, size: int = 4, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(count, 3, frames, size, size, generator=generator) * 2 - 1) * scale


def frame_means(videos: Tensor) -> Tensor:
    """[B, F, 6]: channel means and means of the upper half."""
    return torch.cat([videos.mean((3, 4)), videos[..., :2, :].mean((3, 4))], 1).transpose(1, 2)


def video_means(videos: Tensor) -> Tensor:
    return frame_means(videos).mean(1)


class Projection(nn.Module):
    """A network with what must not show: a parameter, a buffer, dropout, and a layer that autocast would lower."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(9, 5)
        self.norm = nn.BatchNorm1d(5)
        self.dropout = nn.Dropout(0.5)
        self.seen: list[tuple[torch.dtype, bool, bool]] = []

    called: ClassVar[list[Projection]] = []  # copies among them

    def forward(self, videos: Tensor) -> Tensor:
        self.called.append(self)
        out: Tensor = self.dropout(self.norm(self.linear(videos.mean((3, 4)).flatten(1))))
        self.seen.append((out.dtype, out.requires_grad, self.training))
        return out


def gaussians(count: int, length: int, seed: int) -> Array:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, length)) @ rng.normal(size=(length, length)) + rng.normal(size=length)


def sqrtm_distance(a: Array, b: Array) -> float:
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root))


def moments_distance(a: Array, b: Array) -> float:
    of_a, of_b = FM.Moments.of(torch.from_numpy(a)), FM.Moments.of(torch.from_numpy(b))
    return FM.frechet_distance(of_a.mean, of_a.covariance, of_b.mean, of_b.covariance).item()


# Fréchet distance: function


@pytest.mark.parametrize(("count", "tolerance"), [(60, 1e-9), (7, 1e-5)])
def test_distance_equals_scipy(count: int, tolerance: float) -> None:
    a, b = gaussians(count, 12, 0), gaussians(count + 3, 12, 1)
    assert moments_distance(a, b) == pytest.approx(sqrtm_distance(a, b), rel=tolerance)


def test_distance_of_singular_covariances_is_exact() -> None:
    # The trace of the root, from the samples themselves: no covariance and no square root of rounding errors.
    a, b = gaussians(4, 30, 0), gaussians(6, 30, 1)
    x, y = (a - a.mean(0)) / np.sqrt(3), (b - b.mean(0)) / np.sqrt(5)
    root = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + (x**2).sum() + (y**2).sum() - 2 * root
    assert moments_distance(a, b) == pytest.approx(float(expected), rel=1e-10)


def test_distance_in_one_dimension() -> None:
    one = torch.ones(1, 1)
    distance = FM.frechet_distance(torch.tensor([1.0]), 4 * one, torch.tensor([3.0]), 9 * one)
    assert distance.dtype == torch.float64
    assert distance.item() == pytest.approx((3 - 1) ** 2 + (3 - 2) ** 2)


@pytest.mark.parametrize("count", [5, 60])
def test_distance_to_itself_is_zero(count: int) -> None:
    a = gaussians(count, 12, 0)
    assert 0 <= moments_distance(a, a) < 1e-12 * np.trace(np.cov(a, rowvar=False))


def test_distance_of_points_and_of_nan() -> None:
    zero = torch.zeros(3, 3)
    assert FM.frechet_distance(torch.zeros(3), zero, torch.ones(3), zero).item() == 3
    assert FM.frechet_distance(torch.zeros(3), zero * torch.nan, torch.ones(3), zero).isnan()


def test_moments_survive_a_large_mean() -> None:
    a = gaussians(50, 5, 0) + 1000
    np.testing.assert_allclose(FM.Moments.of(torch.from_numpy(a)).covariance, np.cov(a, rowvar=False), rtol=1e-7)


# Fréchet distance: metric


def filled(extractor: object = video_means, **options: object) -> FrechetVideoDistance:
    metric = FrechetVideoDistance(extractor, **{"min_samples": 5} | options)  # type: ignore[arg-type]
    for part in make_videos(11).split([4, 1, 6]):
        metric.update(part, real=True)
    for part in make_videos(9, seed=1, scale=0.8).split([2, 7]):
        metric.update(part, real=False)
    return metric


def expected_distance() -> float:
    real, generated = make_videos(11), make_videos(9, seed=1, scale=0.8)
    return sqrtm_distance(video_means(real).double().numpy(), video_means(generated).double().numpy())


def test_metric_equals_scipy_over_updates() -> None:
    metric = filled()
    value = metric.compute()
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(expected_distance(), rel=1e-9)
    assert (metric.real_count, metric.generated_count) == (11, 9)
    metric.update(make_videos(2), real=True)
    assert (metric.real_count, metric.generated_count) == (13, 9)


def test_features_of_frames_are_averaged() -> None:
    assert filled(frame_means).compute().item() == pytest.approx(expected_distance(), rel=1e-5)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda metric: pickle.loads(pickle.dumps(metric))])
def test_metric_survives_copies(copied: object) -> None:
    metric = filled()
    again = copied(metric)  # type: ignore[operator]
    again.update(make_videos(3, seed=2), real=False)
    metric.update(make_videos(3, seed=2), real=False)
    assert again.compute() == metric.compute()
    assert again.generated_count == 12


CASTS = {
    "to": lambda module: module.to(torch.bfloat16),
    "bfloat16": lambda module: module.bfloat16(),
    "half": lambda module: module.half(),
    "to half": lambda module: module.to(torch.float16),
    "set_dtype": lambda module: [m.set_dtype(torch.bfloat16) for m in module.children() if isinstance(m, VideoMetric)],
}


@pytest.mark.parametrize("cast", CASTS)
def test_states_survive_casts_of_the_module(cast: str) -> None:
    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.distance = filled()
            self.diversity = PromptDiversity(video_means)
            self.diversity.update(make_videos(2), ["a", "a"], [0, 1])

    def fill(parent: Parent) -> tuple[Tensor, Tensor]:
        parent.distance.update(make_videos(3, seed=2), real=False)
        parent.diversity.update(make_videos(2, seed=3), ["a", "a"], [2, 3])
        return parent.distance.compute(), parent.diversity.compute()

    parent = Parent()
    CASTS[cast](parent)
    if cast != "set_dtype":
        assert parent.linear.weight.dtype != torch.float32  # or the cast did not reach the module at all
    assert fill(parent) == fill(Parent())
    assert parent.distance.generated_outer.dtype == torch.float64
    parent.distance.reset()
    assert parent.distance.real_outer.dtype == torch.float64


def test_network_stays_out_of_the_module() -> None:
    network = Projection()
    assert network.norm.running_var is not None
    network.norm.running_var.fill_(2.0)
    metric = filled(network)
    parent = nn.Module()
    parent.metric = metric
    assert not parent.state_dict()
    assert not [*parent.parameters()]
    assert len([*parent.modules()]) == 2
    before = metric.compute()

    parent.train()
    parent.to(torch.bfloat16)
    network.to(torch.bfloat16)  # the user's own, of which the metric holds a copy
    network.train()
    network.linear.weight.data.zero_()
    metric.reset()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.enable_grad():
        for part, real in ((make_videos(11), True), (make_videos(9, seed=1, scale=0.8), False)):
            metric.update(part.requires_grad_(), real=real)
    assert metric.compute().item() == pytest.approx(before.item(), rel=1e-6)
    metric.extractor(make_videos(2).bfloat16())
    inner = Projection.called[-1]
    assert inner is not network
    assert set(inner.seen) == {(torch.float32, False, False)}
    assert all(parameter.grad is None for parameter in inner.parameters())
    assert network.linear.weight.requires_grad, "the user's network was frozen"


def test_copies_share_the_network() -> None:
    metric = filled(Projection())
    assert copy.deepcopy(metric).extractor is metric.extractor


def test_metric_works_in_inference_mode() -> None:
    with torch.inference_mode():
        metric = filled()
        metric.compute()
    metric.update(make_videos(2, seed=5), real=True)
    assert copy.deepcopy(metric).compute() == metric.compute()


@pytest.mark.parametrize(("real", "generated"), [(5, 4), (4, 5), (0, 9), (0, 0)])
def test_too_few_videos_are_refused(real: int, generated: int) -> None:
    metric = FrechetVideoDistance(video_means, min_samples=5)
    for count, side in ((real, True), (generated, False)):
        if count:
            metric.update(make_videos(count), real=side)
    with pytest.raises(ValueError, match=f"{real} real and {generated} generated videos; needs 5 or more") as error:
        metric.compute()
    assert "min_samples" in str(error.value)
    assert (metric.real_count, metric.generated_count) == (real, generated)


def test_wrong_videos_and_lengths_are_refused() -> None:
    metric = FrechetVideoDistance(video_means, min_samples=2)
    with pytest.raises(ValueError, match=r"shape \[2, 3, 3, 4, 4\].*float \[B, 3, F, H, W\]"):
        metric.update(make_videos(2).byte(), real=True)
    with pytest.raises(ValueError, match=r"shape \[2, 8, 3, 4, 4\]"):
        metric.update(make_videos(2, frames=8).transpose(1, 2), real=True)
    changing = FrechetVideoDistance(lambda videos: videos.mean((3, 4)).flatten(1), min_samples=2)
    changing.update(make_videos(3, frames=2), real=True)
    with pytest.raises(ValueError, match=r"lengths \[6, 9\]"):
        changing.update(make_videos(3, frames=3), real=True)
    changing.update(make_videos(3, frames=3), real=False)
    with pytest.raises(ValueError, match=r"lengths \[6\] and \[9\]"):
        changing.compute()
    with pytest.raises(ValueError, match="min_samples=1"):
        FrechetVideoDistance(video_means, min_samples=1)


def test_nan_features_give_nan() -> None:
    metric = filled()
    metric.update(make_videos(1) * torch.nan, real=False)
    assert metric.compute().isnan()


@pytest.mark.parametrize("reset_real", [True, False])
def test_reset_keeps_the_real_side_if_asked(reset_real: bool) -> None:
    metric = filled(reset_real=reset_real)
    metric.compute()
    metric.reset()
    assert (metric.real_count, metric.generated_count) == (0 if reset_real else 11, 0)
    if not reset_real:
        metric.update(make_videos(9, seed=1, scale=0.8), real=False)
        assert metric.compute().item() == pytest.approx(expected_distance(), rel=1e-9)


@pytest.mark.parametrize("reset_real", [True, False])
def test_real_side_goes_through_a_file(tmp_path: Path, reset_real: bool) -> None:
    save_file(filled().real_state(), tmp_path / "real.safetensors")
    metric = FrechetVideoDistance(video_means, min_samples=5, reset_real=reset_real)
    metric.update(make_videos(4, seed=7), real=True)  # replaced by what is loaded
    metric.load_real_state(load_file(tmp_path / "real.safetensors"))
    metric.update(make_videos(9, seed=1, scale=0.8), real=False)
    assert metric.real_count == 11
    assert metric.compute().item() == pytest.approx(expected_distance(), rel=1e-9)
    # Real videos that follow are added, and all of it is handed on.
    whole = filled()
    for one in (metric, whole):
        one.update(make_videos(3, seed=9), real=True)
    for part, value in metric.real_state().items():
        torch.testing.assert_close(value, whole.real_state()[part], rtol=1e-12, atol=1e-12)
    metric.reset()
    assert metric.real_count == (0 if reset_real else 14)


def test_loading_what_is_no_state_is_refused() -> None:
    metric, state = filled(), filled().real_state()
    with pytest.raises(ValueError, match="real_state"):
        metric.load_real_state({"n": state["n"]})
    with pytest.raises(ValueError, match=r"'outer': \[6, 5\]"):
        metric.load_real_state(state | {"outer": state["outer"][:, :5]})


def test_loading_makes_compute_anew() -> None:
    metric = filled()
    before = metric.compute()
    other = FrechetVideoDistance(video_means)
    other.update(make_videos(20, seed=5), real=True)
    metric.load_real_state(other.real_state())
    assert metric.compute() != before
    assert metric.real_count == 20


# Adapters


def test_kinds_names_and_fingerprints() -> None:
    extractor = as_extractor(frame_means)
    extractor(make_videos(2))
    assert (extractor.name, extractor.kind) == ("frame_means", "frame")
    network = Projection()
    wrapped = as_extractor(network)
    wrapped(make_videos(2))
    assert (wrapped.name, wrapped.kind) == ("Projection", "video")
    assert as_extractor(network).fingerprint == wrapped.fingerprint
    network.linear.bias.data += 1e-3
    assert as_extractor(network).fingerprint != wrapped.fingerprint
    assert as_extractor(frame_means).fingerprint != extractor.fingerprint
    assert as_extractor(extractor) is extractor


def test_extractors_have_names(monkeypatch: pytest.MonkeyPatch) -> None:
    known = as_extractor(video_means)
    monkeypatch.setattr(adapt, "load_extractor", {"mean": known}.__getitem__)
    assert FrechetVideoDistance("mean").extractor is known


def test_a_source_follows_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, str]]] = []
    known = as_extractor(video_means)
    monkeypatch.setattr(adapt, "load_extractor", lambda name, **where: asked.append((name, where)) or known)
    assert as_extractor("dinov2=/weights/v2.1=b") is known
    assert as_extractor("dinov2") is known
    assert asked == [("dinov2", {"source": "/weights/v2.1=b"}), ("dinov2", {})]
    with pytest.raises(ValueError, match="'dinov2=' names no weights"):
        as_extractor("dinov2=")


class NotMade(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()


def test_extractors_have_import_paths() -> None:
    readings = as_extractor("lightning_dfd.toy.features.WorldReadings")
    assert (readings.name, readings.kind) == ("world-readings", "video")
    module = as_extractor(f"{__name__}.Projection")
    assert isinstance(module, CallableExtractor)
    assert module.fingerprint == as_extractor(Projection()).fingerprint
    torch.testing.assert_close(as_extractor(f"{__name__}.video_means")(make_videos(2)), video_means(make_videos(2)))


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("no_such_package.Thing", "No module named 'no_such_package'"),
        (f"{__name__}.NoSuchThing", "has no attribute 'NoSuchThing'"),
        (f"{__name__}.NotMade", "missing 1 required positional argument: 'size'.*needs no arguments"),
        (f"{__name__}.__doc__", "is a str; need a FeatureExtractor"),
        (".relative", "cannot be imported"),
        ("./weights.pt", "cannot be imported"),
    ],
)
def test_wrong_import_paths_are_answered_in_one_line(path: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as refused:
        as_extractor(path)
    assert path in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("wrong", [lambda v: v, lambda v: (v,), lambda v: v.mean((1, 2, 3, 4)), lambda v: v[0, 0, 0]])
def test_outputs_that_are_no_features_are_refused(wrong: object) -> None:
    with pytest.raises(ValueError, match=r"'<lambda>' gave .* need a tensor \[2, D\]"):
        as_extractor(wrong)(make_videos(2))  # type: ignore[arg-type]


def test_scripted_networks_are_wrapped() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, videos: Tensor) -> Tensor:
            return videos.mean((2, 3, 4)) * self.weight

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(Mean())  # deprecated, but what FVD's usual I3D comes as
    extractor = as_extractor(scripted)
    torch.testing.assert_close(extractor(make_videos(2)), make_videos(2).mean((2, 3, 4)))
    assert len(extractor.fingerprint) == 64


# Diversity


def cosine(a: Array, b: Array) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def loop_diversity(features: Array, groups: list[int]) -> float:
    """Features [N, F, D]; F = 1 for one vector a video."""
    values = []
    for group in set(groups):
        members = [f for f, g in zip(features, groups, strict=True) if g == group]
        pairs = [cosine(a[t], b[t]) for a, b in itertools.combinations(members, 2) for t in range(len(a))]
        values.append(1 - np.mean(pairs))
    return float(np.mean(values))


GROUPS = [3, 8, 3, 3, 8, 8, 8, 5, 5]


def test_diversity_equals_loops_over_pairs() -> None:
    features = gaussians(9, 7, 0)
    value = FM.prompt_diversity(torch.from_numpy(features), torch.tensor(GROUPS))
    assert value.item() == pytest.approx(loop_diversity(features[:, None], GROUPS), rel=1e-12)
    frames = gaussians(36, 7, 1).reshape(9, 4, 7)
    value = FM.prompt_diversity(torch.from_numpy(frames), torch.tensor(GROUPS))
    assert value.item() == pytest.approx(loop_diversity(frames, GROUPS), rel=1e-12)


def test_diversity_has_its_ends() -> None:
    groups = torch.zeros(4, dtype=torch.long)
    assert FM.prompt_diversity(torch.ones(4, 4), groups).item() == pytest.approx(0, abs=1e-15)
    assert FM.prompt_diversity(torch.eye(4), groups).item() == pytest.approx(1)
    # A zero vector has no direction: cosine 0 with the others, and the closed form must not count it as a unit.
    with_zero = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    assert FM.prompt_diversity(with_zero, groups[:3]).item() == pytest.approx(1)
    with pytest.raises(ValueError, match=r"\{0: 2, 1: 1\}"):
        FM.prompt_diversity(torch.ones(3, 2), torch.tensor([0, 0, 1]))


def test_vendi_equals_the_entropy_of_the_kernel() -> None:
    features = gaussians(6, 4, 0)
    kernel = np.array([[cosine(a, b) for b in features] for a in features])
    values = np.linalg.eigvalsh(kernel / 6)
    expected = np.exp(-sum(v * np.log(v) for v in values if v > 1e-12))
    assert FM.vendi_score(torch.from_numpy(features)).item() == pytest.approx(expected, rel=1e-9)
    assert FM.vendi_score(torch.eye(5)).item() == pytest.approx(5)
    assert FM.vendi_score(torch.ones(5, 3)).item() == pytest.approx(1)


@pytest.mark.parametrize(("frames", "expected"), [(3, [0, 1, 2]), (16, [*range(16)]), (31, [*range(0, 31, 2)])])
def test_frames_are_evenly_spaced(frames: int, expected: list[int]) -> None:
    videos = torch.arange(frames).float().view(1, 1, -1, 1, 1).expand(2, 3, -1, 2, 2)
    assert FM.spaced_frames(videos)[0, 0, :, 0, 0].tolist() == expected


def test_spacing_keeps_both_ends() -> None:
    videos = torch.arange(49).float().view(1, 1, -1, 1, 1).expand(2, 3, -1, 2, 2)
    kept = FM.spaced_frames(videos)[0, 0, :, 0, 0].numpy()
    np.testing.assert_array_equal(kept, np.round(np.linspace(0, 48, 16)))


PROMPTS = ["a cat", "日本 – two\nlines", "a cat", "a cat", *["日本 – two\nlines"] * 3, "", ""]
SEEDS = [0, 0, 2**63 - 1, 2**63 - 2, -1, 1, 2, 7, 8]


def fill_prompts(metric: PromptDiversity | VendiScore, frames: int = 3) -> None:
    videos = make_videos(9, frames)
    for part in ([0, 1, 2], [3], [1, 2], [4, 5, 6, 7, 8], [0]):  # rows 0, 1, 2 come twice, as samplers pad
        metric.update(videos[part], [PROMPTS[i] for i in part], [SEEDS[i] for i in part])


@pytest.mark.parametrize(("variant", "frames"), [("video", 3), ("frame", 3), ("video", 20), ("frame", 20)])
def test_diversity_metric_equals_loops(variant: str, frames: int) -> None:
    metric = PromptDiversity(frame_means, variant)  # type: ignore[arg-type]
    fill_prompts(metric, frames)
    videos = make_videos(9, frames)
    features = frame_means(videos[:, :, np.round(np.linspace(0, frames - 1, min(frames, 16)))]).double().numpy()
    if variant == "video":
        features = features.mean(1, keepdims=True)
    expected = loop_diversity(features, GROUPS)
    assert metric.compute().item() == pytest.approx(expected, rel=1e-6)
    assert pickle.loads(pickle.dumps(metric)).compute() == metric.compute()
    assert copy.deepcopy(metric).compute() == metric.compute()


def test_vendi_metric_is_the_mean_over_prompts() -> None:
    metric = VendiScore(video_means)
    fill_prompts(metric)
    features = video_means(make_videos(9)).double()
    parts = [features[[i for i, g in enumerate(GROUPS) if g == group]] for group in set(GROUPS)]
    expected = np.mean([FM.vendi_score(part).item() for part in parts])
    assert metric.compute().item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kind", [PromptDiversity, VendiScore])
def test_prompts_with_one_seed_are_named(kind: type[PromptDiversity] | type[VendiScore]) -> None:
    metric = kind(video_means)
    metric.update(make_videos(4), ["two", "two", "lonely", "lonely"], [0, 1, 5, 5])
    with pytest.raises(ValueError, match=r"1 of 2 prompts have but one seed: \['lonely'\]; need 2") as error:
        metric.compute()
    assert "'two'" not in str(error.value)
    metric.update(make_videos(1, seed=1), ["lonely"], [6])
    assert metric.compute().isfinite()


def test_diversity_refusals() -> None:
    metric = PromptDiversity(frame_means, "frame")
    with pytest.raises(ValueError, match="no videos"):
        metric.compute()
    with pytest.raises(ValueError, match="2 videos, 2 prompts and 1 seeds"):
        metric.update(make_videos(2), ["a", "b"], [0])
    with pytest.raises(ValueError, match="need as many"):
        metric.update(make_videos(2), "ab", [0, 1])
    metric.update(make_videos(2), ["a", "a"], [0, 1])
    with pytest.raises(ValueError, match=r"24 features of 4 frame\(s\) per video, after 18 of 3"):
        metric.update(make_videos(2, frames=4), ["a", "a"], [2, 3])
    with pytest.raises(ValueError, match="got variant 'clip'; need 'video' or 'frame'"):
        PromptDiversity(frame_means, "clip")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'video_means' gives one vector per video"):
        PromptDiversity(video_means, "frame").update(make_videos(2), ["a", "a"], [0, 1])


def test_videos_of_other_lengths_mix_in_the_video_variant() -> None:
    """Each counts by the mean of its frames."""
    metric = PromptDiversity(frame_means)
    videos = make_videos(2, frames=3), make_videos(2, frames=20)
    for part, seeds in zip(videos, ([0, 1], [2, 3]), strict=True):
        metric.update(part, ["a", "a"], seeds)
    features = [row for part in videos for row in frame_means(FM.spaced_frames(part)).mean(1).numpy()]
    expected = 1 - np.mean([cosine(a, b) for a, b in itertools.combinations(features, 2)])
    assert metric.compute().item() == pytest.approx(expected, rel=1e-5)


def test_reset_forgets_prompts() -> None:
    metric = PromptDiversity(video_means)
    metric.update(make_videos(1), ["lonely"], [0])
    metric.reset()
    fresh = PromptDiversity(video_means)
    for one in (metric, fresh):
        fill_prompts(one)
    assert metric.compute() == fresh.compute()


# Colour


def colour_clips() -> Tensor:
    """Random colours, with whole 8-bit values, some at the ends, and one clip of greys."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-40, 296, (3, 3, 2, 4, 4), generator=generator).clamp(0, 255)
    values[2] = values[2, :1].clone()
    values[0, :, 0, 0, 0] = 0
    return values / 127.5 - 1


def pixels(clip: Tensor) -> Array:
    """[F, pixels, 3] in 0..255."""
    values = (clip.double().numpy() + 1) * 127.5
    return np.ascontiguousarray(values.transpose(1, 2, 3, 0).reshape(values.shape[1], -1, 3).round())


def loop_saturations(clip: Tensor) -> list[float]:
    return [colorsys.rgb_to_hsv(*(pixel / 255))[1] for pixel in pixels(clip).reshape(-1, 3)]


def test_saturation_equals_colorsys() -> None:
    clips = colour_clips()
    expected = [np.mean(loop_saturations(clip)) for clip in clips]
    np.testing.assert_allclose(FM.saturation(clips), expected, rtol=1e-5, atol=1e-6)
    histogram = FM.saturation_histogram(clips + 1e-7, bins=7)
    for row, clip in zip(histogram, clips, strict=True):
        counts, _ = np.histogram(np.clip(np.array(loop_saturations(clip)) + 1e-7, 0, 1), bins=7, range=(0, 1))
        np.testing.assert_allclose(row, counts / counts.sum(), atol=1e-12)


def test_ends_of_the_histogram() -> None:
    red, grey = torch.tensor([1.0, -1.0, -1.0]), torch.zeros(3)
    for colour, index in ((red, 31), (grey, 0)):
        histogram = FM.saturation_histogram(colour.view(1, 3, 1, 1, 1).expand(1, 3, 2, 4, 4))
        assert histogram[0, index] == 1
        assert histogram.shape == (1, 32)


def test_histogram_distance_equals_scipy() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random(32), rng.random(32)
    centres = (np.arange(32) + 0.5) / 32
    expected = scipy.stats.wasserstein_distance(centres, centres, a, b)
    assert FM.histogram_distance(torch.from_numpy(a), torch.from_numpy(b)).item() == pytest.approx(expected)


def test_colourfulness_contrast_and_clipping_equal_loops() -> None:
    clips = colour_clips()
    for index, clip in enumerate(clips):
        colourful, contrast, clipped = [], [], []
        for frame in pixels(clip):
            rg = [r - g for r, g, _ in frame]
            yb = [0.5 * (r + g) - b for r, g, b in frame]
            colourful.append(np.hypot(np.std(rg), np.std(yb)) + 0.3 * np.hypot(np.mean(rg), np.mean(yb)))
            contrast.append(np.std([(0.299 * r + 0.587 * g + 0.114 * b) / 255 for r, g, b in frame]))
            clipped += [any(value in (0, 255) for value in pixel) for pixel in frame]
        assert FM.colourfulness(clips)[index].item() == pytest.approx(np.mean(colourful), rel=1e-4, abs=1e-4)
        assert FM.contrast(clips)[index].item() == pytest.approx(np.mean(contrast), rel=1e-4)
        assert FM.clipped_share(clips)[index].item() == pytest.approx(np.mean(clipped))
    assert 0 < FM.clipped_share(clips).min() < FM.clipped_share(clips).max() < 1


def test_only_what_8_bits_write_as_an_end_is_clipped() -> None:
    values = torch.tensor([0.0, 0.4, 0.6, 128.0, 254.4, 254.6, 255.0, 300.0])
    clip = torch.full((1, 3, 1, 1, 8), 100 / 127.5 - 1)
    clip[0, 1, 0, 0] = values / 127.5 - 1
    assert FM.clipped_share(clip).item() == pytest.approx(5 / 8)


@pytest.mark.parametrize("measure", [FM.saturation, FM.colourfulness, FM.contrast, FM.clipped_share])
def test_colours_beyond_the_range_are_cut(measure: object) -> None:
    videos = make_videos(2, scale=1.5)
    torch.testing.assert_close(measure(videos), measure(videos.clamp(-1, 1)))  # type: ignore[operator]


def test_colour_metric() -> None:
    real, generated = make_videos(4, scale=0.5), make_videos(5, seed=1)
    metric = ColourStatistics()
    for part, side in ((real[:1], True), (generated[:3], False), (real[1:], True), (generated[3:], False)):
        metric.update(part, real=side)
    result = metric.compute()
    for name in ("saturation", "colourfulness", "contrast", "clipped_share"):
        measure = getattr(FM, name)
        assert result[name].item() == pytest.approx(measure(generated).mean().item(), rel=1e-6)
        ratio = np.float64(measure(generated).mean().item()) / np.float64(measure(real).mean().item() or np.nan)
        assert result[f"{name}_ratio"].item() == pytest.approx(ratio, rel=1e-6) or np.isnan(ratio)
    histograms = [FM.saturation_histogram(videos).mean(0) for videos in (generated, real)]
    assert result["saturation_distance"].item() == pytest.approx(FM.histogram_distance(*histograms).item())
    assert result["saturation_ratio"] > 1.2, "the generated videos have more saturation by construction"
    assert result["clipped_share_ratio"].isinf(), "no real pixel is at an end"


def test_equal_sides_have_ratio_one() -> None:
    metric = ColourStatistics()
    metric.update(make_videos(4), real=True)
    metric.update(make_videos(4), real=False)
    result = metric.compute()
    assert result["saturation_distance"] == 0
    assert all(value == 1 for name, value in result.items() if name.endswith("ratio"))


@pytest.mark.parametrize("reset_real", [True, False])
def test_colour_reference_goes_through_a_file(tmp_path: Path, reset_real: bool) -> None:
    source = ColourStatistics()
    source.update(make_videos(4, scale=0.5), real=True)
    save_file(source.real_state(), tmp_path / "real.safetensors")
    source.update(make_videos(3, seed=1), real=False)
    metric = ColourStatistics(reset_real=reset_real)
    metric.update(make_videos(2, seed=5), real=True)  # replaced by what is loaded
    metric.load_real_state(load_file(tmp_path / "real.safetensors"))
    for _ in range(2):
        metric.update(make_videos(3, seed=1), real=False)
        assert metric.compute() == source.compute()
        metric.reset()
        if reset_real:
            with pytest.raises(ValueError, match="0 real and 0 generated"):
                metric.compute()
            break
    with pytest.raises(ValueError, match=r"need sums \[37\]"):
        metric.load_real_state({"sums": torch.zeros(3)})


@pytest.mark.parametrize("real", [True, False])
def test_colour_needs_a_reference(real: bool) -> None:
    metric = ColourStatistics()
    metric.update(make_videos(2), real=real)
    counts = "2 real and 0" if real else "0 real and 2"
    with pytest.raises(ValueError, match=f"{counts} generated.*update"):
        metric.compute()


# Time


def test_flickering_and_motion_equal_loops() -> None:
    videos = make_videos(3, frames=5)
    for index, video in enumerate((videos.double().numpy() + 1) * 127.5):
        mad = np.mean([np.abs(video[:, t + 1] - video[:, t]).mean() for t in range(4)])
        assert FM.temporal_flickering(videos)[index].item() == pytest.approx((255 - mad) / 255, rel=1e-6)
        assert FM.motion(videos)[index].item() == pytest.approx(mad / 255, rel=1e-5)
    still = videos[:, :, :1].expand(-1, -1, 4, -1, -1)
    assert FM.temporal_flickering(still).tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match=r"1 frame\(s\); need at least 2"):
        FM.temporal_flickering(videos[:, :, :1])


def test_consistency_equals_vbench_loops() -> None:
    features = gaussians(30, 4, 0).reshape(6, 5, 4)
    for index, frames in enumerate(features):
        values = [
            (max(0.0, cosine(frames[0], frames[t])) + max(0.0, cosine(frames[t - 1], frames[t]))) / 2
            for t in range(1, 5)
        ]
        result = FM.frame_consistency(torch.from_numpy(features))[index].item()
        assert result == pytest.approx(np.mean(values), rel=1e-9)
    with pytest.raises(ValueError, match=r"\[6, 1, 4\]; need \[B, F, D\]"):
        FM.frame_consistency(torch.from_numpy(features[:, :1]))


@pytest.mark.parametrize(
    ("metric", "values"),
    [
        (TemporalFlickering(), FM.temporal_flickering),
        (MotionAmount(), FM.motion),
        (FrameConsistency(frame_means), lambda videos: FM.frame_consistency(frame_means(videos))),
    ],
)
def test_means_over_videos(metric: VideoMetric, values: object) -> None:
    with pytest.raises(ValueError, match="has seen no videos"):
        metric.compute()
    videos = make_videos(7)
    for part in videos.split([1, 4, 2]):
        metric(part)  # as a call, too, it only adds
    expected = values(videos).double().mean().item()  # type: ignore[operator]
    assert metric.compute().item() == pytest.approx(expected, rel=1e-6)
    assert pickle.loads(pickle.dumps(metric)).compute() == metric.compute()


def test_consistency_needs_frames() -> None:
    with pytest.raises(ValueError, match="one per frame"):
        FrameConsistency(video_means).update(make_videos(2))


def test_videos_may_be_of_half_precision() -> None:
    videos = make_videos(4).bfloat16()
    metric = ColourStatistics()
    metric.update(videos, real=True)
    metric.update(videos.float(), real=False)
    assert metric.compute()["saturation_ratio"] == 1
    torch.testing.assert_close(FM.motion(videos), FM.motion(videos.float()))


def test_a_feature_extractor_is_taken_as_it_is() -> None:
    class Means(FeatureExtractor):
        name, kind, fingerprint = "means", "video", "0"

        def __call__(self, videos: Tensor) -> Tensor:
            return video_means(videos)

    extractor = Means()
    assert filled(extractor).compute().item() == pytest.approx(expected_distance(), rel=1e-9)
    assert filled(extractor).extractor is extractor
