"""The toy world, the code that measures it, and the teacher that ships with the package."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import CogVideoXPipeline, DiffusionPipeline

import lightning_dfd.toy
from lightning_dfd.toy import measure, world
from lightning_dfd.toy.features import READINGS, WorldReadings
from lightning_dfd.toy.train_teacher import GUIDANCE, judge_teacher

TEACHER = Path(lightning_dfd.toy.__file__).parent / "teacher"
FACTORS = ("shape", "colour", "direction", "background", "speed")


@pytest.mark.slow(seconds=2)
@pytest.mark.parametrize("noise", [0.0, 8.0])
def test_measuring_agrees_with_the_worlds_ground_truth(noise: float) -> None:
    scenes, clips = world.draw_clips(300, seed=11)
    rng = np.random.default_rng(0)
    seen = np.clip(clips + rng.normal(0, noise, clips.shape), 0, 255).astype(np.uint8)
    readings = [measure.read_clip(clip) for clip in seen]
    for factor in FACTORS:
        right = [getattr(a, factor) == getattr(b, factor) for a, b in zip(readings, scenes, strict=True)]
        assert np.mean(right) >= 0.99, factor


@pytest.mark.slow(seconds=8)
def test_shares_of_the_world_are_measured_as_they_are() -> None:
    scenes, clips = world.draw_clips(1500, seed=5)
    report = measure.compare_with_world(clips, [scene.caption for scene in scenes])
    assert report.obedience >= 0.99
    assert max(report.worst_gap.values()) < 0.04
    for shares in (world.DIRECTION_SHARES, world.BACKGROUND_SHARES, world.SPEED_SHARES):
        assert sum(shares.values()) == pytest.approx(1.0)


def test_disobedience_and_collapse_are_seen() -> None:
    scenes, clips = world.draw_clips(60, seed=3)
    captions = [scene.caption for scene in scenes]
    wrong = [world.caption("red" if "blue" in text else "blue", "square") for text in captions]
    assert measure.compare_with_world(clips, wrong).obedience < 0.2
    same = np.stack([clips[0]] * 60)
    assert measure.compare_with_world(same, captions).worst_gap["direction"] > 0.5


def test_what_is_no_shape_is_read_as_none() -> None:
    rng = np.random.default_rng(0)
    for clip in (
        np.full((world.FRAMES, world.SIZE, world.SIZE, 3), 120, np.uint8),
        rng.integers(0, 255, (world.FRAMES, world.SIZE, world.SIZE, 3)).astype(np.uint8),
    ):
        assert measure.read_clip(clip).shape == measure.NOTHING
    still = np.stack([world.draw_clips(1, seed=1)[1][0, 0]] * world.FRAMES)
    assert measure.read_clip(still).direction == measure.NOTHING


def test_shapes_stay_in_the_frame() -> None:
    for seed in range(200):
        scene = world.draw_scene(np.random.default_rng(seed))
        half = world.HALF_WIDTH[scene.shape] * scene.size
        for progress in (0.0, scene.travel):
            for start, step in zip((scene.x, scene.y), world.STEP[scene.direction], strict=True):
                assert start + step * progress - half >= 0.5, scene
                assert start + step * progress + half <= world.SIZE - 0.5, scene


def test_every_factor_changes_the_picture() -> None:
    scene = world.draw_scene(np.random.default_rng(0))
    clip = world.render(scene)
    others: dict[str, Any] = {
        "shape": next(s for s in world.SHAPES if s != scene.shape),
        "colour": next(c for c in world.COLOURS if c != scene.colour),
        "direction": next(d for d in world.DIRECTION_SHARES if d != scene.direction),
        "background": next(b for b in world.BACKGROUND_SHARES if b != scene.background),
        "travel": next(t for t in world.TRAVEL.values() if t != scene.travel),
        "x": scene.x + 1,
        "y": scene.y + 1,
    }
    for factor, value in others.items():
        assert not np.array_equal(world.render(replace(scene, **{factor: value})), clip), factor


def test_the_teacher_is_small_and_genuine() -> None:
    size = sum(path.stat().st_size for path in TEACHER.rglob("*") if path.is_file())
    assert size <= 8 * 2**20
    assert not list(TEACHER.rglob("*.bin"))
    assert type(DiffusionPipeline.from_pretrained(TEACHER, dtype=torch.float32)) is CogVideoXPipeline


@pytest.mark.slow
def test_the_teacher_knows_its_world() -> None:
    """The gate that makes it a teacher: 50-step guided samples show the colour and the shape of their captions, and
    move in every direction by about the world's shares. Measured on 600 clips: .998 and .02 (docs/toy.md); the share
    of 60 clips has a standard deviation of .06."""
    pipe = DiffusionPipeline.from_pretrained(TEACHER, dtype=torch.float32)
    report = judge_teacher(pipe, clips=60, guidance=GUIDANCE)
    assert report.obedience >= 0.9
    assert report.worst_gap["direction"] <= 0.15


@pytest.mark.slow(seconds=2)
@pytest.mark.parametrize("clip", [np.full((9, 32, 32, 3), 90, np.uint8), world.draw_clips(1, seed=4)[1][0]])
def test_readings_are_finite_and_at_the_worlds_scale(clip: Any) -> None:
    extractor = WorldReadings()
    features = extractor(torch.from_numpy(clip[None]).permute(0, 4, 1, 2, 3).float() / 127.5 - 1)
    assert features.shape == (1, len(READINGS))
    assert features.abs().max() < 20
    clips = torch.from_numpy(world.draw_clips(200, seed=9)[1]).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    named = dict(zip(READINGS, extractor(clips).std(0).tolist(), strict=True))
    assert all(0.8 < value < 1.2 for name, value in named.items() if "area" not in name), named
