"""Remote shards: http(s) and object storage through fsspec and a cache folder.

A remote shard is a path in the cache folder with a note NAME.url next to it. The file is fetched
when it is first opened, so all other code works with local, seekable files, and embeddings are
stored next to them in the cache. No shell is involved, and credentials come from the environment
(the variables of fsspec and of the stores). File names in the cache are made here: the contents of
a URL or an archive never determine a path.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from braceexpand import braceexpand

from unclip.files import atomic_write, write_text

SCHEMES = ("http", "https", "s3", "gs", "gcs", "az", "abfs")
ATTEMPTS = 5
FINAL_STATUS = frozenset(range(400, 500)) - {408, 425, 429}  # HTTP errors that a retry cannot fix
logger = logging.getLogger(__name__)


def is_url(source: object) -> bool:
    """Return whether a source is a URL of any scheme, supported or not."""
    return isinstance(source, str) and re.match(r"[A-Za-z][\w+.-]*:", source) is not None


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

    Args:
        url: address of a tar file, a pattern such as s3://bucket/{00000..00099}.tar, or a folder
            that can be listed.
        cache: folder for the fetched shards.
        cache_gib: size limit of the cache; the least recently read shards are deleted. None means
            no limit.

    Raises:
        ValueError: `check_url` rejects the URL.
        FileNotFoundError: there are no shards.
    """
    check_url(url)
    return [_cache_path(one, Path(cache), cache_gib) for one in _expand(url)]


def _expand(url: str) -> list[str]:
    if "{" in url:
        return list(braceexpand(url))
    if url.endswith(".tar"):
        return [url]
    files = _retry(lambda: _glob(url.rstrip("/") + "/"), url)
    if not files:
        raise FileNotFoundError(
            f"no shards (*.tar) in {url}: if its server does not list folders, use "
            f"{url.rstrip('/')}/{{00000..00099}}.tar"
        )
    return sorted(files)


def _glob(folder: str) -> list[str]:
    from fsspec.core import url_to_fs

    system, path = url_to_fs(folder)
    found = [system.unstrip_protocol(name) for name in system.glob(path + "*.tar")]
    return [name for name in found if name.startswith(folder)]


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
        return json.loads(path.with_suffix(".url").read_text())
    except FileNotFoundError:
        return None


def is_available(path: Path) -> bool:
    """Return whether a shard exists or can be fetched."""
    return path.is_file() or path.with_suffix(".url").is_file()


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
        _retry(lambda: _download(note["url"], path), note["url"])
        if note["cache_gib"] is not None:
            _make_room(path, note["cache_gib"] * 2**30)


def _download(url: str, path: Path) -> None:
    from fsspec.core import url_to_fs

    system, name = url_to_fs(url)
    size = system.info(name).get("size")
    with atomic_write(path) as temporary:
        with system.open(name, "rb") as source, open(temporary, "wb") as target:
            shutil.copyfileobj(source, target, 2**20)
            target.flush()
            os.fsync(target.fileno())
        if size is not None and temporary.stat().st_size != size:
            raise OSError(f"received {temporary.stat().st_size} of {size} bytes")


def _retry(action: Callable[[], Any], url: str) -> Any:
    """Call `action` and return its result, retrying network errors after 1, 2, 4 and 8 seconds."""
    for attempt in range(ATTEMPTS):
        try:
            return action()
        except ImportError as error:
            raise ValueError(f"{url}: {error}; pip install -e '.[cloud]'") from None
        except Exception as error:  # each store has its own exception types
            status = getattr(error, "status", None)  # the HTTP status
            if status in FINAL_STATUS:
                raise PermissionError(f"{url}: HTTP status {status}") from None
            if _is_final(error):
                raise type(error)(f"{url}: {type(error).__name__}") from None
            if attempt == ATTEMPTS - 1:
                raise ConnectionError(
                    f"{url} cannot be read after {ATTEMPTS} attempts "
                    f"({type(error).__name__}: {error})"
                ) from None
            logger.warning("%s: %s: %s; retrying", url, type(error).__name__, error)
            time.sleep(2**attempt)


def _is_final(error: Exception) -> bool:
    """Return whether a retry is useless; fsspec reports an unreachable server as a missing file."""
    final = FileNotFoundError | PermissionError
    cause = error.__cause__
    unreachable = isinstance(cause, OSError) and not isinstance(cause, final)
    return isinstance(error, final) and not unreachable


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
                text = _retry(functools.partial(_read_bytes, url), url)
            successes = json.loads(text)["successes"]
        except ConnectionError:
            raise
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if type(successes) is int and successes >= 0:
            yield path, successes


def _read_bytes(url: str) -> bytes:
    from fsspec.core import url_to_fs

    system, name = url_to_fs(url)
    return system.cat_file(name)
