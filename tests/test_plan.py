"""`lightning plan`: its estimate against real training, and that it needs configs only."""

from __future__ import annotations

import gc
import importlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.plan import Case, allocator_peak, make_module, planned_peak
from lightning_dfd.backbones import Backbone, backbone_from_pretrained
from lightning_dfd.backbones.meta import meta_network
from lightning_dfd.cli import main as cli
from lightning_dfd.networks.quantization import Quantization
from lightning_dfd.plan import Advice, Estimate, Meter, Setup, advise, as_json, as_text, estimate
from lightning_dfd.plan.advice import _tiles
from lightning_dfd.plan.components import meta_encoders, size_of
from lightning_dfd.plan.estimate import measure_vae
from lightning_dfd.testing.tiny import TEXT_LENGTH, TINY
from lightning_dfd.training.module import DistillationModule
from lightning_dfd.training.settings import DiversitySettings, GANSettings, SamplingSettings, StudentSettings
from lightning_dfd.types import VideoSize

pytestmark = pytest.mark.slow(seconds=3)

ESTIMATE = importlib.import_module("lightning_dfd.plan.estimate")  # the package has a function of this name
RECIPES = Path(__file__).parent.parent / "recipes"


def case(family: str, precision: str = "32-true", **options: Any) -> Case:
    student = StudentSettings(rank=4, **options.pop("student", {}))
    dtype = "bfloat16" if precision == "bf16-mixed" else "float32"
    size = TINY[family].size
    size = VideoSize(size.frames, 2 * size.height, 2 * size.width)  # so that activations count
    return Case(family, student, size, 2, dtype, precision, TEXT_LENGTH, options)


def setup_of(tiny: dict[str, Path], planned: Case, cached: bool = True) -> Setup:
    module = make_module(planned, tiny[planned.family])
    return Setup(module, planned.size, planned.batch_size, cached, planned.precision, "cpu")


@pytest.fixture(scope="module", autouse=True)
def one_sample() -> Iterator[None]:
    """Decoding eight clips takes long, and is as one clip eight times; `test_clips_are_decoded_together` has three."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ESTIMATE, "SAMPLED", 1)
        yield


@pytest.fixture(scope="module")
def plain(tiny: dict[str, Path]) -> Estimate:
    return estimate(setup_of(tiny, case("wan"), cached=False))


# ---- against reality --------------------------------------------------------------------------------------------


@pytest.mark.slow(seconds=5)
@pytest.mark.parametrize(
    "planned",
    [
        case("cogvideox_5b", student={"gradient_checkpointing": True, "ema_decay": 0.9}, accumulate=2),
        case("cogvideox_5b", student={"mode": "full", "ema_decay": 0.9}),
        case("wan", "bf16-mixed"),
        case("wan", gan=GANSettings(weight=0.1, r1_weight=1.0)),
        case("hunyuan", student={"input": "rollout"}, diversity=DiversitySettings(weight=0.1)),
    ],
    ids=["lora-checkpointing-accumulate", "full", "bf16", "gan", "diversity"],
)
def test_estimate_is_within_15_percent_of_what_training_allocates(tiny: dict[str, Path], planned: Case) -> None:
    teacher = tiny[planned.family]
    estimated, measured = planned_peak(planned, teacher), allocator_peak(planned, teacher)
    assert 0.85 < estimated / measured < 1.15, f"{estimated} planned, {measured} measured"


@pytest.fixture(scope="session", params=list(TINY))
def each(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def backbone_of(tiny: dict[str, Path], name: str, dtype: torch.dtype = torch.float32) -> Backbone:
    trial = TINY[name]
    return backbone_from_pretrained(str(tiny[name]), dtype, trial.text_length, trial.backbone)


def plannable(name: str) -> bool:
    return TINY[name].backbone != "captured"


@pytest.mark.slow(seconds=1)
def test_what_is_built_from_configs_is_like_the_real_thing(tiny: dict[str, Path], each: str) -> None:
    """Shapes and precisions, in bfloat16, where families keep some layers in float32; nothing is loaded for it."""
    backbone, size = backbone_of(tiny, each, torch.bfloat16), TINY[each].size
    if not plannable(each):
        with pytest.raises(ValueError, match="reads nothing but configs"):
            backbone.dummy_prompts(1)
        return
    built = {"transformer": backbone.meta_transformer(), "vae": meta_network(backbone.configs.vae, backbone.dtype)}
    built |= meta_encoders(backbone) or {}
    conditioning = backbone.dummy_prompts(2) | backbone.dummy_images(2, size)
    assert not backbone.loader.loaded
    loaded = {"transformer": backbone.load_transformer(), "vae": backbone.loader.vae}
    loaded |= {name: getattr(backbone.loader.encoders, name) for name in backbone.configs.encoders}
    assert built.keys() == loaded.keys()
    for name, network in loaded.items():
        shapes = [{key: (p.shape, p.dtype) for key, p in n.named_parameters()} for n in (built[name], network)]
        assert shapes[0] == shapes[1], name
        assert all(parameter.is_meta for parameter in built[name].parameters())
        assert size_of(built[name]) == pytest.approx(size_of(network), rel=0.05)  # buffers
    real = backbone.encode_prompts(["a cat", "two dogs"])
    real |= backbone.encode_images(torch.zeros(2, 3, size.height, size.width), size.frames)
    for name, tensor in real.tensors.items():
        assert conditioning[name].shape[0] == tensor.shape[0], name
        assert conditioning[name].shape[1:] == tensor.shape[1:], name


@pytest.mark.slow(seconds=5)
def test_every_family_is_rehearsed(tiny: dict[str, Path], each: str) -> None:
    """Both updates, and the VAE's encoding and decoding, whose peaks are compared with real ones."""
    if not plannable(each):
        return
    trial = TINY[each]
    module = DistillationModule(
        str(tiny[each]),
        trial.backbone,
        max_sequence_length=trial.text_length,
        student=StudentSettings(rank=4, gradient_checkpointing=True),
        sampling=SamplingSettings(list(trial.steps)),
    )
    found = estimate(Setup(module, trial.size, 1, True, "bf16-mixed"))
    assert all(turn.peak > found.resident and turn.flops > 0 for turn in found.turns.values())
    backbone = backbone_of(tiny, each)
    backbone.loader.vae  # noqa: B018 (loaded before it is counted)
    with Meter() as meter:
        backbone.encode_videos(torch.zeros(1, 3, trial.size.frames, trial.size.height, trial.size.width))
    assert found.encoding == pytest.approx(meter.peak, rel=0.15)
    latents = torch.zeros(1, *backbone.latent_shape(trial.size))
    with Meter() as meter:
        backbone.decode_latents(latents)
    assert found.decoding == pytest.approx(meter.peak, rel=0.15)


