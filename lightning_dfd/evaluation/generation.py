"""Videos from a module's roles: what `lightning sample`, the callbacks and the study show and measure.

Axis legend: B batch, C = 3 channels, F frames, H height, W width; latents are [B, ...].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lightning_dfd.backbones import Backbone
from lightning_dfd.data import Clip, ShardMember, VideoDataModule, read_first_frame
from lightning_dfd.diffusion.sampler import Draw
from lightning_dfd.types import Conditioning, Role, VideoSize

TEACHER_STEPS = 50


class Generator(Protocol):
    """What samples latents: a DistillationModule."""

    @property
    def backbone(self) -> Backbone: ...

    @property
    def device(self) -> torch.device: ...

    def sample_latents(
        self, role: Role, cond: Conditioning, noise: Tensor, draw: Draw, teacher_steps: int, /
    ) -> Tensor: ...


@dataclass(frozen=True)
class Request:
    """One video to generate. It depends on prompt and seed alone, not on the other requests, so roles, runs and numbers
    of processes compare. With image-to-video teachers it also depends on `image`, an image file or a video whose first
    frame is taken; None takes that of the first of the data's clips with this caption."""

    prompt: str
    seed: int
    image: Path | None = None


def requests_for(prompts: Sequence[str], seeds: Sequence[int], images: Sequence[Path] | None = None) -> list[Request]:
    """Every prompt, with its image if there are any, with every seed; a prompt's seeds together."""
    given: Sequence[Path | None] = images or [None] * len(prompts)
    pairs = zip(prompts, given, strict=True)
    return [Request(prompt, seed, image) for prompt, image in pairs for seed in seeds]


def generate_latents(
    module: Generator,
    role: Role,
    requests: Sequence[Request],
    cond: Conditioning,
    size: VideoSize,
    teacher_steps: int = TEACHER_STEPS,
) -> Tensor:
    """Clean latents [B, ...] on the module's device, one for each request; `cond` is of batch size B."""
    shape = module.backbone.latent_shape(size)
    generators = [torch.Generator().manual_seed(request.seed) for request in requests]

    def draw(like: Tensor | None = None) -> Tensor:
        return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(module.device)

    return module.sample_latents(role, cond.to(module.device), draw(), draw, teacher_steps)


def condition(
    backbone: Backbone, requests: Sequence[Request], size: VideoSize, data: VideoDataModule | None = None
) -> Conditioning:
    """The conditioning of requests, batch B: from the data's cache where it holds them, so that no encoder is loaded.

    Raises:
        ValueError: the teacher begins with an image, and a request has none and no clip of the data is its own.
        VideoError: an image cannot be read.
    """
    cache = None if data is None else data.latent_cache
    known: dict[tuple[str, Path | None], Conditioning] = {}
    for request in requests:
        key = (request.prompt, request.image)
        if key in known:
            continue
        held = cache is not None and cache.holds(request.prompt)
        text = cache.conditioning(request.prompt) if cache and held else backbone.encode_prompts([request.prompt])
        known[key] = text | _image_of(backbone, request, size, data) if backbone.takes_image else text
    return Conditioning.cat([known[request.prompt, request.image] for request in requests])


def image_clip(backbone: Backbone, request: Request, data: VideoDataModule | None) -> tuple[Clip, VideoDataModule]:
    """The clip with whose first frame the video of a request without an image begins, and the data that have it.

    Raises:
        ValueError: there is none.
    """
    clip = None if data is None else data.clip_of(request.prompt)
    if data is None or clip is None:
        raise ValueError(
            f"{type(backbone).__name__} begins with an image, and there is none for {request.prompt!r}: it is "
            "not a caption of the data; take one that is, or give images (lightning sample --images)"
        )
    return clip, data


def _image_of(backbone: Backbone, request: Request, size: VideoSize, data: VideoDataModule | None) -> Conditioning:
    """The conditioning, batch 1, of the image with which a request's video begins."""
    path: Path | ShardMember | None = request.image
    if path is None:
        clip, data = image_clip(backbone, request, data)
        if data.latent_cache is not None:
            return data.latent_cache.image_conditioning(clip.name).to(backbone.loader.device)
        path = clip.source
    image = read_first_frame(path, size.height, size.width).float() / 127.5 - 1.0
    return backbone.encode_images(image[None].to(backbone.loader.device), size.frames)


def generate_videos(
    module: Generator,
    role: Role,
    requests: Sequence[Request],
    size: VideoSize,
    data: VideoDataModule | None = None,
    teacher_steps: int = TEACHER_STEPS,
) -> Tensor:
    """Videos [B, C, F, H, W] in [-1, 1], one for each request; `data` knows embeddings and images."""
    module.backbone.loader.to(module.device)
    cond = condition(module.backbone, requests, size, data)
    return module.backbone.decode_latents(generate_latents(module, role, requests, cond, size, teacher_steps))
