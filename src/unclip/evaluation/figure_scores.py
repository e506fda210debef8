"""Figures of the paper with numbers: text diffs, inversion, attacks, priors and guidance."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import ImageDraw, ImageFont
from torch import Tensor

from unclip.bundle import train_command
from unclip.emoji.captions import article
from unclip.emoji.prompts import CaptionPair, caption_pairs
from unclip.evaluation.context import SEEN, Context
from unclip.evaluation.features import Features, Images, encode_images, encode_texts
from unclip.evaluation.figures import Figure, sheet, tiles
from unclip.evaluation.frechet import frechet
from unclip.evaluation.image_stages import NETWORK
from unclip.evaluation.measurement import Z95, Result, Table
from unclip.evaluation.similarity import psnr
from unclip.images import open_image, to_tensor
from unclip.text_to_image import PRIORS, stage_of_prior

TEMPERATURE = 100.0  # CLIP's usual logit scale

Cosines = Float[Tensor, "pairs frames"]
OneImage = UInt8[Tensor, "3 height width"]


def unit(embeddings: Features) -> Features:
    """Scale embeddings to unit length."""
    return F.normalize(embeddings, dim=-1)


def judged_cosines(
    context: Context, images: Images, texts: Sequence[str]
) -> Float[Tensor, "images texts"]:
    """Return the judge's cosine of each image to each text."""
    return unit(encode_images(context.judge, images)) @ unit(encode_texts(context.judge, texts)).T


def agreement(context: Context, images: Images, texts: Sequence[str]) -> float:
    """Return the judge's mean cosine of each image to its own text."""
    return float(judged_cosines(context, images, texts).diagonal().mean())


