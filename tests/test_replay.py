"""Every backbone replays its own pipeline: our many-step teacher equals the pipeline's final latents."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from lightning_dfd.backbones import Backbone, backbone_from_pretrained
from lightning_dfd.export import call_arguments
from lightning_dfd.objectives import guide
from lightning_dfd.sampler import sample
from lightning_dfd.tiny import TINY
from lightning_dfd.types import VideoSize

PROMPTS = ["a cat", "two dogs run"]


def stock(backbone: Backbone, guidance: float) -> Any:
    """The pipeline itself, ready for calls with this guidance."""
    pipe = DiffusionPipeline.from_pretrained(backbone.source)
    pipe.set_progress_bar_config(disable=True)
    backbone.prepare(pipe, guidance)
    return pipe


@pytest.mark.parametrize("steps", [4, 10])
@torch.no_grad()
def test_teacher_sampler_equals_pipeline(backbone: Backbone, family: str, size: VideoSize, steps: int) -> None:
    pipe = stock(backbone, 4.0)
    shape = backbone.latent_shape(size)
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    arguments = call_arguments(backbone, type(pipe), size, steps, 4.0)
    together = TINY[family].prompts_a_call
    theirs = torch.cat(
        [
            pipe(
                PROMPTS[first : first + together],
                negative_prompt=["bad"] * together,
                latents=backbone.pack(noise[first : first + together]),
                output_type="latent",
                **arguments,
            ).frames
            for first in range(0, len(PROMPTS), together)
        ]
    )
    transformer = backbone.load_transformer()
    cond, bad = backbone.encode_prompts(PROMPTS), backbone.encode_prompts(["bad"])
    negative = backbone.unconditional(bad, cond)

    def denoise(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return guide(backbone.x0(transformer, x_t, t, negative), backbone.x0(transformer, x_t, t, cond), 4.0)

    ours = sample(denoise, backbone.schedule, noise, backbone.teacher_times(steps, shape))
    scale = max(1.0, float(theirs.std()))  # an untrained network that predicts noise makes latents of a hundred
    assert (backbone.pack(ours) - theirs).abs().max() < 1e-4 * scale
    assert (ours - noise).abs().mean() > 0.1


@torch.no_grad()
def test_latents_decode_like_the_pipeline(backbone: Backbone, size: VideoSize) -> None:
    pipe = stock(backbone, 1.0)
    arguments = call_arguments(backbone, type(pipe), size, 2)
    noise = torch.randn(1, *backbone.latent_shape(size), generator=torch.Generator().manual_seed(0))
    latents = pipe("a cat", latents=backbone.pack(noise), output_type="latent", **arguments).frames
    pixels = pipe(
        "a cat", latents=backbone.pack(noise), output_type="pt", **arguments
    ).frames  # [B, F, C, H, W] in [0, 1]
    ours = backbone.decode_latents(backbone.unpack(latents, noise.shape[1:]))
    assert ours.shape == (1, 3, size.frames, size.height, size.width)
    torch.testing.assert_close((ours.transpose(1, 2) + 1) / 2, pixels, rtol=0, atol=1e-4)


def test_latent_layout_round_trip(backbone: Backbone, size: VideoSize) -> None:
    videos = torch.rand(2, 3, size.frames, size.height, size.width) * 2 - 1
    latents = backbone.encode_videos(videos)
    assert latents.shape == (2, *backbone.latent_shape(size))
    with torch.no_grad():
        raw = backbone.encode(videos)
    torch.testing.assert_close(backbone.denormalise(backbone.normalise(raw)), raw, rtol=1e-5, atol=1e-5)


def test_transformer_is_loaded_without_the_encoders(backbone: Backbone) -> None:
    backbone.load_transformer()
    assert not {"encoders", "vae"} & set(vars(backbone))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loads_in_any_precision(tiny: dict, family: str, size: VideoSize, dtype: torch.dtype) -> None:
    backbone = backbone_from_pretrained(str(tiny[family]), dtype, TINY[family].text_length)
    transformer = backbone.load_transformer()
    assert transformer.dtype == dtype
    x_t = torch.randn(1, *backbone.latent_shape(size))
    with torch.no_grad():
        x0 = backbone.x0(transformer, x_t, torch.tensor([0.5]), backbone.encode_prompts(["a cat"]))
    assert x0.dtype == torch.float32
    assert x0.isfinite().all()


def test_sizes_that_do_not_divide_are_refused(backbone: Backbone, size: VideoSize) -> None:
    backbone.check_size(size)
    with pytest.raises(ValueError, match=f"nearest is {size}"):
        backbone.check_size(VideoSize(size.frames + 1, size.height + 1, size.width + 2))


def test_missing_and_unknown_teachers_are_named(tmp_path, tiny: dict) -> None:
    with pytest.raises(FileNotFoundError, match="hf download"):
        backbone_from_pretrained(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="not a subclass"):
        backbone_from_pretrained(str(tiny["wan"]), backbone="torch.nn.Linear")
    (tmp_path / "model_index.json").write_text('{"_class_name": "SomePipeline"}')
    with pytest.raises(ValueError, match=r"SomePipeline.*CogVideoXPipeline"):
        backbone_from_pretrained(str(tmp_path))
