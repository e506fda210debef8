"""Map the controls of the page (`src/app.py`) to the commands of sample.py and calls of `Cascade`.

This module has neither components nor networks. A request is an iterator that yields what to show:
it writes each image into its session's folder, with the metadata that sample.py writes.
"""

import json
import shutil
import tempfile
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from cli.page_session import Session
from cli.ranges import check_ranges
from cli.sample import build_parser
from cli.sample_images import best_jobs, edit_results, generate, metadata_of, text_results
from cli.sample_output import open_cascade, read_command, slug, write_gif, write_png
from unclip.contact_sheet import Tile, contact_sheet
from unclip.emoji import prompts
from unclip.files import read_text, sha256_of
from unclip.images import to_pil
from unclip.model_card import CARD
from unclip.sampling_run import Progress
from unclip.stages import DecoderStage
from unclip.text_to_image import PRIORS, STAGE_OF_SIZE, stage_of_prior, stages_for

MAX_TEXT = 1000  # characters of a prompt
MAX_IMAGES, MAX_BEST_OF, MAX_CELLS, MAX_STEPS = 16, 8, 25, 100  # of one request
SESSIONS = 50
GIF_SIZE = SHEET_SIZE = 256
DIMENSIONS = (1, 2, 4, 8, 16, 32, 64, 128)  # principal components kept in Look inside
EXAMPLES = 160  # embeddings from which the components are computed

# Edits by name, with their commands of sample.py and the arguments that each uses.
EDITS = {
    "Variations": ("vary", ("count", "eta")),
    "Interpolate": ("interpolate", ("second", "frames", "noise")),
    "Text edit": ("edit", ("source", "target", "strength", "frames")),
    "Inpaint": ("inpaint", ("painting", "prompt", "count")),
    "Outpaint": ("inpaint", ("prompt", "count", "margin")),
    "Reconstruct": ("reconstruct", ()),
}
# Types of the controls.
TYPES = {
    **dict.fromkeys(("guidance", "prior_guidance", "eta", "strength", "margin"), float),
    **dict.fromkeys(("size", "seed", "count", "best_of", "frames"), int),
    **dict.fromkeys(("prior_steps", "decoder_steps"), int),
    **dict.fromkeys(("prompt", "prior", "source", "target", "noise"), str),
}
LIMITS = {"count": MAX_IMAGES, "frames": MAX_IMAGES, "best_of": MAX_BEST_OF}
LIMITS |= {"prior_steps": MAX_STEPS, "decoder_steps": MAX_STEPS}


class Made(NamedTuple):
    """The result of an edit: images with captions, an animation, and a ZIP of all files."""

    images: list[tuple[Path, str]]
    gif: Path | None
    archive: Path


