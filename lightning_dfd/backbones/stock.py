"""How a family's diffusers pipeline is set up and called."""

from __future__ import annotations

from typing import Any

from lightning_dfd.backbones.family import Family
from lightning_dfd.types import VideoSize


class StockPipeline(Family):
    """The stock pipeline's arguments, and what has to be set on it."""

    def guidance_arguments(self, scale: float) -> dict[str, float]:
        """How the pipeline's call is told to use classifier-free guidance of this scale; 1 is none."""
        return {"guidance_scale": scale}

    def size_arguments(self, size: VideoSize) -> dict[str, Any]:
        """How the pipeline's call is told what size of video to generate."""
        return {"num_frames": size.frames, "height": size.height, "width": size.width}

    def image_arguments(self, image: Any) -> dict[str, Any]:
        """How an image-to-video pipeline's call is given the image with which the video begins."""
        return {"image": image}

    def prepare(self, pipe: Any, guidance: float = 1.0) -> None:
        """Set on a stock pipeline what its call takes no arguments for."""

    def preparation(self) -> tuple[str, ...]:
        """`prepare` without guidance as lines of code about `pipe`, for model cards."""
        return ()

    def prepare_vae(self, vae: Any) -> None:
        """Set on a VAE what it cannot do without."""

    def stand_ins(self) -> dict[str, Any]:
        """What a pipeline that only encodes holds in place of parts that are not loaded: nothing for the networks."""
        return dict.fromkeys(self.networks)
