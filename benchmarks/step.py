"""A training iteration beside the bare calls of its networks.

    python -m benchmarks.step [CASE ...] --output outputs/step

Every case is `lightning fit` on a recipe, with a cache, in a process of its own. After each batch the network calls
that it made are made again, bare: the same network, weights and inputs, forward and, where there was a gradient,
backward, and nothing else. So batches and bare calls alternate. A batch counts from the end of one such replay to the
beginning of the next: data, hooks, losses, optimizer, logs and all. `toy` is the toy teacher; the others have the width
of the published networks and two blocks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from diffusers import CogVideoXTransformer3DModel, WanTransformer3DModel
from lightning.pytorch.callbacks import Callback
from tqdm import tqdm

from benchmarks.report import report
from lightning_dfd.cli import main as cli
from lightning_dfd.data import write_video
from lightning_dfd.diffusion.draws import Draws
from lightning_dfd.diffusion.noise import NoiseSchedule
from lightning_dfd.testing.tiny import TEXT_LENGTH, TINY
from lightning_dfd.toy.world import draw_clips

ROOT = Path(__file__).parent.parent
PARTS = ("forward", "backward", "optimizer", "roles", "noise", "data", "logging")


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Stopwatch(Callback):
    """Times batches, their parts, and their network calls made again.

    Args:
        output: JSON file to write: for every measured batch its role, seconds, bare seconds and seconds of parts.
        warm_up: batches that are not measured.
    """

    def __init__(self, output: str, warm_up: int) -> None:
        self.output, self.warm_up = Path(output), warm_up
        self.batches: list[dict[str, Any]] = []
        self.calls: list[tuple[Any, bool, Any, Any]] = []
        self.parts: dict[str, float] = defaultdict(float)
        self.recording = True

    # ---- what is watched ------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        network = pl_module.network.base
        network.register_forward_pre_hook(self._begin_call, with_kwargs=True)
        network.register_forward_hook(self._end_call)
        self.roles = pl_module.network
        self._watch(pl_module, "manual_backward", "backward")
        self._watch(pl_module.optimization, "step", "optimizer")
        self._watch(pl_module.journal, "numbers", "logging")
        self._watch(pl_module, "encode", "data")
        self._watch(self.roles, "_switch", "roles")
        for owner, name in ((Draws, "noise_like"), (Draws, "times"), (NoiseSchedule, "add_noise")):
            self._watch(owner, name, "noise")
        self.ended = now()

    def _watch(self, owner: Any, name: str, part: str) -> None:
        original = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self.parts[part] += time.perf_counter() - start

        patch.object(owner, name, timed).start()

    def _begin_call(self, network: Any, args: Any, kwargs: Any) -> None:
        if self.recording:
            self.calls.append((self.roles._live, torch.is_grad_enabled(), args, kwargs))
            self.began_call = time.perf_counter()

    def _end_call(self, network: Any, args: Any, output: Any) -> None:
        if self.recording:
            self.parts["forward"] += time.perf_counter() - self.began_call

    # ---- batches --------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.parts["data"] += time.perf_counter() - self.ended
        self.role = pl_module.role_in_turn

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        seconds, parts = now() - self.ended, dict(self.parts)
        with self._aside(pl_module), trainer.precision_plugin.train_step_context():
            bare = sum(self._again(*call) for call in self.calls)
        if batch_idx >= self.warm_up:
            self.batches.append({"role": self.role, "seconds": seconds, "bare": bare, "parts": parts})
        self.calls.clear()
        self.parts.clear()
        self.ended = now()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.output.write_text(json.dumps(self.batches), encoding="utf-8")

    @contextmanager
    def _aside(self, pl_module: Any) -> Iterator[None]:
        """Keep the gradients as they are."""
        trained = [parameter for parameter in pl_module.parameters() if parameter.requires_grad]
        kept = [parameter.grad for parameter in trained]
        self.recording = False
        for parameter in trained:
            parameter.grad = None
        try:
            yield
        finally:
            self.recording = True
            for parameter, gradient in zip(trained, kept, strict=True):
                parameter.grad = gradient

    def _again(self, role: Any, grad: bool, args: Any, kwargs: Any) -> float:
        """Seconds of one network call."""
        with self.roles.act_as(role) as network, torch.set_grad_enabled(grad):
            start = now()
            output = network(*args, **kwargs)
            output = output[0] if isinstance(output, tuple) else output.sample
            if grad:
                output.backward(torch.ones_like(output))
            return now() - start


# ---- cases ------------------------------------------------------------------------------------------------------


def wan(folder: Path) -> None:
    transformer = WanTransformer3DModel(
        num_attention_heads=12, attention_head_dim=128, in_channels=4, out_channels=4, text_dim=32, freq_dim=256,
        ffn_dim=8960, num_layers=2, rope_max_seq_len=64,
    )  # fmt: skip
    save(folder, "wan", transformer)


def cogvideox(folder: Path) -> None:
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=30, attention_head_dim=64, num_layers=2, in_channels=4, out_channels=4, text_embed_dim=32,
        sample_height=20, sample_width=20, sample_frames=17, max_text_seq_length=TEXT_LENGTH,
    )  # fmt: skip
    save(folder, "cogvideox", transformer)


def save(folder: Path, family: str, transformer: torch.nn.Module) -> None:
    pipe = TINY[family].build()
    pipe.register_modules(transformer=transformer)
    pipe.save_pretrained(folder)


LARGE = {
    "model.max_sequence_length": TEXT_LENGTH, "model.dtype": "float32", "trainer.precision": "32-true",
    "model.accumulate": 1, "data.frames": 17, "data.height": 160, "data.width": 160, "data.fps": 8,
    "data.batch_size": 1, "data.num_workers": 0, "trainer.accelerator": "cpu",
}  # fmt: skip
CASES: dict[str, tuple[str, Callable[[Path], None] | None, int, dict[str, Any]]] = {
    "toy": ("toy_dfd", None, 50, {}),
    "wan": ("wan_dfd", wan, 10, LARGE),
    "cogvideox": ("cogvideox_dfd", cogvideox, 10, LARGE),
}
WARM_UP = 5  # a multiple of the recipes' update ratio


def run(case: str, folder: Path) -> None:
    """In this process, which must be fresh."""
    recipe, build, batches, settings = CASES[case]
    options = settings | {"data.folder": folder / "videos", "data.cache": folder / "cache", "model.init_from": "null"}
    if build is not None:
        build(folder / "teacher")
        options["model.teacher"] = folder / "teacher"
    scenes, clips = draw_clips(16, seed=0)
    (folder / "videos").mkdir()
    for number, (scene, clip) in enumerate(zip(scenes, clips, strict=True)):
        write_video(folder / "videos" / f"{number}.mp4", np.concatenate([clip, clip]), 8)
        (folder / "videos" / f"{number}.txt").write_text(scene.caption, encoding="utf-8")
    words = ["-c", str(ROOT / "recipes" / f"{recipe}.yaml")]
    words += [word for key, value in options.items() for word in (f"--{key}", str(value))]
    cli.main(["cache", *words])
    watch = {"class_path": "benchmarks.step.Stopwatch", "init_args": {"output": str(folder / "batches.json")}}
    watch["init_args"]["warm_up"] = WARM_UP  # type: ignore[index]
    words += ["--trainer.max_steps", str(WARM_UP + batches), "--trainer.callbacks", json.dumps([watch])]
    words += ["--trainer.default_root_dir", str(folder / "run"), "--trainer.enable_progress_bar", "false"]
    cli.main(["fit", *words])


def row(case: str, batches: list[dict[str, Any]]) -> dict[str, Any]:
    """Ratios of sums over all measured batches, and where the time goes, in per cent of the bare calls'."""
    bare = sum(batch["bare"] for batch in batches)
    found: dict[str, Any] = {"case": case, "batches": len(batches)}
    found["batch / bare"] = sum(batch["seconds"] for batch in batches) / bare
    found["median"] = statistics.median(batch["seconds"] / batch["bare"] for batch in batches)
    for role in ("student", "fake"):
        own = [batch for batch in batches if batch["role"] == role]
        found[role] = sum(batch["seconds"] for batch in own) / sum(batch["bare"] for batch in own)
    parts = {part: sum(batch["parts"].get(part, 0.0) for batch in batches) for part in PARTS}
    parts["other"] = sum(batch["seconds"] for batch in batches) - sum(parts.values())
    found |= {f"{part} %": 100 * value / bare for part, value in parts.items()}
    found["bare s a batch"] = bare / len(batches)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all by default")
    parser.add_argument("--output", default="outputs/step", help="folder for step.json")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # what the processes are started with
    args = parser.parse_args()
    if args.folder:
        run(args.cases[0], args.folder)
        return
    rows = []
    for case in tqdm(args.cases or CASES, desc="step"):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "benchmarks.step", case, "--folder", folder]
            subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append(row(case, json.loads((Path(folder) / "batches.json").read_text(encoding="utf-8"))))
    report("step", rows, args.output)


if __name__ == "__main__":
    main()
