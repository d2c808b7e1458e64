"""A Trainer with the jobs around training: `plan`, `cache`, `sample` and `export`."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning import LightningDataModule, LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info

from lightning_dfd.callbacks import VideoEvaluation, VideoSamples
from lightning_dfd.callbacks.defaults import default_callbacks
from lightning_dfd.callbacks.stopping import StopEarly
from lightning_dfd.cli import INTERRUPTED
from lightning_dfd.cli.caching import cache_clips, check_caching
from lightning_dfd.cli.sampling import (
    check_role,
    first_captions,
    record_of,
    require_images,
    sampled,
    samples_folder,
    wanted,
    write_samples,
)
from lightning_dfd.data import VideoDataModule
from lightning_dfd.distributed.ranks import Ranks
from lightning_dfd.evaluation.generation import requests_for
from lightning_dfd.export import ExportFormat, ExportReport, check_export, export_student
from lightning_dfd.files import expanded, require_writable
from lightning_dfd.objectives.terms import require
from lightning_dfd.plan import Setup, advise, as_json, as_text, estimate
from lightning_dfd.runs.checkpoints import FRAME_RATE, OURS, CheckpointFiles
from lightning_dfd.runs.folder import (
    find_checkpoint,
    first_look,
    is_requeued,
    may_overwrite,
    refuse_second_run,
    require_checkpoint,
)
from lightning_dfd.runs.logs import continue_logs
from lightning_dfd.runs.signals import LeaveInTime
from lightning_dfd.training.module import DistillationModule
from lightning_dfd.training.options import (
    check_options,
    check_plugins,
    fitting_callbacks,
    prepare_for_stream,
    silence_adverts,
)
from lightning_dfd.training.saved import open_checkpoint
from lightning_dfd.types import Role

FAILED_SAVES = 3  # iterations in a row whose checkpoints may fail to be written


class DistillationTrainer(Trainer):
    """lightning.Trainer, plus what comes before and after `fit`, and runs that can be killed at any moment.

    Attributes:
        saved_step: iteration of the last checkpoint that was written and can be resumed from; None before the first.
        recipes: those named on the command line, for records of what was run.
    """

    def __init__(self, **kwargs: Any) -> None:
        silence_adverts()
        check_options(kwargs)
        self._options = dict(kwargs)
        # StopEarly before checkpoints, which Lightning puts last of these: they hold what it has seen
        given = fitting_callbacks(kwargs)
        kwargs["callbacks"] = [*given, *default_callbacks(kwargs, given), StopEarly()]
        try:
            super().__init__(**kwargs)
        except (MisconfigurationException, ValueError, TypeError, RuntimeError, ImportError) as error:
            raise ValueError(f"trainer: {' '.join(str(error).split())}") from error
        check_plugins(self)
        self.saved_step: int | None = None
        self.recipes: list[str] = []
        self._files = CheckpointFiles()
        self._unsaved = False  # whether the last checkpoint could not be written
        if type(getattr(self.strategy, "_checkpoint_io", None)) in (type(None), TorchCheckpointIO):
            # not in place of a recipe's own, nor in strategies that write shards by themselves
            with suppress(MisconfigurationException):
                self.strategy.checkpoint_io = self._files
        self._leave = LeaveInTime()
        self.callbacks.append(self._leave)  # type: ignore[attr-defined]

    def fit(
        self,
        model: LightningModule,
        train_dataloaders: Any | None = None,
        val_dataloaders: Any | None = None,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = True,
        overwrite: bool = False,
    ) -> None:
        """Train; with `ckpt_path` go on with an earlier run as if it had not been interrupted.

        Args:
            model: a DistillationModule.
            train_dataloaders: instead of a datamodule.
            val_dataloaders: instead of a datamodule.
            datamodule: a VideoDataModule.
            ckpt_path: a checkpoint; `last` for the run's newest whole one, and for a new run if there is none; `best`
                for the one with the best value of what ModelCheckpoint monitors.
            weights_only: left as it is: checkpoints are never allowed to run code.
            overwrite: begin a new run in a folder that holds another, whose checkpoints and sample videos are removed
                once the networks are loaded.

        Raises:
            FileExistsError: the folder holds another run.
            RuntimeError: the end of the run could not be saved.
        """
        require_writable(self.default_root_dir, "trainer.default_root_dir")
        self._leave.overwrite = self._may_begin(model, ckpt_path, overwrite)
        path = find_checkpoint(self, ckpt_path)
        if path is None and ckpt_path is not None:
            rank_zero_info("ckpt_path is last and there is no checkpoint yet: the run begins at iteration 0")
        content = first_look(path)
        data = datamodule or train_dataloaders
        if isinstance(data, VideoDataModule):
            turns = (1, 1)  # batches per iteration, and iterations in which every role has a turn
            if isinstance(model, DistillationModule):
                turns = model.accumulate, model.dmd.student_update_freq
            prepare_for_stream(self, data, self._options, int(content.get("global_step", 0)), *turns)
        if content:
            continue_logs(self.loggers, content[OURS].get("logs", {}), content[OURS].get("runs", {}))
        try:
            super().fit(model, train_dataloaders, val_dataloaders, datamodule, path, weights_only=True)
        except SystemExit as stop:
            if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning's answer to Ctrl-C, with code 1
                raise SystemExit(INTERRUPTED) from None
            raise
        if self._unsaved:
            good = "there is no earlier one" if self.saved_step is None else f"the last is of {self.saved_step}"
            raise RuntimeError(
                f"the run ended at iteration {self.global_step}, and its checkpoint could not be written ({good}); "
                "make room and go on with --ckpt_path last"
            )

    def _may_begin(self, model: LightningModule, ckpt_path: str | Path | None, overwrite: bool) -> bool:
        """Whether an earlier run is to be removed; raises where it would be lost by mistake."""
        if ckpt_path is not None:
            if overwrite:
                raise ValueError("--overwrite begins a new run and --ckpt_path goes on with one; give one of them")
            return False
        if self.fast_dev_run or is_requeued(self):  # type: ignore[attr-defined]
            return False
        if not overwrite:
            refuse_second_run(self)
            return False
        may_overwrite(self, model.init_from if isinstance(model, DistillationModule) else None)
        return True

    def validate(
        self,
        model: LightningModule | None = None,
        dataloaders: Any | None = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: LightningDataModule | None = None,
        weights_only: bool | None = True,
    ) -> Any:
        """Denoising errors on the held-out clips.

        Args:
            model: a DistillationModule.
            dataloaders: instead of a datamodule.
            ckpt_path: a checkpoint, or the run's `last` or `best`; null for the student as training would start it.
            verbose: print the values.
            datamodule: a VideoDataModule.
            weights_only: left as it is: checkpoints are never allowed to run code.

        Raises:
            ValueError: no clips are held out.
        """
        path = self._to_measure(datamodule or dataloaders, ckpt_path)
        return super().validate(model, dataloaders, path, verbose, datamodule, weights_only=True)

    def test(
        self,
        model: LightningModule | None = None,
        dataloaders: Any | None = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: LightningDataModule | None = None,
        weights_only: bool | None = True,
    ) -> Any:
        """As `validate`, under the names of the test stage.

        Args:
            model: a DistillationModule.
            dataloaders: instead of a datamodule.
            ckpt_path: a checkpoint, or the run's `last` or `best`; null for the student as training would start it.
            verbose: print the values.
            datamodule: a VideoDataModule.
            weights_only: left as it is: checkpoints are never allowed to run code.

        Raises:
            ValueError: no clips are held out.
        """
        path = self._to_measure(datamodule or dataloaders, ckpt_path)
        return super().test(model, dataloaders, path, verbose, datamodule, weights_only=True)

    def _to_measure(self, data: LightningDataModule | object | None, ckpt_path: str | Path | None) -> str | None:
        """The path of the checkpoint for `validate` and `test`; raises, before anything is loaded, for none, and where
        no clips are held out."""
        if isinstance(data, VideoDataModule):
            data.require_held_out()
        path = require_checkpoint(self, ckpt_path)
        first_look(path)
        return path

    def save_checkpoint(
        self, filepath: str | Path, weights_only: bool | None = None, storage_options: Any | None = None
    ) -> None:
        """As Lightning's, but a disk that is full ends the run only after some saves in a row; see CheckpointFiles.

        Raises:
            RuntimeError: on every rank, after the checkpoints of 3 iterations in a row could not be written.
        """
        if self.fast_dev_run:  # type: ignore[attr-defined]  # which ModelCheckpoint forgets at the end
            return
        super().save_checkpoint(filepath, weights_only, storage_options)
        failed = self.strategy.broadcast(len(self._files.failed))  # the first rank's, which writes
        self._unsaved = failed > 0
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
        if memory is not None and not 0 < memory < math.inf:
            raise ValueError(f"memory is {memory}; it must be a number of GiB above 0")
        cached = datamodule.cache is not None
        callbacks: list[Any] = self.callbacks  # type: ignore[attr-defined]
        samples = any(isinstance(one, (VideoSamples, VideoEvaluation)) for one in callbacks)
        setup = Setup(model, datamodule.size, datamodule.batch_size, cached, str(self.precision), device, samples)

        def tell(step: str) -> None:  # not to stdout, where JSON may be expected
            print(f"planning: {step}", file=sys.stderr, flush=True)

        found = estimate(setup, tell)
        limit = None if memory is None else memory * 2**30
        advice = [] if limit is None else advise(setup, found, limit, tell)
        print((as_json if json else as_text)(setup, found, limit, advice))

    def cache(self, model: DistillationModule, datamodule: VideoDataModule, encode_batch_size: int = 1) -> None:
        """Encode a folder of videos once: data.folder -> data.cache. Several devices share the clips.

        Args:
            encode_batch_size: clips encoded together.
        """
        check_caching(datamodule, encode_batch_size)
        launcher = self.strategy.launcher
        run = self._cache if launcher is None else partial(launcher.launch, self._cache, trainer=self)
        run(model, datamodule, encode_batch_size)

    def _cache(self, model: DistillationModule, datamodule: VideoDataModule, encode_batch_size: int) -> None:
        """On every process."""
        self.strategy.connect(model)
        self.strategy.setup_environment()
        model.backbone.loader.to(self.strategy.root_device)
        cache_clips(model, datamodule, encode_batch_size, Ranks.of(self))

    def sample(
        self,
        model: DistillationModule,
        datamodule: VideoDataModule,
        output: str,
        prompts: list[str] | str | None = None,
        prompts_file: str | None = None,
        seeds: list[int] | int | None = None,
        images: list[str] | str | None = None,
        role: Role | None = None,
        ckpt_path: str | None = None,
        batch_size: int = 8,
    ) -> None:
        """Generate videos with the student or the teacher: mp4 files as they come, then a grid and a contact sheet.

        Args:
            output: folder to write to; videos that an earlier call wrote there are removed, other files are kept.
            prompts: what to show: one text, or a list; null for the first 8 captions of the data.
            prompts_file: in place of prompts: a file with one to a line, or a .jsonl with `text`.
            seeds: one video of every prompt for each; null for 0 and 1.
            images: image-to-video only: one file for each prompt, a picture or a video, with whose first frame its
                videos begin; null for the data's clips.
            role: student, ema, teacher or fake; null for what would be exported.
            ckpt_path: a checkpoint, or the run's `last` or `best`; null for the student as training would start it, or
                for the teacher.
            batch_size: videos sampled together.
        """
        require(batch_size >= 1, "batch_size", batch_size, "at least 1")
        asked = wanted(prompts, prompts_file, seeds, images)
        check_role(model, role, asked.images, datamodule.size)
        folder = samples_folder(expanded(output, "output"))
        if role == "teacher":
            model.init_from = None
        needs_data = asked.prompts is None or (model.backbone.takes_image and asked.images is None)
        if needs_data:
            datamodule.setup("fit")
        requests = requests_for(asked.prompts or first_captions(datamodule), asked.seeds, asked.images)
        require_images(model, requests, datamodule)
        trained = self._load(model, ckpt_path)
        role, fps = role or model.best_student, _playing_rate(trained, datamodule)
        record = record_of(model, role, requests, datamodule, fps) | {"recipes": self.recipes} | model.loaded_from
        videos = sampled(model, role, requests, datamodule, batch_size, record)
        write_samples(folder, videos, requests, record, fps)
        rank_zero_info(f"{len(requests)} videos of the {role} are in {folder}")

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
            ckpt_path: a checkpoint, or the run's `last` or `best`.
            format: pipeline, or lora for `load_lora_weights`.
        """
        output = expanded(output, "output")
        check_export(model, output, format)
        require_writable(output, "output")
        model.backbone.loader.quantization = None  # what is exported is merged into the teacher as it was published
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
        ckpt_path = require_checkpoint(self, ckpt_path)
        if ckpt_path is not None:
            ckpt_path = expanded(ckpt_path, "ckpt_path")
            model.init_from = None
            open_checkpoint(ckpt_path, "ckpt_path", model.student, model.backbone)  # refused before anything is loaded
        model.configure_model()
        facts = {} if ckpt_path is None else model.load_weights(ckpt_path)
        model.to(self.strategy.root_device)
        model.backbone.loader.to(model.device)
        return facts


def _playing_rate(facts: Mapping[str, str], datamodule: VideoDataModule) -> float:
    """The rate of the checkpoint's run; without one, of the data."""
    return float(facts[FRAME_RATE]) if FRAME_RATE in facts else datamodule.playing_rate
