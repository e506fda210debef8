"""Words pasted on pictures: what CLIP then sees, and what the decoder makes of it (figure 6)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from PIL import ImageDraw, ImageFont
from torch import Tensor

from unclip.contact_sheet import Tile
from unclip.emoji.captions import article
from unclip.evaluation.figures.base import Drawn, Figure, Studio, Table, sheet
from unclip.images import open_image, to_tensor

TEMPERATURE = 100.0  # CLIP's usual logit scale


@dataclass(frozen=True, kw_only=True)
class TypographicAttack(Figure):
    """Args: pictures: how many; count: variations of each; eta: DDIM's."""

    pictures: int
    count: int
    eta: float

    title = "Typographic attack (figure 6)"
    about = (
        "The name of another object is written on a picture. The table has CLIP's zero-shot answer "
        "among all objects' names, before and after; the rows show variations of the attacked "
        "picture. CLIPs trained on the web can read and are fooled, while the decoder still draws "
        "the object; one that never saw writing sees a blemish."
    )

    def __call__(self, studio: Studio) -> Drawn:
        """Draws it."""
        real = studio.singles(self.pictures)
        names = [scene["objects"][0]["name"] for scene in real.metadata]
        known = sorted(
            {item["name"] for scene in studio.real().metadata for item in scene.get("objects", ())}
        )
        rows, numbers = [], []
        for turn, (image, name) in enumerate(zip(real.images, names, strict=True)):
            word = next(other for other in known[turn:] + known if other != name)
            attacked = labelled(image, word)
            before, after = self._answers(studio, [image, attacked], known)
            for label, answer in (("", before), (f", with “{word}” on it", after)):
                best = known[int(answer.argmax())]
                chance = [float(answer[known.index(each)]) for each in (name, word)]
                numbers.append([f"{article(name)}{label}", article(best), *chance])
            varied = studio.cascade.vary(
                attacked, self.count, eta=self.eta, seed=studio.seed, **studio.how
            ).images[studio.size]
            row = [Tile(image, name), Tile(attacked, f"{name}, “{word}” on it")]
            rows.append([*row, *(Tile(made, f"variation {k}") for k, made in enumerate(varied))])
        head = ["picture", "CLIP's answer", "P(object)", "P(word)"]
        return Drawn(
            {"typographic": sheet(rows, self.title)}, {"zero-shot answers": Table(head, numbers)}
        )

    def _answers(
        self, studio: Studio, images: list[Tensor], known: list[str]
    ) -> tuple[Tensor, Tensor]:
        """CLIP's probabilities of the known names, for each of two pictures."""
        texts = studio.cascade.embedder.text([article(name) for name in known]).text_embedding
        z = F.normalize(studio.cascade.embed(images), dim=-1)
        cosines = z @ F.normalize(texts.cpu(), dim=-1).T  # (2, known)
        first, second = torch.softmax(TEMPERATURE * cosines, dim=1)
        return first, second


def labelled(image: UInt8[Tensor, "3 height width"], word: str) -> UInt8[Tensor, "3 height width"]:
    """A picture with a paper slip on it that has a word written on."""
    picture = open_image(image)
    draw = ImageDraw.Draw(picture)
    width, height = picture.size
    font = ImageFont.load_default(max(height // 7, 8))
    left, top, right, bottom = draw.textbbox((width // 2, height * 2 // 3), word, font, anchor="mm")
    pad = height // 40 + 1
    draw.rectangle((left - pad, top - pad, right + pad, bottom + pad), "white", "black")
    draw.text((width // 2, height * 2 // 3), word, "black", font, anchor="mm")
    return to_tensor(picture)
