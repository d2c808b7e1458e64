"""Cosmos-Predict2.5 text-to-world (2511.00062): flow matching, a network that is told the time frame by frame.

Axis legend: B batch, C channels, f, h, w frames, height and width of latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from diffusers.utils.import_utils import is_torchvision_available
from torch import Tensor

from lightning_dfd.backbones.channels import PerChannel
from lightning_dfd.backbones.flow import few_step_flow_scheduler
from lightning_dfd.backbones.images import GivenFirstFrame
from lightning_dfd.backbones.meta import dtype_of
from lightning_dfd.backbones.sizes import Sizes
from lightning_dfd.diffusion.noise import NoiseSchedule
from lightning_dfd.diffusion.solvers import SolverStep
from lightning_dfd.types import Conditioning, SampleKind

CLEAN = 1e-4  # what the network is told as the time of given frames: `conditional_frame_timestep` of the call


class NotAsked:
    """Stands where a Cosmos pipeline's constructor demands a safety checker, if the pipeline is only to encode.

    It answers nothing, so a pipeline that holds it cannot be called; no such pipeline leaves this package.
    """


class Cosmos25Backbone(PerChannel):
    """Latents [B, C, f, h, w], each channel by its own mean and standard deviation."""

    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
    given_frames = 0  # frames of the latents that are an image's, free of noise

    def text_length(self) -> int:
        return 512  # the default of the pipeline's call

    def compression(self) -> tuple[int, int]:
        halved = self.configs.vae["temperal_downsample"]
        return 2 ** sum(halved), 2 ** len(halved)

    def check_teacher(self) -> None:
        super().check_teacher()
        if self.configs.transformer["concat_padding_mask"] and not is_torchvision_available():
            raise ImportError(
                f"the network of {self.source} resizes a mask by torchvision, which is not installed; "
                "pip install torchvision, in the version that goes with your torch"
            )

    def network_channels(self) -> tuple[int, int]:
        return self.latent_channels() + 1, self.latent_channels()  # its last channel says which frames are given

    def sizes(self) -> Sizes:
        """Rotary positions are made for the longest axis, learned ones for each."""
        config = self.configs.transformer
        most = [size // patch for size, patch in zip(config["max_size"], config["patch_size"], strict=True)]
        frames, height, width = most if config.get("extra_pos_embed_type", "learnable") else [max(most)] * 3
        return replace(super().sizes(), most_patches=(frames, height, width))

    def encoder_widths(self) -> dict[str, int | None]:
        projected = self.configs.transformer.get("use_crossattn_projection")
        width = "crossattn_proj_in_channels" if projected else "encoder_hidden_states_channels"
        return {"text_encoder": int(self.configs.transformer[width])}

    def features_of(self, name: str, config: Mapping[str, Any]) -> int | None:
        """The pipeline joins what all layers of its text encoder say."""
        features = super().features_of(name, config)
        layers = config.get("text_config", config).get("num_hidden_layers")
        return None if features is None or layers is None else features * int(layers)

    def guidance_arguments(self, scale: float) -> dict[str, float]:
        """Cosmos counts from the conditional prediction, cond + g (cond - uncond): g = scale - 1.

        Raises:
            ValueError: a scale between 1 and 2, which the pipeline takes for none.
        """
        if 1.0 < scale <= 2.0:
            raise ValueError(
                f"a Cosmos pipeline cannot be called with guidance {scale:g}: it counts {scale - 1:g} (one less), and "
                "up to 1 it leaves guidance out; take 1 for none, or more than 2"
            )
        return {"guidance_scale": scale - 1.0}

    @cached_property
    def schedule(self) -> NoiseSchedule:
        return NoiseSchedule("flow", num_train_timesteps=1)  # the network is told t itself

    def teacher_times(self, num_steps: int, shape: Sequence[int]) -> tuple[SolverStep, ...]:
        """The network is told each sigma, whatever timesteps the scheduler counts."""
        steps = super().teacher_times(num_steps, shape)
        return tuple(step._replace(timestep=step.start[1]) for step in steps)

    def call(self, transformer: Any, x_t: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        batch, height, width = len(x_t), *x_t.shape[3:]
        given = x_t.new_zeros(batch, 1, x_t.shape[2], 1, 1, dtype=torch.float32)
        given[:, :, : self.given_frames] = 1.0
        t = given * CLEAN + (1.0 - given) * timestep.float().view(batch, 1, 1, 1, 1)
        x_t = self.network_input(x_t, cond).to(dtype_of(transformer))
        output: Tensor = transformer(
            hidden_states=x_t,
            condition_mask=given.to(x_t).expand(-1, -1, -1, height, width),
            timestep=t,
            encoder_hidden_states=cond["prompt_embeds"].to(dtype_of(transformer)),
            padding_mask=x_t.new_zeros(1, 1, height, width),
            return_dict=False,
        )[0]
        return output

    def few_step_scheduler(self, steps: Sequence[float], kind: SampleKind) -> Any:
        return few_step_flow_scheduler(steps, kind)

    def stand_ins(self) -> dict[str, Any]:
        return super().stand_ins() | {"safety_checker": NotAsked()}


class Cosmos25ImageBackbone(GivenFirstFrame, Cosmos25Backbone):
    """Image-to-world, by the same pipeline and network; so a recipe has to name it (`model.backbone`)."""

    given_frames = 1

    def image_arguments(self, image: Any) -> dict[str, Any]:
        """As a video of one frame, which comes to the same and needs no torchvision."""
        return {"video": [image], "num_latent_conditional_frames": 1}

    def few_step_scheduler(self, steps: Sequence[float], kind: SampleKind) -> Any:
        if kind == "sde":
            raise ValueError(
                "the Cosmos pipeline moves the given frame by the noise that it drew first, so fresh noise would stay "
                "in that frame; set model.sampling.kind: ode"
            )
        return super().few_step_scheduler(steps, kind)
