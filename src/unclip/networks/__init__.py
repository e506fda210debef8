"""Networks: pure modules, tensors in and out. They know nothing of diffusion, data or training."""

from unclip.networks.prior_transformer import PriorTransformer
from unclip.networks.unet import UNet

__all__ = ["PriorTransformer", "UNet"]
