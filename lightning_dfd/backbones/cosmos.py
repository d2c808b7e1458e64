"""Cosmos-Predict2.5 text-to-world (2511.00062): flow matching, a network that is told the time frame by frame.

Axis legend: B batch, C channels, f, h, w frames, height and width of latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from diffusers import AutoencoderKLWan, CosmosTransformer3DModel
from diffusers.utils import is_torchvision_available
from torch import Tensor, nn

from lightning_dfd.backbones.base import load_pipeline, teacher_not_found
from lightning_dfd.backbones.channels import PerChannel
from lightning_dfd.backbones.flow import few_step_flow_scheduler
from lightning_dfd.noise import NoiseSchedule
from lightning_dfd.types import Conditioning, SampleKind, VideoSize

CLEAN = 1e-4  # what the network is told as the time of given frames: `conditional_frame_timestep` of the call


class NotAsked:
    """Stands where a Cosmos pipeline's constructor demands a safety checker, if the pipeline is only to encode.

    It answers nothing, so a pipeline that holds it cannot be called; no such pipeline leaves this package.
    """


class Cosmos25Backbone(PerChannel):
    """Latents [B, C, f, h, w], each channel by its own mean and standard deviation."""

    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")

    def text_length(self) -> int:
        return 512  # the default of the pipeline's call

    def compression(self) -> tuple[int, int]:
        halved = self.vae_config["temperal_downsample"]
        return 2 ** sum(halved), 2 ** len(halved)

    def latent_shape(self, size: VideoSize) -> tuple[int, ...]:
        channels, *rest = super().latent_shape(size)
        return channels - 1, *rest  # the network's last channel says which frames are given

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

    def call(self, transformer: Any, x_t: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        batch, height, width = len(x_t), *x_t.shape[3:]
        given = self.given_frames(x_t)
        t = given * CLEAN + (1.0 - given) * timestep.float().view(batch, 1, 1, 1, 1)
        x_t = self.put_image(x_t, cond).to(transformer.dtype)
        output: Tensor = transformer(
            hidden_states=x_t,
            condition_mask=given.to(x_t).expand(-1, -1, -1, height, width),
            timestep=t,
            encoder_hidden_states=cond["prompt_embeds"].to(transformer.dtype),
            padding_mask=x_t.new_zeros(1, 1, height, width),
            return_dict=False,
        )[0]
        return output

    def given_frames(self, x_t: Tensor) -> Tensor:
        """1 where a frame of latents is given, 0 where it is to be made: [B, 1, f, 1, 1], float32. None is given."""
        return x_t.new_zeros(len(x_t), 1, x_t.shape[2], 1, 1, dtype=torch.float32)

    def put_image(self, latents: Tensor, cond: Conditioning) -> Tensor:
        """Latents [B, C, f, h, w] with the given frames in their places."""
        return latents

    def few_step_scheduler(self, steps: Sequence[float], kind: SampleKind) -> Any:
        return few_step_flow_scheduler(steps, kind)

    # Part by part: the pipeline's constructor wants a VAE, and a safety checker that it else downloads.

    def load_transformer(self) -> nn.Module:
        if self.transformer_config["concat_padding_mask"] and not is_torchvision_available():
            raise ImportError(
                f"the network of {self.source} resizes a mask by torchvision, which is not installed; "
                "pip install torchvision, in the version that goes with your torch"
            )
        return self._load(CosmosTransformer3DModel, "transformer")

    @cached_property
    def vae(self) -> Any:
        return self._load(AutoencoderKLWan, "vae").to(self.device)

    def _load(self, kind: Any, folder: str) -> nn.Module:
        try:
            part: nn.Module = kind.from_pretrained(self.source, subfolder=folder, dtype=self.dtype)
        except OSError as error:
            raise teacher_not_found(f"{self.source}, {folder}", error) from error
        return part.eval().requires_grad_(False)

    @cached_property
    def encoders(self) -> Any:
        pipe = load_pipeline(self.source, self.dtype, transformer=None, vae=self.vae, safety_checker=NotAsked())
        pipe.text_encoder.eval().requires_grad_(False).to(self.device)
        return pipe


class Cosmos25ImageBackbone(Cosmos25Backbone):
    """Image-to-world: the first frame of latents is that of an image, `image_latents` [B, C, 1, h, w], and stays so.

    The pipeline is the same as for text alone, so this has to be named: `model.backbone`.
    """

    def given_frames(self, x_t: Tensor) -> Tensor:
        given = super().given_frames(x_t)
        given[:, :, :1] = 1.0
        return given

    def put_image(self, latents: Tensor, cond: Conditioning) -> Tensor:
        return torch.cat([cond["image_latents"].to(latents), latents[:, :, 1:]], dim=2)

    def x0(self, transformer: Any, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return self.put_image(super().x0(transformer, x_t, t, cond), cond)

    def few_step_scheduler(self, steps: Sequence[float], kind: SampleKind) -> Any:
        if kind == "renoise":
            raise ValueError(
                "the Cosmos pipeline moves the given frame by the noise that it drew first, so fresh noise would stay "
                "in that frame; set model.sampling.kind: ode"
            )
        return super().few_step_scheduler(steps, kind)
