"""Training checkpoints on disk: whole or not there at all, and free of code."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO


class AtomicCheckpointIO(CheckpointIO):
    """Writes beside the target, syncs, renames; reads nothing but tensors and plain containers.

    Lightning's own writer goes through the temporary folder, and where that is another disk a kill
    leaves a torn file under the final name.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Writes `checkpoint`; what stood at `path` stays until the new file is safely on disk."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
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
