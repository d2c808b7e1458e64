"""DMD2's GAN (2405.14867, section 4.3): a discriminator on what the frozen teacher makes of a clip.

DMD2 reads the fake score's features. Like FastGen's video recipes this reads the teacher's, which do not change while
the discriminator learns.

Axis legend: B batch; N tapped blocks; S tokens of a clip (frames and places); D features of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_dfd.objectives.gan import approximate_r1, discriminator_loss, generator_loss
from lightning_dfd.objectives.terms.base import FeatureShape, Step, Term, TermRecipe, require

HIDDEN = 256


@dataclass(frozen=True)
class GANSettings:
    """DMD2's GAN (2405.14867): a discriminator on the teacher's features, trained along with the fake score.

    Args:
        weight: of the generator's loss in the student's; 0 builds no discriminator.
        r1_weight: of the approximate R1 (2501.08316) in the discriminator's loss; peers take 100 to 1000.
        r1_sigma: standard deviation of the noise that it puts on clean latents.
        same_noise: real and generated clips get the same time and noise in the discriminator's update.
        blocks: numbers of the teacher's blocks whose features it sees; null for the middle and later ones.
        lr: of the discriminator, which otherwise shares the fake score's optimizer; null for the fake score's.
    """

    weight: float = 0.0
    r1_weight: float = 0.0
    r1_sigma: float = 0.1
    same_noise: bool = True
    blocks: list[int] | None = None
    lr: float | None = None

    def __post_init__(self) -> None:
        require(self.weight >= 0, "model.gan.weight", self.weight, "0 (off) or above")
        require(self.r1_weight >= 0, "model.gan.r1_weight", self.r1_weight, "0 (off) or above")
        require(self.r1_sigma > 0, "model.gan.r1_sigma", self.r1_sigma, "above 0")
        require(self.lr is None or self.lr > 0, "model.gan.lr", self.lr, "above 0, or null")


class GAN(Term):
    """The generator's loss for the student; the discriminator's loss, with R1, in the fake score's turns."""

    key: ClassVar[str] = "model.gan"
    name: ClassVar[str] = "discriminator"

    def __init__(self, settings: GANSettings, seed: int = 0) -> None:
        self.settings, self.seed = settings, seed

    def build(self, features: Callable[[], FeatureShape]) -> dict[str, nn.Module]:
        shape = features()
        return {self.name: Discriminator(shape.blocks, shape.width, self.settings.blocks, self.seed)}

    def learning_rate(self) -> float | None:
        return self.settings.lr

    def student_loss(self, step: Step) -> Tensor:
        """How far the student's noised clips are from being taken for real."""
        loss = generator_loss(self._discriminator(step).judge(self._features(step, step.x_t, step.t)))
        step.log("gan_generator_loss", loss)
        return self.settings.weight * loss

    def fake_loss(self, step: Step) -> Tensor:
        """What the discriminator gets wrong of noised real clips and of the student's, plus weighted R1."""
        settings, discriminator, real = self.settings, self._discriminator(step), step.real
        t, eps = (step.t, step.eps)
        if not settings.same_noise:
            t, eps = step.draw_time(len(t)), step.draws.noise_like(eps)

        def seen(clips: Tensor) -> list[Tensor]:
            return self._features(step, step.schedule.add_noise(clips, eps, t), t)

        with torch.no_grad():
            generated = self._features(step, step.x_t, step.t)
            shown = seen(real)
        logits = discriminator(shown)
        loss = discriminator_loss(logits, discriminator(generated))
        step.log("gan_discriminator_loss", loss)
        if settings.r1_weight:
            with torch.no_grad():
                near = seen(real + settings.r1_sigma * step.draws.noise_like(real))
            loss = loss + settings.r1_weight * approximate_r1(logits, discriminator(near))
        return loss

    def check(self, recipe: TermRecipe) -> None:
        why = "with model.offload and model.student.mode: full, as the GAN's gradient runs through the teacher"
        require(recipe.adapters or not recipe.offload, f"{self.key}.weight", self.settings.weight, f"0 {why}")

    def facts(self) -> dict[str, str]:
        return {f"{self.key}.weight": "above 0"}

    def card(self) -> dict[str, str]:
        return {"GAN": f"weight {self.settings.weight:g}, R1 {self.settings.r1_weight:g}"}

    def _discriminator(self, step: Step) -> Discriminator:
        found = step.networks.trained[self.name]
        assert isinstance(found, Discriminator)
        return found

    def _features(self, step: Step, x_t: Tensor, t: Tensor) -> list[Tensor]:
        if step.networks.features is None:
            raise ValueError(f"{self.key} needs the teacher's features, and these networks give none")
        return step.networks.features(x_t, t, step.cond, self._discriminator(step).blocks)


class Discriminator(nn.Module):
    """Real or generated: N logits for each clip from the features that N blocks of the teacher give of it.

    Each block has a head of its own: every token is normalised and goes through one hidden layer, the mean over the
    tokens gives the logit. So it fits any number of frames and any size.

    Args:
        count: how many blocks the teacher has.
        width: features of a token.
        blocks: numbers of the blocks to see, from 0; None for one half way, one at three quarters, and the last.
        seed: draws the weights.

    Attributes:
        blocks: the numbers, rising.

    Raises:
        ValueError: the network has no such block.
    """

    def __init__(self, count: int, width: int, blocks: Sequence[int] | None = None, seed: int = 0) -> None:
        super().__init__()
        self.blocks = sorted({count // 2, 3 * count // 4, count - 1} if blocks is None else set(blocks))
        if not self.blocks or self.blocks[0] < 0 or self.blocks[-1] >= count:
            raise ValueError(
                f"model.gan.blocks is {list(blocks or [])}; the teacher's blocks are 0 to {count - 1}, name some of "
                "them, or null for the middle and later ones"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.heads = nn.ModuleList(_Head(width) for _ in self.blocks)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Logits [B, N], float32, of features N x [B, S, D]."""
        logits = [head(tokens) for head, tokens in zip(self.heads, features, strict=True)]
        return torch.cat(logits, dim=1)

    def judge(self, features: Sequence[Tensor]) -> Tensor:
        """As `forward`, with gradient to the features but none to the weights: for the student's loss, which must
        leave nothing in the gradients of the next update of the head."""
        weights: Mapping[str, Tensor] = {name: parameter.detach() for name, parameter in self.named_parameters()}
        logits: Tensor = functional_call(self, dict(weights), (features,))
        return logits


class _Head(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.hidden = nn.Linear(width, HIDDEN)
        self.logit = nn.Linear(HIDDEN, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = nn.functional.silu(self.hidden(self.norm(tokens.float())))
        logit: Tensor = self.logit(hidden.mean(1)).float()
        return logit
