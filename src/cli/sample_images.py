"""Generate the images of a sample.py command, and write them with their metadata."""

import math
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from cli.sample import log
from cli.sample_output import open_cascade, progress_bar, slug, write_gif, write_png
from unclip.cascade import SIZE, Cascade
from unclip.contact_sheet import Tile, contact_sheet
from unclip.files import read_text, sha256_of, split_lines
from unclip.images import to_pil
from unclip.latents import evenly_spaced
from unclip.provenance import image_metadata
from unclip.sampling_run import Progress
from unclip.text_to_image import stage_of_prior, stages_for

SHEET_SIZE, SHEET_TILES = 256, 100
# Arguments that are not settings of the images; prompts and seeds are stored per image.
_NOT_SETTINGS = {"command", "model", "out", "device", "offload", "grid", "gif", "stages", "profile"}
_PER_IMAGE = {"prompt", "prompts", "prompts_file", "seed", "count", "keep", "batch_size", "batch"}


def run(args: Namespace) -> None:
    """Generate and write the images of a command."""
    args.steps = dict(sorted(args.steps))
    if args.out.is_file():  # before images are computed
        raise NotADirectoryError(f"--out {args.out} is a file: name a folder")
    if args.command == "text":
        args.prompts = _prompts(args)
        _run_text(args)
    else:
        _run_edit(args)


def _prompts(args: Namespace) -> list[str]:
    """Return the prompts of the command line and of the file."""
    prompts = list(args.prompts)
    if args.prompts_file is not None:
        lines = split_lines(read_text(args.prompts_file))
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError('no prompt: try `python src/sample.py "a red apple"`, or --prompts FILE')
    if any(not prompt.strip() for prompt in prompts):
        raise ValueError("a prompt is blank: describe the image")
    return prompts


def _run_text(args: Namespace) -> None:
    """Generate the images of prompts, and write each batch as soon as it is finished."""
    seeds = range(args.seed, args.seed + args.count)
    jobs = [(prompt, seed) for prompt in args.prompts for seed in seeds]
    if args.keep is not None and args.keep > args.count:
        raise ValueError(f"--keep {args.keep} is more than --count {args.count}")
    cascade, tiles = open_cascade(args), []
    if args.keep is not None:
        small = Namespace(**{**vars(args), "size": SIZE})
        candidates = [images[SIZE] for images, _ in _batches(cascade, small, jobs, "candidates")]
        jobs = best_jobs(cascade, jobs, torch.cat(candidates), args.keep)
    # Kept candidates are generated again: an image's metadata describe its own batch.
    for images, captions in _batches(cascade, args, jobs, "images"):
        for size in sorted(images) if args.stages else [args.size]:
            _write(text_results(cascade, args, images[size]), args)
        tiles += map(Tile, images[min(SHEET_SIZE, args.size)], captions)
    for start in range(0, len(tiles) if args.stages or args.grid else 0, SHEET_TILES):
        page = tiles[start : start + SHEET_TILES]
        count = args.keep or args.count
        columns = count if count > 1 else math.ceil(math.sqrt(len(page)))
        _write_sheet(page, min(columns, 10), args, "sheet", metadata_of(cascade, args))


def _batches(
    cascade: Cascade, args: Namespace, jobs: Sequence[tuple[str, int]], name: str
) -> Iterator[tuple[dict[int, Tensor], list[str]]]:
    """Set `args.batch` to each batch of (prompt, seed), and yield its images and captions."""
    for start in range(0, len(jobs), args.batch_size):
        args.batch = jobs[start : start + args.batch_size]
        label = f"{name} {start + 1}–{start + len(args.batch)} of {len(jobs)}"
        with progress_bar(label, args) as progress:
            batch = generate(cascade, args, progress)
        yield batch


def best_jobs(
    cascade: Cascade, jobs: Sequence[tuple[str, int]], images: Tensor, keep: int
) -> list[tuple[str, int]]:
    """Return the `keep` jobs of each prompt whose images CLIP ranks highest, best first."""
    scores = cascade.clip_scores(list(images), [prompt for prompt, _ in jobs]).tolist()
    ranked: dict[str, list[tuple[str, int]]] = {prompt: [] for prompt, _ in jobs}
    for _, job in sorted(set(zip(scores, jobs, strict=True)), reverse=True):  # a prompt may repeat
        ranked[job[0]].append(job)
    return [job for best in ranked.values() for job in best[:keep]]


def _run_edit(args: Namespace) -> None:
    """Edit images, and write the results, a contact sheet and an animation."""
    args.mask = getattr(args, "mask", None)
    inputs = {str(path): sha256_of(path) for path in [*args.images, args.mask] if path}
    cascade = open_cascade(args)
    with progress_bar(args.command, args) as progress:
        images, captions = generate(cascade, args, progress)
    results = edit_results(cascade, args, images[args.size], inputs)
    _write(results, args)
    metadata = metadata_of(cascade, args, inputs=inputs)
    stem = f"{slug(args.images[0].stem)}-{args.command}-seed{args.seed}"
    if args.grid:
        tiles = list(map(Tile, images[min(SHEET_SIZE, args.size)], captions))
        _write_sheet(tiles, min(6, len(tiles)), args, f"{stem}-sheet", metadata)
    if args.gif:
        frames = [result.image for result in results]
        log(write_gif(frames, args.out, f"{stem}-{args.size}", metadata), sys.stdout)


