"""The upsamplers, conditioned only on the low-resolution image (section 2.1, appendix C)."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from unclip.diffusion import GaussianDiffusion, randn
from unclip.diffusion.samplers import Callback
from unclip.networks import UNet
from unclip.stages.base import Batch, DiffusionStage, mean_losses, timestep_quartiles


class UpsamplerStage(DiffusionStage):
    """Low-resolution image → image of `scale` times its size. It is convolutional: any size works.

    Args:
        network: a U-Net without conditioning and with six input channels.
        diffusion: the diffusion process; a network with a patch must predict x0.
        sampler: a sampler of `unclip.diffusion` with its steps bound by `functools.partial`.
        name: "upsampler_256" or "upsampler_1024".
        scale: enlargement factor.
        residual: the network predicts the difference of x0 to the enlarged low-resolution image.
        scale_input: multiply x_t by √ᾱ_t in the network's input. At high noise x_t adds nothing to
            `low_res`, and the noise appears as grain in the output of a network with little
            training.
        antialias: enlarge with the antialiasing bicubic kernel and beyond [-1, 1], as Karlo does.
        last_network: another, already trained network for the last step, at t = 0; Karlo did not
            publish how it trained its own with adversarial and perceptual losses. None uses
            `network` for every step.

    Raises:
        ValueError: `residual` is combined with a prediction other than x0.
    """

    needs_clip = False
    network: UNet

    def __init__(
        self,
        network: UNet,
        diffusion: GaussianDiffusion,
        sampler: Callable[..., Tensor],
        *,
        name: str,
        scale: int = 4,
        residual: bool = False,
        scale_input: bool = False,
        antialias: bool = False,
        last_network: UNet | None = None,
    ):
        super().__init__(network, diffusion, sampler)
        if residual and diffusion.prediction != "x0":
            raise ValueError(f"residual needs prediction x0, not {diffusion.prediction}")
        self.name = name
        self.scale = scale
        self.residual = residual
        self.scale_input = scale_input
        self.antialias = antialias
        self.last_network = None if last_network is None else last_network.requires_grad_(False)

    def enlarge(
        self, low_res: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch 3 scaled_height scaled_width"]:
        """Enlarge bicubically; this is also the baseline in validation."""
        enlarged = F.interpolate(
            low_res,
            scale_factor=float(self.scale),
            mode="bicubic",
            align_corners=False,
            antialias=self.antialias,
        )
        return enlarged if self.antialias else enlarged.clamp(-1, 1)

    def condition(self, batch: Batch) -> dict[str, Tensor]:
        """Return the low-resolution image."""
        return {"low_res": batch["low_res"]}

    def _bind(self, low_res: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        enlarged = self.enlarge(low_res)
        network = self.network.bind(concat=enlarged)
        last = None
        if self.last_network is not None:
            last = self.last_network.bind(concat=enlarged)

        def output(x_t: Tensor, t: Tensor) -> Tensor:
            current = network if last is None or t[0] > 0 else last
            return self._output(current(self._input(x_t, t), t), enlarged)

        return output

    def _input(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.diffusion.signal(t, x_t) * x_t if self.scale_input else x_t

    def _output(self, output: Tensor, enlarged: Tensor) -> Tensor:
        if not self.residual:
            return output
        return torch.cat([output[:, :3] + enlarged, output[:, 3:]], dim=1)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return the diffusion loss on `image`, given `low_res`."""
        x0 = batch["image"]
        noise = torch.randn_like(x0)
        t = self.diffusion.sample_timesteps(len(x0), x0.device)
        x_t = self.diffusion.add_noise(x0, noise, t)
        enlarged = self.enlarge(**self.condition(batch))
        output = self.network(self._input(x_t, t), t, concat=enlarged)
        output = self._output(output, enlarged)
        losses = self.diffusion.loss(output, x0, noise, x_t, t)
        quartiles = timestep_quartiles(losses["mse"], t, self.diffusion.timesteps)
        return {**mean_losses(losses), **quartiles}

    @torch.no_grad()
    def sample(
        self,
        condition: dict[str, Tensor],
        *,
        generators: Sequence[torch.Generator],
        guidance_scale: float | None = None,
        steps: int | None = None,
        callback: Callback | None = None,
    ) -> Float[Tensor, "batch 3 height width"]:
        """Sample images in [-1, 1].

        Raises:
            ValueError: a guidance scale other than 1 is given.
        """
        if guidance_scale not in (None, 1):
            raise ValueError(f"{self.name} has no caption to guide by: it takes no guidance scale")
        low_res = condition["low_res"]
        height, width = (self.scale * side for side in low_res.shape[2:])
        noise = randn((3, height, width), generators, low_res.device)
        return self._sample(
            self._bind(low_res),
            noise.to(memory_format=torch.channels_last),
            clip_range=1.0,
            generators=generators,
            steps=steps,
            callback=callback,
        )
