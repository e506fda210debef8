import pytest
import torch
from make_shards import keys, sample, write_shard, write_shards

from unclip.data.embeddings import (
    check_embeddings,
    embeddings_path,
    missing_embeddings,
    read_embeddings,
    write_embeddings,
)

CLIP = "0123456789abcdef"


def test_embeddings_are_stored_next_to_their_shard(tmp_path):
    shard = write_shards(tmp_path, [4]) / "00000.tar"
    embedding = torch.randn(4, 6)
    path = write_embeddings(shard, CLIP, keys([4]), embedding)
    assert path == tmp_path / f"00000.{CLIP}.safetensors" == embeddings_path(shard, CLIP)
    rows, table = read_embeddings(shard, CLIP)
    assert rows == {key: i for i, key in enumerate(keys([4]))}
    assert table.dtype == torch.float32
    assert torch.equal(table, embedding.half().float())
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name, "00000.tar"]


def test_missing_and_outdated_embeddings_are_found(tmp_path):
    folder = write_shards(tmp_path, [2, 2, 2])
    shards = sorted(folder.glob("*.tar"))
    assert missing_embeddings(folder, CLIP) == shards
    for shard in shards[:2]:
        write_embeddings(shard, CLIP, ["a", "b"], torch.ones(2, 3))
    assert missing_embeddings(folder, CLIP) == shards[2:]
    assert missing_embeddings(folder, "f" * 16) == shards  # those of another CLIP do not count
    with pytest.raises(FileNotFoundError, match=r"00002\.0123.*src/embed.py"):
        check_embeddings(folder, CLIP)
    write_embeddings(shards[2], CLIP, ["a", "b"], torch.ones(2, 3))
    check_embeddings(folder, CLIP)
    write_shard(shards[0], [sample(77), sample(78)])  # rewritten: its embeddings are outdated
    assert missing_embeddings(folder, CLIP) == shards[:1]
    embeddings_path(shards[1], CLIP).write_bytes(b"cut off")
    assert missing_embeddings(folder, CLIP) == shards[:2]


def test_missing_and_broken_files_are_errors(tmp_path):
    shard = write_shards(tmp_path, [2]) / "00000.tar"
    with pytest.raises(FileNotFoundError, match=r"src/embed\.py"):
        read_embeddings(shard, CLIP)
    with pytest.raises(ValueError, match="fingerprint"):
        embeddings_path(shard, "../../x")
    embeddings_path(shard, CLIP).write_bytes(b"\0" * 100)
    with pytest.raises(ValueError, match="delete it and run"):
        read_embeddings(shard, CLIP)
