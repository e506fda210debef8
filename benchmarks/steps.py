"""Quality over network evaluations, for each sampler and stage, against 250 steps of DDPM.

`python benchmarks/steps.py --model models/emoji --data data/emoji_s` writes a plot, a table and
steps.json, and says which is the cheapest setting within 5% of the 250 steps.
"""

import unclip  # isort: skip  # noqa: F401 (first: torchvision then imports beside a CPU torch)

import argparse
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from studies import STUDIES, Measured, Study
from tqdm import tqdm

from unclip import diffusion
from unclip.bundle import stage_file
from unclip.cascade import Cascade
from unclip.evaluation.report import surroundings, table, write_results

FORMAT = 1
REFERENCE_STEPS, QUICK_REFERENCE_STEPS = 250, 4
TOLERANCE = 1.05
SAMPLERS = ("ddpm", "ddim", "dpm_solver_pp_2m", "dpm_solver_pp_2m_sde", "unipc")
EVALUATIONS = {
    "prior": (2, 4, 6, 8, 10, 16, 25),
    "decoder": (6, 10, 16, 20),
    "upsampler_256": (2, 3, 4, 6, 8),
    "upsampler_1024": (2, 3, 4, 6, 8),
}
ALLOWED = {"prior": 10, "decoder": 20, "upsampler_256": 6, "upsampler_1024": 6}
COUNTS = {"prior": 200, "decoder": 100, "upsampler_256": 64, "upsampler_1024": 48}
QUICK_COUNT, QUICK_EVALUATIONS = 8, (2,)
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Point:
    """One setting of one stage and what its samples were worth."""

    stage: str
    sampler: str
    nfe: int
    measured: Measured
    ratios: Measured  # each distance over the reference's
    seconds: float

    @property
    def within(self) -> bool:
        """Whether every distance is within the tolerance."""
        return all(ratio <= TOLERANCE for ratio in self.ratios.values())


def main() -> None:
    """Studies the stages that the command line names and the bundle has."""
    arguments = parse()
    started = time.perf_counter()
    cascade = Cascade.load(arguments.model, device=arguments.device)
    points: list[Point] = []
    for name in arguments.stages:
        file = stage_file(arguments.model, name)
        if not file.is_file():
            print(f"{name}: {file} is missing; left out")
            continue
        count = QUICK_COUNT if arguments.quick else arguments.counts.get(name, COUNTS[name])
        study = STUDIES[name](
            cascade,
            arguments.data,
            count,
            batch_size=arguments.batch_size,
            seed=arguments.seed,
        )
        found = points_of(study, arguments.samplers, quick=arguments.quick)
        points += found
        print(f"\n{name}, {study.count} samples; ratios to {found[0].nfe} steps of DDPM\n")
        rows, head = cells(study, found)
        print(table(rows, head=head))
        print(verdict(name, found))
    written = {
        "format": FORMAT,
        "benchmark": "steps",
        "quick": arguments.quick,
        "model": str(arguments.model),
        "data": str(arguments.data),
        "seed": arguments.seed,
        "tolerance": TOLERANCE,
        "points": [{**asdict(point), "within": point.within} for point in points],
        "cheapest": {name: plain(cheapest(name, points)) for name in arguments.stages},
        "seconds": round(time.perf_counter() - started, 1),
        **surroundings(cascade.device),
    }
    out = arguments.out
    paths = [write_results(written, out / "steps.json"), write_markdown(points, out / "steps.md")]
    if points:
        from curves import draw

        paths.append(draw(points, STUDIES, out / "steps.png", tolerance=TOLERANCE))
    print(f"\n{written['seconds']:.0f} s\nresults: {', '.join(map(str, paths))}")


