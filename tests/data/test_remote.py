"""Remote shards, on a local web server; no other host is contacted."""

import functools
import http.server
import json
import subprocess
import threading
import time

import fsspec.core
import pytest
from make_shards import load, write_shards

from unclip.data import remote
from unclip.data.module import ShardDataModule
from unclip.data.shards import Shard, list_shards, open_shards, read_positions


class Server(http.server.SimpleHTTPRequestHandler):
    requested: list[str]

    def do_GET(self):
        self.requested.append(self.path)
        if "short" in self.path:  # a connection that breaks off
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(b"x" * 100)
            return
        refused = "refused" in self.path and "_stats" in self.path
        busy = "busy" in self.path and self.requested.count(self.path) == 1
        if refused or busy or "down" in self.path:
            self.send_error(403 if refused else 503)
            return
        super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def served(tmp_path, monkeypatch):
    """Return the served folder, its URL and the requested paths."""
    folder = tmp_path / "served"
    folder.mkdir()
    monkeypatch.setattr(Server, "requested", [], raising=False)
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    handler = functools.partial(Server, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}", Server.requested
    server.shutdown()
    server.server_close()


def keys(loader):
    return sorted(key for batch in loader for key in batch["key"])


def test_a_remote_data_set_is_read_like_a_local_one(served, tmp_path):
    folder, url, requested = served
    for split, sizes in (("train", [5, 7]), ("val", [3])):
        write_shards(folder / split / "16", sizes)
    settings = {"image_size": 16, "batch_size": 4, "workers": 0}
    local = ShardDataModule(folder, **settings)
    remote_data = ShardDataModule(url, cache=tmp_path / "cache", **settings)
    assert keys(remote_data.train_dataloader()) == keys(local.train_dataloader())
    assert keys(remote_data.val_dataloader()) == keys(local.val_dataloader())
    fetched = [path for path in requested if path.endswith(".tar")]
    assert len(fetched) == len(set(fetched)) == 3  # each one once
    again = ShardDataModule(url, cache=tmp_path / "cache", **settings)
    assert len(again.train_dataloader()) == len(local.train_dataloader())
    assert [path for path in requested if path.endswith(".tar")] == fetched


def test_the_next_shard_is_fetched_while_one_is_read(served, tmp_path, monkeypatch):
    folder, url, _ = served
    write_shards(folder, [6, 6, 6])
    paths = remote.list_remote(url, tmp_path / "cache")
    shards = [Shard(path, 6) for path in paths]
    samples = read_positions(shards, range(18))
    for number in range(2):
        key = next(samples)[1].key
        assert key == f"{6 * number:08}"
        deadline = time.monotonic() + 60
        while not paths[number + 1].is_file():  # nothing is read in the meantime
            assert time.monotonic() < deadline
        rest = [next(samples)[1].key for _ in range(5)]
        assert rest[-1] == f"{6 * number + 5:08}"
    assert len(list(samples)) == 6


def test_an_error_of_a_prefetch_is_raised_when_the_shard_is_read(served, tmp_path):
    folder, url, _ = served
    write_shards(folder, [6])
    paths = [remote.list_remote(f"{url}/{n}.tar", tmp_path)[0] for n in ("00000", "nowhere")]
    samples = read_positions([Shard(path, 6) for path in paths], range(12))
    assert [next(samples)[0] for _ in range(6)] == list(range(6))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.tar"):
        next(samples)


def test_temporary_files_of_killed_downloads_are_deleted(served, tmp_path):
    folder, url, _ = served
    write_shards(folder, [6])
    (path,) = remote.list_remote(f"{url}/00000.tar", tmp_path / "cache")
    path.with_name(f".{path.name}.1.tmp").write_bytes(b"half")
    remote.fetch(path)
    assert path.is_file() and not list(path.parent.glob(".*.tmp"))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_output_of_img2dataset_is_read_directly(served, tmp_path, workers):
    folder, url, requested = served
    write_shards(folder, [5, 7, 3])
    for number, samples in enumerate((5, 7, 3)):
        stats = {"count": 10, "successes": samples, "failed_to_download": 10 - samples}
        (folder / f"{number:05d}_stats.json").write_text(json.dumps(stats))
        (folder / f"{number:05d}.parquet").write_bytes(b"not read")
    pattern = f"{url}/{{00000..00002}}.tar"
    for root in (str(folder), url, pattern, f"{folder}/{{00000..00002}}.tar"):
        data = ShardDataModule(
            root,
            image_size=16,
            batch_size=4,
            workers=workers,
            val_shards=1,
            cache=tmp_path / "cache",
        )
        train = data.train_dataloader()
        assert len(train) == 3
        if root == url:  # the counts came from the statistics
            assert not [path for path in requested if path.endswith(".tar")]
        assert keys(train) == [f"{n:08}" for n in range(12)]
        assert keys(data.val_dataloader()) == [f"{n:08}" for n in range(12, 15)]


