import itertools
import os
from collections import Counter
from collections.abc import Collection

import pytest
import torch
from make_shards import (
    captions,
    encoded,
    flat_image,
    keys,
    load,
    sample,
    valid_keys,
    write_shard,
    write_shards,
)
from PIL import Image

from unclip.data.degradations import DEGRADATIONS
from unclip.data.embeddings import write_embeddings
from unclip.data.loader import ShardLoader
from unclip.data.reader import SampleReader
from unclip.data.shards import open_shards

CLIP = "0123456789abcdef"
SIZES = [7, 13, 20, 1, 9]  # 50 samples, nothing divides anything


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data") / "train" / "16", SIZES)


def joined(lists) -> list:
    return list(itertools.chain(*lists))


def ranks(folder, world_size, **options) -> list[ShardLoader]:
    return [load(folder, rank=r, world_size=world_size, **options) for r in range(world_size)]


def same(batches, others) -> bool:
    return all(
        a["key"] == b["key"] and torch.equal(a["image"], b["image"])
        for a, b in zip(batches, others, strict=True)
    )


def check_passes(passes: list[list[dict]], loaders: list[ShardLoader], shuffle: bool) -> None:
    assert {len(batches) for batches in passes} == {len(loaders[0])}
    assert Counter(joined(map(valid_keys, passes))) == Counter(keys(SIZES))
    if shuffle:
        assert all(len(batch["key"]) == 4 for batch in joined(passes))
        for batches in passes:  # less than a batch of padding
            assert len(valid_keys(batches, padding=True)) - len(valid_keys(batches)) <= 4


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_every_sample_once_an_epoch_for_any_ranks_and_workers(folder, world_size, shuffle):
    loaders = ranks(folder, world_size, batch_size=4, shuffle=shuffle)
    for workers in (1, 2, 3, 11):
        passes = [
            joined(loader._dataset._batches(5, worker, workers) for worker in range(workers))
            for loader in loaders
        ]
        check_passes(passes, loaders, shuffle)


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_sample_once_an_epoch_with_real_workers(folder, world_size, workers):
    for shuffle in (True, False):
        loaders = ranks(folder, world_size, batch_size=4, shuffle=shuffle, workers=workers)
        check_passes([list(loader) for loader in loaders], loaders, shuffle)


def test_ranks_may_outnumber_samples_and_shards(tmp_path):
    folder = write_shards(tmp_path, [2])
    for shuffle in (True, False):
        passes = [list(loader) for loader in ranks(folder, 5, batch_size=4, shuffle=shuffle)]
        assert [len(batches) for batches in passes] == [1] * 5
        assert Counter(joined(map(valid_keys, passes))) == Counter(keys([2]))
        assert all(len(batches[0]["key"]) == (4 if shuffle else 1) for batches in passes)
    (batch,) = load(folder, batch_size=16, workers=2)
    assert batch["key"] == keys([2])


@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
def test_workers_need_no_inherited_state(folder, start_method, monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("WORKER", "0")):
        monkeypatch.setenv(name, value)  # the arguments apply, not the environment
    options = {"batch_size": 4, "shuffle": True, "rank": 1, "world_size": 2}
    here = load(folder, **options)
    there = load(folder, **options, workers=1)
    there._loader.multiprocessing_context = start_method
    for epoch in range(2):
        here.sampler.set_epoch(epoch)
        there.sampler.set_epoch(epoch)
        assert valid_keys(there) == valid_keys(here)


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_differ_and_are_reproducible(folder, workers):
    options = {"batch_size": 4, "shuffle": True, "workers": workers}
    first, second = load(folder, **options), load(folder, **options)
    other = load(folder, SampleReader(image_size=16, seed=1), **options)
    orders = {}
    for epoch in (0, 1, 2, 1):
        first.sampler.set_epoch(epoch)
        order = valid_keys(first)
        assert orders.setdefault(epoch, order) == order
    assert len(set(map(tuple, orders.values()))) == 3
    second.set_epoch(2)
    assert valid_keys(second) == orders[2]
    assert valid_keys(other) != orders[0]


