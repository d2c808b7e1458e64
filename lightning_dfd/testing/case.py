"""A backbone with a tiny pipeline of its family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_dfd.backbones import Backbone, backbone_from_pretrained
from lightning_dfd.testing.tiny import Tiny, Trial
from lightning_dfd.training.module import DistillationModule
from lightning_dfd.training.settings import SamplingSettings, StudentSettings
from lightning_dfd.types import Conditioning, SampleKind

PROMPTS = ("a cat", "two dogs run")


def require(ok: Any, what: str) -> None:
    if not ok:
        raise AssertionError(what)


def gap(ours: Tensor, theirs: Tensor) -> float:
    """The largest absolute difference; infinite where the shapes differ or a number is not finite."""
    if ours.shape != theirs.shape or not (ours.isfinite().all() and theirs.isfinite().all()):
        return float("inf")
    return float((ours - theirs).abs().max())


@dataclass(frozen=True)
class Case(Trial):
    """A backbone on a tiny pipeline, and what to try it with.

    Args:
        source: folder of the pipeline, whose scheduler is Euler's or DDIM's: others are other samplers.
    """

    source: str

    @staticmethod
    def of(source: str | Path, tiny: Tiny) -> Case:
        """One of the package's own tiny pipelines, saved at `source`."""
        return Case(str(source), **{field.name: getattr(tiny, field.name) for field in fields(Trial)})

    @cached_property
    def teacher(self) -> Backbone:
        return self.load(torch.float32)

    def load(self, dtype: torch.dtype) -> Backbone:
        return backbone_from_pretrained(self.source, dtype, self.text_length, self.backbone)

    def module(self, mode: str = "lora", kind: SampleKind = "ode", **options: Any) -> DistillationModule:
        """A module on this teacher, its networks loaded."""
        student = {"mode": mode, "rank": 4, "alpha": 8, **options.pop("student", {})}
        module = DistillationModule(
            self.source,
            self.backbone,
            max_sequence_length=self.text_length,
            student=StudentSettings(**student),
            sampling=SamplingSettings(list(self.steps), kind),
            **options,
        )
        module.configure_model()
        return module

    def videos(self, count: int = 2) -> Tensor:
        """Random videos [B, C, F, H, W] in [-1, 1], at most 8 bits deep as files are."""
        shape = (count, 3, self.size.frames, self.size.height, self.size.width)
        return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)) / 127.5 - 1.0

    def conditioning(self, prompts: Sequence[str]) -> Conditioning:
        """Of prompts and of the first frames of `videos`."""
        images = self.teacher.encode_images(self.videos(len(prompts))[:, :, 0], self.size.frames)
        return self.teacher.encode_prompts(prompts) | images

    def inputs(self) -> tuple[Tensor, Tensor, Conditioning]:
        """x_t, t and conditioning of two clips."""
        x_t = self.noise(2)
        return x_t, torch.tensor([0.9, 0.4], dtype=torch.float64), self.conditioning(PROMPTS)

    def noise(self, count: int) -> Tensor:
        return torch.randn(count, *self.teacher.latent_shape(self.size), generator=torch.Generator().manual_seed(count))
