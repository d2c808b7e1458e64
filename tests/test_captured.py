"""The captured backbone: right for pipelines that it takes, and refusals by name for all others."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ClassifierFreeGuidance, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from lightning_dfd import DistillationModule
from lightning_dfd.backbones import Backbone, CapturedBackbone, backbone_from_pretrained
from lightning_dfd.backbones.captured import runs
from lightning_dfd.backbones.captured.inference import (
    CAPTURE_CHECKS,
    CaptureRefused,
    Failed,
    find_layout,
    find_prompt,
    learn_inputs,
)
from lightning_dfd.backbones.captured.recorder import Recording, SchedulerStep
from lightning_dfd.backbones.families.hunyuan import EMBEDDED_GUIDANCE
from lightning_dfd.diffusion.noise import Time, shifted_steps
from lightning_dfd.diffusion.sampler import Rollout, sample, stateless
from lightning_dfd.export import ExportFormat, export_student
from lightning_dfd.objectives import guide
from lightning_dfd.testing.tiny import TEXT_LENGTH
from lightning_dfd.testing.trained import stir
from lightning_dfd.training.settings import DataForcingSettings, DMDSettings, SamplingSettings, StudentSettings
from lightning_dfd.types import Batch, VideoSize
from tests.pipelines import CAPTURED, REFUSED, save
from tests.test_module import fit

SIZE = VideoSize(9, 32, 64)
PROMPTS = ["a cat", "two dogs run"]


@pytest.fixture(scope="module")
def unlisted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("unlisted")
    return {name: save(build, root / name) for name, build in CAPTURED.items()}


def text_length(name: str) -> int | None:
    return None if name == "easyanimate" else TEXT_LENGTH  # its pipeline has no such argument


def capture(folder: Path, name: str) -> Backbone:
    return backbone_from_pretrained(str(folder), max_sequence_length=text_length(name), backbone="captured")


@pytest.mark.parametrize("name", list(CAPTURED))
@torch.no_grad()
@pytest.mark.slow(seconds=5)
def test_captured_pipelines_are_replayed_at_other_sizes_and_steps(unlisted: dict[str, Path], name: str) -> None:
    """At a size and a number of steps, and with prompts, that the proof has not seen."""
    backbone = capture(unlisted[name], name)
    pipe = DiffusionPipeline.from_pretrained(unlisted[name])
    pipe.set_progress_bar_config(disable=True)
    arguments = {"max_sequence_length": TEXT_LENGTH} if text_length(name) else {}
    if name == "vace":
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)  # of first order
    if name == "motif":
        pipe.guider = ClassifierFreeGuidance(guidance_scale=4.0)
    else:
        arguments["guidance_scale"] = 4.0
    shape = backbone.latent_shape(SIZE)
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    arguments |= {"num_frames": SIZE.frames, "height": SIZE.height, "width": SIZE.width, "num_inference_steps": 6}
    theirs, pixels = (
        [pipe(prompt, negative_prompt="bad", latents=z[None], output_type=kind, **arguments).frames
         for prompt, z in zip(PROMPTS, noise, strict=True)]
        for kind in ("latent", "pt")
    )  # fmt: skip
    times = pipe.scheduler.sigmas[:-1].tolist()
    transformer = backbone.load_transformer()
    cond, negative = backbone.encode_prompts(PROMPTS), backbone.encode_prompts(["bad"]).expand(2)

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        return guide(backbone.x0(transformer, x_t, t, negative), backbone.x0(transformer, x_t, t, cond), 4.0)

    ours = sample(stateless(denoise), backbone.schedule, Rollout(noise), times).latents
    torch.testing.assert_close(ours, torch.cat(theirs), rtol=0, atol=1e-4)
    assert (ours[0] - ours[1]).abs().mean() > 0.01  # prompts and noise matter
    frames = (backbone.decode_latents(ours).transpose(1, 2) + 1) / 2
    torch.testing.assert_close(frames, torch.cat(pixels), rtol=0, atol=1e-4)
    raw = backbone.loader.vae.encode(frames.transpose(1, 2) * 2 - 1).latent_dist.mode()
    latents = backbone.encode_videos(frames.transpose(1, 2) * 2 - 1)
    torch.testing.assert_close(backbone.denormalise(latents), raw, rtol=1e-5, atol=1e-5)
    if name != "vace":  # whose own solver spaces them otherwise
        assert [step.start[1] for step in backbone.teacher_times(6, shape)] == pytest.approx(times, abs=1e-6)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow(seconds=2)) if name == "anyflow_far" else name for name in REFUSED],
)
def test_others_are_refused_by_the_check_that_fails(tmp_path: Path, name: str) -> None:
    build, check = REFUSED[name]
    backbone = capture(save(build, tmp_path / name), name)
    with pytest.raises(CaptureRefused, match=f"Check `{check}` failed.*overrides.*new_backbone") as refusal:
        backbone.load_transformer()
    assert refusal.value.check == check


def test_pipelines_without_a_transformer_are_refused_at_once(tmp_path: Path) -> None:
    index = {"_class_name": "TextToVideoSDPipeline", "unet": ["diffusers", "UNet3DConditionModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CaptureRefused, match=r"`call` failed.*components are unet"):
        backbone_from_pretrained(str(tmp_path), backbone="captured")
    with pytest.raises(ValueError, match=r"model\.backbone: captured"):
        backbone_from_pretrained(str(tmp_path))


@pytest.mark.slow(seconds=1)
@pytest.mark.parametrize("name", ["cogvideox_5b", "wan"])
@torch.no_grad()
def test_agrees_with_the_backbones_of_listed_pipelines(tiny: dict[str, Path], name: str) -> None:
    ours, theirs = capture(tiny[name], name), backbone_from_pretrained(str(tiny[name]), max_sequence_length=TEXT_LENGTH)
    assert isinstance(ours, CapturedBackbone)
    assert ours.latent_shape(SIZE) == theirs.latent_shape(SIZE)
    assert ours.compression() == theirs.compression()
    assert ours.identity() != theirs.identity()  # their caches name their tensors differently
    cond, reference = ours.encode_prompts(PROMPTS), theirs.encode_prompts(PROMPTS)
    torch.testing.assert_close(cond["encoder_hidden_states"], reference["prompt_embeds"])
    x_t = torch.randn(2, *ours.latent_shape(SIZE), generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.9, 0.4], dtype=torch.float64)
    transformer = theirs.load_transformer()
    torch.testing.assert_close(ours.x0(transformer, x_t, t, cond), theirs.x0(transformer, x_t, t, reference))
    videos = torch.rand(1, 3, SIZE.frames, SIZE.height, SIZE.width) * 2 - 1
    torch.testing.assert_close(ours.encode_videos(videos), theirs.encode_videos(videos))
    torch.testing.assert_close(ours.decode_latents(x_t), theirs.decode_latents(x_t))
    assert ours.teacher_times(10, x_t.shape[1:]) == theirs.teacher_times(10, x_t.shape[1:])
    if name == "wan":
        steps = shifted_steps(4, 5.0)
        assert ours.few_step_scheduler(steps, "ode").config == theirs.few_step_scheduler(steps, "ode").config


def test_a_process_proves_a_teacher_once(unlisted: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    capture(unlisted["vace"], "vace").compression()
    monkeypatch.setattr(runs, "record", lambda *_, **__: pytest.fail("the pipeline ran again"))
    assert capture(unlisted["vace"], "vace").compression() == (4, 8)


# ---- every check can fail ------------------------------------------------------------------------------------


class WrongTime(CapturedBackbone):
    def x0(self, transformer: Any, x_t: Tensor, t: Time, cond: Any) -> Tensor:
        wrong = 0.99 * t if isinstance(t, Tensor) else replace(t, sigma=0.99 * t.sigma)
        return super().x0(transformer, x_t, wrong, cond)


class Mixed(CapturedBackbone):
    def call(self, transformer: Any, x_t: Tensor, timestep: Tensor, cond: Any) -> Tensor:
        return super().call(transformer, x_t, timestep.mean().expand(len(x_t)), cond)


class Unscaled(CapturedBackbone):
    def denormalise(self, latents: Tensor) -> Tensor:
        return latents


@pytest.mark.slow(seconds=1)
@pytest.mark.parametrize(("broken", "check"), [(WrongTime, "replay"), (Mixed, "batch"), (Unscaled, "decode")])
def test_the_proof_finds_mistakes(unlisted: dict[str, Path], broken: type[CapturedBackbone], check: str) -> None:
    with pytest.raises(CaptureRefused) as refusal:
        broken(str(unlisted["vace"]), max_sequence_length=TEXT_LENGTH).compression()
    assert refusal.value.check == check


class Hunyuan(CapturedBackbone):
    """What HunyuanVideo's refusal asks for."""

    def guidance_arguments(self, scale: float) -> dict[str, float]:
        return {"guidance_scale": EMBEDDED_GUIDANCE, "true_cfg_scale": scale}