def test_an_iterator_has_the_epoch_of_its_first_batch_and_no_effect_on_the_next(folder):
    loader = load(folder, batch_size=4, shuffle=True, workers=1)
    first = valid_keys(loader)
    next(iter(loader))  # an abandoned epoch
    iterator = iter(loader)
    loader.set_epoch(1)  # as Lightning does when it resumes
    second = valid_keys(iterator)
    loader.set_epoch(0)
    assert valid_keys(loader) == first != second
    loader.set_epoch(1)
    assert valid_keys(loader) == second


def test_loading_does_not_touch_the_global_generators(folder):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    for workers in (0, 1):
        list(load(folder, batch_size=4, shuffle=True, workers=workers))
    assert torch.equal(torch.rand(1), expected)


def test_without_shuffle_the_order_is_that_of_the_shards(folder):
    expected = [keys(SIZES)[i : i + 8] for i in range(0, 50, 8)]
    for workers in (0, 2):
        loader = load(folder, batch_size=8, workers=workers)
        assert len(loader) == len(expected)
        for epoch in (0, 4):
            loader.set_epoch(epoch)
            assert [batch["key"] for batch in loader] == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_twins_are_in_one_batch(tmp_path, workers):
    for shard in range(4):
        names = [f"{15 * shard + i}{twin}" for i in range(15) for twin in ("", "-swap")]
        rows = [sample(0) | {"__key__": name} for name in names]
        write_shard(tmp_path / f"{shard:05}.tar", rows)
    loader = load(tmp_path, batch_size=8, shuffle=True, workers=workers)
    batches = [batch["key"] for batch in loader]
    together = sum(f"{key}-swap" in batch for batch in batches for key in batch)
    assert together >= 60 - 1 - workers  # except pairs cut between workers


def test_captions_do_not_depend_on_workers_and_ranks(folder):
    def chosen(world_size, workers, epoch):
        found = {}
        for loader in ranks(folder, world_size, batch_size=4, shuffle=True, workers=workers):
            loader.set_epoch(epoch)
            for batch in loader:
                found |= dict(zip(batch["key"], batch["caption"], strict=True))
        return found

    first = chosen(1, 0, 1)
    assert first == chosen(3, 0, 1) == chosen(1, 2, 1)
    assert first != chosen(1, 0, 2)
    assert all(caption in captions(key) for key, caption in first.items())
    assert len({caption[-1] for caption in first.values()}) == 5
    reader = SampleReader(image_size=16, random=False)
    for batch in load(folder, reader, batch_size=16, shuffle=True):
        assert batch["caption"] == [captions(key)[0] for key in batch["key"]]


def test_a_batch_has_these_values(folder):
    batch = next(iter(load(folder, batch_size=3)))
    assert list(batch) == ["key", "caption", "image", "valid"]
    assert batch["image"].shape == (3, 3, 16, 16) and batch["image"].dtype == torch.uint8
    assert batch["image"][:, 0, 5, 5].tolist() == [0, 1, 2]
    assert batch["valid"].dtype == torch.bool and batch["valid"].all()
    batch = next(iter(load(folder, SampleReader(image_size=32), batch_size=2)))
    assert batch["image"].shape == (2, 3, 32, 32)


@pytest.fixture
def positions(tmp_path):
    """A shard of six images of 64 px whose pixels are their own positions."""
    image = Image.new("RGB", (64, 64))
    image.putdata([(x, y, 0) for y in range(64) for x in range(64)])
    rows = [sample(i) | {"png": encoded(image)} for i in range(6)]
    return write_shard(tmp_path / "00000.tar", rows)


def corners(batches) -> set[tuple[int, ...]]:
    return {tuple(image[:2, 0, 0].tolist()) for batch in batches for image in batch["image"]}


def test_crops_fit_their_low_res(positions):
    reader = SampleReader(image_size=64, crop=16, crops_per_image=4, degradation="gaussian_blur")
    loader = load(positions, reader, batch_size=3, shuffle=True)
    batches = list(loader)
    assert len(batches) == len(loader) == 8
    assert Counter(valid_keys(batches)) == Counter(keys([6]) * 4)
    for batch in batches:
        assert len(set(batch["key"])) == 3  # the images of a batch are different
        assert batch["image"].shape == (3, 3, 16, 16) and batch["low_res"].shape == (3, 3, 4, 4)
        for image, low_res in zip(batch["image"], batch["low_res"], strict=True):
            left, top = image[0, 0, 0].item(), image[1, 0, 0].item()
            assert (image[0, 3].int() - left).tolist() == list(range(16))
            assert (image[1, :, 3].int() - top).tolist() == list(range(16))
            assert abs(low_res[0, 1, 1].item() - (left + 5.5)) <= 0.6  # the middle of its block
    first = corners(batches)
    assert len(first) > 20
    loader.set_epoch(1)
    assert corners(loader) - first
    reader = SampleReader(image_size=64, crop=16, random=False)
    assert corners(load(positions, reader, batch_size=3)) == {(24, 24)}


