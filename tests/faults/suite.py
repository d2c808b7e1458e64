"""Bad inputs and faults, one after the other, against the package's own code: `make faults`.

    python -m tests.faults.suite --seeds 4 --output outputs/faults

Every trial ends in one of four ways:

    named      a line told which file or part it was and why; with a bad file, the good ones were used
    survived   the work went on, and what came out was right
    undetected a damaged video decoded to other pixels without a sign, as its damage left a legal stream
    lost       a bare traceback, a hang, a wrong result, a good file left out, or a bad one without a word

The last ends the program with exit code 1. Damage is allowed to be undetected for the few kinds that say so.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import hashlib
import json
import re
import shutil
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import torch
from tqdm import tqdm

from lightning_dfd.cli.errors import one_line_of
from lightning_dfd.data import LatentCache, VideoDataModule, list_clips, write_cache, write_video
from lightning_dfd.testing.tiny import save_tiny
from tests.faults import broken_videos, caches, folders, runs, unusual_videos
from tests.faults.folders import GOOD
from tests.faults.videos import CAPTION, FPS, SIZE, Expected, Maker, scene

Kind = Literal["named", "survived", "undetected", "lost"]
KINDS: tuple[Kind, ...] = ("named", "survived", "undetected", "lost")
SECONDS = 300  # after which a trial hangs
WORST = {kind: place for place, kind in enumerate(("survived", "named", "undetected", "lost"))}


@dataclass(frozen=True)
class Outcome:
    """How one trial ended, and what was said."""

    kind: Kind
    said: str = ""


@dataclass(frozen=True)
class Result:
    """One trial: group and name of the fault, its variant, and how it ended."""

    group: str
    name: str
    seed: int
    kind: Kind
    said: str


@dataclass(frozen=True)
class Fault:
    """A kind of trial; `attempt` gets its own empty folder and a generator that is seeded by the variant."""

    group: str
    name: str
    attempt: Callable[[Path, np.random.Generator], Outcome]

    def try_out(self, folder: Path, seed: int) -> Result:
        digest = hashlib.sha256(f"{self.group}/{self.name}/{seed}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
        folder.mkdir()
        try:
            with time_limit(SECONDS):
                outcome = self.attempt(folder, rng)
        except Exception as error:  # a trial that breaks is a loss, not the end of the others
            outcome = outcome_of(error)
        finally:
            shutil.rmtree(folder)
        return Result(self.group, self.name, seed, outcome.kind, outcome.said)


class Hang(BaseException):
    """Not an Exception, so that no handler of the tried code takes it for its own."""


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(*args: Any) -> None:
        raise Hang

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    faulthandler.dump_traceback_later(3 * seconds, exit=True)  # where no Python code runs any more
    try:
        yield
    except Hang:
        raise TimeoutError(f"still running after {seconds} s") from None
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def outcome_of(error: Exception, name: str = "") -> Outcome:
    """What the command line would make of an error: one line that names the file, or a traceback."""
    line = one_line_of(error)
    if line is None:
        return Outcome("lost", f"traceback: {type(error).__name__}: {error}"[:300])
    return Outcome("named" if name in line else "lost", line[:300])


@contextlib.contextmanager
def said() -> Iterator[list[str]]:
    """The warnings inside, as text."""
    lines: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield lines
        finally:
            lines += [str(warning.message) for warning in caught]


# ---- a bad file or line in a folder -----------------------------------------------------------------------------


class FolderTrials:
    """A folder with a good clip and something bad, read for training and encoded into a cache."""

    def __init__(self, backbone: Any) -> None:
        self.backbone = backbone

    def fault(self, group: str, name: str, make: Maker, captioned: bool) -> Fault:
        """`captioned`: whether the bad file's caption stands beside it, so that the file is all that is bad."""

        def attempt(folder: Path, rng: np.random.Generator) -> Outcome:
            root = folder / "videos"
            write_video(root / "good.mp4", scene(rng), FPS)
            (root / "good.txt").write_text(GOOD)
            if not captioned:
                write_video(root / "bad.mp4", scene(rng), FPS)
            expected = make(root, rng)
            if captioned:
                (root / Path(expected.name).with_suffix(".txt")).write_text(CAPTION)
            outcomes = [look(folder, expected) for look in (self.train, self.cache)]
            return max(outcomes, key=lambda outcome: WORST[outcome.kind])

        return Fault(group, name, attempt)

    def train(self, folder: Path, expected: Expected) -> Outcome:
        """Through VideoDataModule: two epochs of its stream."""
        with said() as lines:
            try:
                data = VideoDataModule(str(folder / "videos"), **runs.sizes(), fps=expected.fps)
                data.setup("fit")
                batches = list(islice(data.train_dataloader(), 2 * len(data.clips)))
            except Exception as error:
                return outcome_of(error, expected.name)
        videos = {batch.prompts[0]: ((batch.video[0] + 1) * 127.5).round() for batch in batches}
        return judge(expected, videos, lines)

    def cache(self, folder: Path, expected: Expected) -> Outcome:
        """Through `lightning cache`'s function."""
        try:
            listing = list_clips(folder / "videos")
            report = write_cache(self.backbone, listing.clips, folder / "cache", SIZE, expected.fps, batch_size=2)
            cache = LatentCache.open(folder / "cache")
            samples = [cache.load(index) for index in range(len(cache))]
        except Exception as error:
            return outcome_of(error, expected.name)
        problems = [str(problem) for problem in (*listing.problems, *report.problems)]
        return judge(expected, {sample.prompt: None for sample in samples}, problems)


