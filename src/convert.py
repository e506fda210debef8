"""Convert Karlo's public weights to a bundle."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

CONF = Path(__file__).resolve().parents[1] / "conf"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0, or 2 for a user error."""
    args = _parser().parse_args(arguments)
    from unclip.interop import STAGES, convert_karlo  # imports torch, which would slow down --help

    try:
        recipes = {stage: karlo_recipe(stage) for stage in STAGES}
        convert_karlo(args.source, args.out, recipes, clip=args.clip, report=print)
    except (ValueError, OSError) as error:
        print(f"convert.py: {error}", file=sys.stderr)
        return 2
    return 0


def karlo_recipe(stage: str) -> dict[str, Any]:
    """Return the recipe of a stage at Karlo's scale."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", [f"stage={stage}", "scale=karlo"])
    return cast(dict[str, Any], OmegaConf.to_container(cfg.model, resolve=True))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("format", choices=["karlo"], help="format of the weights")
    about = "folder with diffusers' components, or with Karlo's .ckpt files"
    parser.add_argument("source", type=Path, help=about)
    about = "folder of the bundle, such as models/karlo"
    parser.add_argument("out", type=Path, help=about)
    about = (
        "folder with text_encoder and image_encoder, or the file or tag of open_clip's "
        "ViT-L-14 weights; required with .ckpt files"
    )
    parser.add_argument("--clip", metavar="SOURCE", help=about)
    return parser


if __name__ == "__main__":
    sys.exit(main())
