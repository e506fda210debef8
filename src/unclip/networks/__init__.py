"""Networks: pure modules, tensors in and out. They know nothing of diffusion, data or training."""

from unclip.networks.ar_transformer import ARTransformer
from unclip.networks.prior_transformer import PriorTransformer
from unclip.networks.text_transformer import TextTransformer
from unclip.networks.unet import UNet

__all__ = ["ARTransformer", "PriorTransformer", "TextTransformer", "UNet"]
