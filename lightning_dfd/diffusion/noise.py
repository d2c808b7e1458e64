"""Noise levels, and the change from every kind of network output to x0 and back.

Axis legend: B batch, f latent frames, ... any latent axes. Time `t` is [B], or [B, f] for one of each frame, in
[0, 1]: 0 is clean, 1 is noise. A noised latent is `x_t = alpha_t * x0 + sigma_t * eps`.

Two kinds of schedule exist. *Flow* (Wan, LTX, Hunyuan, ...): alpha = 1 - t, sigma = t, the network is told
`1000 t`. *Discrete* (CogVideoX, Latte, ...): a table of alpha^2 over the training timesteps, alpha^2 +
sigma^2 = 1; a time t means the table's row `round(1000 t)` (row 999 for t = 1), and that integer is what
the network is told. Tables are kept in float64, since near zero terminal SNR float32 loses half its digits.

Everything is read from the pipeline's scheduler *config*. The schedulers themselves carry state: after a
pipeline call `scheduler.scale_noise` answers sigma = 0 for every timestep, so none of them is called here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

Prediction = Literal["v_prediction", "flow", "epsilon"]
PREDICTIONS: tuple[Prediction, ...] = ("v_prediction", "flow", "epsilon")


@dataclass(frozen=True)
class NoiseLevel:
    """A place on a solver's way, which need not be a time of the schedule. All are float64 [B].

    Solvers round the timesteps that they tell the network, and step to noise levels between those at which they ask it.

    Args:
        timestep: what the network is told, in its own units.
        alpha, sigma: the noise level of the latents, x_t = alpha * x0 + sigma * eps.
    """

    timestep: Tensor
    alpha: Tensor
    sigma: Tensor

    def twice(self) -> NoiseLevel:
        """For a batch that is joined to itself, as guidance does."""
        return NoiseLevel(*(torch.cat([value, value]) for value in (self.timestep, self.alpha, self.sigma)))


Time = Tensor | NoiseLevel  # [B] or [B, f]: a time of the schedule; [B]: a solver's own place


@dataclass(frozen=True)
class NoiseSchedule:
    """alpha_t and sigma_t of one teacher, with what its network predicts.

    Args:
        prediction: what the network returns: `flow` is eps - x0, `v_prediction` is alpha*eps - sigma*x0
            (Salimans & Ho, 2202.00512), `epsilon` is eps.
        alphas_cumprod: alpha^2 per training timestep, float64 [num_train_timesteps]; None for flow.
        num_train_timesteps: what t = 1 is called by the network.
        frame_axis: of latents, counted with the batch axis: where f is in [B, C, f, h, w].
    """

    prediction: Prediction
    alphas_cumprod: Tensor | None = None
    num_train_timesteps: int = 1000
    frame_axis: int = 2

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"prediction {self.prediction!r} is not known; allowed: {', '.join(PREDICTIONS)}")
        if (self.prediction == "flow") != (self.alphas_cumprod is None):
            raise ValueError("a flow schedule has no alphas_cumprod; v_prediction and epsilon schedules need one")
        if self.prediction == "epsilon" and self.alphas_cumprod is not None and self.alphas_cumprod[-1] == 0:
            raise ValueError(
                "epsilon prediction with zero terminal SNR cannot give x0 at t = 1 (alpha is 0 there); "
                "use the scheduler config that the teacher was trained with"
            )

    def timestep(self, t: Time) -> Tensor:
        """What the network is told for time t: int64 table rows, or float 1000 t for flow."""
        if isinstance(t, NoiseLevel):
            return t.timestep
        if self.alphas_cumprod is None:
            return t * self.num_train_timesteps
        rows = torch.round(t.double() * self.num_train_timesteps).long()
        return rows.clamp(0, self.num_train_timesteps - 1)

    def alpha_sigma(self, t: Time) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t, float64, of the shape of t."""
        if isinstance(t, NoiseLevel):
            return t.alpha, t.sigma
        if self.alphas_cumprod is None:
            t = t.double()
            return 1.0 - t, t
        squared = self.alphas_cumprod.to(t.device)[self.timestep(t)]
        return squared.sqrt(), (1.0 - squared).sqrt()

    def _levels(self, t: Time, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t in `like`'s dtype, with axes of 1 where `like` has others than t."""
        alpha, sigma = self.alpha_sigma(t)
        return self._beside(alpha, like).to(like), self._beside(sigma, like).to(like)

    def _beside(self, value: Tensor, like: Tensor) -> Tensor:
        """[B] as [B, 1, ...], [B, f] with f on the frame axis of `like`."""
        if value.ndim < 2:
            return append_dims(value, like)
        shape = [len(value)] + [1] * (like.ndim - 1)
        shape[self.frame_axis] = value.shape[1]
        return value.reshape(shape)

    def add_noise(self, x0: Tensor, eps: Tensor, t: Time) -> Tensor:
        """x_t = alpha_t x0 + sigma_t eps. x0, eps: [B, ...]; t: [B] or [B, f]."""
        alpha, sigma = self._levels(t, x0)
        return alpha * x0 + sigma * eps

    def to_x0(self, output: Tensor, x_t: Tensor, t: Time) -> Tensor:
        """The clean latents that a network output means. output, x_t: [B, ...]; t: [B] or [B, f]."""
        alpha, sigma = self._levels(t, x_t)
        if self.prediction == "flow":
            return x_t - sigma * output
        if self.prediction == "v_prediction":
            return alpha * x_t - sigma * output
        return (x_t - sigma * output) / alpha

    def from_x0(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The network output that means x0: the inverse of `to_x0`. Needs sigma_t > 0."""
        alpha, sigma = self._levels(t, x_t)
        if self.prediction == "flow":
            return (x_t - x0) / sigma
        if self.prediction == "v_prediction":
            return (alpha * x_t - x0) / sigma
        return (x_t - alpha * x0) / sigma

    def to_eps(self, x0: Tensor, x_t: Tensor, t: Time) -> Tensor:
        """The noise in x_t if x0 is its clean part. Needs sigma_t > 0."""
        alpha, sigma = self._levels(t, x_t)
        return (x_t - alpha * x0) / sigma

    def ode_step(self, x0: Tensor, x_t: Tensor, t: Time, t_next: Time) -> Tensor:
        """The deterministic step from t to t_next along the predicted direction (DDIM, 2010.02502, eq. 12
        with eta 0; for flow this is Euler's step). With a time per frame, frames that are clean at t stay so."""
        if isinstance(t, NoiseLevel) or t.ndim == 1:
            return self.add_noise(x0, self.to_eps(x0, x_t, t), t_next)
        alpha, sigma = self._levels(t, x_t)
        clean = sigma == 0
        eps = (x_t - alpha * x0) / sigma.masked_fill(clean, 1.0)
        return torch.where(clean, x_t, self.add_noise(x0, eps, t_next))

    def x0_of_step(self, x_t: Tensor, x_next: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        """The x0 from which `ode_step` takes x_t to x_next: its inverse, linear in both.

        x_next = alpha' x0 + sigma' (x_t - alpha x0) / sigma, solved for x0. Raises ValueError if t and t_next are
        one noise level, as two close times of a table are.
        """
        alpha, sigma = self.alpha_sigma(t)
        alpha_next, sigma_next = self.alpha_sigma(t_next)
        kept = sigma_next / sigma
        of_x0 = alpha_next - alpha * kept
        if bool((of_x0 == 0).any()):
            raise ValueError(f"times {t.tolist()} and {t_next.tolist()} are one noise level; take times further apart")
        return (x_next - self._beside(kept, x_t).to(x_t) * x_t) / self._beside(of_x0, x_t).to(x_t)


def append_dims(value: Tensor, like: Tensor) -> Tensor:
    """[B] as [B, 1, ...], with as many axes as `like` has."""
    return value.reshape(-1, *[1] * (like.ndim - 1))


T = TypeVar("T", Tensor, float)


def shift_time(t: T, shift: float) -> T:
    """Timestep shifting, `s t / (1 + (s - 1) t)` (SD3, 2403.03206, eq. 23). shift 1 changes nothing."""
    return shift * t / (1.0 + (shift - 1.0) * t)


def shifted_steps(num_steps: int, shift: float) -> tuple[float, ...]:
    """The few-step list of a flow student: the shift applied to 1, 1 - 1/N, ..., 1/N, largest first."""
    even = torch.arange(num_steps, 0, -1, dtype=torch.float64) / num_steps
    return tuple(shift_time(even, shift).tolist())


def _betas(config: Mapping[str, Any]) -> Tensor:
    """The beta table that a diffusers DDPM-type scheduler config describes, float64 [num_train_timesteps]."""
    num = config["num_train_timesteps"]
    if config.get("trained_betas") is not None:
        betas: Sequence[float] = config["trained_betas"]
        return torch.tensor(betas, dtype=torch.float64)
    kind = config["beta_schedule"]
    start, end = float(config["beta_start"]), float(config["beta_end"])
    if kind == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, num, dtype=torch.float64) ** 2
    if kind == "linear":
        return torch.linspace(start, end, num, dtype=torch.float64)
    raise ValueError(f"beta_schedule {kind!r} is not supported; allowed: scaled_linear, linear, or trained_betas")


def _zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift and scale alpha so that it ends at exactly 0 (2305.08891, algorithm 1)."""
    alpha = alphas_cumprod.sqrt()
    first, last = alpha[0].clone(), alpha[-1].clone()
    alpha = (alpha - last) * first / (first - last)
    return alpha**2


def schedule_from_config(config: Mapping[str, Any], frame_axis: int = 2) -> NoiseSchedule:
    """The noise schedule that a diffusers scheduler's config describes.

    Args:
        config: `scheduler.config` or the content of `scheduler_config.json`, with its `_class_name`.
        frame_axis: of latents, counted with the batch axis.

    Raises:
        ValueError: a prediction type or beta schedule that is not supported, by name.
    """
    name = str(config.get("_class_name", ""))
    num = int(config.get("num_train_timesteps", 1000))
    prediction = config.get("prediction_type", "epsilon")
    if name.startswith("FlowMatch") or prediction == "flow_prediction":
        return NoiseSchedule("flow", None, num, frame_axis)
    if prediction not in ("v_prediction", "epsilon"):
        raise ValueError(
            f"scheduler {name or '(unnamed)'} has prediction_type {prediction!r}; "
            "allowed: v_prediction, epsilon, flow_prediction, or a FlowMatch scheduler"
        )
    alphas_cumprod = torch.cumprod(1.0 - _betas(config), dim=0)
    # CogVideoX moves its signal-to-noise ratio by a constant factor before the rescaling (2408.06072).
    snr_shift = float(config.get("snr_shift_scale") or 1.0)
    alphas_cumprod = alphas_cumprod / (snr_shift + (1.0 - snr_shift) * alphas_cumprod)
    if config.get("rescale_betas_zero_snr"):
        alphas_cumprod = _zero_terminal_snr(alphas_cumprod)
    return NoiseSchedule(prediction, alphas_cumprod, num, frame_axis)
