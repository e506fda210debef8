"""Where a run's numbers and pictures go: CSV, Weights & Biases, TensorBoard.

A run that is resumed goes on in the logs that it has: the CSV loses the lines that will come
again, and W&B keeps the run's id in its folder.
"""

import csv
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from PIL import Image
from torch import Tensor

from unclip.files import atomic_write


class CsvLogger(Logger):
    """Metrics as FOLDER/logs/metrics.csv, each line on the disk as soon as it is logged.

    Args:
        folder: the run's folder.
    """

    def __init__(self, folder: str | Path):
        super().__init__()
        self.path = Path(folder) / "logs" / "metrics.csv"
        self._rows: list[dict[str, str]] | None = None  # what is in the file
        self._columns: list[str] = []

    @property
    def name(self) -> str:
        """Lightning asks for it."""
        return "csv"

    @property
    def version(self) -> str:
        """Lightning asks for it."""
        return "logs"

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: config.yaml in the run's folder has them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Adds a line; one that repeats the last line's step and columns takes its place."""
        values = {name: repr(_number(value)) for name, value in metrics.items()}
        row = {"step": "" if step is None else str(step), **values}
        self._read()
        last = {name: value for name, value in (self._rows or [{}])[-1].items() if value != ""}
        repeats = last.keys() == row.keys() and last["step"] == row["step"]
        if repeats:
            self._rows.pop()
        self._rows.append(row)
        new = row.keys() - set(self._columns)
        if repeats or new:
            self._columns = sorted({*self._columns, *row})
            self._write()
        else:
            with open(self.path, "a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self._columns, restval="").writerow(row)

    @rank_zero_only
    def continue_from(self, step: int) -> None:
        """Drops what was logged after the step that a run goes on from; 0 drops everything."""
        self._read()
        kept = [row for row in self._rows if _before(row, step)]
        if len(kept) < len(self._rows):
            self._rows = kept
            self._write()

    def _read(self) -> None:
        if self._rows is not None:
            return
        self._rows = []
        if self.path.is_file():
            with open(self.path, newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                self._columns = list(reader.fieldnames or [])
                # A line that was being written when the run was killed is too short.
                self._rows = [row for row in reader if None not in row.values()]

    def _write(self) -> None:
        with atomic_write(self.path) as path, open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns, restval="")
            writer.writeheader()
            writer.writerows(self._rows)


def _number(value: Any) -> float:
    return value.item() if isinstance(value, Tensor) else value


def _before(row: Mapping[str, str], step: int) -> bool:
    """Whether a line belongs to the steps before; a step's validation comes after its training."""
    at = int(row["step"] or 0)
    trained = any(value for name, value in row.items() if name.startswith("train/"))
    return at < step or (at == step > 0 and not trained)


def wandb_logger(folder: str | Path, *, project: str, name: str) -> Logger:
    """Weights & Biases; without an account's key it writes its files offline and asks nothing.

    The run's id is kept as FOLDER/wandb_id, so that resumed, it is one run there. What a run prints
    is not sent.
    """
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    key = "WANDB_API_KEY" in os.environ or (Path.home() / ".netrc").exists()
    offline = os.environ.get("WANDB_MODE") == "offline" or not key
    if offline:
        rank_zero_only(print)(
            f"wandb is offline; `wandb sync {Path(folder) / 'wandb'}/offline-run-*` sends it later",
            flush=True,
        )
    logger = WandbLogger(
        save_dir=folder,
        project=project,
        name=name,
        id=_kept_id(Path(folder) / "wandb_id"),
        offline=offline,
        settings=wandb.Settings(console="off", silent=True),
    )
    logger._wandb_init.pop("anonymous", None)  # wandb warns of it, whatever its value
    return logger


def _kept_id(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(path, "x") as file:
            file.write(secrets.token_hex(4))
    except FileExistsError:
        pass
    return path.read_text().strip()


def tensorboard_logger(folder: str | Path) -> Logger:
    """TensorBoard's files in FOLDER/tensorboard, pictures included.

    Raises:
        ValueError: TensorBoard, an extra, is not installed.
    """
    try:
        import tensorboard  # noqa: F401 (Lightning's logger needs it)
    except ModuleNotFoundError:
        mend = "pip install -e '.[tensorboard]'"
        raise ValueError(f"logger=tensorboard needs TensorBoard: {mend}") from None
    from lightning.pytorch.loggers import TensorBoardLogger
    from torchvision.transforms.functional import pil_to_tensor

    class PictureLogger(TensorBoardLogger):
        """Takes pictures as the W&B logger does."""

        @rank_zero_only
        def log_image(
            self,
            key: str,
            images: Sequence[Image.Image | str],
            step: int | None = None,
            **kwargs: Any,
        ) -> None:
            """Adds pictures, or files of pictures, under one name."""
            for number, image in enumerate(images):
                picture = image if isinstance(image, Image.Image) else Image.open(image)
                tag = key if len(images) == 1 else f"{key}/{number}"
                self.experiment.add_image(tag, pil_to_tensor(picture.convert("RGB")), step)

    return PictureLogger(save_dir=str(folder), name="", version="tensorboard")


class ContinueLogs(Callback):
    """Lets the loggers that can go on where the run does."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tells them the step, which a checkpoint has restored by now."""
        for logger in trainer.loggers:
            if hasattr(logger, "continue_from"):
                logger.continue_from(trainer.global_step)
