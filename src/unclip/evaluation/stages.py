"""Measure a bundle's CLIP and prior on a data set, and draw sheets of the bundle's samples."""

from collections.abc import Sequence
from typing import Any, cast

import torch.nn.functional as F

from unclip.bundle import read_metadata, stage_file
from unclip.cascade import Cascade
from unclip.clip import ClipEmbedder, recall_at
from unclip.contact_sheet import Tile, contact_sheet
from unclip.emoji.probes import concept_set
from unclip.emoji.prompts import sheet_prompts
from unclip.evaluation.choices import (
    choice_rows,
    distractors,
    first_rows,
    probe_choices,
    scene_probes,
)
from unclip.evaluation.context import HELD_OUT, SEEN, SPLITS, VALIDATION, Context
from unclip.evaluation.features import Features, encode_images, encode_texts
from unclip.evaluation.measurement import Measurement, Numbers, Result, Table
from unclip.evaluation.sources import Real
from unclip.images import to_pil

_STAGES = ("clip", "judge", "prior", "prior_ar", "decoder", "upsampler_256", "upsampler_1024")


class Stages(Measurement):
    """Size and training of each stage of a bundle."""

    title = "The bundle"
    stages = ("clip",)

    def __call__(self, context: Context) -> Result:
        stages, rows, columns = {}, [], ("steps", "images", "seconds", "version")
        for name in _STAGES:
            file = stage_file(context.cascade.folder, name)
            if not file.is_file():
                continue
            if name in ("clip", "judge"):
                model = (context.embedder if name == "clip" else context.judge).model
            else:
                model = context.cascade.stage(name)
            metadata, count = read_metadata(file), sum(p.numel() for p in model.parameters())
            stages[name] = {
                "parameters": count,
                "steps": metadata.steps,
                **{key: metadata.extra.get(key) for key in ("images", "seconds")},
                "version": metadata.version,
                "clip_fingerprint": metadata.clip_fingerprint,
            }
            rows.append([name, count / 1e6, *(stages[name][column] for column in columns)])
        table = Table(["stage", "M parameters", *columns], rows)
        return Result(tables={"Stages": table}, values={"stages": stages})


class ClipRecall(Measurement):
    """Recall of the bundle's CLIP and of the judge in the validation split, and their choices.

    The choices are measured on the real images of all splits of emoji scenes.
    """

    among: int = 64  # number of candidates of the recall

    title = "CLIP and judge on real images"
    stages = ("clip",)

    def __call__(self, context: Context) -> Result:
        clips = {"clip": context.embedder}
        if context.has_judge:
            clips["judge"] = context.judge
        validation = context.real(VALIDATION)
        found = {
            name: clip_recall(clip, validation, among=self.among) for name, clip in clips.items()
        }
        columns = {
            "recall_at_1": "text → image recall@1",
            "recall_at_5": "recall@5",
            "among": "among",
            "n": "n",
        }
        tables = {"Retrieval recall": Table.of("CLIP", found, columns)}
        if scene_probes(context, validation):
            rows = []
            for name, clip in clips.items():
                found[name]["choices"] = choices = {}
                for split in SPLITS:
                    real = context.real(split)
                    z, probes = encode_images(clip, real.images), scene_probes(context, real)
                    choices[split] = probe_choices(clip, z, probes)
                rows += [[name, *row] for row in choice_rows(choices)]
            head = [column for split in SPLITS for column in (split, "n")]
            tables["Choices for real images"] = Table(["CLIP", "chooses", "among", *head], rows)
        return Result(tables=tables, values={"clip": found})


class PriorCosines(Measurement):
    """Cosines of predicted to true image embeddings of images that are not in training."""

    among: int = 64  # number of candidates of the retrieval recall

    title = "The prior's embeddings"
    stages = ("clip", "prior")

    def __call__(self, context: Context) -> Result:
        found, linear = {}, None
        for split in context.splits(HELD_OUT, SEEN):
            captions, images = context.real(split).captions, context.real(split).images
            if has_linear_map(context.cascade):
                linear = context.sampling.predict(captions, prior="linear")
            found[split] = prior_cosines(
                context.predicted(split),
                encode_images(context.embedder, images),
                encode_texts(context.embedder, captions),
                captions,
                linear=linear,
                among=self.among,
                seed=context.seed,
            )
        columns = {
            "cosine": "cosine to the true z_i",
            "cosine_text": "z_t instead",
            "cosine_linear": "linear map",
            "cosine_shuffled": "another caption",
            "recall_at_1": "recall@1",
            "recall_text_at_1": "z_t instead",
            "among": "among",
            "n": "n",
        }
        table = Table.of("captions of", found, columns)
        return Result(tables={"Prior": table}, values={"prior": found})


def has_linear_map(cascade: Cascade) -> bool:
    """Return whether the bundle's prior has a linear map."""
    return "prior" in cascade.metadata and cast(Any, cascade.stage("prior")).linear is not None


