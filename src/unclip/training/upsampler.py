"""Training of an upsampler."""

from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor

from unclip.evaluation.similarity import psnr
from unclip.images import to_uint8
from unclip.training.module import Batch, StageModule


class UpsamplerModule(StageModule):
    """Validates by the peak signal-to-noise ratio, beside that of bicubic enlargement."""

    def measure(self, batch: Batch) -> dict[str, Tensor]:
        """In dB: "psnr", that of bicubic enlargement, and "psnr_gain", the one less the other.

        Of all crops of the batch as one picture: in a crop of nothing but background bicubic
        enlargement is all but exact, and a mean over crops would be of little else.
        """
        true = _joined(batch["image"])
        (sampled,) = psnr(_joined(self._sample(batch)), true)
        (bicubic,) = psnr(_joined(self.stage.enlarge(batch["low_res"])), true)
        return {"psnr": sampled, "psnr_bicubic": bicubic, "psnr_gain": sampled - bicubic}

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """Bicubic enlargement, the upsampler's work, and the truth."""
        bicubic = self.stage.enlarge(batch["low_res"])
        return {"bicubic": bicubic, "upsampled": self._sample(batch), "real": batch["image"]}

    def _sample(self, batch: Batch) -> Tensor:
        return self.stage.sample(self.stage.condition(batch), generators=self.generators(batch))


def _joined(images: Float[Tensor, "batch 3 height width"]) -> UInt8[Tensor, "1 3 rows width"]:
    """A batch in [-1, 1] as one 8-bit picture, one image under another."""
    return rearrange(to_uint8(images), "b c h w -> 1 c (b h) w")
