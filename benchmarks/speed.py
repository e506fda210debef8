"""Times unclip beside its peers at equal parameters: `python benchmarks/speed.py [--quick]`.

Every contender of a stage runs in a process of its own, and they take turns. Printed is, for each
measure, how many times as fast ours is; written is benchmarks/results.json.
"""

import unclip  # isort: skip  # noqa: F401 (first: torchvision then imports beside a CPU torch)

import argparse
import os
import time
from pathlib import Path

from contender import CONTENDERS, not_installed
from interleaved import Failed, Worker, interleave
from machine import describe, two_cores
from ratios import HEAD, UNITS, Row, cells, plain, rows
from setting import DECODER, PRIOR, QUICK_DECODER, QUICK_PRIOR, DecoderSize, PriorSize, Setting

from unclip.evaluation.report import table, write_results

FORMAT = 1
MEASURES = ("step", "sample", "train")  # training last: its memory would stay
MOST_ROUNDS, QUICK_ROUNDS = 30, 2
HERE = Path(__file__).parent
OURS = "unclip"
QUICK_OUT = Path("runs/bench_quick.json")


def main() -> None:
    """Measures what the command line asks for."""
    arguments = parse()
    os.environ["TQDM_DISABLE"] = "1"  # peers draw bars while they sample
    started = time.perf_counter()
    setting = Setting.of_this_machine(
        device=arguments.device,
        precision=arguments.precision,
        compile=arguments.compile,
        threads=arguments.threads,
        sample_steps=2 if arguments.quick else arguments.sample_steps,
    )
    machine = describe(setting)
    print(
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"{machine['device']}, torch {machine['versions']['torch']}, {machine['dtype']}"
    )
    seconds = 0.0 if arguments.quick else arguments.seconds
    results: list[Row] = []
    missing: dict[str, str] = {}
    sizes = {"prior": QUICK_PRIOR, "decoder": QUICK_DECODER}
    if not arguments.quick:
        sizes = {"prior": PRIOR, "decoder": DECODER}
    for stage in arguments.stages:
        judged = two_cores(setting) and not arguments.quick
        found, absent = measure_stage(stage, sizes[stage], setting, seconds, judged=judged)
        results += found
        missing |= absent
    written = {
        "format": FORMAT,
        "benchmark": "speed",
        "quick": arguments.quick,
        "machine": machine,
        "sizes": {stage: vars(sizes[stage]) for stage in arguments.stages},
        "sample_steps": setting.sample_steps,
        "rows": [plain(row) for row in results],
        "not_installed": missing,
        "seconds": round(time.perf_counter() - started, 1),
    }
    path = write_results(written, arguments.out)
    print(f"\n{verdict(results)} {written['seconds']:.0f} s\nresults: {path}")


def measure_stage(
    stage: str,
    size: DecoderSize | PriorSize,
    setting: Setting,
    seconds: float,
    *,
    judged: bool,
) -> tuple[list[Row], dict[str, str]]:
    """All measures of a stage, printed as they come, and who is not installed."""
    missing = {name: why for name in CONTENDERS[stage] if (why := not_installed(name))}
    present = [name for name in CONTENDERS[stage] if name not in missing]
    started = [Worker(stage, name, size, setting) for name in present]
    workers = []
    for worker in started:
        try:
            worker.ready()
            workers.append(worker)
        except Failed as error:
            missing[worker.name] = str(error)
    if OURS in missing:
        raise SystemExit(missing[OURS])
    about = {worker.name: worker.about for worker in workers}
    found: list[Row] = []
    try:
        for measure in MEASURES:
            able = [worker for worker in workers if measure in worker.about["measures"]]
            rounds = QUICK_ROUNDS if seconds == 0 else MOST_ROUNDS
            timings = interleave(able, measure, rounds=rounds, seconds=seconds)
            items = 1 if measure == "sample" else size.batch
            part = rows(stage, measure, timings, about, items=items, judged=judged)
            print(f"\n{heading(stage, measure, size, setting)}\n")
            print(table([cells(row) for row in part], head=HEAD), flush=True)
            found += part
    except Failed as error:
        missing[stage] = str(error)  # what was measured before it stays
    finally:
        for worker in started:
            worker.close()
    for name, why in missing.items():
        print(f"{name}: {why}")
    return found, missing


def heading(stage: str, measure: str, size: DecoderSize | PriorSize, setting: Setting) -> str:
    """What a table shows, in words."""
    text = {
        "train": f"training step, batch {size.batch}",
        "step": f"one sampling step, batch {size.batch}",
        "sample": f"whole sample, {setting.sample_steps} steps, guided, one prompt",
    }[measure]
    return f"{stage}: {text}; rate in {UNITS[stage, measure]}; ratio: ours is so many times as fast"


def verdict(results: list[Row]) -> str:
    """How many of the targets were reached."""
    judged = [row for row in results if row.reached is not None]
    if not judged:
        return "no targets for this machine or size;"
    reached = sum(row.reached for row in judged)
    return f"{reached} of {len(judged)} targets reached;"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny networks: tries everything")
    parser.add_argument("--stages", nargs="+", choices=[*CONTENDERS], default=["prior", "decoder"])
    parser.add_argument(
        "--seconds", type=float, default=60, help="for each measure, after three rounds"
    )
    parser.add_argument("--sample-steps", type=int, default=8, help="of a whole sample")
    parser.add_argument("--threads", type=int, default=2, help="of each process, on a CPU")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU if there is one")
    parser.add_argument(
        "--precision",
        choices=["auto", "32-true", "bf16-mixed"],
        default="auto",
        help="auto: bf16 where the hardware has it",
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="torch.compile everyone; default: on a GPU alone",
    )
    parser.add_argument(
        "--out", type=Path, help="default: benchmarks/results.json, or runs/ if quick"
    )
    arguments = parser.parse_args()
    if arguments.out is None:
        arguments.out = QUICK_OUT if arguments.quick else HERE / "results.json"
    return arguments


if __name__ == "__main__":
    main()
