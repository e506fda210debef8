"""Run by test_resume.py: trains TinyStage without a break, and again through many kills."""

import unclip  # isort: skip # noqa: F401

import os
import signal
import sys
from pathlib import Path

import torch
from conftest import Kit
from lightning.pytorch import Callback

from unclip.data.module import ShardDataModule
from unclip.training.callbacks.logs import CsvLogger
from unclip.training.resume import find_checkpoint, lock_run_dir
from unclip.training.trainer import silence_lightning

STEPS, EVERY = 16, 3

# (hook, step, signal): one attempt each, and then one that survives.
DEATHS = [
    ("on_train_batch_end", 2, signal.SIGKILL),  # before there is a checkpoint
    ("writing", 3, signal.SIGKILL),
    ("on_train_batch_end", 4, signal.SIGKILL),  # before the line of that step is in the log
    ("on_validation_batch_end", 4, signal.SIGKILL),  # in a validation within a step of two batches
    ("renaming", 6, signal.SIGKILL),  # the old file has both names, the new one none
    ("on_train_batch_start", 8, signal.SIGTERM),
    ("on_before_optimizer_step", 9, signal.SIGINT),
    ("on_validation_batch_end", 13, signal.SIGTERM),
    ("on_before_optimizer_step", 14, signal.SIGKILL),
    ("on_validation_batch_end", 16, signal.SIGKILL),  # after the last step, before the export
]


def torn(checkpoint, file):
    file.write(b"half of it")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def rename(source, target, really=os.replace):
    if Path(target).name == "last.ckpt":
        os.kill(os.getpid(), signal.SIGKILL)
    really(source, target)


SAVING = {"writing": (torch, "save", torn), "renaming": (os, "replace", rename)}


class Death(Callback):
    """Sends this process a signal in a hook of a step, or in the save before it."""

    def __init__(self, hook, step, number):
        def die(trainer, *args):
            if trainer.global_step != step:
                return
            if hook in SAVING:
                setattr(*SAVING[hook])
            else:
                os.kill(os.getpid(), number)

        setattr(self, "on_train_batch_start" if hook in SAVING else hook, die)


def train(folder, root, death):
    silence_lightning()
    kit = Kit(folder)
    data = ShardDataModule(root, image_size=16, shard_size=64, batch_size=4, workers=2)
    dying = [] if death is None else [Death(*death)]
    callbacks = [*dying, *kit.callbacks(every_steps=EVERY)]
    settings = {"accumulate_grad_batches": 2, "validate_every_steps": 4, "log_every_n_steps": 1}
    trainer = kit.trainer(STEPS, *callbacks, loggers=[CsvLogger(folder)], **settings)
    with lock_run_dir(folder):
        trainer.fit(kit.module(), data, ckpt_path=find_checkpoint(folder, "auto"))


def attempt(folder, root, death=None):
    """Returns the exit code of a process that trains."""
    child = os.fork()  # nothing was computed yet, so torch is fresh in the child
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        train(folder, root, death)
        code = 0
    except SystemExit as stopped:
        code = stopped.code
    finally:
        os._exit(code)


def main(folder, root):
    assert attempt(folder / "whole", root) == 0
    for death in DEATHS:
        number = death[2]
        expected = -number if number == signal.SIGKILL else 128 + number
        ended = attempt(folder / "cut", root, death)
        assert ended == expected, (death, ended)
    assert attempt(folder / "cut", root) == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