@pytest.mark.parametrize(("share", "least", "most"), [(0.0, 0, 0), (0.5, 40, 80), (1.0, 120, 120)])
def test_a_share_of_the_crops_is_clean(positions, share, least, most, monkeypatch):
    black = torch.zeros(3, 4, 4, dtype=torch.uint8)
    monkeypatch.setitem(DEGRADATIONS, "bsr", lambda image, *, seed: black)
    settings = {"image_size": 64, "crop": 16, "crops_per_image": 20, "degradation": "bsr"}
    reader = SampleReader(**settings, clean_share=share)
    low_res = joined(batch["low_res"] for batch in load(positions, reader, batch_size=6))
    assert least <= sum(bool(one.any()) for one in low_res) <= most and len(low_res) == 120


@pytest.mark.parametrize(
    ("name", "value"), [("crop", 65), ("crops_per_image", 2), ("degradation", "box")]
)
def test_an_invalid_reader_is_an_error(name, value):
    with pytest.raises(ValueError, match=name):
        SampleReader(**{name: value})


def test_stored_embeddings_are_matched_by_key(tmp_path):
    folder = write_shards(tmp_path, [5, 6])
    with pytest.raises(FileNotFoundError, match=r"src/embed\.py"):
        load(folder, batch_size=4, embeddings=CLIP)
    for shard in open_shards(folder):
        names = valid_keys(load(shard.path, batch_size=4))
        values = torch.tensor([[float(name), 1.0] for name in names])
        order = torch.randperm(len(names))  # rows are found by key
        write_embeddings(shard.path, CLIP, [names[i] for i in order], values[order])
    reader = SampleReader(load_image=False)
    loader = load(folder, reader, batch_size=4, shuffle=True, embeddings=CLIP)
    for batch in loader:
        assert set(batch) == {"key", "caption", "valid", "image_embedding"}
        assert batch["image_embedding"].dtype == torch.float32
        assert batch["image_embedding"].tolist() == [[float(key), 1.0] for key in batch["key"]]
    write_embeddings(folder / "00000.tar", CLIP, keys([4]), torch.zeros(4, 2))
    loader = load(folder, batch_size=4, embeddings=CLIP)
    assert valid_keys(loader) == [key for key in keys([11]) if key != keys([11])[4]]


def test_images_are_not_decoded_without_load_image(tmp_path):
    rows = [sample(i) | {"png": b"not an image"} for i in range(60)]
    write_shard(tmp_path / "00000.tar", rows)
    reader = SampleReader(load_image=False)
    batches = list(load(tmp_path, reader, batch_size=8, max_bad_fraction=0.0))
    assert valid_keys(batches) == keys([60])
    assert "image" not in batches[0]


def broken_rows(count: int, bad: Collection[int]) -> list[dict]:
    """Samples of which some are bad, for five reasons; the last is a missing image."""
    defects = [{"png": b"corrupt"}, {"json": b"{"}, {"json": b'{"captions": []}'}]
    defects += [{"png": flat_image(1, 1)}, {"png": None}]
    rows = [sample(i) | (defects[i % 5] if i in bad else {}) for i in range(count)]
    return [{name: value for name, value in row.items() if value} for row in rows]


