"""A Trainer with the jobs around training: `cache`, `sample` and `export`."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from lightning_dfd.data import Process, VideoDataModule, list_clips, write_cache, write_video
from lightning_dfd.export import ExportFormat, ExportReport, export_student
from lightning_dfd.generation import TEACHER_STEPS, Request, condition, generate_latents, requests_for
from lightning_dfd.module import DistillationModule
from lightning_dfd.pictures import contact_sheet, enlarge, to_frames, video_grid
from lightning_dfd.types import Role


class DistillationTrainer(Trainer):
    """lightning.Trainer, plus what comes before and after `fit`."""

    def cache(self, model: DistillationModule, datamodule: VideoDataModule, encode_batch_size: int = 1) -> None:
        """Encode a folder of videos once: data.folder -> data.cache. Several devices share the clips.

        Args:
            encode_batch_size: clips encoded together.
        """
        launcher = self.strategy.launcher
        run = self._cache if launcher is None else partial(launcher.launch, self._cache, trainer=self)
        run(model, datamodule, encode_batch_size)

    def _cache(self, model: DistillationModule, datamodule: VideoDataModule, encode_batch_size: int) -> None:
        """On every process."""
        self.strategy.setup_environment()
        if datamodule.folder is None or datamodule.cache is None:
            raise ValueError("cache needs data.folder (videos to read) and data.cache (the folder to write)")
        model.backbone.to(self.strategy.root_device)
        listing = list_clips(datamodule.folder)
        report = write_cache(
            model.backbone,
            listing.clips,
            datamodule.cache,
            datamodule.sizes,
            datamodule.fps,
            negative_prompts=[model.dmd.negative_prompt, ""],  # the empty one for data.caption_dropout
            batch_size=encode_batch_size,
            process=Process(self.global_rank, self.world_size, self._gather),
        )
        rank_zero_info(f"{datamodule.cache}: {report.written} clips written, {report.kept} were there")
        for problem in (*listing.problems, *report.problems):
            rank_zero_info(f"left out {problem}")

    def _gather(self, value: Any) -> list[Any]:
        """What every process gave, by rank."""
        found: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            torch.distributed.all_gather_object(found, value)
        return found

    def sample(
        self,
        model: DistillationModule,
        datamodule: VideoDataModule,
        output: str,
        prompts: list[str] | None = None,
        seeds: list[int] | None = None,
        images: list[str] | None = None,
        role: Role | None = None,
        ckpt_path: str | None = None,
        batch_size: int = 8,
    ) -> None:
        """Make videos with the student or the teacher, as mp4 files, a playing grid and a contact sheet.

        Args:
            output: folder to write to.
            prompts: what to show; null for the first 8 captions of the data.
            seeds: one video of every prompt for each; null for 0 and 1.
            images: image-to-video only: one file for each prompt, with whose first frame its videos begin; null for
                the data's clips.
            role: student, ema, teacher or fake; null for what would be exported.
            ckpt_path: of a checkpoint; null for the student as training would start it, or for the teacher.
            batch_size: videos sampled together.
        """
        if role == "teacher":
            model.init_from = None
        self._load(model, ckpt_path)
        role = role or model.best_student
        if images is not None and (not model.backbone.takes_image or len(images) != len(prompts or ())):
            raise ValueError(
                f"got {len(images)} images for {len(prompts or ())} prompts and a {type(model.backbone).__name__}; "
                "give one for each prompt, and only to an image-to-video teacher"
            )
        if prompts is None or (model.backbone.takes_image and images is None):
            datamodule.setup("fit")
        prompts, seeds = prompts or _first_captions(datamodule, 8), seeds or [0, 1]
        requests = requests_for(prompts, seeds, None if images is None else [Path(image) for image in images])
        calls = len(model.sampling.steps)
        if role == "teacher":
            shape = model.backbone.latent_shape(datamodule.size)
            calls = len(model.backbone.teacher_times(TEACHER_STEPS, shape)) * (1 + (model.dmd.guidance != 1))
        frames, seconds = [], 0.0
        for start in tqdm(range(0, len(requests), batch_size), desc=f"sampling {role}", unit="batch"):
            chunk = requests[start : start + batch_size]
            cond = condition(model.backbone, chunk, datamodule.size, datamodule if model.backbone.takes_image else None)
            began = time.perf_counter()
            latents = generate_latents(model, role, chunk, cond, datamodule.size)
            if latents.is_cuda:
                torch.cuda.synchronize()
            seconds += time.perf_counter() - began
            frames.append(to_frames(model.backbone.decode_latents(latents)))
        facts = {
            "role": role,
            "network_calls_per_video": calls,
            "sampling_seconds_per_video": seconds / len(requests),
        }
        _write_samples(Path(output), torch.cat(frames), requests, facts, datamodule.fps or 8.0)
        rank_zero_info(f"{len(requests)} videos of the {role} are in {output}")

    def export(
        self,
        model: DistillationModule,
        datamodule: VideoDataModule,
        output: str,
        ckpt_path: str,
        format: ExportFormat = "pipeline",
    ) -> ExportReport:
        """Write the student as a diffusers pipeline, or as a LoRA file, and prove it by reloading it.

        Args:
            output: folder to write; must not exist.
            ckpt_path: of a checkpoint.
            format: pipeline, or lora for `load_lora_weights`.
        """
        facts = self._load(model, ckpt_path)
        report = export_student(model, output, datamodule.size, format, facts)
        rank_zero_info(
            f"{report.folder}: stock diffusers gives the student's latents in {report.network_calls} network calls "
            f"(difference {report.error:.1e}, allowed {report.tolerance:.0e}); see {report.folder / 'README.md'}"
        )
        return report

    def _load(self, model: DistillationModule, ckpt_path: str | None) -> dict[str, str]:
        """Networks with a checkpoint's weights, on this trainer's device; returns what the checkpoint says."""
        if ckpt_path is not None:
            model.init_from = None
        model.configure_model()
        facts = {} if ckpt_path is None else model.load_weights(ckpt_path)
        model.to(self.strategy.root_device)
        model.backbone.to(model.device)
        return facts


def _first_captions(datamodule: VideoDataModule, count: int) -> list[str]:
    return list(dict.fromkeys(clip.caption for clip in datamodule.clips))[:count]


def _write_samples(
    folder: Path, frames: Tensor, requests: Sequence[Request], facts: Mapping[str, Any], fps: float
) -> None:
    """Videos with a metadata.jsonl, so that the folder can be evaluated like any other; a grid's row is a prompt."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (video, request) in enumerate(zip(frames, requests, strict=True)):
        name = f"{number:04d}.mp4"
        write_video(folder / name, video, fps)
        lines.append(json.dumps({"file_name": name, "text": request.prompt, "seed": request.seed}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "samples.json").write_text(json.dumps(facts, indent=2), encoding="utf-8")
    large = enlarge(frames)
    seeds = len({request.seed for request in requests})
    write_video(folder / "grid.mp4", video_grid(large, seeds), fps)
    Image.fromarray(contact_sheet(large).numpy()).save(folder / "contact.png")
