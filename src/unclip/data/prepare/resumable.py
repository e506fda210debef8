"""Resumable builds of a data set: settings, parallel jobs, shards with reproducible bytes."""

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm
from webdataset.writer import TarWriter

from unclip.files import atomic_write, read_json, sha256_of, write_text

UNFINISHED, FINISHED = "building.json", "dataset.json"
Job = TypeVar("Job")
Result = TypeVar("Result")


class ResumableBuild:
    """A data set folder whose build can be interrupted and resumed.

    ROOT/building.json holds the settings during the build; ROOT/dataset.json holds the settings and
    the SHA-256 of every shard ROOT/SPLIT/SIZE/*.tar afterwards. All files must be written
    atomically: a build skips the shards that exist.

    Raises:
        ValueError: `root` holds something other than a data set of this kind.
    """

    def __init__(self, root: Path, kind: str):
        self.root, self.kind = root, kind
        finished = _read(root / FINISHED)
        self._shards = finished.get("sha256", {})
        self._found = finished.get("settings") or _read(root / UNFINISHED)
        others = [path for path in root.glob("*") if not path.match(".*.tmp")]  # of a killed build
        if self._found.get("data") != kind and others:
            raise ValueError(f"{root} holds something other than {kind}: choose another folder")
        if not self._found:
            self._found = {"data": kind}
            _write(root / UNFINISHED, self._found)

    def start(self, settings: dict[str, Any], *, overwrite: bool) -> bool:
        """Record the settings and return whether anything is left to build.

        The settings determine the content of the data set. With `overwrite`, the folders of a build
        with other settings are deleted.

        Raises:
            ValueError: `root` was built with other settings, and `overwrite` is False.
        """
        settings = json.loads(json.dumps({"data": self.kind, **settings}))
        if self._found not in (settings, {"data": self.kind}):
            if not overwrite:
                raise ValueError(
                    f"{self.root} was built with other settings "
                    f"({_difference(self._found, settings)}): choose another folder, or replace it "
                    "with --overwrite"
                )
            for folder in filter(Path.is_dir, self.root.iterdir()):
                shutil.rmtree(folder)
        elif self._shards and all((self.root / shard).exists() for shard in self._shards):
            (self.root / UNFINISHED).unlink(missing_ok=True)  # of a build killed at its very end
            return False
        self._found = settings
        _write(self.root / UNFINISHED, settings)
        (self.root / FINISHED).unlink(missing_ok=True)
        return True

    def finish(self) -> None:
        """Hash the shards and mark the data set as complete."""
        for left_over in self.root.rglob(".*.tmp"):
            left_over.unlink()
        shards = sorted(self.root.glob("*/*/*.tar"))
        sums = {path.relative_to(self.root).as_posix(): sha256_of(path) for path in shards}
        _write(self.root / FINISHED, {"settings": self._found, "sha256": sums})
        (self.root / UNFINISHED).unlink()


def run_jobs(
    function: Callable[[Job], Result],
    jobs: Sequence[Job],
    workers: int | None,
    *,
    about: str,
    chunk_size: int = 1,
) -> Iterator[Result]:
    """Call a module's function with each job, in processes, and yield the results in order.

    There are `workers` processes; None starts one per core, and 0 runs the jobs in this process. A
    process receives `chunk_size` jobs at once. A progress bar, named `about`, counts the results.
    After an exception in one job, the jobs that have not started are canceled.
    """
    bar = partial(tqdm, desc=about, total=len(jobs))
    if workers == 0:
        yield from bar(map(function, jobs))
        return
    # Spawned, so that no state of this process (threads, locks) reaches the workers.
    spawn = get_context("spawn")
    with ProcessPoolExecutor(
        workers or os.cpu_count(), mp_context=spawn, initializer=_start_worker
    ) as pool:
        yield from bar(pool.map(function, jobs, chunksize=chunk_size))


def _start_worker() -> None:
    """Ignore Ctrl-C, which the parent handles, and exit when the parent does, even if killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def write_samples(path: Path, samples: Iterable[dict[str, Any]]) -> None:
    """Write a shard atomically; the same samples give the same bytes.

    A sample has `__key__`, an encoded image under its extension, and `json`, a dict.
    """
    with (
        atomic_write(path) as temporary,
        open(temporary, "wb") as stream,
        TarWriter(stream, user="unclip", group="unclip", mtime=0) as tar,
    ):
        for sample in samples:
            text = json.dumps(sample["json"], ensure_ascii=False, separators=(",", ":"))
            tar.write(sample | {"json": text.encode()})


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _write(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


def _difference(found: dict[str, Any], settings: dict[str, Any]) -> str:
    there, here = (one | one.get("scenes", {}) for one in (found, settings))
    changed = [name for name in here if name != "scenes" and there.get(name) != here[name]]
    return "; ".join(f"{name}: {there.get(name)} there, {here[name]} here" for name in changed)
