"""Contact sheets of generated images: single objects and held-out compositions."""

from unclip.contact_sheet import Tile, contact_sheet
from unclip.emoji.probes import concept_set
from unclip.emoji.prompts import sheet_prompts
from unclip.evaluation.context import HELD_OUT, Context
from unclip.evaluation.measurement import Measurement, Result
from unclip.evaluation.sources import Real
from unclip.images import to_pil


class SampleSheets(Measurement):
    """Sheets of single emoji in natural, seen and held-out colors, and of held-out captions."""

    single_objects: int = 18  # number of prompts of each kind on the first sheet
    held_out: int = 9  # number of held-out captions on the second sheet
    full_size: int = 4  # number of held-out images that are also written at full size

    title = "Samples"
    stages = ("clip", "prior", "decoder")

    def __call__(self, context: Context) -> Result:
        """Sample the images at the bundle's largest size; single objects at 256 px at most."""
        size, images = context.cascade.size, {}
        if name := concept_set(context.data):
            kinds = sheet_prompts(name, most=self.single_objects)
            prompts = [prompt for kind in kinds.values() for prompt in kind]
            captions = [prompt.caption for prompt in prompts]
            sampled = context.sampling.text_to_image(captions, size=min(size, 256))
            tiles = [
                Tile(image, prompt.caption, marked=prompt.held_out)
                for image, prompt in zip(sampled, prompts, strict=True)
            ]
            title = "Single objects. Framed: pairs of object and color that are not in training."
            images["single_objects"] = contact_sheet(tiles, columns=9, size=128, title=title)
        real = context.real(HELD_OUT)
        captions = real.take(varied(real, self.held_out)).captions
        sampled = context.sampling.text_to_image(captions, size=size)
        tiles = [Tile(image, caption) for image, caption in zip(sampled, captions, strict=True)]
        title, name = f"Held-out compositions, {size} px, from text alone.", f"held_out_{size}"
        images[name] = contact_sheet(tiles, columns=3, size=320, title=title)
        for number, tile in enumerate(tiles[: self.full_size]):
            words = "".join(c if c.isalnum() else " " for c in tile.caption.lower()).split()
            images[f"{name}/{number}-{'-'.join(words)[:80]}"] = to_pil(tile.image)
        return Result(images=images)


def varied(real: Real, count: int) -> list[int]:
    """Return the rows of `count` images with different captions, the scene kinds in turn."""
    kinds: dict[str, list[int]] = {}
    seen: set[str] = set()
    for row, (caption, metadata) in enumerate(zip(real.captions, real.metadata, strict=True)):
        if caption not in seen:
            seen.add(caption)
            kinds.setdefault(str(metadata.get("kind")), []).append(row)
    longest = max(map(len, kinds.values()))
    rows = [kind[turn] for turn in range(longest) for kind in kinds.values() if turn < len(kind)]
    return rows[:count]
