"""The GAN of DMD2 (2405.14867, section 4.3): non-saturating losses of logits, and their regulariser.

Axis legend: B batch, N logits for each clip. Logits are [B, N]; large means real. These functions know no network.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """mean softplus(-D(real)) + mean softplus(D(made)), a scalar: what the discriminator minimises (1406.2661,
    eq. 1, with D's sigmoid in the loss). It is 2 log 2 where nothing can be told apart."""
    return F.softplus(-real_logits.float()).mean() + F.softplus(fake_logits.float()).mean()


def generator_loss(fake_logits: Tensor) -> Tensor:
    """mean softplus(-D(made)), a scalar: what the student minimises (the non-saturating form of 1406.2661)."""
    return F.softplus(-fake_logits.float()).mean()


def approximate_r1(real_logits: Tensor, perturbed_logits: Tensor) -> Tensor:
    """mean |D(x) - D(x + sigma * eps)|^2, a scalar: R1 by finite differences (APT, 2501.08316).

    To first order its mean over eps is sigma^2 |grad D(x)|^2, which is R1 (1801.04406, eq. 9) up to a factor,
    without a second derivative through the teacher.

    Args:
        real_logits: of real clips.
        perturbed_logits: of the same clips with noise of standard deviation sigma on their clean latents.
    """
    return (real_logits.float() - perturbed_logits.float()).square().mean()