def points_of(study: Study, samplers: list[str], *, quick: bool) -> list[Point]:
    """The reference first, then every sampler at every number of evaluations."""
    evaluations = QUICK_EVALUATIONS if quick else EVALUATIONS[study.name]
    reference_steps = QUICK_REFERENCE_STEPS if quick else REFERENCE_STEPS
    known = [name for name in samplers if hasattr(diffusion, name)]
    wanted = [("ddpm", reference_steps)]
    wanted += [(name, nfe) for name in known for nfe in evaluations]
    points: list[Point] = []
    for name, nfe in (bar := tqdm(wanted, desc=study.name, leave=False)):
        bar.set_postfix_str(f"{name} {nfe}")
        since = time.perf_counter()
        measured = study.measure(partial(getattr(diffusion, name)), nfe)
        reference = points[0].measured if points else measured
        ratios = {key: measured[key] / reference[key] for key in study.distances}
        seconds = round(time.perf_counter() - since, 2)
        points.append(Point(study.name, name, nfe, measured, ratios, seconds))
    return points


def cheapest(stage: str, points: list[Point]) -> Point | None:
    """The fewest evaluations within the tolerance; of equals, the nearest."""
    good = [point for point in points if point.stage == stage and point.within]
    return min(good, key=lambda point: (point.nfe, max(point.ratios.values())), default=None)


def verdict(stage: str, points: list[Point]) -> str:
    """The cheapest setting, and whether it is cheap enough."""
    best, allowed = cheapest(stage, points), ALLOWED[stage]
    word = "pass" if best.nfe <= allowed else "FAIL"
    return (
        f"{stage}: the cheapest within {TOLERANCE - 1:.0%} is {best.sampler} at {best.nfe} "
        f"evaluations; to reach: {allowed} ({word})"
    )


def cells(study: Study, points: list[Point]) -> tuple[list[list[Any]], list[str]]:
    """Rows and head of a stage's table."""
    measures, ratios = list(points[0].measured), list(points[0].ratios)
    head = ["sampler", "nfe", *measures, *(f"{name} ratio" for name in ratios), "within", "s"]
    rows = [
        [
            point.sampler,
            point.nfe,
            *point.measured.values(),
            *point.ratios.values(),
            "yes" if point.within else "",
            point.seconds,
        ]
        for point in points
    ]
    return rows, head


def write_markdown(points: list[Point], path: Path) -> Path:
    """A table a stage, for people."""
    lines = ["# Quality over network evaluations", ""]
    for name in dict.fromkeys(point.stage for point in points):
        part = [point for point in points if point.stage == name]
        measures = list(part[0].measured)
        lines += [f"## {name}", "", f"| sampler | NFE | {' | '.join(measures)} | within 5% |"]
        lines.append("|" + " --- |" * (3 + len(measures)))
        for point in part:
            values = " | ".join(f"{value:.4g}" for value in point.measured.values())
            yes = "yes" if point.within else ""
            lines.append(f"| {point.sampler} | {point.nfe} | {values} | {yes} |")
        lines += ["", verdict(name, part), ""]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def plain(point: Point | None) -> dict[str, Any] | None:
    """A setting as JSON has it."""
    return None if point is None else {"sampler": point.sampler, "nfe": point.nfe}


def count_of_stage(text: str) -> tuple[str, int]:
    """`decoder=200`."""
    name, _, number = text.partition("=")
    if name not in STUDIES or not number.isdigit() or int(number) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not like decoder=200")
    return name, int(number)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/emoji"))
    parser.add_argument("--data", type=Path, default=Path("data/emoji_s"))
    parser.add_argument("--stages", nargs="+", choices=[*STUDIES], default=[*STUDIES])
    parser.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=[*SAMPLERS])
    parser.add_argument(
        "--counts",
        nargs="+",
        type=count_of_stage,
        default=[],
        metavar="STAGE=N",
        help=f"samples of a stage; default: {', '.join(f'{k}={v}' for k, v in COUNTS.items())}",
    )
    parser.add_argument("--batch-size", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--quick", action="store_true", help="so little that it means nothing")
    parser.add_argument("--out", type=Path, default=HERE / "steps")
    arguments = parser.parse_args()
    arguments.counts = dict(arguments.counts)
    return arguments


if __name__ == "__main__":
    main()
