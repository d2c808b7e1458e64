"""What backbones load, and what they refuse. That they are their pipelines is in test_contract.py."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, UniPCMultistepScheduler

from lightning_dfd.backbones import Backbone, backbone_from_pretrained
from lightning_dfd.testing.tiny import TINY
from lightning_dfd.types import VideoSize


def test_latent_layout_round_trip(backbone: Backbone, size: VideoSize) -> None:
    videos = torch.rand(2, 3, size.frames, size.height, size.width) * 2 - 1
    latents = backbone.encode_videos(videos)
    assert latents.shape == (2, *backbone.latent_shape(size))
    with torch.no_grad():
        raw = backbone.encode(videos)
    torch.testing.assert_close(backbone.denormalise(backbone.normalise(raw)), raw, rtol=1e-5, atol=1e-5)


def test_transformer_is_loaded_without_the_encoders(backbone: Backbone) -> None:
    backbone.load_transformer()
    assert not backbone.loader.loaded


def test_sizes_that_do_not_divide_are_refused(backbone: Backbone, size: VideoSize) -> None:
    backbone.check_size(size)
    with pytest.raises(ValueError, match=f"nearest is {size}"):
        backbone.check_size(VideoSize(size.frames + 1, size.height + 1, size.width + 2))


def test_missing_and_unknown_teachers_are_named(tmp_path, tiny: dict) -> None:
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        backbone_from_pretrained(str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError, match="hf download"):
        backbone_from_pretrained("nobody/nothing")
    with pytest.raises(ValueError, match="not a subclass"):
        backbone_from_pretrained(str(tiny["wan"]), backbone="torch.nn.Linear")
    (tmp_path / "model_index.json").write_text('{"_class_name": "SomePipeline"}')
    with pytest.raises(ValueError, match=r"SomePipeline.*CogVideoXPipeline"):
        backbone_from_pretrained(str(tmp_path))


def test_the_old_path_of_a_family_names_the_new_one(tiny: dict[str, Path]) -> None:
    new = r"which moved; set model\.backbone: lightning_dfd\.backbones\.families\.wan\.WanImageBackbone$"
    with pytest.raises(ValueError, match=new):
        backbone_from_pretrained(str(tiny["wan"]), backbone="lightning_dfd.backbones.wan.WanImageBackbone")
    with pytest.raises(ValueError, match="cannot be imported"):
        backbone_from_pretrained(str(tiny["wan"]), backbone="lightning_dfd.backbones.nothing.Backbone")
    with pytest.raises(ValueError, match="cannot be imported"):
        backbone_from_pretrained(str(tiny["wan"]), backbone="lightning_dfd.backbones.stages.Nothing")


@pytest.mark.parametrize(
    ("family", "scheduler"), [("skyreels", UniPCMultistepScheduler), ("sanavideo", DPMSolverMultistepScheduler)]
)
def test_times_of_the_schedulers_that_families_are_published_with(
    tiny: dict[str, Path], tmp_path: Path, family: str, scheduler: Any
) -> None:
    """The tiny pipelines have Euler's; these solvers are other methods, but they go through the same times."""
    pipe = DiffusionPipeline.from_pretrained(tiny[family])
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = scheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0)
    pipe.save_pretrained(tmp_path)
    backbone, size = backbone_from_pretrained(str(tmp_path)), TINY[family].size
    shape = backbone.latent_shape(size)
    told: list[float] = []
    pipe.transformer.register_forward_pre_hook(
        lambda network, args, named: told.append(float(named["timestep"][0])), with_kwargs=True
    )
    call = {"num_inference_steps": 5, "guidance_scale": 1.0, "max_sequence_length": 16, "output_type": "latent"}
    pipe(prompt="a cat", latents=torch.randn(1, *shape), **call, **backbone.size_arguments(size))
    times = backbone.teacher_times(5, shape)
    assert backbone.schedule.prediction == "flow"
    assert told == [step.timestep for step in times] == pipe.scheduler.timesteps.tolist()  # these solvers round it
    assert pipe.scheduler.sigmas[:5].tolist() == pytest.approx([step.start[1] for step in times])


