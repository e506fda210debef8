"""The stages joined: caption → image embedding → 64 → 256 → 1024 pixels.

Each picture has a generator of its own in each stage, seeded by its seed and the stage's name, and
stages hand 8-bit pictures on. So a seed gives the same picture in any batch (a pixel may differ by
one of 256 levels, since sums are rounded otherwise in another batch), and an upsampler starts from
exactly the pixels that are kept.
"""

import hashlib
import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from unclip.bundle import (
    STAGES,
    StageMetadata,
    load_embedder,
    load_stage,
    read_metadata,
    stage_file,
    train_command,
    weight_bytes,
)
from unclip.clip import ClipEmbedder
from unclip.editing import Editing, Pictures, Progress
from unclip.images import to_uint8
from unclip.memory import check_fits
from unclip.stages import Stage

MAKES = {64: "decoder", 256: "upsampler_256", 1024: "upsampler_1024"}
# What each choice of a prior is made with: a stage, its linear map, or z_t in place of z_i.
PRIORS = {"diffusion": "prior", "ar": "prior_ar", "linear": "prior", "none": "clip"}
_JOINTS = {
    "decoder": {"image_size": 64},
    "upsampler_256": {"scale": 4},
    "upsampler_1024": {"scale": 4},
}

# What a stage is given beside its condition, where it works on pictures that exist.
_GIVEN = ("image", "noise", "mask")


def _draw(stage: Stage, condition: dict[str, Tensor], **how: Any) -> Tensor:
    """A stage's own sampling."""
    return stage.sample(condition, **how)


