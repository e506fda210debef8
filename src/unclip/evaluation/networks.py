"""Feature networks in which images are compared, each loaded from a local file.

Nothing is downloaded: the error for a missing file says what to download and where to put it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unclip.bundle import load_embedder
from unclip.clip import ClipEmbedder, fingerprint
from unclip.clip.public import load_public
from unclip.evaluation.features import FeatureNetwork, Features, Images, check_weights, resize
from unclip.files import sha256_of

INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
_INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)


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
        repair = "remove it and download it again"
        check_weights(path, sha256, name="Inception", download=download, repair=repair)
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ModuleNotFoundError as error:
            raise FileNotFoundError(
                "Inception needs torch-fidelity: pip install -e '.[evaluation]'"
            ) from error
        torch.load(path, map_location="cpu", weights_only=True)  # the extractor would unpickle it
        self.network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(path))
        self.fingerprint = sha256[:8]
        self.freeze()

    def encode(self, images: Images) -> Features:
        """Compute the 2048 features before the classifier."""
        return self.network(images)[0]

    def logits(self, features: Features) -> Features:
        """Compute the classifier's logits without its bias, as the Inception Score does."""
        return features @ self.network.fc.weight.T.to(features)


class ClipNetwork(FeatureNetwork):
    """A frozen CLIP's image embeddings as features; the embedder stays a plain object."""

    embedder: ClipEmbedder

    def __init__(self, embedder: ClipEmbedder, name: str) -> None:
        super().__init__()
        self.embedder = embedder
        self.name = name
        self.num_features = embedder.embedding_dim
        self.fingerprint = embedder.fingerprint
        self.model = embedder.model  # so that .to(device) moves it
        self.freeze()

    def encode(self, images: Images) -> Features:
        """Compute image embeddings."""
        return self.embedder.image(images)


def encode_images(clip: ClipEmbedder, images: Images, batch_size: int = 64) -> Features:
    """Return a CLIP's embeddings of images, on the CPU."""
    batches = images.split(batch_size)
    return torch.cat([clip.image(batch).cpu() for batch in batches])


def encode_texts(clip: ClipEmbedder, texts: Sequence[str], batch_size: int = 64) -> Features:
    """Return a CLIP's embeddings of texts, on the CPU."""
    starts = range(0, len(texts), batch_size)
    parts = [clip.text(texts[start : start + batch_size]) for start in starts]
    return torch.cat([part.text_embedding.cpu() for part in parts])


def judge(*, file: str | Path) -> ClipNetwork:
    """Load a bundle's second CLIP, which no other stage has seen."""
    return ClipNetwork(load_embedder(file), "judge")


def weights_of(embedder: ClipEmbedder) -> str:
    """Fingerprint a CLIP's weights, independent of the file they are in."""
    return fingerprint(embedder.model.state_dict())


def public_clip(*, model: str, pretrained: str | Path, name: str) -> ClipNetwork:
    """Load a public CLIP of open_clip from a file of weights (a tag would be downloaded)."""
    return ClipNetwork(load_public(model, Path(pretrained)), name)


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
            raise FileNotFoundError(
                f"{path}, the weights of {model}, is missing: "
                f"`hf download timm/{model} model.safetensors --local-dir {path.parent}`"
            )
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
        """Compute the features before the classifier."""
        return self.network((resize(images, self.size) - self.mean) / self.std)
