"""Every backbone replays its own pipeline: our many-step teacher equals the pipeline's final latents."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiffusionPipeline

from lightning_dfd.backbones import Backbone, backbone_from_pretrained
from lightning_dfd.objectives import guide
from lightning_dfd.sampler import sample
from lightning_dfd.tiny import TEXT_LENGTH, TINY
from lightning_dfd.types import VideoSize

PROMPTS = ["a cat", "two dogs run"]


@pytest.mark.parametrize("steps", [4, 10])
@torch.no_grad()
def test_teacher_sampler_equals_pipeline(backbone: Backbone, size: VideoSize, steps: int) -> None:
    pipe = DiffusionPipeline.from_pretrained(backbone.source)
    pipe.set_progress_bar_config(disable=True)
    shape = backbone.latent_shape(size)
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    theirs = pipe(
        prompt=PROMPTS,
        negative_prompt=["bad"] * 2,
        num_frames=size.frames,
        height=size.height,
        width=size.width,
        num_inference_steps=steps,
        latents=backbone.pack(noise),
        max_sequence_length=TEXT_LENGTH,
        output_type="latent",
        **backbone.guidance_arguments(4.0),
    ).frames
    transformer = backbone.load_transformer()
    cond, negative = backbone.encode_prompts(PROMPTS), backbone.encode_prompts(["bad"]).expand(2)

    def denoise(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return guide(backbone.x0(transformer, x_t, t, negative), backbone.x0(transformer, x_t, t, cond), 4.0)

    ours = sample(denoise, backbone.schedule, noise, backbone.teacher_times(steps, shape))
    assert (backbone.pack(ours) - theirs).abs().max() < 1e-4
    assert (ours - noise).abs().mean() > 0.1


@torch.no_grad()
def test_latents_decode_like_the_pipeline(backbone: Backbone, family: str, size: VideoSize) -> None:
    pipe = DiffusionPipeline.from_pretrained(backbone.source)
    pipe.set_progress_bar_config(disable=True)
    arguments = {
        "num_frames": size.frames,
        "height": size.height,
        "width": size.width,
        "num_inference_steps": 2,
        **backbone.guidance_arguments(1.0),
        "max_sequence_length": TEXT_LENGTH,
    }
    noise = torch.randn(1, *backbone.latent_shape(size), generator=torch.Generator().manual_seed(0))
    latents = pipe(prompt="a cat", latents=backbone.pack(noise), output_type="latent", **arguments).frames
    pixels = pipe(
        prompt="a cat", latents=backbone.pack(noise), output_type="pt", **arguments
    ).frames  # [B, F, C, H, W] in [0, 1]
    ours = backbone.decode_latents(backbone.unpack(latents, noise.shape[1:]))
    assert ours.shape == (1, 3, size.frames, size.height, size.width)
    torch.testing.assert_close((ours.transpose(1, 2) + 1) / 2, pixels, rtol=0, atol=TINY[family].pixel_error)


def test_latent_layout_round_trip(backbone: Backbone, size: VideoSize) -> None:
    videos = torch.rand(2, 3, size.frames, size.height, size.width) * 2 - 1
    latents = backbone.encode_videos(videos)
    assert latents.shape == (2, *backbone.latent_shape(size))
    with torch.no_grad():
        raw = backbone.vae.encode(videos).latent_dist.mode()
    torch.testing.assert_close(backbone.denormalise(backbone.normalise(raw)), raw, rtol=1e-5, atol=1e-5)


def test_transformer_is_loaded_without_the_encoders(backbone: Backbone) -> None:
    backbone.load_transformer()
    assert not {"encoders", "vae"} & set(vars(backbone))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loads_in_any_precision(tiny: dict, family: str, size: VideoSize, dtype: torch.dtype) -> None:
    backbone = backbone_from_pretrained(str(tiny[family]), dtype, TEXT_LENGTH)
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
    (tmp_path / "model_index.json").write_text('{"_class_name": "LattePipeline"}')
    with pytest.raises(ValueError, match=r"LattePipeline.*CogVideoXPipeline"):
        backbone_from_pretrained(str(tmp_path))
