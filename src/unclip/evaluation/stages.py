"""Measure a bundle's CLIP and prior on the captions and images of a data set."""

from collections.abc import Sequence
from typing import Any, cast

import torch.nn.functional as F

from unclip.bundle import read_metadata, stage_file
from unclip.cascade import Cascade
from unclip.clip import ClipEmbedder, recall_at
from unclip.evaluation.choices import choice_rows, distractors, probe_choices, scene_probes
from unclip.evaluation.context import HELD_OUT, SEEN, SPLITS, VALIDATION, Context
from unclip.evaluation.features import Features
from unclip.evaluation.measurement import Measurement, Numbers, Result, Table
from unclip.evaluation.networks import encode_images, encode_texts
from unclip.evaluation.sources import Real


class Stages(Measurement):
    """Size and training of each stage of a bundle."""

    title = "The bundle"
    stages = ("clip",)

    def __call__(self, context: Context) -> Result:
        """Read the metadata of each stage's file."""
        stages, rows, columns = {}, [], ("steps", "images", "seconds", "version")
        for name in ("clip", "judge", "prior", "prior_ar", "decoder", *_UPSAMPLERS):
            file = stage_file(context.cascade.folder, name)
            if not file.is_file():
                continue
            metadata, count = read_metadata(file), _parameters(context, name)
            stages[name] = {
                "parameters": count,
                "steps": metadata.steps,
                "images": metadata.extra.get("images"),
                "seconds": metadata.extra.get("seconds"),
                "version": metadata.version,
                "clip_fingerprint": metadata.clip_fingerprint,
            }
            rows.append([name, count / 1e6, *(stages[name][column] for column in columns)])
        table = Table(["stage", "M parameters", *columns], rows)
        return Result(tables={"Stages": table}, values={"stages": stages})


class ClipRecall(Measurement):
    """Retrieval recall of the bundle's CLIP and of the judge, and their choices for real images."""

    among: int = 64  # number of candidates of the recall

    title = "CLIP and judge on real images"
    stages = ("clip",)

    def __call__(self, context: Context) -> Result:
        """Measure recall on the validation split, and choices on all splits of emoji scenes."""
        clips = {"clip": context.embedder}
        if stage_file(context.cascade.folder, "judge").is_file():
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
            head, rows = ["CLIP", "chooses", "among"], []
            for name, clip in clips.items():
                found[name]["choices"] = choices = {}
                for split in SPLITS:
                    real = context.real(split)
                    z, probes = encode_images(clip, real.images), scene_probes(context, real)
                    choices[split] = probe_choices(clip, z, probes)
                rows += [[name, *row] for row in choice_rows(choices)]
            head += [column for split in SPLITS for column in (split, "n")]
            tables["Choices for real images"] = Table(head, rows)
        return Result(tables=tables, values={"clip": found})


class PriorCosines(Measurement):
    """Cosines of predicted to true image embeddings."""

    among: int = 64  # number of candidates of the retrieval recall

    title = "The prior's embeddings"
    stages = ("clip", "prior")

    def __call__(self, context: Context) -> Result:
        """Measure images that are not in training: held-out and seen compositions, else `val`."""
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
    first = {caption: row for row, caption in reversed(list(enumerate(real.captions)))}
    distinct = real.take(sorted(first.values()))
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
    first = sorted({text: row for row, text in reversed(list(enumerate(captions)))}.values())
    among = min(among, len(first))
    recall = {
        name: recall_at(true[first], guess[first], k=(1,), among=among)["text_to_image_at_1"]
        for name, guess in (("recall_at_1", predicted), ("recall_text_at_1", text_embedding))
    }
    shuffled = predicted[distractors(captions, count=1, seed=seed)[:, 0]]
    compared = {
        "cosine": predicted,
        "cosine_text": text_embedding,
        "cosine_shuffled": shuffled,
        **({} if linear is None else {"cosine_linear": linear}),
    }
    return {
        **{name: float(F.cosine_similarity(z, true).mean()) for name, z in compared.items()},
        **{name: float(value) for name, value in recall.items()},
        "among": among,
        "n": len(captions),
    }


_UPSAMPLERS = ("upsampler_256", "upsampler_1024")


def _parameters(context: Context, name: str) -> int:
    """Return the number of a stage's parameters."""
    if name in ("clip", "judge"):
        model = (context.embedder if name == "clip" else context.judge).model
    else:
        model = context.cascade.stage(name)
    return sum(parameter.numel() for parameter in model.parameters())
