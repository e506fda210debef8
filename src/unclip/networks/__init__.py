"""Networks: pure modules, independent of diffusion, data and training."""

from unclip.networks.ar_transformer import ARTransformer
from unclip.networks.prior_transformer import PriorTransformer
from unclip.networks.text_transformer import TextTransformer
from unclip.networks.unet import UNet

__all__ = ["ARTransformer", "PriorTransformer", "TextTransformer", "UNet"]
