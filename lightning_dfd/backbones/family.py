"""What is true of a family's pipelines, by their configs alone: nothing is loaded.

Axis legend: C channels, f, h, w frames, height and width of latents.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from lightning_dfd.backbones.configs import Configs
from lightning_dfd.backbones.sizes import Sizes, patch_of
from lightning_dfd.types import VideoSize

TEXT_WIDTHS = ("text_embed_dim", "text_dim", "caption_channels", "in_text_dim")  # what the families' configs call it
FEATURES = ("d_model", "hidden_size")  # of a token, in the config of a text or image encoder


class Family(ABC):
    """A teacher's names, lengths, channels and sizes; its arguments are those of `Backbone`.

    Raises:
        ValueError: the network does not take so many text tokens.
    """

    lora_targets: ClassVar[tuple[str, ...]]  # names of the linear layers that LoRA adapts
    networks: ClassVar[tuple[str, ...]] = ("transformer",)  # the pipeline's parts that denoise
    pipeline_class: ClassVar[str | None] = None  # of diffusers, where another is meant than the folder names
    frame_axis: ClassVar[int] = 2  # of latents, where [B, C, f, h, w] has it
    takes_image: ClassVar[bool] = False  # whether videos begin with a given image; then `encode_images` is there too

    def __init__(self, source: str, dtype: torch.dtype = torch.float32, max_sequence_length: int | None = None) -> None:
        self.source = str(source)
        self.dtype = dtype
        self.configs = Configs(self.source)
        self.max_sequence_length = self.text_length() if max_sequence_length is None else max_sequence_length
        if max_sequence_length is not None:
            self._check_text_length(max_sequence_length)

    def _check_text_length(self, tokens: int) -> None:
        (least, most), own = self.text_limits(), self.text_length()
        if least == most != tokens:
            raise ValueError(
                f"model.max_sequence_length is {tokens}, but this pipeline always takes {most} text tokens; "
                "leave it null"
            )
        if tokens < least or (most is not None and tokens > most):
            upto = "" if most is None else f" and at most {most}"
            raise ValueError(
                f"model.max_sequence_length is {tokens}; this pipeline takes at least {least}{upto}, by default {own}"
            )

    @property
    def pipeline_name(self) -> str:
        """The pipeline's class in diffusers."""
        return self.pipeline_class or str(self.configs.pipeline["_class_name"])

    @abstractmethod
    def text_length(self) -> int:
        """Text tokens per prompt where a recipe does not say."""

    def text_limits(self) -> tuple[int, int | None]:
        """The least and the most text tokens that pipeline and network take; None for no limit."""
        return 1, None

    @abstractmethod
    def compression(self) -> tuple[int, int]:
        """(temporal, spatial) compression of the VAE."""

    def latent_channels(self) -> int:
        """Channels of the latents; the network's input may have more, for an image."""
        vae = self.configs.vae
        own = next((vae[key] for key in ("latent_channels", "z_dim") if key in vae), None)
        return int(self.configs.transformer["in_channels"] if own is None else own)

    def network_channels(self) -> tuple[int, int]:
        """Channels that the network has to take, and those that it has to answer with."""
        return self.latent_channels(), self.latent_channels()

    def encoder_widths(self) -> dict[str, int | None]:
        """Features of a token that the network takes from each of the pipeline's encoders, by the encoder's name; None
        where its config does not say."""
        config = self.configs.transformer
        return {"text_encoder": next((int(config[key]) for key in TEXT_WIDTHS if key in config), None)}

    def features_of(self, name: str, config: Mapping[str, Any]) -> int | None:
        """Features of a token that the encoder `name` gives, by its config; None where that does not say."""
        inner = config.get("text_config")
        own = inner if isinstance(inner, Mapping) else config
        found = next((own[key] for key in FEATURES if own.get(key) is not None), None)
        return None if found is None else int(found)

    def latent_shape(self, size: VideoSize) -> tuple[int, ...]:
        """Shape of one clip's latents, without the batch axis, in the backbone's layout: [C, f, h, w]."""
        temporal, spatial = self.compression()
        frames = (size.frames - 1) // temporal + 1
        return self.latent_channels(), frames, size.height // spatial, size.width // spatial

    def sizes(self) -> Sizes:
        """The sizes of video that fit: whole patches of whole latents, without a limit."""
        return Sizes(compression=self.compression(), patch=patch_of(self.configs.transformer))

    def check_size(self, size: VideoSize) -> None:
        """Raise ValueError, naming the nearest size that works, for one that does not fit."""
        self.sizes().check(size, self.source)
