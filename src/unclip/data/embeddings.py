"""CLIP image embeddings stored beside the shards: 00003.tar ↔ 00003.<fingerprint>.safetensors.

A file holds `image_embedding` (float16, one row a sample) and, as metadata, the samples' keys in
the rows' order and a digest of the shard, by which embeddings of a shard that has since been
written anew are told. The fingerprint names the CLIP, so those of several can lie side by side.
"""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from unclip.data.shards import list_shards, write_atomically

EMBED = "python src/embed.py"


def embeddings_path(shard: str | Path, fingerprint: str) -> Path:
    """Where the embeddings of a shard by one CLIP stand."""
    if not re.fullmatch(r"[0-9A-Za-z_-]+", fingerprint):
        raise ValueError(f"{fingerprint!r} is no fingerprint of a CLIP (letters and digits)")
    shard = Path(shard)
    return shard.with_name(f"{shard.stem}.{fingerprint}.safetensors")


def write_embeddings(
    shard: str | Path,
    fingerprint: str,
    keys: Sequence[str],
    image_embedding: Float[Tensor, "samples dim"],
) -> Path:
    """Write the embeddings of a shard's samples beside it, atomically, as float16.

    Raises:
        ValueError: keys and rows differ in number, or a key comes twice.
    """
    if len(keys) != len(image_embedding):
        raise ValueError(f"{len(keys)} keys for {len(image_embedding)} embeddings of {shard}")
    if len(set(keys)) != len(keys):
        raise ValueError(f"a key comes twice among the embeddings of {shard}")
    tensors = {"image_embedding": image_embedding.detach().to("cpu", torch.float16).contiguous()}
    metadata = {"keys": json.dumps(list(keys)), "shard": _digest(Path(shard))}
    path = embeddings_path(shard, fingerprint)
    write_atomically(path, save(tensors, metadata=metadata))
    return path


def read_embeddings(
    shard: str | Path, fingerprint: str
) -> tuple[dict[str, int], Float[Tensor, "samples dim"]]:
    """(row of each key, embeddings as float32) of a shard.

    Raises:
        FileNotFoundError: they have not been computed.
        ValueError: the file is not what `write_embeddings` writes.
    """
    path = embeddings_path(shard, fingerprint)
    if not path.is_file():
        raise _missing([path])
    try:
        with safe_open(path, framework="pt") as file:
            keys = json.loads((file.metadata() or {})["keys"])
            image_embedding = file.get_tensor("image_embedding").float()
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path} holds no embeddings ({error}): delete it and run `{EMBED}`"
        ) from None
    if image_embedding.ndim != 2 or len(keys) != len(image_embedding):
        raise ValueError(f"{path}: keys and embeddings differ: delete it and run `{EMBED}`")
    return {key: row for row, key in enumerate(keys)}, image_embedding


def missing_embeddings(source: str | Path | Sequence[str | Path], fingerprint: str) -> list[Path]:
    """The shards of a source that have no embeddings by this CLIP, or were rewritten since."""
    return [shard for shard in list_shards(source) if not _fits(shard, fingerprint)]


def check_embeddings(source: str | Path | Sequence[str | Path], fingerprint: str) -> None:
    """Stop where embeddings are missing.

    Raises:
        FileNotFoundError: naming the first shards without embeddings and the command to run.
    """
    if missing := missing_embeddings(source, fingerprint):
        raise _missing([embeddings_path(shard, fingerprint) for shard in missing])


def _fits(shard: Path, fingerprint: str) -> bool:
    path = embeddings_path(shard, fingerprint)
    if not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            # A shard elsewhere that is not in the cache now is not fetched to be compared.
            digest = (file.metadata() or {}).get("shard")
            return digest == _digest(shard) if shard.is_file() else digest is not None
    except SafetensorError:
        return False


def _digest(shard: Path) -> str:
    """A quick digest of a tar: its size, its first and its last 64 KiB."""
    ends = 2**16
    size = shard.stat().st_size
    with open(shard, "rb") as file:
        head = file.read(ends)
        file.seek(-min(ends, size), os.SEEK_END)
        return hashlib.blake2b(b"%d" % size + head + file.read(), digest_size=16).hexdigest()


def _missing(paths: list[Path]) -> FileNotFoundError:
    names = ", ".join(path.name for path in paths[:3]) + (", …" if len(paths) > 3 else "")
    return FileNotFoundError(
        f"{len(paths)} files of CLIP embeddings are missing or do not fit their shards in "
        f"{paths[0].parent} ({names}): make them with `{EMBED}`"
    )