def clip_recall(embedder: ClipEmbedder, real: Real, *, among: int = 64) -> Numbers:
    """Measure retrieval recall at 1 and 5, from caption to image and from image to caption.

    Only the first image of each caption takes part, because the others would also be right answers.
    If there are fewer than `among`, recall is among all of them.
    """
    distinct = real.take(sorted(first_rows(real.captions).values()))
    among = min(among, len(distinct))
    recall = recall_at(
        encode_images(embedder, distinct.images),
        encode_texts(embedder, distinct.captions),
        among=among,
    )
    values = {name: float(value) for name, value in recall.items()}
    return {
        "recall_at_1": values["text_to_image_at_1"],
        "recall_at_5": values["text_to_image_at_5"],
        **{name: value for name, value in values.items() if name.startswith("image_to_text")},
        "among": among,
        "n": len(distinct) // among * among,
    }


def prior_cosines(
    predicted: Features,
    true: Features,
    text_embedding: Features,
    captions: Sequence[str],
    *,
    linear: Features | None = None,
    among: int = 64,
    seed: int = 0,
) -> Numbers:
    """Measure mean cosines to the true image embedding z_i, and retrieval recall.

    A prior has to beat `cosine_text`, the cosine of the caption's z_t, and `cosine_linear`, that of
    a linear map's prediction. `cosine_shuffled` is the cosine of another caption's prediction: the
    part that all images share. `recall_at_1` is how often the true embedding is the nearest to the
    prediction among `among` images, `recall_text_at_1` how often it is the nearest to z_t; only the
    first image of each caption counts. `seed` chooses the other captions.
    """
    first = sorted(first_rows(captions).values())
    among = min(among, len(first))
    recall = {
        name: recall_at(true[first], guess[first], k=(1,), among=among)["text_to_image_at_1"]
        for name, guess in (("recall_at_1", predicted), ("recall_text_at_1", text_embedding))
    }
    compared = {
        "cosine": predicted,
        "cosine_text": text_embedding,
        "cosine_shuffled": predicted[distractors(captions, count=1, seed=seed)[:, 0]],
        **({} if linear is None else {"cosine_linear": linear}),
    }
    cosines = {name: F.cosine_similarity(z, true).mean() for name, z in compared.items()}
    numbers = {name: float(value) for name, value in (cosines | recall).items()}
    return {**numbers, "among": among, "n": len(captions)}


class SampleSheets(Measurement):
    """Sheets of single emoji in natural, seen and held-out colors, and of held-out captions.

    Images have the bundle's largest size, those of single objects at most 256 px. On data without
    held-out captions, the second sheet has captions of `val`.
    """

    single_objects: int = 18  # number of prompts of each kind on the first sheet
    held_out: int = 9  # number of held-out captions on the second sheet
    full_size: int = 4  # number of held-out images that are also written at full size

    title = "Samples"
    stages = ("clip", "prior", "decoder")

    def __call__(self, context: Context) -> Result:
        size, images = context.cascade.size, {}
        if name := concept_set(context.data):
            kinds = sheet_prompts(name, most=self.single_objects)
            prompts = [prompt for kind in kinds.values() for prompt in kind]
            captions = [prompt.caption for prompt in prompts]
            sampled = context.sampling.text_to_image(captions, size=min(size, 256))
            pairs = zip(sampled, prompts, strict=True)
            tiles = [Tile(image, one.caption, marked=one.held_out) for image, one in pairs]
            title = "Single objects. Framed: pairs of object and color that are not in training."
            images["single_objects"] = contact_sheet(tiles, columns=9, size=128, title=title)
        (split,) = context.splits(HELD_OUT)
        real = context.real(split)
        captions = real.take(varied(real, self.held_out)).captions
        sampled = context.sampling.text_to_image(captions, size=size)
        tiles = [Tile(image, caption) for image, caption in zip(sampled, captions, strict=True)]
        about = "Held-out compositions" if split == HELD_OUT else f"Captions of {split}"
        name = f"{split.removeprefix('test_')}_{size}"
        title = f"{about}, {size} px, from text alone."
        images[name] = contact_sheet(tiles, columns=3, size=320, title=title)
        for number, tile in enumerate(tiles[: self.full_size]):
            words = "".join(c if c.isalnum() else " " for c in tile.caption.lower()).split()
            images[f"{name}/{number}-{'-'.join(words)[:80]}"] = to_pil(tile.image)
        return Result(images=images)


def varied(real: Real, count: int) -> list[int]:
    """Return the rows of `count` images with different captions, the scene kinds in turn."""
    kinds: dict[str, list[int]] = {}
    for row in sorted(first_rows(real.captions).values()):
        kinds.setdefault(str(real.metadata[row].get("kind")), []).append(row)
    longest = max(map(len, kinds.values()))
    rows = [kind[turn] for turn in range(longest) for kind in kinds.values() if turn < len(kind)]
    return rows[:count]
