"""Seeds, sample grids, throughput, progress, profile and export of a run."""

import gzip
import itertools
import json
import time

import pytest
import torch
from PIL import Image
from script import logged

from unclip.training.callbacks.ema import EMA
from unclip.training.callbacks.logs import CsvLogger
from unclip.training.callbacks.outputs import Export, SampleGrid, grid_of
from unclip.training.callbacks.progress import Profile, StepProgress, Throughput
from unclip.training.modules import StageModule, seed_of
from unclip.training.trainer import resolve_precision


def test_a_seed_depends_on_every_part_and_on_nothing_else():
    assert seed_of(0, "prior", 3, 1) == seed_of(0, "prior", 3, 1)
    parts = itertools.product((0, 1), ("prior", "decoder"), (1, 11), (1, 11))
    assert len({seed_of(*part) for part in parts}) == 16
    assert 0 <= seed_of("a") < 2**63


def test_noise_does_not_depend_on_earlier_random_numbers(kit):
    class Wasteful(StageModule):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            torch.randn(7)
            return super().on_after_batch_transfer(batch, dataloader_idx)

    frugal, _ = kit.fit(3)
    wasteful, _ = kit.fit(3, module=kit.module(Wasteful))
    assert frugal.stage.noises == wasteful.stage.noises
    assert len(set(frugal.stage.noises)) == 3


def test_grids_show_averaged_weights_before_training_and_at_each_validation(kit, tmp_path):
    class Colored(StageModule):
        """Shows its first weight as the color of its images."""

        def preview(self, batch):
            color = self.stage.network[0].weight.flatten()[0].detach()
            return {"real": batch["image"], "made": torch.full_like(batch["image"], color)}

    ema, grid, module = EMA(0.5), SampleGrid(tmp_path / "samples", count=3), kit.module(Colored)
    start = module.stage.network[0].weight.flatten()[0].item()
    kit.fit(5, ema, grid, module=module, validate_every_steps=3, num_sanity_val_steps=1)
    files = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert files == ["0000000.png", "0000003.png", "0000005.png", "captions.txt"]
    weights = {"0000000": start, "0000005": ema.weights["network.0.weight"].flatten()[0].item()}
    for name, weight in weights.items():
        with Image.open(tmp_path / "samples" / f"{name}.png") as sheet:
            assert sheet.size == (3 * 6 + 2, 2 * 6 + 2)  # images of 4 px, 2 px apart
            assert sheet.getpixel((3, 9))[0] == pytest.approx((weight + 1) * 127.5, abs=1)
    assert module.stage.training


def test_smaller_images_of_a_grid_are_enlarged():
    grid = grid_of({"small": torch.zeros(2, 3, 4, 4), "large": -torch.ones(2, 3, 8, 8)})
    assert grid.shape == (3, 22, 22)
    assert torch.equal(grid[:, 2:10, 2:10], torch.zeros(3, 8, 8))
    assert torch.equal(grid[:, 12:20, 12:20], -torch.ones(3, 8, 8))


def test_stages_without_a_preview_have_no_grid(kit, tmp_path):
    kit.fit(1, SampleGrid(tmp_path / "samples"), num_sanity_val_steps=1)
    assert not (tmp_path / "samples").exists()


def test_throughput_does_not_count_validation(kit, tmp_path):
    slow = kit.module(hooks={"validation_step": lambda *_: time.sleep(1.0)})
    settings = {"accumulate_grad_batches": 2, "log_every_n_steps": 2, "validate_every_steps": 2}
    settings |= {"loggers": [CsvLogger(tmp_path)], "limit_val_batches": 1}
    started = time.perf_counter()
    kit.fit(4, throughput := Throughput(), module=slow, **settings)
    assert throughput.images == 4 * 2 * 4
    assert 0 < throughput.seconds < time.perf_counter() - started - 2.0
    *_, row = (row for row in logged(tmp_path) if "train/images" in row)
    last = {name.removeprefix("train/"): float(value) for name, value in row.items()}
    assert last["images"] == 32 and 0.1 < last["memory_gib"] < 20
    per_second = 3 * 250_000 * last["images_per_second"]  # a quarter of a batch's FLOPs
    assert last["tflops"] == pytest.approx(per_second / 1e12)
    assert 0 < last["tflops"] < last["mfu"] < 1  # of a peak below 1 TFLOP/s
    assert {"loss", "learning_rate", "gradient_norm"} <= last.keys()


