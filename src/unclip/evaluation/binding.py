"""Binding (section 7): does each object get its own color, number and place?

GenEval's tasks, on prompts of the data's own test scenes or on GenEval's own, judged by a detector.
The real pictures of the same prompts, judged likewise, are the ceiling.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, UInt8
from torch import Tensor

from unclip.evaluation.detector import (
    Detection,
    accuracy,
    detector_file,
    load_or_train,
    read_detector,
)
from unclip.evaluation.detector_training import Training
from unclip.evaluation.emoji_probes import concept_set
from unclip.evaluation.geneval import TAGS, Composition, Wanted, fault, parse, write_compositions
from unclip.evaluation.limits import Bench, Limit, Measured
from unclip.evaluation.marking import marked_sheet
from unclip.evaluation.measures import wilson
from unclip.evaluation.protocol import Prompt
from unclip.evaluation.real import Real, read_real
from unclip.evaluation.scores import Z95, Evidence, Metric, Score, around
from unclip.images import save_png

SPLITS = ("test_seen", "test_held_out")
_TAGS = {
    "single": "single_object",
    "recoloured": "colors",
    "count": "counting",
    "coloured_pair": "color_attr",
}


class Suite(NamedTuple):
    """Prompts and the real picture of each."""

    compositions: list[Composition]
    images: UInt8[Tensor, "count 3 64 64"]


@dataclass(frozen=True, kw_only=True)
class Binding(Limit):
    """GenEval's six tasks on a data set of emoji scenes.

    Args:
        each: prompts of each task in each of the two test splits, where it has so many.
        training: of the detector, where the bundle has none.
    """

    each: int = 24
    training: Training = field(default_factory=Training)

    def __call__(self, bench: Bench) -> Measured:
        """Shares of right pictures by task, of all and of held-out compositions, and their mean."""
        known = concept_set(bench.data)
        if known is None:
            raise ValueError(f"{bench.data} has no emoji scenes, which binding asks about")
        real = {split: read_real(bench.data, split, 64) for split in SPLITS}
        detector = load_or_train(
            bench.cascade.folder,
            known,
            self.training,
            progress=bench.settings.progress,
        )
        suite = draw_suite(real, self.each)
        file = write_compositions(
            bench.out / "binding" / "evaluation_metadata.jsonl", suite.compositions
        )
        generated, samples = bench.sample("binding", prompts_of(suite.compositions), 64)
        sides = {"binding.png": generated, "binding_real.png": suite.images}
        found = {name: detector(images) for name, images in sides.items()}
        verdicts = [right(suite.compositions, objects) for objects in found.values()]
        reached = {
            split: accuracy(detector(shown.images), shown.metadata) for split, shown in real.items()
        }
        about = {
            "summary": _said(reached),
            "detector": reached,
            "detector_fingerprint": detector.fingerprint,
            "prompts": str(file),
            "samples": str(samples),
        }
        paths = [
            save_png(
                marked_sheet(images, found[name], suite.compositions, verdict),
                bench.out / "pictures" / name,
            )
            for (name, images), verdict in zip(sides.items(), verdicts, strict=True)
        ]
        scores = shares(suite.compositions, *verdicts)
        return Measured(scores, paths, about)


@dataclass(frozen=True, kw_only=True)
class Compositions(Metric):
    """The same of pictures of a prompt file, such as GenEval's 553 (protocol=geneval).

    Prompts of classes that the detector does not know are not judged; how many says `about`.

    Args:
        bundle: the folder of the bundle that has the detector.
        concept_set: what the detector knows.
        training: what it was trained by.
    """

    bundle: str | Path
    concept_set: str = "S"
    training: Training = field(default_factory=Training)
    needs_prompts = True

    def __call__(self, evidence: Evidence) -> dict[str, Score]:
        """Shares of right pictures by task, and their mean.

        Raises:
            FileNotFoundError: the bundle has no such detector.
            ValueError: it is damaged, or does not fit the prompts.
        """
        if evidence.about is None or not all("include" in line for line in evidence.about):
            raise ValueError("the prompts are no GenEval prompts: take protocol=geneval")
        file = detector_file(self.bundle, self.concept_set, self.training)
        detector = read_detector(file)
        asked = [parse(line) for line in evidence.about]
        rows = [k for k, one in enumerate(asked) if one.names <= set(detector.names)]
        if not rows:
            raise ValueError(f"{file} knows the classes of none of the prompts")
        compositions = [asked[k] for k in rows]
        found: list[list[Detection]] = []
        for start in range(0, len(rows), 64):
            found += detector(evidence.pictures.load(rows[start : start + 64]))
        scores = shares(compositions, right(compositions, found))
        about = {"not_judged": len(asked) - len(rows), "detector": detector.fingerprint}
        return {
            f"binding_{name}": score._replace(about={**score.about, **about})
            for name, score in scores.items()
        }


def draw_suite(real: Mapping[str, Real], each: int) -> Suite:
    """The first `each` prompts of each task in each split, none of them twice."""
    compositions, images = [], []
    for split, shown in real.items():
        chosen: dict[str, dict[str, int]] = {tag: {} for tag in TAGS}
        asked, before = [], None
        for caption, scene in zip(shown.captions, shown.metadata, strict=True):
            asked.append(composition_of(caption, scene, split, twin=scene["index"] == before))
            before = scene["index"]
        for row, composition in enumerate(asked):
            if len(of_task := chosen[composition.tag]) < each:
                of_task.setdefault(composition.prompt, row)
        for rows in chosen.values():
            compositions += [asked[row] for row in rows.values()]
            images.append(shown.images[list(rows.values())])
    return Suite(compositions, torch.cat(images))


def composition_of(
    caption: str, scene: Mapping[str, Any], split: str, *, twin: bool
) -> Composition:
    """What a scene asks for, in GenEval's words.

    A pair is asked for with its place in words, since the data knows no "and". A pair is judged by
    what is there (two_object), its twin, which follows it in the data, also by where (position).
    """
    objects = scene["objects"]
    about = {key: scene[key] for key in ("held_out", "kind", "background")} | {"split": split}
    names = [item["name"] for item in objects]
    exclude: tuple[Wanted, ...] = ()
    if scene["kind"] == "count":
        include = (Wanted(names[0], len(names)),)
        exclude = (Wanted(names[0], len(names) + 1),)
    else:
        include = tuple(Wanted(item["name"], 1, item["colour"]) for item in objects)
    if scene["kind"] != "pair":
        return Composition(_TAGS[scene["kind"]], caption, include, exclude, about)
    if not twin:
        return Composition("two_object", caption, include, (), about)
    first, second = include
    placed = first._replace(position=(scene["relation"], 0))
    return Composition("position", caption, (second, placed), (), about)


def prompts_of(compositions: Sequence[Composition]) -> list[Prompt]:
    """What is drawn of each."""
    return [Prompt(f"{k:05d}", one.prompt, k) for k, one in enumerate(compositions)]


def right(
    compositions: Sequence[Composition], found: Iterable[Sequence[Detection]]
) -> Bool[Tensor, " count"]:
    """Whether each picture shows what it should."""
    pairs = zip(compositions, found, strict=True)
    return torch.tensor([fault(one, objects) is None for one, objects in pairs])


def shares(
    compositions: Sequence[Composition],
    verdicts: Bool[Tensor, " count"],
    real: Bool[Tensor, " count"] | None = None,
) -> dict[str, Score]:
    """The share of right pictures by task; "mean" is over tasks, as GenEval's overall score.

    "_held_out" is of the compositions among them that training never saw.

    Args:
        compositions: what was asked for.
        verdicts: of generated pictures.
        real: of the real ones.
    """
    scores: dict[str, Score] = {}
    for suffix, wanted in (("", (False, True)), ("_held_out", (True,))):
        of_tasks: dict[str, Score] = {}
        for tag in TAGS:
            rows = [
                k
                for k, one in enumerate(compositions)
                if one.tag == tag and one.about.get("held_out", False) in wanted
            ]
            if rows:
                of_real = None if real is None else real[rows]
                of_tasks[f"{tag}{suffix}"] = _share(verdicts[rows], of_real)
        if of_tasks:
            scores |= of_tasks | {f"mean{suffix}": _mean(list(of_tasks.values()))}
    return scores


def _share(right: Bool[Tensor, " count"], real: Bool[Tensor, " count"] | None) -> Score:
    value, count = float(right.double().mean()), len(right)
    low, high = wilson(value, count)
    return Score(
        value,
        (high - low) / (2 * Z95),
        (low, high),
        count,
        "higher",
        real=None if real is None else float(real.double().mean()),
        n_real=None if real is None else count,
    )


def _said(reached: Mapping[str, Mapping[str, float]]) -> str:
    """What the judge itself can do, in a sentence a split."""
    return " ".join(
        f"In real pictures of {split} the detector finds {one['found']:.1%} of {one['objects']} "
        f"objects, {one['false']:.1%} beside them, and {one['colour']:.1%} of the colors."
        for split, one in reached.items()
    )


def _mean(scores: Sequence[Score]) -> Score:
    """Over tasks that may differ in their counts."""
    count = len(scores)
    value = sum(score.value for score in scores) / count
    error = sum(score.error**2 for score in scores) ** 0.5 / count
    real = [score.real for score in scores]
    known = None not in real
    return Score(
        value,
        error,
        around(value, error),
        sum(score.n for score in scores),
        "higher",
        real=sum(real) / count if known else None,
        n_real=sum(score.n_real for score in scores) if known else None,
    )
