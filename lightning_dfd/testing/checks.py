"""What is checked of a backbone: each a function that raises AssertionError, or answers the error it measured.

Axis legend: B batch, C channels, F frames, H height, W width; latents are [B, ...] in the backbone's layout.
"""

from __future__ import annotations

import copy
import inspect
import os
import secrets
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_dfd.cli.trainer import DistillationTrainer
from lightning_dfd.data import LatentCache, VideoDataModule, list_clips, write_cache, write_video
from lightning_dfd.diffusion.noise import Time
from lightning_dfd.diffusion.sampler import sample
from lightning_dfd.evaluation.pictures import to_frames
from lightning_dfd.export import call_arguments, export_student, posterior_means
from lightning_dfd.networks.roles import FullRoles, LoraRoles, Roles
from lightning_dfd.objectives import guide
from lightning_dfd.testing.case import PROMPTS, Case
from lightning_dfd.testing.variants import vary
from lightning_dfd.training.module import DistillationModule
from lightning_dfd.training.settings import DataForcingSettings, DMDSettings, GANSettings
from lightning_dfd.types import Batch, Conditioning, Role, SampleKind

GUIDANCE = 4.0
HELD: tuple[Role, ...] = ("student", "fake", "ema")


def require(ok: Any, what: str) -> None:
    if not ok:
        raise AssertionError(what)


def gap(ours: Tensor, theirs: Tensor) -> float:
    """The largest absolute difference; infinite where the shapes differ or a number is not finite."""
    if ours.shape != theirs.shape or not (ours.isfinite().all() and theirs.isfinite().all()):
        return float("inf")
    return float((ours - theirs).abs().max())


# ---- the teacher against its pipeline ---------------------------------------------------------------------------


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
    require("encoders" not in vars(backbone), "encoding videos loaded the text encoders")
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
    return _replay(case, 1 if _can_run(case, 1) else 2, 1.0)


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


def _can_run(case: Case, steps: int) -> bool:
    """For one step some divide by zero, or begin with hardly any noise."""
    try:
        first = case.teacher.teacher_times(steps, case.teacher.latent_shape(case.size))[0]
    except ValueError:
        return False
    return first.start[1] > 0.5


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
    ours = backbone.finish(sample(denoise, backbone.schedule, noise, times))
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
    pipe = backbone.load_pipeline()
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


# ---- roles ------------------------------------------------------------------------------------------------------


def roles_lora(case: Case, folder: Path) -> float:
    """Adapters on one base: every role starts as the teacher, gets its own gradients alone, and leaves the base."""
    roles = LoraRoles(case.teacher.load_transformer(), case.teacher.lora_targets, 4, 8, ema=True)
    return _check_roles(case, roles)


def roles_full(case: Case, folder: Path) -> float:
    """Separate networks: the same."""
    return _check_roles(case, FullRoles(case.teacher.load_transformer(), ema=True))


def checkpointing(case: Case, folder: Path) -> float:
    """Gradients are the same with activations recomputed, while other roles are asked in between; and the same as
    those of a network of its own (`roles.py` says what goes wrong there)."""
    plain, recomputed = (
        LoraRoles(case.teacher.load_transformer(), case.teacher.lora_targets, 4, 8, checkpointing=on)
        for on in (False, True)
    )
    for roles in (plain, recomputed):
        stir(roles)
    alone = copy.deepcopy(plain)
    alone._layers = [layer for layer in alone.base.modules() if hasattr(layer, "_active_adapter")]  # type: ignore[misc]
    alone._switch("student")
    x_t, t, cond = case.inputs()
    case.teacher.x0(alone.base, x_t, t, cond).square().mean().backward()
    expected = [parameter.grad for parameter in alone.parameters_of("student")]
    error = 0.0
    for roles in (plain, recomputed):
        found = student_gradients(case, roles)
        for mine, theirs in zip(found, expected, strict=True):
            require(mine is not None and theirs is not None, "a parameter of the student has no gradient")
            assert mine is not None
            assert theirs is not None
            error = max(error, gap(mine, theirs) / (float(theirs.abs().max()) + 1e-6))
    require(error < 1e-3, f"gradients differ by {error:.1e} of the largest, of adapters on a shared base")
    return error


