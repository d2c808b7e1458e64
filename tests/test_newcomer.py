"""A newcomer's walk: README and docs to the letter, in the order given, from a fresh install without the dev extra.

All commands and code of the pages run in one folder with a tiny teacher on a CPU. The tables below say what is run in
another way than it stands there, and what is not run at all; each entry gives its reason. What is in no table is run as
it stands, and has to end well.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from lightning_dfd.data import read_video, write_video
from lightning_dfd.types import VideoSize
from tests.test_docs import PAGES, ROOT, page_named

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LIMIT = 600  # seconds for one command
TORCH = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))

# ---- the tables -----------------------------------------------------------------------------------------------

# What stands in a shell block -> what is run, and why.
COMMANDS = [
    ("python -m venv", f"{sys.base_prefix}/bin/python3 -m venv", "a machine may have python3 alone"),
    ("pip install torch", f"pip install -c constraints.txt {TORCH}", "the build that the tests use"),
    ("pip install -e .", "pip install -c constraints.txt ../clone", "what a wheel holds, and not the clone"),
    ("pip install -e '.[", "pip install -c constraints.txt 'lightning-dfd[", "the extra of what is installed"),
    ("recipes/evaluation.yaml", "recipes/evaluation_offline.yaml", "no hub here: what the page says to take then"),
    ("'[0, 1, 2, 3, 4, 5, 6, 7]'", "'[0, 1]'", "seconds"),
    ("--real my_videos", "--real my_videos --frames 9 --min_videos 8", "frames of tiny videos; as many as were made"),
    ("--trainer.max_steps 2000", "--trainer.max_steps 12", "more than the 10 of recipes/tiny.yaml"),
    ("--trainer.max_steps 3000", "--trainer.max_steps 14", "the same"),
    ("--trainer.max_steps 4000", "--trainer.max_steps 16", "the same"),
    ("outputs/fsdp2 --trainer.devices 8", "outputs/fsdp2 --trainer.devices 1", "test_processes.py runs it on 2"),
    ("outputs/wan_ddp --trainer.devices 8", "outputs/wan_ddp --trainer.devices 1", "the README's on 2"),
    ("outputs/wan_fsdp2 --trainer.devices 8", "outputs/wan_fsdp2 --trainer.devices 1", "as the README's"),
    ("--trainer.devices 8", "--trainer.devices 2", "two cores"),
    ("--data.val_share 0.02", "--data.val_share 0.4", "of 8 clips, 3"),
    ("--nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint $HOST:29500", "--standalone --nproc-per-node 2",
     "one machine"),
    ("--trainer.num_nodes 2 ", "", "the same"),
    ("--clips 480", "--clips 24", "seconds"),
    ("--output outputs/teacher",
     "--output outputs/teacher --vae-steps 2 --decoder-steps 1 --steps 2 --clips 8 --judge 24", "an hour"),
]  # fmt: skip

# Beginning of a command, or of a block of another language -> why it is not run.
LEFT_OUT = {
    "make ": "targets of their own, of minutes; that they exist is tested below",
    "hf download": "no hub here; that the program is there is tested below",
    "srun": "needs SLURM; the line above it starts the same by torchrun",
    "pip install -e '.[bitsandbytes]'": "needs a GPU",
    "lightning fit -c recipes/cogvideox_dmd2.yaml -c quantized.yaml": "needs a GPU",
    "pip install decord": "for the benchmark below it",
    "python -m benchmarks.data": "measures for minutes",
    "python -m benchmarks.fvd": "measures for minutes",
    "python -m tests.faults.kills": "kills for minutes; make kills",
    "python -m benchmarks.memory": "measures for minutes",
    "python -m benchmarks.plan": "measures for minutes",
    "python -m lightning_dfd.toy.mixture": "runs for an hour; test_mixture.py runs every arm",
    "python -m lightning_dfd.toy.judge_teacher": "ten minutes; test_toy.py judges fewer clips",
    "python -m benchmarks.scaling": "plans for minutes",
    "python -m benchmarks.step": "measures for minutes",
    "lightning plan -c recipes/wan_14b_dmd2.yaml": "plans 14B: minutes",
    "from peft import": "for pipelines that cannot load adapters; test_contract.py loads them so",
}

# What stands in Python or YAML -> what is run.
CODE = [
    ("zai-org/CogVideoX-2b", "tiny"),
    ('.to("cuda")', ""),
    ("torch.bfloat16", "torch.float32"),
    ('"bfloat16"', '"float32"'),
    ('precision="bf16-mixed"', 'precision="32-true", accelerator="cpu", enable_progress_bar=False'),
    ("rank=64", "rank=4"),
    ("accumulate=8", "accumulate=1"),
    ("max_steps=1000", "max_steps=10"),
    ("max_steps=100,", "max_steps=5,"),
    ("num_frames=49, height=480, width=720", "num_frames=9, height=32, width=32, max_sequence_length=16"),
    ('"my_videos", frames=49, height=480, width=720', '"my_videos", frames=9, height=32, width=32'),
    ("[[81, 480, 832], [81, 832, 480], [49, 624, 624]]", "[[9, 32, 48], [9, 48, 32], [5, 32, 32]]"),
]

# In the folder's copies of the recipes: fewer videos and iterations.
FEWER = {
    "evaluation_offline.yaml": [
        ("prompts: 16", "prompts: 1"),
        ("seeds: 8", "seeds: 2\n        min_videos: 2\n        teacher_steps: 2"),
        ("real_clips: 2048", "real_clips: 2"),
        ("prompts: 4, seeds: [0, 1]", "prompts: 1, seeds: [0], teacher_steps: 2"),
    ],
    "toy_evaluation.yaml": [
        ("prompts: 12", "prompts: 2"),
        ("seeds: 8", "seeds: 2\n        min_videos: 2\n        teacher_steps: 2"),
        ("prompts: 4, seeds: [0, 1]", "prompts: 1, seeds: [0], teacher_steps: 2"),
    ],
    "toy_dfd.yaml": [
        ("max_steps: 1200", "max_steps: 6"),
        ("prompts: 12", "prompts: 2"),
        ("seeds: 8", "seeds: 2\n        min_videos: 2\n        teacher_steps: 2"),
        ("prompts: 4, seeds: [0, 1]", "prompts: 1, seeds: [0], teacher_steps: 2"),
    ],
    "toy_dmd2.yaml": [("max_steps: 800", "max_steps: 6"), ("batch_size: 8", "batch_size: 4")],
    "data_forcing.yaml": [("max_steps: 100", "max_steps: 6")],
}

# How the first recipe of a command begins -> the folder of its tiny teacher; None for the toy's own.
TEACHERS = {
    "recipes/cogvideox_i2v": "tiny_i2v",
    "recipes/cogvideox": "tiny",
    "recipes/wan": "tiny_wan",
    "my_run.yaml": "tiny_wan",
    "buckets.yaml": "tiny_wan",
    "recipes/toy": None,
}

# Page -> what its text promises, and the files that then have to be there.
PROMISES = {
    "README.md": [
        ("Training from a cache", "my_cache/cache.json"),
        ("The first run writes to `outputs/cogvideox_dmd2`", "outputs/cogvideox_dmd2/checkpoints/last.ckpt"),
        ("writes to\n`outputs/cogvideox_dfd`", "outputs/cogvideox_dfd/checkpoints/last.ckpt"),
        ("the `config.yaml` beside its checkpoints", "outputs/cogvideox_dfd/checkpoints/config.yaml"),
        ("`metrics.csv` in `outputs/cogvideox_dmd2/metrics`", "outputs/cogvideox_dmd2/metrics/*/metrics.csv"),
        ("Each writes mp4 files", "outputs/samples_dfd/0003.mp4"),
        ("a playing `grid.mp4`", "outputs/samples_teacher/grid.mp4"),
        ("a contact sheet", "outputs/samples_teacher/contact.png"),
        ("`samples.json`", "outputs/samples_dfd/samples.json"),
        ("a whole pipeline", "student/model_index.json"),
        ("a LoRA file with its scheduler", "student_lora/pytorch_lora_weights.safetensors"),
        ("a LoRA file with its scheduler", "student_lora/scheduler/scheduler_config.json"),
        ('export_to_video(video, "dog.mp4"', "dog.mp4"),
        ("their videos side by side", "outputs/watched/samples/*.mp4"),
        ("and on a page", "outputs/evaluation/index.html"),
        ("one image or video file for each prompt", "outputs/samples_i2v/0000.mp4"),
    ],
    "metrics.md": [("writes `evaluation.json`", "outputs/evaluation/evaluation.json")],
    "toy.md": [
        ("`metadata.jsonl` also", "outputs/toy_data/metadata.jsonl"),
        ("trains it on one CPU thread", "outputs/teacher/model_index.json"),
        ("lightning export", "outputs/toy_student/model_index.json"),
    ],
}


# ---- reading the pages ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One thing to do: `kind` is sh (a command), python or yaml (a block)."""

    page: str
    kind: str
    text: str
    before: str  # the text above its block

    @property
    def reason(self) -> str | None:
        """Why it is left out."""
        return next((why for beginning, why in LEFT_OUT.items() if self.text.startswith(beginning)), None)

    @property
    def file(self) -> str | None:
        """The name of the file that the block is, by its first line."""
        named = re.match(r"# (\w+\.(?:py|yaml))\n", self.text)
        return named.group(1) if named else None


