"""The toy world, the code that measures it, and the teacher that ships with the package."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline, DiffusionPipeline

from lightning_dfd.toy import measure, world
from lightning_dfd.toy.features import READINGS, WorldReadings
from lightning_dfd.toy.judge_teacher import GUIDANCE, TEACHER, WAYS, broken_bounds, judge_teacher, table_of
from lightning_dfd.toy.train_teacher import to_model


def truth_of(scene: world.Scene) -> dict[str, str]:
    """What a scene shows, found by rendering's own numbers and not by the reading code."""
    across = scene.y if scene.direction in ("left", "right") else scene.x
    return {
        "shape": scene.shape,
        "colour": scene.colour,
        "direction": scene.direction,
        "background": scene.background,
        "speed": next(name for name, travel in world.TRAVEL.items() if travel == scene.travel),
        "lane": next(name for name, lane in world.LANES.items() if lane == across),
        "path": "curved" if scene.turn else "straight",
    }


def right_readings(scenes: list[world.Scene], clips: np.ndarray) -> dict[str, float]:
    """The share of clips in which each factor is read as the scene has it."""
    readings = [measure.read_clip(clip) for clip in clips]
    truths = [truth_of(scene) for scene in scenes]
    return {
        factor: float(np.mean([getattr(r, factor) == t[factor] for r, t in zip(readings, truths, strict=True)]))
        for factor in truths[0]
    }


@pytest.mark.slow(seconds=2)
@pytest.mark.parametrize("noise", [0.0, 8.0])
def test_every_factor_is_read_from_pixels(noise: float) -> None:
    scenes, clips = world.draw_clips(300, seed=11)
    seen = np.clip(clips + np.random.default_rng(0).normal(0, noise, clips.shape), 0, 255).astype(np.uint8)
    assert min(right_readings(scenes, seen).values()) >= 0.98
    strengths = [measure.read_clip(clip).strength for clip in seen]
    assert np.mean(np.abs(np.array(strengths) - [scene.strength for scene in scenes])) < (0.005 if noise == 0 else 0.06)


@pytest.mark.slow(seconds=10)
def test_every_factor_is_read_through_the_teachers_vae() -> None:
    scenes, clips = world.draw_clips(240, seed=12)
    vae: Any = AutoencoderKLCogVideoX.from_pretrained(TEACHER, subfolder="vae", torch_dtype=torch.float32)
    with torch.no_grad():
        decoded = torch.cat(
            [vae.decode(vae.encode(part).latent_dist.mode()).sample for part in to_model(clips).split(60)]
        )
    seen = ((decoded.permute(0, 2, 3, 4, 1) + 1) * 127.5).round().clamp(0, 255).byte().numpy()
    assert min(right_readings(scenes, seen).values()) >= 0.95
    strength = np.nanmean([measure.read_clip(clip).strength for clip in seen])
    assert strength == pytest.approx(np.mean([scene.strength for scene in scenes]), rel=0.03)


@pytest.mark.slow(seconds=8)
def test_the_world_is_drawn_by_its_law() -> None:
    """Six standard errors of a share of 1500 clips are below .08; of a caption's 125, below .27."""
    scenes, clips = world.draw_clips(1500, seed=5)
    report = measure.compare_with_world(clips, [scene.caption for scene in scenes])
    assert report.obedience == pytest.approx(world.right_share(), abs=0.05)
    assert report.readable >= 0.99
    assert max(report.worst_gap.values()) < 0.05
    assert report.strength == pytest.approx(world.mean_strength(right=False), rel=0.03)
    assert report.kinds == pytest.approx(world.effective_kinds(), rel=0.2)
    right = [scene for scene in scenes if scene.obeys]
    assert np.mean([scene.strength for scene in right]) == pytest.approx(world.mean_strength(right=True), rel=0.03)
    wrong = [scene for scene in scenes if scene.colour != scene.told[0]]
    assert np.mean([scene.strength for scene in wrong]) < world.mean_strength(right=False) - 0.05


def test_what_is_typical_depends_on_the_caption_and_evens_out() -> None:
    for factor, values in world.FACTORS.items():
        assert sum(world.SHARES[factor]) == pytest.approx(1.0)
        assert list(world.SHARES[factor]) == sorted(world.SHARES[factor], reverse=True)
        over_captions = {
            value: np.mean([world.shares(text)[factor][value] for text in world.CAPTIONS]) for value in values
        }
        assert over_captions == pytest.approx(dict.fromkeys(values, 1 / len(values)), abs=1e-9)


def test_curated_clips_show_what_their_captions_say() -> None:
    assert all(scene.obeys for scene in world.draw_scenes(100, seed=0, right=True))
    assert not all(scene.obeys for scene in world.draw_scenes(100, seed=0))


