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
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from race_loop import train_for
from race_score import Images, score, sheet, summary
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from cli.config_check import ConfigurationError, compose_strictly
from unclip import bundle
from unclip.cascade import Cascade
from unclip.evaluation.measures import embed_images
from unclip.evaluation.parts import HELD_OUT, SEEN
from unclip.evaluation.real import Real, read_real
from unclip.evaluation.report import surroundings, write_results
from unclip.images import save_png, to_uint8
from unclip.stages import Stage
from unclip.training.optim import parameter_groups
from unclip.training.trainer import resolve_precision, tune_malloc

FORMAT = 2
ROOT = Path(__file__).parents[1]
OURS, PEER, REAL = "unclip", "DALLE2-pytorch", "real renders"
ENVIRONMENT = ROOT / ".venv-race"  # the peer needs older versions of packages that unclip needs
PACKAGES = ("torch", "torchvision", "dalle2-pytorch==1.15.6")
SAMPLE_BATCH = 25

Rules = dict[str, Any]


def main() -> None:
    """Cache the data, train and sample both contenders, and score them."""
    try:
        run(parse())
    except (ConfigurationError, ValueError, OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"race.py: {error}")


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="bundle with clip, judge, prior")
    parser.add_argument("--seconds", type=float, default=1600, help="CPU time of each training")
    parser.add_argument("--out", type=Path, default=Path("runs/race"), help="takes the results")
    parser.add_argument(
        "--count", type=int, default=200, help="seen captions; half as many are held out"
    )
    parser.add_argument("--without-peer", action="store_true", help="train and score ours alone")
    parser.add_argument("overrides", nargs="*", help="of conf/train.yaml, such as scale=emoji")
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> None:
    """Run the whole race."""
    config = compose_strictly("train", ["stage=decoder", *arguments.overrides])
    rules = rules_of(config, arguments.seconds)
    torch.set_num_threads(1)
    tune_malloc()
    out, root = arguments.out, Path(config.data.root)
    out.mkdir(parents=True, exist_ok=True)
    python = None if arguments.without_peer else peer_environment()
    cascade = Cascade.load(arguments.model, device="cpu")
    counts = {SEEN: arguments.count, HELD_OUT: max(arguments.count // 2, 1)}
    real = {split: read_real(root, split, 64, count=count) for split, count in counts.items()}
    cache(cascade, read_real(root, "train", 64), real, out)
    about = {OURS: race_ours(config, cascade, rules, out)}
    if python is not None:
        about[PEER] = race_peer(python, about[OURS]["parameters"], rules, out)
    images = {name: load_images(out / f"{name}.safetensors", real) for name in about}
    images[REAL] = {split: shown.images for split, shown in real.items()}
    scores = score(cascade, images, real, root)
    results = {
        "format": FORMAT,
        "model": str(arguments.model),
        "data": str(root),
        "overrides": arguments.overrides,
        "rules": rules,
        "contenders": {name: about.get(name, {}) | scores[name] for name in images},
        **surroundings(torch.device("cpu")),
    }
    write_results(results, out / "race.json")
    save_png(sheet(images, real), out / "race.png")
    print(f"{summary(results)}\n\nresults: {out / 'race.json'}\nimages: {out / 'race.png'}")


def rules_of(config: DictConfig, seconds: float) -> Rules:
    """Return what holds for both contenders; bf16 only if the CPU computes in it natively."""
    return {
        "seconds": seconds,
        "batch_size": config.data.batch_size,
        "warm_up_steps": config.schedule.warm_up_steps,
        "ema_decay": config.callbacks.ema.decay,
        "bf16": resolve_precision(config.trainer.precision, "cpu") == "bf16-mixed",
    }


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


def cache(cascade: Cascade, train: Real, test: dict[str, Real], out: Path) -> None:
    """Write what both contenders receive: train.safetensors and test.safetensors.

    Training images have their own image embeddings, test captions those of the prior; all have one
    caption. In the test file the rows of one split follow those of the other.
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
    """Train the preset's decoder, sample the test captions, and describe the run."""
    train, test = (load_file(out / f"{name}.safetensors") for name in ("train", "test"))
    torch.manual_seed(0)
    since = time.process_time()
    stage = bundle.build(OmegaConf.to_container(config.model, resolve=True))
    stage.to(memory_format=torch.channels_last)
    stage.fit_statistics(_batches(train))
    stage.fit_null_text(cascade.embedder.text([""])._asdict())

    def loss(rows: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=rules["bf16"]):
            return stage.loss(_batch(train, rows))["loss"]

    optimizer = instantiate(OmegaConf.to_container(config.optimizer, resolve=True))
    groups = parameter_groups(stage)
    trained = train_for(rules, loss, optimizer(groups), rows=len(train["image"]), since=since)
    stage.eval().fit_variance(_batches(train))
    since = time.process_time()
    images = _sample(stage, test, bf16=rules["bf16"])
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
    """Return rows of a cache for a stage: float, images in [-1, 1] and channels_last."""
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
    """Run `race_peer.py` in the peer's environment and return its description of the run."""
    (out / "rules.json").write_text(json.dumps({**rules, "parameters": parameters}) + "\n")
    script = Path(__file__).with_name("race_peer.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    environment.pop("PYTHONPATH", None)  # of another environment
    subprocess.run([python, script, out], check=True, env=environment)
    with safe_open(out / f"{PEER}.safetensors", framework="pt") as file:
        return json.loads(file.metadata()["about"])


def load_images(path: Path, real: dict[str, Real]) -> Images:
    """Load the images of a contender."""
    counts = [len(split) for split in real.values()]
    return dict(zip(real, load_file(path)["image"].split(counts), strict=True))


if __name__ == "__main__":
    main()