@pytest.mark.slow(seconds=2)
def test_a_subclass_helps_where_the_refusal_says(tiny: dict[str, Path]) -> None:
    with pytest.raises(CaptureRefused, match=r"with guidance 3.*guidance_arguments"):
        capture(tiny["hunyuan"], "hunyuan").compression()
    assert Hunyuan(str(tiny["hunyuan"]), max_sequence_length=TEXT_LENGTH).compression() == (4, 8)


def run_of(steps: int = 3, extra: int = 0) -> Recording:
    """What a simple pipeline would do in `steps`."""
    run, x = Recording(handed=[{}]), torch.randn(1, 4, 2, 3, 3)
    text, rest = torch.randn(1, 5, 8), torch.zeros(1, extra, 2, 3, 3)
    for i in range(steps):
        t, output = torch.tensor(900.0 - 100 * i), torch.randn_like(x)
        run.calls.append({"x": torch.cat([x, rest], 1), "t": t.expand(1), "text": text, "flag": True})
        run.outputs.append(output)
        run.steps.append(SchedulerStep(output, t, x, x - output))
        x = x - output
    return run


@pytest.mark.parametrize("extra", [0, 2])
def test_a_simple_run_is_understood(extra: int) -> None:
    run = run_of(extra=extra)
    inputs = learn_inputs(run, 3)
    assert (inputs.sample, inputs.axis, inputs.extra, inputs.timestep) == ("x", 1, extra, "t")
    assert find_prompt(inputs, [run.calls[0]] * 3).prompt == ("text",)


