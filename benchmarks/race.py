"""Our decoder against DALLE2-pytorch's: equal parameters, data, CLIP embeddings and CPU time.

`python benchmarks/race.py --model models/emoji --seconds 1600 scale=emoji` trains both from scratch
on one thread each, the bundle's CLIP and prior given, and writes race.json and race.png.
"""

import unclip  # isort: skip  # noqa: F401 (first: torchvision then imports beside a CPU torch)

import argparse
import json
import os
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from race_loop import train_for
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from configuration import ConfigurationError, compose_strictly
from unclip import bundle
from unclip.cascade import Cascade
from unclip.evaluation.features import EfficientNetLite0, extract
from unclip.evaluation.gallery import varied
from unclip.evaluation.measures import embed_images, frechet_distances, judge_choices
from unclip.evaluation.networks import load_judge
from unclip.evaluation.parts import HELD_OUT, SEEN, VALIDATION
from unclip.evaluation.pictures import to_uint8
from unclip.evaluation.real import Real, read_real
from unclip.evaluation.report import surroundings, table, write_results
from unclip.evaluation.sheets import Tile, contact_sheet, save
from unclip.stages import Stage
from unclip.training.optim import parameter_groups
from unclip.training.trainer import keep_freed_memory, resolve_precision

FORMAT = 1
ROOT = Path(__file__).parents[1]
OURS, PEER, REAL = "unclip", "DALLE2-pytorch", "real renders"
PACKAGES = ("torch", "torchvision", "dalle2-pytorch==1.15.6")
MOST_HELD_OUT = 128
SAMPLE_BATCH, SHEET_ROWS, SHEET_COLUMNS = 25, 6, 4


class Rules(NamedTuple):
    """The part of the decoder's preset that holds for both contenders.

    Attributes:
        batch_size: images of a step.
        warm_up_steps: steps until the learning rates are at their full height.
        ema_decay: of the averaged weights.
        bf16: compute in bf16, as autocast does.
        threads: of each contender.
        seconds: CPU time of each contender's training.
    """

    batch_size: int
    warm_up_steps: int
    ema_decay: float
    bf16: bool
    threads: int
    seconds: float

    @classmethod
    def of(cls, config: DictConfig, *, threads: int, seconds: float) -> "Rules":
        """The rules that a preset sets; bf16 only if the CPU computes in it natively."""
        return cls(
            config.data.batch_size,
            config.schedule.warm_up_steps,
            config.callbacks.ema.decay,
            resolve_precision(config.trainer.precision, "cpu") == "bf16-mixed",
            threads,
            seconds,
        )


def main() -> None:
    """Caches the data, trains and samples both contenders, and scores them."""
    arguments = parse()
    try:
        run(arguments)
    except (ConfigurationError, ValueError, OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"race.py: {error}")


def run(arguments: argparse.Namespace) -> None:
    """The whole race, as its command line says."""
    config = compose_strictly("train", ["stage=decoder", *arguments.overrides])
    rules = Rules.of(config, threads=arguments.threads, seconds=arguments.seconds)
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    out, root = arguments.out, Path(config.data.root)
    out.mkdir(parents=True, exist_ok=True)
    python = None if arguments.without_peer else peer_environment(arguments.peer)
    cascade = Cascade.load(arguments.model, device="cpu")
    counts = {SEEN: arguments.count, HELD_OUT: min(arguments.count, MOST_HELD_OUT)}
    real = {split: read_real(root, split, 64, count=count) for split, count in counts.items()}
    reference = read_real(root, VALIDATION, 64, count=arguments.count)
    cache(cascade, read_real(root, "train", 64), real, out)
    about = {OURS: race_ours(config, cascade, rules, out)}
    if python is not None:
        about[PEER] = race_peer(python, about[OURS]["parameters"], rules, out)
    images = {name: load_images(out / f"{name}.safetensors", real) for name in about}
    images[REAL] = {split: pictures.images for split, pictures in real.items()}
    scores = score(cascade, images, real, reference)
    results = {
        "format": FORMAT,
        "model": str(arguments.model),
        "data": str(root),
        "overrides": arguments.overrides,
        "rules": rules._asdict(),
        "contenders": {name: about.get(name, {}) | scores[name] for name in images},
        **surroundings(torch.device("cpu")),
    }
    write_results(results, out / "race.json")
    save(sheets(images, real), out / "race.png")
    print(f"{summary(results)}\n\nresults: {out / 'race.json'}\nimages: {out / 'race.png'}")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="bundle with clip, judge, prior")
    parser.add_argument("--seconds", type=float, default=1600, help="CPU time of each training")
    parser.add_argument("--out", type=Path, default=Path("runs/race"), help="takes the results")
    parser.add_argument("--count", type=int, default=500, help="images of a split at most")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each contender")
    parser.add_argument(
        "--peer", type=Path, default=ROOT / ".venv-race", help="the peer's environment; made here"
    )
    parser.add_argument("--without-peer", action="store_true", help="train and score ours alone")
    parser.add_argument("overrides", nargs="*", help="of conf/train.yaml, such as scale=emoji")
    return parser.parse_args()


