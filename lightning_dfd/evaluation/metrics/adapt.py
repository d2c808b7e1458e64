"""Whatever makes features of videos, as a `FeatureExtractor`.

Axis legend: B videos, F frames, D features.
"""

from __future__ import annotations

import copy
import importlib
import uuid
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_dfd.evaluation.features import load_extractor
from lightning_dfd.evaluation.features.base import FeatureExtractor
from lightning_dfd.evaluation.features.network import hash_of_weights
from lightning_dfd.evaluation.metrics.functional.videos import check_videos
from lightning_dfd.files import expanded

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
            self.fingerprint = hash_of_weights(function)
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


def as_extractor(extractor: Extractor) -> FeatureExtractor:
    """A `FeatureExtractor` as it is, a module or function wrapped, or what a text names:

    * `dinov2`: one of `lightning_dfd.evaluation.features.EXTRACTORS`;
    * `dinov2=/path/to/folder`: the same with its weights from there, see `load_extractor`;
    * `my_package.my_module.MyExtractor`: an import path; a class is called without arguments.

    Raises:
        ValueError: the name is not known, the path cannot be imported, or it leads to something else.
        OSError: weights that are not there.
        ImportError: an extra is not installed.
    """
    if isinstance(extractor, str):
        name, equals, source = extractor.partition("=")
        if "." in name:
            return as_extractor(_imported(extractor))
        if equals and not source:
            raise ValueError(f"extractor {extractor!r} names no weights; write {name}=/path/to/weights, or {name}")
        if not equals:
            return load_extractor(name)
        return load_extractor(name, source=expanded(source, f"the weights of {name}"))
    if isinstance(extractor, FeatureExtractor):
        return extractor
    return CallableExtractor(extractor)


def _imported(path: str) -> Callable[[Tensor], Tensor]:
    """What stands at an import path; of a class, an instance."""
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
        extractor: Callable[[Tensor], Tensor] = found() if isinstance(found, type) else found
    except Exception as error:  # it runs the user's code, and whatever fails there is about this path
        raise ValueError(
            f"extractor {path!r} cannot be imported and made ({type(error).__name__}: {error}); give "
            "package.module.Class, of which the class needs no arguments, or package.module.function"
        ) from error
    if not callable(extractor):
        raise ValueError(
            f"extractor {path!r} is a {type(extractor).__name__}; need a FeatureExtractor, an nn.Module, or a function "
            "from videos [B, 3, F, H, W] to features"
        )
    return extractor


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
            f"extractor {extractor.name!r} gives one vector per video, {list(features.shape)}; need one per frame, "
            "[B, F, D]. Use an extractor of frames, as of DINO or CLIP."
        )
    return features
