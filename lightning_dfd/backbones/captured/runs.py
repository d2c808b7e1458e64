"""Running a teacher's pipeline, as a whole or up to its network's first call, and noting what it does."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import diffusers
import torch
from torch import nn

from lightning_dfd.backbones.base import Backbone
from lightning_dfd.backbones.captured.inference import CaptureRefused
from lightning_dfd.backbones.captured.recorder import Recording, record
from lightning_dfd.types import VideoSize

STEPS = 4  # of the proof's runs
PROMPT = "a cat"
ARGUMENTS = ("prompt", "num_inference_steps", "generator", "latents", "output_type")


class Runs:
    """The runs of one teacher's pipeline.

    Args:
        backbone: the teacher.

    Raises:
        CaptureRefused: by every run, where the pipeline does not run from a prompt and a size.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.pipeline = str(backbone.configs.pipeline["_class_name"])
        self._seen: dict[tuple[VideoSize, int], Recording] = {}

    def refused(self, check: str, seen: str) -> CaptureRefused:
        """The error of a check that failed."""
        return CaptureRefused(self.pipeline, check, seen)

    @cached_property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """Of the pipeline's call."""
        return inspect.signature(getattr(diffusers, self.pipeline).__call__).parameters

    @cached_property
    def network(self) -> nn.Module:
        """The pipeline's network without weights, which is enough to see how it is called."""
        return self.backbone.meta_transformer()

    @contextmanager
    def whole_pipeline(self) -> Iterator[Any]:
        """The pipeline with its network, in place of the loader's `encoders`, on an accelerator where there is one."""
        loader = self.backbone.loader
        before = loader.device
        pipe = loader.pipeline()
        if torch.cuda.is_available():
            loader.device = torch.device("cuda", torch.cuda.current_device())
        for name in ("transformer", "vae", *self.backbone.configs.encoders):
            getattr(pipe, name).eval().requires_grad_(False).to(loader.device)
        loader.encoders, loader.vae = pipe, pipe.vae
        try:
            yield pipe
        finally:
            loader.device = before
            self._seen.clear()
            loader.release("encoders", "vae")

    def whole(self, pipe: Any, size: VideoSize, scale: float = 1.0, **arguments: Any) -> Recording:
        """A whole run of `STEPS` steps with guidance of this scale."""
        return self._record(pipe, PROMPT, size, STEPS, scale, **arguments)

    def first_call(self, prompt: str, size: VideoSize, steps: int = STEPS) -> Recording:
        """What the network is first told of a prompt at a size, without its weights."""
        pipe = self.backbone.loader.encoders
        network = pipe.transformer
        pipe.transformer = self.network
        try:
            return self._record(pipe, prompt, size, steps, 1.0, first_call_only=True, output_type="latent")
        finally:
            pipe.transformer = network

    def at(self, size: VideoSize, steps: int = STEPS) -> Recording:
        """The first call at a size. Text encoders that are loaded for it alone are let go."""
        if (size, steps) not in self._seen:
            loader = self.backbone.loader
            held = loader.loaded
            self._seen[size, steps] = self.first_call(PROMPT, size, steps)
            loader.release(*(loader.loaded - held))
        return self._seen[size, steps]

    def _record(self, pipe: Any, prompt: str, size: VideoSize, steps: int, scale: float, **arguments: Any) -> Recording:
        backbone = self.backbone
        sizes = backbone.size_arguments(size)
        if missing := [name for name in (*ARGUMENTS, *sizes) if name not in self.parameters]:
            raise self.refused("call", f"its call has no {' and no '.join(missing)}")
        arguments |= {"prompt": prompt, "num_inference_steps": steps, **sizes, **backbone.guidance_arguments(scale)}
        if "max_sequence_length" in self.parameters:
            arguments["max_sequence_length"] = backbone.max_sequence_length
        backbone.prepare(pipe, scale)
        try:
            return record(pipe, **arguments)
        except Exception as error:
            raise self.refused("call", f"with a prompt and {size} it stops: {type(error).__name__}: {error}") from error