@pytest.mark.parametrize(("steps", "profiled"), [(20, 3), (8, 2)])
def test_some_steps_after_the_first_are_profiled(kit, tmp_path, capsys, steps, profiled):
    """A run that ends earlier reports the steps that it has made."""
    kit.fit(steps, Profile(3, tmp_path))
    with gzip.open(tmp_path / "profile.json.gz") as trace:
        events = json.load(trace)["traceEvents"]
    names = [event.get("name", "") for event in events]
    assert sum(name.startswith("Optimizer.step#") for name in names) == profiled
    assert "aten::convolution" in names
    assert f"trace: {tmp_path / 'profile.json.gz'}" in capsys.readouterr().out


def test_progress_is_printed_in_lines_also_of_a_resumed_run(kit, capsys):
    for steps, path in ((2, None), (4, kit.folder / "last.ckpt")):
        kit.fit(steps, *kit.callbacks(), Throughput(), StepProgress(), resume=path)
        lines = capsys.readouterr().err.splitlines()
        assert ("tiny: resumed after step 2" in lines) == (path is not None)
        assert lines[-1].startswith(f"tiny: step {steps}/{steps} · loss 0.")
        assert "images/s" in lines[-1] and "ends at about" in lines[-1]


def test_progress_is_a_bar_on_a_terminal(kit, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    kit.fit(3, StepProgress())
    assert "tiny: 100%" in capsys.readouterr().err


def test_export_writes_the_averages_and_prints_one_line(kit, tmp_path, monkeypatch, capsys):
    saved = {}

    def save_stage(path, stage, **about):
        saved.update(about, path=path, weight=stage.network[0].weight.detach().clone())

    monkeypatch.setattr("unclip.training.callbacks.outputs.save_stage", save_stage)
    about = {"license": "CC0-1.0", "data": None}
    export = Export(tmp_path / "tiny.safetensors", metric="validation/loss", about=about)
    module, _ = kit.fit(5, ema := EMA(0.5), Throughput(), export, validate_every_steps=2)
    assert torch.equal(saved["weight"], ema.weights["network.0.weight"])
    assert not torch.equal(saved["weight"], module.stage.network[0].weight)
    assert saved["steps"] == 5
    assert saved["recipe"] == {"_target_": "tiny"}
    known = {"seconds", "images", "validation/loss", "license", "command"}
    assert saved["extra"].keys() - {"commit"} == known
    assert (tmp_path / "MODEL_CARD.md").is_file()
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("tiny · 5 steps · 0:0")
    assert "validation/loss" in line and line.endswith("tiny.safetensors")


def test_auto_precision_is_never_emulated_bf16(monkeypatch):
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)
    assert resolve_precision("auto", "cpu") == "32-true"
    assert resolve_precision("bf16-mixed", "cpu") == "bf16-mixed"  # requested by name
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: True)
    assert resolve_precision("auto", "cpu") == "bf16-mixed"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: True)
    assert resolve_precision("auto", "gpu") == resolve_precision("auto", "auto") == "bf16-mixed"
    emulated = lambda including_emulation=True: including_emulation  # noqa: E731
    monkeypatch.setattr("torch.cuda.is_bf16_supported", emulated)
    assert resolve_precision("auto", "gpu") == "16-mixed"


@pytest.mark.parametrize("precision", ["16-true", "bf16-true"])
def test_precisions_that_train_wrong_weights_are_refused(precision):
    with pytest.raises(ValueError, match="use bf16-mixed"):
        resolve_precision(precision, "gpu")
