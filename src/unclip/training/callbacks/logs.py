"""Loggers of a run: CSV and Weights & Biases.

A resumed run continues its logs: lines that will be logged again are removed from the CSV, and the
id of the W&B run is kept in the run folder. Lightning's CSVLogger deletes metrics.csv instead.
"""

import csv
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from unclip.files import atomic_write, read_text, write_text
from unclip.training.lightning_compat import remove_deprecated_wandb_option


class CsvLogger(Logger):
    """Write metrics to FOLDER/logs/metrics.csv, each line as soon as it is logged.

    Args:
        folder: run folder.
    """

    name = property(lambda self: "csv")  # Lightning requires name and version
    version = property(lambda self: "logs")

    def __init__(self, folder: str | Path):
        super().__init__()
        self.path = Path(folder) / "logs" / "metrics.csv"
        self._rows: list[dict[str, str]] = []  # content of the file
        self._columns: list[str] = []
        self._torn = False  # whether the file has a line that was being written in a kill
        if self.path.is_file():
            with open(self.path, newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                self._columns = list(reader.fieldnames or [])
                rows = list(reader)
                self._rows = [row for row in rows if None not in row.values()]
                self._torn = len(self._rows) < len(rows)

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Do nothing: config.yaml in the run folder has the settings."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add a line; it replaces a last line with the same step and columns."""
        row = {"step": "" if step is None else str(step)}
        for name, value in metrics.items():
            row[name] = repr(value.item() if isinstance(value, Tensor) else value)
        last = {name: value for name, value in (self._rows or [{}])[-1].items() if value != ""}
        repeats = last.keys() == row.keys() and last["step"] == row["step"]
        if repeats:
            self._rows.pop()
        self._rows.append(row)
        if repeats or row.keys() - set(self._columns):
            self._columns = sorted({*self._columns, *row})
            self._write()
        else:
            with open(self.path, "a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self._columns, restval="").writerow(row)

    @rank_zero_only
    def truncate(self, step: int) -> None:
        """Remove the lines after the step that a run resumes from; 0 removes all lines."""
        kept = [row for row in self._rows if int(row["step"] or 0) < step]
        if self._torn or len(kept) < len(self._rows):
            self._rows = kept
            self._write()

    def _write(self) -> None:
        with atomic_write(self.path) as path, open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns, restval="")
            writer.writeheader()
            writer.writerows(self._rows)


class TruncateLogsOnResume(Callback):
    """Remove the lines of the CSV that a resumed run will log again."""

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        """Truncate at the step that a checkpoint restored."""
        for logger in trainer.loggers:
            if isinstance(logger, CsvLogger):
                logger.truncate(trainer.global_step)


def wandb_logger(folder: str | Path, *, project: str, name: str) -> Logger:
    """Build a Weights & Biases logger; without an API key it is offline and never asks for one.

    With WANDB_MODE=disabled nothing is written. Otherwise the run's id is kept in FOLDER/wandb_id,
    so that a resumed run stays one run. The console output is not uploaded.
    """
    import wandb
    from lightning.pytorch.loggers import WandbLogger
    from wandb.errors import AuthenticationError
    from wandb.sdk.lib import wbauth
    from wandb.sdk.wandb_setup import singleton

    folder, found = Path(folder), singleton().settings  # of variables and files
    if found.mode == "disabled":
        return DummyLogger()
    try:
        lookup = {"source": "unclip", "prompt": False, "update_session": False}
        key = wbauth.authenticate_session(host=found.base_url, **lookup)
        reason = "there is no API key"
    except AuthenticationError as error:
        key, reason = None, str(error)
    offline = found.mode in ("offline", "dryrun") or key is None
    if offline:
        why = "" if key else f" ({reason})"
        rank_zero_only(print)(
            f"wandb is offline{why}: upload with `wandb sync {folder / 'wandb'}/offline-run-*`",
            flush=True,
        )
    logger = WandbLogger(
        save_dir=folder,
        project=project,
        name=name,
        id=_load_or_create_id(folder / "wandb_id"),
        offline=offline,
        settings=wandb.Settings(console="off", silent=True),
    )
    remove_deprecated_wandb_option(logger)
    return logger


@rank_zero_only
def _load_or_create_id(path: Path) -> str:
    if not path.exists():
        write_text(path, secrets.token_hex(4))
    return read_text(path)
