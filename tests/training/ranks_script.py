"""Run by test_ranks.py: two ranks, forked after the imports so that neither waits."""

import unclip  # isort: skip # noqa: F401

import functools
import json
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import torch
from conftest import Kit, TinyStage, collate, images
from lightning.pytorch import Callback, LightningDataModule
from torch import nn
from torch.utils.data import DataLoader

from unclip.data.module import ShardDataModule
from unclip.evaluation.distributed import die_with_parent
from unclip.networks.unet import ResBlock
from unclip.training import optim
from unclip.training.callbacks.checkpoint import NonFiniteError
from unclip.training.callbacks.logs import CsvLogger
from unclip.training.modules import StageModule, sample_generators
from unclip.training.resume import find_checkpoint
from unclip.training.sharding import unsharded
from unclip.training.trainer import silence_lightning

IMAGES, BATCH, STEPS, TIMEOUT = 32, 8, 6, 5.0
FAULTS = [(kind, "ddp") for kind in ("raise", "hang", "kill", "preempt")]
FAULTS += [(kind, "fsdp") for kind in ("hang", "kill", "nan")]
SLURM = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
SLURM |= {"SLURM_NODEID": "0", "SLURM_NNODES": "1", "SLURM_NODELIST": "127.0.0.1"}
MUON = functools.partial(
    optim.Muon,
    **{"lr": 1e-2, "muon_lr": 1e-2, "momentum": 0.95, "betas": (0.9, 0.99)},
    **{"weight_decay": 0.0, "muon_weight_decay": 0.1},
)


class Poisoned(StageModule):
    """Has a NaN loss in the third step of rank 1."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if batch_idx == 2 and self.global_rank == 1 else loss

    def measure(self, batch):
        return {"brightness": batch["image"].mean()}


def train_on_shards(folder, root):
    """Save each rank's samples, noise and weights."""
    silence_lightning()
    kit = Kit(folder)
    module, callbacks = kit.module(Poisoned), kit.callbacks(every_steps=2)
    data = ShardDataModule(root, image_size=16, shard_size=64, batch_size=4, workers=0)
    trainer = kit.trainer(4, *callbacks, devices=2, strategy="ddp", validate_every_steps=2)
    failed = None
    try:
        trainer.fit(module, data)
    except NonFiniteError as error:
        failed = f"NonFiniteError: {error}"
    about = {
        "keys": module.stage.keys,
        "noises": module.stage.noises,
        "mean": module.stage.mean.tolist(),
        "weight": module.stage.network[0].weight.flatten().tolist(),
        "average": callbacks[0].weights["network.0.weight"].flatten().tolist(),
        "failed": failed,
        "brightness": trainer.callback_metrics["validation/brightness"].item(),
    }
    (folder / f"rank_{trainer.global_rank}.json").write_text(json.dumps(about))


class Reproducible(TinyStage):
    """Its noise depends on the sample only; in float64, so that rounding errors are small."""

    dtype, precision = torch.float64, "64-true"

    def __init__(self):
        super().__init__()
        self.network[2].p = 0.0

    def loss(self, batch):
        generators = sample_generators(batch["key"], 0)
        noise = torch.stack([torch.randn(3, 4, 4, generator=g) for g in generators])
        return self.loss_from(batch["image"].to(self.dtype), noise.to(self.dtype), batch)


class Shared(LightningDataModule):
    """Batches of BATCH samples, divided among the ranks."""

    def train_dataloader(self):
        ranks, rank = self.trainer.world_size, self.trainer.global_rank
        size = BATCH // ranks
        starts = range(rank * size, IMAGES, BATCH)
        batches = [list(range(start, start + size)) for start in starts]
        return DataLoader(images(IMAGES), batch_sampler=batches, collate_fn=collate)

    def val_dataloader(self):
        return []


class Sharded(Reproducible):
    """Has a block that FSDP unshards by itself; Lightning cannot shard float64."""

    dtype, precision = torch.float32, "32-true"

    def __init__(self):
        super().__init__()
        self.widen, self.narrow = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1)
        self.block = ResBlock(8, 8, 4, groups=2, dropout=0.0, scale_shift=True)

    def loss(self, batch):
        wide = self.block(self.widen(batch["image"]), batch["image"].new_ones(1, 4))
        return super().loss(batch | {"image": self.narrow(wide)})


class Preview(Callback):
    """Only rank 0 uses the unsharded stage, as for the samples of a validation."""

    def on_train_start(self, trainer, module):
        with torch.no_grad(), unsharded(module.stage):
            if trainer.is_global_zero:
                module.stage.loss(module.preprocess(collate(images(1))))


class Fault(Callback):
    """Makes rank 1 raise, hang, die or have a NaN loss in its sixth step, or be preempted earlier.

    The data resume at the start of an epoch only, which is the fifth step.
    """

    def __init__(self, kind):
        self.kind = kind

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        step = 4 if self.kind == "preempt" else 5
        if self.kind is None or trainer.global_step != step or trainer.global_rank == 0:
            return
        if self.kind == "raise":
            raise ZeroDivisionError("rank 1 fails")
        if self.kind == "hang":
            time.sleep(1000)
        if self.kind == "nan":
            batch["factor"] = torch.tensor(float("nan"))
        if self.kind in ("kill", "preempt"):
            os.kill(os.getpid(), signal.SIGKILL if self.kind == "kill" else signal.SIGTERM)


