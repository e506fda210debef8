"""A context of a tiny bundle and a data set of a few scenes, for tests of measurements."""

import io
import json
import tarfile
import zlib
from functools import partial
from pathlib import Path

import tiny_bundle
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image

from unclip.emoji.scene_files import description
from unclip.emoji.scenes import scenes
from unclip.evaluation.context import Context
from unclip.evaluation.features import EfficientNetLite0
from unclip.evaluation.networks import judge
from unclip.evaluation.protocol import Protocol
from unclip.evaluation.sampling import Settings

CONF = Path(__file__).parents[2] / "conf" / "measure"
COUNTS = {"val": 10, "test_seen": 10, "test_held_out": 8}


def write_model(folder):
    """Write a tiny bundle with a judge."""
    torch.manual_seed(0)
    tiny_bundle.write(folder)
    tiny_bundle.write_judge(folder, steps=5, extra={"seconds": 12.5, "images": 80})
    return folder


def write_split(folder, split: str, size: int, count: int) -> None:
    """Write scenes whose images are noise: their metadata are right and rendering costs nothing."""
    path = folder / split / str(size)
    path.mkdir(parents=True)
    shown = [s for index in range(count) for s in scenes("S", seed=0, split=split, index=index)]
    with tarfile.open(path / "00000.tar", "w") as shard:
        for scene in shown[:count]:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{split}/{scene.key}".encode()))
            pixels = torch.randint(0, 256, (8, 8, 3), generator=generator, dtype=torch.uint8)
            png = io.BytesIO()
            Image.fromarray(pixels.numpy()).resize((size, size)).save(png, format="PNG")
            text = json.dumps(description(scene, seed=0)).encode()
            for name, content in (("png", png.getvalue()), ("json", text)):
                member = tarfile.TarInfo(f"{scene.key}.{name}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))


def write_data(folder):
    """Write the splits that all measurements use."""
    for split in ("val", "test_seen", "test_held_out"):
        write_split(folder, split, 64, 12)
    write_split(folder, "train", 64, 150)  # every concept alone at least once
    write_split(folder, "test_seen", 256, 2)
    write_split(folder, "test_seen", 1024, 1)
    (folder / "dataset.json").write_text(json.dumps({"settings": {"set": "S"}}))
    return folder


def context_of(model, data, out, *, counts=COUNTS, **settings) -> Context:
    """Return a context whose protocol has other captions than the splits that are measured."""
    protocol = Protocol(
        name="tiny",
        format="shards",
        split="val",
        captions="first",
        count=2,
        resolution=64,
        reference="val",
        network="none",
    )
    return Context(
        protocol=protocol,
        settings=Settings(**{"batch_size": 4, "progress": False, **settings}),
        networks={
            "effnet_lite0": EfficientNetLite0,
            "judge": partial(judge, file=model / "judge.safetensors"),
        },
        data=data,
        out=out,
        model=model,
        counts=counts,
        cache=out / "cache",
        device="cpu",
    )


def configured(name: str, small: dict[str, dict]):
    """Build the measurements of conf/measure/NAME.yaml with some values replaced."""
    config = OmegaConf.merge(OmegaConf.load(CONF / f"{name}.yaml"), small)
    return instantiate(config, _convert_="all")