class Page:
    """A loaded bundle, whose networks run in a thread of their own, and the sessions that use it.

    Args:
        args: the arguments of `cli.sample.add_loading`.

    Attributes:
        sizes, priors: the bundle's sizes of images, and its priors.
        concept_set: the emoji concepts that the bundle was trained on; empty if it was not.
        about: the part of its model card about what it knows; empty if it has no card.
    """

    def __init__(self, args: Namespace):
        args.size = None
        self.cascade = cascade = open_cascade(args)
        cascade.require("clip", "decoder")
        self.dtype = args.dtype
        self.sizes = [size for size in STAGE_OF_SIZE if size <= cascade.size]
        self.priors = [name for name, stage in PRIORS.items() if stage in cascade.metadata]
        self.guidance_scale = cast(DecoderStage, cascade.stage("decoder")).guidance_scale
        sets = {str(stage.extra.get("concept_set", "")) for stage in cascade.metadata.values()}
        self.concept_set = max(sets, key="SML".find)
        card = cascade.folder / CARD
        known = read_text(card).partition("## What it knows")[2] if card.is_file() else ""
        self.about = known.partition("\n## ")[0].strip()
        if not args.offload:
            for name in cascade.metadata.keys() - {"clip"}:
                cascade.stage(name)
        self.folder = Path(tempfile.mkdtemp(prefix="unclip-page-"))
        self.sessions: dict[str, Session] = {}
        self._thread = ThreadPoolExecutor(1)
        self._examples: Tensor | None = None

    def session(self, key: str) -> Session:
        """Return a browser's session; of too many, the one not used for longest is deleted."""
        session = self.sessions.pop(key, None)
        if session is None and len(self.sessions) >= SESSIONS:
            self.forget(next(iter(self.sessions)))
        self.sessions[key] = session or Session(Path(tempfile.mkdtemp(dir=self.folder)))
        return self.sessions[key]

    def forget(self, key: str) -> None:
        """Stop the requests of a session, and delete its images."""
        if session := self.sessions.pop(key, None):
            session.stopped = True
            shutil.rmtree(session.folder, ignore_errors=True)

    def close(self) -> None:
        """Stop all requests and delete all images."""
        for key in list(self.sessions):
            self.forget(key)
        self._thread.shutdown()
        shutil.rmtree(self.folder, ignore_errors=True)

    def compute(
        self, progress: Progress, request: Iterator[Any], warn: Callable[[str], Any]
    ) -> Iterator[Any]:
        """Yield what a request yields, and pass it the warnings; all requests share one thread.

        Each new thread that runs a network would start, and keep, threads of its own.
        """
        run = copy_context().run  # the context holds the progress bar of the page

        def advance() -> tuple[Any, list[str]]:
            with warnings.catch_warnings(record=True, action="always") as caught:
                item = next(request, None)
            return item, [str(one.message) for one in caught if one.category is UserWarning]

        while True:
            progress("next stage", 0, 1)
            item, messages = self._thread.submit(run, advance).result()
            for message in dict.fromkeys(messages):
                warn(message)
            if item is None:
                return
            yield item

    def create(
        self, session: Session, progress: Progress, **controls: Any
    ) -> Iterator[list[tuple[Path, str]]]:
        """Generate images of a prompt, and yield them in each size on the way.

        With `best_of` N, N times as many images of the smallest size are generated first.
        """
        args = self._arguments("text", **{"best_of": 1, **controls})
        jobs = [(args.prompt, args.seed + k) for k in range(args.count * args.best_of)]
        args.batch = jobs
        if vars(args).pop("best_of") > 1:
            candidates, report = [], _labeled(progress, "candidates")
            for start in range(0, len(jobs), args.count):
                args.batch = jobs[start : start + args.count]
                candidates.append(next(self._sizes(args, report)))
            args.batch = best_jobs(self.cascade, jobs, torch.cat(candidates), args.count)
        captions = [f"seed {seed}" for _, seed in args.batch]
        older = session.images
        for images in self._sizes(args, progress):
            paths = session.keep(text_results(self.cascade, args, images), older)
            yield list(zip(paths, captions, strict=True))

    def edit(
        self, session: Session, progress: Progress, *, operation: str, **controls: Any
    ) -> Iterator[Made]:
        """Edit an image, or interpolate between two."""
        command, uses = EDITS[operation]
        layers = (controls.pop("painting") or {}).get("layers", [])
        inputs = [controls.pop("image"), controls.pop("second")]
        used = {"size", "seed", "guidance", "decoder_steps", *uses} & controls.keys()
        args = self._arguments(command, **{key: controls[key] for key in used})
        args.images = [session.take(path) for path in inputs[: 1 + (command == "interpolate")]]
        args.mask = session.take_mask(layers) if operation == "Inpaint" else None
        if command == "edit" and not args.target.strip():
            raise ValueError("the new text is blank: describe the result")
        images, captions = generate(self.cascade, args, progress)
        files = [path for path in [*args.images, args.mask] if path]
        args.images = [Path(path.name) for path in args.images]
        args.mask = args.mask and Path(args.mask.name)
        hashes = {path.name: sha256_of(path) for path in files}
        results = edit_results(self.cascade, args, images[args.size], hashes)
        paths, gif = session.keep(results), None
        if "frames" in uses:
            frames = [to_pil(image) for image in images[min(GIF_SIZE, args.size)]]
            metadata = metadata_of(self.cascade, args, inputs=hashes)
            gif = write_gif(frames, session.folder, f"{results[0].name}-frames", metadata)
            files.append(gif)
        archive = session.folder / f"{results[0].name}.zip"
        with zipfile.ZipFile(archive, "w") as file:
            for path in [*paths, *files]:
                file.write(path, path.name)
        yield Made(list(zip(paths, captions, strict=True)), gif, archive)

    def compare(
        self,
        session: Session,
        progress: Progress,
        *,
        columns: str,
        column_values: str,
        rows: str,
        row_values: str,
        **controls: Any,
    ) -> Iterator[Path]:
        """Generate one prompt over a grid of two settings; yield the sheet after each image."""
        if columns == rows:
            raise ValueError("rows and columns are the same setting: choose two different ones")
        axes = [(rows, row_values), (columns, column_values)]
        down, across = (
            [_convert(name.replace(" ", "_"), value.strip()) for value in values.split(",")]
            for name, values in axes
        )
        if (cells := len(down) * len(across)) > MAX_CELLS:
            raise ValueError(f"{cells} images: a grid can have at most {MAX_CELLS}")
        tiles: list[Tile] = []
        for row, column in product(down, across):
            varied = {rows.replace(" ", "_"): row, columns.replace(" ", "_"): column}
            args = self._arguments("text", **{"count": 1, **controls, **varied})
            args.batch = [(args.prompt, args.seed)]
            report = _labeled(progress, f"image {len(tiles) + 1} of {cells}")
            *_, images = self._sizes(args, report)
            session.keep(text_results(self.cascade, args, images))
            tiles.append(Tile(images[0], f"{columns} {_short(column)} · {rows} {_short(row)}"))
            blank = [Tile(torch.full_like(images[0], 240), "")] * (cells - len(tiles))
            sheet = contact_sheet(
                [*tiles, *blank], columns=len(across), size=SHEET_SIZE, title=args.prompt
            )
            captions = "\n".join(tile.caption for tile in tiles)
            more = {"prompt": args.prompt, "seed": str(args.seed), "captions": captions}
            metadata = metadata_of(self.cascade, args, **more)
            yield write_png(sheet, session.folder, f"{slug(args.prompt)}-compare", metadata)

    def components(
        self, session: Session, progress: Progress, *, image: str | None, seed: int, size: int
    ) -> Iterator[list[tuple[Path, str]]]:
        """Decode an image's embedding reduced to its first principal components."""
        path = session.take(image)
        if self._examples is None:
            about = [prompt.caption for prompt in prompts(self.concept_set or "S", count=EXAMPLES)]
            seeds = range(EXAMPLES)
            prior = {"prior": self.priors[0], "batch_size": 32}
            self._examples = self.cascade.prior(about, seeds=seeds, progress=progress, **prior)
        kept = [count for count in DIMENSIONS if count <= min(self._examples.shape)]
        args = self._arguments("vary", seed=seed, size=size)
        made = self.cascade.pca_reconstruct(
            path, kept, self._examples, size=args.size, seed=args.seed, progress=progress
        )
        captions = [f"{count} component{'s' * (count > 1)}" for count in kept]
        args.command, args.images = "components", [Path(path.name)]
        hashes = {path.name: sha256_of(path)}
        results = edit_results(self.cascade, args, made.images[args.size], hashes)
        yield [(path, "the image"), *zip(session.keep(results), captions, strict=True)]

    def importance(
        self, session: Session, progress: Progress, **controls: Any
    ) -> Iterator[list[tuple[Path, str]]]:
        """Decode a prompt without an embedding, with its z_t, and with the prior's z_i."""
        args = self._arguments("text", count=1, **controls)
        args.batch, shown = [(args.prompt, args.seed)], []
        kinds = {"caption only": None, "caption + z_t": "none", "caption + z_i": self.priors[0]}
        for caption, prior in kinds.items():
            args.prior, args.command = prior or "none", "text" if prior else "caption only"
            *_, images = self._sizes(args, _labeled(progress, caption), embed=prior is not None)
            results = text_results(self.cascade, args, images)
            shown.append((session.keep(results)[0], caption))
            yield shown

    def restore(self, session: Session, path: str | Path) -> tuple[str, dict[str, Any], list[str]]:
        """Return the command of an image, the controls that generate it again, and remarks."""
        metadata = read_command(Path(path))
        known = {sha256_of(file): str(file) for file in session.folder.iterdir()}
        own = {name: stage.fingerprint for name, stage in self.cascade.metadata.items()}
        try:
            controls, notes, missing = _controls(metadata), [], []
            if not json.loads(metadata["bundle"]).items() <= own.items():
                notes.append("another bundle made this image: this one makes a different image")
            settings, hashes = (json.loads(metadata.get(k, "{}")) for k in ("settings", "inputs"))
            for key, file in zip(("image", "second"), settings.get("images", []), strict=False):
                controls[key] = known.get(hashes[file])
                missing += [] if controls[key] else [Path(file).name]
            if missing:
                notes.append(f"choose the input again, which is not in a PNG: {', '.join(missing)}")
            if settings.get("mask"):
                notes.append("paint the mask again")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{Path(path).name} has damaged metadata") from error
        return metadata["command"], controls, notes

    def _arguments(self, command: str, **controls: Any) -> Namespace:
        """Return the arguments of a command: its defaults, changed by the controls."""
        required = {"text": [], "edit": ["-", "--to", "-"]}.get(command, ["-"])
        args = build_parser().parse_args([command, *required])
        given = {key: _convert(key, one) for key, one in controls.items() if one not in (None, "")}
        check_ranges(given)
        for key, most in LIMITS.items():
            if not 1 <= given.get(key, 1) <= most:
                name = key.replace("_", " ")
                raise ValueError(f"{name} is {given[key]}; on the page it can be 1 to {most}")
        if any(isinstance(text, str) and len(text) > MAX_TEXT for text in given.values()):
            raise ValueError(f"a text is too long: the page takes at most {MAX_TEXT} characters")
        steps = {stage: given.pop(f"{stage}_steps", None) for stage in ("prior", "decoder")}
        args.steps = {stage: count for stage, count in steps.items() if count}
        if command == "text":
            args.prompt = ""
        vars(args).update({"dtype": self.dtype, "size": self.cascade.size} | given)
        return args

    def _sizes(self, args: Namespace, progress: Progress, embed: bool = True) -> Iterator[Tensor]:
        """Generate the images of `args.batch` stage by stage; yield them in each size."""
        texts, seeds = zip(*args.batch, strict=True)
        run: dict[str, Any] = {"seeds": seeds, "batch_size": len(seeds), "steps": args.steps}
        run["progress"] = progress
        self.cascade.require("clip", stage_of_prior(args.prior), *stages_for(args.size))
        prior = {"prior": args.prior, "guidance_scale": args.prior_guidance}
        z = self.cascade.prior(texts, **prior, **run) if embed else None
        guidance = {"size": min(STAGE_OF_SIZE), "guidance_scale": args.guidance}
        images = self.cascade.decode(z, texts, **guidance, **run).images[guidance["size"]]
        yield images
        for size in STAGE_OF_SIZE:
            if images.shape[-1] < size <= args.size:
                images = self.cascade.upsample(images, size=size, **run)[size]
                yield images


