"""Converts Karlo's public weights into a bundle, and a bundle into diffusers' folders."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

CONF = Path(__file__).resolve().parents[1] / "conf"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 0, or 2 after a mistake of the user's."""
    settings = _parser().parse_args(arguments)
    try:
        settings.run(settings)
    except (ValueError, OSError) as error:
        print(f"convert.py: {error}", file=sys.stderr)
        return 2
    return 0


def karlo(settings: argparse.Namespace) -> None:
    """Karlo's weights as a bundle."""
    from unclip.interop import STAGES, convert_karlo

    recipes = {stage: recipe(stage) for stage in STAGES}
    convert_karlo(settings.source, settings.out, recipes, clip=settings.clip, report=print)


def diffusers(settings: argparse.Namespace) -> None:
    """A bundle as folders of diffusers' components."""
    from unclip.interop import convert_to_diffusers

    convert_to_diffusers(settings.source, settings.out)
    print(settings.out)


def recipe(stage: str) -> dict[str, Any]:
    """What training would build at Karlo's scale."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", [f"stage={stage}", "scale=karlo"])
    return OmegaConf.to_container(cfg.model, resolve=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="karlo | diffusers")
    inward = commands.add_parser("karlo", help="Karlo's weights into a bundle")
    inward.add_argument("source", type=Path, help="the hub's folder, or one with Karlo's .ckpt")
    inward.add_argument("out", type=Path, help="the bundle's folder, such as models/karlo")
    inward.add_argument(
        "--clip",
        metavar="WHERE",
        help="a folder with text_encoder and image_encoder, or open_clip's ViT-L-14: a file or tag",
    )
    inward.set_defaults(run=karlo)
    outward = commands.add_parser("diffusers", help="a bundle into diffusers' folders")
    outward.add_argument("source", type=Path, help="the bundle's folder")
    outward.add_argument("out", type=Path, help="where the folders shall lie")
    outward.set_defaults(run=diffusers)
    return parser


if __name__ == "__main__":
    sys.exit(main())
