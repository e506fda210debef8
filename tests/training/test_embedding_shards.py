"""Stored CLIP embeddings: computed once, by several ranks, and used in training."""

import unclip  # isort: skip # noqa: F401

import pytest
import torch
from tiny_shards import write_shards

from unclip.data.embeddings import embeddings_path, read_embeddings
from unclip.data.module import ShardDataModule
from unclip.training import run
from unclip.training.run import embed_shards, ensure_embeddings


class MeanColor:
    """An embedder whose embedding is the mean color."""

    fingerprint, image_size, device = "0123456789abcdef", 32, torch.device("cpu")
    embedding_dim = 3

    def to(self, device):
        return self

    def image(self, image):
        return image.float().mean((2, 3)) / 255


def stored(root):
    found = {}
    for shard in sorted(root.glob("*/64/*.tar")):
        rows, table = read_embeddings(shard, MeanColor.fingerprint)
        found[str(shard.relative_to(root))] = {k: table[row].tolist() for k, row in rows.items()}
    return found


def test_ranks_embed_disjoint_shards_once_that_cover_the_data(tmp_path):
    root, alone = (write_shards(tmp_path / name, shards=3) for name in ("data", "alone"))
    embedder = MeanColor()
    assert embed_shards(embedder, ShardDataModule(alone, workers=0)) == (6, 48)
    data = ShardDataModule(root, workers=0)
    for rank in range(2):
        assert embed_shards(embedder, data, rank=rank, world_size=2) == (3, 24)
        assert embed_shards(embedder, data, rank=rank, world_size=2) == (0, 0)
    found = stored(root)
    assert found == stored(alone)
    keys = found["train/64/00001.tar"]
    assert list(keys) == [f"{index:08d}" for index in range(1, 24, 3)]
    assert keys["00000001"].index(max(keys["00000001"])) == 1  # green
    embeddings_path(root / "val/64/00000.tar", embedder.fingerprint).unlink()
    assert embed_shards(embedder, data).shards == 1


def test_embedding_accepts_the_same_samples_as_training(tmp_path):
    root = write_shards(tmp_path / "data", sizes=(12,), images=60, shards=1)
    embedder = MeanColor()
    settings = {"image_size": 12, "workers": 0}
    with pytest.raises(ValueError, match=r"data\.max_bad_fraction=FRACTION"):
        ensure_embeddings(embedder, ShardDataModule(root, **settings), "cpu")
    for more, rows in (({"max_bad_fraction": 1.0}, 0), ({"minimum_size": 8}, 60)):
        ensure_embeddings(embedder, ShardDataModule(root, **settings, **more), "cpu")
        for shard in root.rglob("*.tar"):
            keys, table = read_embeddings(shard, embedder.fingerprint)
            assert len(keys) == len(table) == rows
            embeddings_path(shard, embedder.fingerprint).unlink()


def test_nothing_is_written_to_a_complete_data_set(tmp_path, monkeypatch):
    root = write_shards(tmp_path / "above" / "data")
    data = ShardDataModule(root, workers=0)
    ensure_embeddings(MeanColor(), data, "cpu")
    assert [path.name for path in (tmp_path / "above").iterdir()] == ["data"]
    monkeypatch.setattr(run, "one_at_a_time", lambda path: pytest.fail("locked"))
    ensure_embeddings(MeanColor(), data, "cpu")


def test_stored_embeddings_equal_those_computed_in_training(tmp_path):
    """Except for the rounding to float16."""
    root = write_shards(tmp_path / "data")
    embedder = MeanColor()
    embed_shards(embedder, ShardDataModule(root, workers=0))
    settings = {"batch_size": 24, "workers": 0}
    (kept,) = ShardDataModule(root, embeddings=embedder.fingerprint, **settings).train_dataloader()
    (fresh,) = ShardDataModule(root, **settings).train_dataloader()
    assert kept["key"] == fresh["key"]
    assert torch.allclose(kept["image_embedding"], embedder.image(fresh["image"]), atol=5e-4)