@pytest.mark.parametrize(("folder", "counts"), [("refused", [5, 7]), ("busy", [50, 70])])
def test_statistics_are_retried_but_optional(served, tmp_path, folder, counts):
    """Storage that denies access to missing files, and a server that fails once."""
    home, url, _ = served
    write_shards(home / folder, [5, 7])
    for number in range(2):
        stats = {"successes": (50, 70)[number]}
        (home / folder / f"{number:05d}_stats.json").write_text(json.dumps(stats))
    paths = remote.list_remote(f"{url}/{folder}/{{00000..00001}}.tar", tmp_path / "cache")
    assert [shard.samples for shard in open_shards(paths)] == counts


def test_the_error_names_a_server_that_is_down(served, tmp_path):
    _, url, requested = served
    paths = remote.list_remote(f"{url}/down/00000.tar", tmp_path / "cache")
    with pytest.raises(ConnectionError, match=r"00000_stats\.json cannot be read after 5 attempts"):
        open_shards(paths)
    assert len(requested) == 5


def test_holding_out_everything_is_an_error(tmp_path):
    write_shards(tmp_path, [2, 2])
    with pytest.raises(ValueError, match="must be between 1 and 1"):
        ShardDataModule(tmp_path, val_shards=2).train_dataloader()


def test_the_cache_makes_room(served, tmp_path):
    folder, url, _ = served
    write_shards(folder, [6, 6, 6])
    size = (folder / "00000.tar").stat().st_size
    paths = remote.list_remote(url, tmp_path / "cache", 2.5 * size / 2**30)
    loader = load(paths, batch_size=6)
    for _ in range(2):  # a deleted shard is fetched again
        assert keys(loader) == [f"{n:08}" for n in range(18)]
        assert sum(path.is_file() for path in paths) == 2
    assert all(path.parent == tmp_path / "cache" for path in paths)


@pytest.mark.parametrize(
    "url",
    [
        "pipe:touch MARK",
        "file:///etc/passwd",
        "simplecache::s3://bucket/a.tar",
        "https://name:key@host/a.tar",
        "https://host/a.tar?X-Amz-Signature=abc",
        "ssh://host/a.tar",
    ],
)
def test_urls_that_run_commands_or_contain_credentials_are_rejected(url, tmp_path, monkeypatch):
    mark = tmp_path / "mark"
    url = url.replace("MARK", str(mark))
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    for act in (
        lambda: remote.list_remote(url, tmp_path / "cache"),
        lambda: ShardDataModule(url, val_shards=1, cache=tmp_path / "cache").train_dataloader(),
        lambda: list_shards(url),
        lambda: open_shards(url),
    ):
        with pytest.raises(
            ValueError, match=r"environment|unsupported URL scheme|need a cache folder"
        ):
            act()
    assert not mark.exists() and not (tmp_path / "cache").exists()


def test_an_existing_folder_is_no_url(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_shards(tmp_path / "exp:1" / "train" / "16", [3])
    assert remote.is_url("exp:2") and not remote.is_url("exp:1")
    assert len(ShardDataModule("exp:1", image_size=16, batch_size=1).train_dataloader()) == 3


def test_the_error_does_not_repeat_the_secret():
    for url in ("https://name:secret@host/a.tar", "https://host/a.tar?Signature=secret"):
        with pytest.raises(ValueError, match="host") as rejected:
            remote.check_url(url)
        assert "secret" not in str(rejected.value)


def test_remote_names_stay_in_the_cache(tmp_path):
    for url in (
        "http://host/..%2f..%2fx.tar",
        "s3://b/a/.hidden.tar",
        "s3://b/" + "y" * 900 + ".tar",
    ):
        (path,) = remote.list_remote(url, tmp_path / "cache")
        assert path.parent == tmp_path / "cache" and len(path.name) < 90
        assert not path.name.startswith(".")


def test_equal_names_at_two_urls_do_not_collide(tmp_path):
    one, other = (remote.list_remote(f"s3://{b}/0.tar", tmp_path)[0] for b in "ab")
    assert one != other


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
    _, url, requested = served
    (path,) = remote.list_remote(f"{url}/short.tar", tmp_path / "cache")
    with pytest.raises(ConnectionError, match=r"short\.tar cannot be read after 5 attempts"):
        remote.fetch(path)
    assert len(requested) >= 5
    assert not path.exists() and not list(path.parent.glob("*.tmp"))
    (path,) = remote.list_remote(f"{url}/nowhere.tar", tmp_path / "cache")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        remote.fetch(path)
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1:9/"):
        remote.fetch(remote.list_remote("http://127.0.0.1:9/a.tar", tmp_path / "cache")[0])


def test_the_error_names_a_missing_package(tmp_path, monkeypatch):
    def missing(url, **_):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(ValueError, match=r"s3fs.*\[cloud\]"):
        remote.list_remote("s3://bucket/folder", tmp_path)
