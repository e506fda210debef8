import unclip  # noqa: F401 (first of all: with a CPU torch, torchvision fails without it)

# isort: split
import lightning
import pytest
import torch
from make_shards import captions, keys, write_shards

from unclip.data.module import ShardDataModule

SIZES = [7, 13, 20]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("emoji")
    write_shards(root / "train" / "32", SIZES, size=32)
    write_shards(root / "val" / "32", [11], size=32)
    return root


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


def trainer(tmp_path, **options) -> lightning.Trainer:
    return lightning.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=tmp_path,
        **options,
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_fit_sees_every_sample_in_a_new_order_each_epoch(root, tmp_path, workers):
    data = ShardDataModule(root, image_size=32, batch_size=4, workers=workers)
    module = Recorder()
    trainer(tmp_path, max_epochs=3, enable_checkpointing=False).fit(module, data)
    assert [sorted(module.trained[epoch]) for epoch in range(3)] == [keys(SIZES)] * 3
    assert len({tuple(order) for order in module.trained.values()}) == 3
    assert module.validated[1:] == [keys([11])] * 3  # after the sanity check


def test_resuming_continues_with_the_next_epoch(root, tmp_path):
    def data():
        return ShardDataModule(root, image_size=32, batch_size=4, workers=0)

    whole, first, second = Recorder(), Recorder(), Recorder()
    quiet = {"limit_val_batches": 0}
    trainer(tmp_path, max_epochs=3, enable_checkpointing=False, **quiet).fit(whole, data())
    part = trainer(tmp_path, max_epochs=2, enable_checkpointing=False, **quiet)
    part.fit(first, data())
    part.save_checkpoint(tmp_path / "two.ckpt")
    trainer(tmp_path, max_epochs=3, enable_checkpointing=False, **quiet).fit(
        second, data(), ckpt_path=tmp_path / "two.ckpt"
    )
    assert second.trained == {2: whole.trained[2]}


def test_rank_and_world_size_come_from_the_trainer(root):
    class FakeTrainer:
        world_size = 3

    found = []
    for rank in range(3):
        data = ShardDataModule(root, image_size=32, batch_size=4, workers=0)
        data.trainer = FakeTrainer()
        data.trainer.global_rank = rank
        loader = data.train_dataloader()
        assert len(loader) == 4
        found += [k for b in loader for k, v in zip(b["key"], b["valid"], strict=True) if v]
    assert sorted(found) == keys(SIZES)


def test_validation_is_the_same_every_time(root):
    data = ShardDataModule(
        root, image_size=32, batch_size=4, workers=0, crop=16, degradation="bsr", crops_per_image=2
    )
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
    data = ShardDataModule(root, image_size=16, shard_size=32, batch_size=4, workers=0)
    data.prepare_data()
    assert (root / "train" / "32" / "index.json").is_file()
    assert next(iter(data.train_dataloader()))["image"].shape == (4, 3, 16, 16)


def test_the_error_for_missing_data_names_folder_and_command(tmp_path):
    data = ShardDataModule(tmp_path / "emoji_s")
    with pytest.raises(FileNotFoundError, match=r"emoji_s/train/64.*python src/prepare.py emoji"):
        data.prepare_data()


def test_captions_are_read_without_images_and_in_the_same_order(root):
    data = ShardDataModule(root, image_size=32, batch_size=4, workers=0)
    for captions_only, whole in zip(data.caption_loader(), data.train_dataloader(), strict=True):
        assert "image" not in captions_only
        assert captions_only["caption"] == whole["caption"]
