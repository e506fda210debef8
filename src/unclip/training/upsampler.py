"""Training of an upsampler."""

from torch import Tensor

from unclip.evaluation.pictures import psnr, to_uint8
from unclip.training.module import Batch, StageModule


class UpsamplerModule(StageModule):
    """Validates by the peak signal-to-noise ratio, beside that of bicubic enlargement."""

    def measure(self, batch: Batch) -> dict[str, Tensor]:
        """In dB: "psnr", that of bicubic enlargement, and "psnr_gain", the one less the other."""
        true = to_uint8(batch["image"])
        sampled = psnr(to_uint8(self._sample(batch)), true).mean()
        bicubic = psnr(to_uint8(self.stage.enlarge(batch["low_res"])), true).mean()
        return {"psnr": sampled, "psnr_bicubic": bicubic, "psnr_gain": sampled - bicubic}

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """Bicubic enlargement, the upsampler's work, and the truth."""
        bicubic = self.stage.enlarge(batch["low_res"])
        return {"bicubic": bicubic, "upsampled": self._sample(batch), "real": batch["image"]}

    def _sample(self, batch: Batch) -> Tensor:
        return self.stage.sample(self.stage.condition(batch), generators=self.generators(batch))