def test_meter_counts_what_is_alive() -> None:
    with Meter() as meter:
        a = torch.zeros(100)
        b = a.view(10, 10) @ torch.ones(10, 10)
        assert (meter.live, meter.peak, meter.flops) == (800, 1200, 2000)
        del a, b
        gc.collect()
        assert meter.live == 0
        meter.restart()
        assert meter.peak == 0


# ---- what it says -----------------------------------------------------------------------------------------------


@pytest.mark.slow(seconds=8)
def test_terms_add_up_and_follow_the_recipe(tiny: dict[str, Path], plain: Estimate) -> None:
    assert sum(plain.terms.values()) == plain.peak == max(plain.peaks.values())
    assert plain.encoders == plain.vae + (plain.text or 0) > 0
    assert plain.weights["student"] == plain.weights["fake"]
    assert plain.states["student"] >= 2 * plain.weights["student"]  # AdamW's moments
    cached = estimate(setup_of(tiny, case("wan")))
    assert cached.encoders == 0
    assert cached.peaks["student update"] == plain.peaks["student update"] - plain.encoders
    assert plain.caching > 0
    kept = estimate(setup_of(tiny, case("wan", student={"gradient_checkpointing": True})))
    assert kept.peak < cached.peak
    assert kept.flops > cached.flops  # recomputation is work
    shape = setup_of(tiny, case("wan")).module.backbone.latent_shape(case("wan").size)
    assert plain.latents == 4 * torch.Size(shape).numel()


@pytest.mark.slow(seconds=8)
def test_quantization_and_offload_are_planned_without_their_libraries(tiny: dict[str, Path]) -> None:
    lora, full = case("wan"), case("wan", student={"mode": "full"})
    before = estimate(setup_of(tiny, lora))
    setup = setup_of(tiny, replace(lora, options={"quantization": Quantization("bitsandbytes", "nf4")}))
    after = estimate(setup)
    assert 0.1 * before.base < after.base < 0.6 * before.base
    assert before.peak - after.peak == before.base - after.base
    before, after = (estimate(setup_of(tiny, replace(full, options={"offload": on}), False)) for on in (False, True))
    assert after.encoders == 0
    assert after.peaks["student update"] < before.peaks["student update"]


