"""Learning from a pipeline's runs how it calls its network, and the proof that this gives the pipeline's own latents.

Axis legend: B batch, C channels, F frames, H height, W width; f, h, w the same in latents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_dfd.backbones.base import Backbone
from lightning_dfd.backbones.captured.inference import (
    TOLERANCE,
    CaptureRefused,
    Facts,
    Latents,
    find_layout,
    find_prompt,
    find_scaling,
    learn_inputs,
    raw_shape,
)
from lightning_dfd.backbones.captured.recorder import Recording, first_order
from lightning_dfd.backbones.captured.runs import PROMPT, STEPS, Runs
from lightning_dfd.diffusion.noise import Time
from lightning_dfd.diffusion.sampler import Rollout, sample, stateless
from lightning_dfd.diffusion.solvers import teacher_times
from lightning_dfd.objectives import guide
from lightning_dfd.types import Conditioning, VideoSize

GUIDANCE = 3.0  # of the proof's second run
OTHERS, NEGATIVE = ("two dogs", ""), "bad"
MEASURED = VideoSize(25, 64, 64)  # a clip by which the VAE's compression is measured


class Proof:
    """The proof of one teacher.

    Args:
        backbone: its methods are tried; they go by the facts that it was told last.
        runs: of its pipeline.
        pipe: the whole pipeline.
        tell: gives the backbone the facts to go by.
    """

    def __init__(self, backbone: Backbone, runs: Runs, pipe: Any, tell: Callable[[Facts], None]) -> None:
        self.backbone, self.runs, self.pipe, self.tell = backbone, runs, pipe, tell

    def facts(self) -> Facts:
        """Learn and prove them. Raises CaptureRefused or Failed."""
        pipe = self.pipe
        own = pipe.scheduler
        pipe.scheduler = first_order(own)
        size, temporal, spatial, multiple, raw = self._smallest()
        try:
            run = self.runs.whole(pipe, size, output_type="pt")
        except CaptureRefused:  # some take no scheduler but their own
            pipe.scheduler = own
            run = self.runs.whole(pipe, size, output_type="pt")
        inputs = learn_inputs(run, STEPS)
        longer = VideoSize(4 * temporal + 1, size.width, size.height)
        others = [(prompt, size) for prompt in OTHERS] + [(PROMPT, longer)]
        inputs = find_prompt(inputs, [run.calls[0], *(self.runs.first_call(*other).calls[0] for other in others)])
        order, channels = find_layout(run.steps[0].sample, raw, temporal, spatial, size)
        unit = torch.ones(channels)
        latents = Latents(order, channels, temporal, spatial, multiple, 0 * unit, unit)
        facts = self._with_scaling(Facts(inputs, latents), run)
        self._prove(run, size)
        return facts

    def _smallest(self) -> tuple[VideoSize, int, int, int, tuple[int, ...]]:
        """A small size that the pipeline takes, the VAE's compression, the multiple of sides, its latents' shape."""
        clip = torch.zeros(1, 3, MEASURED.frames, MEASURED.height, MEASURED.width)
        try:
            latents = self.pipe.vae.encode(clip.to(self.backbone.loader.device, self.pipe.vae.dtype)).latent_dist.mode()
            raw = tuple(latents.shape)
            temporal, spatial = (MEASURED.frames - 1) // max(raw[2] - 1, 1), MEASURED.height // raw[3]
        except Exception as error:
            raise self.runs.refused(
                "layout", f"its {type(self.pipe.vae).__name__} does not encode {MEASURED}: {error}"
            ) from error
        if raw_shape(raw[1], temporal, spatial, MEASURED) != raw:
            raise self.runs.refused("layout", f"its {type(self.pipe.vae).__name__} makes {raw} of {MEASURED}")
        patch = self.backbone.configs.transformer.get("patch_size", 1)
        base = spatial * (patch if isinstance(patch, int) else patch[-1])
        for multiple in (base, 2 * base, 4 * base):
            size = VideoSize(temporal + 1, 2 * multiple, 3 * multiple)
            try:
                self.runs.first_call(PROMPT, size)
            except CaptureRefused as failure:
                reason = failure
                continue
            return size, temporal, spatial, multiple, raw
        raise reason

    def _with_scaling(self, facts: Facts, run: Recording) -> Facts:
        """The facts with the VAE's scaling, by decoding the run's latents as its pipeline did."""

        def scaled(mean: Tensor, std: Tensor) -> Facts:
            return replace(facts, latents=replace(facts.latents, mean=mean, std=std))

        def decoded(mean: Tensor, std: Tensor) -> Tensor:
            self.tell(scaled(mean, std))
            return (self.backbone.decode_latents(run.steps[-1].result).transpose(1, 2) + 1) / 2

        found = scaled(*find_scaling(self.backbone.loader.vae, decoded, run.result.float()))
        self.tell(found)
        return found

    @torch.no_grad()
    def _prove(self, run: Recording, size: VideoSize) -> None:
        """Our calls and our sampler against the runs of the pipeline."""
        backbone, pipe = self.backbone, self.pipe
        cond, other = (backbone.encode_prompts([prompt]) for prompt in (PROMPT, OTHERS[0]))
        negative = backbone.encode_negative([NEGATIVE])
        noised = torch.cat([step.sample.float() for step in run.steps])
        timesteps = torch.stack([step.timestep.flatten()[0] for step in run.steps]).to(noised.device)
        both = Conditioning.cat([cond.expand(STEPS), other.expand(STEPS)])  # other rows that must not matter
        output = backbone.call(pipe.transformer, torch.cat([noised] * 2), torch.cat([timesteps] * 2), both)[:STEPS]
        self._compare("batch", output, torch.cat([step.output for step in run.steps]))

        try:
            times = teacher_times(scheduler_config(pipe.scheduler), STEPS, **run.own)
            schedule = backbone.schedule
        except (ValueError, KeyError) as error:
            raise self.runs.refused(
                "replay", f"no noise schedule is known for {type(pipe.scheduler).__name__}: {error}"
            ) from error

        def denoise(x_t: Tensor, t: Time, scale: float = 1.0) -> Tensor:
            x0 = backbone.x0(pipe.transformer, x_t, t, cond)
            return x0 if scale == 1 else guide(backbone.x0(pipe.transformer, x_t, t, negative), x0, scale)

        unguided = sample(stateless(denoise), schedule, Rollout(noised[:1]), times).latents
        self._compare("replay", unguided, run.steps[-1].result, "without guidance: ")
        guided = self.runs.whole(pipe, size, GUIDANCE, output_type="latent", negative_prompt=NEGATIVE)
        noise = guided.steps[0].sample.float()
        ours = sample(stateless(partial(denoise, scale=GUIDANCE)), schedule, Rollout(noise), times).latents
        if not isinstance(guided.result, Tensor) or guided.result.shape != ours.shape:
            seen = f"the pipeline returns latents {tuple(guided.result.shape)}, its steps are on {tuple(ours.shape)}"
            raise self.runs.refused("history", seen)
        self._compare("replay", ours, guided.result, f"with guidance {GUIDANCE:g}: ")

    def _compare(self, check: str, ours: Tensor, theirs: Tensor, where: str = "") -> None:
        if ours.shape != theirs.shape:
            raise self.runs.refused(check, f"ours are {tuple(ours.shape)}, the pipeline's {tuple(theirs.shape)}")
        ours, theirs = ours.float(), theirs.float()
        error = float((ours - theirs).square().mean().sqrt() / theirs.square().mean().sqrt())
        if not error <= TOLERANCE[self.backbone.dtype]:
            raise self.runs.refused(
                check, f"{where}relative difference {error:.1e}, allowed is {TOLERANCE[self.backbone.dtype]:.0e}"
            )


def scheduler_config(scheduler: Any) -> dict[str, Any]:
    """As a scheduler is saved, with the name of its class."""
    return {**scheduler.config, "_class_name": type(scheduler).__name__}
