"""Loggers of a run: CSV and Weights & Biases.

A resumed run continues its logs: lines that are logged again are replaced in the CSV, and the id of
the W&B run is kept in the run folder. Lightning's CSVLogger deletes metrics.csv instead.
"""

import csv
import secrets
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from unclip.files import atomic_write, read_text, write_text
from unclip.training.lightning_compat import remove_deprecated_wandb_option
from unclip.training.resume import METRICS


class CsvLogger(Logger):
    """Write metrics to FOLDER/logs/metrics.csv, each line as soon as it is logged."""

    name = property(lambda self: "csv")  # Lightning requires name and version
    version = property(lambda self: "logs")

    def __init__(self, folder: str | Path):
        super().__init__()
        self.path = Path(folder) / METRICS
        self._rows: list[dict[str, str]] = []  # content of the file, without empty cells
        self._columns: list[str] = []
        if self.path.is_file():
            with open(self.path, newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                self._columns = list(reader.fieldnames or [])
                whole = [row for row in reader if None not in row.values()]  # not torn by a kill
            self._rows = [{name: cell for name, cell in row.items() if cell} for row in whole]
        self._torn = bool(self._columns)  # the last line may have been written in a kill

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Do nothing: config.yaml in the run folder has the settings."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add a line; it replaces a line of the same step and metrics, and all after that."""
        step = step or 0
        row = {"step": str(step)}
        for name, value in metrics.items():
            row[name] = repr(value.item() if isinstance(value, Tensor) else value)

        def is_earlier(old: dict[str, str]) -> bool:
            is_same = (old.keys() & metrics.keys()) - {"epoch"}
            return int(old["step"]) < step + (not is_same)

        earlier = list(takewhile(is_earlier, self._rows))
        rewrite = self._torn or len(earlier) < len(self._rows) or row.keys() - set(self._columns)
        self._rows, self._torn = [*earlier, row], False
        self._columns = sorted({*self._columns, *row})
        if not rewrite:
            with open(self.path, "a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self._columns, restval="").writerow(row)
            return
        with atomic_write(self.path) as path, open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns, restval="")
            writer.writeheader()
            writer.writerows(self._rows)


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
