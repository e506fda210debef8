"""Samples of an evaluation, and the resumable folder of its images: one PNG per prompt."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import torch
from jaxtyping import UInt8
from torch import Tensor
from tqdm import tqdm

from unclip.bundle import StageMetadata, build, missing, stage_file
from unclip.cascade import Cascade
from unclip.evaluation.distributed import Ranks
from unclip.evaluation.features import Features, Images, weights_of
from unclip.evaluation.protocol import Prompt, Protocol, fingerprint
from unclip.evaluation.sources import crop_and_resize
from unclip.files import parse_json, read_json, read_text, split_lines, write_text
from unclip.images import open_image, save_png, to_pil
from unclip.text_to_image import stage_of_prior, stages_for

MANIFEST, SETTINGS = "manifest.jsonl", "settings.json"
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How images are sampled."""

    # where image embeddings come from: "diffusion", "ar", "linear" or "none" (z_t itself)
    prior: str = "diffusion"
    guidance_scale: float | None = None  # guidance scale of the decoder; None is the stage's own
    # guidance scale of the prior; None is the stage's own
    prior_guidance_scale: float | None = None
    # sampler steps of stages by name; None, and the others, use the stage's own
    steps: Mapping[str, int | None] = field(default_factory=dict)
    batch_size: int = 50  # number of 64 px images per batch; larger images use smaller batches
    seed: int = 0  # image k has the seed `seed` + k
    progress: bool = True  # show progress bars

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it must be at least 1")
        for name in ("guidance_scale", "prior_guidance_scale"):
            if not math.isfinite(getattr(self, name) or 0.0):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a finite number")
        stage_of_prior(self.prior)
        given = {stage: count for stage, count in self.steps.items() if count is not None}
        object.__setattr__(self, "steps", given)


