"""DALLE2-pytorch's decoder in the race; `race.py` runs this in an environment without unclip."""

# ruff: noqa: E402
import runpy
import sys
from pathlib import Path

# A CPU torch next to PyPI's torchvision; its operators are undefined once the result is collected.
_torchvision = runpy.run_path(str(Path(__file__).parents[1] / "src/unclip/_torchvision.py"))

import json
from importlib.metadata import version
from itertools import product

import torch
from dalle2_pytorch import Decoder, Unet
from race_loop import Batch, Racer, Rules, race
from torch import Tensor

EVALUATIONS, GUIDANCE_SCALE = 32, 2.0
OPTIMIZER = {"lr": 3e-4, "betas": (0.9, 0.99), "weight_decay": 0.01, "fused": True}
DIFFUSION = {"timesteps": 1000, "sample_timesteps": (EVALUATIONS,), "learned_variance": True}
DIFFUSION |= {"image_cond_drop_prob": 0.1, "text_cond_drop_prob": 0.5}


def unet_of(rules: Rules) -> Unet:
    """Build the U-Net whose parameters are nearest to ours; raise ValueError if none is near."""

    def make(width: int, cond_dim: int) -> Unet:
        return Unet(
            dim=width,
            cond_dim=cond_dim,
            dim_mults=(1, 2, 3, 4),
            self_attn=(False, True, True, True),
            image_embed_dim=rules["image_dim"],
            text_embed_dim=rules["text_dim"],
            max_text_len=rules["tokens"],
            channels=3,
            channels_out=6,  # noise and variance
            attn_dim_head=32,
            attn_heads=4,
            num_resnet_blocks=1,
            cond_on_text_encodings=True,
        )

    def distance(size: tuple[int, int]) -> float:
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in make(*size).parameters())
        return abs(count / rules["parameters"] - 1)

    # A cond_dim equal to the embedding's width fails: it would not become four tokens.
    cond_dims = [width for width in range(16, 257, 16) if width != rules["image_dim"]]
    nearest = min(product(range(8, 257, 8), cond_dims), key=distance)
    if distance(nearest) > 0.05:
        raise ValueError("no U-Net of DALLE2-pytorch is within 5%: change network.channels of ours")
    return make(*nearest)


def text_of(batch: Batch) -> dict[str, Tensor]:
    """Return the condition; states that are zero are the text's mask."""
    states = batch["text_states"] * batch["text_mask"][..., None]
    return {"image_embed": batch["image_embedding"], "text_encodings": states}


def main() -> None:
    """Race in the folder that the command line names, by its rules.json."""
    folder = Path(sys.argv[1])
    rules = json.loads((folder / "rules.json").read_text())
    unet = unet_of(rules)  # its search is not part of the race

    def enter(train: Batch) -> Racer:
        size = train["image"].shape[-1]
        decoder = Decoder(unet=unet, image_size=size, **DIFFUSION)  # builds the U-Net again

        def loss(batch: Batch) -> Tensor:
            return decoder(batch["image"] / 255, **text_of(batch))

        def sample(batch: Batch, seeds: range) -> Tensor:
            images = decoder.sample(**text_of(batch), cond_scale=GUIDANCE_SCALE)
            return (images.float().clamp(0, 1) * 255).round().to(torch.uint8)

        optimizer = torch.optim.AdamW(decoder.parameters(), **OPTIMIZER)
        about = {"evaluations": EVALUATIONS, "guidance_scale": GUIDANCE_SCALE}
        about["version"] = version("dalle2-pytorch")
        return Racer(decoder, optimizer, loss, lambda: None, sample, about)

    race(folder, "DALLE2-pytorch", rules, enter)


if __name__ == "__main__":
    main()
