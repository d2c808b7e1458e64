"""What only Cosmos has: its counting of guidance, the safety checker, the padding mask, its published scheduler."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, UniPCMultistepScheduler
from diffusers.models.transformers import transformer_cosmos
from diffusers.pipelines.cosmos import pipeline_cosmos2_5_predict as pipeline_module
from torch import Tensor, nn

from lightning_dfd.backbones import Backbone, Cosmos25ImageBackbone, backbone_from_pretrained
from lightning_dfd.backbones.families import cosmos
from lightning_dfd.diffusion.sampler import Rollout, sample, stateless
from lightning_dfd.objectives import guide
from lightning_dfd.testing.tiny import TEXT_LENGTH
from lightning_dfd.testing.tiny.cosmos import cosmos as tiny_cosmos
from lightning_dfd.types import Conditioning, VideoSize

SIZE = VideoSize(9, 32, 48)


def make(folder: Path) -> Backbone:
    return backbone_from_pretrained(str(folder), max_sequence_length=TEXT_LENGTH)


@torch.no_grad()
def replay_error(backbone: Backbone, steps: int, image: Tensor | None = None) -> float:
    """Largest difference of our guided sampling from the pipeline's; `image` [1, C, 1, H, W] is the first frame."""
    pipe, network = DiffusionPipeline.from_pretrained(backbone.source), backbone.load_transformer()
    told: list[Tensor] = []  # of time: what is given has one that hardly shows in latents
    for one in (pipe.transformer, network):
        one.register_forward_pre_hook(lambda _, args, named: told.append(named["timestep"]), with_kwargs=True)
    noise = torch.randn(1, *backbone.latent_shape(SIZE), generator=torch.Generator().manual_seed(0))
    theirs = pipe(
        prompt="a cat",
        negative_prompt="bad",
        num_frames=SIZE.frames,
        height=SIZE.height,
        width=SIZE.width,
        num_inference_steps=steps,
        latents=noise,
        max_sequence_length=TEXT_LENGTH,
        output_type="latent",
        **({} if image is None else {"video": image, "num_latent_conditional_frames": 1}),
        **backbone.guidance_arguments(4.0),
    ).frames
    cond, negative = backbone.encode_prompts(["a cat"]), backbone.encode_prompts(["bad"])
    if image is not None:
        first = {"image_latents": backbone.encode_videos(image)}
        cond, negative = (Conditioning({**given.tensors, **first}) for given in (cond, negative))

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        return guide(backbone.x0(network, x_t, t, negative), backbone.x0(network, x_t, t, cond), 4.0)

    times = backbone.teacher_times(steps, noise.shape[1:])
    ours = sample(stateless(denoise), backbone.schedule, Rollout(noise), times).latents
    assert (ours - noise).abs().mean() > 0.1
    torch.testing.assert_close(told[: len(told) // 2], told[len(told) // 2 :])
    return float((ours - theirs).abs().max())


@pytest.mark.parametrize(("scale", "theirs", "calls"), [(1.0, 0.0, 1), (2.5, 1.5, 2), (4.0, 3.0, 2)])
def test_guidance_counts_from_the_conditional(tiny: dict[str, Path], scale: float, theirs: float, calls: int) -> None:
    backbone = make(tiny["cosmos"])
    arguments = backbone.guidance_arguments(scale)
    assert arguments == {"guidance_scale": theirs}
    pipe = DiffusionPipeline.from_pretrained(tiny["cosmos"])
    counted: list[int] = []
    pipe.transformer.register_forward_hook(lambda *_: counted.append(1))
    size = {"num_frames": SIZE.frames, "height": SIZE.height, "width": SIZE.width}
    pipe(prompt="a cat", num_inference_steps=1, max_sequence_length=TEXT_LENGTH, **size, **arguments)
    assert len(counted) == calls


def test_guidance_that_the_pipeline_leaves_out_is_refused(tiny: dict[str, Path]) -> None:
    for scale in (1.01, 2.0):
        with pytest.raises(ValueError, match="take 1 for none, or more than 2"):
            make(tiny["cosmos"]).guidance_arguments(scale)


def test_published_scheduler_is_replayed(tmp_path: Path) -> None:
    """Its times; of its solver only the first order, which is our teacher's sampling."""
    torch.manual_seed(0)
    pipe = tiny_cosmos()
    published: dict[str, Any] = {
        "use_karras_sigmas": True,
        "use_flow_sigmas": True,
        "sigma_max": 200,
        "sigma_min": 0.01,
    }
    first_order = {"solver_order": 1, "disable_corrector": list(range(9))}
    pipe.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", **published, **first_order)
    pipe.save_pretrained(tmp_path)
    backbone = make(tmp_path)
    assert backbone.teacher_times(35, ())[0].timestep == pytest.approx(200 / 201)
    assert replay_error(backbone, 4) < 1e-4


def nearest(image: Tensor, size: list[int], interpolation: str) -> Tensor:
    """What torchvision's resize does with tensors and `InterpolationMode.NEAREST`."""
    assert interpolation == "nearest"
    return nn.functional.interpolate(image, size, mode="nearest")


def test_network_with_padding_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As published. torchvision, which the network wants for one call alone, is not installed for the tests."""
    torch.manual_seed(0)
    tiny_cosmos(padding_mask=True).save_pretrained(tmp_path)
    monkeypatch.setattr(cosmos, "is_torchvision_available", lambda: False)
    with pytest.raises(ImportError, match="pip install torchvision"):
        make(tmp_path)
    stand_in = SimpleNamespace(
        functional=SimpleNamespace(resize=nearest), InterpolationMode=SimpleNamespace(NEAREST="nearest")
    )
    monkeypatch.setattr(cosmos, "is_torchvision_available", lambda: True)
    monkeypatch.setattr(transformer_cosmos, "transforms", stand_in, raising=False)
    assert replay_error(make(tmp_path), 4) < 1e-4


def test_training_asks_no_safety_checker_and_pipelines_keep_theirs(
    tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = DiffusionPipeline.from_pretrained(tiny["cosmos"])
    assert type(pipe.safety_checker).__module__ == "cosmos_guardrail"

    def not_installed(self: Any) -> None:
        raise ImportError("pip install cosmos_guardrail")

    monkeypatch.setattr(pipeline_module.CosmosSafetyChecker, "__init__", not_installed)
    with pytest.raises(ImportError):
        DiffusionPipeline.from_pretrained(tiny["cosmos"])
    backbone = make(tiny["cosmos"])
    backbone.load_transformer()
    cond = backbone.encode_prompts(["a cat"])
    assert cond["prompt_embeds"].shape == (1, TEXT_LENGTH, 32)
    with pytest.raises(AttributeError):  # a pipeline that only encodes makes no video
        backbone.loader.encoders(prompt="a cat", num_frames=SIZE.frames, height=SIZE.height, width=SIZE.width)


def test_image_to_world_replays_its_pipeline(tiny: dict[str, Path]) -> None:
    """The pipeline takes one frame as a video of one, by which it needs no torchvision, as for PIL images."""
    backbone = Cosmos25ImageBackbone(str(tiny["cosmos"]), max_sequence_length=TEXT_LENGTH)
    image = torch.rand(1, 3, 1, SIZE.height, SIZE.width, generator=torch.Generator().manual_seed(1)) * 2 - 1
    assert replay_error(backbone, 4, image) < 1e-4
    with pytest.raises(ValueError, match=r"set model\.sampling\.kind: ode"):
        backbone.few_step_scheduler([1.0, 0.5], "sde")
