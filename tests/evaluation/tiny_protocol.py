"""A protocol's images from a tiny bundle and shards of plain squares, for tests of the core."""

import tiny_bundle
import torch
from torch import nn

from unclip.evaluation.context import Context
from unclip.evaluation.features import judge, resize
from unclip.evaluation.generation import Settings
from unclip.evaluation.measurement import run
from unclip.evaluation.metrics import ClipScore, Frechet, Kernel, Manifold, RetrievalPrecision
from unclip.evaluation.protocol import Protocol

COUNT = 20
PROTOCOL = Protocol(
    name="tiny",
    format="shards",
    split="test_seen",
    captions="first",
    count=COUNT,
    resolution=64,
    reference="val",
    network="patches",
)
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


def write_model(folder):
    """Write a tiny bundle with both priors and a judge."""
    torch.manual_seed(0)
    tiny_bundle.write(folder, (*tiny_bundle.NAMES, "prior_ar"))
    tiny_bundle.write_judge(folder)
    return folder


def settings_of(**changes) -> Settings:
    return Settings(**{"batch_size": 4, "progress": False, **changes})


def context_of(model, data, out, *, protocol=PROTOCOL, settings=None, **changes) -> Context:
    """Build the context; `changes` are arguments of `Context`."""
    networks = {"patches": Patches, "judge": lambda: judge(file=model / "judge.safetensors")}
    networks |= changes.pop("networks", {})
    common = {"cache": out / "cache", "device": "cpu", "model": model, **changes}
    return Context(
        protocol=protocol,
        settings=settings or settings_of(),
        networks=networks,
        data=data,
        out=out,
        **common,
    )


def values(found) -> dict[str, float]:
    """Return all scores of `run`'s results."""
    return {name: score.value for name, score in found.scores.items()}


def measure(context, metrics=METRICS):
    return run(metrics, context)