def test_clips_are_decoded_together(tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, size = backbone_of(tiny, "wan"), TINY["wan"].size
    of_one = measure_vae(backbone, size, 1)[-1]
    monkeypatch.setattr(ESTIMATE, "SAMPLED", 3)
    assert measure_vae(backbone, size, 1)[-1] == pytest.approx(3 * of_one, rel=0.05)


@pytest.mark.slow(seconds=5)
def test_decoding_samples_counts_where_a_recipe_samples(tiny: dict[str, Path]) -> None:
    """Beside all that stays, with the VAE that a run on a cache loads for it alone; tiles are the advice."""
    small = case("cogvideox_5b", "bf16-mixed", student={"gradient_checkpointing": True})
    without = setup_of(tiny, replace(small, size=VideoSize(9, 128, 192)))
    setup = replace(without, samples=True)
    before, found = estimate(without), estimate(setup)
    assert "decoding of samples" not in before.peaks
    assert found.peaks["decoding of samples"] == found.resident + found.vae + found.decoding == found.peak > before.peak
    assert sum(found.terms.values()) == found.peak
    assert found.terms["VAE"] == found.vae
    pulled = _tiles(setup)
    assert pulled is not None
    assert (pulled[0], pulled[1].module.backbone.loader.vae_tiling) == ("set model.vae_tiling: true", True)
    assert not setup.module.backbone.loader.vae_tiling
    assert _tiles(pulled[1]) is None
    assert "decoding samples, beside all weights" in as_text(setup, found, None, [])


def test_advice_ends_where_it_fits(tiny: dict[str, Path], plain: Estimate) -> None:
    setup = setup_of(tiny, case("wan"), cached=False)
    assert advise(setup, plain, plain.peak) == []
    some = advise(setup, plain, plain.peak * 0.75)
    assert some[0].change == "run lightning cache and set data.cache"
    assert some[-1].peak <= plain.peak * 0.75
    assert [one.peak for one in some] == sorted((one.peak for one in some), reverse=True)
    assert setup.module.student.gradient_checkpointing is False  # the recipe is left as it was


# ---- the command ------------------------------------------------------------------------------------------------


@pytest.fixture
def configs_only(tiny: dict[str, Path], tmp_path: Path) -> Path:
    """A pipeline's folder as one may copy it from a page: no weights, no tokenizer, no text encoder."""
    folder = tmp_path / "configs"
    for part in ("transformer", "vae", "scheduler"):
        (folder / part).mkdir(parents=True)
        for file in (tiny["wan"] / part).glob("*.json"):
            if "index" not in file.name:
                shutil.copy(file, folder / part)
    shutil.copy(tiny["wan"] / "model_index.json", folder)
    assert not list(folder.rglob("*.safetensors"))
    return folder


def plan(*words: str) -> None:
    recipe = str(RECIPES / "wan_dmd2.yaml")
    sizes = ("--data.frames", "9", "--data.height", "32", "--data.width", "48", "--model.student.rank", "4")
    cli.main(["plan", "-c", recipe, *sizes, *words])


@pytest.mark.slow(seconds=8)
def test_command_reads_configs_only(configs_only: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan("--model.teacher", str(configs_only), "--memory", "80")
    text, told = capsys.readouterr()
    assert "planning: one update of the student" in told
    assert "planning" not in text
    for said in ("largest term:", "TFLOP", "per clip", "fits into 80 GiB", "not counted: the text", "bf16-mixed"):
        assert said in text, text
    plan("--model.teacher", str(configs_only), "--json", "true")
    answer = json.loads(capsys.readouterr().out)
    assert (answer["fits"], answer["advice"]) == (None, [])
    assert answer["peak"] == max(answer["peaks"].values()) == sum(answer["terms"].values())
    assert answer["text_encoders_counted"] is False


def test_report_says_what_to_change(tiny: dict[str, Path], plain: Estimate) -> None:
    setup = setup_of(tiny, case("wan"), cached=False)
    text = as_text(setup, plain, 2**30 * 1e-6, [Advice("set this", plain.peak - 1)])
    assert "does NOT fit into 1e-06 GiB" in text
    assert text.index("set this") < text.index("then lower data.frames")
    told = json.loads(as_json(setup, plain, 1.0, [Advice("set this", 7)]))
    assert (told["fits"], told["advice"]) == (False, [{"change": "set this", "peak": 7}])


def test_command_names_a_teacher_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        plan("--model.teacher", "/nowhere")
    assert "model.teacher is '/nowhere': there is no such folder" in str(stop.value.code)


def test_a_captured_backbone_cannot_be_planned(tiny: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        plan("--model.teacher", str(tiny["wan"]), "--model.backbone", "captured")
    assert "model.backbone: captured learns how WanPipeline calls its network by running it" in str(stop.value.code)
