"""What has to be there before a run: its data, and the stages that it builds on.

Light to import: a run that lacks something ends in seconds.
"""

import fcntl
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from unclip.training.resuming import without_ranks

# What an upstream run takes over from the command line of the run that needs it.
INHERITED = (
    "scale=",
    "bundle=",
    "seed=",
    "folders.",
    "clip.",
    "data=",
    "data.root=",
    "data.workers=",
    "prepare.",
    "logger=",
    "trainer=",
    "trainer.effort=",
    "trainer.accelerator=",
    "trainer.devices=",
    "trainer.precision=",
)


@contextmanager
def one_at_a_time(path: str | Path) -> Iterator[None]:
    """Lets one process make what shall stand at `path`; the others wait, and find it made.

    It holds between the processes of one machine, by a hidden file beside `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def ensure_data(prepare: Callable[[], Any] | None, done: str | Path | None) -> None:
    """Makes the data set with `prepare` unless the file `done` says that it is there."""
    if prepare is None or Path(done).exists():
        return
    with one_at_a_time(Path(done).parent):
        if not Path(done).exists():
            prepare()


def starting_weights(init: str | Path, stage: str) -> Path:
    """The file of a stage that `init` names, a bundle's folder or the file itself.

    Raises:
        FileNotFoundError: if there is none.
    """
    path = Path(init)
    path = path if path.suffix == ".safetensors" else path / f"{stage}.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"init={init}: there is no {path}")
    return path


def take_over(needs: Sequence[str], source: str | Path, folder: str | Path) -> None:
    """Copies, from one bundle to another, the stages that a run builds on and the other lacks."""
    for stage in needs:
        there, here = (Path(bundle) / f"{stage}.safetensors" for bundle in (source, folder))
        if here.exists() or not there.exists():
            continue
        with one_at_a_time(here):
            if not here.exists():
                unfinished = here.with_name(f".{here.name}.part")
                shutil.copyfile(there, unfinished)
                os.replace(unfinished, here)


def ensure_upstream(
    needs: Sequence[str], folder: str | Path, overrides: Sequence[str], *, train: bool
) -> None:
    """Checks that the bundle has the stages that a run builds on.

    Args:
        needs: names of stages.
        folder: the bundle's.
        overrides: this run's command line, of which an upstream run inherits scale, bundle, data
            and hardware.
        train: train what is missing, each in a process of its own.

    Raises:
        FileNotFoundError: naming the missing file and the command that makes it; also where other
            ranks were started beside this one, which an upstream run would take for its own.
        ChildProcessError: when an upstream run fails.
    """
    for stage in needs:
        path = Path(folder) / f"{stage}.safetensors"
        if path.exists():
            continue
        inherited = [word for word in overrides if word.startswith(INHERITED)]
        words = [str(Path(sys.argv[0]).with_name("train.py")), f"stage={stage}", *inherited]
        command = shlex.join(["python", *words])
        if not train:
            raise FileNotFoundError(
                f"{path} is missing. Train it with `{command}`, or add upstream=train to do that "
                "first"
            )
        if _is_one_of_several():
            raise FileNotFoundError(
                f"{path} is missing, and upstream=train cannot train it under torchrun or srun: "
                f"train it first with `{command}`"
            )
        with one_at_a_time(path):
            if not path.exists():
                print(f"{path} is missing: {command}", flush=True)
                _run(words, command)


def _is_one_of_several() -> bool:
    """Whether torchrun or srun has started this process, and others beside it."""
    return "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("SLURM_NTASKS", 1)) > 1


def _run(words: list[str], command: str) -> None:
    """Runs a job of its own, whose devices are those that its command line names."""
    code = subprocess.run([sys.executable, *words], env=without_ranks(), check=False).returncode
    if code:
        raise ChildProcessError(f"`{command}` ended with code {code}")