def test_disobedience_and_collapse_are_seen() -> None:
    scenes, clips = world.draw_clips(60, seed=3, right=True)
    captions = [scene.caption for scene in scenes]
    assert measure.compare_with_world(clips, captions).obedience == 1
    wrong = [world.caption("red" if "blue" in text else "blue", "square") for text in captions]
    assert measure.compare_with_world(clips, wrong).obedience < 0.2
    collapsed = measure.compare_with_world(np.stack([clips[0]] * 60), captions[:1] * 60)
    assert collapsed.kinds == pytest.approx(1.0)
    assert collapsed.worst_gap["direction"] > 0.5


@pytest.mark.parametrize(("same", "number"), [(1, 56.0), (2, 28.0), (8, 1.0)])
def test_effective_number(same: int, number: float) -> None:
    """Of eight members `same` are of one kind and all others of another each; 28 pairs are possible. Without a pair of
    one kind it is as if there were half a pair, counted twice among 56 ordered ones."""
    kinds = ["one"] * same + [str(i) for i in range(8 - same)]
    assert measure.effective_number(kinds, ["caption"] * 8) == pytest.approx(number)


def test_the_effective_number_has_no_bias_for_few_members() -> None:
    """Eight members of a group, many times: the mean probability of a pair is that of the law."""
    rng = np.random.default_rng(0)
    shares = np.array([0.4, 0.3, 0.2, 0.1])
    kinds = rng.choice(4, 8 * 3000, p=shares)
    assert measure.effective_number(kinds.tolist(), np.repeat(np.arange(3000), 8).tolist()) == pytest.approx(
        1 / (shares**2).sum(), rel=0.02
    )
    with pytest.raises(ValueError, match="at least two"):
        measure.effective_number(["one"], ["caption"])


def test_what_is_no_shape_is_read_as_none() -> None:
    rng = np.random.default_rng(0)
    for clip in (
        np.full((world.FRAMES, world.SIZE, world.SIZE, 3), 120, np.uint8),
        rng.integers(0, 255, (world.FRAMES, world.SIZE, world.SIZE, 3)).astype(np.uint8),
    ):
        assert measure.read_clip(clip).shape == measure.NOTHING
    still = np.stack([world.draw_clips(1, seed=1)[1][0, 0]] * world.FRAMES)
    assert measure.read_clip(still).direction == measure.NOTHING


def test_grey_has_no_colour_and_vivid_more_than_one() -> None:
    scene = next(world.draw_scenes(1, seed=0))
    grey = measure.read_clip(world.render(replace(scene, strength=0.05)))
    assert grey.colour == measure.NOTHING
    assert math.isnan(grey.strength)
    assert measure.read_clip(world.render(replace(scene, strength=1.3))).strength == pytest.approx(1.3, abs=0.02)


def test_shapes_stay_in_the_frame() -> None:
    for scene in world.draw_scenes(300, seed=0):
        half = world.HALF_WIDTH[scene.shape] * scene.size
        for places in world.path_of(scene, [0.0, 0.5, 1.0]):
            assert half - 0.2 <= places.min() <= places.max() <= world.SIZE - half + 0.2, scene


def test_every_factor_changes_the_picture() -> None:
    scene = next(world.draw_scenes(1, seed=0))
    clip = world.render(scene)
    others: dict[str, Any] = {
        "shape": next(s for s in world.SHAPES if s != scene.shape),
        "colour": next(c for c in world.COLOURS if c != scene.colour),
        "strength": scene.strength + 0.1,
        "direction": next(d for d in world.STEP if d != scene.direction),
        "background": next(b for b in world.BACKGROUND_LEVEL if b != scene.background),
        "travel": next(t for t in world.TRAVEL.values() if t != scene.travel),
        "turn": 0.0 if scene.turn else 9.0,
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


@pytest.mark.slow(seconds=60)
def test_the_teacher_has_what_a_teacher_has_and_loses_what_a_teacher_loses() -> None:
    """Of 96 clips a share has a standard error of up to .05, so obedience is allowed 4 of them. The shipped teacher
    does not hold two bounds of `judge_teacher` yet (docs/toy.md): paths and pale colours are allowed what it has."""
    unguided, guided, few = judge_teacher(TEACHER, clips=96)
    assert 0.6 - 0.2 <= unguided.obedience <= 0.85 + 0.15
    assert max(unguided.worst_gap.values()) <= 0.3
    assert unguided.strength == pytest.approx(world.mean_strength(right=False), rel=0.12)
    assert guided.obedience >= 0.93
    assert guided.kinds < 0.8 * world.effective_kinds()
    assert guided.strength > 1.08 * world.mean_strength(right=True)
    assert guided.strength > unguided.strength + 0.05
    assert few.obedience < guided.obedience - 0.1
    assert f"at guidance {GUIDANCE:g}" in table_of([unguided, guided, few])


def test_a_bound_that_does_not_hold_is_named() -> None:
    scenes, clips = world.draw_clips(480, seed=2)
    real = measure.compare_with_world(clips, [scene.caption for scene in scenes])
    broken = broken_bounds([real] * len(WAYS))
    assert [text for text in broken if "guidance 3" in text] == [
        f"{WAYS[1].name}: {bound.said}" for bound in WAYS[1].bounds
    ]


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
