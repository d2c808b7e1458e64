"""Two processes that train together, by DDP and by FSDP2, against one with twice the batch; their checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_dfd import DistillationModule
from lightning_dfd.runs.checkpoints import OURS, STATE, CheckpointFiles, newest_whole, read_checkpoint
from lightning_dfd.testing.tiny import TEXT_LENGTH
from lightning_dfd.training.checks import check_sharding
from lightning_dfd.training.settings import GANSettings, StudentSettings
from tests.faults.kills import differences
from tests.processes import as_two_ranks, fit_all
from tests.test_resume import content, full_disk
from tests.together import in_two_processes

pytestmark = pytest.mark.slow(seconds=5)

TOLERANCE = 1e-5
GOES_ON = [
    ("ddp", "fsdp2"), ("fsdp2", "fsdp2"), ("fsdp2 in shards", "fsdp2 in shards"), ("fsdp2 in shards", "ddp"),
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tiny: dict[str, Path], videos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Runs of two processes, by name, each in a folder of its own."""
    folder = tmp_path_factory.mktemp("processes")
    common = {"teacher": str(tiny["wan"]), "videos": str(videos), "steps": 4, "batch_size": 1}

    def run(name: str, **options: Any) -> dict[str, Any]:
        return common | options | {"root": str(folder / name)}

    found = {
        f"{mode} {strategy}": run(f"{mode} {strategy}", mode=mode, strategy=strategy)
        for mode, strategy in (*product(["lora", "full"], ["ddp", "fsdp2"]), ("full", "fsdp2 in shards"))
    }
    for first, second in GOES_ON:
        resume = str(folder / f"full {first}" / "step_2.ckpt")
        found[f"{first}, {second}"] = run(f"{first}, {second}", mode="full", strategy=second, resume=resume)
    student = str(folder / "full ddp" / "step_4.ckpt")
    found["from a student"] = run("from a student", mode="full", strategy="fsdp2", init_from=student, steps=2)
    in_two_processes(fit_all, list(found.values()))
    return found


def end_of(run: Mapping[str, Any], step: int = 4) -> dict[str, Any]:
    """What a run's checkpoint holds, without what depends on paths."""
    checkpoint = read_checkpoint(Path(run["root"]) / f"step_{step}.ckpt")
    checkpoint[OURS] = {key: checkpoint[OURS][key] for key in ("counts", "recipe", "facts")}
    return {key: checkpoint[key] for key in ("global_step", "state_dict", "optimizer_states", OURS)}


