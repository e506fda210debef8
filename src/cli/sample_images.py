"""Generate the images of a sample.py command, and write them with their metadata."""

import math
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from cli.sample_output import open_cascade, progress_bar, slug, write_gif, write_png
from unclip.cascade import Cascade
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
_PER_IMAGE = {"prompts", "prompts_file", "seed", "count", "batch_size"}


def run(args: Namespace) -> None:
    """Generate and write the images of a command."""
    args.steps = dict(sorted(args.steps))
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
    cascade, tiles, trace = open_cascade(args), [], _trace(args)
    settings = {k: v for k, v in vars(args).items() if k not in _NOT_SETTINGS | _PER_IMAGE}
    for start in range(0, len(jobs), args.batch_size):
        batch = args.batch = jobs[start : start + args.batch_size]
        label = f"images {start + 1}–{start + len(batch)} of {len(jobs)}"
        with progress_bar(label, trace) as progress:
            images, captions = generate(cascade, args, progress)
        for size in sorted(images) if args.stages else [args.size]:
            for index, (prompt, seed) in enumerate(batch):
                more = {"prompt": prompt, "seed": str(seed), "batch": batch, "index": index}
                metadata = _metadata(cascade, args, {**settings, "size": size}, **more)
                name = f"{slug(prompt)}-seed{seed}-{size}"
                write_png(to_pil(images[size][index]), args.out, name, metadata)
        tiles += map(Tile, images[min(SHEET_SIZE, args.size)], captions)
    for start in range(0, len(tiles) if args.stages or args.grid else 0, SHEET_TILES):
        page = tiles[start : start + SHEET_TILES]
        columns = args.count if args.count > 1 else math.ceil(math.sqrt(len(page)))
        _write_sheet(page, min(columns, 10), args, "sheet", _metadata(cascade, args, settings))


def _run_edit(args: Namespace) -> None:
    """Edit images, and write the results, a contact sheet and an animation."""
    args.mask = getattr(args, "mask", None)
    inputs = {str(path): sha256_of(path) for path in [*args.images, args.mask] if path}
    cascade = open_cascade(args)
    settings = {k: v for k, v in vars(args).items() if k not in _NOT_SETTINGS}
    with progress_bar(args.command, _trace(args)) as progress:
        images, captions = generate(cascade, args, progress)
    metadata = _metadata(cascade, args, settings, inputs=inputs)
    frames = [to_pil(image) for image in images[args.size]]
    stem = f"{slug(args.images[0].stem)}-{args.command}-seed{args.seed}"
    for index, frame in enumerate(frames):
        name = f"{stem}-{index:02}-{args.size}"
        write_png(frame, args.out, name, {**metadata, "index": str(index)})
    if args.grid:
        tiles = list(map(Tile, images[min(SHEET_SIZE, args.size)], captions))
        _write_sheet(tiles, min(6, len(tiles)), args, f"{stem}-sheet", metadata)
    if args.gif:
        write_gif(frames, args.out, f"{stem}-{args.size}", metadata)


def _trace(args: Namespace) -> Path | None:
    return args.out / "profile.json.gz" if args.profile else None


def _metadata(
    cascade: Cascade, args: Namespace, settings: Mapping[str, Any], **more: Any
) -> dict[str, str]:
    prior = getattr(args, "prior", "diffusion" if getattr(args, "prompt", None) else "none")
    stages = dict.fromkeys(["clip", stage_of_prior(prior), *stages_for(settings["size"])])
    fingerprints = {name: cascade.metadata[name].fingerprint for name in stages}
    return image_metadata(args.command, settings, fingerprints, **more)


def _write_sheet(
    tiles: Sequence[Tile], columns: int, args: Namespace, name: str, metadata: Mapping[str, str]
) -> None:
    sheet = contact_sheet(tiles, columns=columns, size=min(SHEET_SIZE, args.size))
    captions = "\n".join(tile.caption for tile in tiles)
    write_png(sheet, args.out, name, {**metadata, "captions": captions})


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
