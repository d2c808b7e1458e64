"""What is checked of a teacher against its pipeline: each a function that raises AssertionError, or answers the error
that it measured.

Axis legend: B batch, C channels, F frames, H height, W width; latents are [B, ...] in the backbone's layout.
"""

from __future__ import annotations

import inspect
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lightning_dfd.data import LatentCache, VideoDataModule, list_clips, write_cache, write_video
from lightning_dfd.diffusion.noise import Time
from lightning_dfd.diffusion.sampler import Rollout, sample, stateless
from lightning_dfd.evaluation.pictures import to_frames
from lightning_dfd.export import call_arguments, posterior_means
from lightning_dfd.objectives import guide
from lightning_dfd.testing.case import PROMPTS, Case, gap, require
from lightning_dfd.testing.variants import vary
from lightning_dfd.types import Conditioning, VideoSize

GUIDANCE = 4.0


def layout(case: Case, folder: Path) -> float:
    """Videos become latents of `latent_shape`; `denormalise` undoes `normalise`, `unpack` undoes `pack`."""
    backbone, videos = case.load(torch.float32), case.videos()  # fresh: nothing of it is loaded yet
    backbone.check_size(case.size)
    latents = backbone.encode_videos(videos)
    shape = backbone.latent_shape(case.size)
    require(latents.shape[1:] == shape, f"encode_videos gives {tuple(latents.shape[1:])}, latent_shape says {shape}")
    require(latents.dtype == torch.float32, f"encode_videos gives {latents.dtype}, not float32")
    require(torch.equal(backbone.unpack(backbone.pack(latents), shape), latents), "unpack does not undo pack")
    error = gap(backbone.normalise(backbone.denormalise(latents)), latents)
    require(error < 1e-4, f"denormalise and normalise change latents by {error:.1e}")
    nearest = backbone.sizes().nearest
    others = (nearest(VideoSize(frames, case.size.height, case.size.width)) for frames in (2 * case.size.frames, 1))
    other = next((size for size in others if size.frames != case.size.frames), None)
    if other is not None:
        moved = [axis for axis, (a, b) in enumerate(zip(shape, backbone.latent_shape(other), strict=True), 1) if a != b]
        require(moved == [backbone.schedule.frame_axis], f"axis {moved} of latents is f, frame_axis says otherwise")
    require("encoders" not in backbone.loader.loaded, "encoding videos loaded the text encoders")
    return error


def decode(case: Case, folder: Path) -> float:
    """`decode_latents` gives the pixels that the pipeline makes of the same latents."""
    latents = pipeline_output(case, 2, 1.0, "latent")
    pixels = pipeline_output(case, 2, 1.0, "pt")  # [B, F, C, H, W] in [0, 1]
    ours = case.teacher.decode_latents(case.teacher.unpack(latents, case.teacher.latent_shape(case.size)))
    error = gap((ours.transpose(1, 2) + 1) / 2, pixels.float())
    require(error < case.pixel_error, f"decode_latents differs from the pipeline's pixels by {error:.1e}")
    return error


def prompts(case: Case, folder: Path) -> float:
    """A prompt's conditioning is the same alone and in a batch, and of one shape for all prompts."""
    together = case.teacher.encode_prompts(PROMPTS)
    alone = Conditioning.cat([case.teacher.encode_prompts([prompt]) for prompt in PROMPTS])
    require(together.tensors.keys() == alone.tensors.keys(), "other tensors in a batch than alone")
    errors = [gap(alone[name].float(), tensor.float()) for name, tensor in together.tensors.items()]
    require(max(errors) < 1e-4, f"a prompt's conditioning changes by {max(errors):.1e} when it is in a batch")
    return max(errors)


def x0(case: Case, folder: Path) -> float:
    """One step of the pipeline, without guidance, is our x0: its scheduler's step and ours agree."""
    shape = case.teacher.latent_shape(case.size)
    few = case.least_steps
    noisy = case.teacher.teacher_times(few, shape)[0].start[1] > 0.5  # some begin one step with hardly any noise
    return _replay(case, few if noisy else 2, 1.0)


def replay(case: Case, folder: Path) -> float:
    """The pipeline's guided sampling, in 4 and in 7 steps, comes out of our sampler."""
    return max(_replay(case, steps, GUIDANCE) for steps in (4, 7))


def held_out(case: Case, folder: Path) -> float:
    """So it does in two configurations that are drawn anew in every run, unless the environment has CONTRACT_SEED."""
    first = int(os.environ.get("CONTRACT_SEED") or secrets.randbelow(10**6))
    errors = []
    for seed in (first, first + 1):
        other, steps, drawn = vary(case, folder / f"tiny-{seed}", seed)
        try:
            errors.append(_replay(other, steps, GUIDANCE))
        except Exception as error:
            raise AssertionError(f"{error}; with CONTRACT_SEED={seed}: {drawn}") from error
    return max(errors)