def change(run: Recording, what: str) -> None:
    """Make `run` one that has to be refused."""
    last, step = run.calls[-1], run.steps[-1]
    if what == "sample":
        last["x"] = last["x"] + 1
    elif what == "output":
        run.outputs[-1] = -run.outputs[-1]
    elif what == "timestep":
        last["t"] = last["t"] - 1
    elif what == "constant":
        last["text"] = last["text"] + 1
    elif what == "constant tail":
        last["x"] = torch.cat([last["x"][:, :4], last["x"][:, 4:] + 1], 1)
    elif what == "constant object":
        for call in run.calls:
            call["cache"] = run  # may hold a state
    elif what == "history":
        run.steps[-1] = replace(step, sample=step.sample + 1)
    elif what == "history calls":
        run.calls.append(last)
    elif what == "history loops":
        run.handed.append({})


@pytest.mark.parametrize(
    "what",
    ["sample", "output", "timestep", "constant", "constant tail", "constant object", "history", "history calls",
     "history loops"],
)  # fmt: skip
def test_runs_that_cannot_be_understood(what: str) -> None:
    run = run_of(extra=2)
    change(run, what)
    with pytest.raises(Failed) as failure:
        learn_inputs(run, 3)
    assert failure.value.args[0] == what.split()[0]


def test_what_is_told_of_a_prompt() -> None:
    run = run_of()
    inputs, first = learn_inputs(run, 3), run.calls[0]
    sized = first | {"area": torch.ones(1, 2)}
    calls = [sized, sized | {"text": first["text"] + 1}, sized | {"area": torch.ones(1, 2) * 2}]
    assert find_prompt(inputs, calls).prompt == ("text",)  # area follows the size
    for other in ({"text": torch.randn(1, 6, 8)}, {"flag": False}):
        with pytest.raises(Failed, match="prompt"):
            find_prompt(inputs, [first, first | other, first])
    with pytest.raises(Failed, match="weights"):
        find_prompt(inputs, [first | {"text": first["text"].to("meta")}] * 3)


