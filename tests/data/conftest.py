"""Small videos that the tests make."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lightning_dfd.data import write_video


@pytest.fixture
def make_clip() -> Callable[..., Path]:
    """Write a clip of `frames` flat frames; its first frame is `shade` bright and every next 8 brighter."""

    def make(path: Path, shade: int = 20, frames: int = 9, fps: float = 8, height: int = 16, width: int = 24) -> Path:
        levels = np.arange(shade, shade + 8 * frames, 8, dtype=np.uint8)
        write_video(path, np.broadcast_to(levels[:, None, None, None], (frames, height, width, 3)), fps)
        return path

    return make
