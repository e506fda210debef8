"""Write a public CLIP of open_clip into a bundle, so that the bundle is complete."""

from pathlib import Path
from typing import Any

import open_clip
from open_clip.transformer import QuickGELU

from unclip import bundle
from unclip.clip import ClipEmbedder, load_public
from unclip.recipes import meta_parameters

# open_clip's settings: arguments of `ClipStage`.
_VISION = {key: f"vision_{key}" for key in ("width", "layers", "head_width")}
_VISION |= {"image_size": "image_size", "patch_size": "patch_size"}
_TEXT = {key: f"text_{key}" for key in ("width", "layers", "heads")}
_TEXT |= {"context_length": "context_length"}
_SETTINGS = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"}


def write_public_clip(
    path: Path, name: str, pretrained: str | Path, *, normalize: bool = True
) -> None:
    """Write a public CLIP as a stage's file; the arguments are those of `load_public`.

    Raises:
        FileNotFoundError: the weights are missing and cannot be downloaded.
        ValueError: the weights do not fit, or `ClipStage` cannot be this model.
    """
    embedder = load_public(name, pretrained, normalize=normalize)
    recipe = _recipe(name.replace("/", "-"), embedder)
    with meta_parameters():
        stage = bundle.build(recipe)
    bundle.save_stage(
        path,
        stage,
        recipe=recipe,
        steps=0,
        clip_fingerprint=None,
        extra={"public_clip": public_name(name, pretrained)},
        state_dict={f"model.{key}": t for key, t in embedder.model.state_dict().items()},
    )


def public_name(name: str, pretrained: str | Path) -> str:
    """Return the name under which a bundle's file records its public CLIP."""
    return f"{name.replace('/', '-')} {Path(pretrained).name}"


def _recipe(name: str, embedder: ClipEmbedder) -> dict[str, Any]:
    """Return the recipe of a `ClipStage` that is a public CLIP."""
    settings = open_clip.get_model_config(name) or {}
    vision, text = settings["vision_cfg"], settings["text_cfg"]
    unknown = settings.keys() - _SETTINGS
    unknown |= vision.keys() - _VISION.keys() | text.keys() - _TEXT.keys() - {"vocab_size"}
    if unknown:
        raise ValueError(
            f"{name} cannot be stored in a bundle, because unclip's CLIP has no {min(unknown)}: "
            "use a ViT-B, ViT-L, ViT-H or ResNet (RN) model"
        )
    return {
        "_target_": "unclip.stages.ClipStage",
        "embed_dim": settings["embed_dim"],
        **{ours: vision[theirs] for theirs, ours in _VISION.items() if theirs in vision},
        **{ours: text[theirs] for theirs, ours in _TEXT.items()},
        "normalize": embedder.normalize,
        "quick_gelu": any(isinstance(m, QuickGELU) for m in embedder.model.modules()),
        "image_mean": list(embedder.image_mean),
        "image_std": list(embedder.image_std),
    }