class TextDiffScore(Figure):
    """Margin of the target caption over the source caption along text diffs."""

    pairs: int  # number of caption pairs
    strength: float  # last angle θ
    frames: int  # number of angles from 0 to `strength`
    size: int = 64

    title = "Text diffs, measured"
    stages = ("clip", "decoder", "judge")

    def __call__(self, context: Context) -> Result:
        real, found = context.real(SEEN), []
        options = {**self.options(context), "strength": self.strength, "frames": self.frames}
        tasks = caption_pairs(real.metadata, self.pairs, seed=context.seed)
        for task in tasks:
            image = real.images[task.row]
            made = context.cascade.text_diff(image, task.source, task.target, **options)
            images = made.images[options["size"]]
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
        rows = [
            [f"{self.strength * k / (self.frames - 1):.2f}", *numbers]
            for k, numbers in enumerate(torch.stack(columns, 1).tolist())
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
        cascade, images = context.cascade, context.real(SEEN).images[: self.images]
        z, seeds, rows = cascade.embed(list(images)), [0] * len(images), []
        shown, batch = [tiles(images, ["real"] * 8)], {"batch_size": self.batch_size}
        for scale, steps in [(scale, steps) for scale in self.guidance for steps in self.steps]:
            options = {"guidance_scale": scale, "steps": {"decoder": steps}, **batch}
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
        real, options = self.singles(context, self.images), self.options(context)
        scenes = self.real(context).metadata
        known = sorted({item["name"] for scene in scenes for item in scene.get("objects", ())})
        rows, numbers = [], []
        for turn, (image, scene) in enumerate(zip(real.images, real.metadata, strict=True)):
            name = scene["objects"][0]["name"]
            word = next(other for other in known[turn:] + known if other != name)
            attacked = write_word(image, word)
            before, after = zero_shot(context, [image, attacked], known)
            for label, answer in (("", before), (f", with “{word}” on it", after)):
                best = known[int(answer.argmax())]
                chance = [float(answer[known.index(each)]) for each in (name, word)]
                numbers.append([f"{article(name)}{label}", article(best), *chance])
            varied = context.cascade.vary(attacked, self.count, eta=self.eta, **options)
            captions = [name, f"{name}, “{word}” on it"]
            captions += [f"variation {k}" for k in range(self.count)]
            rows.append(tiles([image, attacked, *varied.images[options["size"]]], captions))
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


class PriorImportance(Figure):
    """Images from the caption alone, from z_t in place of z_i, and from the prior's z_i."""

    prompts: list[str]  # prompts that are sampled

    title = "The importance of the prior (figure 8)"
    stages = ("clip", "prior", "decoder", "judge")

    def __call__(self, context: Context) -> Result:
        cascade, prompts = context.cascade, self.prompts
        seeds = [context.seed] * len(prompts)
        inputs = {
            "caption only": None,
            "caption and z_t": cascade.embedder.text(prompts).text_embedding,
            "caption and z_i of the prior": cascade.prior(prompts, seeds=seeds),
        }
        size, numbers = self.size_in(context), []
        options = {"size": size, "batch_size": self.batch_size, "seeds": seeds}
        made = {name: cascade.decode(z, prompts, **options).images for name, z in inputs.items()}
        rows = [
            tiles([images[size][k] for images in made.values()], names)
            for k, prompt in enumerate(prompts)
            if (names := [f"{name}: {prompt}" for name in made])
        ]
        numbers = [[name, agreement(context, made[name][64], prompts)] for name in made]
        table = Table(["decoder input", "judge's cosine to the prompt"], numbers)
        return Result(
            tables={f"{len(prompts)} prompts": table},
            images={"prior_importance": sheet(rows, self.title)},
            note="Each row samples one prompt with the same noise from the three inputs.",
        )


class Priors(Figure):
    """Comparison of the diffusion, autoregressive, linear and no prior."""

    captions: int  # number of captions of real images
    shown: int  # number of captions on the sheet

    title = "Diffusion, autoregressive, linear or no prior (section 2.2)"
    stages = ("clip", "decoder", "judge")

    def __call__(self, context: Context) -> Result:
        cascade, real = context.cascade, context.real(SEEN)
        real = real.take(range(min(self.captions, len(real))))
        seeds = [context.seed + k for k in range(len(real))]
        true, captions, shown = cascade.embed(list(real.images)), real.captions, self.shown
        numbers, rows, missing = [], [], []
        for name in PRIORS:
            try:
                z = cascade.prior(captions, seeds=seeds, prior=name)
            except (FileNotFoundError, ValueError):
                missing.append(f"{name}: `{train_command(stage_of_prior(name))}`")
                continue
            made = cascade.decode(z, captions, seeds=seeds, size=64).images[64]
            cosine = float(F.cosine_similarity(z, true).mean())
            numbers.append([name, cosine, agreement(context, made, captions)])
            rows.append(tiles(made, [f"{name}: {caption}" for caption in captions[:shown]]))
        rows.append(tiles(real.images, ["real"] * shown))
        note = (
            "The cosine of each prior's embedding to that of the caption's real image, and the "
            "judge's cosine of the decoder's 64 px image to the caption."
        )
        if missing:
            note += f" This bundle lacks {'; '.join(missing)}."
        head = ["prior", "cosine to the real z_i", "judge's cosine to the caption"]
        tables = {f"{len(real)} captions": Table(head, numbers)}
        return Result(tables=tables, images={"priors": sheet(rows, self.title, 128)}, note=note)


class Guidance(Figure):
    """Agreement, diversity and distance over the decoder's guidance scale."""

    scales: list[float]  # guidance scales of the decoder
    captions: int
    each: int  # number of images per caption

    title = "Guidance against fidelity and diversity (figures 9 to 11)"
    stages = ("clip", "prior", "decoder", "judge")

    def __call__(self, context: Context) -> Result:
        cascade, real = context.cascade, context.real(SEEN)
        real = real.take(range(min(self.captions * self.each, len(real))))
        captions = real.captions[: self.captions]
        prompts = [caption for caption in captions for _ in range(self.each)]
        key = ("guidance", len(real))
        reference = context.features_of(NETWORK, key, real.images)
        z = cascade.prior(captions, seeds=[context.seed] * len(captions))
        z = z.repeat_interleave(self.each, dim=0)
        seeds, numbers, rows = [context.seed + k for k in range(len(prompts))], [], []
        for scale in self.scales:
            made = cascade.decode(z, prompts, seeds=seeds, size=64, guidance_scale=scale).images[64]
            features = context.features_of(NETWORK, (*key, self.each, scale), made)
            row = [
                f"{scale:g}",
                agreement(context, made, prompts),
                diversity(encode_images(context.judge, made), self.each),
                frechet(features, reference),
            ]
            numbers.append(row)
            names = [f"s {scale:g}: {text}" for text in captions[:8]]
            rows.append(tiles(made[:: self.each], names))
        note = (
            "Agreement: the judge's cosine to the caption. Diversity: 1 - the judge's mean cosine "
            "between images of one caption and one z_i, so only the decoder varies. Distance: "
            "Fréchet distance of EfficientNet-Lite0 features to as many real images; comparable "
            "only within this table, because n is small. `src/evaluate.py -m guidance=…` measures "
            "a bundle."
        )
        table = Table(["guidance", "agreement", "diversity", "distance"], numbers)
        tables = {f"{len(captions)} captions × {self.each} images": table}
        return Result(tables=tables, images={"guidance": sheet(rows, self.title, 128)}, note=note)


def diversity(embeddings: Features, each: int) -> float:
    """Return 1 - the mean cosine between different embeddings of each group of `each`."""
    groups = unit(embeddings).unflatten(0, (-1, each))
    cosines = groups @ groups.mT  # (groups, each, each)
    different = ~torch.eye(each, dtype=torch.bool)
    return float(1 - cosines[:, different].mean())
