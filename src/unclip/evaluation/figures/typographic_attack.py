"""Typographic attacks: a written word changes CLIP's answer, but not the decoder's (figure 6)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import ImageDraw, ImageFont
from torch import Tensor

from unclip.contact_sheet import Tile
from unclip.emoji.captions import article
from unclip.evaluation.context import Context
from unclip.evaluation.figures.figure import Figure, sheet
from unclip.evaluation.measurement import Result, Table
from unclip.images import open_image, to_tensor

TEMPERATURE = 100.0  # CLIP's usual logit scale


@dataclass(frozen=True, kw_only=True)
class TypographicAttack(Figure):
    """Zero-shot answers and variations of images with the name of another object on them.

    Args:
        images: number of images.
        count: number of variations of each.
        eta: eta of DDIM, the share of noise that is sampled again.
    """

    images: int
    count: int
    eta: float

    title: ClassVar[str] = "Typographic attack (figure 6)"

    def __call__(self, context: Context) -> Result:
        """Attack each image, classify it before and after, and vary the attacked image."""
        real, size = self.singles(context, self.images), self.size_in(context)
        names = [scene["objects"][0]["name"] for scene in real.metadata]
        scenes = self.real(context).metadata
        known = sorted({item["name"] for scene in scenes for item in scene.get("objects", ())})
        rows, numbers = [], []
        for turn, (image, name) in enumerate(zip(real.images, names, strict=True)):
            word = next(other for other in known[turn:] + known if other != name)
            attacked = write_word(image, word)
            before, after = zero_shot(context, [image, attacked], known)
            for label, answer in (("", before), (f", with “{word}” on it", after)):
                best = known[int(answer.argmax())]
                chance = [float(answer[known.index(each)]) for each in (name, word)]
                numbers.append([f"{article(name)}{label}", article(best), *chance])
            varied = context.cascade.vary(
                attacked, self.count, eta=self.eta, **self.options(context)
            ).images[size]
            row = [Tile(image, name), Tile(attacked, f"{name}, “{word}” on it")]
            rows.append([*row, *(Tile(made, f"variation {k}") for k, made in enumerate(varied))])
        head = ["image", "CLIP's answer", "P(object)", "P(word)"]
        note = (
            "The name of another object is written on an image. The table has CLIP's zero-shot "
            "answer among the names of all objects, before and after; the rows show variations of "
            "the attacked image. A CLIP trained on the web can read and is fooled, although the "
            "decoder still draws the object; one that has never seen writing sees a blemish."
        )
        return Result(
            tables={"Zero-shot answers": Table(head, numbers)},
            images={"typographic_attack": sheet(rows, self.title)},
            note=note,
        )


def zero_shot(
    context: Context, images: list[Tensor], names: list[str]
) -> Float[Tensor, "images names"]:
    """Return CLIP's probability of each name for each image."""
    texts = context.embedder.text([article(name) for name in names]).text_embedding
    z = F.normalize(context.cascade.embed(images), dim=-1)
    cosines = z @ F.normalize(texts.cpu(), dim=-1).T  # (images, names)
    return torch.softmax(TEMPERATURE * cosines, dim=1)


def write_word(
    image: UInt8[Tensor, "3 height width"], word: str
) -> UInt8[Tensor, "3 height width"]:
    """Write a word on a paper slip in the lower half of an image."""
    attacked = open_image(image)
    draw = ImageDraw.Draw(attacked)
    width, height = attacked.size
    font = ImageFont.load_default(max(height // 7, 8))
    left, top, right, bottom = draw.textbbox((width // 2, height * 2 // 3), word, font, anchor="mm")
    pad = height // 40 + 1
    draw.rectangle((left - pad, top - pad, right + pad, bottom + pad), "white", "black")
    draw.text((width // 2, height * 2 // 3), word, "black", font, anchor="mm")
    return to_tensor(attacked)
