"""Remote shards, on a local web server."""

import json
import subprocess
import time

import fsspec.core
import pytest
from make_shards import keys, load, valid_keys, write_shards

from unclip.data import remote
from unclip.data.module import ShardDataModule
from unclip.data.shards import Shard, list_shards, open_shards, read_positions


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)


def module(root, **options) -> ShardDataModule:
    return ShardDataModule(root, **{"image_size": 16, "batch_size": 4, "workers": 0} | options)


def tars(requested) -> list[str]:
    return [path for path in requested if path.endswith(".tar")]


def write_statistics(folder, *samples):
    for number, successes in enumerate(samples):
        text = json.dumps({"count": 100, "successes": successes})
        (folder / f"{number:05d}_stats.json").write_text(text)


def test_a_remote_data_set_is_read_like_a_local_one(served, tmp_path):
    for split, sizes in (("train", [5, 7]), ("val", [3])):
        write_shards(served.folder / split / "16", sizes)
    local = module(served.folder)
    for _ in range(2):
        data = module(served.url, cache=tmp_path / "cache")
        for loader in ("train_dataloader", "val_dataloader"):
            there, here = (getattr(one, loader)() for one in (data, local))
            assert sorted(valid_keys(there)) == sorted(valid_keys(here))
        fetched = tars(served.requested)
        assert len(fetched) == len(set(fetched)) == 3  # each one once


def test_the_next_shard_is_fetched_while_one_is_read(served, tmp_path):
    write_shards(served.folder, [6, 6, 6])
    paths = remote.list_remote(served.url, tmp_path / "cache")
    samples = read_positions([Shard(path, 6) for path in paths], range(18))
    for number in range(2):
        assert next(samples)[1].key == f"{6 * number:08}"
        deadline = time.monotonic() + 60
        while not paths[number + 1].is_file():  # nothing is read in the meantime
            assert time.monotonic() < deadline
        rest = [next(samples)[1].key for _ in range(5)]
        assert rest[-1] == f"{6 * number + 5:08}"
    assert len(list(samples)) == 6


def test_an_error_of_a_prefetch_is_raised_when_the_shard_is_read(served, tmp_path):
    write_shards(served.folder, [6])
    names = ("00000", "nowhere")
    paths = [remote.list_remote(f"{served.url}/{name}.tar", tmp_path)[0] for name in names]
    samples = read_positions([Shard(path, 6) for path in paths], range(12))
    assert [next(samples)[0] for _ in range(6)] == list(range(6))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.tar"):
        next(samples)


def test_temporary_files_of_killed_downloads_are_deleted(served, tmp_path):
    write_shards(served.folder, [6])
    (path,) = remote.list_remote(f"{served.url}/00000.tar", tmp_path / "cache")
    path.with_name(f".{path.name}.1.tmp").write_bytes(b"half")
    remote.fetch(path)
    assert path.is_file() and not list(path.parent.glob(".*.tmp"))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_output_of_img2dataset_is_read_directly(served, tmp_path, workers):
    write_shards(served.folder, [5, 7, 3])
    write_statistics(served.folder, 5, 7, 3)
    (served.folder / "00000.parquet").write_bytes(b"not read")
    cache, pattern = tmp_path / "cache", "{00000..00002}.tar"
    homes = (str(served.folder), served.url)
    for root in (*homes, *(f"{home}/{pattern}" for home in homes)):
        data = module(root, workers=workers, val_shards=1, cache=cache)
        train = data.train_dataloader()
        assert len(train) == 3
        if root == served.url:
            assert not tars(served.requested)  # the counts came from the statistics
        assert sorted(valid_keys(train)) == keys([12])
        assert valid_keys(data.val_dataloader()) == keys([15])[12:]


@pytest.mark.parametrize(("status", "counts"), [(403, [5, 7]), (503, [50, 70])])
def test_statistics_are_retried_but_optional(served, tmp_path, status, counts):
    """Storage that denies access to missing files, and a server that is busy once."""
    write_shards(served.folder, [5, 7])
    write_statistics(served.folder, 50, 70)
    served.status = lambda path: (
        status if "_stats" in path and served.requested.count(path) == 1 else None
    )
    paths = remote.list_remote(f"{served.url}/{{00000..00001}}.tar", tmp_path / "cache")
    assert [shard.samples for shard in open_shards(paths)] == counts


