"""Remote shards: http(s) and object storage through fsspec and a cache folder.

A remote shard is a path in the cache folder with a note NAME.url next to it. The file is fetched
when it is first opened, so all other code works with local, seekable files, and embeddings are
stored next to them in the cache. No URL runs a command, and credentials come from the environment
(the variables of fsspec and of the stores). A file name in the cache is a hash with a few letters
of the URL, so no URL can point outside the cache.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec.core
from braceexpand import braceexpand
from fsspec import AbstractFileSystem

from unclip.files import atomic_write, parse_json, read_json, write_text

SCHEMES = ("http", "https", "s3", "gs", "gcs", "az", "abfs")
ATTEMPTS = 5
FINAL_STATUS = frozenset(range(400, 500)) - {408, 425, 429}  # HTTP errors that a retry cannot fix
FINAL = FileNotFoundError, PermissionError
logger = logging.getLogger(__name__)


def is_url(source: object) -> bool:
    """Return whether a source is a URL of any scheme, supported or not, and no existing path."""
    if not isinstance(source, str) or not re.match(r"[A-Za-z][\w+.-]*:", source):
        return False
    return not Path(source).exists()


def check_url(url: str) -> None:
    """Reject everything but the plain address of a file.

    Raises:
        ValueError: the scheme is not supported (`pipe:` would run a command), or the address
            contains credentials, which would end up in configurations and logs.
    """
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES or "::" in url:
        raise ValueError(
            f"unsupported URL scheme {parts.scheme!r} for shards: use {', '.join(SCHEMES)}"
        )
    if parts.query or parts.fragment or "@" in parts.netloc:
        raise ValueError(
            f"{parts.scheme}://{parts.hostname}/…: the URL of shards must not have a ?query or "
            "user:key@, because it is written into configurations and logs; pass credentials "
            "through the environment, such as AWS_PROFILE or FSSPEC_S3"
        )


def list_remote(url: str, cache: str | Path, cache_gib: float | None = None) -> list[Path]:
    """List the cache paths of all shards of a URL, sorted; nothing is fetched.

    The URL is that of a tar file, a pattern such as s3://bucket/{00000..00099}.tar, or a folder
    that can be listed. If the cache exceeds `cache_gib`, the least recently read shards are deleted
    from it.

    Raises:
        ValueError: `check_url` rejects the URL.
        FileNotFoundError: there are no shards.
    """
    check_url(url)
    folder = f"{url.rstrip('/')}/"
    if "{" in url:
        urls = list(braceexpand(url))
    else:
        urls = [url] if url.endswith(".tar") else sorted(_retry(_list_tars, folder))
    if not urls:
        raise FileNotFoundError(
            f"no shards (*.tar) in {url}: if its server does not list folders, use "
            f"{folder}{{00000..00099}}.tar"
        )
    return [_cache_path(one, Path(cache), cache_gib) for one in urls]


def _list_tars(system: AbstractFileSystem, folder: str) -> list[str]:
    folder = folder.rstrip("/") + "/"  # stores drop the slash, web servers need it
    prefix = system.unstrip_protocol(folder)
    found = [system.unstrip_protocol(str(name)) for name in system.glob(f"{folder}*.tar")]
    return [name for name in found if name.startswith(prefix)]


def _cache_path(url: str, cache: Path, cache_gib: float | None) -> Path:
    digest = hashlib.blake2b(url.encode(), digest_size=8).hexdigest()
    name = re.sub(r"[^0-9A-Za-z_-]", "_", url.rpartition("/")[2].removesuffix(".tar"))[-60:]
    path = cache / f"{digest}-{name}.tar"
    note = {"url": url, "cache_gib": cache_gib}
    if _read_note(path) != note:
        write_text(path.with_suffix(".url"), json.dumps(note) + "\n")
    return path


def _read_note(path: Path) -> dict[str, Any] | None:
    try:
        return read_json(path.with_suffix(".url"))
    except FileNotFoundError:
        return None


def fetch(path: Path) -> None:
    """Fetch a remote shard into the cache unless it is there; do nothing for a local one.

    If several processes need the same shard, one of them fetches it. The file appears in the cache
    once it is complete.

    Raises:
        ConnectionError: the download failed or was truncated in all five attempts.
        FileNotFoundError: there is no file at the URL.
        PermissionError: the server denies access.
    """
    note = _read_note(path)
    if note is None:
        return
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.is_file():
            os.utime(path, (time.time(), path.stat().st_mtime))  # mark it as recently read
            return
        check_url(note["url"])
        for stale in path.parent.glob(f".{path.name}.*.tmp"):  # of a killed process
            stale.unlink(missing_ok=True)
        _retry(partial(_download, path=path), note["url"])
        if note["cache_gib"] is not None:
            _make_room(path, note["cache_gib"] * 2**30)


def prefetch(path: Path) -> None:
    """Start to fetch a remote shard in a thread; `fetch` waits for it and raises its errors."""

    def attempt() -> None:
        with contextlib.suppress(Exception):
            fetch(path)

    if not path.is_file():
        threading.Thread(target=attempt, daemon=True).start()


def _download(system: AbstractFileSystem, name: str, path: Path) -> None:
    size = system.info(name).get("size")
    with atomic_write(path) as temporary:
        system.get_file(name, str(temporary))
        received = temporary.stat().st_size
        if size not in (None, received):
            raise OSError(f"received {received} of {size} bytes")


def _retry(action: Callable[[AbstractFileSystem, str], Any], url: str) -> Any:
    """Call action(file system, path); retry network errors after 1, 2, 4 and 8 seconds."""
    for attempt in range(ATTEMPTS):
        try:
            return action(*fsspec.core.url_to_fs(url))
        except ImportError as error:
            raise ValueError(f"{url}: {error}; pip install -e '.[cloud]'") from None
        except Exception as error:  # each store has its own exception types
            reason = f"{type(error).__name__}: {error}"
            status = getattr(error, "status", None)  # the HTTP status
            if status in FINAL_STATUS:
                raise PermissionError(f"{url}: HTTP status {status}") from None
            # fsspec reports an unreachable server as a missing file with a network error as cause.
            unreachable = isinstance(error.__cause__, OSError)
            if isinstance(error, FINAL) and (isinstance(error.__cause__, FINAL) or not unreachable):
                raise type(error)(f"{url}: {type(error).__name__}") from None
            if attempt == ATTEMPTS - 1:
                message = f"{url} cannot be read after {ATTEMPTS} attempts ({reason})"
                raise ConnectionError(message) from None
            logger.warning("%s: %s; retrying", url, reason)
            time.sleep(2**attempt)


def _make_room(newest: Path, limit: float) -> None:
    """Delete the least recently read shards; a process that has one open can still read it."""
    shards = []
    for path in newest.parent.glob("*.tar"):
        with contextlib.suppress(FileNotFoundError):
            found = path.stat()
            shards.append((found.st_atime, found.st_size, path))
    total = sum(size for _, size, _ in shards)
    for _, size, path in sorted(shards):
        if total <= limit:
            break
        if path != newest:
            path.unlink(missing_ok=True)
            total -= size


def read_stats(paths: Sequence[Path]) -> Iterator[tuple[Path, int]]:
    """Yield (shard, samples) for the shards that have img2dataset's NAME_stats.json next to them.

    Raises:
        ConnectionError: a server did not answer in five attempts.
    """
    for path in paths:
        note = _read_note(path)
        try:
            if note is None:
                text = path.with_name(f"{path.stem}_stats.json").read_bytes()
            else:
                url = note["url"].removesuffix(".tar") + "_stats.json"
                text = _retry(lambda system, name: system.cat_file(name), url)
            successes = parse_json(text, path)["successes"]
        except ConnectionError:
            raise
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if type(successes) is int and successes >= 0:
            yield path, successes
