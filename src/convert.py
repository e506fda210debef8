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
    settings = _parser().parse_args(arguments)
    try:
        settings.run(settings)
    except (ValueError, OSError) as error:
        print(f"convert.py: {error}", file=sys.stderr)
        return 2
    return 0


def karlo(settings: argparse.Namespace) -> None:
    """Convert Karlo's weights and print the files written."""
    from unclip.interop import STAGES, convert_karlo

    recipes = {stage: karlo_recipe(stage) for stage in STAGES}
    convert_karlo(settings.source, settings.out, recipes, clip=settings.clip, report=print)


def karlo_recipe(stage: str) -> dict[str, Any]:
    """Return the recipe of a stage at Karlo's scale."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", [f"stage={stage}", "scale=karlo"])
    return cast(dict[str, Any], OmegaConf.to_container(cfg.model, resolve=True))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="karlo")
    command = commands.add_parser("karlo", help="convert Karlo's weights to a bundle")
    command.add_argument(
        "source",
        type=Path,
        help="folder with diffusers' components, or with Karlo's .ckpt files",
    )
    command.add_argument("out", type=Path, help="folder of the bundle, such as models/karlo")
    command.add_argument(
        "--clip",
        metavar="SOURCE",
        help="folder with text_encoder and image_encoder, or the file or tag of open_clip's "
        "ViT-L-14 weights; required with .ckpt files",
    )
    command.set_defaults(run=karlo)
    return parser


if __name__ == "__main__":
    sys.exit(main())
