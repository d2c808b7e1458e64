"""Extractors by name, each loaded once a process."""

from __future__ import annotations

import difflib
import functools
import inspect
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_dfd.evaluation.features.base import FeatureExtractor
from lightning_dfd.evaluation.features.hub import clip, dinov2, i3d_logits, videomae, vjepa2
from lightning_dfd.evaluation.features.network import Network
from lightning_dfd.evaluation.features.offline import efficientnet_lite0, transnetv2
from lightning_dfd.files import digest

EXTRACTORS: dict[str, Callable[..., Network]] = {
    "i3d-logits": i3d_logits,
    "videomae": videomae,
    "vjepa2": vjepa2,
    "dinov2": dinov2,
    "clip": clip,
    "efficientnet-lite0": efficientnet_lite0,
    "transnetv2": transnetv2,
}


class NamedExtractor(FeatureExtractor):
    """An extractor of `EXTRACTORS`; pickled by name, so that neither files nor processes carry its weights."""

    def __init__(self, name: str, where: dict[str, str]) -> None:
        self.name, self._where = name, where
        with _untouched_globals():
            self._network = EXTRACTORS[name](**where)
        self.kind = self._network.kind
        self.fingerprint = _hash(name, self._network.protocol, self._network.weights)
        self._device = torch.device("cpu")

    def __call__(self, videos: Tensor) -> Tensor:
        """Features of videos, see `FeatureExtractor`. Values outside [-1, 1] are clipped, as a video file would.

        Raises:
            ValueError: not a float [B, 3, F, H, W], or without any video, frame or pixel.
        """
        if videos.ndim != 5 or videos.shape[1] != 3 or not videos.numel() or not videos.is_floating_point():
            raise ValueError(
                f"{self.name} got videos {videos.dtype} {list(videos.shape)}; need float [B, 3, F, H, W] in [-1, 1]"
            )
        if videos.device != self._device:
            self._network.module.to(videos.device)
            self._device = videos.device
        with torch.no_grad(), torch.autocast(videos.device.type, enabled=False), _default_float32():
            return self._network.features(videos.detach().float().clamp(-1, 1)).float()

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(load_extractor, self.name, **self._where), ()


def load_extractor(name: str, **where: Any) -> FeatureExtractor:
    """The extractor of that name: loaded at the first call, shared by all later ones of the same arguments.

    It starts on the CPU and follows the videos that it is called with to their device. Loading changes neither
    random states nor global settings of torch.

    Args:
        name: one of `EXTRACTORS`.
        where: what its loader takes, None for a default: `source` (hub id or local path) and `revision`; for
            `i3d-logits` `source` (local path) and `sha256`; nothing for those of the extra `offline-features`.

    Raises:
        ValueError: unknown name or argument; weights that are not those expected.
        OSError: weights that are not there.
        ImportError: an extra is not installed.
    """
    if name not in EXTRACTORS:
        near = difflib.get_close_matches(name, EXTRACTORS, n=1)
        guess = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"there is no extractor {name!r}; {guess}there are: {', '.join(EXTRACTORS)}")
    allowed = list(inspect.signature(EXTRACTORS[name]).parameters)
    given = {key: str(value) for key, value in where.items() if value is not None}
    strange = [key for key in given if key not in allowed]
    if strange:
        raise ValueError(f"{name} takes {', '.join(allowed) or 'no arguments'}; got {', '.join(strange)}")
    return _shared(name, tuple(sorted(given.items())))


@functools.cache
def _shared(name: str, where: tuple[tuple[str, str], ...]) -> NamedExtractor:
    return NamedExtractor(name, dict(where))


def _hash(*parts: str) -> str:
    return digest("\n".join(parts))


@contextmanager
def _default_float32() -> Iterator[None]:
    """True bf16 training makes bfloat16 the default, in which a network would create its constants."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _untouched_globals() -> Iterator[None]:
    """Load in float32, on the CPU, as ordinary tensors; keep what constructors do from reaching the outside.

    Every random initialisation draws numbers, and TransNetV2 moreover seeds all generators and asks all of torch for
    deterministic algorithms.
    """
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (it is the global state that is meant)
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    devices = list(range(torch.cuda.device_count()))
    try:
        with (
            torch.random.fork_rng(devices),
            torch.inference_mode(False),
            torch.device("cpu"),
            _default_float32(),
        ):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