class Cascade(Editing):
    """A bundle's stages, each loaded when it is first used.

    What it does with pictures that exist it has from `unclip.editing`.

    Its methods share some arguments. `seeds`: one a picture. `guidance_scale`: None is the stage's
    own. `steps`: sampler steps of the stages named, such as `{"decoder": 16}`; the others take
    their own. `batch_size`: pictures that go through a stage at a time; it changes memory and time,
    not pictures. `progress(stage, step, steps)`: called after each sampler step, over all batches.

    All raise `FileNotFoundError` for a stage that the bundle lacks, with the command that trains
    it, `ValueError` for arguments that make no sense together, and `MemoryError`, before anything
    is loaded, for stages that will not fit.
    """

    def __init__(
        self,
        folder: Path,
        metadata: Mapping[str, StageMetadata],
        device: torch.device | str,
        embedder: ClipEmbedder | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        offload: bool = False,
    ):
        self.folder = folder
        self.metadata = dict(metadata)
        self.device = torch.device(device)
        self.dtype = dtype
        self.offload = offload
        self._clip_device = torch.device("cpu") if offload else self.device
        self._stages: dict[str, Stage] = {}
        self._embedder = None if embedder is None else embedder.to(self._clip_device)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: torch.device | str | None = None,
        embedder: ClipEmbedder | None = None,
        dtype: torch.dtype = torch.float32,
        offload: bool = False,
    ) -> "Cascade":
        """Opens a bundle: reads what its files say of themselves, and their weights when needed.

        Args:
            path: the folder, `models/NAME`.
            device: None is a GPU if there is one.
            embedder: a CLIP in place of the bundle's, such as the public one it was trained with.
            dtype: of the networks, such as bfloat16 or float16 for large ones on a GPU.
            offload: keep one stage at a time on the device, each read anew when it is its turn, and
                the CLIP on the CPU.

        Raises:
            FileNotFoundError: if it holds no stage.
            ValueError: for a damaged file, or a stage trained with another CLIP than the bundle's.
        """
        folder = Path(path)
        files = {name: stage_file(folder, name) for name in STAGES}
        metadata = {name: read_metadata(file) for name, file in files.items() if file.exists()}
        if not metadata:
            raise FileNotFoundError(
                f"{folder} holds no stage: make a bundle with `make train`, "
                f"or begin one with `{train_command('clip')}`"
            )
        clip = metadata["clip"].clip_fingerprint if "clip" in metadata else None
        clip = clip if embedder is None else embedder.fingerprint
        for name, written in metadata.items():
            _check_belongs(files[name], name, written, clip)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(folder, metadata, device, embedder, dtype=dtype, offload=offload)

    @property
    def embedder(self) -> ClipEmbedder:
        """The bundle's CLIP."""
        if self._embedder is None:
            self._require("clip")
            path = stage_file(self.folder, "clip")
            self._embedder = load_embedder(path, self._clip_device, self.dtype)
        return self._embedder

    def weight_bytes(self, *names: str) -> dict[str, int]:
        """The memory that stages take, by their names."""
        return {name: weight_bytes(stage_file(self.folder, name), self.dtype) for name in names}

    def stage(self, name: str) -> Stage:
        """A stage by its name."""
        if name not in self._stages:
            self._require(name)
            stage = load_stage(stage_file(self.folder, name), self.device, self.dtype)
            for attribute, value in _JOINTS.get(name, {}).items():
                if (own := getattr(stage, attribute)) != value:
                    raise ValueError(
                        f"{stage_file(self.folder, name)} has {attribute} {own}; "
                        f"a cascade joins stages of {attribute} {value}"
                    )
            self._stages[name] = stage
        return self._stages[name]

    def text_to_image(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        size: int = 1024,
        prior: str = "diffusion",
        guidance_scale: float | None = None,
        prior_guidance_scale: float | None = None,
        steps: Mapping[str, int] | None = None,
        batch_size: int = 8,
        progress: Progress | None = None,
    ) -> Pictures:
        """A picture of each prompt, 64, 256 or 1024 pixels, and the smaller ones on its way.

        No prompt may be blank; what of one is too long for the CLIP is cut, with a warning.
        `prior` is one of `PRIORS`; `guidance_scale` is the decoder's, `prior_guidance_scale` the
        prior's.
        """
        self._require("clip", stage_of_prior(prior), *stages_for(size))
        run = {"seeds": seeds, "steps": steps, "batch_size": batch_size, "progress": progress}
        image_embedding = self.prior(
            prompts, prior=prior, guidance_scale=prior_guidance_scale, **run
        )
        return self.decode(
            image_embedding, prompts, size=size, guidance_scale=guidance_scale, **run
        )

    @property
    def size(self) -> int:
        """Pixels of the largest pictures that the bundle's stages make; at least the decoder's."""
        made = [size for size in MAKES if set(stages_for(size)) <= set(self.metadata)]
        return max(made, default=min(MAKES))

    @torch.inference_mode()
    def prior(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        prior: str = "diffusion",
        guidance_scale: float | None = None,
        steps: Mapping[str, int] | None = None,
        batch_size: int = 8,
        progress: Progress | None = None,
    ) -> Float[Tensor, "batch dim"]:
        """The image embedding that the prior draws for each prompt, on the CPU.

        "linear" and "none" draw nothing: theirs is the same for every seed.
        """
        stage = stage_of_prior(prior)
        self._require("clip", stage)
        if isinstance(prompts, str):
            raise ValueError("prompts come as a list, even a single one")
        for prompt in prompts:
            if not prompt.strip():
                raise ValueError("a prompt is blank: say what the picture shall show")
            if rest := self.embedder.tokenizer.cut(prompt):
                warnings.warn(
                    f"a prompt is too long for this CLIP; cut off: {rest!r}", stacklevel=3
                )
        run = {"seeds": seeds, "steps": steps, "batch_size": batch_size, "progress": progress}
        inputs = {"caption": prompts}
        if prior in ("linear", "none"):
            _check_run(inputs, seeds, steps or {}, batch_size)
            return self._expected(prior, prompts, batch_size)
        return self._sample(stage, inputs, guidance_scale=guidance_scale, **run).float()

    def _expected(self, prior: str, prompts: Sequence[str], batch_size: int) -> Tensor:
        """What may stand in for a prior's image embedding: z_t, or the linear map's of it."""
        parts = []
        for start in range(0, len(prompts), batch_size):
            batch = self._on_device({"caption": prompts[start : start + batch_size]})
            z = batch["text_embedding"]
            if prior == "linear":
                stage = self.stage("prior")
                if stage.linear is None:
                    raise ValueError(
                        f"{stage_file(self.folder, 'prior')} has no linear map: "
                        f"train it again with `{train_command('prior')}`"
                    )
                z = stage.linear(stage.condition(batch)["text_embedding"])
            parts.append(z.float().cpu())
        return torch.cat(parts)

    @torch.inference_mode()
    def decode(
        self,
        image_embedding: Float[Tensor, "batch dim"] | None,
        captions: Sequence[str] | None,
        *,
        seeds: Sequence[int],
        size: int = 1024,
        guidance_scale: float | None = None,
        steps: Mapping[str, int] | None = None,
        batch_size: int = 8,
        progress: Progress | None = None,
    ) -> Pictures:
        """Pictures of image embeddings, the prior's or real images' own, with their captions.

        Either may be None, for none: the decoder was trained without, too.
        """
        self._require("clip", *stages_for(size))
        run = {"seeds": seeds, "steps": steps, "batch_size": batch_size, "progress": progress}
        inputs = _decoder_inputs(image_embedding, captions)
        image = self._sample("decoder", inputs, guidance_scale=guidance_scale, **run)
        return self._finish(image_embedding, image, size=size, **run)

    @torch.inference_mode()
    def upsample(
        self,
        images: UInt8[Tensor, "batch 3 height width"],
        *,
        seeds: Sequence[int],
        size: int = 1024,
        steps: Mapping[str, int] | None = None,
        batch_size: int = 8,
        progress: Progress | None = None,
    ) -> dict[int, Tensor]:
        """Pictures of 64 or 256 pixels and their enlargements up to `size`, by size."""
        edge = images.shape[-1]
        missing = [name for name in stages_for(size) if name not in stages_for(edge)]
        self._require(*missing)
        run = {"seeds": seeds, "steps": steps, "batch_size": batch_size, "progress": progress}
        made = {edge: images.cpu()}
        for name in missing:
            image = self._sample(name, {"low_res": made[edge]}, guidance_scale=None, **run)
            edge = image.shape[-1]
            made[edge] = to_uint8(image)
        return made

    def _finish(
        self,
        image_embedding: Tensor | None,
        image: Tensor,
        *,
        guidance_scale: Any = None,
        **run: Any,
    ) -> Pictures:
        """The decoder's images with what they were made from, enlarged; these have no guidance."""
        z = None if image_embedding is None else image_embedding.float().cpu()
        return Pictures(z, self.upsample(to_uint8(image), **run))

    def _sample(
        self,
        name: str,
        inputs: Mapping[str, Any],
        *,
        seeds: Sequence[int],
        guidance_scale: float | None,
        steps: Mapping[str, int] | None,
        batch_size: int,
        progress: Progress | None,
        work: Callable[..., Tensor] = _draw,
    ) -> Tensor:
        """One stage over all batches; `inputs` holds a row for each seed.

        `work(stage, condition, **rest)` is what it does; what of `inputs` the condition is not made
        of comes with the rest: `image`, `noise` and `mask`.
        """
        seeds, steps = [operator.index(seed) for seed in seeds], steps or {}
        _check_run(inputs, seeds, steps, batch_size)
        stage, outputs = self.stage(name), []
        batches = range(0, len(seeds), batch_size)
        for done, start in enumerate(batches):
            part = slice(start, start + batch_size)
            batch = self._on_device({key: rows[part] for key, rows in inputs.items()})
            outputs.append(
                work(
                    stage,
                    self._condition(stage, batch, len(seeds[part])),
                    **{key: batch[key] for key in _GIVEN if key in batch},
                    generators=[_generator(seed, name) for seed in seeds[part]],
                    guidance_scale=guidance_scale,
                    steps=steps.get(name),
                    callback=_callback(progress, name, done, len(batches)),
                ).cpu()
            )
        return torch.cat(outputs)

    def _condition(self, stage: Stage, batch: dict[str, Any], rows: int) -> dict[str, Tensor]:
        """A stage's condition; the decoder's with its null for what the batch lacks."""
        if stage.name != "decoder":
            return stage.condition(batch)
        no_caption, no_embedding = "caption" not in batch, "image_embedding" not in batch
        if no_caption:
            batch = self._on_device({**batch, "caption": [""] * rows})
        if no_embedding:
            z = torch.zeros(rows, self.embedder.embedding_dim, device=self.device)
            batch = {**batch, "image_embedding": z}
        condition = stage.condition(batch)
        condition = stage.without_caption(condition) if no_caption else condition
        return stage.without_image_embedding(condition) if no_embedding else condition

    def _on_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A stage's batch: captions encoded, 8-bit pictures in [-1, 1]."""
        for key, value in list(batch.items()):
            if key == "caption":
                text = self.embedder.text(value)._asdict()
                batch.update({name: part.to(self.device) for name, part in text.items()})
            else:
                value = value.to(self.device)
                batch[key] = value.float() / 127.5 - 1 if value.dtype == torch.uint8 else value
        return batch

    def _require_for(self, size: int) -> None:
        self._require("clip", *stages_for(size))

    def _require(self, *names: str) -> None:
        for name in names:
            if name not in STAGES:
                raise ValueError(f"there is no stage {name!r}; there are {', '.join(STAGES)}")
            if name not in self.metadata and not (name == "clip" and self._embedder is not None):
                raise FileNotFoundError(
                    f"{stage_file(self.folder, name)} is missing: "
                    f"train it with `{train_command(name)}`"
                )
        missing = [name for name in names if name not in self._stages and name != "clip"]
        if self.offload and missing:
            self._stages.clear()
        clip = ["clip"] if "clip" in names and self._embedder is None else []
        if self.offload:
            check_fits(self.weight_bytes(*missing), self.device, together=False)
            check_fits(self.weight_bytes(*clip), self._clip_device, together=True)
        else:
            check_fits(self.weight_bytes(*missing, *clip), self.device, together=True)