class Result(NamedTuple):
    """A generated image with the name of its file, without suffix, and its metadata."""

    image: Image.Image
    name: str
    metadata: dict[str, str]


def text_results(cascade: Cascade, args: Namespace, images: Tensor) -> list[Result]:
    """Name and describe the images of `args.batch`, in one of their sizes."""
    size, results = images.shape[-1], []
    sized = Namespace(**{**vars(args), "size": size})
    for index, (prompt, seed) in enumerate(args.batch):
        more = {"prompt": prompt, "seed": str(seed), "batch": args.batch, "index": index}
        name = f"{slug(prompt)}-seed{seed}-{size}"
        results.append(Result(to_pil(images[index]), name, metadata_of(cascade, sized, **more)))
    return results


def edit_results(
    cascade: Cascade, args: Namespace, images: Tensor, inputs: Mapping[str, str]
) -> list[Result]:
    """Name and describe the images of an edit; `inputs` are the hashes of its files by path."""
    metadata = metadata_of(cascade, args, inputs=inputs)
    stem = f"{slug(args.images[0].stem)}-{args.command}-seed{args.seed}"
    return [
        Result(to_pil(image), f"{stem}-{index:02}-{args.size}", {**metadata, "index": str(index)})
        for index, image in enumerate(images)
    ]


def metadata_of(cascade: Cascade, args: Namespace, **more: Any) -> dict[str, str]:
    """Return the metadata of a command's images: its settings, and the stages that took part."""
    omitted = _NOT_SETTINGS | (_PER_IMAGE if args.command == "text" else set())
    settings = {key: value for key, value in vars(args).items() if key not in omitted}
    prior = getattr(args, "prior", "diffusion" if getattr(args, "prompt", None) else "none")
    stages = dict.fromkeys(["clip", stage_of_prior(prior), *stages_for(args.size)])
    fingerprints = {name: cascade.metadata[name].fingerprint for name in stages}
    return image_metadata(args.command, settings, fingerprints, **more)


def _write(results: Sequence[Result], args: Namespace) -> None:
    for image, name, metadata in results:
        log(write_png(image, args.out, name, metadata), sys.stdout)


def _write_sheet(
    tiles: Sequence[Tile], columns: int, args: Namespace, name: str, metadata: Mapping[str, str]
) -> None:
    sheet = contact_sheet(tiles, columns=columns, size=min(SHEET_SIZE, args.size))
    captions = "\n".join(tile.caption for tile in tiles)
    _write([Result(sheet, name, {**metadata, "captions": captions})], args)


def generate(
    cascade: Cascade, args: Namespace, progress: Progress | None = None
) -> tuple[dict[int, Tensor], list[str]]:
    """Return the images of a command by size, and a caption for each image.

    For the command `text`, `args.batch` has the prompt and the seed of each image.
    """
    run: dict[str, Any] = {"size": args.size, "guidance_scale": args.guidance}
    run |= {"steps": args.steps, "progress": progress}
    if args.command == "text":
        prompts, seeds = zip(*args.batch, strict=True)
        run |= {"prior": args.prior, "prior_guidance_scale": args.prior_guidance}
        images = cascade.text_to_image(prompts, seeds=seeds, batch_size=len(seeds), **run).images
        return images, [f"{prompt} · {seed}" for prompt, seed in args.batch]
    run |= {"seed": args.seed, "batch_size": args.batch_size}
    image = args.images[0]
    captions = [f"seed {args.seed + n}" for n in range(getattr(args, "count", 0))]
    if args.command == "vary":
        edited = cascade.vary(image, args.count, eta=args.eta, **run)
    elif args.command == "interpolate":
        rows = _weights(args)
        captions = [" : ".join(f"{weight:.2g}" for weight in row) for row in rows]
        edited = cascade.mix(args.images, rows, noise=args.noise, **run)
    elif args.command == "edit":
        run |= {"strength": args.strength, "frames": args.frames}
        angles = [args.strength * fraction for fraction in evenly_spaced(args.frames)]
        captions = [f"turned by {angle:.2f}" for angle in angles]
        edited = cascade.text_diff(image, args.source, args.target, **run)
    elif args.command == "reconstruct":
        captions = [Path(path).name for path in args.images]
        edited = cascade.reconstruct(args.images, **run)
    elif (args.margin is None) == (args.mask is None):
        raise ValueError("where to paint? Use --mask FILE, or --margin 0.25 to paint all around")
    elif args.mask is not None:
        edited = cascade.inpaint(image, args.mask, args.prompt, args.count, **run)
    else:
        edited = cascade.outpaint(image, args.prompt, args.count, margin=args.margin, **run)
    return edited.images, captions


def _weights(args: Namespace) -> list[list[float]]:
    """Return the weights of a mixture, or of frames from each image to the next."""
    if args.weights is not None:
        return [args.weights]
    if len(args.images) < 2:
        raise ValueError("interpolate needs two images or more")
    rows = []
    for start in range(len(args.images) - 1):
        for frame in range(min(start, 1), args.frames):  # each image once
            row = [0.0] * len(args.images)
            row[start + 1] = frame / max(args.frames - 1, 1)
            row[start] = 1 - row[start + 1]
            rows.append(row)
    return rows
