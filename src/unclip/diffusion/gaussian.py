"""The Gaussian diffusion process: targets, readings and losses. It has no parameters."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from unclip.diffusion.schedule import (
    SCHEDULES,
    SPACINGS,
    sectioned_spacing,
)
from unclip.diffusion.schedule import zero_terminal_snr as zero_snr
from unclip.diffusion.timestep_density import LogitNormal

PredictionType = Literal["x0", "eps", "v"]
VarianceType = Literal["fixed_small", "fixed_large", "learned_range", "analytic"]
LossWeight = Literal["simple", "velocity", "min_snr"]


class Prediction(NamedTuple):
    """What a network's output says about `x_t`, whatever it was trained to predict.

    Attributes:
        x0: the clean sample.
        eps: the noise.
        variance_fraction: for a learned-range variance, where log σ² lies between its lower bound
            (0, fixed_small) and its upper bound (1, fixed_large), per element; None for a fixed
            one.
    """

    x0: Tensor
    eps: Tensor
    variance_fraction: Tensor | None


class Posterior(NamedTuple):
    """Mean and log variance of q(x_s | x_t, x0), or of the model's own step, elementwise."""

    mean: Tensor
    log_variance: Tensor


class GaussianDiffusion(nn.Module):
    """q(x_t | x0) = N(√ᾱ_t x0, (1 - ᾱ_t) I) over `timesteps` steps.

    Args:
        schedule: "cosine" or "linear".
        timesteps: T; t runs from 0 to T-1.
        prediction: what the network's output is: x0, eps or v (Salimans & Ho 2022, appendix D).
        variance: of a reverse step; "learned_range" takes a second half of output channels
            (Nichol & Dhariwal 2021, eq. 15); "analytic" is the best that does not depend on x_t
            (Bao et al. 2022), from the network's error, which `fit_error` has to be told.
        loss_weight: "simple" is the plain mean square in the network's own prediction; "velocity"
            and "min_snr" weigh the error of x0 by min(SNR + 1, γ) and min(SNR, γ), whatever is
            predicted.
        gamma: γ, the largest weight (Hang et al. 2023).
        huber: δ of a pseudo-Huber loss 2δ(√(e² + δ²) - δ) in place of the square e² of the error: a
            square for errors below δ, 2δ|e| above, which weighs edges less against flat areas.
        timestep_density: density of the training timesteps over [0, T); None is uniform.
        zero_terminal_snr: makes x_{T-1} pure noise (Lin et al. 2024); not for eps, which then says
            nothing of x0.
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
        zero_terminal_snr: bool = False,
    ):
        super().__init__()
        for name, value, known in (
            ("schedule", schedule, SCHEDULES),
            ("prediction", prediction, ("x0", "eps", "v")),
            (
                "variance",
                variance,
                ("fixed_small", "fixed_large", "learned_range", "analytic"),
            ),
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
            raise ValueError(f"huber is {huber}; it must be positive, or null for the square")
        alpha_bar = SCHEDULES[schedule](timesteps)
        if zero_terminal_snr:
            if prediction == "eps":
                raise ValueError("zero_terminal_snr goes with prediction x0 or v, not eps")
            alpha_bar = zero_snr(alpha_bar)
        error = torch.zeros(timesteps, dtype=torch.float64) if variance == "analytic" else None
        self.register_buffer("alpha_bar", alpha_bar, persistent=False)
        self.register_buffer("x0_error", error)

    def _apply(self, fn, recurse=True):
        """Moves the tables between devices but never to another dtype."""
        device = fn(torch.empty(0, device=self.alpha_bar.device)).device
        self.alpha_bar = self.alpha_bar.to(device)
        if self.x0_error is not None:
            self.x0_error = self.x0_error.to(device)
        return self

    @property
    def timesteps(self) -> int:
        """T."""
        return len(self.alpha_bar)

    @property
    def learns_variance(self) -> bool:
        """Whether the network has a second half of output channels."""
        return self.variance == "learned_range"

    def spacing(self, name: str | Sequence[int], steps: int) -> list[int]:
        """The timesteps, descending, that a sampler with that many steps visits.

        Args:
            name: a spacing; counts by section, such as "10,10,3,2,2"; or the timesteps themselves.
            steps: how many.

        Raises:
            ValueError: for an unknown spacing, or steps that it cannot give.
        """
        if not 1 <= steps <= self.timesteps:
            raise ValueError(f"steps is {steps}; it can be from 1 to {self.timesteps}")
        if not isinstance(name, str):
            timesteps = sorted(set(name), reverse=True)
        elif name in SPACINGS:
            return SPACINGS[name](self.alpha_bar.cpu(), steps)
        elif name.replace(",", "").isdecimal():
            timesteps = sectioned_spacing(self.alpha_bar, [int(n) for n in name.split(",")])
        else:
            known = ", ".join(SPACINGS)
            raise ValueError(f"spacing is {name!r}; it can be {known}, or like 10,10,3,2,2")
        if len(timesteps) != steps:
            raise ValueError(f"steps is {steps}, but the spacing {name} has {len(timesteps)}")
        if not 0 <= timesteps[-1] <= timesteps[0] < self.timesteps:
            raise ValueError(f"timesteps go from 0 to {self.timesteps - 1}, not as in {name}")
        return timesteps

    def sample_timesteps(self, batch: int, device: torch.device) -> Int64[Tensor, " batch"]:
        """Sample training timesteps, one from each of `batch` equally likely strata, shuffled.

        Each follows the timestep density by itself; together they cover the range, which lowers
        the variance of the loss (Kingma et al. 2021, section I.1).
        """
        offset = torch.rand(1, device=device)
        fraction = (offset + torch.randperm(batch, device=device) / batch) % 1.0
        if self.timestep_density is not None:
            fraction = self.timestep_density.quantile(fraction)
        return (fraction * self.timesteps).long().clamp(max=self.timesteps - 1)

    def _at(self, table: Tensor, t: Int64[Tensor, " batch"], like: Tensor) -> Tensor:
        return table[t].float().reshape(-1, *([1] * (like.ndim - 1)))

    def signal(self, t: Int64[Tensor, " batch"], like: Tensor) -> Float[Tensor, "batch ..."]:
        """Return √ᾱ_t, shaped to multiply with `like`."""
        return self._at(self.alpha_bar.sqrt(), t, like)

    def add_noise(
        self, x0: Float[Tensor, "batch ..."], noise: Float[Tensor, "batch ..."], t: Tensor
    ) -> Float[Tensor, "batch ..."]:
        """x_t = √ᾱ_t x0 + √(1 - ᾱ_t) noise."""
        return (
            self._at(self.alpha_bar.sqrt(), t, x0) * x0
            + self._at((1 - self.alpha_bar).sqrt(), t, x0) * noise
        )

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should output."""
        if self.prediction == "x0":
            return x0
        if self.prediction == "eps":
            return noise
        signal, sigma = self.alpha_bar.sqrt(), (1 - self.alpha_bar).sqrt()
        return self._at(signal, t, x0) * noise - self._at(sigma, t, x0) * x0

    def read(
        self,
        output: Tensor,
        x_t: Tensor,
        t: Tensor,
        clip: float | None = None,
        percentile: float | None = None,
    ) -> Prediction:
        """The network's output as x0, eps and variance fraction, in float32.

        Args:
            output: like `x_t`, with twice its channels (dimension 1) for a learned variance.
            x_t: the noisy sample.
            t: its timesteps, one a sample.
            clip: bound of |x0|; eps is then made consistent with the clipped x0.
            percentile: where more than this share of a sample's |x0| lies beyond `clip`, in [0, 1],
                x0 is scaled to that bound as well as clipped (dynamic thresholding, Saharia et al.
                2022, section 2.3).
        """
        output, x_t, fraction = output.float(), x_t.float(), None
        if self.learns_variance:
            output, raw = output.chunk(2, dim=1)
            fraction = (raw + 1) / 2
        signal = self._at(self.alpha_bar.sqrt(), t, x_t)
        sigma = self._at((1 - self.alpha_bar).sqrt(), t, x_t)
        if self.prediction == "x0":
            x0 = output
        elif self.prediction == "eps":
            x0 = (x_t - sigma * output) / signal
        else:
            x0 = signal * x_t - sigma * output
        if clip is not None:
            x0 = threshold(x0, clip, percentile)
        if self.prediction == "eps" and clip is None:
            eps = output
        elif self.prediction == "v" and clip is None:
            eps = sigma * x_t + signal * output
        else:
            eps = (x_t - signal * x0) / sigma
        return Prediction(x0, eps, fraction)

    def denoiser(self, network, clip: float | None = None, percentile: float | None = None):
        """`denoise(x_t, t) -> Prediction` for a sampler, from `network(x_t, timesteps)`."""

        def denoise(x_t: Tensor, t: int) -> Prediction:
            timesteps = torch.full((len(x_t),), t, dtype=torch.int64, device=x_t.device)
            return self.read(network(x_t, timesteps), x_t, timesteps, clip, percentile)

        return denoise

    @torch.no_grad()
    def fit_error(self, t: Int64[Tensor, " count"], error: Float[Tensor, " count"]) -> None:
        """Tells an analytic variance how far x0 is off: its mean square error at each timestep.

        Args:
            t: timesteps that `error` was measured at, any number and order.
            error: mean square error of x0, a sample.

        The table is smoothed over a hundredth of T, in which there must be a measurement.
        """
        bins = min(100, self.timesteps)
        where = t * bins // self.timesteps
        count = torch.bincount(where, minlength=bins).to(self.alpha_bar.device)
        total = torch.bincount(where, error.double(), minlength=bins).to(self.alpha_bar.device)
        if not count.all():
            raise ValueError("fit_error needs errors from every hundredth of the timesteps")
        centre = (torch.arange(bins) + 0.5) * self.timesteps / bins
        table = np.interp(np.arange(self.timesteps) + 0.5, centre, (total / count).cpu())
        self.x0_error.copy_(torch.from_numpy(table))

    def weight(self, t: Int64[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """The factor on the mean square error of the network's own prediction.

        An error of x0 is one of eps times 1/√SNR and one of v times 1/√(SNR + 1); dividing the
        wanted weight of x0's squared error by these makes one rule serve all three predictions.
        """
        if self.loss_weight == "simple":
            return torch.ones(len(t), device=t.device)
        snr = self.alpha_bar / (1 - self.alpha_bar)
        wanted = snr + 1 if self.loss_weight == "velocity" else snr
        own = {"x0": torch.ones_like(snr), "eps": snr, "v": snr + 1}[self.prediction]
        return (wanted.clamp(max=self.gamma) / own)[t].float()

    def loss(
        self, output: Tensor, x0: Tensor, noise: Tensor, x_t: Tensor, t: Tensor
    ) -> dict[str, Float[Tensor, " batch"]]:
        """Each sample's "loss" and its parts: "mse" and, with a learned variance, "vb"."""
        output = output.float()
        mean_output = output.chunk(2, dim=1)[0] if self.learns_variance else output
        square = (mean_output - self.target(x0, noise, t)).square()
        mse = error = square.flatten(1).mean(dim=1)
        if self.huber is not None:
            pixels = 2 * self.huber * ((square + self.huber**2).sqrt() - self.huber)
            error = pixels.flatten(1).mean(dim=1)
        loss = self.weight(t) * error
        if not self.learns_variance:
            return {"loss": loss, "mse": mse}
        vb = self.variational_bound(output, x0, x_t, t)
        return {"loss": loss + vb * (self.timesteps / 1000), "mse": mse, "vb": vb}

    def _steps(self) -> tuple[Tensor, Tensor]:
        """ᾱ_{t-1}, which is 1 before the first step, and β_t."""
        previous = torch.cat([torch.ones_like(self.alpha_bar[:1]), self.alpha_bar[:-1]])
        return previous, 1 - self.alpha_bar / previous

    def log_variance_bounds(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Log of fixed_small, β̃_t (its value at 0 that at 1), and of fixed_large, β_t."""
        previous, beta = self._steps()
        small = beta * (1 - previous) / (1 - self.alpha_bar)
        small = torch.cat([small[1:2], small[1:]])
        return self._at(small.log(), t, like), self._at(beta.log(), t, like)

    def posterior(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Posterior:
        """q(x_{t-1} | x_t, x0) (Ho et al. 2020, eq. 6-7)."""
        previous, beta = self._steps()
        from_x0 = beta * previous.sqrt() / (1 - self.alpha_bar)
        from_x_t = (1 - previous) * (1 - beta).sqrt() / (1 - self.alpha_bar)
        mean = self._at(from_x0, t, x_t) * x0 + self._at(from_x_t, t, x_t) * x_t
        return Posterior(mean, self.log_variance_bounds(t, x_t)[0].expand_as(mean))

    def variational_bound(
        self, output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor
    ) -> Float[Tensor, " batch"]:
        """L_t of the variational bound in bits a dimension; it trains the variance alone.

        The mean is detached (Nichol & Dhariwal 2021, section 4). At t = 0 the term is the negative
        log-likelihood of 8-bit x0 under a discretised Gaussian, elsewhere a KL divergence.
        """
        mean_output, raw = output.float().chunk(2, dim=1)
        prediction = self.read(torch.cat([mean_output.detach(), raw], dim=1), x_t, t)
        small, large = self.log_variance_bounds(t, x_t)
        fraction = prediction.variance_fraction
        log_variance = fraction * large + (1 - fraction) * small
        true = self.posterior(x0, x_t.float(), t)
        mean = self.posterior(prediction.x0, x_t.float(), t).mean
        kl = normal_kl(true.mean, true.log_variance, mean, log_variance)
        nll = -discretised_log_likelihood(x0, mean, 0.5 * log_variance)
        bound = torch.where((t == 0).reshape(-1, *([1] * (kl.ndim - 1))), nll, kl)
        return bound.flatten(1).mean(dim=1) / math.log(2)


def threshold(x0: Tensor, clip: float, percentile: float | None = None) -> Tensor:
    """|x0| brought below `clip`: cut, or scaled where too much of a sample lies beyond it."""
    if percentile is None:
        return x0.clamp(-clip, clip)
    bound = torch.quantile(x0.abs().flatten(1), percentile, dim=1).clamp(min=clip)
    bound = bound.reshape(-1, *([1] * (x0.ndim - 1)))
    return x0.clamp(-bound, bound) * (clip / bound)


def normal_kl(
    mean_1: Tensor, log_variance_1: Tensor, mean_2: Tensor, log_variance_2: Tensor
) -> Tensor:
    """KL(N(mean_1, σ_1²) ‖ N(mean_2, σ_2²)) in nats, elementwise."""
    return 0.5 * (
        log_variance_2
        - log_variance_1
        - 1
        + torch.exp(log_variance_1 - log_variance_2)
        + (mean_1 - mean_2).square() * torch.exp(-log_variance_2)
    )


def discretised_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log P of an 8-bit value `x` in [-1, 1] under N(mean, exp(log_scale)²) rounded to 8 bits."""
    centred, inverse = x - mean, torch.exp(-log_scale)
    upper = inverse * (centred + 1 / 255)
    lower = inverse * (centred - 1 / 255)
    log_upper_tail = torch.special.log_ndtr(upper)
    log_lower_tail = torch.special.log_ndtr(-lower)
    inside = (torch.special.ndtr(upper) - torch.special.ndtr(lower)).clamp(min=1e-12).log()
    return torch.where(x < -0.999, log_upper_tail, torch.where(x > 0.999, log_lower_tail, inside))