def test_bad_samples_are_skipped_and_counted(tmp_path, caplog):
    bad = {3, 4, 40, 41, 42}
    write_shard(tmp_path / "00000.tar", broken_rows(120, bad))
    good = [key for i, key in enumerate(keys([120])) if i not in bad]
    for workers in (0, 2):
        loader = load(tmp_path, batch_size=8, workers=workers, max_bad_fraction=0.2)
        assert valid_keys(loader) == good
    summary = caplog.records[-1].getMessage()
    assert "skipped 5 of 120" in summary and "not an image" in summary and "bad json" in summary
    loaders = ranks(tmp_path, 2, batch_size=8, shuffle=True, max_bad_fraction=0.2)
    passes = [list(loader) for loader in loaders]
    assert [[len(batch["key"]) for batch in batches] for batches in passes] == [[8] * 8] * 2
    assert Counter(joined(map(valid_keys, passes))) == Counter(good)


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_samples_are_an_error(tmp_path, workers):
    write_shard(tmp_path / "00000.tar", [sample(i) for i in range(40)])
    write_shard(tmp_path / "00001.tar", broken_rows(60, range(0, 60, 6)))
    loader = load(tmp_path, batch_size=8, workers=workers)
    with pytest.raises(ValueError, match=r"(?s)are bad .*00001\.tar.*max_bad_fraction"):
        list(loader)


def test_ranks_stay_in_step_when_whole_batches_are_bad(tmp_path):
    write_shard(tmp_path / "00000.tar", broken_rows(24, range(12, 24)))
    for shuffle in (True, False):
        loaders = ranks(tmp_path, 2, batch_size=4, shuffle=shuffle, max_bad_fraction=1.0)
        passes = [list(loader) for loader in loaders]
        assert [len(batches) for batches in passes] == [3, 3]
        assert Counter(joined(map(valid_keys, passes))) == Counter(keys([12]))
    write_shard(tmp_path / "00000.tar", broken_rows(10, range(10)))
    with pytest.raises(ValueError, match="none of the 10 samples"):
        list(load(tmp_path, batch_size=4, shuffle=True, max_bad_fraction=1.0))


def test_a_shard_truncated_during_training_keeps_the_count(tmp_path):
    folder = write_shards(tmp_path, [20, 20])
    loader = load(folder, batch_size=4, shuffle=True, max_bad_fraction=1.0)
    assert len(list(loader)) == 10
    os.truncate(folder / "00001.tar", 13 * 2048)
    batches = list(loader)
    assert len(batches) == 10 and all(len(batch["key"]) == 4 for batch in batches)
    assert set(valid_keys(batches)) == set(keys([33]))


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_a_loader_resumes_within_an_epoch(folder, workers):
    """50 samples make 13 batches of 4, which no number of workers above 1 divides."""
    options = {"batch_size": 4, "shuffle": True, "workers": workers}
    loader = load(folder, **options)
    loader.set_epoch(3)
    whole = list(loader)
    loader.set_epoch(4)
    following = valid_keys(loader)
    for cut in (1, 5, 12) if workers else range(14):
        first = load(folder, **options)
        first.set_epoch(3)
        list(itertools.islice(first, cut))
        assert first.state_dict() == {"batches": cut}
        second = load(folder, **options)
        second.load_state_dict(first.state_dict())
        second.set_epoch(3)
        assert same(list(second), whole[cut:])
        assert second.state_dict() == {"batches": 13}
        second.set_epoch(4)
        assert valid_keys(second) == following  # the next epoch is whole again


@pytest.mark.parametrize(("before", "after"), [(1, 2), (4, 2), (1, 7)])
def test_ranks_of_another_number_stay_in_step_and_complete_the_next_epoch(folder, before, after):
    """With 7 ranks, the consumed batches are more than an epoch has."""
    options = {"batch_size": 4, "shuffle": True}
    first = ranks(folder, before, **options)[0]
    consumed = len(list(itertools.islice(first, len(first) - 1)))
    loaders = ranks(folder, after, **options)
    for loader in loaders:
        loader.load_state_dict(first.state_dict())
    rest = max(len(loaders[0]) - consumed, 0)
    assert [len(list(loader)) for loader in loaders] == [rest] * after
    for loader in loaders:
        loader.set_epoch(1)
    check_passes([list(loader) for loader in loaders], loaders, shuffle=True)


def test_a_loader_resumes_between_the_crops_of_an_image(tmp_path):
    write_shard(tmp_path / "00000.tar", [sample(i) for i in range(10)])
    reader = SampleReader(image_size=16, crop=8, crops_per_image=3)
    options = {"batch_size": 2, "shuffle": True, "workers": 2}
    whole = list(load(tmp_path, reader, **options))
    loader = load(tmp_path, reader, **options)
    loader.load_state_dict({"batches": 7})
    assert same(list(loader), whole[7:])
