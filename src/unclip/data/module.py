"""Shards as a LightningDataModule: the training and validation loaders of any stage."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning import LightningDataModule
from torch import Tensor

from unclip.data.loader import ShardDataset, ShardLoader
from unclip.data.reader import SampleReader
from unclip.data.remote import is_url, list_remote
from unclip.data.shards import list_shards, open_shards, shards_fingerprint


class ShardDataModule(LightningDataModule):
    """Batches from shards.

    The shards are ROOT/{train,val}/SIZE/*.tar or, with `val_shards`, all shards of one folder, as
    written by img2dataset. They may be remote: see `unclip.data.remote`.

    Training shuffles, chooses captions and crops at random, and yields full batches. Validation
    follows the order of the shards, takes the first caption of each sample and the center crop,
    and is the same every time.

    The arguments that are not listed are those of `SampleReader`, `ShardDataset` and `ShardLoader`.

    Args:
        root: folder of the data set; with `val_shards` also a pattern /folder/{00000..00099}.tar.
            A URL is read through `cache`.
        image_size: width and height of the images.
        batch_size: number of samples in a batch of one rank.
        shard_size: the SIZE folder to read; None for `image_size`.
        val_shards: number of shards held out for validation, the last ones, if ROOT is one folder.
        cache: folder for shards fetched from a URL.
        cache_gib: size limit of the cache; None for no limit.
        val_batch_size: batch size of the validation; None for `batch_size`.
        seed: seed of order, captions, crops and degradations.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        image_size: int = 64,
        batch_size: int = 16,
        shard_size: int | None = None,
        val_shards: int | None = None,
        cache: str | Path | None = None,
        cache_gib: float | None = None,
        val_batch_size: int | None = None,
        workers: int = 1,
        seed: int = 0,
        shuffle_buffer: int = 1000,
        crop: int | None = None,
        crops_per_image: int = 1,
        degradation: str | None = None,
        clean_share: float = 0.0,
        embeddings: str | None = None,
        load_image: bool = True,
        labels: Callable[[Mapping[str, Any]], Tensor] | None = None,
        minimum_size: int = 16,
        max_bad_fraction: float = 0.01,
    ):
        super().__init__()
        self.root = str(root)
        self.val_shards = val_shards
        self.cache, self.cache_gib = cache, cache_gib
        self.size = str(image_size if shard_size is None else shard_size)
        self.batch_size = batch_size
        self.val_batch_size = batch_size if val_batch_size is None else val_batch_size
        self.workers = workers
        self.shuffle_buffer = shuffle_buffer
        self.embeddings = embeddings
        self.minimum_size = minimum_size
        self.max_bad_fraction = max_bad_fraction
        self.train_reader = SampleReader(
            image_size=image_size,
            crop=crop,
            crops_per_image=crops_per_image,
            degradation=degradation,
            clean_share=clean_share,
            load_image=load_image,
            labels=labels,
            minimum_size=minimum_size,
            seed=seed,
        )
        self.val_reader = replace(self.train_reader, random=False, crops_per_image=1)

    def prepare_data(self) -> None:
        """Check that the shards exist and count their samples, in one process per machine.

        Raises:
            FileNotFoundError: there are no shards; the message names the command that makes them.
        """
        for source in self.sources():
            open_shards(source)

    @property
    def home(self) -> Path:
        """The local folder of the shards and of the files next to them."""
        if is_url(self.root) and self.cache is not None:
            return Path(self.cache)
        root = Path(self.root)
        return root.parent if root.suffix == ".tar" else root

    def sources(self) -> list[Path | list[Path]]:
        """Return the sources of the training and validation splits."""
        return [self.source("train"), self.source("val")]

    def source(self, split: str) -> Path | list[Path]:
        """Return the folder of a split's shards, or a list of all of them."""
        if self.val_shards is not None:
            shards = self._list(self.root)
            if not 0 < self.val_shards < len(shards):
                raise ValueError(
                    f"data.val_shards={self.val_shards} of the {len(shards)} shards in {self.root} "
                    f"must be between 1 and {len(shards) - 1}"
                )
            return shards[-self.val_shards :] if split == "val" else shards[: -self.val_shards]
        if is_url(self.root):
            return self._list(f"{self.root}/{split}/{self.size}")
        return Path(self.root) / split / self.size

    def _list(self, source: str) -> list[Path]:
        if is_url(source) and self.cache is not None:
            return list_remote(source, self.cache, self.cache_gib)
        return list_shards(source)

    def fingerprint(self) -> str:
        """Return a fingerprint of the shards of the training split."""
        return shards_fingerprint(open_shards(self.source("train")))

    def train_dataloader(self) -> ShardLoader:
        """Return the loader of this rank's part of the training split."""
        return self._loader("train", self.train_reader)

    def caption_loader(self) -> ShardLoader:
        """Return the training loader without images, which takes a fraction of the time."""
        return self._loader("train", replace(self.train_reader, load_image=False))

    def val_dataloader(self) -> ShardLoader:
        """Return the loader of this rank's part of the validation split."""
        return self._loader("val", self.val_reader)

    def _loader(self, split: str, reader: SampleReader) -> ShardLoader:
        shuffle = split == "train"
        dataset = ShardDataset(
            self.source(split),
            reader,
            batch_size=self.batch_size if shuffle else self.val_batch_size,
            shuffle=shuffle,
            rank=self.trainer.global_rank if self.trainer else 0,
            world_size=self.trainer.world_size if self.trainer else 1,
            shuffle_buffer=self.shuffle_buffer,
            embeddings=self.embeddings,
            max_bad_fraction=self.max_bad_fraction,
        )
        return ShardLoader(dataset, workers=self.workers)
