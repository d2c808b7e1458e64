"""Videos from a module's roles: what `lightning sample`, the callbacks and the study show and measure.

Axis legend: B batch, C = 3 channels, F frames, H height, W width; latents are [B, ...].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dfd.backbones import Backbone
from lightning_dfd.data import LatentCache
from lightning_dfd.module import DistillationModule
from lightning_dfd.types import Conditioning, Role, VideoSize

TEACHER_STEPS = 50


@dataclass(frozen=True)
class Request:
    """One video to make. It depends on prompt and seed alone, not on what else is made beside it, so roles, runs
    and numbers of processes compare."""

    prompt: str
    seed: int


def requests_for(prompts: Sequence[str], seeds: Sequence[int]) -> list[Request]:
    """Every prompt with every seed, a prompt's seeds together."""
    return [Request(prompt, seed) for prompt in prompts for seed in seeds]


def generate_latents(
    module: DistillationModule,
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


def condition(backbone: Backbone, prompts: Sequence[str], cache: LatentCache | None = None) -> Conditioning:
    """The conditioning of prompts, batch B: from a cache where it holds them, so that no text encoder is loaded."""
    known = {}
    for prompt in dict.fromkeys(prompts):
        held = cache is not None and cache.holds(prompt)
        known[prompt] = cache.conditioning(prompt) if cache and held else backbone.encode_prompts([prompt])
    return Conditioning.cat([known[prompt] for prompt in prompts])


def generate_videos(
    module: DistillationModule,
    role: Role,
    requests: Sequence[Request],
    size: VideoSize,
    cache: LatentCache | None = None,
    teacher_steps: int = TEACHER_STEPS,
) -> Tensor:
    """Videos [B, C, F, H, W] in [-1, 1], one for each request."""
    module.backbone.to(module.device)
    cond = condition(module.backbone, [request.prompt for request in requests], cache)
    return module.backbone.decode_latents(generate_latents(module, role, requests, cond, size, teacher_steps))