@torch.no_grad()
def stir(roles: Roles) -> None:
    """Move every trained role away from the teacher, each its own way."""
    generator = torch.Generator().manual_seed(7)
    for role in roles.held:
        for parameter in roles.parameters_of(role):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def student_gradients(case: Case, roles: Roles) -> list[Tensor | None]:
    """Of the student's mean square, with another role asked before the backward pass."""
    x_t, t, cond = case.inputs()
    roles.zero_grad()
    with roles.act_as("student") as network:
        loss = case.teacher.x0(network, x_t, t, cond).square().mean()
    with torch.no_grad(), roles.act_as("fake") as network:
        case.teacher.x0(network, x_t, t, cond)
    with roles.act_as("fake"):
        loss.backward()
    return [parameter.grad for parameter in roles.parameters_of("student")]


def _check_roles(case: Case, roles: Roles) -> float:
    x_t, t, cond = case.inputs()

    @torch.no_grad()
    def made(role: Role) -> Tensor:
        with roles.act_as(role) as network:
            return case.teacher.x0(network, x_t, t, cond)

    before = made("teacher")
    error = max(gap(made(role), before) for role in HELD)
    require(error < 1e-5, f"a role does not start as the teacher: x0 differs by {error:.1e}")
    stir(roles)
    outputs = [made(role) for role in ("teacher", *HELD)]
    require(torch.equal(outputs[0], before), "training a role changed the teacher")
    apart = [gap(one, other) for i, one in enumerate(outputs) for other in outputs[:i]]
    require(min(apart) > 1e-4, "two roles that were moved apart answer the same")
    student_gradients(case, roles)
    own = {id(parameter) for parameter in roles.parameters_of("student")}
    given = {id(parameter) for parameter in roles.parameters() if parameter.grad is not None}
    require(given and given <= own, "a gradient of the student's loss reached another role")
    return error


# ---- training ---------------------------------------------------------------------------------------------------


def train_lora(case: Case, folder: Path) -> float | None:
    """A DMD step and a data-forced one, with adapters; the checkpoint holds what is trained and comes back."""
    return _check_training(case, folder, "lora")


def train_full(case: Case, folder: Path) -> float | None:
    """The same with whole networks."""
    return _check_training(case, folder, "full")


def gan(case: Case, folder: Path) -> float | None:
    """The discriminator's hooks find the teacher's features, with gradient to the student's clips."""
    module = case.module(gan=GANSettings(weight=0.1, r1_weight=1.0), dmd=DMDSettings(student_update_freq=2))
    trainer = _fit(case, module, folder, 2)
    for name in ("gan_generator_loss", "gan_discriminator_loss"):
        require(torch.as_tensor(module.latest[f"train/{name}"]).isfinite(), f"{name} is not finite")
    x_t, t, cond = case.inputs()
    x_t.requires_grad_()
    discriminator: Any = module.term_modules["discriminator"]
    discriminator.judge(module.teacher_features(x_t, t, cond, discriminator.blocks)).sum().backward()
    require(x_t.grad is not None and x_t.grad.any(), "the discriminator's verdict does not reach the clip")
    require(trainer.global_step == 2, "an iteration took another number of counted steps than one")
    return None


