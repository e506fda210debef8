"""Resumable builds of a data set folder, and jobs in parallel processes."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from unclip.files import sha256_of, write_text

UNFINISHED, FINISHED = "building.json", "dataset.json"


class ResumableBuild:
    """A data set folder whose build can be interrupted and resumed.

    ROOT/building.json holds the settings during the build; ROOT/dataset.json holds the settings and
    the SHA-256 of every shard ROOT/SPLIT/SIZE/*.tar afterwards. All files must be written
    atomically: a build skips the shards that exist.

    Args:
        root: the data set's own folder.
        kind: kind of the data set.

    Raises:
        ValueError: `root` holds something else than a data set of this kind.
    """

    def __init__(self, root: Path, kind: str):
        self.root, self.kind = root, kind
        finished = _read(root / FINISHED)
        self._shards = finished.get("sha256", {})
        self._found = finished.get("settings") or _read(root / UNFINISHED)
        if self._found.get("data") != kind and root.exists() and any(root.iterdir()):
            raise ValueError(f"{root} holds something else than {kind}: choose another folder")
        if not self._found:
            self._found = {"data": kind}
            _write(root / UNFINISHED, self._found)

    def start(self, settings: dict[str, Any], *, overwrite: bool) -> bool:
        """Record the settings and return whether anything is left to build.

        Args:
            settings: everything that determines the content of the data set.
            overwrite: whether to delete the folders of a build with other settings.

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
    jobs: Iterable[tuple[Callable[..., Any], tuple]], workers: int | None
) -> Iterator[tuple[int, Any]]:
    """Run jobs in processes and yield (index of the job, its result) as they finish.

    Args:
        jobs: pairs of a module-level function and its arguments.
        workers: number of processes; None for one per core, 0 to run in this process.

    Raises:
        Exception: the first exception of a job; jobs that have not started are cancelled.
    """
    if workers == 0:
        for number, (function, arguments) in enumerate(jobs):
            yield number, function(*arguments)
        return
    # Spawned, so that no state of this process (threads, locks) reaches the workers.
    with ProcessPoolExecutor(workers or os.cpu_count(), mp_context=get_context("spawn")) as pool:
        futures = {
            pool.submit(function, *arguments): number
            for number, (function, arguments) in enumerate(jobs)
        }
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _write(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


def _difference(found: dict[str, Any], settings: dict[str, Any]) -> str:
    there, here = _flat(found), _flat(settings)
    changed = [name for name in here if there.get(name) != here[name]]
    return "; ".join(f"{name}: {there.get(name)} there, {here[name]} here" for name in changed)


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Replace each nested dict by its items."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= value if isinstance(value, dict) else {name: value}
    return flat