def test_layouts() -> None:
    size, raw = VideoSize(5, 32, 48), (1, 4, 7, 8, 8)
    for order, shape in {(0, 1, 2, 3, 4): (1, 4, 2, 4, 6), (0, 2, 1, 3, 4): (1, 2, 4, 4, 6)}.items():
        assert find_layout(torch.zeros(shape), raw, 4, 8, size) == (order, 4)
    for shape, check in {(1, 4, 9, 4, 6): "history", (1, 12, 4): "layout", (1, 4, 2, 8, 6): "layout"}.items():
        with pytest.raises(Failed) as failure:
            find_layout(torch.zeros(shape), raw, 4, 8, size)
        assert failure.value.args[0] == check


# ---- the walk on it ------------------------------------------------------------------------------------------


def module_of(folder: Path, **options: Any) -> DistillationModule:
    return DistillationModule(
        str(folder),
        backbone="captured",
        student=StudentSettings(rank=4),
        sampling=SamplingSettings(list(shifted_steps(4, 5.0))),
        **({"max_sequence_length": TEXT_LENGTH} | options),
    )


@pytest.mark.slow(seconds=5)
def test_trains_resumes_and_exports(unlisted: dict[str, Path], tmp_path: Path, monkeypatch: Any) -> None:
    """A fake-score step and a student's, then data-forced ones from its checkpoint; exports reloaded by diffusers."""
    folder, freq = unlisted["vace"], DMDSettings(student_update_freq=2)
    module = module_of(folder, dmd=freq)
    latents = torch.randn(2, *module.backbone.latent_shape(SIZE), generator=torch.Generator().manual_seed(0))
    batch = Batch(tuple(PROMPTS), latents=latents, cond=module.backbone.encode_prompts(PROMPTS))
    monkeypatch.setattr("tests.test_module.make_batches", lambda *_: [batch])
    fit(module, tmp_path, 2).save_checkpoint(tmp_path / "dmd2.ckpt")
    forced = module_of(folder, dmd=freq, data_forcing=DataForcingSettings(1.0), init_from=str(tmp_path / "dmd2.ckpt"))
    fit(forced, tmp_path, 2)
    assert (module.journal.counts["forced_steps"], forced.journal.counts["forced_steps"]) == (0, 1)
    stir(forced.network)
    forms: tuple[ExportFormat, ...] = ("pipeline", "lora")
    for form in forms:
        assert export_student(forced, tmp_path / form, SIZE, form, {}).error < 1e-4


@pytest.mark.slow(seconds=1)
@pytest.mark.parametrize("name", ["motif", "easyanimate"])
def test_pipelines_with_a_guider_or_without_adapters_of_their_own_export(
    unlisted: dict[str, Path], tmp_path: Path, name: str
) -> None:
    module = module_of(unlisted[name], max_sequence_length=text_length(name))
    module.configure_model()
    stir(module.network)
    assert export_student(module, tmp_path / "student", SIZE, "lora", {}).error < 1e-4
    card = (tmp_path / "student" / "README.md").read_text(encoding="utf-8")
    assert ("pipe.guider.new(guidance_scale=1.0)" in card) == (name == "motif")


@pytest.mark.slow(seconds=2)
def test_few_step_schedulers(unlisted: dict[str, Path], tiny: dict[str, Path]) -> None:
    """A shift of the pipeline's own times; none where no stock scheduler is known."""
    motif = capture(unlisted["motif"], "motif")
    scheduler = motif.few_step_scheduler(shifted_steps(4, 3.0), "ode")
    scheduler.set_timesteps(4, sigmas=shifted_steps(4, 1.0), mu=2.0)
    assert scheduler.timesteps.tolist() == pytest.approx([1000 * t for t in shifted_steps(4, 3.0)], abs=0.1)
    with pytest.raises(ValueError, match=r"CogVideoXDDIMScheduler.*few_step_scheduler"):
        capture(tiny["cogvideox_5b"], "cogvideox_5b").few_step_scheduler([0.999, 0.499], "ode")


def test_text_length_is_refused_where_there_is_none(unlisted: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="leave it null"):
        backbone_from_pretrained(str(unlisted["easyanimate"]), max_sequence_length=8, backbone="captured")


def test_it_cannot_be_planned(unlisted: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="lightning plan"):
        capture(unlisted["vace"], "vace").dummy_prompts(1)


def test_every_check_is_documented() -> None:
    page = Path("docs/new_backbone.md").read_text(encoding="utf-8")
    assert all(f"| `{check}` |" in page for check in CAPTURE_CHECKS)
