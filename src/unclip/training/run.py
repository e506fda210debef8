"""Preconditions of a run: data, embeddings, upstream stages, disk space and sizes that fit."""

import fcntl
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from unclip.bundle import load_embedder, read_metadata, stage_file
from unclip.clip import ClipEmbedder
from unclip.data.embeddings import missing_embeddings, write_embeddings
from unclip.data.loader import ShardDataset, ShardLoader
from unclip.data.module import ShardDataModule
from unclip.data.reader import SampleReader
from unclip.data.shards import list_shards
from unclip.files import atomic_write
from unclip.interop import public_name, write_public_clip
from unclip.launcher import started_by, without_ranks
from unclip.training.resume import LAST, PREVIOUS

SMALL_SHARD = 2**24  # bytes; reading it takes less time than starting workers

# The stage whose output a stage upsamples.
UPSTREAM_OF = {"upsampler_256": "decoder", "upsampler_1024": "upsampler_256"}

# Overrides of the stage itself; an upstream run inherits all others from the command line.
OWN = (
    *("stage=", "preset", "network", "model.", "module.", "diffusion", "sampler", "optimizer"),
    *("schedule", "objective=", "direction=", "embedder", "init=", "resume", "upstream=", "sweep="),
    *("callbacks.", "data.batch_size=", "data.val_batch_size=", "data.image_size=", "hydra"),
    *("run_folder=", "trainer.max_steps=", "trainer.validate_every_steps="),
)


def check_disk(stage: nn.Module, folders: Sequence[str | Path], run_folder: str | Path) -> None:
    """Require space for two training checkpoints and the exported stage in each folder.

    A checkpoint is written next to the old one. Checkpoints in the run folder will be replaced.
    """
    earlier = [Path(run_folder, name) for name in (LAST, PREVIOUS)]
    replaced = sum(path.stat().st_size for path in earlier if path.is_file())
    weights = 4 * sum(p.numel() for p in stage.parameters())  # in float32
    trained = 4 * sum(p.numel() for p in stage.parameters() if p.requires_grad)
    checkpoint = weights + 3 * trained  # with averages and two moments
    needed = max(2 * checkpoint - replaced, 0) + weights
    for folder in map(Path, folders):
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(existing).free
        if free < needed:
            raise ValueError(
                f"{folder}: {free / 2**30:.1f} GiB are free, but two checkpoints and the stage "
                f"need {needed / 2**30:.1f} GiB: free some space, or choose other folders.runs and "
                "folders.models"
            )


def check_chain(name: str, recipe: Mapping[str, Any], image_size: int, bundle: str | Path) -> None:
    """Require that an upsampler's input size is the output size of the stage before it.

    Other stages than upsamplers pass. Training images have the size `image_size`; a decoder in the
    folder `bundle` has its own output size.
    """
    upstream = UPSTREAM_OF.get(name)
    if upstream is None:
        return
    scale, path = recipe["scale"], stage_file(bundle, upstream)
    if image_size % scale:
        raise ValueError(f"{name}: data.image_size={image_size} is not a multiple of {scale}")
    if upstream == "decoder" and path.is_file():
        output_size = read_metadata(path).recipe["image_size"]
        if output_size * scale != image_size:
            raise ValueError(
                f"{name} upsamples images of {image_size // scale} px, but {path} makes "
                f"{output_size} px: set data.image_size={output_size * scale}, or train a decoder "
                "of that size"
            )