def curve(folder, ranks, strategy="ddp", stage=Reproducible, resume=None, fault=None, **changed):
    """Trains, and saves the log and the weights; resumes from a checkpoint, or the newest one."""
    if resume is not None and resume.is_dir():
        resume = find_checkpoint(resume, "auto")
    silence_lightning()
    kit = Kit(folder)
    callbacks = [*kit.callbacks(every_steps=2), Preview(), Fault(fault)]
    parallel = {"devices": ranks, "strategy": strategy} if ranks > 1 else {}
    settings = {"loggers": [CsvLogger(folder)], "log_every_n_steps": 1}
    settings |= {"precision": stage.precision, "timeout_minutes": TIMEOUT / 60}
    trainer = kit.trainer(STEPS, *callbacks, **settings, **parallel)
    module = kit.module(stage=stage, **changed)
    trainer.fit(module, Shared(), ckpt_path=resume)
    averages = callbacks[0].state_dict()["weights"]
    with unsharded(module.stage):
        weights = {name: p.detach().clone() for name, p in module.stage.named_parameters()}
    if trainer.is_global_zero:
        torch.save([weights, averages], folder / "weights.pt")


def in_ranks(function, *arguments, slurm=False, **named):
    """Returns rank 0's exit code and duration, and whether rank 1, its child, outlives it.

    The ranks are started as Lightning starts them, or as srun does.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    reader, writer = os.pipe()
    started = time.monotonic()
    first = os.fork()
    if first == 0:
        second = os.fork()
        names = ("SLURM_PROCID", "SLURM_LOCALID") if slurm else ("LOCAL_RANK",)
        os.environ |= dict.fromkeys(names, str(int(second == 0)))
        os.environ |= SLURM if slurm else {"NODE_RANK": "0"}
        if second == 0:
            die_with_parent()
        else:
            os.write(writer, str(second).encode())
        code = 1
        try:
            function(*arguments, **named)
            code = 0
        except SystemExit as stopped:
            code = stopped.code
        except Exception as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            if second:  # its end kills rank 1, which may still write a file after a success
                os.waitpid(second, os.WNOHANG if code else 0)
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(first, 0)[1])
    seconds = time.monotonic() - started
    time.sleep(1.0)
    return {"code": code, "seconds": seconds, "left": is_alive(int(os.read(reader, 32)))}


def alone(function, *arguments, **named):
    """Calls a function in a child process."""
    child = os.fork()
    if child == 0:
        function(*arguments, **named)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def is_alive(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def main(folder, root):
    ended = {"shards": in_ranks(train_on_shards, folder / "shards", root)}
    alone(curve, folder / "one", 1)
    alone(curve, folder / "whole", 1, "auto", Sharded)
    ended["curve"] = in_ranks(curve, folder / "two", 2)
    ended["sharded"] = in_ranks(curve, folder / "sharded", 2, "fsdp", Sharded)
    for kind, start in (("resumed", "sharded"), ("shared_out", "whole")):
        previous = folder / start / "previous.ckpt"
        ended[kind] = in_ranks(curve, folder / kind, 2, "fsdp", Sharded, previous)
    alone(curve, folder / "joined", 1, "auto", Sharded, folder / "sharded" / "previous.ckpt")
    shutil.copytree(folder / "two", folder / "source")
    content = bytearray((last := folder / "source" / "last.ckpt").read_bytes())
    bias = torch.load(last, weights_only=True)["state_dict"]["stage.network.0.bias"]
    content[content.index(bias.numpy().tobytes())] ^= 1
    last.write_bytes(content)
    ended["damaged"] = in_ranks(curve, folder / "damaged", 2, resume=folder / "source")
    for kind, strategy in FAULTS:
        place, slurm = folder / f"{kind}_{strategy}", kind == "preempt"
        stage = Sharded if strategy == "fsdp" else Reproducible
        ended[place.name] = in_ranks(curve, place, 2, strategy, stage, fault=kind, slurm=slurm)
        if kind in ("kill", "preempt"):
            last, place = place / "last.ckpt", folder / f"{place.name}_again"
            ended[place.name] = in_ranks(curve, place, 2, strategy, stage, last, slurm=slurm)
    optim.has_native_bf16 = lambda device: False  # its rounding errors would hide the ranks'
    alone(curve, folder / "muon", 1, "auto", Sharded, optimizer=MUON)
    for strategy in ("ddp", "fsdp"):
        place = folder / f"muon_{strategy}"
        ended[place.name] = in_ranks(curve, place, 2, strategy, Sharded, optimizer=MUON)
    place, start = folder / "muon_resumed", folder / "muon_fsdp" / "previous.ckpt"
    ended[place.name] = in_ranks(curve, place, 2, "fsdp", Sharded, start, optimizer=MUON)
    (folder / "ended.json").write_text(json.dumps(ended))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
