"""What goes wrong around training: a full disk, numbers that are none, loggers that die, damaged teachers."""

from __future__ import annotations

import contextlib
import io
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger

from lightning_dfd import DistillationModule, DistillationTrainer
from lightning_dfd.callbacks import VideoSamples
from lightning_dfd.data import LatentCache, VideoDataModule, list_clips, read_video, write_cache, write_video
from lightning_dfd.testing.tiny import TEXT_LENGTH
from lightning_dfd.training.settings import DMDSettings, StudentSettings
from tests.faults.caches import COUNT
from tests.faults.videos import FPS, SIZE, scene


class Place:
    """What every trial finds: a tiny teacher, a folder of captioned clips and its cache, and a folder of its own."""

    def __init__(self, teacher: Path, clips: Path, cache: Path, own: Path) -> None:
        self.teacher, self.clips, self.cache, self.own = teacher, clips, cache, own

    def module(self, **options: Any) -> DistillationModule:
        defaults = {"student": StudentSettings(rank=2), "max_sequence_length": TEXT_LENGTH}
        return DistillationModule(str(self.teacher), **(defaults | options))

    def data(self, **options: Any) -> VideoDataModule:
        defaults = {"folder": str(self.clips), "cache": str(self.cache)}
        return VideoDataModule(**(defaults | sizes() | options))

    def fit(
        self,
        module: DistillationModule,
        steps: int,
        *callbacks: Callback,
        data: VideoDataModule | None = None,
        ckpt_path: Path | None = None,
        **options: Any,
    ) -> DistillationTrainer:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = DistillationTrainer(
            max_steps=steps, max_epochs=-1, accelerator="cpu", default_root_dir=str(self.own), log_every_n_steps=1,
            callbacks=list(callbacks), **(quiet | {"enable_checkpointing": False} | options),
        )  # fmt: skip
        trainer.fit(module, data or self.data(), ckpt_path=ckpt_path, weights_only=True)
        return trainer


Trial = Callable[[Place, np.random.Generator], str]  # returns what went on; raises what ends a run


def sizes() -> dict[str, int]:
    return {"frames": SIZE.frames, "height": SIZE.height, "width": SIZE.width}


def require(condition: bool, otherwise: str) -> None:
    """Raise AssertionError: the trial is then counted as lost."""
    if not condition:
        raise AssertionError(otherwise)


def finite(module: DistillationModule) -> None:
    weights = [weight for role in module.network.held for weight in module.network.parameters_of(role)]
    require(all(bool(torch.isfinite(weight).all()) for weight in weights), "weights are no numbers any more")


# ---- the disk is full -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file of this process grows beyond `room` bytes; as on a full disk, the write that would fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


class FillsUp(Callback):
    """The disk is full from an iteration on, until the run ends."""

    def __init__(self, step: int, room: int) -> None:
        self.step, self.room, self.stack = step, room, contextlib.ExitStack()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            self.stack.enter_context(full_disk(self.room))


def disk_full_cache(place: Place, rng: np.random.Generator) -> str:
    """`write_cache` ends; with room again it goes on, and the cache is whole."""
    backbone, clips = place.module().backbone, list_clips(place.clips).clips
    target = place.own / "cache"
    try:
        with full_disk(int(rng.integers(0, 1600))):
            write_cache(backbone, clips, target, SIZE, None)
    finally:
        require(not list(target.rglob("*.tmp")), "temporary files are left")
        require(not (target / "cache.json").exists(), "the index was written before its files")
        write_cache(backbone, clips, target, SIZE, None)
        cache = LatentCache.open(target)
        require([bool(cache.load(i).prompt) for i in range(len(cache))] == [True] * COUNT, "the cache is not whole")
    return ""


def disk_full_video(place: Place, rng: np.random.Generator) -> str:
    path = place.own / "a.mp4"
    write_video(path, scene(rng), FPS)
    before = path.read_bytes()
    try:
        with full_disk(int(rng.integers(0, 1000))):
            write_video(path, scene(rng), FPS)
    finally:
        require(path.read_bytes() == before, "the old file is gone")
        require(not list(place.own.glob(".*")), "temporary files are left")
    return ""


