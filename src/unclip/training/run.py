"""Preconditions of a run: data, upstream stages, disk space and sizes that fit together."""

import fcntl
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from unclip.bundle import load_embedder, read_metadata, stage_file
from unclip.clip import ClipEmbedder
from unclip.files import atomic_write
from unclip.interop import public_name, write_public_clip
from unclip.launcher import started_by, without_ranks
from unclip.training.resume import LAST, PREVIOUS

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
    exported = 4 * sum(p.numel() for p in stage.parameters())
    needed = max(checkpoint_bytes(stage) * 2 - replaced, 0) + exported
    for folder in map(Path, folders):
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(existing).free
        if free < needed:
            raise ValueError(
                f"{folder}: {free / 2**30:.1f} GiB are free, but two checkpoints and the stage "
                f"need {needed / 2**30:.1f} GiB: free some space, or choose other folders.runs and "
                "folders.models"
            )


def checkpoint_bytes(stage: nn.Module) -> int:
    """Return the largest size of a checkpoint: float32 weights, averages and two moments."""
    trained = sum(p.numel() for p in stage.parameters() if p.requires_grad)
    return 4 * sum(p.numel() for p in stage.parameters()) + 12 * trained


def check_chain(name: str, recipe: Mapping[str, Any], image_size: int, bundle: str | Path) -> None:
    """Require that an upsampler's input size is the output size of the stage before it.

    Args:
        name: name of the run; other stages than upsamplers pass.
        recipe: recipe of the stage.
        image_size: size of the images that the stage is trained on.
        bundle: folder of the bundle; a decoder in it has its own output size.
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


def ensure_data(prepare: Callable[[], Any], done: str | Path) -> None:
    """Call `prepare` to create the data set, unless the file `done` marks it as complete."""
    if not Path(done).exists():
        with one_at_a_time(Path(done).parent):
            if not Path(done).exists():
                prepare()


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

    Args:
        path: the bundle's clip.safetensors.
        name: model, as in `load_public`.
        pretrained: tag or file of its weights, as in `load_public`.
        normalize: scale embeddings to unit length.

    Raises:
        FileNotFoundError: the weights are missing and cannot be downloaded.
        ValueError: the bundle has another CLIP, or the public one cannot be used.
    """
    path, wanted = Path(path), public_name(name, pretrained)
    if not path.exists():
        with one_at_a_time(path):
            if not path.exists():
                write_public_clip(path, name, pretrained, normalize=normalize)
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
    """Require the stages that a run builds on, or train them.

    Args:
        needs: names of the stages.
        folder: folder of the bundle.
        overrides: command line of this run; an upstream run inherits it, except `OWN`.
        train: train missing stages, each in its own process.

    Raises:
        FileNotFoundError: a stage is missing and is not to be trained here, or this process is one
            of several ranks, which the upstream run would take for its own.
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
                _train(words, command)


def _train(words: list[str], command: str) -> None:
    """Run train.py as a single process; its command line chooses the devices."""
    code = subprocess.run([sys.executable, *words], env=without_ranks(), check=False).returncode
    if code:
        raise ChildProcessError(f"`{command}` failed with exit code {code}")
