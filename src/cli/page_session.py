"""The images of one browser on the page: checked, written and kept in a folder of their own."""

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from cli.sample_images import Result
from cli.sample_output import free_path, write_png
from unclip.files import read_bytes, sha256_of
from unclip.images import ImageError, decode_image

MAX_PIXELS = 2**25  # of an uploaded image: 5,793 × 5,793
KEPT, FILES = 24, 150  # images offered as inputs, and files kept


class Stopped(Exception):
    """Raised within a request that its user stopped."""


@dataclass
class Session:
    """One browser's images; requests stop after the next network evaluation if `stopped`."""

    folder: Path
    images: list[Path] = field(default_factory=list)
    stopped: bool = False
    running: bool = False

    def keep(self, results: Iterable[Result], older: Sequence[Path] | None = None) -> list[Path]:
        """Write images, put them before the `older` ones of the session, and return their paths."""
        older = self.images if older is None else older
        paths = [write_png(image, self.folder, *rest) for image, *rest in results]
        self.images = list(dict.fromkeys([*paths, *older]))[:KEPT]
        for path in sorted(self.folder.iterdir(), key=lambda path: path.stat().st_mtime)[:-FILES]:
            path.unlink()
        return paths

    def take(self, image: str | Path | None) -> Path:
        """Check an input image, and copy it into the session's folder if it is not there.

        Gradio does not check the paths of requests that were not written by its own page.
        """
        if image is None:
            raise ValueError("no image: upload one, or choose one of this session")
        path = Path(image)
        if not path.resolve().is_relative_to(self.folder.resolve().parent):
            raise ValueError(f"cannot read the image {path.name}: it was not uploaded")
        try:
            decode_image(read_bytes(path), max_pixels=MAX_PIXELS)
        except (OSError, ImageError) as error:
            raise ValueError(f"cannot read the image {path.name}: {error}") from error
        if path.parent == self.folder:
            return path
        same = sha256_of(path)
        copy = free_path(
            self.folder, path.stem, path.suffix.lower(), lambda other: sha256_of(other) == same
        )
        return Path(shutil.copyfile(path, copy))

    def take_mask(self, layers: Sequence[Image.Image]) -> Path:
        """Write the painted layers as a mask, white where any of them is opaque."""
        if not layers:
            raise ValueError("the mask marks no pixel: paint over the part to replace")
        mask = layers[0].getchannel("A")
        for layer in layers[1:]:
            mask.paste(255, mask=layer.getchannel("A"))
        path = free_path(self.folder, "mask", ".png", lambda _: False)
        mask.point(lambda alpha: 255 if alpha else 0).save(path)
        return path
