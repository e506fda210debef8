import unclip  # noqa: F401 (first of all: with a CPU torch, torchvision fails without it)

# isort: split
from types import SimpleNamespace

import lightning
import pytest
import torch
from make_shards import captions, keys, valid_keys, write_shards

from unclip.data.module import ShardDataModule

SIZES = [7, 13, 20]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("emoji")
    write_shards(root / "train" / "32", SIZES, size=32)
    write_shards(root / "val" / "32", [11], size=32)
    return root


def module(root, **options) -> ShardDataModule:
    return ShardDataModule(root, **{"image_size": 32, "batch_size": 4, "workers": 0} | options)


class Recorder(lightning.LightningModule):
    """A module that records the keys of its batches."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained: dict[int, list[str]] = {}
        self.validated: list[list[str]] = []

    def training_step(self, batch, index):
        self.trained.setdefault(self.current_epoch, []).extend(batch["key"])
        return self.weight**2

    def on_validation_epoch_start(self):
        self.validated.append([])

    def validation_step(self, batch, index):
        self.validated[-1] += batch["key"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def fit(root, tmp_path):
    """Return a function that trains for some epochs; it returns the trainer and the recorder."""

    def fit(epochs, checkpoint=None, **options):
        recorder, off = Recorder(), ("logger", "enable_checkpointing", "enable_progress_bar")
        off += ("enable_model_summary", "use_distributed_sampler")
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=epochs,
            default_root_dir=tmp_path,
            **dict.fromkeys(off, False),
        )
        trainer.fit(recorder, module(root, **options), ckpt_path=checkpoint)
        return trainer, recorder

    return fit


@pytest.mark.parametrize("workers", [0, 1])
def test_fit_sees_every_sample_in_a_new_order_each_epoch(fit, workers):
    _, recorder = fit(3, workers=workers)
    assert [sorted(recorder.trained[epoch]) for epoch in range(3)] == [keys(SIZES)] * 3
    assert len({tuple(order) for order in recorder.trained.values()}) == 3
    assert recorder.validated[1:] == [keys([11])] * 3  # after the sanity check


def test_resuming_continues_with_the_next_epoch(fit, tmp_path):
    _, whole = fit(3)
    trainer, _ = fit(2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    _, resumed = fit(3, tmp_path / "two.ckpt")
    assert resumed.trained == {2: whole.trained[2]}


def test_rank_and_world_size_come_from_the_trainer(root):
    found = []
    for rank in range(3):
        data = module(root)
        data.trainer = SimpleNamespace(global_rank=rank, world_size=3)
        loader = data.train_dataloader()
        assert len(loader) == 4
        found += valid_keys(loader)
    assert sorted(found) == keys(SIZES)


def test_validation_is_the_same_every_time(root):
    data = module(root, crop=16, degradation="bsr", crops_per_image=2)
    train = next(iter(data.train_dataloader()))
    assert train["image"].shape == (4, 3, 16, 16) and train["low_res"].shape == (4, 3, 4, 4)
    assert len(data.train_dataloader()) == 2 * 10
    loader = data.val_dataloader()
    first = list(loader)
    loader.sampler.set_epoch(7)
    for a, b in zip(first, loader, strict=True):
        assert a["caption"] == [captions(key)[0] for key in a["key"]]
        assert torch.equal(a["image"], b["image"]) and torch.equal(a["low_res"], b["low_res"])


def test_images_can_be_smaller_than_those_of_the_shards(root):
    data = module(root, image_size=16, shard_size=32)
    data.prepare_data()
    assert (root / "train" / "32" / "index.json").is_file()
    assert next(iter(data.train_dataloader()))["image"].shape == (4, 3, 16, 16)


def test_the_error_for_missing_data_names_folder_and_command(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"emoji_s/train/32.*python src/prepare.py emoji"):
        module(tmp_path / "emoji_s").prepare_data()


def test_holding_out_everything_is_an_error(tmp_path):
    write_shards(tmp_path, [2, 2])
    with pytest.raises(ValueError, match="must be between 1 and 1"):
        module(tmp_path, val_shards=2).train_dataloader()


def test_captions_are_read_without_images_and_in_the_same_order(root):
    data = module(root)
    for captions_only, whole in zip(data.caption_loader(), data.train_dataloader(), strict=True):
        assert "image" not in captions_only
        assert captions_only["caption"] == whole["caption"]
