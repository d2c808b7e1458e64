"""A Trainer with the jobs around training: `plan`, `cache`, `sample` and `export`."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from lightning_dfd.checkpoints import FRAME_RATE, OURS, CheckpointFiles, read_checkpoint
from lightning_dfd.data import Process, VideoDataModule, list_clips, read_first_frame, write_cache, write_video
from lightning_dfd.data.files import expanded, require_writable
from lightning_dfd.export import ExportFormat, ExportReport, export_student
from lightning_dfd.generation import TEACHER_STEPS, Request, condition, generate_latents, requests_for
from lightning_dfd.module import DistillationModule
from lightning_dfd.pictures import contact_sheet, enlarge, to_frames, video_grid
from lightning_dfd.plan import Setup, advise, as_json, as_text, estimate
from lightning_dfd.resume import LeaveInTime, continue_logs, newest_checkpoint
from lightning_dfd.types import Role

FAILED_SAVES = 3  # iterations in a row whose checkpoints may fail to be written


class DistillationTrainer(Trainer):
    """lightning.Trainer, plus what comes before and after `fit`, and runs that can be killed at any moment.

    Attributes:
        saved_step: iteration of the last checkpoint that was written and can be resumed from; None before the first.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.saved_step: int | None = None
        self._files = CheckpointFiles()
        if type(getattr(self.strategy, "_checkpoint_io", None)) in (type(None), TorchCheckpointIO):
            # not in place of a recipe's own, nor in strategies that write shards by themselves
            with suppress(MisconfigurationException):
                self.strategy.checkpoint_io = self._files
        self.callbacks.append(LeaveInTime())  # type: ignore[attr-defined]

    def fit(
        self,
        model: LightningModule,
        train_dataloaders: Any | None = None,
        val_dataloaders: Any | None = None,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = True,
    ) -> None:
        """Train; with `ckpt_path` go on with an earlier run as if it had not been interrupted.

        Args:
            model: a DistillationModule.
            train_dataloaders: instead of a datamodule.
            val_dataloaders: instead of a datamodule.
            datamodule: a VideoDataModule.
            ckpt_path: a checkpoint, or `last` for the run's newest whole one, and for a new run if there is none.
            weights_only: left as it is: checkpoints are never allowed to run code.
        """
        require_writable(self.default_root_dir, "trainer.default_root_dir")
        if ckpt_path == "last":
            ckpt_path = newest_checkpoint(self)
            if ckpt_path is None:
                rank_zero_info("ckpt_path is last and there is no checkpoint yet: the run begins at iteration 0")
        if ckpt_path is not None and Path(ckpt_path).exists():
            continue_logs(self.loggers, read_checkpoint(ckpt_path, lazily=True)[OURS].get("logs", {}))
        super().fit(model, train_dataloaders, val_dataloaders, datamodule, ckpt_path, weights_only=True)

    def save_checkpoint(
        self, filepath: str | Path, weights_only: bool | None = None, storage_options: Any | None = None
    ) -> None:
        """As Lightning's, but a disk that is full ends the run only after some saves in a row; see CheckpointFiles.

        Raises:
            RuntimeError: on every rank, after the checkpoints of 3 iterations in a row could not be written.
        """
        super().save_checkpoint(filepath, weights_only, storage_options)
        failed = self.strategy.broadcast(len(self._files.failed))  # the first rank's, which writes
        if failed >= FAILED_SAVES:
            raise RuntimeError(
                f"the checkpoints of {failed} iterations in a row could not be written, the last at {filepath}; make "
                "room and go on from the last good one with --ckpt_path last"
            )
        if not failed and not weights_only:
            self.saved_step = self.global_step

    def plan(
        self,
        model: DistillationModule,
        datamodule: VideoDataModule,
        memory: float | None = None,
        device: Literal["cuda", "cpu"] = "cuda",
        json: bool = False,
    ) -> None:
        """Print what training will need, before anything is loaded: only the teacher's configs are read.

        Args:
            memory: GiB of a device; if the estimate is above, the plan says what to change.
            device: whose rules of mixed precision and of optimizers count; it need not be here.
            json: print JSON, with sizes in bytes, and not a table.
        """
        cached = datamodule.cache is not None
        setup = Setup(model, datamodule.size, datamodule.batch_size, cached, str(self.precision), device)
        found = estimate(setup)
        limit = None if memory is None else memory * 2**30
        advice = [] if limit is None else advise(setup, found, limit)
        print((as_json if json else as_text)(setup, found, limit, advice))

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
        self.strategy.connect(model)
        self.strategy.setup_environment()
        if datamodule.folder is None or datamodule.cache is None:
            raise ValueError("cache needs data.folder (videos to read) and data.cache (the folder to write)")
        require_writable(datamodule.cache, "data.cache")
        model.backbone.to(self.strategy.root_device)
        listing = list_clips(datamodule.folder)
        report = write_cache(
            model.backbone,
            listing.clips,
            datamodule.cache,
            datamodule.sizes,
            datamodule.fps,
            negative_prompts=[model.dmd.negative_prompt],
            batch_size=encode_batch_size,
            more_captions=[""] if datamodule.caption_dropout else [],
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
            images: image-to-video only: one file for each prompt, a picture or a video, with whose first frame its
                videos begin; null for the data's clips.
            role: student, ema, teacher or fake; null for what would be exported.
            ckpt_path: of a checkpoint, or `last`; null for the student as training would start it, or for the teacher.
            batch_size: videos sampled together.
        """
        output = expanded(output, "output")
        require_writable(output, "output")
        if images is not None and (not model.backbone.takes_image or len(images) != len(prompts or ())):
            raise ValueError(
                f"got {len(images)} images for {len(prompts or ())} prompts and a {type(model.backbone).__name__}; "
                "give one for each prompt, and only to an image-to-video teacher"
            )
        images = images and [expanded(image, "images") for image in images]
        for image in images or ():
            read_first_frame(image, datamodule.size.height, datamodule.size.width)
        if role == "teacher":
            model.init_from = None
        trained = self._load(model, ckpt_path)
        role = role or model.best_student
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
        _write_samples(Path(output), torch.cat(frames), requests, facts, _playing_rate(trained, datamodule))
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
            ckpt_path: of a checkpoint, or `last` for the newest whole one of the recipe's run.
            format: pipeline, or lora for `load_lora_weights`.
        """
        require_writable(Path(expanded(output, "output")).parent, "output")
        model.backbone.quantization = None  # what is exported is merged into the teacher as it was published
        facts = self._load(model, ckpt_path)
        rate = _playing_rate(facts, datamodule)
        report = export_student(model, output, datamodule.size, format, facts, rate)
        rank_zero_info(
            f"{report.folder}: stock diffusers gives the student's latents in {report.network_calls} network calls "
            f"(difference {report.error:.1e}, allowed {report.tolerance:.0e}); see {report.folder / 'README.md'}"
        )
        return report

    def _load(self, model: DistillationModule, ckpt_path: str | None) -> dict[str, str]:
        """Networks with a checkpoint's weights, on this trainer's device; returns what the checkpoint says."""
        if ckpt_path == "last":
            found = newest_checkpoint(self)
            if found is None:
                raise FileNotFoundError("ckpt_path is last, and the recipe's run has no whole checkpoint; name one")
            ckpt_path = str(found)
        if ckpt_path is not None:
            ckpt_path = expanded(ckpt_path, "ckpt_path")
            model.init_from = None
        model.configure_model()
        facts = {} if ckpt_path is None else model.load_weights(ckpt_path)
        model.to(self.strategy.root_device)
        model.backbone.to(model.device)
        return facts


def _playing_rate(facts: Mapping[str, str], datamodule: VideoDataModule) -> float:
    """The rate of the checkpoint's run; without one, of the data."""
    return float(facts[FRAME_RATE]) if FRAME_RATE in facts else datamodule.playing_rate


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