def disk_full_checkpoint(place: Place, rng: np.random.Generator) -> str:
    """The run ends with an error that says so; its last checkpoint is whole, and the run goes on from it."""
    saves = ModelCheckpoint(place.own / "ckpt", filename="{step}", every_n_train_steps=2, save_last=True)
    fills = FillsUp(int(rng.integers(2, 4)), int(rng.integers(0, 20_000)))
    try:
        place.fit(place.module(), 6, saves, fills, enable_checkpointing=True)
        raise AssertionError("the end was not saved, and nothing was said")
    except RuntimeError as error:
        require("its checkpoint could not be written" in str(error), str(error))
        return str(error)
    finally:
        fills.stack.close()
        module = place.module()
        place.fit(module, 4, ckpt_path=place.own / "ckpt" / "last.ckpt")
        finite(module)


def disk_full_log(place: Place, rng: np.random.Generator) -> str:
    """A log that cannot be written is no reason to stop."""
    fills = FillsUp(int(rng.integers(1, 3)), int(rng.integers(0, 100)))
    with contextlib.closing(fills.stack):
        trainer = place.fit(place.module(), 5, fills, logger=CSVLogger(place.own, flush_logs_every_n_steps=1))
    require(trainer.global_step == 5, "the run stopped")
    return "went on"


def disk_full_samples(place: Place, rng: np.random.Generator) -> str:
    """Nor are sample videos that cannot be written."""
    fills = FillsUp(1, int(rng.integers(0, 100)))
    shows = VideoSamples(every=2, prompts=1, seeds=[0], teacher_steps=1)
    with contextlib.closing(fills.stack):
        trainer = place.fit(place.module(), 3, shows, fills)
    require(trainer.global_step == 3, "the run stopped")
    return "went on"


def disk_full_problems(place: Place, rng: np.random.Generator) -> str:
    """Nor is the list of left-out clips."""
    shutil.copytree(place.clips, place.own / "clips")
    (place.own / "clips" / "broken.mp4").write_bytes(b"broken")
    (place.own / "clips" / "broken.txt").write_text("a broken clip")
    data = place.data(folder=str(place.own / "clips"), cache=None)
    with full_disk(0):
        trainer = place.fit(place.module(), 2, data=data)
    require(trainer.global_step == 2, "the run stopped")
    return "went on"


# ---- numbers that are none --------------------------------------------------------------------------------------


class Poisoned(DistillationModule):
    """Its gradient is not finite in the iterations of `when`."""

    when: Callable[[int], bool]
    poison: float

    def manual_backward(self, loss: Any, *args: Any, **kwargs: Any) -> None:
        factor = self.poison if self.when(self.trainer.global_step) else 1.0
        super().manual_backward(loss * factor, *args, **kwargs)


def poisoned(place: Place, rng: np.random.Generator, when: Callable[[int], bool]) -> Poisoned:
    module = Poisoned(
        str(place.teacher), student=StudentSettings(rank=2, ema_decay=0.9), dmd=DMDSettings(student_update_freq=2),
        max_sequence_length=TEXT_LENGTH,
    )  # fmt: skip
    module.when, module.poison = when, float(rng.choice([float("nan"), float("inf"), -float("inf")]))
    return module


def bad_gradients(place: Place, rng: np.random.Generator) -> str:
    """A few: their updates are left out and counted, the run ends well."""
    bad = set(rng.choice(8, 3, replace=False).tolist())
    module = poisoned(place, rng, bad.__contains__)
    place.fit(module, 8)
    finite(module)
    skipped = module.journal.latest["train/skipped_steps"]
    require(int(skipped) == 3, f"{skipped} updates are said to be left out, 3 were")
    return "went on"


def bad_gradients_for_ever(place: Place, rng: np.random.Generator) -> str:
    role = int(rng.integers(2))
    module = poisoned(place, rng, lambda step: step % 2 == role)  # one role's alone: the other's are well
    try:
        place.fit(module, 60)
    finally:
        finite(module)
    raise AssertionError("the run went on without learning")


