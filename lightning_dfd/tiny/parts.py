"""What the tiny pipelines are put together from: text encoders and tokenizers that need no download."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from transformers import T5Tokenizer

from lightning_dfd.noise import shifted_steps
from lightning_dfd.types import SampleKind, VideoSize

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SIZE, STEPS = VideoSize(9, 32, 48), shifted_steps(4, 5.0)
EVEN = (0.999, 0.749, 0.499, 0.249)  # of families with a table of noise levels
TEXT_LENGTH = 16  # tokens of a prompt, where the pipeline leaves the choice


@dataclass(frozen=True)
class Tiny:
    """A tiny pipeline, and what to try it with.

    Args:
        build: makes it, with weights from the global generator.
        size: of videos that fit it, with more than one place along every axis of the latents.
        steps: times of a student that its stock scheduler can sample at.
        kinds: of sampling for which it has one.
        text_length: tokens of a prompt; None where its pipeline's call leaves no choice.
        one_by_one: whether its pipeline treats prompts in a list otherwise than each by itself.
    """

    build: Callable[[], Any]
    size: VideoSize = SIZE
    steps: tuple[float, ...] = STEPS
    kinds: tuple[SampleKind, ...] = ("ode", "renoise")
    text_length: int | None = TEXT_LENGTH
    one_by_one: bool = False


def text_tokenizer(words: Iterable[str] = ()) -> T5Tokenizer:
    """A T5 tokenizer of `words`, with single letters for everything else."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -6.0)]
    pieces += [(f"▁{word}", -1.0) for word in sorted(set(words))]
    pieces += [(letter, -8.0) for letter in LETTERS]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def text_encoder(config_class: Any, model_class: Any, vocabulary: int) -> Any:
    """A random two-layer T5 or UMT5 encoder with 32 features."""
    config = config_class(vocab_size=vocabulary, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
    return model_class(config).eval()
