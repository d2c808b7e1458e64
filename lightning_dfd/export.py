"""From a trained student to files that stock diffusers runs, checked by running them.

Two forms: a whole pipeline (adapters merged, or the student's weights, with the few-step scheduler baked in), and
a LoRA file with its alpha and the same scheduler beside it. Either is reloaded by diffusers alone and has to give
the latents that our own sampler gives, else nothing is left behind.
"""

from __future__ import annotations

import copy
import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from peft import LoraConfig, LoraModel, inject_adapter_in_model, set_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_dfd.backbones import Backbone
from lightning_dfd.data.datamodule import UNKNOWN_RATE
from lightning_dfd.evaluation.pictures import to_frames
from lightning_dfd.files import expanded, require_writable, respect_umask
from lightning_dfd.networks.roles import LoraRoles
from lightning_dfd.objectives.terms import joined
from lightning_dfd.runs.checkpoints import FRAME_RATE, strip_prefix
from lightning_dfd.training.module import DistillationModule
from lightning_dfd.types import VideoSize

ExportFormat = Literal["pipeline", "lora"]

# Largest root-mean-square difference from our sampler, relative to the latents. Merging rounds each weight once
# to the export's precision; other times, a lost alpha or a missing adapter are off by far more.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}
LORA_WEIGHTS = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights_2.safetensors")  # one a network
PEFT_WEIGHTS = "adapter_model.safetensors"  # beside the adapter_config.json of a LoraConfig
PROMPT, SEED = "a red square is moving", 0


@dataclass(frozen=True)
class ExportReport:
    """What was written and how far it is from our sampler (relative root-mean-square difference of latents)."""

    folder: Path
    format: ExportFormat
    error: float
    tolerance: float
    network_calls: int


def export_student(
    module: DistillationModule,
    output: str | Path,
    size: VideoSize,
    format: ExportFormat,
    facts: Mapping[str, str],
    fps: float = UNKNOWN_RATE,
) -> ExportReport:
    """Write the student (its moving average, where there is one) to the folder `output`.

    Args:
        module: with its networks loaded and the checkpoint's weights in them.
        size: of the videos it was trained on.
        format: `pipeline` or `lora`.
        facts: lines for the model card, name -> value.
        fps: frames per second of the videos it was trained on, at which the model card's code plays its own.

    Raises:
        FileExistsError: `output` already exists.
        OSError: it cannot be created.
        ValueError: no stock scheduler samples at the student's times, or `lora` is asked of a fully tuned student.
        RuntimeError: diffusers' latents differ from ours.
    """
    output = Path(expanded(str(output), "output"))
    scheduler = check_export(module, output, format)
    require_writable(output, "output")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as partial:
        folder = Path(partial) / "export"
        pipe = module.backbone.loader.pipeline()
        if format == "lora":
            _save_lora(module, pipe, folder)
            scheduler.save_pretrained(folder / "scheduler")
        else:
            _put_student_into(module, pipe)
            pipe.scheduler = scheduler
            module.backbone.prepare(pipe)
            pipe.save_pretrained(folder)
        del pipe
        report = _compare(module, folder, output, size, format)
        card = model_card(module, report, size, facts, fps)
        (folder / "README.md").write_text(card, encoding="utf-8")
        respect_umask(folder)
        shutil.move(folder, output)
    return report


def check_export(module: DistillationModule, output: str | Path, format: ExportFormat) -> Any:
    """The scheduler of an export; networks need not be loaded yet. Raises as `export_student` before it writes."""
    if not str(output):
        raise ValueError("output is empty; name a new folder")
    if os.path.lexists(output):
        raise FileExistsError(f"{output} already exists; export to another folder or delete it first")
    if format == "lora" and module.student.mode == "full":
        raise ValueError("a fully tuned student has no LoRA file; export it with --format pipeline")
    return module.backbone.few_step_scheduler(module.sampling.steps, module.sampling.kind)


