"""Write files atomically, hash them, and read text and JSON."""

import codecs
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

MAX_FILE_BYTES = 2**30  # size limit of text and image files; COCO's largest text has 450 MB
_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success it replaces `path`.

    The folder is created if needed. After an error, `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.errno and not error.filename:  # a failed write does not name the file
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_tensors(
    path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file atomically; it is on the disk when this returns.

    Raises:
        OSError: the disk is full, or the folder is not writable.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic_write(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            save_file(dict(tensors), temporary, metadata=dict(metadata or {}))
        except SafetensorError as error:
            raise OSError(f"cannot write {path}: {error}") from None
        temporary.chmod(mode)  # safetensors makes its files private
        with temporary.open("r+b") as file:
            _sort_metadata(file)
            os.fsync(file.fileno())


def _sort_metadata(file: BinaryIO) -> None:
    """Sort a safetensors header in place: the library writes metadata in a random order."""
    size = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(size))
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    if len(text) <= size:
        file.seek(8)
        file.write(text.ljust(size))


def read_bytes(path: Path, limit: int = MAX_FILE_BYTES) -> bytes:
    """Read a regular file; ValueError if it has more than `limit` bytes."""
    if path.exists() and not path.is_file():  # reading a pipe could wait forever
        raise OSError(f"{path} is not a file")
    with path.open("rb") as file:
        if (size := os.fstat(file.fileno()).st_size) > limit:
            raise ValueError(f"{path} has {size} bytes, the limit is {limit}")
        return file.read()


def decode_text(content: bytes, name: object) -> str:
    """Decode UTF-8, or UTF-16 that starts with a byte order mark, which is removed.

    Lone surrogates in UTF-16 become U+FFFD.

    Args:
        content: the bytes of a text.
        name: name of the text in error messages.

    Raises:
        ValueError: the text has another encoding or contains a NUL.
    """
    marks = (mark for mark in _BYTE_ORDER_MARKS if content.startswith(mark))
    mark = next(marks, b"")
    encoding = _BYTE_ORDER_MARKS.get(mark, "utf-8")
    errors = "strict" if encoding == "utf-8" else "surrogatepass"
    try:
        text = content[len(mark) :].decode(encoding, errors)
    except UnicodeDecodeError as error:
        offset = len(mark) + error.start
        raise ValueError(f"{name}: byte {offset} is not {encoding}: save it as UTF-8") from None
    if "\0" in text:
        offset = len(mark) + len(text[: text.index("\0")].encode(encoding, errors))
        raise ValueError(f"{name}: byte {offset} is a NUL: it is not a text file in UTF-8")
    return _LONE_SURROGATE.sub("\ufffd", text)


def read_text(path: Path, limit: int = MAX_FILE_BYTES) -> str:
    """Read a text file as `decode_text` does; it has at most `limit` bytes."""
    return decode_text(read_bytes(path, limit), path)


def split_lines(text: str) -> list[str]:
    r"""Split a text at "\n" and "\r\n" only: `str.splitlines` also splits at U+2028 and others."""
    return text.replace("\r\n", "\n").removesuffix("\n").split("\n")


def parse_json(content: bytes | str, name: object) -> Any:
    """Parse JSON; in its strings, lone surrogates become U+FFFD and NULs are removed.

    Raises:
        ValueError: it is not JSON; the message starts with `name`.
    """
    text = decode_text(content, name) if isinstance(content, bytes) else content
    try:
        return _clean(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON: {error}") from None


def read_json(path: Path) -> Any:
    """Read a JSON file as `parse_json` does."""
    return parse_json(read_bytes(path), path)


def read_json_lines(path: Path) -> Iterator[Any]:
    """Yield the values of a file with one JSON value per line; blank lines are skipped."""
    for number, line in enumerate(split_lines(read_text(path)), start=1):
        if line.strip():
            yield parse_json(line, f"{path}, line {number}")


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return _LONE_SURROGATE.sub("\ufffd", value).replace("\0", "")
    if isinstance(value, list):
        return [_clean(one) for one in value]
    if isinstance(value, dict):
        return {_clean(key): _clean(one) for key, one in value.items()}
    return value


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
