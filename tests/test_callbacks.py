"""Evaluation, samples and alarms: what they say, when, and that training does not notice them."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from lightning_dfd import DistillationModule, DistillationTrainer
from lightning_dfd.callbacks import RunHealth, VideoEvaluation, VideoSamples
from lightning_dfd.cli import main as cli
from lightning_dfd.data import VideoDataModule, read_video
from lightning_dfd.testing.tiny import TEXT_LENGTH
from lightning_dfd.toy import world
from lightning_dfd.training.settings import DataForcingSettings, StudentSettings
from lightning_dfd.types import VideoSize
from tests.test_cli import recipe, small
from tests.together import in_two_processes

READINGS = "lightning_dfd.toy.features.WorldReadings"
SMALL = {"prompts": 2, "seeds": 2, "min_videos": 4, "real_clips": 8, "teacher_steps": 3, "distance": READINGS}
FEW: dict[str, Any] = SMALL | {"diversity": READINGS, "batch_size": 3}


def make_module(teacher: Path, **options: Any) -> DistillationModule:
    optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=1e-2)  # noqa: E731
    defaults = {"student": StudentSettings(rank=4), "student_optimizer": optimizer, "fake_optimizer": optimizer}
    return DistillationModule(str(teacher), max_sequence_length=TEXT_LENGTH, **(defaults | options))


def fit(
    teacher: Path, videos: Path, root: Path, steps: int, *callbacks: Callback, **options: Any
) -> tuple[DistillationTrainer, DistillationModule]:
    trainer_options = {key: options.pop(key) for key in ("logger", "ckpt_path") if key in options}
    module = make_module(teacher, **options)
    data = VideoDataModule(folder=str(videos), frames=9, height=32, width=32, fps=8, batch_size=2)
    trainer = DistillationTrainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", default_root_dir=str(root), callbacks=list(callbacks),
        logger=trainer_options.get("logger", False), log_every_n_steps=1, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
    )  # fmt: skip
    trainer.fit(module, datamodule=data, weights_only=True)
    return trainer, module


def trained(module: DistillationModule) -> dict[str, Tensor]:
    roles = module.network.held
    return {f"{role} {name}": value for role in roles for name, value in module.network.weights_of(role).items()}


def logged(root: Path) -> list[dict[str, str]]:
    with next(root.rglob("metrics.csv")).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow(seconds=8)
def test_looking_changes_nothing(tiny: dict[str, Path], videos: Path, tmp_path: Path) -> None:
    """Evaluation, samples and alarms at every step leave the same weights, bit by bit, as none."""
    options: dict[str, Any] = {
        "student": StudentSettings(rank=4, ema_decay=0.9, input="rollout"),
        "data_forcing": DataForcingSettings(probability=0.5),
    }
    _, without = fit(tiny["cogvideox"], videos, tmp_path / "a", 6, **options)
    state = torch.get_rng_state()
    looks = [VideoEvaluation(every=1, **FEW), VideoSamples(every=1, prompts=1, teacher_steps=2), RunHealth(every=1)]
    torch.manual_seed(5)
    _, watched = fit(tiny["cogvideox"], videos, tmp_path / "b", 6, *looks, **options)
    before, after = trained(without), trained(watched)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(bool(value.any()) for name, value in before.items() if "lora_B" in name)  # they did learn
    torch.set_rng_state(state)


@pytest.mark.slow(seconds=8)
def test_evaluation_is_logged_and_chooses_the_checkpoint(
    tiny: dict[str, Path],
    videos: Path,
    tmp_path: Path,
) -> None:
    best = ModelCheckpoint(tmp_path / "best", monitor="val/score", every_n_train_steps=2, filename="{step}")
    evaluation = VideoEvaluation(every=2, **FEW)
    trainer, _ = fit(tiny["wan"], videos, tmp_path, 7, evaluation, best, logger=CSVLogger(tmp_path))
    rows = {int(row["step"]): row for row in logged(tmp_path) if row.get("val/score")}
    assert list(rows) == [0, 2, 4, 6, 7]  # the start, every second and the end
    for row in rows.values():
        assert float(row["val/videos"]) == 4
        assert float(row["val/real_videos"]) == 8
        for name in ("world_readings_fd", "diversity", "saturation"):
            student, teacher = float(row[f"val/{name}"]), float(row[f"val/teacher/{name}"])
            assert math.isfinite(student)
            assert float(row[f"val/{name}_ratio"]) == pytest.approx(student / teacher, rel=1e-4)
    assert float(rows[0]["val/diversity_ratio"]) != float(rows[6]["val/diversity_ratio"])
    chosen = min((2, 4, 6), key=lambda step: float(rows[step]["val/score"]))
    assert re.search(rf"step={chosen}\.ckpt", best.best_model_path)
    assert trainer.callback_metrics["val/score"] == pytest.approx(float(rows[7]["val/score"]), rel=1e-4)


@pytest.mark.slow(seconds=8)
def test_the_teacher_and_the_real_clips_are_measured_once(
    tiny: dict[str, Path],
    videos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[str] = []
    sample = DistillationModule.sample_latents
    real_video = VideoDataModule.real_video

    def watched_sample(module: Any, role: str, *args: Any) -> Tensor:
        seen.append(role)
        return sample(module, role, *args)  # type: ignore[arg-type]

    def watched_real(data: Any, *args: Any) -> Tensor:
        seen.append("real")
        return real_video(data, *args)

    monkeypatch.setattr(DistillationModule, "sample_latents", watched_sample)
    monkeypatch.setattr(VideoDataModule, "real_video", watched_real)
    runs = []
    for run, prompts in (("a", 2), ("b", 2), ("c", 3)):
        evaluation = VideoEvaluation(every=9, **(FEW | {"prompts": prompts}), statistics=str(tmp_path / "kept"))
        fit(tiny["wan"], videos, tmp_path / run, 1, evaluation, logger=CSVLogger(tmp_path / run))
        runs.append([role for role in ("teacher", "real") if role in seen])
        seen.clear()
    assert runs == [["teacher", "real"], [], ["teacher"]]  # other prompts: the teacher again, the real clips not
    first, second = (logged(tmp_path / run)[0] for run in ("a", "b"))
    assert {k: v for k, v in first.items() if k.startswith("val/")} == {
        k: v for k, v in second.items() if k.startswith("val/")
    }


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"prompts": 1}, "2 videos, fewer than min_videos=4"),
        ({"prompts": []}, "prompts is"),
        ({"distance": "i3d"}, "there is no extractor 'i3d'"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_training(
    tiny: dict[str, Path],
    videos: Path,
    tmp_path: Path,
    arguments: dict[str, Any],
    said: str,
) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        fit(tiny["wan"], videos, tmp_path, 2, VideoEvaluation(**(FEW | arguments)))
    with pytest.raises(ValueError, match="at least 2 seeds"):
        VideoEvaluation(seeds=1)


@pytest.mark.slow(seconds=8)
def test_samples_show_teacher_and_student(tiny: dict[str, Path], videos: Path, tmp_path: Path) -> None:
    callback = VideoSamples(every=2, prompts=["a cat", "a dog", "a hen"], seeds=(3, 4), teacher_steps=2, batch_size=4)
    fit(tiny["cogvideox"], videos, tmp_path, 3, callback, logger=TensorBoardLogger(tmp_path))
    folder = tmp_path / "samples"
    assert sorted(path.name for path in folder.iterdir()) == [
        f"{step:07d}.{kind}" for step in (0, 2, 3) for kind in ("mp4", "png")
    ]
    # 3 prompts down; 2 seeds of the teacher, then 2 of the student, across, each enlarged to 96 pixels
    grid = read_video(folder / "0000000.mp4", VideoSize(9, 300, 400), None).float()
    cells = grid.unfold(2, 96, 100).unfold(3, 96, 100)  # [C, F, rows, columns, 96, 96]
    assert cells.shape[2:4] == (3, 4)
    # at the start student and teacher are one network, though in few steps and in many
    assert (cells[:, :, :, 0] - cells[:, :, :, 1]).abs().mean() > 2  # other seeds differ
    assert Image.open(folder / "0000003.png").size[0] > 400
    events = EventAccumulator(str(next(tmp_path.rglob("events*")).parent)).Reload()
    images = events.Images("samples/teacher_and_student")
    assert [image.step for image in images] == [0, 2, 3]
    assert images[0].encoded_image_string.startswith(b"GIF89a")


# ---- alarms ---------------------------------------------------------------------------------------------------


def alarms_of(health: RunHealth, module: DistillationModule, readings: list[dict[str, float]]) -> dict[str, str]:
    """The alarms after these readings, by name."""
    found: dict[str, str | None] = {}
    for reading in readings:
        found |= dict(health.check(module, reading))
    return {name: text for name, text in found.items() if text is not None}


@pytest.fixture
def forcing(tiny: dict[str, Path]) -> DistillationModule:
    return make_module(tiny["wan"], data_forcing=DataForcingSettings(probability=0.5))


def test_a_healthy_run_raises_no_alarm(forcing: DistillationModule) -> None:
    reading = {
        "train/student_grad_norm": 12.0, "train/fake_grad_norm": 1.0, "train/fake_loss": 0.1,
        "train/paired_gap": 0.4, "train/unpaired_gap": 0.8, "val/diversity_ratio": 0.9, "val/saturation_ratio": 1.1,
    }  # fmt: skip
    calm = reading | {"train/student_grad_norm": 3.0}
    assert alarms_of(RunHealth(), forcing, [reading] * 19 + [calm] + [reading] * 5) == {}


@pytest.mark.parametrize(
    ("name", "readings", "said"),
    [
        ("gradient", [{"train/fake_grad_norm": math.nan}], "fake's gradient is nan"),
        ("gradient", [{"train/student_grad_norm": 11.0}] * 20, "above model.gradient_clip=10"),
        ("fake_score_behind", [{"train/fake_loss": v} for v in [0.1] * 20 + [0.5] * 20], "5.0 times its lowest"),
        ("unpaired", [{"train/paired_gap": 0.95, "train/unpaired_gap": 1.0}] * 20, "model.student.input: data"),
        ("diversity", [{"val/diversity_ratio": 0.4}], "0.40 of the teacher's diversity"),
        ("saturation", [{"val/saturation_ratio": 1.4}], "1.40 of the teacher's"),
        ("saturation", [{"val/saturation_ratio": 0.6}], "0.60 of the teacher's"),
    ],
)
def test_alarms(forcing: DistillationModule, name: str, readings: list[dict[str, float]], said: str) -> None:
    assert alarms_of(RunHealth(), forcing, readings[: len(readings) // 2]) == {}
    text = alarms_of(RunHealth(), forcing, readings)
    assert list(text) == [name]
    assert said in text[name]
    assert "\n" not in text[name]


def test_no_data_forcing_needs_no_pairs(tiny: dict[str, Path]) -> None:
    readings = [{"train/paired_gap": 1.0, "train/unpaired_gap": 1.0}] * 30
    assert alarms_of(RunHealth(), make_module(tiny["wan"]), readings) == {}


@pytest.mark.slow(seconds=2)
def test_forcing_from_the_teacher_is_warned_of_and_may_stop_the_run(
    tiny: dict[str, Path],
    videos: Path,
    tmp_path: Path,
    recwarn: pytest.WarningsRecorder,
) -> None:
    forcing = {"data_forcing": DataForcingSettings(probability=0.5)}
    trainer, _ = fit(tiny["wan"], videos, tmp_path, 4, RunHealth(), logger=CSVLogger(tmp_path), **forcing)
    said = [str(warning.message) for warning in recwarn if "not_distilled" in str(warning.message)]
    assert len(said) == 1
    assert "model.init_from" in said[0]
    assert float(logged(tmp_path)[0]["health/not_distilled"]) == 1
    assert trainer.global_step == 4
    stopped, _ = fit(tiny["wan"], videos, tmp_path / "stop", 4, RunHealth(stop=True), **forcing)
    assert stopped.global_step < 4
    trainer, _ = fit(tiny["wan"], videos, tmp_path / "dmd2", 2, RunHealth(stop=True))
    assert trainer.global_step == 2


# ---- several processes ----------------------------------------------------------------------------------------


def run_all(commands: Sequence[Sequence[str]]) -> None:
    for command in commands:
        cli.main(command)


@pytest.mark.slow(seconds=11)
def test_two_processes_measure_what_one_does(tiny: dict[str, Path], videos: Path, tmp_path: Path) -> None:
    """Five requests over two ranks, in batches of three: shares of unlike size."""
    callback = {
        "class_path": "lightning_dfd.callbacks.VideoEvaluation",
        "init_args": FEW | {"prompts": ["a cat", "a dog", "a hen"], "every": 50},
    }
    strategies = [("auto", 1), ("ddp_find_unused_parameters_true", 2), ("fsdp2", 2)]
    commands = []
    for name, processes in strategies:
        root = tmp_path / name
        words = [*small(tiny, "wan", videos, root), "--data.cache", "null", "--trainer.max_steps", "1"]
        words += ["--data.width", str(world.SIZE)]  # READINGS are of the square world
        words += ["--trainer.devices", str(processes), "--trainer.callbacks", str([callback])]
        words += ["--trainer.strategy", name]
        commands.append(["fit", "-c", recipe("wan_dmd2"), *words])
    cli.main(commands[0])
    in_two_processes(run_all, commands[1:])
    rows = [next(row for row in logged(tmp_path / name) if row.get("val/videos")) for name, _ in strategies]
    assert float(rows[0]["val/videos"]) == 6
    names = [name for name in rows[0] if name.startswith("val/") and rows[0][name]]
    assert len(names) > 20
    for row in rows[1:]:
        for name in names:
            assert float(row[name]) == pytest.approx(float(rows[0][name]), rel=1e-5, abs=1e-7), name


class RecordingWandb(WandbLogger):
    """A WandbLogger of which only what VideoSamples calls is left, as wandb is no dependency."""

    def __init__(self) -> None:
        self.videos: list[tuple[str, list[Any], dict[str, Any]]] = []

    def log_video(self, key: str, videos: list[Any], step: int | None = None, **kwargs: Any) -> None:
        assert all(len(values) == len(videos) for values in kwargs.values())  # as the real one demands
        assert all(Path(video).is_file() for video in videos)
        self.videos.append((key, videos, {"step": step, **kwargs}))

    def log_metrics(self, *args: Any, **kwargs: Any) -> None: ...

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    def finalize(self, status: str) -> None: ...

    name = version = save_dir = experiment = None  # type: ignore[assignment]


def test_samples_go_to_wandb(tiny: dict[str, Path], videos: Path, tmp_path: Path) -> None:
    logger = RecordingWandb()
    fit(tiny["wan"], videos, tmp_path, 1, VideoSamples(prompts=["a cat"], seeds=(3,), teacher_steps=2), logger=logger)
    assert [call[2]["step"] for call in logger.videos] == [0, 1]
    assert logger.videos[0][0] == "samples/teacher_and_student"