def _save_lora(module: DistillationModule, pipe: Any, folder: Path) -> None:
    """A LoRA file with the adapter's config: without it alpha would be taken to be the rank.

    In diffusers' form, or in peft's where the pipeline cannot load adapters.
    """
    config, weights = _adapter(module)
    if hasattr(pipe, "save_lora_weights"):
        metadata = config.to_dict()
        metadata["target_modules"] = sorted(metadata["target_modules"])  # a set, which JSON does not know
        for number, part in enumerate(_by_network(module.backbone, weights).values()):
            type(pipe).save_lora_weights(
                folder,
                transformer_lora_layers=part,
                transformer_lora_adapter_metadata=_plain(metadata),
                weight_name=LORA_WEIGHTS[number],
            )
        return
    config.save_pretrained(str(folder))
    save_file(weights, folder / PEFT_WEIGHTS, {"format": "pt"})


def _load_lora(pipe: Any, folder: Path, backbone: Backbone) -> None:
    """The inverse of `_save_lora`, as the model card does it."""
    if hasattr(pipe, "load_lora_weights"):
        for name, network in zip(LORA_WEIGHTS, backbone.networks, strict=False):
            pipe.load_lora_weights(folder, weight_name=name, **_into(network))
        return
    inject_adapter_in_model(LoraConfig.from_pretrained(str(folder)), pipe.transformer)
    set_peft_model_state_dict(pipe.transformer, load_file(folder / PEFT_WEIGHTS))


def _adapter(module: DistillationModule) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The student's adapter: its config, and its weights by their names in the network."""
    network = module.network
    assert isinstance(network, LoraRoles)
    weights = {name: tensor.cpu().contiguous() for name, tensor in network.weights_of(module.best_student).items()}
    return copy.deepcopy(network.config), weights


