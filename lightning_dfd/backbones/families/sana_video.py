"""SANA-Video, text- and image-to-video (2509.24695): flow matching, linear attention, the latents of Wan's VAE."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from lightning_dfd.backbones.channels import PerChannel
from lightning_dfd.backbones.flow import few_step_flow_scheduler
from lightning_dfd.backbones.images import GivenFirstFrame, refuse_sde, token_times
from lightning_dfd.backbones.meta import dtype_of
from lightning_dfd.backbones.sizes import Sizes
from lightning_dfd.types import Conditioning, SampleKind, VideoSize

VAE = "AutoencoderKLWan"


class SanaVideoBackbone(PerChannel):
    """Latents [B, C, f, h, w], each channel by its own mean and standard deviation."""

    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")  # its feed-forward layers are convolutions

    def text_length(self) -> int:
        return 300  # the default of the pipeline's call, without its instruction

    def compression(self) -> tuple[int, int]:
        """Wan's. The pipeline takes two more kinds of VAE, whose latents are normalised in other ways.

        Raises:
            ValueError: the pipeline has another kind of VAE.
        """
        if (kind := self.configs.vae["_class_name"]) != VAE:
            raise ValueError(
                f"{self.source} has a {kind}; of SANA-Video only pipelines with {VAE} are supported, as "
                "Efficient-Large-Model/SANA-Video_2B_480p_diffusers has it: set model.teacher to such a one"
            )
        vae = self.configs.vae
        return int(vae.get("scale_factor_temporal", 4)), int(vae.get("scale_factor_spatial", 8))

    def sizes(self) -> Sizes:
        """With a multiple that the pipeline's call asks for, whatever its patches are."""
        most = int(self.configs.transformer.get("rope_max_seq_len", 1024))
        return replace(super().sizes(), most_patches=(most, most, most), multiple=32)

    def size_arguments(self, size: VideoSize) -> dict[str, Any]:
        """Without its binning, which would take another size than the student was trained at."""
        return {"frames": size.frames, "height": size.height, "width": size.width, "use_resolution_binning": False}

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """With the instruction to the text encoder that the pipeline's call puts before prompts by itself."""
        call = inspect.signature(type(self.loader.encoders).__call__).parameters
        return self._encode(prompts, complex_human_instruction=call["complex_human_instruction"].default)

    def encode_negative(self, prompts: Sequence[str]) -> Conditioning:
        """Negative prompts get no instruction."""
        return self._encode(prompts)

    def call(self, transformer: Any, x_t: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        output: Tensor = transformer(
            hidden_states=self.network_input(x_t, cond).to(dtype_of(transformer)),
            timestep=self.network_time(timestep.float(), x_t.shape[1:]),
            encoder_hidden_states=cond["prompt_embeds"].to(dtype_of(transformer)),
            encoder_attention_mask=cond["prompt_attention_mask"],
            return_dict=False,
        )[0]
        return output

    def network_time(self, timestep: Tensor, shape: Sequence[int]) -> Tensor:
        """What the network is told of times [B], for latents of `shape`."""
        return timestep

    def few_step_scheduler(self, steps: Sequence[float], kind: SampleKind) -> Any:
        return few_step_flow_scheduler(steps, kind)


class SanaVideoImageBackbone(GivenFirstFrame, SanaVideoBackbone):
    """Image-to-video by the same network: the image's tokens have a time of their own, 0."""

    def network_time(self, timestep: Tensor, shape: Sequence[int]) -> Tensor:
        """[B, 1, f, h, w], of patches."""
        frames, height, width = (
            side // patch for side, patch in zip(shape[1:], self.configs.transformer["patch_size"], strict=True)
        )
        times = token_times(timestep, frames, height * width, given_frames=1)
        return times.view(-1, 1, frames, height, width)

    def few_step_scheduler(self, steps: Sequence[float], kind: SampleKind) -> Any:
        refuse_sde(kind)
        return super().few_step_scheduler(steps, kind)
