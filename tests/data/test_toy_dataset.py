from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest

from lightning_dfd.data import list_clips, read_video
from lightning_dfd.toy import world
from lightning_dfd.toy.dataset import write_world
from lightning_dfd.toy.measure import compare_with_world
from lightning_dfd.types import VideoSize

SIZE = VideoSize(world.FRAMES, world.SIZE, world.SIZE)


@pytest.mark.slow(seconds=6)
def test_clips_still_measure_right_after_encoding(tmp_path):
    write_world(tmp_path, clips=200, seed=3, progress=False)
    listing = list_clips(tmp_path)
    assert len(listing.clips) == 200
    assert not listing.problems
    clips = np.stack([read_video(c.path, SIZE, world.FPS).permute(1, 2, 3, 0).numpy() for c in listing.clips])
    scenes, pixels = world.draw_clips(200, seed=3)
    assert np.abs(clips.astype(float) - pixels).mean() < 2  # levels of 255
    report = compare_with_world(clips, [clip.caption for clip in listing.clips])
    truth = compare_with_world(pixels, [scene.caption for scene in scenes])
    assert report.obedience == pytest.approx(truth.obedience, abs=0.01)
    assert report.shares == truth.shares
    assert report.strength == pytest.approx(truth.strength, rel=0.02)  # the colours of small shapes are not paled
    first = json.loads((tmp_path / "metadata.jsonl").read_text().splitlines()[0])
    told = {"told": list(scenes[0].told)}
    assert first == {"file_name": "00000.mp4", "text": scenes[0].caption, **asdict(scenes[0]), **told}


def test_written_once_and_again_after_an_interruption(tmp_path):
    def state():
        return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}

    write_world(tmp_path, clips=3, seed=0, progress=False)
    before = state()
    write_world(tmp_path, clips=3, seed=0, progress=False)
    assert state() == before
    (tmp_path / "world.json").unlink()
    (tmp_path / "00002.mp4").unlink()
    write_world(tmp_path, clips=3, seed=0, progress=False)
    assert {name: content for name, (content, _) in state().items()} == {
        name: content for name, (content, _) in before.items()
    }
    for clips, seed, right in ((4, 0, False), (3, 1, False), (3, 0, True)):
        with pytest.raises(ValueError, match=r"holds the world .*'seed': 0.* name another folder or delete"):
            write_world(tmp_path, clips, seed, right, progress=False)
