"""Whatever makes features of videos, as a `FeatureExtractor`.

Axis legend: B videos, F frames, D features.
"""

from __future__ import annotations

import copy
import hashlib
import uuid
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_dfd.features import load_extractor
from lightning_dfd.features.base import FeatureExtractor
from lightning_dfd.metrics.functional.videos import check_videos

Extractor = str | FeatureExtractor | nn.Module | Callable[[Tensor], Tensor]


class CallableExtractor(FeatureExtractor):
    """A module or function from videos [B, 3, F, H, W] to features, of which the kind shows in their axes.

    A module is copied: the copy stays as it is, in evaluation mode and float32, and follows the videos' device,
    whatever becomes of the original. A function is called as it is. Both run without gradient and outside of autocast.

    Attributes:
        name: the class of the module, or the function's name.
        kind: known after the first call; [B, D] is `video`, [B, F, D] is `frame`.
        fingerprint: of a module, its weights. A function's weights cannot be seen, so that its fingerprint is new
            each time and no cached statistics are ever taken for its own.
    """

    def __init__(self, function: nn.Module | Callable[[Tensor], Tensor]) -> None:
        self.name = getattr(function, "__name__", type(function).__name__)
        self.fingerprint = uuid.uuid4().hex
        if isinstance(function, nn.Module):
            with torch.no_grad():  # the copy of a scripted module would hang on the original's graph
                function = copy.deepcopy(function).eval().float()
            self.fingerprint = _fingerprint(function)
        self._function = function

    @torch.no_grad()
    def __call__(self, videos: Tensor) -> Tensor:
        if isinstance(self._function, nn.Module):
            self._function.to(videos.device)
        with torch.autocast(videos.device.type, enabled=False):
            features = self._function(videos.float())
        if not isinstance(features, Tensor) or features.ndim not in (2, 3) or len(features) != len(videos):
            got = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(
                f"extractor {self.name!r} gave {got} for {len(videos)} videos; need a tensor [{len(videos)}, D], or "
                f"[{len(videos)}, F, D] for features per frame. Wrap it in a function that returns one of these."
            )
        self.kind = "video" if features.ndim == 2 else "frame"
        return features.float()


def _fingerprint(module: nn.Module) -> str:
    digest = hashlib.sha256(repr(module).encode())
    for name, value in module.state_dict().items():
        if isinstance(value, Tensor):
            digest.update(name.encode() + value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def as_extractor(extractor: Extractor) -> FeatureExtractor:
    """An extractor by name (`lightning_dfd.features.load_extractor`), one as it is, or a wrapped module or function."""
    if isinstance(extractor, str):
        return load_extractor(extractor)
    if isinstance(extractor, FeatureExtractor):
        return extractor
    return CallableExtractor(extractor)


def video_features(extractor: FeatureExtractor, videos: Tensor) -> Tensor:
    """[B, D]; features of frames are averaged."""
    check_videos(videos)
    features = extractor(videos)
    return features.mean(1) if features.ndim == 3 else features


def frame_features(extractor: FeatureExtractor, videos: Tensor) -> Tensor:
    """[B, F, D].

    Raises:
        ValueError: if the extractor knows no frames.
    """
    check_videos(videos)
    features = extractor(videos)
    if features.ndim != 3:
        raise ValueError(
            f"extractor {extractor.name!r} gives one vector a video, {list(features.shape)}; need one a frame, "
            "[B, F, D]. Use an extractor of frames, as of DINO or CLIP."
        )
    return features
