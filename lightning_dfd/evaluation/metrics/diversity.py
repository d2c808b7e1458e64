"""How much the videos of one prompt differ from seed to seed.

Axis legend: B videos [B, 3, F, H, W] in [-1, 1], D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torchmetrics.utilities.data import dim_zero_cat

from lightning_dfd.evaluation.metrics.adapt import Extractor, as_extractor, frame_features, video_features
from lightning_dfd.evaluation.metrics.base import VideoMetric
from lightning_dfd.evaluation.metrics.functional.diversity import (
    prompt_diversity,
    spaced_frames,
    split_groups,
    vendi_score,
)

Variant = Literal["video", "frame"]
HEAD = 4  # numbers in a record before its features
TEXT_END = b"\xff"  # a byte that UTF-8 never uses
REMEDY = "need one extractor and one number of frames (16 or more of them all count as 16)"


@dataclass(frozen=True)
class PromptGroups:
    """Features [N, D] or [N, F, D] of all ranks and, per video, the index of its prompt, [N]."""

    features: Tensor
    groups: Tensor


class PromptMetric(VideoMetric):
    """Keeps features with prompt and seed of each video, so that a subclass can compare the videos of a prompt.

    (prompt, seed) pairs that come again are dropped, as distributed samplers pad by repeating. The extractor sees 16
    evenly spaced frames of each video, as in the paper.

    Between ranks the states travel as flat float64: a list state of other axes or type makes gloo abort as soon as one
    rank has seen no video. Prompts travel as their UTF-8 bytes, so that groups cannot collide and refusals can name
    prompts of other ranks.

    Args:
        extractor: a name, a `FeatureExtractor`, or a module or function as `CallableExtractor` takes.
        variant: `video` takes one vector per video, features of frames being averaged; `frame` keeps all frames.
    """

    records: list[Tensor]
    texts: list[Tensor]

    def __init__(self, extractor: Extractor, variant: Variant = "video") -> None:
        super().__init__()
        if variant not in ("video", "frame"):
            raise ValueError(f"got variant {variant!r}; need 'video' or 'frame'")
        self.extractor = as_extractor(extractor)
        self.variant = variant
        self.add_state("records", [], dist_reduce_fx="cat")
        self.add_state("texts", [], dist_reduce_fx="cat")

    def update(self, videos: Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> None:
        """Add videos [B, 3, F, H, W], generated for `prompts` from `seeds`, B of each.

        Raises:
            ValueError: if there are not as many of each, or videos differ in frames from earlier ones in variant
                `frame`.
        """
        if not len(videos) == len(prompts) == len(seeds) or isinstance(prompts, str):
            raise ValueError(
                f"got {len(videos)} videos, {len(prompts)} prompts and {len(seeds)} seeds; need as many of each"
            )
        videos = spaced_frames(videos)
        features = (video_features if self.variant == "video" else frame_features)(self.extractor, videos)
        frames = features.shape[1] if features.ndim == 3 else 1
        # A seed may need all of 64 bits; float64 holds each half.
        head = [[features[0].numel(), frames, *divmod(int(seed), 2**32)] for seed in seeds]
        heads = torch.tensor(head, dtype=torch.float64, device=self.device)
        if self.records and (self.records[0][:2] != heads[0, :2]).any():
            (before, before_frames), now = self.records[0][:2].int().tolist(), features[0].numel()
            raise ValueError(
                f"got {now} features of {frames} frame(s) per video, after {before} of {before_frames}; {REMEDY}"
            )
        self.records.append(torch.cat([heads, features.flatten(1).to(heads)], 1).flatten())
        text = b"".join(prompt.encode() + TEXT_END for prompt in prompts)
        self.texts.append(torch.tensor(list(text), dtype=torch.float64, device=self.device))

    def _groups(self) -> PromptGroups:
        """All videos by prompt, each (prompt, seed) once. As it reads the states of all ranks, only `compute` calls it.

        Raises:
            ValueError: if there are no videos, or a prompt, which is named, has but one seed.
        """
        flat = dim_zero_cat(self.records) if len(self.records) else torch.zeros(0)
        if not len(flat):
            raise ValueError(f"{type(self).__name__} has seen no videos; call update(videos, prompts, seeds) first")
        size, frames = int(flat[0]), int(flat[1])
        whole = len(flat) % (HEAD + size) == 0
        records = flat.view(-1, HEAD + size) if whole else flat[None]
        if not whole or (records[:, :2] != records[0, :2]).any():
            raise ValueError(f"ranks gave features of unlike shapes; {REMEDY}")

        text = bytes(dim_zero_cat(self.texts).byte().tolist())
        prompts = [part.decode() for part in text.split(TEXT_END)[:-1]]
        rows: dict[str, dict[tuple[float, ...], int]] = {}
        for row, (prompt, seed) in enumerate(zip(prompts, records[:, 2:HEAD].tolist(), strict=True)):
            rows.setdefault(prompt, {}).setdefault(tuple(seed), row)
        single = [prompt for prompt, seeds in rows.items() if len(seeds) < 2]
        if single:
            raise ValueError(
                f"{len(single)} of {len(rows)} prompts have but one seed: {single[:3]}{' ...' * (len(single) > 3)}; "
                "need 2 different seeds or more of each prompt. Generate more."
            )
        kept = [row for seeds in rows.values() for row in seeds.values()]
        group = [index for index, seeds in enumerate(rows.values()) for _ in seeds]
        features = records[kept, HEAD:]
        if self.variant == "frame":
            features = features.view(len(kept), frames, -1)
        return PromptGroups(features, torch.tensor(group, device=features.device))


class PromptDiversity(PromptMetric):
    """`prompt_diversity` of all videos: 1 - mean pairwise cosine over the seeds of a prompt, averaged over prompts.

    The paper's measure (2606.18478, eq. 26) with 8 seeds and an extractor of frames, DINOv2-L or CLIP-L. Variant
    `frame` compares the videos frame by frame, then averages.
    """

    higher_is_better = True

    def compute(self) -> Tensor:
        """A float64 scalar; 0 if all seeds of a prompt give one video.

        Raises:
            ValueError: if there are no videos, or a prompt has but one seed.
        """
        groups = self._groups()
        return prompt_diversity(groups.features, groups.groups)


class VendiScore(PromptMetric):
    """`vendi_score` over the seeds of a prompt, averaged over prompts: the effective number of different videos.

    From 1, if all seeds of a prompt give one video, to their number. Compare values of equal numbers of seeds only.

    Args:
        extractor: as of `PromptDiversity`.
    """

    higher_is_better = True

    def __init__(self, extractor: Extractor) -> None:
        super().__init__(extractor)

    def compute(self) -> Tensor:
        """A float64 scalar.

        Raises:
            ValueError: if there are no videos, or a prompt has but one seed.
        """
        groups = self._groups()
        return torch.stack([vendi_score(part) for part in split_groups(groups.features, groups.groups)]).mean()
