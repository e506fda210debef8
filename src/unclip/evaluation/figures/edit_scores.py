"""Edits in numbers: text diffs, DDIM inversion, and typographic attacks (figure 6)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import ImageDraw, ImageFont
from torch import Tensor

from unclip.emoji.captions import article
from unclip.emoji.prompts import CaptionPair, caption_pairs
from unclip.evaluation.context import SEEN, Context
from unclip.evaluation.figures.figure import Figure, judged_cosines, sheet, tiles, unit
from unclip.evaluation.measurement import Z95, Result, Table
from unclip.evaluation.networks import encode_images
from unclip.evaluation.similarity import psnr
from unclip.images import open_image, to_tensor

TEMPERATURE = 100.0  # CLIP's usual logit scale

Cosines = Float[Tensor, "pairs frames"]
OneImage = UInt8[Tensor, "3 height width"]


class TextDiffScore(Figure):
    """Margin of the target caption over the source caption along text diffs."""

    pairs: int  # number of caption pairs
    strength: float  # last angle θ
    frames: int  # number of angles from 0 to `strength`
    size: int = 64

    title = "Text diffs, measured"
    stages = ("clip", "decoder", "judge")

    def __call__(self, context: Context) -> Result:
        """Score each frame of each text diff."""
        real, cascade = context.real(SEEN), context.cascade
        options = {**self.options(context), "strength": self.strength, "frames": self.frames}
        tasks = caption_pairs(real.metadata, self.pairs, seed=context.seed)
        found = []
        for task in tasks:
            made = cascade.text_diff(real.images[task.row], task.source, task.target, **options)
            images = made.images[self.size_in(context)]
            to_text = judged_cosines(context, images, [task.target, task.source])
            z = unit(encode_images(context.judge, images))
            found.append(torch.stack([*to_text.unbind(1), z @ z[0]]))
        target, source, similarity = torch.stack(found, dim=1).double()  # (pairs, frames) each
        margin = target - source
        columns = [
            target.mean(0),
            margin.mean(0),
            Z95 * margin.std(0) / len(margin) ** 0.5,
            (margin > 0).double().mean(0),
            similarity.mean(0),
        ]
        thetas = [f"{self.strength * k / (self.frames - 1):.2f}" for k in range(self.frames)]
        rows = [
            [theta, *numbers]
            for theta, numbers in zip(thetas, torch.stack(columns, 1).tolist(), strict=True)
        ]
        head = ["θ", "cosine to the target", "margin", "± 95%", "closer to target"]
        head.append("cosine to the reconstruction")
        tables = {
            f"{len(tasks)} pairs": Table(head, rows),
            "By the part that changes": _changes(tasks, margin),
        }
        rises = bool((margin.mean(0).diff() > 0).all())
        moved = int((margin[:, -1] > margin[:, 0]).sum())
        note = (
            "The margin is the judge's cosine to the target caption minus that to the source "
            "caption; it should increase with θ. The mean margin "
            f"{'increases' if rises else 'does not increase'} at every step. {moved} of "
            f"{len(tasks)} images moved toward their target."
        )
        return Result(tables=tables, note=note)


def _changes(tasks: list[CaptionPair], margin: Cosines) -> Table:
    """Return the gain in margin for each part of the caption that changes."""
    rows, gain = [], margin[:, -1] - margin[:, 0]
    for kind in dict.fromkeys(task.changed for task in tasks):
        chosen = gain[[task.changed == kind for task in tasks]]
        moved = (chosen > 0).double().mean()
        rows.append([kind, float(chosen.mean()), float(moved), len(chosen)])
    return Table(["changed", "gain in margin", "moved toward the target", "pairs"], rows)


class Inversion(Figure):
    """Accuracy of reconstructing real images of 64 px from their latents."""

    images: int
    steps: list[int]  # numbers of DDIM steps, the same in both directions
    guidance: list[float]  # guidance scales of the decoder

    title = "Reconstruction by DDIM inversion"

    def __call__(self, context: Context) -> Result:
        """Invert and reconstruct with each number of steps at each guidance scale."""
        cascade, images = context.cascade, context.real(SEEN).images[: self.images]
        z, seeds, rows = cascade.embed(list(images)), [0] * len(images), []
        shown = [tiles(images, ["real"] * 8)]
        for scale in self.guidance:
            for steps in self.steps:
                options = {
                    "guidance_scale": scale,
                    "steps": {"decoder": steps},
                    "batch_size": self.batch_size,
                }
                latents = cascade.invert(list(images), **options)
                back = cascade.render(latents, seeds=seeds, size=64, **options).images[64]
                cosine = F.cosine_similarity(cascade.embed(list(back)), z).mean()
                numbers = [psnr(back, images).mean(), latents.noise.std(), cosine]
                rows.append([f"{scale:g}", steps, *map(float, numbers)])
                shown.append(tiles(back, [f"s {scale:g}, {steps} steps"] * 8))
        head = ["guidance", "steps", "PSNR, dB", "standard deviation of x_T", "cosine of z_i"]
        note = (
            "PSNR of the 64 px reconstruction, the standard deviation of x_T (1 for true noise), "
            "and the cosine between the CLIP embeddings of the reconstruction and the image."
        )
        tables = {f"{len(images)} images": Table(head, rows)}
        return Result(tables=tables, images={"inversion": sheet(shown, self.title, 96)}, note=note)


class TypographicAttack(Figure):
    """Zero-shot answers and variations of images with the name of another object on them."""

    images: int
    count: int  # number of variations of each
    eta: float  # eta of DDIM, the share of noise that is sampled again

    title = "Typographic attack (figure 6)"

    def __call__(self, context: Context) -> Result:
        """Attack each image, classify it before and after, and vary the attacked image."""
        real, size, options = (
            self.singles(context, self.images),
            self.size_in(context),
            self.options(context),
        )
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
            varied = context.cascade.vary(attacked, self.count, eta=self.eta, **options).images[
                size
            ]
            captions = [
                name,
                f"{name}, “{word}” on it",
                *(f"variation {k}" for k in range(self.count)),
            ]
            rows.append(tiles([image, attacked, *varied], captions))
        note = (
            "The name of another object is written on an image. The table has CLIP's zero-shot "
            "answer among the names of all objects, before and after; the rows show variations of "
            "the attacked image. A CLIP trained on the web can read and is fooled, although the "
            "decoder still draws the object; one that has never seen writing sees a blemish."
        )
        table = Table(["image", "CLIP's answer", "P(object)", "P(word)"], numbers)
        images = {"typographic_attack": sheet(rows, self.title)}
        return Result(tables={"Zero-shot answers": table}, images=images, note=note)


def zero_shot(
    context: Context, images: list[Tensor], names: list[str]
) -> Float[Tensor, "images names"]:
    """Return CLIP's probability of each name for each image."""
    texts = context.embedder.text([article(name) for name in names]).text_embedding
    cosines = unit(context.cascade.embed(images)) @ unit(texts.cpu()).T
    return torch.softmax(TEMPERATURE * cosines, dim=1)


def write_word(image: OneImage, word: str) -> OneImage:
    """Write a word on a paper slip in the lower half of an image."""
    attacked = open_image(image)
    draw = ImageDraw.Draw(attacked)
    width, height = attacked.size
    center = (width // 2, height * 2 // 3)
    font = ImageFont.load_default(max(height // 7, 8))
    left, top, right, bottom = draw.textbbox(center, word, font, anchor="mm")
    pad = height // 40 + 1
    draw.rectangle((left - pad, top - pad, right + pad, bottom + pad), "white", "black")
    draw.text(center, word, "black", font, anchor="mm")
    return to_tensor(attacked)
