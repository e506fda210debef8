"""Race our decoder against DALLE2-pytorch's: equal parameters, data, CLIP embeddings and CPU time.

Both are trained from scratch on one thread each, given the bundle's CLIP and prior.
"""

import unclip  # isort: skip  # noqa: F401 (first: torchvision then imports next to a CPU torch)

import argparse
import json
import os
import subprocess
import sys
import venv
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from race_loop import Batch, Racer, Rules, batch_of, race
from results import markdown, write_results
from safetensors.torch import load_file, save_file
from torch import Tensor

from cli.config_check import ConfigurationError, compose_strictly
from unclip import bundle
from unclip.bundle import load_embedder, stage_file
from unclip.cascade import Cascade
from unclip.contact_sheet import Tile, contact_sheet
from unclip.emoji.probes import concept_set
from unclip.emoji.templates import Templates
from unclip.evaluation.choices import judge_choices
from unclip.evaluation.context import HELD_OUT, SEEN, VALIDATION
from unclip.evaluation.emoji_scenes import measure_scenes, read_singles
from unclip.evaluation.features import EfficientNetLite0, encode_images, extract
from unclip.evaluation.image_stages import frechet_distances
from unclip.evaluation.sources import Real, read_real
from unclip.evaluation.stages import varied
from unclip.images import save_png, to_uint8
from unclip.training.optim import parameter_groups
from unclip.training.trainer import resolve_precision, tune_malloc

ROOT = Path(__file__).parents[1]
OURS, PEER, REAL = "unclip", "DALLE2-pytorch", "real renders"
ENVIRONMENT = ROOT / ".venv-race"  # the peer needs older versions of packages that unclip needs
PACKAGES = ("torch", "torchvision", "dalle2-pytorch==1.15.6")

Images = dict[str, Tensor]  # by split
Scores = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="bundle with clip, judge, prior")
    parser.add_argument("--seconds", type=float, default=1600, help="CPU time of each training")
    parser.add_argument("--out", type=Path, default=Path("runs/race"), help="folder of the results")
    parser.add_argument("--count", type=int, default=200, help="number of seen captions")
    parser.add_argument("--seed", type=int, default=0, help="seed of both trainings")
    parser.add_argument("--without-peer", action="store_true", help="train and score ours only")
    parser.add_argument("overrides", nargs="*", help="of conf/train.yaml, such as scale=emoji")
    try:
        run(parser.parse_args())
    except (ConfigurationError, ValueError, OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"race.py: {error}")