def distance(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """The largest difference of a weight or moment."""
    pairs = [(one["state_dict"][name], other["state_dict"][name]) for name in one["state_dict"]]
    for a, b in zip(one["optimizer_states"], other["optimizer_states"], strict=True):
        assert a["state"].keys() == b["state"].keys()
        pairs += [(a["state"][index][key], b["state"][index][key]) for index in a["state"] for key in a["state"][index]]
    return max(float((a.float() - b.float()).abs().max()) for a, b in pairs)


@pytest.fixture(scope="module", params=["lora", "full"])
def one_process(
    request: pytest.FixtureRequest, runs: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """One process with twice the batch."""
    root = str(tmp_path_factory.mktemp("one_process"))
    as_two_ranks(**(runs[f"{request.param} ddp"] | {"root": root, "strategy": "single"}))
    return end_of({"root": root}) | {"mode": request.param}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_train_what_one_does(
    runs: dict[str, dict[str, Any]], one_process: dict[str, Any], strategy: str
) -> None:
    run = runs[f"{one_process['mode']} {strategy}"]
    two, begun = end_of(run), end_of(run, step=2)
    assert two["state_dict"].keys() == one_process["state_dict"].keys()
    assert not any("teacher" in name or "base_layer" in name for name in two["state_dict"])
    assert distance(two, one_process) < TOLERANCE
    assert distance(two, begun) > 100 * TOLERANCE  # or nothing was trained


def test_shards_hold_what_one_file_holds(runs: dict[str, dict[str, Any]]) -> None:
    assert [*differences(end_of(runs["full fsdp2"]), end_of(runs["full fsdp2 in shards"]))] == []
    folder = Path(runs["full fsdp2 in shards"]["root"]) / "step_4.ckpt"
    kinds = sorted(path.suffix for path in folder.rglob("*") if path.is_file())
    assert kinds == [".ckpt", ".safetensors", ".safetensors"]


@pytest.mark.parametrize(("first", "second"), GOES_ON)
def test_any_strategy_goes_on(runs: dict[str, dict[str, Any]], first: str, second: str) -> None:
    """Bit-equal if it shards as before; else as near as strategies are to each other that never stopped."""
    resumed, whole = end_of(runs[f"{first}, {second}"]), end_of(runs[f"full {first}"])
    assert [*differences(resumed[OURS], whole[OURS])] == []
    if first == second:
        assert [*differences(resumed, whole)] == []
    assert distance(resumed, whole) < TOLERANCE


def test_sharded_networks_start_from_a_student(runs: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    run = runs["from a student"]
    as_two_ranks(**(run | {"root": str(tmp_path), "strategy": "single"}))
    assert distance(end_of(run, 2), end_of({"root": tmp_path}, 2)) < TOLERANCE
    assert distance(end_of(run, 2), end_of(runs["full fsdp2"], 2)) > 100 * TOLERANCE


def test_one_process_goes_on_where_two_stopped(runs: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """From a folder that two processes wrote, with twice the batch."""
    run = runs["full fsdp2 in shards"]
    resume = str(Path(run["root"]) / "step_2.ckpt")
    with pytest.warns(UserWarning, match="number of processes is 2 there and 1 here; data.batch_size is 1 there"):
        as_two_ranks(**(run | {"root": str(tmp_path), "strategy": "single", "resume": resume}))
    assert distance(end_of({"root": tmp_path}), end_of(run)) < TOLERANCE


# ---- folders --------------------------------------------------------------------------------------------------


def test_weights_are_taken_from_a_folder_as_from_a_file(runs: dict[str, dict[str, Any]], tiny: dict[str, Path]) -> None:
    states = []
    for name in ("full fsdp2", "full fsdp2 in shards"):
        student = StudentSettings(mode="full", ema_decay=0.9)
        module = DistillationModule(
            str(tiny["wan"]), student=student, gan=GANSettings(weight=0.03), max_sequence_length=TEXT_LENGTH,
            init_from=str(Path(runs[name]["root"]) / "step_4.ckpt"),
        )  # fmt: skip
        module.configure_model()
        states.append({key: module.state_dict()[key] for key in module.owned_keys()})
    assert [*differences(*states)] == []
    assert [*differences(states[0], end_of(runs["full fsdp2"])["state_dict"])] == []


def test_a_folder_that_lacks_rows_is_passed_over(runs: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    root = Path(runs["full fsdp2 in shards"]["root"])
    for step in (2, 4):
        shutil.copytree(root / f"step_{step}.ckpt", tmp_path / f"step_{step}.ckpt")
    (tmp_path / "step_2.ckpt" / "iteration_9").mkdir()  # of a save that was killed
    missing = next((tmp_path / "step_4.ckpt").rglob("*.safetensors"))
    missing.unlink()
    with pytest.warns(UserWarning, match=rf"step_4.ckpt is damaged.*{missing.name} is missing or not of \d+ bytes"):
        assert newest_whole(tmp_path.glob("*.ckpt")) == tmp_path / "step_2.ckpt"
    with pytest.raises(ValueError, match=r"step_4\.ckpt is damaged"):
        read_checkpoint(tmp_path / "step_4.ckpt")


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_a_full_disk_leaves_the_last_good_folder(tmp_path: Path) -> None:
    files, last = CheckpointFiles(), tmp_path / "last.ckpt"
    files.save_shards(content(1), last)
    with full_disk(), pytest.warns(UserWarning, match=r"last\.ckpt COULD NOT BE WRITTEN \(.*File too large"):
        files.save_shards(content(2), last)
    assert files.failed == {2}
    assert read_checkpoint(last)["global_step"] == 1
    assert torch.equal(read_checkpoint(last)["state_dict"]["b"], content(1)["state_dict"]["b"])
    files.save_shards(content(3), last)
    assert files.failed == set()
    assert sorted(path.name for path in last.iterdir()) == [STATE, "iteration_3"]


@pytest.mark.usefixtures("one_rank")
def test_a_checkpoint_of_the_other_kind_is_set_aside(tmp_path: Path) -> None:
    files, last = CheckpointFiles(), tmp_path / "last.ckpt"
    for step, save in enumerate((files.save_checkpoint, files.save_shards, files.save_checkpoint)):
        save(content(step), last)
        assert read_checkpoint(last)["global_step"] == step
        if step:
            assert read_checkpoint(tmp_path / "last-before.ckpt")["global_step"] == step - 1


def test_sharding_refuses_what_it_cannot_spread(tiny: dict[str, Path]) -> None:
    module = DistillationModule(
        str(tiny["wan"]), student=StudentSettings(mode="full"), offload=True, max_sequence_length=TEXT_LENGTH
    )
    with pytest.raises(ValueError, match=r"fsdp2 shards neither quantized weights nor .* model\.offload: false"):
        check_sharding(module.student, module.backbone)