def bad_latents(place: Place, rng: np.random.Generator) -> str:
    """A teacher whose VAE overflows: the cache says so, or the clip is left out of training."""
    backbone = place.module().backbone
    encode, bad = backbone.encode_videos, int(rng.integers(COUNT))
    calls: list[int] = []

    def overflowing(videos: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return encode(videos) * (float("nan") if len(calls) == 1 + bad else 1.0)

    backbone.encode_videos = overflowing  # type: ignore[method-assign]
    clips = list_clips(place.clips).clips
    report = write_cache(backbone, clips, place.own / "cache", SIZE, None)
    require([problem.name for problem in report.problems] == [clips[bad].name], f"not named: {report.problems}")
    module = place.module()
    place.fit(module, 4, data=place.data(cache=str(place.own / "cache")))
    finite(module)
    return str(report.problems[0])


# ---- loggers, teachers, starts ----------------------------------------------------------------------------------


class DyingLogger(Logger):
    """Answers every call with an error from so many calls on."""

    name, version = "dying", 0

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.calls = calls

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.calls -= 1
        if self.calls < 0:
            raise ConnectionError("the tracking server is gone")

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


def dying_logger(place: Place, rng: np.random.Generator) -> str:
    data = place.data(val_share=0.3)
    logger = DyingLogger(int(rng.integers(3)))
    trainer = place.fit(place.module(), 4, data=data, logger=logger, val_check_interval=2, check_val_every_n_epoch=None)
    require(trainer.global_step == 4, "the run stopped")
    return "went on"


def no_hub(place: Place, rng: np.random.Generator) -> str:
    name = ("zai-org/CogVideoX-2b", "nobody/nothing", "/nowhere/at/all", "nothing")[int(rng.integers(4))]
    DistillationModule(name)
    raise AssertionError("there is no such teacher here")


def bad_teacher(place: Place, rng: np.random.Generator) -> str:
    """One file of the teacher is damaged."""
    shutil.copytree(place.teacher, place.own / "teacher")
    files = sorted(path for path in (place.own / "teacher").rglob("*") if path.suffix in (".json", ".safetensors"))
    path = files[int(rng.integers(len(files)))]
    if rng.integers(2):
        path.write_bytes(path.read_bytes()[: int(rng.uniform(0, 0.9) * path.stat().st_size)])
    else:
        path.unlink()
    broken = Place(place.own / "teacher", place.clips, place.cache, place.own)
    broken.fit(broken.module(), 1, data=place.data(cache=None))
    return "went on"  # a file that nobody needs


def bad_start(place: Place, rng: np.random.Generator) -> str:
    """`model.init_from` is damaged, or no checkpoint."""
    path = place.own / "x.ckpt"
    kind = int(rng.integers(5))
    if kind == 0:
        path.write_bytes(b"")
    elif kind == 1:
        path.write_bytes(rng.bytes(3000))
    elif kind == 2:
        torch.save({"other": torch.zeros(3)}, path)
    elif kind == 3:
        torch.save({"code": contextlib.nullcontext()}, path)
    else:
        place.fit(place.module(), 1).save_checkpoint(path)
        path.write_bytes(path.read_bytes()[: int(rng.uniform(0.05, 0.95) * path.stat().st_size)])
    place.module(init_from=str(path)).configure_model()
    raise AssertionError("it was taken for a checkpoint")


def changed_while_running(place: Place, rng: np.random.Generator) -> str:
    """A video or a file of the cache is deleted or cut off while the run goes on."""
    shutil.copytree(place.cache, place.own / "cache")
    shutil.copytree(place.clips, place.own / "clips")
    cached = bool(rng.integers(2))
    files = sorted((place.own / "cache" / "latents").iterdir() if cached else (place.own / "clips").glob("*.mp4"))
    path, deleted = files[int(rng.integers(len(files)))], bool(rng.integers(2))

    class Changes(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 1 and path.exists():
                path.unlink() if deleted else path.write_bytes(path.read_bytes()[:200])

    where = str(place.own / "cache") if cached else None
    module = place.module()
    trainer = place.fit(module, 9, Changes(), data=place.data(folder=str(place.own / "clips"), cache=where))
    require(trainer.global_step == 9, "the run stopped")
    finite(module)
    return "went on"


TRIALS: dict[str, Trial] = {
    "disk full, cache": disk_full_cache,
    "disk full, video": disk_full_video,
    "disk full, checkpoint": disk_full_checkpoint,
    "disk full, log": disk_full_log,
    "disk full, samples": disk_full_samples,
    "disk full, list of problems": disk_full_problems,
    "some gradients not finite": bad_gradients,
    "all gradients not finite": bad_gradients_for_ever,
    "latents not finite": bad_latents,
    "logger dies": dying_logger,
    "hub not reachable": no_hub,
    "teacher damaged": bad_teacher,
    "start damaged": bad_start,
    "file changed while running": changed_while_running,
}


def make_place(root: Path, teacher: Path) -> Place:
    """The clips and the cache that all trials share and none changes."""
    rng = np.random.default_rng(0)
    clips = root / "clips"
    for number in range(COUNT):
        write_video(clips / f"{number}.mp4", scene(rng), FPS)
        (clips / f"{number}.txt").write_text(f"clip {number}")
    place = Place(teacher, clips, root / "cache", root)
    write_cache(place.module().backbone, list_clips(clips).clips, place.cache, SIZE, None)
    assert read_video(clips / "0.mp4", SIZE, None).shape[1] == SIZE.frames
    return place
