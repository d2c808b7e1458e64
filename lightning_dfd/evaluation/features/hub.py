"""Extractors whose weights come from the hub or from a local path; they are never unpickled.

Axis legend: B videos, C = 3 channels, F frames, H height, W width, N = B * F, D features.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from torch import Tensor
from transformers import AutoConfig, CLIPVisionModelWithProjection, Dinov2Model, VideoMAEModel, VJEPA2Model
from transformers.utils import logging as transformers_logging

from lightning_dfd.evaluation.features.frames import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    as_frames,
    as_videos,
    consecutive,
    cover,
    evenly,
    normalise,
    of_each_frame,
    stretch,
)
from lightning_dfd.evaluation.features.network import Network, hash_of_weights

I3D_REPO, I3D_FILE = "flateon/FVD-I3D-torchscript", "i3d_torchscript.pt"
I3D_REVISION = "1c2d61711c52571ad617a1063e6fa691b212e184"
I3D_SHA256 = "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def i3d_logits(source: str | None = None, sha256: str = I3D_SHA256) -> Network:
    """The 400 logits of the Kinetics-400 I3D, features of FVD (1812.01717) as StyleGAN-V (2112.14683) computes it.

    16 consecutive frames, those in the middle of longer videos, stretched to 224x224 (bilinear, no antialiasing), in
    [-1, 1]. A shorter video repeats frames evenly: the network cannot take fewer than ten.

    Args:
        source: path of `i3d_torchscript.pt`; None for the hub's file at a fixed revision.
        sha256: what the file must hash to; it holds code, so it is checked before anything of it is loaded.

    Raises:
        OSError: the file is missing, or the hub cannot be reached.
        ValueError: the file is another one.
    """
    path = Path(_i3d_from_hub() if source is None else source)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; {_i3d_remedy()}")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(f"{path} is not the expected I3D: its sha256 is {found}, need {sha256}; {_i3d_remedy()}")
    module = torch.jit.load(io.BytesIO(content), map_location="cpu").eval()

    def features(videos: Tensor) -> Tensor:
        clips = consecutive(videos, 16)
        pixels = as_videos(stretch(as_frames(clips), 224, 224, antialias=False), 16).transpose(1, 2).contiguous()
        logits: Tensor = module(pixels, rescale=False, resize=False, return_features=True)
        return logits

    return Network(module, features, "video", "16 consecutive frames, stretched to 224x224, [-1, 1], logits", found)


def videomae(source: str = "MCG-NJU/videomae-base", revision: str = "main") -> Network:
    """VideoMAE's last hidden state, mean over tokens: less content bias than I3D (2404.12391).

    As many frames as the network was trained with (16), at even distances.

    Args:
        source: hub id or folder with config.json and model.safetensors.
        revision: of the hub id.

    Raises:
        OSError: there are no such weights, or the hub cannot be reached.
        ValueError: they are of another kind of network, or incomplete.
    """
    module = _pretrained(VideoMAEModel, "videomae", source, revision)
    count, side = module.config.num_frames, module.config.image_size

    def features(videos: Tensor) -> Tensor:
        pixels = normalise(cover(as_frames(evenly(videos, count)), side, "bilinear"), IMAGENET_MEAN, IMAGENET_STD)
        hidden: Tensor = module(pixel_values=as_videos(pixels, count)).last_hidden_state
        return hidden.mean(1)

    protocol = f"{count} even frames, {side} bilinear, centre, mean over tokens"
    return Network(module, features, "video", protocol, hash_of_weights(module))


def vjepa2(source: str = "facebook/vjepa2-vitl-fpc64-256", revision: str = "main") -> Network:
    """V-JEPA 2's encoder, mean over tokens: JEDi (2410.05203) shows that such features need few samples.

    As many frames as the network was trained with (64 by default), at even distances. See `videomae` for the
    arguments and errors.
    """
    module = _pretrained(VJEPA2Model, "vjepa2", source, revision)
    count, side = module.config.frames_per_clip, module.config.crop_size

    def features(videos: Tensor) -> Tensor:
        pixels = normalise(cover(as_frames(evenly(videos, count)), side, "bilinear"), IMAGENET_MEAN, IMAGENET_STD)
        output = module(pixel_values_videos=as_videos(pixels, count), skip_predictor=True)
        hidden: Tensor = output.last_hidden_state
        return hidden.mean(1)

    protocol = f"{count} even frames, {side} bilinear, centre, mean over tokens"
    return Network(module, features, "video", protocol, hash_of_weights(module))


def dinov2(source: str = "facebook/dinov2-large", revision: str = "main") -> Network:
    """DINOv2's class token after its last norm, for every frame. See `videomae` for the arguments and errors."""
    module = _pretrained(Dinov2Model, "dinov2", source, revision)

    def features(frames: Tensor) -> Tensor:
        # its config says 518, the size of its position table; its published preprocessing is 224
        pixels = normalise(cover(frames, 224, "bicubic"), IMAGENET_MEAN, IMAGENET_STD)
        token: Tensor = module(pixel_values=pixels).pooler_output
        return token

    each = partial(of_each_frame, features=features)
    return Network(module, each, "frame", "224 bicubic, centre, class token", hash_of_weights(module))


def clip(source: str = "openai/clip-vit-large-patch14", revision: str = "main") -> Network:
    """CLIP's image embedding, not normalised, for every frame. See `videomae` for the arguments and errors."""
    module = _pretrained(CLIPVisionModelWithProjection, "clip", source, revision)
    side = module.config.image_size

    def features(frames: Tensor) -> Tensor:
        pixels = normalise(cover(frames, side, "bicubic"), CLIP_MEAN, CLIP_STD)
        embedding: Tensor = module(pixel_values=pixels).image_embeds
        return embedding

    each = partial(of_each_frame, features=features)
    return Network(module, each, "frame", f"{side} bicubic, centre, image embedding", hash_of_weights(module))


def _i3d_remedy() -> str:
    url = f"https://huggingface.co/{I3D_REPO}/resolve/{I3D_REVISION}/{I3D_FILE}"
    return f"download {url} (51,235,320 bytes, sha256 {I3D_SHA256}) and give its path as source"


def _i3d_from_hub() -> str:
    try:
        return hf_hub_download(I3D_REPO, I3D_FILE, revision=I3D_REVISION)
    except OSError as error:
        raise OSError(f"the hub's I3D cannot be reached ({_first_line(error)}); {_i3d_remedy()}") from error


def _pretrained(model_class: Any, model_type: str, source: str, revision: str) -> Any:
    """A transformers model, complete, in float32 and evaluation mode."""
    try:
        found = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False).model_type
        if found != model_type:
            raise ValueError(f"{source} is a {found}, need a {model_type}; name another source")
        with _quiet():
            module, report = model_class.from_pretrained(
                source, revision=revision, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
    except OSError as error:
        raise OSError(
            f"{source} cannot be loaded ({_first_line(error)}); download its config.json and model.safetensors from "
            f"https://huggingface.co/{source} into a folder and give that as source"
        ) from error
    # transformers fills what a checkpoint lacks with random numbers and only logs it
    if report["missing_keys"] or report["mismatched_keys"]:
        lacking = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
        raise ValueError(f"{source} lacks weights of a {model_type}: {', '.join(lacking[:3])}; name a complete one")
    return module.eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' table of weights that are not of the part wanted, as CLIP's text encoder."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
