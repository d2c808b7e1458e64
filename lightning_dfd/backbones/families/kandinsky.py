"""Kandinsky 5, text- and image-to-video (2511.14993): flow matching, two text encoders, channels last.

Axis legend: B batch, C channels, f, h, w frames, height and width of latents, L text tokens, D features.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import Kandinsky5I2VPipeline
from torch import Tensor, nn

from lightning_dfd.backbones.base import Backbone
from lightning_dfd.backbones.flow import few_step_flow_scheduler
from lightning_dfd.backbones.images import GivenFirstFrame, refuse_sde
from lightning_dfd.backbones.meta import dtype_of
from lightning_dfd.backbones.sizes import Sizes
from lightning_dfd.types import Conditioning, SampleKind, VideoSize


class Kandinsky5Backbone(Backbone):
    """Latents [B, f, h, w, C], scaled by the VAE's `scaling_factor`."""

    lora_targets = (
        "to_query",
        "to_key",
        "to_value",
        "self_attention.out_layer",  # with its parent's name: the time embedding has an out_layer too
        "cross_attention.out_layer",
        "feed_forward.in_layer",
        "feed_forward.out_layer",
    )
    frame_axis = 1
    given_frames = 0  # frames of the latents that are an image's, free of noise

    def text_length(self) -> int:
        return 512  # the default of the pipeline's call, without its template

    def compression(self) -> tuple[int, int]:
        return int(self.configs.vae["temporal_compression_ratio"]), int(self.configs.vae["spatial_compression_ratio"])

    def text_limits(self) -> tuple[int, int | None]:
        return 1, 1024  # as `most_patches` a default of the network's position embeddings, in no config

    def sizes(self) -> Sizes:
        return replace(super().sizes(), most_patches=(128, 128, 128))

    def encoder_widths(self) -> dict[str, int | None]:
        return super().encoder_widths() | {"text_encoder_2": self.configs.transformer.get("in_text_dim2")}

    def latent_shape(self, size: VideoSize) -> tuple[int, ...]:
        temporal, spatial = self.compression()
        frames = (size.frames - 1) // temporal + 1
        return frames, size.height // spatial, size.width // spatial, self.latent_channels()

    def normalise(self, latents: Tensor) -> Tensor:
        return latents.permute(0, 2, 3, 4, 1) * float(self.configs.vae["scaling_factor"])

    def denormalise(self, latents: Tensor) -> Tensor:
        return latents.permute(0, 4, 1, 2, 3) / float(self.configs.vae["scaling_factor"])

    def pipeline_latents(self, latents: Tensor, cond: Conditioning) -> Tensor:
        """The network's input, in memory of its own: the pipeline writes into what it is given."""
        return self.network_input(latents, cond).clone()

    def network_input(self, x_t: Tensor, cond: Conditioning) -> Tensor:
        """With as many channels more, which are always zero, and a mask of the frames that an image gives."""
        x_t = super().network_input(x_t, cond)
        if not self.configs.transformer["visual_cond"]:
            return x_t
        mask = torch.zeros_like(x_t[..., :1])
        mask[:, : self.given_frames] = 1.0
        return torch.cat([x_t, torch.zeros_like(x_t), mask], dim=-1)

    def check_teacher(self) -> None:
        """As for other families, and that the network has no sparse attention, which runs on flex attention alone."""
        super().check_teacher()
        if (kind := self.configs.transformer["attention_type"]) != "regular":
            raise ValueError(
                f"{self.source} has attention_type {kind!r}; only 'regular' is supported, as in "
                "kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s-Diffusers: set model.teacher to such a pipeline"
            )

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """`prompt_embeds` [B, L, D] with zeros after `prompt_length` [B] tokens, `pooled_prompt_embeds` [B, D].

        One by one: a batch is padded to its longest, and the network would see that.
        """
        parts = []
        for prompt in prompts:
            embeds, pooled, _ = self.loader.encoders.encode_prompt(
                [prompt], max_sequence_length=self.max_sequence_length, device=self.loader.device
            )
            length = embeds.shape[1]
            named = {
                "prompt_embeds": nn.functional.pad(embeds, (0, 0, 0, self.max_sequence_length - length)),
                "prompt_length": torch.tensor([length], device=embeds.device),
                "pooled_prompt_embeds": pooled,
            }
            parts.append(Conditioning(named))
        return Conditioning.cat(parts)

    def dummy_prompts(self, batch_size: int) -> Conditioning:
        """As long as they can be."""
        further = {
            "prompt_length": torch.full((batch_size,), self.max_sequence_length),
            "pooled_prompt_embeds": torch.zeros(batch_size, self.configs.transformer["in_text_dim2"], dtype=self.dtype),
        }
        return super().dummy_prompts(batch_size) | Conditioning(further)

    def call(self, transformer: Any, x_t: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        """Prompts of different length in calls of their own, as the network has no mask for padding."""
        dtype = dtype_of(transformer)
        _, frames, height, width, _ = x_t.shape
        spatial = self.compression()[1]
        visible = self.network_input(x_t, cond).to(dtype)
        outputs = []
        for rows, length in _runs(cond["prompt_length"].tolist()):
            output: Tensor = transformer(
                hidden_states=visible[rows],
                encoder_hidden_states=cond["prompt_embeds"][rows, :length].to(dtype),
                pooled_projections=cond["pooled_prompt_embeds"][rows].to(dtype),
                timestep=timestep[rows].to(dtype),  # rounded like the pipeline's
                visual_rope_pos=[torch.arange(n, device=x_t.device) for n in (frames, height // 2, width // 2)],
                text_rope_pos=torch.arange(length, device=x_t.device),
                scale_factor=rope_scale(height * spatial, width * spatial),
                sparse_params=None,
                return_dict=False,
            )
            outputs.append(output)
        return torch.cat(outputs)

    def few_step_scheduler(self, steps: Sequence[float], kind: SampleKind) -> Any:
        return few_step_flow_scheduler(steps, kind)


class Kandinsky5ImageBackbone(GivenFirstFrame, Kandinsky5Backbone):
    """Image-to-video: the first frame of the latents is the image's, at the time of all others."""

    frame_axis = 1
    given_frames = 1

    def sizes(self) -> Sizes:
        return replace(super().sizes(), least_frames=17)  # five of latents: `finish` takes the fifth for a measure

    def finish(self, latents: Tensor) -> Tensor:
        """Mean and spread of the first four frames drawn to those of the next five, against a mesh that some show.

        Clip by clip, as the pipeline takes the measure of its whole batch.
        """
        pipeline: Any = Kandinsky5I2VPipeline  # whose method needs no instance
        return torch.cat([pipeline.normalize_first_frame(pipeline, clip) for clip in latents.split(1)])

    def few_step_scheduler(self, steps: Sequence[float], kind: SampleKind) -> Any:
        refuse_sde(kind)
        return super().few_step_scheduler(steps, kind)


def rope_scale(height: int, width: int) -> tuple[float, float, float]:
    """By how much the pipeline stretches positions along f, h and w, for a video of so many pixels."""
    standard = all(480 <= side <= 854 for side in (height, width))
    return (1.0, 2.0, 2.0) if standard else (1.0, 3.16, 3.16)


def _runs(values: Sequence[int]) -> Iterator[tuple[slice, int]]:
    """The rows of every run of equal values, in order, and the value."""
    start = 0
    for value, run in itertools.groupby(values):
        stop = start + len(list(run))
        yield slice(start, stop), value
        start = stop
