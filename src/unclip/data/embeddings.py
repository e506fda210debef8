"""CLIP image embeddings stored next to the shards: 00003.tar → 00003.<fingerprint>.safetensors.

A file holds `image_embedding` (float16, one row per sample). Its metadata holds the samples' keys
in the order of the rows and a digest of the shard, which shows whether the shard was rewritten
since. The fingerprint identifies the CLIP, so embeddings of several CLIPs can coexist.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from unclip.data.shards import Source, list_shards, read_ends
from unclip.files import write_tensors

EMBED = "python src/embed.py"


def embeddings_path(shard: str | Path, fingerprint: str) -> Path:
    """Return the path of the embeddings of a shard by one CLIP."""
    if not re.fullmatch(r"[0-9A-Za-z_-]+", fingerprint):
        raise ValueError(f"invalid CLIP fingerprint {fingerprint!r}: use letters and digits")
    shard = Path(shard)
    return shard.with_name(f"{shard.stem}.{fingerprint}.safetensors")


def write_embeddings(
    shard: str | Path,
    fingerprint: str,
    keys: Sequence[str],
    image_embedding: Float[Tensor, "samples dim"],
) -> Path:
    """Write the embeddings of a shard's samples, with different keys, atomically, as float16."""
    assert len(set(keys)) == len(keys) == len(image_embedding)
    tensors = {"image_embedding": image_embedding.detach().to("cpu", torch.float16).contiguous()}
    metadata = {"keys": json.dumps(list(keys)), "shard": _digest(Path(shard))}
    path = embeddings_path(shard, fingerprint)
    write_tensors(path, tensors, metadata)
    return path


def read_embeddings(
    shard: str | Path, fingerprint: str
) -> tuple[dict[str, int], Float[Tensor, "samples dim"]]:
    """Return the row of each key, and the embeddings of a shard as float32.

    Raises:
        FileNotFoundError: the embeddings have not been computed.
        ValueError: the file was not written by `write_embeddings`.
    """
    path = embeddings_path(shard, fingerprint)
    try:
        with safe_open(path, framework="pt") as file:
            keys = json.loads(file.metadata()["keys"])
            image_embedding = file.get_tensor("image_embedding").float()
        rows = dict(zip(keys, range(len(image_embedding)), strict=True))
    except FileNotFoundError:
        raise _missing_error([path]) from None
    except (SafetensorError, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} does not hold embeddings ({error}): delete it and run `{EMBED}`"
        ) from None
    return rows, image_embedding


def missing_embeddings(source: Source, fingerprint: str) -> list[Path]:
    """List the shards without embeddings by this CLIP, or with outdated ones."""
    return [shard for shard in list_shards(source) if not _is_current(shard, fingerprint)]


def check_embeddings(source: Source, fingerprint: str) -> None:
    """Check that all embeddings of a source exist.

    Raises:
        FileNotFoundError: embeddings are missing; the message names some, and the command to run.
    """
    if missing := missing_embeddings(source, fingerprint):
        raise _missing_error([embeddings_path(shard, fingerprint) for shard in missing])


def _is_current(shard: Path, fingerprint: str) -> bool:
    try:
        with safe_open(embeddings_path(shard, fingerprint), framework="pt") as file:
            # A remote shard that is not in the cache is not fetched just to be compared.
            return not shard.is_file() or file.metadata()["shard"] == _digest(shard)
    except (FileNotFoundError, SafetensorError, LookupError, TypeError):
        return False


def _digest(shard: Path) -> str:
    """Hash the size and both ends of a tar."""
    content = b"%d" % shard.stat().st_size + read_ends(shard)
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _missing_error(paths: list[Path]) -> FileNotFoundError:
    names = ", ".join(path.name for path in paths[:3]) + (", …" if len(paths) > 3 else "")
    return FileNotFoundError(
        f"{len(paths)} files of CLIP embeddings are missing or outdated in {paths[0].parent} "
        f"({names}): make them with `{EMBED}`"
    )