def test_pipelines_of_a_family_that_differ_are_refused(tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    sana = backbone_from_pretrained(str(tiny["sanavideo"]))
    monkeypatch.setattr(sana.configs, "vae", {"_class_name": "AutoencoderDC"})
    with pytest.raises(ValueError, match="has a AutoencoderDC; of SANA-Video only pipelines with AutoencoderKLWan"):
        sana.check_size(TINY["sanavideo"].size)
    kandinsky = backbone_from_pretrained(str(tiny["kandinsky"]))
    monkeypatch.setattr(kandinsky.configs, "transformer", {**kandinsky.configs.transformer, "attention_type": "nabla"})
    with pytest.raises(ValueError, match="attention_type 'nabla'; only 'regular' is supported"):
        kandinsky.check_teacher()


@pytest.mark.slow(seconds=1)
def test_allegros_sizes_are_those_that_whole_tiles_cover(tiny: dict) -> None:
    backbone = backbone_from_pretrained(str(tiny["allegro"]))
    vars(backbone.configs)["vae"] = {**backbone.configs.vae, "sample_size": 320}
    backbone.check_size(VideoSize(88, 720, 1280))
    with pytest.raises(ValueError, match=r"frames can be 24, 40, 56, 72, .*nearest is 88 frames of 720x800"):
        backbone.check_size(VideoSize(81, 600, 832))
    vae = backbone.loader.vae
    covered = torch.zeros(1, 3, 24, 128, 176).index_fill(-1, torch.tensor(175), 1.0)
    with torch.no_grad():  # what the last of two tiles sees reaches the latents; a side between two tiles is left out
        moved = vae.encode(covered).latent_dist.mode() - vae.encode(torch.zeros_like(covered)).latent_dist.mode()
    assert moved[..., -1].abs().max() > 0


def test_what_a_pipeline_fixes_is_refused_otherwise(tiny: dict) -> None:
    with pytest.raises(ValueError, match=r"max_sequence_length is 16, .* always takes 120 text tokens; leave it null"):
        backbone_from_pretrained(str(tiny["latte"]), max_sequence_length=16)
    with pytest.raises(ValueError, match=r"frames must be 9, .*nearest is 9 frames of 32x48"):
        backbone_from_pretrained(str(tiny["latte"])).check_size(VideoSize(17, 32, 48))
    image = backbone_from_pretrained(str(tiny["hunyuan15_i2v"]))
    with pytest.raises(ValueError, match="nearest is 9 frames of 32x48"):
        image.check_size(VideoSize(9, 64, 96))
    vars(image.configs)["transformer"] = {**image.configs.transformer, "use_meanflow": True}
    with pytest.raises(ValueError, match="take the teacher that it was made from"):
        image.check_teacher()


@pytest.mark.parametrize("family", ["allegro", "hunyuan15"])
def test_model_cards_prepare_a_pipeline_as_we_do(tiny: dict, family: str) -> None:
    backbone = backbone_from_pretrained(str(tiny[family]), max_sequence_length=TINY[family].text_length)
    ours, theirs = (DiffusionPipeline.from_pretrained(backbone.source) for _ in range(2))
    backbone.prepare(ours)
    exec("\n".join(backbone.preparation()), {"pipe": theirs})
    for pipe in (ours, theirs):
        pipe.state = [pipe.vae.use_slicing, pipe.vae.use_tiling, getattr(pipe, "tokenizer_max_length", None)]
        pipe.state.append(pipe.guider.guidance_scale if hasattr(pipe, "guider") else None)
    assert ours.state == theirs.state
    assert ours.state != [False, False, None, None]


@pytest.mark.parametrize("name", ["tokenizer/tokenizer.json", "text_encoder/model.safetensors", "vae/config.json"])
def test_a_damaged_file_of_the_teacher_is_named(tiny: dict[str, Path], tmp_path: Path, name: str) -> None:
    shutil.copytree(tiny["wan"], tmp_path / "teacher")
    path = tmp_path / "teacher" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(
        FileNotFoundError, match=rf"no diffusers pipeline could be read .* damaged: {name}\. Give a folder"
    ):
        backbone_from_pretrained(str(tmp_path / "teacher")).encode_prompts(["a cat"])
