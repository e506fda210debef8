"""Tables of the probes of emoji scenes: the judge's choices, two objects and open captions."""

from typing import Any, NamedTuple

MEASURABLE = 0.9  # share of real images on which a judge has to be right

_PROBES = {
    "caption": "own caption",
    "concept": "concept",
    "concept_recoloured": "concept, recolored",
    "colour": "color, recolored",
    "pair_places": "places of a pair",
    "pair_colors": "colors of a pair",
    "pair_concept": "a concept of a pair",
}
_SOURCES = {
    "generated": "the prior's z_i",
    "true_embedding": "true z_i",
    "real": "(real images)",
}


class Table(NamedTuple):
    """Rows under a title."""

    title: str
    head: list[str]
    rows: list[list[Any]]


def probe_tables(results: dict[str, Any]) -> list[Table]:
    """The tables of all probes that were measured."""
    tables = [_judge(results), _clips(results), _scenes(results), _open(results)]
    return [table for table in tables if table.rows]


def _judge(results: dict[str, Any]) -> Table:
    """The judge's choices for generated images next to those for real ones, their ceiling."""
    rows = []
    for name, words in _PROBES.items():
        for split, sources in results.get("judge", {}).items():
            if (ours := sources["generated"].get(name)) is None:
                continue
            real = sources["real"][name]["share"]
            ratio = ours["share"] / real if real else None
            note = "" if real >= MEASURABLE else "not measurable with this judge"
            numbers = [ours["share"], ours["error"], real, ratio, ours["n"]]
            rows.append([words, ours["among"], split, *numbers, note])
    head = ["judge picks the", "among", "captions of", "generated", "±", "real", "generated / real"]
    return Table("The judge's choices", [*head, "n", "note"], rows)


def _clips(results: dict[str, Any]) -> Table:
    """The choices of CLIP and judge for real images; a split takes two columns."""
    measured = {k: one["choices"] for k, one in results.get("clip", {}).items() if "choices" in one}
    splits = list(dict.fromkeys(split for choices in measured.values() for split in choices))
    rows = []
    for clip, choices in measured.items():
        for name, words in _PROBES.items():
            shares = [choices[split].get(name, {}) for split in splits]
            if among := {share["among"] for share in shares if share}:
                numbers = [share.get(key) for share in shares for key in ("share", "n")]
                rows.append([clip, words, *among, *numbers])
    head = ["real images", "picks the", "among", *(word for one in splits for word in (one, "n"))]
    return Table("Choices of CLIP and judge for real images", head, rows)


def _scenes(results: dict[str, Any]) -> Table:
    """Recolored pairs, and single objects, that show what they state."""
    rows = []
    for split, sources in results.get("two_objects", {}).items():
        for source, words in _SOURCES.items():
            if not (found := sources.get(source)):
                continue
            rows.append([words, split])
            for name in ("colors", "concepts", "both"):
                rows[-1] += [found.get(name, {}).get(key) for key in ("share", "error")]
            rows[-1].append(found.get("both", {}).get("n"))
            rows[-1] += [found.get("single", {}).get(key) for key in ("share", "n")]
    head = ["decoder from", "captions of", "colors in place", "±", "concepts in place", "±"]
    head += ["both in place", "±", "n pairs", "single concept right", "n single"]
    return Table("Two recolored objects in a relation, by palettes and templates", head, rows)


def _open(results: dict[str, Any]) -> Table:
    """Spread of each prior's samples next to the data's."""
    rows = [
        [
            "(real images)" if source == "data" else source,
            found["embedding_spread"],
            found["backgrounds"],
            found["right"]["share"],
            found["right"]["error"],
            found["captions"],
            found["seeds"],
        ]
        for source, found in results.get("open_captions", {}).items()
    ]
    head = ["prior", "cosine distance in a caption", "different backgrounds", "object right", "±"]
    return Table("Captions that leave the background open", [*head, "captions", "seeds"], rows)