@dataclass
class Sampling:
    """A cascade with settings; row k of a call has the seed `settings.seed` + `first` + k."""

    settings: Settings
    cascade: Cascade

    def predict(
        self, captions: Sequence[str], *, first: int = 0, prior: str | None = None
    ) -> Features:
        """Predict image embeddings of captions; `prior` replaces that of the settings."""
        scale, prior = self.settings.prior_guidance_scale, prior or self.settings.prior
        with self._options(captions, first) as options:
            return self.cascade.prior(captions, prior=prior, guidance_scale=scale, **options)

    def decode(self, z: Features | None, captions: Sequence[str], *, first: int = 0) -> Images:
        """Decode image embeddings to 64 px images; None decodes the captions alone."""
        scale = self.settings.guidance_scale
        with self._options(captions, first) as options:
            made = self.cascade.decode(z, captions, size=64, guidance_scale=scale, **options)
        return made.images[64]

    def enlarge(self, images: Images, size: int, *, first: int = 0) -> Images:
        """Enlarge images with the upsamplers, in batches that shrink as the images grow."""
        with self._options(images, first) as options:
            options["batch_size"] = max(self.settings.batch_size * 16 // size, 1)
            return self.cascade.upsample(images, size=size, **options)[size]

    def text_to_image(self, captions: Sequence[str], *, size: int, first: int = 0) -> Images:
        """Sample images of captions: small ones in large batches, large ones in small batches."""
        z = self.predict(captions, first=first)
        images = self.decode(z, captions, first=first)
        return images if size == 64 else self.enlarge(images, size, first=first)

    @contextmanager
    def _options(self, rows: Sequence | Tensor, first: int) -> Iterator[dict[str, Any]]:
        """Yield the options of a call of the cascade; its progress bar ends with the block."""
        start = self.settings.seed + first
        with tqdm(leave=False, unit="step", disable=not self.settings.progress) as bar:

            def progress(stage: str, step: int, steps: int) -> None:
                bar.total = steps
                bar.set_description(stage, refresh=False)
                bar.update(step - bar.n)

            yield {
                "seeds": range(start, start + len(rows)),
                "steps": self.settings.steps,
                "batch_size": self.settings.batch_size,
                "progress": progress,
            }


class GeneratedImage(NamedTuple):
    """One image of a folder."""

    id: str
    path: Path
    prompt: str | None  # None if no manifest says it
    seed: int | None


@dataclass(frozen=True)
class ImageFolder:
    """Generated images, ours or somebody else's."""

    path: Path
    rows: list[GeneratedImage]  # every image that it has, or will have
    settings: dict[str, Any]  # how the images were sampled; {} if unknown

    @classmethod
    def create(
        cls, path: Path, prompts: Sequence[Prompt], settings: dict[str, Any], *, seed: int
    ) -> "ImageFolder":
        """Create or reopen the folder for images of `prompts`, where image k has `seed` + k.

        Raises:
            ValueError: it has images of other prompts or settings.
        """
        rows = [
            GeneratedImage(prompt.id, path / f"{_file_stem(prompt.id)}.png", prompt.text, seed + k)
            for k, prompt in enumerate(prompts)
        ]
        lines = [{"id": row.id, "prompt": row.prompt, "seed": row.seed} for row in rows]
        texts = {
            MANIFEST: "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines),
            SETTINGS: json.dumps(settings, indent=2, ensure_ascii=False, sort_keys=True) + "\n",
        }
        for name, text in texts.items():
            file = path / name
            if not file.exists():
                write_text(file, text)
            elif read_text(file) != text:
                raise ValueError(
                    f"{file} was written with other settings: choose another out=, or remove {path}"
                )
        return cls(path, rows, settings)

    @classmethod
    def read(cls, path: Path) -> "ImageFolder":
        """Open somebody else's images: those listed in manifest.jsonl, or all, sorted by name.

        Each line of a manifest is {"id": …, "prompt": …}; the image is ID.png (or .jpg, .webp) or
        the file named by "file".

        Raises:
            FileNotFoundError: the folder, all images or a listed image are missing.
            ValueError: the manifest is damaged.
        """
        if not path.is_dir():
            raise FileNotFoundError(f"generated={path}: there is no such folder")
        files = [file for file in sorted(path.glob("[!.]*")) if file.suffix.lower() in _SUFFIXES]
        if not files:
            raise FileNotFoundError(f"{path} has no image ({', '.join(_SUFFIXES)})")
        settings, manifest = path / SETTINGS, path / MANIFEST
        rows = [GeneratedImage(file.stem, file, None, None) for file in files]
        if manifest.is_file():
            rows = _read_manifest(manifest, files)
        return cls(path, rows, read_json(settings) if settings.is_file() else {})

    @property
    def prompts(self) -> list[str] | None:
        """The prompt of every image; None if they are not known."""
        texts = [row.prompt for row in self.rows if row.prompt is not None]
        return texts if len(texts) == len(self.rows) else None

    def is_missing(self, block: Iterable[int]) -> bool:
        """Return whether an image of the block is missing or truncated."""
        try:
            for k in block:
                open_image(self.rows[k].path)
        except (OSError, ValueError):
            return True
        return False

    def write(self, k: int, image: UInt8[Tensor, "3 height width"]) -> None:
        """Write image k atomically."""
        save_png(to_pil(image), self.rows[k].path)

    def load(self, indices: Iterable[int], protocol: Protocol) -> Images:
        """Load some images, cropped and resized as the protocol says if they have another size."""
        rows = (self.rows[k] for k in indices)
        return torch.stack([crop_and_resize(open_image(row.path), protocol) for row in rows])


def describe(cascade: Cascade, protocol: Protocol, settings: Settings, data: str) -> dict[str, Any]:
    """Return everything that determines the pixels; the batch size does not."""
    prior = stage_of_prior(settings.prior)
    stages = dict.fromkeys(("clip", prior, *stages_for(protocol.resolution)))
    require_stages(cascade, stages)
    used = {name: cascade.metadata[name] for name in stages}
    guidance = {prior: settings.prior_guidance_scale, "decoder": settings.guidance_scale}
    sampling = {
        "prior" if name == prior else name: _sampling_of(
            used[name], guidance.get(name), settings.steps.get(name)
        )
        for name in stages
        if name != "clip"
    }
    if settings.prior in ("linear", "none"):
        sampling["prior"] = {"sampler": settings.prior}
    return {
        "protocol": protocol.describe(),
        "data": data,
        "stages": {name: about.fingerprint for name, about in used.items()},
        "recipes": {name: fingerprint(about.recipe) for name, about in used.items()},
        "clip": weights_of(cascade.embedder),
        "dtype": str(cascade.dtype).removeprefix("torch."),
        "sampling": sampling,
        "seed": settings.seed,
    }


def require_stages(cascade: Cascade, names: Iterable[str]) -> None:
    """Check that a bundle has some stages; the error has the command that trains a missing one."""
    for name in names:
        file = stage_file(cascade.folder, name)
        if not file.is_file():
            raise missing(file)


def _sampling_of(
    metadata: StageMetadata, guidance_scale: float | None, steps: int | None
) -> dict[str, Any]:
    """Return a stage's sampler, its arguments and its guidance; None is the stage's own."""
    with torch.device("meta"):  # no memory for its weights
        stage = build(metadata.recipe)
    sampler = getattr(stage, "sampler", None)  # an autoregressive prior has none
    described = {"sampler": "autoregressive"}
    if sampler is not None:
        described = {"sampler": sampler.func.__name__, **sampler.keywords}
        described |= {} if steps is None else {"steps": steps}
    scale = getattr(stage, "guidance_scale", None) if guidance_scale is None else guidance_scale
    return described if scale is None else described | {"guidance_scale": float(scale)}


def generate(
    sampling: Sampling,
    prompts: Sequence[Prompt],
    protocol: Protocol,
    out: Path,
    *,
    data: str,
    ranks: Ranks | None = None,
) -> ImageFolder:
    """Sample an image of each prompt into a folder of OUT named by the protocol and all settings.

    Image k has the seed `settings.seed` + k. The prompts are cut into blocks of one batch; a block
    is skipped if all of its images are there, and otherwise sampled as a whole, so an image has the
    same neighbors, and so the same rounding, in every run.

    `data` is the fingerprint of the data that the prompts come from; `ranks` share the work.
    """
    ranks, settings = ranks or Ranks(), sampling.settings
    made_with = describe(sampling.cascade, protocol, settings, data)
    named = {k: v for k, v in made_with["protocol"].items() if k not in ("name", "hash")}
    path = out / f"{protocol.name}-{fingerprint({**made_with, 'protocol': named})}"
    folder = ImageFolder.create(path, prompts, made_with, seed=settings.seed)
    quiet = Sampling(replace(settings, progress=False), sampling.cascade)
    own = ranks.blocks(len(prompts), settings.batch_size)
    with tqdm(
        total=sum(map(len, own)),
        desc=f"images of {protocol.name}",
        unit="image",
        disable=not (settings.progress and ranks.first),
    ) as bar:
        for block in own:
            if folder.is_missing(block):
                captions = [prompts[k].text for k in block]
                images = quiet.text_to_image(captions, size=protocol.resolution, first=block.start)
                for k, image in zip(block, images, strict=True):
                    folder.write(k, image)
            bar.update(len(block))
    ranks.wait()
    return folder


def _read_manifest(manifest: Path, files: Sequence[Path]) -> list[GeneratedImage]:
    """Read which image has which prompt; of 0.png and 0.jpg, the id 0 means the first."""
    rows = []
    preferred = sorted(files, key=lambda file: _SUFFIXES.index(file.suffix.lower()))
    found = {file.stem: file for file in reversed(preferred)} | {file.name: file for file in files}
    for number, line in enumerate(split_lines(read_text(manifest)), 1):
        try:
            entry = parse_json(line, manifest)
            name = Path(str(entry["file"])).name if "file" in entry else str(entry["id"])
            prompt, seed = str(entry["prompt"]), entry.get("seed")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f'line {number} of {manifest} is not {{"id": …, "prompt": …}}: {error!r}'
            ) from error
        file = found.get(name) or found.get(_file_stem(name))
        if file is None:
            raise FileNotFoundError(
                f"{manifest} lists {name}, which is missing: finish the sampling first"
            )
        rows.append(GeneratedImage(str(entry["id"]), file, prompt, seed))
    return rows


def _file_stem(name: str) -> str:
    """Return a sample's name as a file name: names of other people's samples may have slashes."""
    stem = quote(name, safe=" ")
    if len(stem) > 200:  # most file systems allow 255 bytes
        stem = f"{stem[:150]}-{fingerprint(name)}"
    return f"%2E{stem[1:]}" if stem.startswith(".") else stem  # files with a dot are not images