def test_the_error_names_a_server_that_is_down(served, tmp_path):
    served.status = lambda path: 503
    paths = remote.list_remote(f"{served.url}/00000.tar", tmp_path / "cache")
    with pytest.raises(ConnectionError, match=r"00000_stats\.json cannot be read after 5 attempts"):
        open_shards(paths)
    assert len(served.requested) == 5


def test_the_cache_makes_room(served, tmp_path):
    write_shards(served.folder, [6, 6, 6])
    size = (served.folder / "00000.tar").stat().st_size
    paths = remote.list_remote(served.url, tmp_path / "cache", 2.5 * size / 2**30)
    loader = load(paths, batch_size=6)
    for _ in range(2):  # a deleted shard is fetched again
        assert valid_keys(loader) == keys([18])
        assert sum(path.is_file() for path in paths) == 2


@pytest.mark.parametrize(
    "url",
    [
        "pipe:touch MARK",
        "file:///etc/passwd",
        "simplecache::s3://bucket/a.tar",
        "https://name:secret@host/a.tar",
        "https://host/a.tar?X-Amz-Signature=secret",
        "ssh://host/a.tar",
    ],
)
def test_urls_that_run_commands_or_contain_credentials_are_rejected(url, tmp_path, monkeypatch):
    cache, url = tmp_path / "cache", url.replace("MARK", str(tmp_path / "mark"))
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    for act in (
        lambda: remote.list_remote(url, cache),
        lambda: ShardDataModule(url, val_shards=1, cache=cache).train_dataloader(),
    ):
        with pytest.raises(ValueError, match=r"host.*environment|unsupported URL scheme") as error:
            act()
        assert "secret" not in str(error.value)
    for act in (list_shards, open_shards):
        with pytest.raises(ValueError, match="need a cache folder"):
            act(url)
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_no_url(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_shards(tmp_path / "exp:1" / "train" / "16", [3])
    assert remote.is_url("exp:2") and not remote.is_url("exp:1")
    assert len(module("exp:1", batch_size=1).train_dataloader()) == 3


def test_remote_names_stay_in_the_cache_and_do_not_collide(tmp_path):
    urls = ["http://host/..%2f..%2fx.tar", "s3://b/a/.hidden.tar", f"s3://b/{'y' * 900}.tar"]
    urls += ["s3://a/0.tar", "s3://b/0.tar"]
    paths = [remote.list_remote(url, tmp_path)[0] for url in urls]
    assert {path.parent for path in paths} == {tmp_path} and len(set(paths)) == len(urls)
    assert all(len(path.name) < 90 and not path.name.startswith(".") for path in paths)


def test_a_folder_in_object_storage_is_listed(tmp_path, monkeypatch):
    """With fsspec's storage in memory, whose paths lose a final slash like those of S3."""
    monkeypatch.setattr(remote, "SCHEMES", ("memory",))
    store = fsspec.filesystem("memory")
    for name in ("a/shards/1.tar", "a/shards/0.tar", "a/shards/0.json", "a/shards2.tar"):
        store.pipe(f"memory://{name}", b"x" * 2048)
    paths = remote.list_remote("memory://a/shards", tmp_path)
    assert [path.name.partition("-")[2] for path in paths] == ["0.tar", "1.tar"]
    remote.fetch(paths[0])
    assert paths[0].read_bytes() == b"x" * 2048 and not paths[1].exists()


def test_a_failed_download_leaves_no_partial_file(served, tmp_path):
    served.break_at = 100
    (served.folder / "short.tar").write_bytes(bytes(1000))
    for url, error, message in (
        (f"{served.url}/short.tar", ConnectionError, "short.tar cannot be read after 5 attempts"),
        (f"{served.url}/nowhere.tar", FileNotFoundError, "nowhere"),
        ("http://127.0.0.1:9/a.tar", ConnectionError, r"127\.0\.0\.1:9/"),
    ):
        (path,) = remote.list_remote(url, tmp_path / "cache")
        with pytest.raises(error, match=message):
            remote.fetch(path)
    assert served.requested.count("/short.tar") >= 5
    assert not [path for path in (tmp_path / "cache").iterdir() if "tar" in path.name]


def test_the_error_names_a_missing_package(tmp_path, monkeypatch):
    def missing(url, **_):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(ValueError, match=r"s3fs.*\[cloud\]"):
        remote.list_remote("s3://bucket/folder", tmp_path)
