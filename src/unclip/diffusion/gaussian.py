"""The Gaussian diffusion process: targets, predictions and losses. It has no parameters."""

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from unclip.diffusion.schedule import SCHEDULES, TIMESTEP_SPACINGS, LogitNormal

PredictionType = Literal["x0", "eps", "v"]
VarianceType = Literal["fixed_small", "learned_range", "analytic"]
LossWeight = Literal["simple", "velocity", "min_snr"]


class Prediction(NamedTuple):
    """A network's output as x0 and eps, for any prediction type.

    Attributes:
        x0: the clean sample.
        eps: the noise.
        variance_fraction: for a learned-range variance, the position of log σ² between its lower
            bound β̃_t (0) and its upper bound β_t (1), per element; otherwise None.
    """

    x0: Tensor
    eps: Tensor
    variance_fraction: Tensor | None


class GaussianDiffusion(nn.Module):
    """q(x_t | x0) = N(√ᾱ_t x0, (1 - ᾱ_t) I) over `timesteps` steps.

    Args:
        schedule: "cosine" or "linear".
        timesteps: T, the number of steps; t runs from 0 to T-1.
        prediction: type of the network's output: x0, eps or v (Salimans & Ho 2022, appendix D).
        variance: variance of a reverse step. "fixed_small" is β̃_t; "learned_range" uses a second
            half of the output channels (Nichol & Dhariwal 2021, eq. 15); "analytic" is the optimum
            that does not depend on x_t (Bao et al. 2022), computed from the network's error, which
            `fit_error` stores.
        loss_weight: "simple" is the plain mean squared error of the prediction; "velocity" and
            "min_snr" weight the squared error of x0 by min(SNR + 1, γ) and min(SNR, γ), for any
            prediction type.
        gamma: γ, the largest weight (Hang et al. 2023).
        huber: δ of the pseudo-Huber loss 2δ(√(e² + δ²) - δ) instead of the squared error e². It is
            about e² for errors below δ and 2δ|e| above, so edges weigh less than flat areas.
        timestep_density: density of the training timesteps over [0, T); None is uniform.

    Raises:
        ValueError: an argument has an unknown value.
    """

    alpha_bar: Tensor
    x0_error: Tensor | None

    def __init__(
        self,
        *,
        schedule: str = "cosine",
        timesteps: int = 1000,
        prediction: PredictionType = "eps",
        variance: VarianceType = "fixed_small",
        loss_weight: LossWeight = "simple",
        gamma: float = 5.0,
        huber: float | None = None,
        timestep_density: LogitNormal | None = None,
    ):
        super().__init__()
        for name, value, known in (
            ("schedule", schedule, SCHEDULES),
            ("prediction", prediction, ("x0", "eps", "v")),
            ("variance", variance, ("fixed_small", "learned_range", "analytic")),
            ("loss_weight", loss_weight, ("simple", "velocity", "min_snr")),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; it can be {', '.join(known)}")
        self.prediction = prediction
        self.variance = variance
        self.loss_weight = loss_weight
        self.gamma = gamma
        self.huber = huber
        self.timestep_density = timestep_density
        if huber is not None and huber <= 0:
            raise ValueError(f"huber is {huber}; it must be positive, or null to disable it")
        alpha_bar = SCHEDULES[schedule](timesteps)
        error = torch.zeros(timesteps, dtype=torch.float64) if variance == "analytic" else None
        self.register_buffer("alpha_bar", alpha_bar, persistent=False)
        self.register_buffer("x0_error", error)
        self._tables = self._build_tables(alpha_bar)

    def _build_tables(self, alpha_bar: Tensor) -> dict[str, Tensor]:
        """Compute in float64, and return in float32, everything that depends only on t."""
        previous = torch.cat([torch.ones_like(alpha_bar[:1]), alpha_bar[:-1]])  # ᾱ_{t-1}
        beta = 1 - alpha_bar / previous
        small = beta * (1 - previous) / (1 - alpha_bar)
        tables = {
            "signal": alpha_bar.sqrt(),
            "sigma": (1 - alpha_bar).sqrt(),
            "log_small": torch.cat([small[1:2], small[1:]]).log(),
            "log_large": beta.log(),
            "from_x0": beta * previous.sqrt() / (1 - alpha_bar),
            "from_x_t": (1 - previous) * (1 - beta).sqrt() / (1 - alpha_bar),
            "weight": self._weights(alpha_bar / (1 - alpha_bar)),
        }
        return {name: table.float() for name, table in tables.items()}

    def _weights(self, snr: Tensor) -> Tensor:
        """Return the factor on the mean squared error of the network's prediction, by timestep.

        The squared error of eps is SNR times that of x0, and the squared error of v is SNR + 1
        times that of x0, so one weight on the error of x0 serves all three predictions.
        """
        if self.loss_weight == "simple":
            return torch.ones_like(snr)
        target = snr + 1 if self.loss_weight == "velocity" else snr
        own = {"x0": torch.ones_like(snr), "eps": snr, "v": snr + 1}[self.prediction]
        return target.clamp(max=self.gamma) / own

    def _apply(self, fn, recurse=True):
        """Move the tables between devices but keep them float64."""
        device = fn(torch.empty(0, device=self.alpha_bar.device)).device
        self.alpha_bar = self.alpha_bar.to(device)
        if self.x0_error is not None:
            self.x0_error = self.x0_error.to(device)
        self._tables = {name: table.to(device) for name, table in self._tables.items()}
        return self

    @cached_property
    def cpu_alpha_bar(self) -> Tensor:
        """ᾱ_t on the CPU, for the coefficients of samplers; it is read from the device once."""
        return self.alpha_bar.cpu()

    @property
    def timesteps(self) -> int:
        """T, the number of steps."""
        return len(self.alpha_bar)

    @property
    def learns_variance(self) -> bool:
        """Whether the network outputs a second half of channels for the variance."""
        return self.variance == "learned_range"

    def sampling_timesteps(self, spacing: str | Sequence[int], steps: int) -> list[int]:
        """Return the descending timesteps that a sampler visits.

        Args:
            spacing: "linspace", "log_snr", or the timesteps themselves in any order.
            steps: number of timesteps, 1 to T.

        Raises:
            ValueError: the spacing is unknown, or does not have `steps` timesteps.
        """
        if not 1 <= steps <= self.timesteps:
            raise ValueError(f"steps is {steps}; it can be from 1 to {self.timesteps}")
        if isinstance(spacing, str):
            if spacing not in TIMESTEP_SPACINGS:
                known = ", ".join(TIMESTEP_SPACINGS)
                raise ValueError(f"timestep_spacing is {spacing!r}; it can be {known}")
            return TIMESTEP_SPACINGS[spacing](self.cpu_alpha_bar, steps)
        timesteps = sorted(set(spacing), reverse=True)
        if len(timesteps) != steps:
            raise ValueError(f"steps is {steps}, but there are {len(timesteps)} timesteps")
        if not 0 <= timesteps[-1] <= timesteps[0] < self.timesteps:
            raise ValueError(f"timesteps must be from 0 to {self.timesteps - 1}, not {spacing}")
        return timesteps

    def sample_timesteps(self, batch: int, device: torch.device) -> Int64[Tensor, " batch"]:
        """Sample training timesteps, one from each of `batch` equally likely strata, shuffled.

        Each timestep follows the density; together they cover the range, which lowers the variance
        of the loss (Kingma et al. 2021, section I.1).
        """
        offset = torch.rand(1, device=device)
        fraction = (offset + torch.randperm(batch, device=device) / batch) % 1.0
        if self.timestep_density is not None:
            fraction = self.timestep_density.quantile(fraction)
        return (fraction * self.timesteps).long().clamp(max=self.timesteps - 1)

    def signal(self, t: Int64[Tensor, " batch"], like: Tensor) -> Float[Tensor, "batch ..."]:
        """Return √ᾱ_t, shaped to multiply with `like`."""
        return _at(self._tables["signal"], t, like)

    def sigma(self, t: Int64[Tensor, " batch"], like: Tensor) -> Float[Tensor, "batch ..."]:
        """Return √(1 - ᾱ_t), shaped to multiply with `like`."""
        return _at(self._tables["sigma"], t, like)

    def add_noise(
        self, x0: Float[Tensor, "batch ..."], noise: Float[Tensor, "batch ..."], t: Tensor
    ) -> Float[Tensor, "batch ..."]:
        """Return x_t = √ᾱ_t x0 + √(1 - ᾱ_t) noise."""
        return self.signal(t, x0) * x0 + self.sigma(t, x0) * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the training target of the prediction type."""
        if self.prediction == "x0":
            return x0
        if self.prediction == "eps":
            return noise
        return self.signal(t, x0) * noise - self.sigma(t, x0) * x0

    def predict(
        self, output: Tensor, x_t: Tensor, t: Tensor, clip_range: float | None = None
    ) -> Prediction:
        """Convert the network's output to x0, eps and the variance fraction, in float32.

        Args:
            output: output of the network, with twice the channels of x_t for a learned variance.
            x_t: the noisy sample.
            t: timestep of each sample.
            clip_range: bound on |x0|; eps is then computed from the clipped x0.
        """
        output, x_t, fraction = output.float(), x_t.float(), None
        if self.learns_variance:
            output, raw = output.chunk(2, dim=1)
            fraction = (raw + 1) / 2
        signal, sigma = self.signal(t, x_t), self.sigma(t, x_t)
        if self.prediction == "x0":
            x0, eps = output, None
        elif self.prediction == "eps":
            x0, eps = (x_t - sigma * output) / signal, output
        else:
            x0, eps = signal * x_t - sigma * output, sigma * x_t + signal * output
        if clip_range is not None:
            x0, eps = x0.clamp(-clip_range, clip_range), None
        return Prediction(x0, (x_t - signal * x0) / sigma if eps is None else eps, fraction)

    def denoiser(
        self, network: Callable[[Tensor, Tensor], Tensor], clip_range: float | None = None
    ) -> Callable[[Tensor, int], Prediction]:
        """Wrap `network(x_t, timesteps)` as `denoise(x_t, t) -> Prediction` for a sampler."""

        def denoise(x_t: Tensor, t: int) -> Prediction:
            timesteps = torch.full((len(x_t),), t, dtype=torch.int64, device=x_t.device)
            return self.predict(network(x_t, timesteps), x_t, timesteps, clip_range)

        return denoise

    @torch.no_grad()
    def fit_error(self, t: Int64[Tensor, " count"], error: Float[Tensor, " count"]) -> None:
        """Store the mean squared error of x0 at each timestep, for the analytic variance.

        Args:
            t: timesteps of the samples, in any number and order.
            error: mean squared error of each sample's x0.

        Raises:
            ValueError: a hundredth of the timesteps, over which the table is smoothed, has no
                measurement.
        """
        assert self.x0_error is not None, "the variance is not analytic"
        bins = min(100, self.timesteps)
        index = t * bins // self.timesteps
        count = torch.bincount(index, minlength=bins)
        total = torch.bincount(index, error.double(), minlength=bins)
        if not count.all():
            raise ValueError("fit_error needs errors from every hundredth of the timesteps")
        centers = (torch.arange(bins) + 0.5) * self.timesteps / bins
        table = np.interp(np.arange(self.timesteps) + 0.5, centers, (total / count).cpu())
        self.x0_error.copy_(torch.from_numpy(table))

    def loss(
        self, output: Tensor, x0: Tensor, noise: Tensor, x_t: Tensor, t: Tensor
    ) -> dict[str, Float[Tensor, " batch"]]:
        """Return each sample's "loss" and its parts: "mse" and, with a learned variance, "vb"."""
        output = output.float()
        mean_output = output.chunk(2, dim=1)[0] if self.learns_variance else output
        square = (mean_output - self.target(x0, noise, t)).square()
        mse = error = square.flatten(1).mean(dim=1)
        if self.huber is not None:
            pixels = 2 * self.huber * ((square + self.huber**2).sqrt() - self.huber)
            error = pixels.flatten(1).mean(dim=1)
        loss = self._tables["weight"][t] * error
        if not self.learns_variance:
            return {"loss": loss, "mse": mse}
        vb = self.variational_bound(output, x0, x_t, t)
        return {"loss": loss + vb * (self.timesteps / 1000), "mse": mse, "vb": vb}

    def log_variance_bounds(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return log β̃_t (at t = 0 the value at 1, since β̃_0 is 0) and log β_t."""
        return _at(self._tables["log_small"], t, like), _at(self._tables["log_large"], t, like)

    def posterior_mean(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the mean of q(x_{t-1} | x_t, x0) (Ho et al. 2020, eq. 7); the variance is β̃_t."""
        from_x0, from_x_t = (_at(self._tables[name], t, x_t) for name in ("from_x0", "from_x_t"))
        return from_x0 * x0 + from_x_t * x_t

    def variational_bound(
        self, output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor
    ) -> Float[Tensor, " batch"]:
        """Return L_t of the variational bound in bits per dimension; it trains only the variance.

        The mean is detached (Nichol & Dhariwal 2021, section 4). At t = 0 the term is the negative
        log-likelihood of 8-bit x0 under a discretized Gaussian, otherwise a KL divergence.
        """
        mean_output, raw = output.float().chunk(2, dim=1)
        prediction = self.predict(torch.cat([mean_output.detach(), raw], dim=1), x_t, t)
        small, large = self.log_variance_bounds(t, x_t)
        fraction = prediction.variance_fraction
        assert fraction is not None, "the variance is not learned"
        log_variance = fraction * large + (1 - fraction) * small
        true_mean = self.posterior_mean(x0, x_t.float(), t)
        mean = self.posterior_mean(prediction.x0, x_t.float(), t)
        kl = normal_kl(true_mean, small, mean, log_variance)
        nll = -discretized_log_likelihood(x0, mean, 0.5 * log_variance)
        nats = torch.where(t == 0, nll.flatten(1).mean(dim=1), kl.flatten(1).mean(dim=1))
        return nats / math.log(2)


def _at(table: Tensor, t: Int64[Tensor, " batch"], like: Tensor) -> Float[Tensor, "batch ..."]:
    """Return the table's values at t, shaped to broadcast with `like`."""
    return table[t].reshape(-1, *([1] * (like.ndim - 1)))


def normal_kl(
    mean_1: Tensor, log_variance_1: Tensor, mean_2: Tensor, log_variance_2: Tensor
) -> Tensor:
    """Return KL(N(mean_1, σ_1²) ‖ N(mean_2, σ_2²)) in nats, elementwise."""
    return 0.5 * (
        log_variance_2
        - log_variance_1
        - 1
        + torch.exp(log_variance_1 - log_variance_2)
        + (mean_1 - mean_2).square() * torch.exp(-log_variance_2)
    )


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Return log P of an 8-bit `x` in [-1, 1] under N(mean, exp(log_scale)²) rounded to 8 bits."""
    centered, inverse = x - mean, torch.exp(-log_scale)
    upper = inverse * (centered + 1 / 255)
    lower = inverse * (centered - 1 / 255)
    log_upper_tail = torch.special.log_ndtr(upper)
    log_lower_tail = torch.special.log_ndtr(-lower)
    inside = (torch.special.ndtr(upper) - torch.special.ndtr(lower)).clamp(min=1e-12).log()
    return torch.where(x < -0.999, log_upper_tail, torch.where(x > 0.999, log_lower_tail, inside))
