"""Convert a bundle to float16, or Karlo's public weights to a bundle."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from cli import Parser, refuse_shipped, user_message

CONF = Path(__file__).resolve().parents[1] / "conf"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0, or 2 for a user error."""
    parser = Parser(description=__doc__)
    about = "float16 halves a bundle's size, karlo reads Karlo's weights"
    parser.add_argument("format", choices=["float16", "karlo"], help=about)
    about = "folder of the bundle; for karlo, of diffusers' components or Karlo's .ckpt files"
    parser.add_argument("source", type=Path, help=about)
    about = "folder of the new bundle, such as models/karlo"
    parser.add_argument("out", type=Path, help=about)
    about = "folder with text_encoder and image_encoder, or the file or tag of open_clip's "
    about += "ViT-L-14 weights; required with .ckpt files"
    parser.add_argument("--clip", metavar="SOURCE", help=about)
    args = parser.parse_args(arguments)
    try:
        refuse_shipped(args.out, "name another folder")
        if args.format == "float16":
            to_float16(args.source, args.out)
        else:
            if not args.source.is_dir():
                raise NotADirectoryError(f"{args.source} is not a folder: see docs/convert.md")
            from unclip.interop import STAGES, convert_karlo  # imports torch: slow for --help

            recipes = {stage: karlo_recipe(stage) for stage in STAGES}
            convert_karlo(args.source, args.out, recipes, clip=args.clip, report=print)
    except (ValueError, OSError) as error:
        print(f"convert.py: {user_message(error)}", file=sys.stderr)
        return 2
    return 0


def to_float16(source: Path, out: Path) -> None:
    """Write a bundle with networks in float16, and its model card.

    The card has the numbers of the source's results.json, if there is one.
    """
    import torch

    from unclip.bundle import load_stage, read_metadata, save_stage
    from unclip.model_card import write_model_card

    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{source} holds no stage: give the folder of a bundle")
    for file in files:
        metadata = read_metadata(file)
        kept = {k: getattr(metadata, k) for k in ("recipe", "steps", "clip_fingerprint", "extra")}
        save_stage(out / file.name, load_stage(file), **kept, dtype=torch.float16)
        print(out / file.name)
    print(write_model_card(out, source / "results.json"))


def karlo_recipe(stage: str) -> dict[str, Any]:
    """Return the recipe of a stage at Karlo's scale."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        last = ["model.last_network=${network}"] if stage == "upsampler_256" else []
        cfg = compose("train", [f"stage={stage}", "scale=karlo", *last])
    return cast(dict[str, Any], OmegaConf.to_container(cfg.model, resolve=True))


if __name__ == "__main__":
    sys.exit(main())
