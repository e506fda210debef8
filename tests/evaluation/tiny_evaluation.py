"""Tiny bundles, data sets and contexts for tests of the evaluation."""

import json
import zlib
from functools import partial
from pathlib import Path

import tiny_bundle
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from tiny_shards import encode_png
from torch import nn

from unclip.data.prepare.resumable import write_samples
from unclip.emoji.scene_files import description
from unclip.emoji.scenes import scenes
from unclip.evaluation.context import Context
from unclip.evaluation.features import EfficientNetLite0, judge, resize
from unclip.evaluation.generation import Settings
from unclip.evaluation.metrics import ClipScore, Frechet, Kernel, Manifold, RetrievalPrecision
from unclip.evaluation.protocol import Protocol

CONF = Path(__file__).parents[2] / "conf" / "measure"
COUNT = 20


def protocol(**changes) -> Protocol:
    settings = dict(name="tiny", format="shards", captions="first", count=COUNT, resolution=64)
    settings |= dict(split="test_seen", reference="val", network="patches")
    return Protocol(**settings | changes)


PROTOCOL = protocol()
METRICS = {
    "frechet": Frechet(network="patches"),
    "kernel": Kernel(network="patches", subsets=10),
    "manifold": Manifold(network="patches"),
    "clip_score": ClipScore(network="judge"),
    "retrieval": RetrievalPrecision(network="judge"),
}


class Patches(nn.Module):
    """A feature network whose features are the image at 4 × 4 pixels."""

    name, num_features, fingerprint = "patches", 48, "1"

    def __init__(self):
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(()))

    def forward(self, images):
        return resize(images, 4).flatten(1)


class PerfectClip:
    """A CLIP that knows an image by its first pixel and a text by its place in a list."""

    def __init__(self, texts):
        self.place = {text: row for row, text in enumerate(texts)}

    def image(self, images):
        return torch.eye(len(self.place))[images[:, 0, 0, 0].long()]

    def text(self, texts):
        rows = torch.tensor([self.place[text] for text in texts])
        return type("Features", (), {"text_embedding": torch.eye(len(self.place))[rows]})


def write_model(folder, names=tiny_bundle.NAMES):
    """Write a tiny bundle with a judge."""
    torch.manual_seed(0)
    tiny_bundle.write(folder, names)
    tiny_bundle.write_judge(folder, steps=5, extra={"seconds": 12.5, "images": 80})
    return folder


def part_of(model, folder, *names):
    """Return a bundle with some of the stages of another."""
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / f"{name}.safetensors").symlink_to(model / f"{name}.safetensors")
    return folder


def write_split(folder, split: str, size: int, count: int) -> None:
    """Write scenes whose images are noise: their metadata are right and rendering costs nothing."""
    shown = [s for index in range(count) for s in scenes("S", seed=0, split=split, index=index)]
    samples = (noise_of(scene, split, size) for scene in shown[:count])
    write_samples(folder / split / str(size) / "00000.tar", samples)


def noise_of(scene, split: str, size: int) -> dict:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{split}/{scene.key}".encode()))
    pixels = torch.randint(0, 256, (8, 8, 3), generator=generator, dtype=torch.uint8)
    image = Image.fromarray(pixels.numpy()).resize((size, size))
    return {"__key__": scene.key, "png": encode_png(image), "json": description(scene, seed=0)}


def write_data(folder):
    """Write the splits that all measurements use."""
    for split in ("val", "test_seen", "test_held_out"):
        write_split(folder, split, 64, 12)
    write_split(folder, "train", 64, 150)  # every concept alone at least once
    write_split(folder, "test_seen", 256, 2)
    write_split(folder, "test_seen", 1024, 1)
    (folder / "dataset.json").write_text(json.dumps({"settings": {"set": "S"}}))
    return folder


def settings_of(**changes) -> Settings:
    return Settings(**{"batch_size": 4, "progress": False, **changes})


def context_of(model, data, out, *, networks=None, **changes) -> Context:
    """Build a context; `changes` are arguments of `Context`, `networks` more feature networks."""
    known = {
        "patches": Patches,
        "effnet_lite0": EfficientNetLite0,
        "judge": partial(judge, file=model / "judge.safetensors"),
    }
    given = {"protocol": PROTOCOL, "settings": settings_of(), "cache": out / "cache"} | changes
    given = {"model": model, "data": data, "out": out, "device": "cpu"} | given
    return Context(networks=known | (networks or {}), **given)


def scenes_context(model, data, out, **settings) -> Context:
    """Build a context whose protocol has other captions than the splits that are measured."""
    other = protocol(split="val", count=2, network="none")
    counts = {"val": 10, "test_seen": 10, "test_held_out": 8}
    return context_of(
        model, data, out, protocol=other, settings=settings_of(**settings), counts=counts
    )


def configured(name: str, small: dict[str, dict]):
    """Build measurements of conf/measure/NAME.yaml with some values replaced."""
    config = OmegaConf.merge(OmegaConf.load(CONF / f"{name}.yaml"), small)
    return instantiate({name: config[name] for name in small}, _convert_="all")


def values(found) -> dict[str, float]:
    """Return all scores of `run`'s results."""
    return {name: score.value for name, score in found.scores.items()}
