"""Mochi 1 text-to-video (Genmo, 2024): flow matching with time and velocity the other way round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule
from torch import Tensor

from lightning_dfd.backbones.channels import PerChannel
from lightning_dfd.backbones.flow import few_step_own_scheduler
from lightning_dfd.backbones.meta import dtype_of
from lightning_dfd.diffusion.solvers import SolverStep, teacher_times
from lightning_dfd.types import Conditioning, SampleKind

THRESHOLD = 0.025  # noise that the pipeline takes off in the first half of its steps, fixed in its call


class MochiBackbone(PerChannel):
    """Latents [B, C, f, h, w], each channel by its own mean and standard deviation."""

    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")

    def text_length(self) -> int:
        return 256  # the default of the pipeline's call

    def compression(self) -> tuple[int, int]:
        return 6, 8  # the pipeline's own constants

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """One by one: some pipelines blank the prompts of a whole batch if the last is empty."""
        encode = super().encode_prompts
        return Conditioning.cat([encode([prompt]) for prompt in prompts])

    def teacher_times(self, num_steps: int, shape: Sequence[int]) -> tuple[SolverStep, ...]:
        return teacher_times(self.configs.scheduler, num_steps, inverted=True, sigmas=own_times(num_steps))

    def call(self, transformer: Any, x_t: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        """The network is told 1000 (1 - t) and answers x0 - eps: turned here, so that the rest sees plain flow."""
        turned = self.schedule.num_train_timesteps - timestep
        output: Tensor = transformer(
            hidden_states=x_t.to(dtype_of(transformer)),
            timestep=turned.to(dtype_of(transformer)),  # rounded like the pipeline's
            encoder_hidden_states=cond["prompt_embeds"].to(dtype_of(transformer)),
            encoder_attention_mask=cond["prompt_attention_mask"],
            return_dict=False,
        )[0]
        return -output

    def few_step_scheduler(self, steps: Sequence[float], kind: SampleKind) -> Any:
        if kind == "sde":
            raise ValueError(
                "no stock scheduler adds fresh noise on Mochi's inverted times; set model.sampling.kind: ode"
            )
        return few_step_own_scheduler(steps, kind, own_times(len(steps)), invert_sigmas=True)


def own_times(num_steps: int) -> list[float]:
    """The times that the pipeline hands its scheduler: half of them slow, the others faster and faster.

    Raises:
        ValueError: one step, for which the pipeline's formula divides by zero.
    """
    if num_steps < 2:
        raise ValueError(f"Mochi's pipeline cannot run {num_steps} step; give model.sampling.steps at least 2 times")
    times: list[float] = linear_quadratic_schedule(num_steps, THRESHOLD)
    return times