def judge(expected: Expected, got: dict[str, torch.Tensor | None], lines: Sequence[str]) -> Outcome:
    """From the videos by their captions, and what was said, to how it ended."""
    if GOOD not in got:
        return Outcome("lost", f"the good clip was left out: {' | '.join(lines)}"[:300])
    others = [prompt for prompt in got if prompt != GOOD]
    named = next((line for line in lines if expected.name in line and "\n" not in line), None)
    if not others:
        if named is None:
            return Outcome("lost", f"left out without a word: {' | '.join(lines)}"[:300])
        if expected.usable:
            return Outcome("lost", f"a usable file was left out: {named}"[:300])
        return Outcome("named", named[:300])
    if expected.usable is False:
        return Outcome("lost", "it was used")
    if expected.caption is not None and others != [expected.caption]:
        return Outcome("lost", f"its caption became {others[0][:100]!r}")
    video = got[others[0]]
    if video is not None and expected.video is not None:
        gap = float((video - expected.video.float()).abs().mean(dim=(0, 2, 3)).max())
        if gap > expected.tolerance:
            return Outcome("undetected" if expected.undetectable else "lost", f"a frame is off by {gap:.1f} of 255")
    return Outcome("survived")


# ---- a damaged cache, and whole runs ----------------------------------------------------------------------------


def cache_fault(name: str, change: caches.Change, place: runs.Place) -> Fault:
    """Damage to a whole cache: training goes on with the rest, or one line says what to make again."""

    def attempt(folder: Path, rng: np.random.Generator) -> Outcome:
        shutil.copytree(place.cache, folder / "cache")
        message = change(folder / "cache", rng)
        with said() as lines:
            try:
                data = place.data(cache=str(folder / "cache"))
                data.require_teacher(place.module().backbone.identity())
                data.setup("fit")
                batches = list(islice(data.train_dataloader(), 3 * caches.COUNT))
            except Exception as error:
                return outcome_of(error, message)
        if not message:
            return Outcome("survived")
        if any(not bool(torch.isfinite(batch.latents).all()) for batch in batches):
            return Outcome("lost", "latents that are no numbers were used")
        named = next((line for line in lines if message in line), None)
        left = len({batch.prompts for batch in batches})
        if named is None or left != caches.COUNT - 1:
            return Outcome("lost", f"{left} clips were used, and this was said: {' | '.join(lines)}"[:300])
        return Outcome("named", named[:300])

    return Fault("cache", name, attempt)


def run_fault(name: str, trial: runs.Trial, place: runs.Place) -> Fault:
    def attempt(folder: Path, rng: np.random.Generator) -> Outcome:
        with said() as lines:
            went = trial(runs.Place(place.teacher, place.clips, place.cache, folder), rng)
        return Outcome("survived" if went == "went on" else "named", went if went != "went on" else " | ".join(lines))

    return Fault("run", name, attempt)


# ---- all of them ------------------------------------------------------------------------------------------------


def all_faults(root: Path) -> list[Fault]:
    """Every kind; what they share is made in `root`."""
    place = runs.make_place(root, save_tiny("wan", root / "teacher"))
    trials = FolderTrials(place.module().backbone)
    faults = [
        trials.fault("video", name, make, True)
        for name, make in {**broken_videos.BROKEN, **unusual_videos.UNUSUAL}.items()
    ]
    faults += [trials.fault("caption", name, make, False) for name, make in folders.CAPTIONS.items()]
    faults += [trials.fault("list", name, make, False) for name, make in folders.LISTS.items()]
    faults += [trials.fault("path", name, make, False) for name, make in folders.PATHS.items()]
    faults += [trials.fault("shard", name, make, False) for name, make in folders.SHARDS.items()]
    faults += [cache_fault(name, change, place) for name, change in caches.CHANGES.items()]
    return faults + [run_fault(name, trial, place) for name, trial in runs.TRIALS.items()]


def run_all(root: Path, seeds: int, only: str = "", progress: bool = True) -> list[Result]:
    """Every fault whose "group: name" matches the pattern `only`, each in `seeds` variants."""
    chosen = [fault for fault in all_faults(root) if re.search(only, f"{fault.group}: {fault.name}")]
    trials = [(fault, seed) for seed in range(seeds) for fault in chosen]
    results = []
    bar = tqdm(trials, desc="faults", disable=not progress)
    for number, (fault, seed) in enumerate(bar):
        bar.set_postfix_str(fault.name)
        results.append(fault.try_out(root / f"trial{number}", seed))
        if results[-1].kind == "lost":
            bar.write(f"LOST {fault.group}: {fault.name}, variant {seed}: {results[-1].said}")
    return results


def table(results: Sequence[Result]) -> str:
    """Counts by group, as Markdown."""
    rows = [f"| {' | '.join(('faults', 'tried', *KINDS))} |", "|---" + "|---:" * (1 + len(KINDS)) + "|"]
    groups = [*dict.fromkeys(result.group for result in results), "all"]
    for group in groups:
        kinds = Counter(result.kind for result in results if group in (result.group, "all"))
        rows.append(f"| {group} | {kinds.total()} | {' | '.join(str(kinds[kind]) for kind in KINDS)} |")
    return "\n".join(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4, help="variants of every fault")
    parser.add_argument("--only", default="", help="pattern of 'group: name'")
    parser.add_argument("--output", type=Path, default=Path("outputs/faults"), help="folder for the results")
    options = parser.parse_args(arguments)
    av.logging.set_level(None)
    with tempfile.TemporaryDirectory() as root:
        results = run_all(Path(root), options.seeds, options.only)
    options.output.mkdir(parents=True, exist_ok=True)
    text = table(results)
    (options.output / "faults.json").write_text(json.dumps([asdict(one) for one in results], indent=1))
    (options.output / "faults.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    return int(any(result.kind == "lost" for result in results))


if __name__ == "__main__":
    sys.exit(main())
