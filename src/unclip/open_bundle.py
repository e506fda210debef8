"""Open a bundle: check its stages, and load each of them when it is first used."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch

from unclip.bundle import (
    STAGES,
    StageMetadata,
    load_embedder,
    load_stage,
    missing,
    read_metadata,
    stage_file,
    train_command,
    weight_bytes,
)
from unclip.clip import ClipEmbedder
from unclip.device import check_fits, resolve_dtype
from unclip.stages import Stage

_REQUIRED_ATTRIBUTES = {
    "decoder": {"image_size": 64},
    "upsampler_256": {"scale": 4},
    "upsampler_1024": {"scale": 4},
}


@dataclass(eq=False, repr=False)
class OpenBundle:
    """The stages of a bundle on a device; `load` opens one.

    Attributes:
        folder: the bundle's folder.
        metadata: metadata of the stages that it has, by name.
        device: device of the networks, of CLIP only without `offload`.
    """

    folder: Path
    metadata: dict[str, StageMetadata]
    device: torch.device
    dtype: torch.dtype
    offload: bool
    _embedder: ClipEmbedder | None
    _stages: dict[str, Stage] = field(default_factory=dict)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: torch.device | str | None = None,
        embedder: ClipEmbedder | None = None,
        dtype: str | torch.dtype = "auto",
        offload: bool = False,
    ) -> Self:
        """Open a bundle: read the metadata of its files now, and their weights when needed.

        Args:
            path: the bundle's folder, `models/NAME`.
            device: device of the networks; None is a GPU if there is one.
            embedder: a CLIP instead of the bundle's, such as the public one it was trained with.
            dtype: dtype of the networks, also by name; "auto" is float16 on a GPU, else float32.
            offload: keep one stage at a time on the device, each loaded again when it is needed,
                and CLIP on the CPU.

        Raises:
            FileNotFoundError: the folder has no stage.
            ValueError: a file is damaged, or a stage was trained with another CLIP.
        """
        folder = Path(path)
        files = {name: stage_file(folder, name) for name in STAGES}
        metadata = {name: read_metadata(file) for name, file in files.items() if file.exists()}
        if not metadata:
            fix = f"`make train`, or begin one with `{train_command('clip')}`"
            raise FileNotFoundError(f"{folder} holds no stage: make a bundle with {fix}")
        clip = metadata["clip"].clip_fingerprint if "clip" in metadata else None
        clip = clip if embedder is None else embedder.fingerprint
        for name, written in metadata.items():
            _check_belongs(files[name], name, written, clip)
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = resolve_dtype(dtype, device)
        bundle = cls(folder, metadata, device, dtype, offload, embedder)
        if embedder is not None:
            embedder.to(bundle._clip_device)
        return bundle

    @property
    def _clip_device(self) -> torch.device:
        return torch.device("cpu") if self.offload else self.device

    @property
    def embedder(self) -> ClipEmbedder:
        """The bundle's CLIP."""
        if self._embedder is None:
            self.require("clip")
            path = stage_file(self.folder, "clip")
            self._embedder = load_embedder(path, self._clip_device, self.dtype)
        return self._embedder

    def stage(self, name: str) -> Stage:
        """Return a stage by its name."""
        if name not in self._stages:
            self.require(name)
            path = stage_file(self.folder, name)
            stage = load_stage(path, self.device, self.dtype)
            for attribute, value in _REQUIRED_ATTRIBUTES.get(name, {}).items():
                if (own := getattr(stage, attribute)) != value:
                    raise ValueError(f"{path} has {attribute} {own}; a cascade needs {value}")
            self._stages[name] = stage
        return self._stages[name]

    def weight_bytes(self, *names: str) -> dict[str, int]:
        """Return the memory that the weights of stages take, by stage."""
        return {name: weight_bytes(stage_file(self.folder, name), self.dtype) for name in names}

    def require(self, *names: str) -> None:
        """Check that stages exist and fit into memory together (or one by one, with `offload`).

        With `offload`, this also frees the stages on the device if another one is needed.
        """
        needs_clip = "clip" in names and self._embedder is None
        for name in names:
            if name not in STAGES:
                raise ValueError(f"there is no stage {name!r}; there are {', '.join(STAGES)}")
            if name not in self.metadata and (name != "clip" or needs_clip):
                raise missing(stage_file(self.folder, name))
        clip = self.weight_bytes("clip") if needs_clip else {}
        others = [name for name in names if name not in self._stages and name != "clip"]
        if self.offload:
            if others:
                self._stages.clear()
            check_fits(self.weight_bytes(*others), self.device, together=False)
            check_fits(clip, self._clip_device, together=True)
        else:
            check_fits(self.weight_bytes(*others) | clip, self.device, together=True)


def _check_belongs(file: Path, name: str, written: StageMetadata, clip: str | None) -> None:
    """Check that a file holds the stage of its name, trained with the bundle's CLIP."""
    if written.stage != name:
        raise ValueError(f"{file} holds the stage {written.stage}: give it that name")
    if name != "clip" and clip is not None and written.clip_fingerprint not in (None, clip):
        raise ValueError(
            f"{file} was trained with CLIP {written.clip_fingerprint}, but the bundle's CLIP is "
            f"{clip}: train it again with `{train_command(name)}`, or restore the "
            "clip.safetensors that it was trained with"
        )