def peer_environment(folder: Path) -> Path:
    """The Python of the peer's virtual environment, which is made if it is not there.

    Its packages need older versions of packages that unclip needs, too.
    """
    python, done = folder / "bin" / "python", folder / "installed"
    if not done.is_file():
        print(f"installing DALLE2-pytorch into {folder}: 1.6 GB", flush=True)
        venv.create(folder, with_pip=True)
        pip = [python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt"]
        subprocess.run([*pip, *PACKAGES], check=True)
        done.touch()
    return python


def cache(cascade: Cascade, train: Real, test: dict[str, Real], out: Path) -> None:
    """Writes what both contenders see: train.safetensors and test.safetensors.

    Training images come with their own image embeddings, test captions with the prior's; all have
    one caption. The test file has the rows of one split after those of the other.
    """
    seen = {"image": train.images, "image_embedding": embed_images(cascade.embedder, train.images)}
    save_file({**seen, **_text(cascade, train.captions)}, out / "train.safetensors")
    captions = [caption for split in test.values() for caption in split.captions]
    z = cascade.prior(captions, seeds=range(len(captions)), batch_size=50)
    tensors = {"image_embedding": z, **_text(cascade, captions)}
    save_file({name: t.contiguous() for name, t in tensors.items()}, out / "test.safetensors")


def _text(cascade: Cascade, captions: list[str]) -> dict[str, Tensor]:
    parts = [
        cascade.embedder.text(captions[start : start + 256])._asdict()
        for start in range(0, len(captions), 256)
    ]
    text = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return {**text, "text_states": text["text_states"].half()}


def race_ours(config: DictConfig, cascade: Cascade, rules: Rules, out: Path) -> dict[str, Any]:
    """Trains the preset's decoder, samples the test captions, and describes the run."""
    train, test = (load_file(out / f"{name}.safetensors") for name in ("train", "test"))
    torch.manual_seed(0)
    since = time.process_time()
    stage = bundle.build(OmegaConf.to_container(config.model, resolve=True))
    stage.to(memory_format=torch.channels_last)
    stage.fit_statistics(_batches(train))
    stage.fit_null_text(cascade.embedder.text([""])._asdict())

    def loss(rows: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=rules.bf16):
            return stage.loss(_batch(train, rows))["loss"]

    optimizer = instantiate(OmegaConf.to_container(config.optimizer, resolve=True))
    trained = train_for(
        rules.seconds,
        loss,
        optimizer(parameter_groups(stage)),
        rows=len(train["image"]),
        batch_size=rules.batch_size,
        warm_up_steps=rules.warm_up_steps,
        ema_decay=rules.ema_decay,
        since=since,
    )
    stage.eval().fit_variance(_batches(train))
    since = time.process_time()
    images = _sample(stage, test, bf16=rules.bf16)
    about = {
        "parameters": sum(parameter.numel() for parameter in stage.parameters()),
        **trained._asdict(),
        "evaluations": config.sampler.steps,
        "guidance_scale": stage.guidance_scale,
        "sampling_cpu_seconds": time.process_time() - since,
    }
    path = out / f"{OURS}.safetensors"
    save_file({"image": images}, path, metadata={"about": json.dumps(about)})
    return about


def _batch(data: dict[str, Tensor], rows: Tensor | slice) -> dict[str, Tensor]:
    """Rows of a cache as the stage takes them: float, images in [-1, 1] and channels_last."""
    batch = {name: tensor[rows] for name, tensor in data.items()}
    batch["text_states"] = batch["text_states"].float()
    if "image" in batch:
        image = batch["image"].to(memory_format=torch.channels_last)
        batch["image"] = image.float().div_(127.5).sub_(1.0)
    return batch


def _batches(data: dict[str, Tensor], size: int = 256) -> Iterator[dict[str, Tensor]]:
    for start in range(0, len(data["image"]), size):
        yield _batch(data, slice(start, start + size))


def _sample(stage: Stage, test: dict[str, Tensor], *, bf16: bool) -> Tensor:
    images = []
    for start in range(0, len(test["text_mask"]), SAMPLE_BATCH):
        batch = _batch(test, slice(start, start + SAMPLE_BATCH))
        seeds = range(start, start + len(batch["text_mask"]))
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            images.append(to_uint8(stage.sample(stage.condition(batch), generators=generators)))
    return torch.cat(images).contiguous()


def race_peer(python: Path, parameters: int, rules: Rules, out: Path) -> dict[str, Any]:
    """Runs `race_peer.py` in the peer's environment and returns what it says of its run."""
    given = {"parameters": parameters, **rules._asdict()}
    (out / "rules.json").write_text(json.dumps(given, indent=2) + "\n")
    script = Path(__file__).with_name("race_peer.py")
    environment = {**os.environ, "OMP_NUM_THREADS": str(rules.threads), "TQDM_DISABLE": "1"}
    environment.pop("PYTHONPATH", None)  # of another environment
    subprocess.run([python, script, out], check=True, env=environment)
    with safe_open(out / f"{PEER}.safetensors", framework="pt") as file:
        return json.loads(file.metadata()["about"])


def load_images(path: Path, real: dict[str, Real]) -> dict[str, Tensor]:
    """A contender's images by split."""
    counts = [len(split) for split in real.values()]
    return dict(zip(real, load_file(path)["image"].split(counts), strict=True))


def score(
    cascade: Cascade, images: dict[str, dict[str, Tensor]], real: dict[str, Real], reference: Real
) -> dict[str, dict[str, Any]]:
    """Each contender's Fréchet distance and what the judge makes of its images."""
    count = min(len(real[SEEN]), len(reference))
    network, judge = EfficientNetLite0(), load_judge(cascade.folder, cascade.embedder)
    features = {name: extract(network, splits[SEEN][:count]) for name, splits in images.items()}
    distances = frechet_distances(features, extract(network, reference.images[:count]))
    return {
        name: {
            "fd_effnet_lite0": {**distances[name], "n": count},
            "judge": {
                split: judge_choices(judge, splits[split], real[split].captions, {})["caption"]
                for split in real
            },
        }
        for name, splits in images.items()
    }


def summary(results: dict[str, Any]) -> str:
    """The table that is printed."""
    rows = []
    for name, found in results["contenders"].items():
        distance, judge = found["fd_effnet_lite0"], found["judge"]
        parameters = found["parameters"] / 1e6 if "parameters" in found else None
        rows.append([name, parameters, found.get("cpu_seconds"), found.get("steps")])
        rows[-1] += [distance["distance"], distance["error"], distance["n"]]
        rows[-1] += [judge[split]["share"] for split in (SEEN, HELD_OUT)]
        rows[-1] += [found.get("evaluations")]
    head = ["decoder", "M parameters", "CPU s", "steps", "fd_effnet_lite0", "±", "n"]
    return table(rows, head=[*head, "judge, seen", "judge, held out", "evaluations"])


def sheets(images: dict[str, dict[str, Tensor]], real: dict[str, Real]) -> Image.Image:
    """The contact sheets of all contenders side by side, the same captions at the same places."""
    drawn = []
    for name, splits in images.items():
        tiles = []
        for split in (SEEN, HELD_OUT):
            rows = varied(real[split], SHEET_ROWS // 2 * SHEET_COLUMNS)
            captions = [real[split].captions[row] for row in rows]
            chosen = zip(splits[split][rows], captions, strict=True)
            tiles += [Tile(image, text, marked=split == HELD_OUT) for image, text in chosen]
        title = f"{name} (framed: held out)"
        drawn.append(contact_sheet(tiles, columns=SHEET_COLUMNS, size=96, title=title, lines=3))
    width = sum(sheet.width for sheet in drawn)
    joined = Image.new("RGB", (width, drawn[0].height), "white")
    for place, sheet in enumerate(drawn):
        joined.paste(sheet, (place * drawn[0].width, 0))
    return joined


if __name__ == "__main__":
    main()
