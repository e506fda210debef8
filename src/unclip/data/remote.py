"""Shards that lie elsewhere: http(s) and object storage through fsspec, by way of a cache folder.

A shard elsewhere is a path in the cache folder with a note NAME.url beside it, and the path's file
is fetched when it is first opened. So everything else deals with local files, which it can seek in,
and embeddings stand beside them in the cache. Nothing is run through a shell, credentials come from
the environment (fsspec's and the stores' own variables), and the cache's names are made here: what
a URL or an archive says never chooses a path.
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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from braceexpand import braceexpand

from unclip.files import atomic_write

SCHEMES = ("http", "https", "s3", "gs", "gcs", "az", "abfs")
ATTEMPTS = 5
REFUSALS = frozenset(range(400, 500)) - {408, 425, 429}  # HTTP's, but for those that pass
logger = logging.getLogger(__name__)


def is_url(source: object) -> bool:
    """Whether a source is named by a URL (of any kind, also of those that are refused)."""
    return isinstance(source, str) and re.match(r"[A-Za-z][\w+.-]*:", source) is not None


def check_url(url: str) -> None:
    """Refuse what is no plain address of a file.

    Raises:
        ValueError: another scheme (`pipe:` would run a command), or credentials in the address,
            which would end up in configurations and logs.
    """
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES or "::" in url:
        raise ValueError(
            f"{parts.scheme}: is no place to read shards from: it can be {', '.join(SCHEMES)}"
        )
    if parts.query or parts.fragment or "@" in parts.netloc:
        raise ValueError(
            f"{parts.scheme}://{parts.hostname}/…: a URL of shards has no ?query and no user:key@, "
            "since it is written into configurations and logs; give credentials through the "
            "environment, such as AWS_PROFILE or FSSPEC_S3"
        )


def list_remote(url: str, cache: str | Path, cache_gib: float | None = None) -> list[Path]:
    """The places in the cache of all shards of a URL, sorted; nothing is fetched.

    Args:
        url: of a tar file, of a pattern such as s3://bucket/{00000..00099}.tar, or of a folder
            that can be listed.
        cache: the folder that fetched shards go into.
        cache_gib: how large it may grow; shards read longest ago go first. None for no bound.

    Raises:
        ValueError: `check_url` refuses it.
        FileNotFoundError: there are no shards.
    """
    check_url(url)
    return [_place(one, Path(cache), cache_gib) for one in _expand(url)]


def _expand(url: str) -> list[str]:
    if "{" in url:
        return list(braceexpand(url))
    if url.endswith(".tar"):
        return [url]
    files = _patiently(lambda: _glob(url.rstrip("/") + "/"), url)
    if not files:
        raise FileNotFoundError(
            f"no shards (*.tar) in {url}: if its server does not list folders, say "
            f"{url.rstrip('/')}/{{00000..00099}}.tar"
        )
    return sorted(files)


def _glob(folder: str) -> list[str]:
    from fsspec.core import url_to_fs

    system, path = url_to_fs(folder)
    found = [system.unstrip_protocol(name) for name in system.glob(path + "*.tar")]
    return [name for name in found if name.startswith(folder)]


def _place(url: str, cache: Path, cache_gib: float | None) -> Path:
    digest = hashlib.blake2b(url.encode(), digest_size=8).hexdigest()
    name = re.sub(r"[^0-9A-Za-z_-]", "_", url.rpartition("/")[2].removesuffix(".tar"))[-60:]
    path = cache / f"{digest}-{name}.tar"
    note = {"url": url, "cache_gib": cache_gib}
    if _note(path) != note:
        with atomic_write(path.with_suffix(".url")) as temporary:
            temporary.write_text(json.dumps(note) + "\n")
    return path


def _note(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.with_suffix(".url").read_text())
    except FileNotFoundError:
        return None


def is_known(path: Path) -> bool:
    """Whether a shard is there or can be fetched."""
    return path.is_file() or path.with_suffix(".url").is_file()


def fetch(path: Path) -> None:
    """Bring a shard into the cache, if it lies elsewhere and is not there already.

    Several processes may ask for it at once; one fetches. The file appears when it is whole.

    Raises:
        ConnectionError: it could not be had in five attempts, or came short each time.
        FileNotFoundError: it is not at its URL.
        PermissionError: its server refuses to give it.
    """
    note = _note(path)
    if note is None:
        return
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.is_file():
            os.utime(path, (time.time(), path.stat().st_mtime))  # read just now
            return
        check_url(note["url"])
        _patiently(lambda: _download(note["url"], path), note["url"])
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
            raise OSError(f"{temporary.stat().st_size} of {size} bytes came")


def _patiently(action: Any, url: str) -> Any:
    """What `action` returns, tried again after 1, 2, 4, … seconds when the network fails."""
    for attempt in range(ATTEMPTS):
        try:
            return action()
        except ImportError as error:
            raise ValueError(f"{url}: {error}; pip install -e '.[cloud]'") from None
        except Exception as error:  # each store has errors of its own
            status = getattr(error, "status", None)  # of http
            if status in REFUSALS:
                raise PermissionError(f"{url}: HTTP status {status}") from None
            if _is_final(error):
                raise type(error)(f"{url}: {type(error).__name__}") from None
            if attempt == ATTEMPTS - 1:
                raise ConnectionError(
                    f"{url} cannot be read after {ATTEMPTS} attempts "
                    f"({type(error).__name__}: {error})"
                ) from None
            logger.warning("%s: %s: %s; trying again", url, type(error).__name__, error)
            time.sleep(2**attempt)


def _is_final(error: Exception) -> bool:
    """Whether to try again is vain; fsspec says that a file is missing when a server is, too."""
    final = FileNotFoundError | PermissionError
    cause = error.__cause__
    unreachable = isinstance(cause, OSError) and not isinstance(cause, final)
    return isinstance(error, final) and not unreachable


def _make_room(newest: Path, limit: float) -> None:
    """Delete the shards that were read longest ago; who has one open can read it to its end."""
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


def stated_counts(paths: Sequence[Path]) -> Iterator[tuple[Path, int]]:
    """(shard, samples) of those with img2dataset's NAME_stats.json beside them or their URL.

    Raises:
        ConnectionError: a server could not be asked in five attempts.
    """
    for path in paths:
        note = _note(path)
        try:
            if note is None:
                text = path.with_name(f"{path.stem}_stats.json").read_bytes()
            else:
                url = note["url"].removesuffix(".tar") + "_stats.json"
                text = _patiently(functools.partial(_read, url), url)
            successes = json.loads(text)["successes"]
        except ConnectionError:
            raise
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if type(successes) is int and successes >= 0:
            yield path, successes


def _read(url: str) -> bytes:
    from fsspec.core import url_to_fs

    system, name = url_to_fs(url)
    return system.cat_file(name)