def _check_run(
    inputs: Mapping[str, Any], seeds: Sequence[int], steps: Mapping[str, int], batch_size: int
) -> None:
    if unknown := steps.keys() - set(STAGES[1:]):
        raise ValueError(f"steps names {min(unknown)!r}; it can name {', '.join(STAGES[1:])}")
    if not seeds or batch_size < 1:
        raise ValueError("at least one seed and a batch_size of 1 or more are needed")
    for key, rows in inputs.items():
        if len(rows) != len(seeds):
            raise ValueError(f"{len(seeds)} seeds do not go with a {key} of {len(rows)}")


def _decoder_inputs(
    image_embedding: Tensor | None, captions: Sequence[str] | None
) -> dict[str, Any]:
    """What there is of a decoder's two inputs."""
    inputs: dict[str, Any] = {}
    if captions is not None:
        inputs["caption"] = captions
    if image_embedding is not None:
        inputs["image_embedding"] = image_embedding.float()
    return inputs


def stage_of_prior(prior: str) -> str:
    """The stage that a choice of `PRIORS` is made with."""
    if prior not in PRIORS:
        raise ValueError(f"prior is {prior!r}; it can be {', '.join(PRIORS)}")
    return PRIORS[prior]


def stages_for(size: int) -> list[str]:
    """The stages that make a picture of `size` pixels from an image embedding, in order."""
    if size not in MAKES:
        raise ValueError(f"size is {size}; it can be {', '.join(map(str, MAKES))}")
    return [stage for pixels, stage in MAKES.items() if pixels <= size]


def _generator(seed: int, stage: str) -> torch.Generator:
    """A picture's randomness in one stage, alike on every machine."""
    digest = hashlib.sha256(f"{seed} {stage}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))


def _callback(
    progress: Progress | None, stage: str, done: int, batches: int
) -> Callable[[int, int, Tensor], None] | None:
    """A sampler's callback for the batch after `done` of `batches`."""
    if progress is None:
        return None
    return lambda step, steps, x0: progress(stage, done * steps + step, batches * steps)


def _check_belongs(file: Path, name: str, written: StageMetadata, clip: str | None) -> None:
    """Refuses a file of another stage, and one that was trained with another CLIP."""
    if written.stage != name:
        raise ValueError(f"{file} holds the stage {written.stage}: give it that name")
    if name != "clip" and clip is not None and written.clip_fingerprint not in (None, clip):
        raise ValueError(
            f"{file} was trained with CLIP {written.clip_fingerprint}, but the bundle's CLIP is "
            f"{clip}: train it again with `{train_command(name)}`, or bring back the "
            "clip.safetensors that it was trained with"
        )