@contextmanager
def one_at_a_time(path: str | Path) -> Iterator[None]:
    """Let one process of this machine create `path`; the others wait, and find it.

    The lock is a hidden file next to `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def ensure(path: str | Path, create: Callable[[], Any], lock: str | Path | None = None) -> None:
    """Call `create` in one process of this machine, unless the file `path` exists.

    The others wait at the path `lock`, by default the file itself.
    """
    if not Path(path).exists():
        with one_at_a_time(lock or path):
            if not Path(path).exists():
                create()


def resolve_init(init: str | Path, stage: str) -> Path:
    """Return the stage's file that `init`, a bundle's folder or the file itself, names."""
    path = Path(init)
    path = path if path.suffix == ".safetensors" else stage_file(path, stage)
    if not path.is_file():
        raise FileNotFoundError(f"init={init}: there is no file {path}")
    return path


def copy_upstream(needs: Sequence[str], source: str | Path, folder: str | Path) -> None:
    """Copy the stages `needs` from one bundle to another, unless they are there."""
    for stage in needs:
        original, copy = stage_file(source, stage), stage_file(folder, stage)
        if original.exists() and not copy.exists():
            with atomic_write(copy) as temporary:
                shutil.copyfile(original, temporary)


def public_embedder(
    path: str | Path, name: str, pretrained: str, *, normalize: bool = True
) -> ClipEmbedder:
    """Load the public CLIP of a bundle; a bundle without a CLIP gets it first.

    `path` is the bundle's clip.safetensors; the others are arguments of `load_public`.

    Raises:
        FileNotFoundError: the weights are missing and cannot be downloaded.
        ValueError: the bundle has another CLIP, or the public one cannot be used.
    """
    path, wanted = Path(path), public_name(name, pretrained)
    ensure(path, lambda: write_public_clip(path, name, pretrained, normalize=normalize))
    found = read_metadata(path).extra.get("public_clip", "one that was trained or converted")
    if found != wanted:
        raise ValueError(
            f"{path} is not the public CLIP {wanted} but {found}: choose another bundle=NAME, or "
            "leave out embedder=public to use it"
        )
    return load_embedder(path)


def ensure_upstream(
    needs: Sequence[str], folder: str | Path, overrides: Sequence[str], *, train: bool
) -> None:
    """Require stages of a bundle that a run needs, or train them, each in its own process.

    An upstream run inherits the `overrides` of this run's command line, except `OWN`.

    Raises:
        FileNotFoundError: a stage is missing and is not to be trained here, or this process is one
            of several ranks, which the upstream run would take for its own.
        ChildProcessError: the training of a stage failed.
    """
    for stage in needs:
        path = stage_file(folder, stage)
        if path.exists():
            continue
        inherited = [word for word in overrides if not word.lstrip("+~").startswith(OWN)]
        words = [str(Path(sys.argv[0]).with_name("train.py")), f"stage={stage}", *inherited]
        command = shlex.join(["python", *words])
        if not train:
            raise FileNotFoundError(
                f"{path} is missing. Train it with `{command}`, or add upstream=train to train it "
                "first"
            )
        if launcher := started_by():
            raise FileNotFoundError(
                f"{path} is missing, and upstream=train does not work under {launcher}: "
                f"train it first with `{command}`"
            )
        with one_at_a_time(path):
            if not path.exists():
                print(f"{path} is missing: {command}", flush=True)
                done = subprocess.run([sys.executable, *words], env=without_ranks(), check=False)
                if done.returncode:
                    raise ChildProcessError(f"`{command}` failed with exit code {done.returncode}")


class Embedded(NamedTuple):
    """Number of shards that a call embedded, and of their images."""

    shards: int
    images: int


def ensure_embeddings(
    embedder: ClipEmbedder, data: ShardDataModule, device: torch.device | str
) -> None:
    """Embed the shards that have no embeddings on `device`; one process does it for all.

    Nothing is written to a complete data set.
    """
    if any(missing_embeddings(source, embedder.fingerprint) for source in data.sources()):
        with one_at_a_time(data.home / "embeddings"):
            embed_shards(embedder.to(device), data)


def embed_shards(
    embedder: ClipEmbedder, data: ShardDataModule, *, rank: int = 0, world_size: int = 1
) -> Embedded:
    """Store CLIP's image embeddings next to the shards where they are missing or outdated.

    The training and validation samples that training accepts are embedded. Ranks alternate: a
    shard's rank depends only on the data, not on the progress of other ranks. An interrupted run
    resumes at the shard where it stopped.

    Raises:
        ValueError: there are too many bad samples.
    """
    shards = [shard for source in data.sources() for shard in list_shards(source)]
    own = shards[rank::world_size]
    missing = missing_embeddings(own, embedder.fingerprint) if own else []
    silent = not missing or rank > 0
    bar = tqdm(missing, desc="CLIP embeddings", unit="shard", disable=silent)
    return Embedded(len(missing), sum(_embed_shard(embedder, shard, data) for shard in bar))


def _embed_shard(embedder: ClipEmbedder, shard: Path, data: ShardDataModule) -> int:
    """Write the embeddings of a shard next to it, and return their number."""
    size, bad = data.minimum_size, data.max_bad_fraction
    reader = SampleReader(image_size=embedder.image_size, random=False, minimum_size=size)
    dataset = ShardDataset([shard], reader, batch_size=64, max_bad_fraction=bad)
    small = shard.is_file() and shard.stat().st_size < SMALL_SHARD
    loader = ShardLoader(dataset, workers=0 if small else data.workers)
    keys, embeddings = [], [torch.empty(0, embedder.embedding_dim)]
    for batch in loader:
        keys += batch["key"]
        embeddings.append(embedder.image(batch["image"]).cpu())
    write_embeddings(shard, embedder.fingerprint, keys, torch.cat(embeddings))
    return len(keys)
