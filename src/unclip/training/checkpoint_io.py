"""Training checkpoints on disk: whole or not there at all, and free of code."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO

from unclip.training.resuming import PREVIOUS, CheckpointError


class AtomicCheckpointIO(CheckpointIO):
    """Writes beside the target, syncs, renames; reads nothing but tensors and plain containers.

    Lightning's own writer goes through the temporary folder, and where that is another disk a kill
    leaves a torn file under the final name. The checkpoint that a new one replaces is kept as
    previous.ckpt, and the one before that goes first: there are never more than two on the disk.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Writes `checkpoint`; what stood at `path` stays until the new file is safely on disk.

        Raises:
            CheckpointError: the disk is full, or the folder cannot be written to.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            if path.exists():
                path.with_name(PREVIOUS).unlink(missing_ok=True)
            _write(checkpoint, temporary)
            _keep(path)
            os.replace(temporary, path)
        except (OSError, RuntimeError) as error:  # torch's writer makes the one the other
            raise CheckpointError(_complaint(path, checkpoint, error)) from error
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Reads a checkpoint onto the CPU, or where `map_location` says.

        Raises:
            FileNotFoundError: when there is none; a run never starts anew where it should resume.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no checkpoint at {path}")
        return torch.load(path, map_location=map_location or "cpu", weights_only=True)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Deletes a checkpoint, if it is there."""
        Path(path).unlink(missing_ok=True)


def _write(checkpoint: dict[str, Any], path: Path) -> None:
    with open(path, "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())


def _keep(path: Path) -> None:
    """Gives the checkpoint at `path`, if there is one, the name of the previous one, too."""
    if path.exists():
        try:
            os.link(path, path.with_name(PREVIOUS))
        except OSError:  # a file system without links
            os.replace(path, path.with_name(PREVIOUS))


def _complaint(path: Path, checkpoint: dict[str, Any], error: Exception) -> str:
    free = shutil.disk_usage(path.parent).free / 2**30
    earlier = [name for name in (path.name, PREVIOUS) if path.with_name(name).exists()]
    kept = f"the earlier {' and '.join(earlier)} stays as it is" if earlier else "there is none yet"
    return (
        f"the checkpoint of step {checkpoint.get('global_step')} cannot be written to "
        f"{path.parent}, which has {free:.2f} GiB free ({error}); {kept}. Make room there and give "
        "the same command again"
    )


def _sync_folder(folder: Path) -> None:
    """Makes a rename in `folder` durable; where folders cannot be opened, nothing."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