def _labeled(progress: Progress, label: str) -> Progress:
    return lambda stage, step, steps: progress(f"{label}: {stage}", step, steps)


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _convert(key: str, value: Any) -> Any:
    """Convert a control's value to its type; that of a program can have another one."""
    kind = TYPES[key]
    try:
        if isinstance(value, str if kind is str else str | int | float):
            return kind(value)
    except (ValueError, OverflowError):
        pass
    what = "text" if kind is str else "a number"
    raise ValueError(f"{key.replace('_', ' ')} is {value!r:.40}: give {what}")


def _controls(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the values of the controls that are stored in an image."""
    settings, batch = json.loads(metadata["settings"]), json.loads(metadata.get("batch", "[]"))
    settings |= {key: metadata[key] for key in ("prompt", "seed") if key in metadata}
    if batch and batch == [
        [settings["prompt"], batch[0][1] + number] for number in range(len(batch))
    ]:
        settings |= {"seed": batch[0][1], "count": len(batch)}
    elif batch:
        settings["count"] = 1
    controls = {
        key: None if settings[key] is None else convert(settings[key])
        for key, convert in TYPES.items()
        if key in settings
    }
    steps = {f"{stage}_steps": settings["steps"].get(stage) for stage in ("prior", "decoder")}
    return {**controls, **steps, "best_of": 1}
