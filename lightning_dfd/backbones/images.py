"""The two ways in which image-to-video networks are shown the image that their videos begin with.

Axis legend: B batch, C channels, F frames, H height, W width; f, h, w the same in latents.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from PIL import Image
from torch import Tensor

from lightning_dfd.backbones.base import Backbone
from lightning_dfd.types import Conditioning, SampleKind, VideoSize


class ImageChannels(Backbone):
    """The image is further channels of the network's input, `image_latents`, on every frame of the latents.

    The first frame of what is made comes from the network like all others.
    """

    takes_image = True
    channel_axis: ClassVar[int] = 1

    def dummy_images(self, batch_size: int, size: VideoSize) -> Conditioning:
        shape = list(self.latent_shape(size))
        shape[self.channel_axis - 1] = int(self.configs.transformer["in_channels"]) - self.latent_channels()
        return Conditioning({"image_latents": torch.zeros(batch_size, *shape)})

    def network_input(self, x_t: Tensor, cond: Conditioning) -> Tensor:
        return torch.cat([x_t, cond["image_latents"].to(x_t)], self.channel_axis)


class GivenFirstFrame(Backbone):
    """The image is the first frame of the latents, free of noise, at a time of 0; it is never changed.

    So it costs no channels, and text-to-video networks of such families take images too.
    """

    takes_image = True
    frame_axis: ClassVar[int] = 2

    @torch.no_grad()
    def encode_images(self, images: Tensor, frames: int) -> Conditioning:
        return Conditioning({"image_latents": self.encode_videos(images.unsqueeze(2))})

    def dummy_images(self, batch_size: int, size: VideoSize) -> Conditioning:
        frame = self.latent_shape(replace(size, frames=1))
        return Conditioning({"image_latents": torch.zeros(batch_size, *frame)})

    def keep_given(self, latents: Tensor, cond: Conditioning) -> Tensor:
        given = cond["image_latents"].to(latents)
        rest = latents.narrow(self.frame_axis, 1, latents.shape[self.frame_axis] - 1)
        return torch.cat([given, rest], self.frame_axis)


def refuse_sde(kind: SampleKind) -> None:
    """For pipelines whose scheduler steps the later frames alone; raises ValueError for `sde`."""
    if kind == "sde":
        raise ValueError(
            "this image-to-video pipeline draws fresh noise for the later frames alone, so its videos are not those of "
            "our sampler; set model.sampling.kind: ode"
        )


def to_pictures(images: Tensor) -> list[Image.Image]:
    """Images [B, C, H, W] in [-1, 1] as 8-bit pictures, which image encoders' processors take."""
    pixels = ((images.clamp(-1.0, 1.0) + 1.0) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(one) for one in pixels]


def token_times(timestep: Tensor, frames: int, tokens_per_frame: int, given_frames: int = 0) -> Tensor:
    """The time of every token, [B, frames * tokens_per_frame], from one a clip [B]: 0 in the frames that are given."""
    times = timestep.repeat_interleave(frames * tokens_per_frame).view(len(timestep), -1)
    return torch.cat([times[:, : given_frames * tokens_per_frame] * 0, times[:, given_frames * tokens_per_frame :]], 1)
