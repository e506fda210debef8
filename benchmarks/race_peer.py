"""DALLE2-pytorch's decoder in the race: `race.py` runs it in an environment of its own.

It reads and writes safetensors files and knows nothing of unclip.
"""

# ruff: noqa: E402
import runpy
from pathlib import Path

# A CPU torch next to PyPI's torchvision; its operators are undefined once the result is collected.
_torchvision = runpy.run_path(str(Path(__file__).parents[1] / "src/unclip/_torchvision.py"))

import argparse
import json
import time
from bisect import bisect
from importlib.metadata import version

import torch
from dalle2_pytorch import Decoder, Unet
from race_loop import train_for
from safetensors.torch import load_file, save_file
from torch import Tensor

LEARNING_RATE = 3e-4
EVALUATIONS, GUIDANCE_SCALE, SAMPLE_BATCH = 32, 2.0, 25
TOLERANCE = 0.05


def unet_of(parameters: int, *, dim: dict[str, int], tokens: int) -> Unet:
    """The U-Net whose number of parameters is nearest to ours.

    Args:
        parameters: number of parameters of our decoder.
        dim: width of CLIP's "image" embedding and "text" states.
        tokens: length of a caption.

    Raises:
        ValueError: none comes within 5%.
    """

    def make(width: int, cond_dim: int, multipliers: tuple[int, ...]) -> Unet:
        return Unet(
            dim=width,
            cond_dim=cond_dim,
            dim_mults=multipliers,
            self_attn=tuple(level > 0 for level in range(len(multipliers))),
            image_embed_dim=dim["image"],
            text_embed_dim=dim["text"],
            max_text_len=tokens,
            channels=3,
            channels_out=6,  # noise and variance
            attn_dim_head=32,
            attn_heads=4,
            num_resnet_blocks=1,
            cond_on_text_encodings=True,
        )

    def count(*size) -> int:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in make(*size).parameters())

    for multipliers in ((1, 2, 3, 4), (1, 2)):
        sizes = []
        for cond_dim in range(16, 257, 16):
            if cond_dim == dim["image"]:
                continue  # it would not make four tokens of the embedding, and fail
            widths = range(8, 257, 8)
            above = bisect(widths, parameters, key=lambda w: count(w, cond_dim, multipliers))
            sizes += [(w, cond_dim, multipliers) for w in widths[max(above - 1, 0) : above + 1]]
        best = min(sizes, key=lambda size: abs(count(*size) - parameters))
        if abs(count(*best) / parameters - 1) <= TOLERANCE:
            return make(*best)
    raise ValueError(
        f"no U-Net of DALLE2-pytorch has {parameters} parameters to within {TOLERANCE:.0%}: "
        "change ours, as by network.channels=64"
    )


def text_of(data: dict[str, Tensor], rows: Tensor | slice) -> Tensor:
    """Text states with zeros for padding, which is how it tells padding."""
    return data["text_states"][rows].float() * data["text_mask"][rows][..., None]


def main() -> None:
    """Trains on train.safetensors by rules.json, then samples the rows of test.safetensors."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where race.py has put them; takes the images")
    folder = parser.parse_args().folder
    rules = json.loads((folder / "rules.json").read_text())
    torch.set_num_threads(1)
    torch.manual_seed(0)
    train, test = (load_file(folder / f"{name}.safetensors") for name in ("train", "test"))
    dim = {"image": train["image_embedding"].shape[-1], "text": train["text_states"].shape[-1]}
    unet = unet_of(rules["parameters"], dim=dim, tokens=train["text_states"].shape[1])
    decoder = Decoder(  # builds the U-Net again: its parameters are the decoder's
        unet=unet,
        image_size=train["image"].shape[-1],
        timesteps=1000,
        sample_timesteps=(EVALUATIONS,),
        image_cond_drop_prob=0.1,
        text_cond_drop_prob=0.5,
        learned_variance=True,
    )

    def loss(rows: Tensor) -> Tensor:
        image, z = train["image"][rows].float() / 255, train["image_embedding"][rows].float()
        with torch.autocast("cpu", torch.bfloat16, enabled=rules["bf16"]):
            return decoder(image, image_embed=z, text_encodings=text_of(train, rows))

    optimizer = torch.optim.AdamW(
        decoder.parameters(), LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    trained = train_for(rules, loss, optimizer, rows=len(train["image"]))
    decoder.eval()
    since, images = time.process_time(), []
    for start in range(0, len(test["text_mask"]), SAMPLE_BATCH):
        rows = slice(start, start + SAMPLE_BATCH)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=rules["bf16"]):
            sampled = decoder.sample(
                image_embed=test["image_embedding"][rows].float(),
                text_encodings=text_of(test, rows),
                cond_scale=GUIDANCE_SCALE,
            )
        images.append((sampled.float().clamp(0, 1) * 255).round().to(torch.uint8))
    about = {
        "version": version("dalle2-pytorch"),
        "parameters": sum(parameter.numel() for parameter in decoder.parameters()),
        **trained._asdict(),
        "evaluations": EVALUATIONS,
        "guidance_scale": GUIDANCE_SCALE,
        "sampling_cpu_seconds": time.process_time() - since,
    }
    images = torch.cat(images).contiguous()
    path = folder / "DALLE2-pytorch.safetensors"
    save_file({"image": images}, path, metadata={"about": json.dumps(about)})


if __name__ == "__main__":
    main()
