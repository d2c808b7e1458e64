"""A Trainer with the jobs around training: `cache`, `sample` and `export`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from lightning_dfd.data import VideoDataModule, list_clips, write_cache, write_video
from lightning_dfd.export import ExportFormat, ExportReport, export_student
from lightning_dfd.module import DistillationModule
from lightning_dfd.pictures import contact_sheet, enlarge, to_frames, video_grid
from lightning_dfd.sampler import teacher_times
from lightning_dfd.types import Role, VideoSize

TEACHER_STEPS = 50


class DistillationTrainer(Trainer):
    """lightning.Trainer, plus what comes before and after `fit`."""

    def cache(self, model: DistillationModule, datamodule: VideoDataModule, encode_batch_size: int = 1) -> None:
        """Encode a folder of videos once: data.folder -> data.cache.

        Args:
            encode_batch_size: clips encoded together.
        """
        if datamodule.folder is None or datamodule.cache is None:
            raise ValueError("cache needs data.folder (videos to read) and data.cache (the folder to write)")
        model.backbone.check_size(datamodule.size)
        model.backbone.to(self.strategy.root_device)
        listing = list_clips(datamodule.folder)
        report = write_cache(
            model.backbone,
            listing.clips,
            datamodule.cache,
            datamodule.size,
            datamodule.fps,
            negative_prompts=[model.dmd.negative_prompt],
            batch_size=encode_batch_size,
        )
        rank_zero_info(f"{datamodule.cache}: {report.written} clips written, {report.kept} were there")
        for problem in (*listing.problems, *report.problems):
            rank_zero_info(f"left out {problem}")

    def sample(
        self,
        model: DistillationModule,
        datamodule: VideoDataModule,
        output: str,
        prompts: list[str] | None = None,
        seeds: list[int] | None = None,
        role: Role | None = None,
        ckpt_path: str | None = None,
        batch_size: int = 8,
    ) -> None:
        """Make videos with the student or the teacher, as mp4 files, a playing grid and a contact sheet.

        Args:
            output: folder to write to.
            prompts: what to show; null for the first 8 captions of the data.
            seeds: one video of every prompt for each; null for 0 and 1.
            role: student, ema, teacher or fake; null for what would be exported.
            ckpt_path: of a checkpoint; null for the student as training would start it, or for the teacher.
            batch_size: videos sampled together.
        """
        if role == "teacher":
            model.init_from = None
        self._load(model, ckpt_path)
        role = role or model.best_student
        prompts, seeds = prompts or _first_captions(datamodule, 8), seeds or [0, 1]
        jobs = [(prompt, seed) for prompt in prompts for seed in seeds]
        calls = len(model.sampling.steps)
        if role == "teacher":
            calls = len(teacher_times(model.backbone.scheduler_config, TEACHER_STEPS)) * (1 + (model.dmd.guidance != 1))
        frames, seconds = [], 0.0
        with tqdm(total=-(-len(jobs) // batch_size), desc=f"sampling {role}", unit="batch") as bar:
            for start in range(0, len(jobs), batch_size):
                chunk, spent = _sample_chunk(model, role, jobs[start : start + batch_size], datamodule.size)
                frames.append(chunk)
                seconds += spent
                bar.update()
        facts = {
            "role": role,
            "network_calls_per_video": calls,
            "sampling_seconds_per_video": seconds / len(jobs),
            "videos": [{"prompt": p, "seed": s, "file": f"{i:04d}.mp4"} for i, (p, s) in enumerate(jobs)],
        }
        _write_samples(Path(output), torch.cat(frames), facts, len(seeds), datamodule.fps or 8.0)
        rank_zero_info(f"{len(jobs)} videos of the {role} are in {output}")

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
        return facts


def _first_captions(datamodule: VideoDataModule, count: int) -> list[str]:
    datamodule.setup("fit")
    return list(dict.fromkeys(clip.caption for clip in datamodule.clips))[:count]


def _sample_chunk(
    model: DistillationModule, role: Role, jobs: list[tuple[str, int]], size: VideoSize
) -> tuple[Tensor, float]:
    """uint8 [B, F, H, W, C], and the seconds that the network calls took.

    A video depends on its prompt and seed alone, not on what else is in the batch, so roles and runs compare.
    """
    backbone = model.backbone
    backbone.to(model.device)
    shape = backbone.latent_shape(size)
    generators = [torch.Generator().manual_seed(seed) for _, seed in jobs]

    def draw(like: Tensor | None = None) -> Tensor:
        return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(model.device)

    cond = backbone.encode_prompts([prompt for prompt, _ in jobs]).to(model.device)
    began = time.perf_counter()
    latents = model.sample_latents(role, cond, draw(), draw, TEACHER_STEPS)
    if latents.is_cuda:
        torch.cuda.synchronize()
    spent = time.perf_counter() - began
    return to_frames(backbone.decode_latents(latents)), spent


def _write_samples(folder: Path, frames: Tensor, facts: dict[str, Any], columns: int, fps: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for video, entry in zip(frames, facts["videos"], strict=True):
        write_video(folder / entry["file"], video, fps)
    large = enlarge(frames)
    write_video(folder / "grid.mp4", video_grid(large, columns), fps)
    Image.fromarray(contact_sheet(large).numpy()).save(folder / "contact.png")
    (folder / "samples.json").write_text(json.dumps(facts, indent=2), encoding="utf-8")