def image(case: Case, folder: Path) -> float | None:
    """With an image-to-video teacher the image decides what is made, or is its first frame; others know none."""
    x_t, t, cond = case.inputs()
    images = case.teacher.encode_images(case.videos()[:, :, 0], case.size.frames)
    require(bool(images.tensors) == case.teacher.takes_image, "takes_image is not what encode_images says")
    if not case.teacher.takes_image:
        return None
    other = case.teacher.encode_images(-case.videos()[:, :, 0], case.size.frames)
    transformer = case.teacher.load_transformer()
    with torch.no_grad():
        made = case.teacher.x0(transformer, x_t, t, cond)
        changed = case.teacher.x0(transformer, x_t, t, cond | other)
    require(gap(made, changed) > 1e-3, "another image changes nothing")
    return gap(case.teacher.keep_given(made, cond), made)


@torch.no_grad()
def _replay(case: Case, steps: int, guidance: float) -> float:
    backbone = case.teacher
    theirs = pipeline_output(case, steps, guidance, "latent").float()
    noise, transformer = _first_noise(case), backbone.load_transformer()
    cond = case.conditioning(_prompts(case))
    negative = backbone.unconditional(backbone.encode_negative(["bad"]), cond)

    def denoise(x_t: Tensor, t: Time) -> Tensor:
        conditional = backbone.x0(transformer, x_t, t, cond)
        return guide(backbone.x0(transformer, x_t, t, negative), conditional, guidance)

    times = backbone.teacher_times(steps, noise.shape[1:])
    require(len(times) == steps, f"teacher_times gives {len(times)} times for {steps} steps")
    ours = backbone.finish(sample(stateless(denoise), backbone.schedule, Rollout(noise), times).latents)
    size = max(1.0, float(theirs.std()))  # an untrained network that predicts noise makes latents of a hundred
    error = gap(backbone.pack(ours), theirs) / size
    require(error < 1e-4, f"{steps} steps at guidance {guidance:g} differ from the pipeline's by {error:.1e}")
    require(gap(ours, noise) > 0.1, "sampling changed nothing")
    return error


def _prompts(case: Case) -> Sequence[str]:
    return PROMPTS[:1] if case.teacher.takes_image else PROMPTS  # some pipelines take one image a call


def _first_noise(case: Case) -> Tensor:
    return case.noise(len(_prompts(case)))


@torch.no_grad()
def pipeline_output(case: Case, steps: int, guidance: float, output_type: str) -> Tensor:
    """What the stock pipeline makes of `PROMPTS`, of one alone where it begins with an image.

    Prompt by prompt: no sample may depend on what else is in its batch, though some pipelines pad to the longest.
    """
    backbone, texts = case.teacher, list(_prompts(case))
    pipe = backbone.loader.pipeline()
    pipe.set_progress_bar_config(disable=True)
    backbone.prepare(pipe, guidance)
    call = call_arguments(backbone, type(pipe), case.size, steps, guidance)
    if backbone.takes_image:
        call |= backbone.image_arguments(Image.fromarray(to_frames(case.videos(1))[0, 0].numpy()))
    if "negative_prompt" in inspect.signature(type(pipe).__call__).parameters:
        call["negative_prompt"] = "bad"
    start = backbone.pipeline_latents(_first_noise(case), case.conditioning(texts))
    with posterior_means():
        frames = [
            pipe(prompt=text, latents=one[None].clone(), output_type=output_type, **call).frames
            for text, one in zip(texts, start, strict=True)
        ]
    return torch.cat(frames)


def cache(case: Case, folder: Path) -> float:
    """Latents and conditioning from a cache are what the encoders give of the same files."""
    backbone = case.teacher
    (folder / "data").mkdir(exist_ok=True)
    for number, (video, text) in enumerate(zip(to_frames(case.videos()), PROMPTS, strict=True)):
        write_video(folder / "data" / f"{number}.mp4", video, 8.0)
        (folder / "data" / f"{number}.txt").write_text(text, encoding="utf-8")
    write_cache(backbone, list_clips(folder / "data").clips, folder / "cache", case.size, None)
    kept = LatentCache.open(folder / "cache").load(0)
    size: dict[str, Any] = {"frames": case.size.frames, "height": case.size.height, "width": case.size.width}
    live = VideoDataModule(folder=str(folder / "data"), **size)
    live.setup()
    video = live.real_video(live.clips[0], backbone.decode_latents)
    latents, images = backbone.encode_videos(video), backbone.encode_images(video[:, :, 0], case.size.frames)
    cond = backbone.encode_prompts([live.clips[0].caption]) | images
    require(kept.latents is not None and kept.cond is not None, "the cache holds no latents")
    assert kept.latents is not None
    assert kept.cond is not None
    require(kept.cond.tensors.keys() == cond.tensors.keys(), "the cache holds other tensors than the encoders give")
    errors = [gap(kept.cond[name].float(), tensor.float()) for name, tensor in cond.tensors.items()]
    error = max(gap(kept.latents[None], latents), *errors)
    require(error < 1e-4, f"the cache differs from the encoders by {error:.1e}")
    return error
