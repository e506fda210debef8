"""Shards as a LightningDataModule: the training and validation loaders of any stage."""

from pathlib import Path
from typing import Literal

from lightning import LightningDataModule

from unclip.data.degradations import Degradation
from unclip.data.loader import ShardLoader
from unclip.data.reader import SampleReader
from unclip.data.remote import is_url, list_remote
from unclip.data.shards import fingerprint, flat_shards, open_shards


class ShardDataModule(LightningDataModule):
    """Batches from shards; see `ShardLoader` and `SampleReader`.

    The shards are ROOT/SPLIT/SIZE/*.tar or, with `val_shards`, all of one folder, as img2dataset
    leaves them. They may lie elsewhere: see `unclip.data.remote`.

    Training shuffles, draws captions and crops, and has full batches. Validation goes in the
    shards' order, takes each sample's first caption and the middle crop, and is the same each
    time. Rank and world size come from the trainer, when there is one.

    Args:
        root: the data set's folder; with `val_shards` also a pattern /folder/{00000..00099}.tar.
            A URL goes through `cache`.
        image_size: width and height of the pictures.
        batch_size: samples in a batch of one rank.
        shard_size: the SIZE folder that is read; None for `image_size`.
        train: name of the training split.
        val: name of the validation split; None for no validation.
        val_shards: how many shards are held out, the last, where ROOT has no splits and sizes.
        cache: the folder for shards that are fetched from a URL.
        cache_gib: how large the cache may grow; None for no bound.
        val_batch_size: None for `batch_size`.
        workers: reading processes of each loader; 0 reads in the training process.
        seed: of order, captions, crops and degradations.
        caption: "random" or "first", in training.
        shuffle_buffer: raw samples from which training batches are drawn.
        crop: side of the crops (upsamplers); None for whole pictures.
        crops_per_image: random crops that training takes of each decoded picture.
        degradation: "gaussian_blur", "bsr" or a callable (image, *, seed); adds `low_res`.
        clean_share: share of the samples whose `low_res` is only made smaller.
        embeddings: fingerprint of the CLIP whose stored image embeddings are added.
        load_image: False decodes no pictures (enough for a prior with stored embeddings).
        minimum_size: pictures with a shorter side are bad samples.
        max_bad_fraction: the part of the samples that may be bad before an error.
        start_method: of the workers: "fork", "spawn" or "forkserver"; None for Python's default.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        image_size: int = 64,
        batch_size: int = 16,
        shard_size: int | None = None,
        train: str = "train",
        val: str | None = "val",
        val_shards: int | None = None,
        cache: str | Path | None = None,
        cache_gib: float | None = None,
        val_batch_size: int | None = None,
        workers: int = 1,
        seed: int = 0,
        caption: Literal["random", "first"] = "random",
        shuffle_buffer: int = 1000,
        crop: int | None = None,
        crops_per_image: int = 1,
        degradation: str | Degradation | None = None,
        clean_share: float = 0.0,
        embeddings: str | None = None,
        load_image: bool = True,
        minimum_size: int = 16,
        max_bad_fraction: float = 0.01,
        start_method: str | None = None,
    ):
        super().__init__()
        if is_url(root) and cache is None:
            raise ValueError(
                f"data.root={root} is a URL: set data.cache to a folder for its shards"
            )
        self.root = str(root)
        self.val_shards = val_shards
        self.cache, self.cache_gib = cache, cache_gib
        self.size = str(image_size if shard_size is None else shard_size)
        self.train_split, self.val_split = train, val
        self.batch_size = batch_size
        self.val_batch_size = batch_size if val_batch_size is None else val_batch_size
        self.workers = workers
        self.shuffle_buffer = shuffle_buffer
        self.embeddings = embeddings
        self.minimum_size = minimum_size
        self.max_bad_fraction = max_bad_fraction
        self.start_method = start_method
        common = {
            "image_size": image_size,
            "crop": crop,
            "degradation": degradation,
            "clean_share": clean_share,
            "load_image": load_image,
            "minimum_size": minimum_size,
            "seed": seed,
        }
        self.train_reader = SampleReader(caption=caption, crops_per_image=crops_per_image, **common)
        self.val_reader = SampleReader(caption="first", random_crop=False, **common)

    def prepare_data(self) -> None:
        """Check that the shards are there and count them, in one process of each machine.

        Raises:
            FileNotFoundError: naming the folder without shards and the command that makes them.
        """
        for source in self.sources():
            open_shards(source)

    @property
    def home(self) -> Path:
        """The local folder of the shards and of what is kept beside them."""
        if is_url(self.root):
            return Path(self.cache)
        root = Path(self.root)
        return root.parent if root.suffix == ".tar" else root

    def sources(self) -> list[Path | list[Path]]:
        """Where the shards of the training and validation splits stand."""
        return [self.source(split) for split in (self.train_split, self.val_split) if split]

    def source(self, split: str) -> Path | list[Path]:
        """Where the shards of a split stand: a folder, or all of them."""
        if self.val_shards is not None:
            shards = flat_shards(self.root, self.cache, self.cache_gib)
            held_out = len(shards) - self.val_shards
            if not 0 < held_out <= len(shards):
                raise ValueError(
                    f"data.val_shards={self.val_shards} of the {len(shards)} shards of {self.root} "
                    "leaves none to train on"
                )
            return shards[held_out:] if split == self.val_split else shards[:held_out]
        if is_url(self.root):
            return list_remote(f"{self.root}/{split}/{self.size}", self.cache, self.cache_gib)
        return Path(self.root) / split / self.size

    def fingerprint(self) -> str:
        """What tells the training split's shards from others."""
        return fingerprint(open_shards(self.source(self.train_split)))

    def train_dataloader(self) -> ShardLoader:
        """The loader of this rank's share of the training split."""
        return self._loader(self.train_split, self.train_reader, self.batch_size, shuffle=True)

    def val_dataloader(self) -> ShardLoader | list[ShardLoader]:
        """The loader of this rank's share of the validation split; [] without one."""
        if self.val_split is None:
            return []
        return self._loader(self.val_split, self.val_reader, self.val_batch_size, shuffle=False)

    def _loader(
        self, split: str, reader: SampleReader, batch_size: int, *, shuffle: bool
    ) -> ShardLoader:
        return ShardLoader(
            self.source(split),
            reader,
            batch_size=batch_size,
            shuffle=shuffle,
            workers=self.workers,
            rank=self.trainer.global_rank if self.trainer else 0,
            world_size=self.trainer.world_size if self.trainer else 1,
            shuffle_buffer=self.shuffle_buffer,
            embeddings=self.embeddings,
            max_bad_fraction=self.max_bad_fraction,
            start_method=self.start_method,
        )
