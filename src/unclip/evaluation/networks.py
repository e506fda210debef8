"""The networks in whose features pictures are compared, each from a file that lies here.

Nothing is fetched: a file that is missing is an error that says what to fetch and where to put it.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from unclip.bundle import load_embedder, stage_file, train_command
from unclip.clip import ClipEmbedder, fingerprint
from unclip.clip.public import load_public
from unclip.evaluation.features import check_bytes, resized

INCEPTION_FILE = "weights/weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
_INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)


@runtime_checkable
class FeatureNetwork(Protocol):
    """What a distance is measured in: an nn.Module in eval mode, from bytes to float32 features.

    Attributes:
        name: as it stands in a metric's name.
        num_features: the width of the features (torchmetrics reads this name).
        fingerprint: of what decides about the features; keys what is cached.
    """

    name: str
    num_features: int
    fingerprint: str

    def __call__(
        self, images: UInt8[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch features"]:
        """Features of pictures of any size."""


class Inception(nn.Module):
    """Inception v3 as TensorFlow published it in 2015, in torch-fidelity's port: FID's network.

    Pictures are resized to 299 px by TensorFlow 1's bilinear rule (no antialiasing, no half-pixel
    offset), as in the FID that papers report.

    Args:
        weights: torch-fidelity's file, 96 MB.
        sha256: of that file.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is another file.
    """

    name = "inception"
    num_features = 2048

    def __init__(
        self, *, weights: str | Path = INCEPTION_FILE, sha256: str = INCEPTION_SHA256
    ) -> None:
        super().__init__()
        path = Path(weights)
        if not path.is_file():
            raise FileNotFoundError(
                f"Inception's weights are not at {path}: "
                f"`curl -L --create-dirs -o {path} {_INCEPTION_URL}`"
            )
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != sha256:
            raise ValueError(
                f"{path} is not TensorFlow's Inception (sha256 {digest[:16]}…, expected "
                f"{sha256[:16]}…): remove it and fetch it again"
            )
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ModuleNotFoundError as error:
            raise FileNotFoundError(
                "Inception needs torch-fidelity: pip install -e '.[evaluation]'"
            ) from error
        torch.load(path, map_location="cpu", weights_only=True)  # the extractor would unpickle it
        self.network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(path))
        self.fingerprint = digest[:8]
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Inception":
        """Stay in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(
        self, images: UInt8[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch features"]:
        """The 2048 features before the classifier, in float32 whatever autocast says outside."""
        check_bytes(images)
        with torch.autocast(images.device.type, enabled=False):
            return self.network(images)[0]

    def logits(self, features: Float[Tensor, "count features"]) -> Float[Tensor, "count classes"]:
        """The classifier's logits without its bias, as the Inception Score takes them."""
        return features @ self.network.fc.weight.T.to(features)


class ClipNetwork(nn.Module):
    """A CLIP's image embeddings as features, and its embeddings of texts.

    Args:
        embedder: a frozen CLIP; it stays a plain object.
        name: as it stands in a metric's name.
    """

    def __init__(self, embedder: ClipEmbedder, name: str) -> None:
        super().__init__()
        self.embedder = embedder
        self.name = name
        self.num_features = embedder.embedding_dim
        self.fingerprint = embedder.fingerprint
        self.model = embedder.model  # so that .to(device) moves it
        self.eval()

    def train(self, mode: bool = True) -> "ClipNetwork":
        """Stay in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(
        self, images: UInt8[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch features"]:
        """Image embeddings, in float32 whatever autocast says outside."""
        check_bytes(images)
        return self.embedder.image(images)

    def texts(
        self, captions: Sequence[str], batch_size: int = 64
    ) -> Float[Tensor, "count features"]:
        """Text embeddings, on the CPU."""
        starts = range(0, len(captions), batch_size)
        parts = [self.embedder.text(captions[start : start + batch_size]) for start in starts]
        return torch.cat([part.text_embedding.cpu() for part in parts])


def judge(*, file: str | Path) -> ClipNetwork:
    """A bundle's second CLIP, which no other stage has seen.

    Raises:
        FileNotFoundError: it is not there; the message has the command that trains it.
    """
    return ClipNetwork(load_embedder(file), "judge")


def load_judge(folder: Path, own: ClipEmbedder) -> ClipEmbedder:
    """A bundle's second CLIP, on the device of its own.

    Raises:
        FileNotFoundError: it has none; the message has the command that trains it.
        ValueError: it is damaged, or the bundle's own CLIP.
    """
    file = stage_file(folder, "judge")
    judge = load_embedder(file, own.device)
    if weights_of(judge) == weights_of(own):
        raise ValueError(
            f"{file} is the model's own CLIP, which flatters what was trained on it: train another "
            f"with `{train_command('judge')}`"
        )
    return judge


def weights_of(embedder: ClipEmbedder) -> str:
    """The fingerprint of a CLIP's weights, by the names that they have in whatever file."""
    return fingerprint(embedder.model.state_dict())


def public_clip(*, model: str, pretrained: str | Path, name: str) -> ClipNetwork:
    """A public CLIP of open_clip's, from a file; its tags would be fetched, and are refused.

    Raises:
        FileNotFoundError: the file is not there; the message has the command that fetches it.
        ValueError: it is no file of weights, or not this model's.
    """
    return ClipNetwork(load_public(model, Path(pretrained)), name)


class TimmNetwork(nn.Module):
    """Any network of timm's, such as DINOv2's: FD in its features agrees better with people.

    Args:
        model: timm's name, such as "vit_large_patch14_dinov2".
        weights: a .safetensors file of its weights.
        name: as it stands in a metric's name.
        size: side in pixels of its input; positions learned at another are interpolated.

    Raises:
        FileNotFoundError: the weights are not there.
        ValueError: they are not this network's.
    """

    def __init__(self, *, model: str, weights: str | Path, name: str, size: int = 224) -> None:
        super().__init__()
        import timm
        from safetensors.torch import load_file
        from timm.models import vision_transformer

        path = Path(weights)
        if not path.is_file():
            raise FileNotFoundError(
                f"the weights of {model} are not at {path}: "
                f"`hf download timm/{model} model.safetensors --local-dir {path.parent}`"
            )
        settings = {"img_size": size} if model.startswith("vit") else {}
        self.network = timm.create_model(model, pretrained=False, num_classes=0, **settings)
        stored = load_file(path)
        try:
            if isinstance(self.network, vision_transformer.VisionTransformer):
                stored = vision_transformer.checkpoint_filter_fn(stored, self.network)
            unknown = self.network.load_state_dict(stored, strict=False)
        except RuntimeError as error:
            raise ValueError(f"{path} does not hold the weights of {model}: {error}") from error
        if unknown.missing_keys:
            raise ValueError(f"{path} lacks {unknown.missing_keys[0]} of {model}: another network?")
        self.name, self.size = name, size
        self.num_features = self.network.num_features
        with path.open("rb") as file:
            self.fingerprint = f"{hashlib.file_digest(file, 'sha256').hexdigest()[:8]}-{size}"
        config = self.network.pretrained_cfg
        self.register_buffer("mean", torch.tensor(config["mean"])[:, None, None])
        self.register_buffer("std", torch.tensor(config["std"])[:, None, None])
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "TimmNetwork":
        """Stay in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(
        self, images: UInt8[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch features"]:
        """What the network gives its classifier, in float32 whatever autocast says outside."""
        with torch.autocast(images.device.type, enabled=False):
            return self.network((resized(images, self.size) - self.mean) / self.std)
