"""A resumable folder of generated images: one PNG per prompt, and how they were sampled."""

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import torch
from jaxtyping import UInt8
from torch import Tensor
from tqdm import tqdm

from unclip.bundle import StageMetadata, build, stage_file, train_command
from unclip.cascade import Cascade
from unclip.evaluation.distributed import Ranks
from unclip.evaluation.features import Images
from unclip.evaluation.networks import weights_of
from unclip.evaluation.protocol import Prompt, Protocol, fingerprint
from unclip.evaluation.sampling import Sampling, Settings
from unclip.evaluation.sources import crop_and_resize, open_image_file
from unclip.files import parse_json, read_json, read_text, split_lines, write_text
from unclip.images import open_image, save_png, to_pil
from unclip.text_to_image import stage_of_prior, stages_for

MANIFEST, SETTINGS = "manifest.jsonl", "settings.json"
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


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
    # how the images were sampled; {} if unknown
    settings: dict[str, Any] = field(default_factory=dict)

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
        settings_file = path / SETTINGS
        settings = read_json(settings_file) if settings_file.is_file() else {}
        if (path / MANIFEST).is_file():
            rows = _read_manifest(path / MANIFEST, files)
        else:
            rows = [GeneratedImage(file.stem, file, None, None) for file in files]
        return cls(path, rows, settings)

    @property
    def prompts(self) -> list[str] | None:
        """The prompt of every image; None if they are not known."""
        texts = [row.prompt for row in self.rows if row.prompt is not None]
        return texts if len(texts) == len(self.rows) else None

    def is_missing(self, block: Iterable[int]) -> bool:
        """Return whether an image of the block is missing or truncated."""
        return not all(_is_intact(self.rows[k].path) for k in block)

    def write(self, k: int, image: UInt8[Tensor, "3 height width"]) -> None:
        """Write image k atomically."""
        save_png(to_pil(image), self.rows[k].path)

    def load(self, indices: Iterable[int], protocol: Protocol) -> Images:
        """Load some images, cropped and resized as the protocol says if they have another size."""
        rows = (self.rows[k] for k in indices)
        return torch.stack([crop_and_resize(open_image_file(row.path), protocol) for row in rows])


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
            raise FileNotFoundError(f"{file} is missing: train it with `{train_command(name)}`")


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
    if guidance_scale is not None:
        return described | {"guidance_scale": float(guidance_scale)}
    own = {name: getattr(stage, name, None) for name in ("guidance_scale", "text_guidance_scale")}
    return described | {name: float(scale) for name, scale in own.items() if scale is not None}


def generate(
    cascade: Cascade,
    prompts: Sequence[Prompt],
    protocol: Protocol,
    settings: Settings,
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
    ranks = ranks or Ranks()
    made_with = describe(cascade, protocol, settings, data)
    named = {k: v for k, v in made_with["protocol"].items() if k not in ("name", "hash")}
    path = out / f"{protocol.name}-{fingerprint({**made_with, 'protocol': named})}"
    folder = ImageFolder.create(path, prompts, made_with, seed=settings.seed)
    sampling = Sampling(replace(settings, progress=False), cascade)
    own = ranks.blocks(len(prompts), settings.batch_size)
    with tqdm(
        total=sum(map(len, own)),
        desc=f"images of {protocol.name}",
        unit="image",
        disable=not (settings.progress and ranks.first),
    ) as bar:
        started, sampled = 0.0, 0
        for block in own:
            if folder.is_missing(block):
                captions = [prompts[k].text for k in block]
                images = sampling.text_to_image(
                    captions, size=protocol.resolution, first=block.start
                )
                for k, image in zip(block, images, strict=True):
                    folder.write(k, image)
                sampled += 1
                if sampled == 1:  # the first batch is slower
                    started = time.perf_counter()
                elif sampled == 3 and not bar.disable:
                    left = bar.total - bar.n - len(block)
                    seconds = (time.perf_counter() - started) / 2 / len(block)
                    about = timedelta(seconds=round(left * seconds))
                    bar.write(f"{bar.desc}: {left:,} to sample, in about {about}")
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


def _is_intact(file: Path) -> bool:
    try:
        open_image(file)
    except (OSError, ValueError):
        return False
    return True


def _file_stem(name: str) -> str:
    """Return a sample's name as a file name: names of other people's samples may have slashes."""
    stem = quote(name, safe=" ")
    if len(stem) > 200:  # most file systems allow 255 bytes
        stem = f"{stem[:150]}-{fingerprint(name)}"
    return f"%2E{stem[1:]}" if stem.startswith(".") else stem  # files with a dot are not images
