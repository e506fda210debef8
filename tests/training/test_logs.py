"""The logs of a run, also of a resumed one."""

import os
from pathlib import Path

import pytest
import torch
import wandb
import yaml
from hydra.utils import instantiate
from script import logged

from unclip.training.callbacks.logs import CsvLogger, wandb_logger

CONF = Path(__file__).parents[2] / "conf"


def test_lines_are_written_at_once_and_columns_can_be_added_later(tmp_path):
    logger = CsvLogger(tmp_path)
    logger.log_metrics({"train/loss": torch.tensor(0.5)}, 1)
    logger.log_metrics({"train/loss": 0.1 + 0.2}, 3)
    logger.log_metrics({"validation/loss": 2}, 4)
    assert logged(tmp_path) == [
        {"step": "1", "train/loss": "0.5"},
        {"step": "3", "train/loss": "0.30000000000000004"},
        {"step": "4", "validation/loss": "2"},
    ]


def test_a_resumed_run_continues_its_log_from_the_checkpoint(tmp_path):
    whole, cut = CsvLogger(tmp_path / "whole"), CsvLogger(tmp_path / "cut")

    def log(logger, steps):
        for step in steps:
            logger.log_metrics({"train/loss": 1 / (1 + step), "epoch": 0}, step)
            if step % 3 == 2:  # Lightning's step
                logger.log_metrics({"validation/loss": step, "epoch": 0}, step)

    log(whole, range(9))
    log(cut, range(8))
    metrics = tmp_path / "cut" / "logs" / "metrics.csv"
    for resumed_at, torn in ((6, "7,0."), (3, "8"), (4, ""), (0, "")):
        metrics.write_text(metrics.read_text() + torn)  # killed while writing a line
        log(CsvLogger(tmp_path / "cut"), range(resumed_at, 9))
        assert logged(tmp_path / "cut") == logged(tmp_path / "whole"), resumed_at


def test_a_repeated_validation_is_logged_once(tmp_path):
    first = CsvLogger(tmp_path)
    first.log_metrics({"train/loss": 1.0}, 2)
    first.log_metrics({"validation/loss": 5.0}, 2)
    CsvLogger(tmp_path).log_metrics({"validation/loss": 5.0}, 2)
    assert logged(tmp_path) == [
        {"step": "2", "train/loss": "1.0"},
        {"step": "2", "validation/loss": "5.0"},
    ]


@pytest.fixture
def no_account(monkeypatch, tmp_path):
    for name in list(os.environ):
        if name.startswith("WANDB"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    wandb.teardown()  # it remembers the variables
    yield
    wandb.teardown()


def test_wandb_without_a_key_is_offline_and_keeps_the_runs_id(no_account, tmp_path, capsys):
    first = wandb_logger(tmp_path / "run", project="p", name="n")
    again = wandb_logger(tmp_path / "run", project="p", name="n")
    other = wandb_logger(tmp_path / "other", project="p", name="n")
    assert first._offline and first._wandb_init["resume"] == "allow"
    assert first._id == again._id == (tmp_path / "run" / "wandb_id").read_text() != other._id
    assert "wandb sync" in capsys.readouterr().out


MALFORMED = "machine api.wandb.ai login user password short"


@pytest.mark.parametrize(
    ("netrc", "variables", "offline"),
    [
        ("machine github.com login me password secret", {}, True),
        ("", {"WANDB_API_KEY": ""}, True),
        ("", {"WANDB_API_KEY": "short"}, True),
        (MALFORMED, {}, True),
        (MALFORMED.replace("short", "k" * 40), {}, False),
        ("", {"WANDB_API_KEY": "k" * 40}, False),
        ("", {"WANDB_API_KEY": "k" * 40, "WANDB_MODE": "offline"}, True),
    ],
)
def test_wandb_is_online_if_it_would_find_a_key_itself(
    no_account, monkeypatch, tmp_path, capsys, netrc, variables, offline
):
    (tmp_path / ".netrc").write_text(netrc)
    (tmp_path / ".netrc").chmod(0o600)
    for name, text in variables.items():
        monkeypatch.setenv(name, text)
    assert wandb_logger(tmp_path / "run", project="p", name="n")._offline == offline
    assert ("wandb sync" in capsys.readouterr().out) == offline


def test_nothing_is_written_if_wandb_is_disabled(no_account, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    logger = wandb_logger(tmp_path / "run", project="p", name="n")
    logger.log_hyperparams({"seed": 0})
    logger.log_metrics({"train/loss": 1.0}, 1)
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == ""


def test_tensorboard_takes_the_configuration_and_metrics(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = yaml.safe_load((CONF / "logger" / "tensorboard.yaml").read_text())["tensorboard"]
    logger = instantiate(config | {"save_dir": str(tmp_path)})
    logger.log_hyperparams({"optimizer": {"lr": 0.1}})
    logger.log_metrics({"train/loss": 0.5}, 3)
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Scalars("train/loss")[0].value == 0.5
