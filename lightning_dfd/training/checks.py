"""What a recipe has to fulfil, all of it checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.utilities import rank_zero_warn

from lightning_dfd.backbones import Backbone
from lightning_dfd.data import VideoDataModule
from lightning_dfd.networks.roles import check_targets
from lightning_dfd.objectives.terms import StudentInput, Term, TermRecipe, check_terms, require
from lightning_dfd.training.settings import SamplingSettings, StudentSettings


def check_counts(gradient_clip: float, accumulate: int, seed: int) -> None:
    """Raise ValueError for numbers with which nothing can be trained."""
    require(gradient_clip > 0, "model.gradient_clip", str(gradient_clip), "above 0; .inf clips nothing")
    require(accumulate > 0, "model.accumulate", accumulate, "at least 1 batch")
    require(0 <= seed < 2**63, "model.seed", seed, "between 0 and 2^63 - 1")


def check_student(student: StudentSettings, backbone: Backbone) -> None:
    """Raise ValueError for a student that cannot be built on this teacher."""
    if backbone.loader.quantization is not None:
        backbone.loader.quantization.check(student.mode)
    if student.mode == "lora" and student.targets is not None:
        check_targets(backbone.meta_transformer(), student.targets)


def check_data(backbone: Backbone, data: VideoDataModule) -> None:
    """Raise ValueError where sizes or cache do not fit the teacher."""
    for size in (data.size, *data.sizes):
        backbone.check_size(size)
    data.require_teacher(backbone.identity())
    if len(data.sizes) > 1 and backbone.takes_image:
        raise ValueError("data.buckets trains no image-to-video teachers; set data.buckets: null")


def check_loss(
    terms: Sequence[Term],
    student: StudentSettings,
    student_input: StudentInput,
    backbone: Backbone,
    data: VideoDataModule | None = None,
    known: bool = False,
) -> None:
    """Raise ValueError where a term does not fit the rest of the recipe.

    Args:
        known: whether `data` are the run's; before that terms are not asked about a cache.
    """
    cached = (data is not None and data.cache is not None) if known else None
    sizes = 1 if data is None else len(data.sizes)
    image = known and backbone.takes_image
    check_terms(terms, TermRecipe(student_input, student.mode == "lora", backbone.loader.offload, cached, image, sizes))


def check_sharding(student: StudentSettings, backbone: Backbone) -> None:
    """Raise ValueError for what FSDP2 cannot shard."""
    if backbone.loader.quantization is not None or (backbone.loader.offload and student.mode == "full"):
        raise ValueError(
            "trainer.strategy fsdp2 shards neither quantized weights nor a teacher that waits on the CPU; set "
            "model.quantization: null and model.offload: false, or take trainer.strategy: auto"
        )


def warn_unless_exportable(backbone: Backbone, sampling: SamplingSettings) -> None:
    """Warn where no stock scheduler samples at the student's times."""
    try:
        backbone.few_step_scheduler(sampling.steps, sampling.kind)
    except ValueError as error:
        rank_zero_warn(f"this student could not be exported: {error}")