def _by_network(backbone: Backbone, weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Weights by the pipeline's components that they belong to."""
    if len(backbone.networks) == 1:
        return {backbone.networks[0]: dict(weights)}
    return {network: strip_prefix(f"{network}.", weights) for network in backbone.networks}


def _into(network: str) -> dict[str, bool]:
    """What diffusers has to be told to load a LoRA file into this component."""
    return {} if network == "transformer" else {f"load_into_{network}": True}


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A PEFT config with nothing but what JSON holds."""
    return json.loads(json.dumps(dict(config), default=str))  # type: ignore[no-any-return]


def _put_student_into(module: DistillationModule, pipe: Any) -> None:
    """Give a stock pipeline the student's weights, adapters merged into them."""
    if isinstance(module.network, LoraRoles):
        config, weights = _adapter(module)
        for name, part in _by_network(module.backbone, weights).items():
            tuner = LoraModel(getattr(pipe, name), copy.deepcopy(config), "default")
            set_peft_model_state_dict(getattr(pipe, name), part)
            setattr(pipe, name, tuner.merge_and_unload())
        return
    for name, part in _by_network(module.backbone, module.network.weights_of(module.best_student)).items():
        network = getattr(pipe, name)
        missing, unexpected = network.load_state_dict(part, strict=False)
        parameters = {name for name, _ in network.named_parameters()}
        if unexpected or parameters & set(missing):
            raise RuntimeError(f"the student's weights do not fit the pipeline: {unexpected or missing}")


def call_arguments(
    backbone: Backbone, pipeline_class: type, size: VideoSize, steps: int, guidance: float = 1.0
) -> dict[str, Any]:
    """What to pass a stock pipeline besides the prompt, once `Backbone.prepare` has been told the same guidance."""
    call = {
        "num_inference_steps": steps,
        **backbone.guidance_arguments(guidance),
        **backbone.size_arguments(size),
    }
    parameter = inspect.signature(pipeline_class.__call__).parameters.get("max_sequence_length")
    if parameter is not None and parameter.default != backbone.max_sequence_length:
        call["max_sequence_length"] = backbone.max_sequence_length
    return call


def _small(backbone: Backbone, size: VideoSize, device: torch.device) -> VideoSize:
    """The size at which an export is checked: its own on an accelerator, a small one on a CPU."""
    if device.type != "cpu":
        return size
    temporal, spatial = backbone.compression()
    side = 8 * spatial
    small = VideoSize(min(size.frames, 2 * temporal + 1), min(size.height, side), min(size.width, side))
    return backbone.sizes().nearest(small)


def _compare(
    module: DistillationModule, folder: Path, output: Path, size: VideoSize, format: ExportFormat
) -> ExportReport:
    """Sample with our sampler and with the reloaded export, from the same noise."""
    backbone, device = module.backbone, module.device
    size = _small(backbone, size, device)
    backbone.loader.to(device)
    noise = torch.randn(1, *backbone.latent_shape(size), generator=torch.Generator().manual_seed(SEED))
    noise = noise.to(device, backbone.dtype)  # some pipelines take given latents only in their own precision
    image = example_image(size)
    cond = backbone.encode_prompts([PROMPT]) | backbone.encode_images(image.to(device), size.frames)
    start = backbone.pipeline_latents(noise, cond)
    fresh = torch.Generator(device).manual_seed(SEED)

    def draw(like: Tensor) -> Tensor:
        noise = torch.randn(backbone.pack(like).shape, generator=fresh, device=like.device)
        return backbone.unpack(noise, like.shape[1:])

    ours = backbone.pack(module.sample_latents(module.best_student, cond, noise.float(), draw)).float().cpu()
    pipe = _reload(backbone, folder, format).to(device)
    call = call_arguments(backbone, type(pipe), size, len(module.sampling.steps))
    if backbone.takes_image:
        call |= backbone.image_arguments(Image.fromarray(to_frames(image[:, :, None])[0, 0].numpy()))
    theirs = _stock_latents(pipe, start, call).float().cpu()
    error = float((ours - theirs).square().mean().sqrt() / ours.square().mean().sqrt())
    tolerance = TOLERANCE[backbone.dtype]
    if not error <= tolerance:
        raise RuntimeError(
            f"the export is not the student: stock diffusers' latents differ by {error:.2e} (relative root mean "
            f"square) from our sampler's, allowed is {tolerance:.0e}; nothing was written to {output}"
        )
    return ExportReport(output, format, error, tolerance, len(module.sampling.steps))


def _reload(backbone: Backbone, folder: Path, format: ExportFormat) -> Any:
    if format == "pipeline":
        pipe = DiffusionPipeline.from_pretrained(folder, dtype=backbone.dtype)
    else:
        pipe = backbone.loader.pipeline()
        _load_lora(pipe, folder, backbone)
        pipe.scheduler = _scheduler_class(folder).from_pretrained(folder, subfolder="scheduler")
    backbone.prepare(pipe)
    return pipe


def _scheduler_class(folder: Path) -> Any:
    name = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["_class_name"]
    return getattr(diffusers, name)


@torch.no_grad()
def _stock_latents(pipe: Any, noise: Tensor, call: Mapping[str, Any]) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    devices = [noise.device] if noise.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), posterior_means():
        torch.manual_seed(SEED)  # flow pipelines pass no generator to their scheduler
        latents: Tensor = pipe(
            prompt=PROMPT,
            latents=noise.clone(),
            generator=torch.Generator(noise.device).manual_seed(SEED),
            output_type="latent",
            **call,
        ).frames
    return latents


def example_image(size: VideoSize) -> Tensor:
    """Colours that run across and down, [1, C, H, W] in [-1, 1], in 8 bits as in a file."""
    across, down = torch.linspace(0, 255, size.width), torch.linspace(0, 255, size.height)
    red = across.expand(size.height, -1)
    planes = torch.stack([red, down[:, None].expand_as(red), red.flip(1)])
    return planes[None].round() / 127.5 - 1.0


@contextmanager
def posterior_means() -> Iterator[None]:
    """Within it, VAEs give the mean where they are asked for a sample.

    Some stock pipelines draw an image's latents; our conditioning is the mean, and this is for comparing the two.
    """
    with mock.patch.object(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode()):
        yield


class _Code(str):
    """Code that stands as it is in lists of arguments."""

    __repr__ = str.__str__