def steps_of(page: Path) -> Iterator[Step]:
    text, end = page.read_text(encoding="utf-8"), 0
    for block in BLOCK.finditer(text):
        kind, content = block.groups()
        before, end = text[end : block.start()], block.end()
        if kind != "sh":
            yield Step(page.name, kind, content, before)
            continue
        for line in content.replace("\\\n", " ").splitlines():
            command = " ".join(line.split())
            if command and not command.startswith("#"):
                yield Step(page.name, kind, command, before)


def pages_in_order() -> list[Path]:
    """The README, and the pages as it lists them."""
    listed = re.findall(r"^\| \[docs/(\w+\.md)\]", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    return [page_named(name) for name in ("README.md", *listed)]


STEPS = [step for page in pages_in_order() for step in steps_of(page)]


def replaced(text: str, table: list[tuple[str, str]]) -> str:
    for old, new in table:
        text = text.replace(old, new)
    return text


def with_tiny(words: list[str]) -> list[str]:
    """The words of a `lightning` command with what the README adds to try it on a CPU, before what the page sets."""
    places = [number for number, word in enumerate(words) if word == "-c"]
    if not places:
        return words
    recipe = words[places[0] + 1]
    name = next(tiny for beginning, tiny in TEACHERS.items() if recipe.startswith(beginning))
    if name is None:
        return words
    other = [] if name == "tiny" else ["--model.teacher", name]
    at = places[-1] + 2
    return [*words[:at], "-c", "recipes/tiny.yaml", *other, *words[at:]]


# ---- walking --------------------------------------------------------------------------------------------------


@dataclass
class Walk:
    """What was done so far in the folder `here`, whose fresh environment is `.venv`."""

    here: Path
    failures: list[str] = field(default_factory=list)
    seconds: list[tuple[float, str]] = field(default_factory=list)
    done: set[str] = field(default_factory=set)
    process: subprocess.Popen[str] | None = None

    def take(self, step: Step) -> None:
        """Do a step, or say why not."""
        if step.reason is not None:
            return
        if step.text in self.done and "README's command" in step.before:
            return
        began = time.perf_counter()
        log = self.here.parent / "logs" / f"{len(self.seconds):03d}.txt"
        status = self._carry_out(step, log)
        self.done.add(step.text)
        first = step.text.splitlines()[0]
        self.seconds.append((time.perf_counter() - began, f"{step.page}: {first}"))
        if status:
            said = log.read_text(encoding="utf-8", errors="replace")[-1500:] if log.exists() else ""
            self.failures.append(f"{step.page}: {step.text[:300]}\n-> {status}\n{said}")

    def _carry_out(self, step: Step, log: Path) -> int:
        if step.kind == "sh":
            return self._command(step, log)
        code = replaced(step.text, CODE)
        if step.file is not None:
            (self.here / step.file).write_text(code, encoding="utf-8")
            code = f"import {Path(step.file).stem}"
        if step.kind == "yaml" and step.file is None:  # a part of a recipe
            (self.here / "part.yaml").write_text(code, encoding="utf-8")
            words = ["fit", "-c", "recipes/cogvideox_dmd2.yaml", "-c", "part.yaml", "--print_config"]
            return self._ask(log, kind="lightning", words=words)
        if step.kind in ("yaml", "") or (step.file or "").startswith("test_"):
            return 0
        return self._ask(log, kind="code", code=code, page=step.page)

    def _command(self, step: Step, log: Path) -> int:
        line = replaced(step.text, [(old, new) for old, new, _ in COMMANDS])
        words = shlex.split(line, comments=True)
        if "lightning" in words or "lightning_dfd" in words:
            words = with_tiny(words)
        first = not any(text.startswith("lightning") for text in self.done)
        if words[0] == "lightning" and not first and "--trainer.devices 2" not in line:  # else the program itself
            return self._ask(log, kind="lightning", words=words[1:])
        if words[:2] == ["python", "-m"] and words[2] != "venv":
            return self._ask(log, kind="module", words=words[2:])
        if words[0] == "pip":
            self.end()  # what was started before an installation does not see it
        command = line if "&&" in line else shlex.join(words)
        with log.open("w") as file:
            done = subprocess.run(
                ["bash", "-c", command], cwd=self.here, env=self._environment(), stdout=file, stderr=file, timeout=LIMIT
            )
        return done.returncode

    def _environment(self) -> dict[str, str]:
        """The user's, with nothing of the developer's environment on the path."""
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        venv = self.here / ".venv"
        own = {"PATH": f"{venv}/bin:/usr/local/bin:/usr/bin:/bin", "VIRTUAL_ENV": str(venv)}
        # pip would compile 15,000 files, of which the walk imports a few
        return kept | own | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PIP_NO_COMPILE": "1"}

    def _ask(self, log: Path, **request: object) -> int:
        """Have it done by the process that serves all such steps."""
        if self.process is None:
            program = [str(self.here / ".venv/bin/python"), str(Path(__file__).parent / "one_process.py")]
            self.process = subprocess.Popen(
                program, cwd=self.here, env=self._environment(), text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("a"),
            )  # fmt: skip
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        watchdog = threading.Timer(LIMIT, self.process.kill)
        watchdog.start()
        print(json.dumps(request | {"log": str(log)}), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        watchdog.cancel()
        if not answer:
            self.end()
        return int(answer or 1)

    def end(self) -> None:
        if self.process is not None:
            assert self.process.stdin is not None
            self.process.stdin.close()
            self.process.wait()
            self.process = None

    def follow_cards(self, *exports: str) -> None:
        """Run the code of exports' own READMEs as it stands there; it may need nothing of this package."""
        for export in exports:
            card = self.here / export / "README.md"
            steps = list(steps_of(card)) if card.is_file() else []
            if len(steps) != 1 or "import lightning_dfd" in steps[0].text:
                self.failures.append(f"{export}/README.md should hold one block, of stock diffusers: {steps}")
            for step in steps:
                self.take(replace(step, page=f"{export}/README.md"))

    def keep_promises(self, page: str) -> None:
        text = page_named(page).read_text(encoding="utf-8")
        for promise, pattern in PROMISES.get(page, []):
            if promise not in text:
                self.failures.append(f"{page} no longer says {promise!r}")
            elif not list(self.here.glob(pattern)):
                self.failures.append(f"{page} says {promise!r}, but there is no {pattern}")


@pytest.fixture
def here(tmp_path: Path, real_videos: Path) -> Path:
    """What a reader has: the repository, a folder of captioned videos, and an image.

    The sources are elsewhere, in `clone`, so that what runs is what was installed.
    """
    here, clone = tmp_path / "here", tmp_path / "clone"
    (tmp_path / "logs").mkdir()
    leave = shutil.ignore_patterns(".*", "__pycache__", "build", "*.egg-info", "outputs", "tests")
    shutil.copytree(ROOT, clone, ignore=leave)
    here.mkdir()
    for name in ("benchmarks", "recipes", "lightning_dfd/toy/teacher"):
        shutil.copytree(clone / name, here / name)
    shutil.copy(clone / "constraints.txt", here)
    for name, table in FEWER.items():
        recipe = here / "recipes" / name
        text = recipe.read_text(encoding="utf-8")
        assert all(text.count(old) == 1 for old, _ in table), name
        recipe.write_text(replaced(text, table), encoding="utf-8")
    write_my_videos(here, real_videos)
    return here


def write_my_videos(here: Path, real_videos: Path) -> None:
    """8 real clips of 2 seconds with 4 captions, two of each, and dog.png."""
    (here / "my_videos/a").mkdir(parents=True)
    captions = {
        "bikes": "people ride bikes",
        "bigbuckbunny": "a rabbit wakes up",
        "carphone_pristine": "a man in a car",
        "carphone_distorted": "a man talks",
    }
    lines = []
    for name, caption in captions.items():
        frames = read_video(real_videos / f"{name}.mp4", VideoSize(96, 48, 64), None).permute(1, 2, 3, 0)
        Image.fromarray(frames[0].numpy()).save(here / "dog.png")
        for number, part in enumerate(frames.split(48)):
            file = f"a/{name}_{number}.mp4"
            write_video(here / "my_videos" / file, part, 24)
            lines.append(json.dumps({"file_name": file, "text": caption}))
    (here / "my_videos/metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")


@pytest.mark.slow(seconds=400)
def test_a_newcomer_gets_there(here: Path) -> None:
    torch.set_num_threads(1)
    walk = Walk(here)
    for page in pages_in_order():
        for step in steps_of(page):
            walk.take(step)
        if page.name == "README.md":
            walk.follow_cards("student", "student_lora")
        walk.keep_promises(page.name)
    walk.end()
    print("\n".join(f"{seconds:6.1f} {what[:150]}" for seconds, what in walk.seconds))
    print(f"{sum(seconds for seconds, _ in walk.seconds):6.1f} in all")
    missing = [name for name in ("hf", "tensorboard", "lightning-dfd") if not (here / ".venv/bin" / name).exists()]
    assert not missing
    assert not walk.failures, "\n\n".join(walk.failures)
    shutil.rmtree(here / ".venv")  # 1.5 GB, of use only to see what failed


# ---- the tables and the pages agree ---------------------------------------------------------------------------


def test_every_page_is_walked() -> None:
    assert sorted(pages_in_order()) == sorted(PAGES)


def test_no_entry_of_the_tables_is_stale() -> None:
    commands = [step.text for step in STEPS if step.kind == "sh"]
    code = [step.text for step in STEPS if step.kind != "sh"]
    assert [old for old, _, _ in COMMANDS if not any(old in text for text in commands)] == []
    assert [old for old, _ in CODE if not any(old in text for text in code)] == []
    assert [old for old in LEFT_OUT if not any(text.startswith(old) for text in commands + code)] == []
    pages = {name: page_named(name).read_text(encoding="utf-8") for name in PROMISES}
    assert [promise for name, pairs in PROMISES.items() for promise, _ in pairs if promise not in pages[name]] == []


def test_every_block_is_run_or_left_out() -> None:
    """Blocks without a language are layouts of folders; a command takes YAML that has the name of a file, and other
    YAML is laid over a recipe."""
    kinds = {"sh", "python", "yaml", ""}
    assert [step.text for step in STEPS if step.kind not in kinds] == []
    for step in STEPS:
        if step.kind == "yaml" and step.file is not None:
            assert any(f"-c {step.file}" in other.text for other in STEPS), f"{step.page}: nothing takes {step.file}"


def test_targets_of_make_exist() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    named = set(re.findall(r"(?:^|`)make ([\w-]+)", text, re.MULTILINE))
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"demo", "test", "walk"} <= named
    assert named <= targets