def run(arguments: argparse.Namespace) -> None:
    """Cache the data, train and sample both decoders, and score them."""
    config = compose_strictly("train", ["stage=decoder", *arguments.overrides])
    torch.set_num_threads(1)
    tune_malloc()
    out, root = arguments.out, Path(config.data.root)
    out.mkdir(parents=True, exist_ok=True)
    python = None if arguments.without_peer else peer_environment()
    cascade = Cascade.load(arguments.model, device="cpu")
    counts = {SEEN: arguments.count, HELD_OUT: max(arguments.count // 2, 1)}
    real = {split: read_real(root, split, 64, count=count) for split, count in counts.items()}
    train = cache(cascade, read_real(root, "train", 64), real, out)
    rules = {
        "seconds": arguments.seconds,
        "seed": arguments.seed,
        "batch_size": config.data.batch_size,
        "warm_up_steps": config.schedule.warm_up_steps,
        "ema_decay": config.callbacks.ema.decay,
        "bf16": resolve_precision(config.trainer.precision, "cpu") == "bf16-mixed",
        "image_dim": train["image_embedding"].shape[1],
        "tokens": train["text_states"].shape[1],
        "text_dim": train["text_states"].shape[2],
    }
    about, images = {OURS: race(out, OURS, rules, partial(enter, config, cascade))}, {}
    if python is not None:
        about[PEER] = race_peer(python, {**rules, "parameters": about[OURS]["parameters"]}, out)
    for name in about:
        loaded = load_file(out / f"{name}.safetensors")["image"]
        images[name] = dict(zip(real, loaded.split([len(r) for r in real.values()]), strict=True))
    images[REAL] = {split: shown.images for split, shown in real.items()}
    scores = score(cascade, images, real, root)
    contenders = {name: about.get(name, {}) | scores[name] for name in images}
    given = {"model": arguments.model, "data": root, "overrides": arguments.overrides}
    write_results(out / "race.json", "race", **given, rules=rules, contenders=contenders)
    save_png(sheet(images, real), out / "race.png")
    print(f"{summary(contenders)}\n\nresults: {out / 'race.json'}\nimages: {out / 'race.png'}")


def peer_environment() -> Path:
    """Return the Python of the peer's virtual environment, which the first race creates."""
    python, done = ENVIRONMENT / "bin" / "python", ENVIRONMENT / "installed"
    if not done.is_file():
        print(f"installing DALLE2-pytorch into {ENVIRONMENT}: 1.6 GB", flush=True)
        venv.create(ENVIRONMENT, with_pip=True)
        pip = [python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt"]
        subprocess.run([*pip, *PACKAGES], check=True)
        done.touch()
    return python


def cache(cascade: Cascade, train: Real, test: dict[str, Real], out: Path) -> Batch:
    """Write the inputs of both decoders, train.safetensors and test.safetensors; return the first.

    Training images have their own image embeddings, test captions, split by split, the prior's.
    """

    def text(captions: list[str]) -> Batch:
        starts = range(0, len(captions), 256)
        parts = [cascade.embedder.text(captions[k : k + 256])._asdict() for k in starts]
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return {**joined, "text_states": joined["text_states"].half()}

    z = encode_images(cascade.embedder, train.images)
    inputs = {"image": train.images, "image_embedding": z, **text(train.captions)}
    save_file(inputs, out / "train.safetensors")
    captions = [caption for split in test.values() for caption in split.captions]
    z = cascade.prior(captions, seeds=range(len(captions)), batch_size=50)
    save_file({"image_embedding": z.contiguous(), **text(captions)}, out / "test.safetensors")
    return inputs


def enter(config: DictConfig, cascade: Cascade, train: Batch) -> Racer:
    """Build the preset's decoder and fit its statistics."""
    stage = bundle.build(OmegaConf.to_container(config.model, resolve=True))
    stage.to(memory_format=torch.channels_last)

    def scaled(batch: Batch) -> Batch:
        image = batch["image"].to(memory_format=torch.channels_last)
        return {**batch, "image": image.float().div_(127.5).sub_(1.0)}

    def batches():
        for rows in torch.arange(len(train["image"])).split(256):
            yield scaled(batch_of(train, rows))

    def loss(batch: Batch) -> Tensor:
        return stage.loss(scaled(batch))["loss"]

    def sample(batch: Batch, seeds: range) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return to_uint8(stage.sample(stage.condition(batch), generators=generators))

    stage.fit_statistics(batches())
    stage.fit_null_text(cascade.embedder.text([""])._asdict())
    optimizer = instantiate(OmegaConf.to_container(config.optimizer, resolve=True))
    optimizer = optimizer(parameter_groups(stage))
    about = {"evaluations": config.sampler.steps, "guidance_scale": stage.guidance_scale}
    return Racer(stage, optimizer, loss, lambda: stage.fit_variance(batches()), sample, about)


def race_peer(python: Path, rules: Rules, out: Path) -> dict[str, Any]:
    """Run race_peer.py in the peer's environment and return its description of the race."""
    (out / "rules.json").write_text(json.dumps(rules) + "\n")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    environment.pop("PYTHONPATH", None)  # of another environment
    script = Path(__file__).with_name("race_peer.py")
    subprocess.run([python, script, out], check=True, env=environment)
    return json.loads((out / f"{PEER}.json").read_text())


def score(
    cascade: Cascade, images: dict[str, Images], real: dict[str, Real], root: Path
) -> dict[str, Scores]:
    """Measure each decoder's Fréchet distance, judge's choices and scenes of two objects."""
    reference = read_real(root, VALIDATION, 64, count=len(real[SEEN])).images
    network, judge = EfficientNetLite0(), load_embedder(stage_file(cascade.folder, "judge"))
    count = min(len(real[SEEN]), len(reference))
    features = {name: extract(network, splits[SEEN][:count]) for name, splits in images.items()}
    distances = frechet_distances(features, extract(network, reference[:count]))
    templates = None
    if known := concept_set(root):
        singles = read_singles(root)
        templates = Templates.cut(singles.images, singles.metadata, known)
    scores: dict[str, Scores] = {}
    for name, splits in images.items():
        distance = {**distances[name], "n": count}
        scores[name] = found = {"fd_effnet_lite0": distance, "judge": {}, "two_objects": {}}
        for split, shown in real.items():
            choices = judge_choices(judge, splits[split], shown.captions, {})
            found["judge"][split] = choices["caption"]
            if templates is not None:
                generated = replace(shown, images=splits[split])
                found["two_objects"][split] = measure_scenes(generated, templates)
    return scores


def summary(contenders: dict[str, Scores]) -> str:
    """Format the scores as a table."""
    rows = []
    for name, found in contenders.items():
        keys = ("parameters", "cpu_seconds", "steps", "evaluations")
        row = {"decoder": name} | {key: found.get(key) for key in keys}
        row |= {f"FD {key}": found["fd_effnet_lite0"][key] for key in ("distance", "error", "n")}
        for split, words in ((SEEN, "seen"), (HELD_OUT, "held out")):
            shares = {"judge": found["judge"][split]}
            shares["both objects"] = found["two_objects"].get(split, {}).get("both", {})
            for key, share in shares.items():
                row |= {f"{key}, {words}": share.get("share"), f"n {key}, {words}": share.get("n")}
        rows.append(row)
    return markdown(rows)


def sheet(images: dict[str, Images], real: dict[str, Real]) -> Image.Image:
    """Plot the images of all decoders for the same captions side by side."""
    tiles = []
    for split, shown in real.items():
        for row in varied(shown, 6):
            captions = {name: f"{name}: {shown.captions[row]}" for name in images}
            marked = split == HELD_OUT
            tiles += [Tile(images[k][split][row], captions[k], marked=marked) for k in images]
    return contact_sheet(tiles, columns=len(images), title="framed: held out", lines=4)


if __name__ == "__main__":
    main()