def _check_training(case: Case, folder: Path, mode: str) -> float | None:
    for probability in (0.0, 1.0):
        options: dict[str, Any] = {
            "dmd": DMDSettings(student_update_freq=2),
            "data_forcing": DataForcingSettings(probability),
            "student_optimizer": partial(torch.optim.SGD, lr=1.0),
            "fake_optimizer": partial(torch.optim.SGD, lr=1.0),
        }
        module = case.module(mode, **options)
        x_t, t, cond = case.inputs()
        with torch.no_grad():
            before = {role: module.x0(role, x_t, t, cond) for role in ("teacher", "student", "fake")}  # type: ignore[arg-type]
        trainer = _fit(case, module, folder, 2)
        with torch.no_grad():
            after = {role: module.x0(role, x_t, t, cond) for role in ("teacher", "student", "fake")}  # type: ignore[arg-type]
        require(torch.equal(after["teacher"], before["teacher"]), "training changed the teacher")
        for role in ("student", "fake"):
            require(gap(after[role], before[role]) > 0, f"two iterations left the {role} as it was")
        forced = module.counts["forced_steps"]
        require(forced == int(probability), f"{forced} forced steps at probability {probability:g}")
    path = folder / f"{mode}.ckpt"
    trainer.save_checkpoint(path)
    state = torch.load(path, weights_only=True)["state_dict"]
    require(set(state) == {f"roles.{name}" for name in module.network.owned()}, "the checkpoint holds other weights")
    fresh = case.module(mode, init_from=str(path))
    with torch.no_grad():
        error = gap(fresh.x0("student", x_t, t, cond), after["student"])
    require(error == 0.0, f"the student from the checkpoint differs by {error:.1e}")
    return error


def _fit(case: Case, module: DistillationModule, folder: Path, steps: int) -> DistillationTrainer:
    trainer = DistillationTrainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=str(folder),
    )  # fmt: skip
    batches: Any = [Batch(PROMPTS, video=case.videos())] * steps
    trainer.fit(module, DataLoader(batches, batch_size=None))
    require(trainer.global_step == steps, f"{trainer.global_step} counted steps in {steps} iterations")
    return trainer


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


# ---- exports ----------------------------------------------------------------------------------------------------


def export_pipeline(case: Case, folder: Path) -> float:
    """The student's merged adapters, reloaded in stock diffusers, give its latents; by every kind of sampling."""
    return max(_export(case, folder / kind, "pipeline", "lora", kind) for kind in case.kinds)


def export_lora(case: Case, folder: Path) -> float:
    """So does its LoRA file, whose alpha is not its rank."""
    return _export(case, folder / "lora", "lora", "lora", "ode")


def export_full(case: Case, folder: Path) -> float:
    """So does a fully tuned student."""
    return _export(case, folder / "full", "pipeline", "full", "ode")


def half_precision(case: Case, folder: Path) -> float:
    """In bfloat16 the teacher answers, what is trained stays float32, and exports are the student."""
    transformer = case.load(torch.bfloat16).load_transformer()
    x_t, t, cond = case.inputs()
    with torch.no_grad():
        made = case.teacher.x0(transformer, x_t, t, cond)
    require(made.dtype == torch.float32 and made.isfinite().all(), "x0 of a bfloat16 network is not finite float32")
    module = case.module(dtype="bfloat16")
    dtypes = {parameter.dtype for parameter in module.network.parameters_of("student")}
    require(dtypes == {torch.float32}, f"the student's parameters are {dtypes} on a bfloat16 teacher")
    return export_student(module, folder / "bf16", case.size, "pipeline", {}).error


def _export(case: Case, output: Path, form: Any, mode: str, kind: SampleKind) -> float:
    module = case.module(mode, kind)
    stir(module.network)  # far from the teacher, so that a missing adapter cannot pass
    report = export_student(module, output, case.size, form, {})
    x_t, t, cond = case.inputs()
    with torch.no_grad():
        moved = gap(module.x0("student", x_t, t, cond), module.x0("teacher", x_t, t, cond))
    require(moved > 1e-3, "the student that was exported hardly differs from the teacher")
    require(report.error < 1e-3, f"stock diffusers' latents differ by {report.error:.1e} from our sampler's")
    return report.error