def _loading_code(module: DistillationModule, report: ExportReport) -> tuple[str, str]:
    """The code that loads an export: its imports, and what makes `pipe`."""
    backbone, name = module.backbone, report.folder.name
    dtype, kind = str(backbone.dtype), backbone.pipeline_class or "DiffusionPipeline"
    imports = [f"from diffusers import {kind}"]
    if report.format == "pipeline":
        load = [f'pipe = {kind}.from_pretrained("{name}", dtype={dtype})']
    else:
        scheduler = type(backbone.few_step_scheduler(module.sampling.steps, module.sampling.kind)).__name__
        imports[0] += f", {scheduler}"
        at = backbone.configs.location
        revision = "" if at.revision is None else f', revision="{at.revision}"'
        load = [f'pipe = {kind}.from_pretrained("{at.repo}"{revision}, dtype={dtype})']
        if hasattr(_pipeline_class(backbone), "load_lora_weights"):
            for file, network in zip(LORA_WEIGHTS, backbone.networks, strict=False):
                into = "".join(f", {key}={value}" for key, value in _into(network).items())
                load.append(f'pipe.load_lora_weights("{name}", weight_name="{file}"{into})')
        else:
            imports.append("from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict")
            imports.append("from safetensors.torch import load_file")
            load.append(f'inject_adapter_in_model(LoraConfig.from_pretrained("{name}"), pipe.transformer)')
            load.append(f'set_peft_model_state_dict(pipe.transformer, load_file("{name}/{PEFT_WEIGHTS}"))')
        load.append(f'pipe.scheduler = {scheduler}.from_pretrained("{name}", subfolder="scheduler")')
    return "\n".join(imports), "\n".join([*load, *backbone.preparation()])


def _pipeline_class(backbone: Backbone) -> Any:
    return getattr(diffusers, backbone.pipeline_name)


def model_card(
    module: DistillationModule, report: ExportReport, size: VideoSize, facts: Mapping[str, str], fps: float
) -> str:
    """README.md of an export: what it is, and the code that runs it."""
    backbone = module.backbone
    pipeline = _pipeline_class(backbone)
    call = call_arguments(backbone, pipeline, size, report.network_calls)
    image = backbone.image_arguments(_Code('load_image("first_frame.png")')) if backbone.takes_image else {}
    arguments = "".join(f", {name}={value}" for name, value in (image | call).items())
    imports, load = _loading_code(module, report)
    kind, loader = ("image", ", load_image") if backbone.takes_image else ("text", "")
    rows = {
        "Teacher": backbone.configs.location.folder.name if backbone.configs.location.folder else backbone.source,
        "Pipeline": pipeline.__name__,
        "Network calls": f"{report.network_calls}, without guidance",
        "Times": ", ".join(f"{t:.4g}" for t in module.sampling.steps),
        "Sampling": module.sampling.kind,
        "Trained on": str(size),
        FRAME_RATE: f"{fps:g}",
        "Student": module.student.mode + (f", rank {module.student.rank}" if module.student.mode == "lora" else ""),
        **joined([term.card() for term in module.terms]),
        "Difference from the training sampler": f"{report.error:.1e} (relative RMS of latents, on reload)",
        **facts,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    base_model = "" if backbone.configs.location.folder else f"base_model: {backbone.configs.location.repo}\n"
    return f"""---
library_name: diffusers
pipeline_tag: {kind}-to-video
{base_model}tags: [few-step, distillation, lightning-dfd]
---

# A {report.network_calls}-step student of {Path(backbone.configs.location.repo).name}

```python
import torch
{imports}
from diffusers.utils import export_to_video{loader}  # needs: pip install imageio imageio-ffmpeg

{load}
video = pipe(prompt="{PROMPT}"{arguments}).frames[0]
export_to_video(video, "video.mp4", fps={fps:g})
```

The scheduler is right for {report.network_calls} steps only, and the guidance has to stay as it is here.

| | |
|---|---|
{table}

Generated by lightning_dfd.
"""
