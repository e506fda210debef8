"""The upsamplers, conditioned only on the low-resolution image (section 2.1, appendix C)."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from unclip.batch import Batch
from unclip.diffusion import GaussianDiffusion, randn
from unclip.diffusion.samplers import Denoise
from unclip.networks import UNet
from unclip.stages.base import DiffusionStage


class UpsamplerStage(DiffusionStage):
    """Low-resolution image → image of `scale` times its size, which may be any size.

    Args:
        network: a U-Net without conditioning and with six input channels.
        diffusion: the diffusion process; a network with a patch must predict x0.
        sampler: a sampler of `unclip.diffusion` with its steps bound by `functools.partial`.
        name: "upsampler_256" or "upsampler_1024".
        scale: enlargement factor.
        residual: let the network predict the difference between x0 and the enlarged `low_res`.
        scale_input: multiply x_t by √ᾱ_t in the network's input. At high noise, x_t adds no
            information to `low_res`, and a network with little training turns its noise into grain.
        antialias: enlarge with the antialiasing bicubic kernel and beyond [-1, 1], as Karlo does.
        last_network: another network for the last step, at t = 0, which is not trained. Karlo
            trained its own with adversarial and perceptual losses and did not publish how. None
            uses `network` for every step.

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

    def bind(
        self, condition: dict[str, Tensor], guidance_scale: float | None = None
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """Return `network(x_t, t)` for a low-resolution image.

        Raises:
            ValueError: a guidance scale other than 1 is given.
        """
        if guidance_scale not in (None, 1):
            raise ValueError(f"{self.name} has no caption to guide by: it takes no guidance scale")
        return self._bind(self.network, condition)

    def _bind(
        self, network: UNet, condition: dict[str, Tensor]
    ) -> Callable[[Tensor, Tensor], Tensor]:
        enlarged = self.enlarge(**condition)
        bound = network.bind(concat=enlarged)
        return lambda x_t, t: self._output(bound(self._input(x_t, t), t), enlarged)

    def denoiser(
        self, condition: dict[str, Tensor], guidance_scale: float | None = None
    ) -> Denoise:
        """Return `denoise(x_t, t)` for a sampler, with `last_network`, if any, at t = 0."""
        denoise = super().denoiser(condition, guidance_scale)
        if self.last_network is None:
            return denoise
        last = self.diffusion.denoiser(self._bind(self.last_network, condition), self.clip_range)
        return lambda x_t, t: (denoise if t > 0 else last)(x_t, t)

    def noise(
        self, condition: dict[str, Tensor], generators: Sequence[torch.Generator]
    ) -> Float[Tensor, "batch 3 height width"]:
        """Return the noise x_T of each row of `condition`, in channels_last memory format."""
        low_res = condition["low_res"]
        shape = (3, *(self.scale * side for side in low_res.shape[2:]))
        return randn(shape, generators, low_res.device).to(memory_format=torch.channels_last)

    def _input(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.diffusion.signal(t, x_t) * x_t if self.scale_input else x_t

    def _output(self, output: Tensor, enlarged: Tensor) -> Tensor:
        if not self.residual:
            return output
        return torch.cat([output[:, :3] + enlarged, output[:, 3:]], dim=1)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return the diffusion loss on `image`, given `low_res`."""
        noised = self._noised(batch["image"])
        enlarged = self.enlarge(**self.condition(batch))
        output = self.network(self._input(noised.x_t, noised.t), noised.t, concat=enlarged)
        return self._losses(self._output(output, enlarged), noised)
