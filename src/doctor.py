"""Says what of machine, packages, data and bundles is fit, and what mends the rest."""

import argparse
import os
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, NamedTuple

ROOT = Path(__file__).parents[1]
MARKS = {"fit": "✓", "note": "·", "unfit": "✗"}


class Finding(NamedTuple):
    """One thing that was looked at; `mend` is a command or an advice."""

    state: Literal["fit", "note", "unfit"]
    what: str
    mend: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints all findings; 1 if anything is unfit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the data sets")
    parser.add_argument("--models", type=Path, default=Path("models"), help="of the bundles")
    parser.add_argument("--bundle", help="one of them; all when not given")
    options = parser.parse_args(arguments)
    looks: dict[str, Callable[[], Iterator[Finding]]] = {
        "machine": look_at_machine,
        "packages": look_at_packages,
        "data": lambda: look_at_data(options.data),
        "bundles": lambda: look_at_bundles(options.models, options.bundle),
    }
    worst = 0
    for title, look in looks.items():
        print(title)
        for finding in look():
            mend = f"  →  {finding.mend}" if finding.mend else ""
            print(f"  {MARKS[finding.state]} {finding.what}{mend}", flush=True)
            worst |= finding.state == "unfit"
    return int(worst)


def look_at_machine() -> Iterator[Finding]:
    """Python, processors, memory, disk, GPU."""
    python = ".".join(map(str, sys.version_info[:3]))
    fit = sys.version_info >= (3, 11)
    yield Finding(
        "fit" if fit else "unfit", f"Python {python}", "" if fit else "Python 3.11 or newer"
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("fit", f"{cores} cores")
    free = shutil.disk_usage(".").free / 2**30
    yield Finding(
        "fit" if free > 5 else "unfit",
        f"{free:.0f} GiB free on the disk of this folder",
        "" if free > 5 else "runs and data need more than 5: make room",
    )
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Finding("unfit", f"torch does not load ({error})", "make setup")
        return
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        bf16 = (
            "bf16"
            if torch.cuda.is_bf16_supported(including_emulation=False)
            else "no bf16: float32 is used"
        )
        memory = about.total_memory / 2**30
        yield Finding("fit", f"GPU {number}: {about.name}, {memory:.0f} GiB, {bf16}")
    if not torch.cuda.is_available():
        built = torch.version.cuda
        mend = "" if built else "with a GPU, install a CUDA build: https://pytorch.org/get-started"
        yield Finding("note", "no GPU: the scales quick and emoji are for that", mend)


def look_at_packages() -> Iterator[Finding]:
    """What pyproject.toml asks for, and the extras."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = {"": project["dependencies"], **project["optional-dependencies"]}
    for extra, wanted in groups.items():
        missing = []
        for requirement in map(Requirement, wanted):
            try:
                found = version(requirement.name)
            except PackageNotFoundError:
                missing.append(requirement.name)
                continue
            if not requirement.specifier.contains(found, prereleases=True):
                missing.append(f"{requirement.name} {found}, not {requirement.specifier}")
        if extra:
            mend = f"pip install -c constraints.txt -e '.[{extra}]'" if missing else ""
            what = f"extra {extra}: " + (f"without {', '.join(missing)}" if missing else "complete")
            yield Finding("note" if missing else "fit", what, mend)
        else:
            what = f"missing or unfit: {', '.join(missing)}" if missing else "all that is needed"
            yield Finding("unfit" if missing else "fit", what, "make setup" if missing else "")
    yield _torchvision()


def _torchvision() -> Finding:
    try:
        import unclip  # isort: skip # noqa: F401 (it lets torchvision load beside a CPU torch)
        import torchvision
    except (ImportError, RuntimeError, OSError) as error:
        line = str(error).splitlines()[0]
        return Finding("unfit", f"torchvision does not load ({line})", "make setup")
    import torch

    return Finding("fit", f"torch {torch.__version__} with torchvision {torchvision.__version__}")


def look_at_data(folder: Path) -> Iterator[Finding]:
    """Data sets of shards below a folder: are they whole, are there embeddings."""
    roots = sorted(path.parents[2] for path in folder.glob("*/train/*/*.tar"))
    if not roots:
        yield Finding("note", f"no data set in {folder}", "make data-emoji, or docs/own_data.md")
    for root in dict.fromkeys(roots):
        yield from _look_at_data_set(root)


def _look_at_data_set(root: Path) -> Iterator[Finding]:
    import json

    from unclip.data.shards import open_shards

    name = root.name
    record = root / "dataset.json"
    if (root / "building.json").is_file():
        yield Finding("unfit", f"{name}: unfinished", "run its prepare.py command again")
        return
    if record.is_file():
        listed = json.loads(record.read_text()).get("sha256", {})
        if missing := [path for path in listed if not (root / path).is_file()]:
            mend = "run its prepare.py command again"
            yield Finding("unfit", f"{name}: {len(missing)} shards are gone ({missing[0]})", mend)
            return
    for split in ("train", "val"):
        sizes = sorted((root / split).glob("*/"), key=lambda path: path.name.zfill(5))
        try:
            counts = {size.name: sum(s.samples for s in open_shards(size)) for size in sizes}
        except (OSError, ValueError) as error:
            yield Finding("unfit", f"{name}: {error}")
            return
        if not counts:
            yield Finding("unfit", f"{name}: no {split} split", "see docs/own_data.md")
            continue
        embedded = {path.name.split(".")[-2] for path in (root / split).glob("*/*.safetensors")}
        of = " · ".join(f"{count} at {size} px" for size, count in counts.items())
        by = f", embedded by {len(embedded)} CLIPs" if embedded else ""
        yield Finding("fit", f"{name} {split}: {of}{by}")


def look_at_bundles(folder: Path, only: str | None = None) -> Iterator[Finding]:
    """Bundles: which stages are there, do they load, are they of one CLIP, do sizes chain."""
    bundles = sorted({path.parent for path in folder.glob(f"{only or '*'}/*.safetensors")})
    if not bundles:
        yield Finding("note", f"no bundle in {folder}", "make train, or src/train.py")
    for bundle in bundles:
        yield from _look_at_bundle(bundle)


def _look_at_bundle(folder: Path) -> Iterator[Finding]:
    from unclip.bundle import read_metadata
    from unclip.training.run import check_chain

    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            found[path.stem] = read_metadata(path)
        except (ValueError, OSError) as error:
            yield Finding("unfit", f"{folder.name}: {error}", f"train {path.stem} again")
            return
    yield Finding("fit", f"{folder.name}: {', '.join(found)}")
    clip = found.get("clip")
    for name, metadata in found.items():
        fingerprint = metadata.clip_fingerprint
        if clip and name != "judge" and fingerprint not in (None, clip.clip_fingerprint):
            mend = f"train {name} again, with this bundle's CLIP"
            yield Finding("unfit", f"{folder.name}: {name} is of another CLIP", mend)
    for name, size in (("upsampler_256", 256), ("upsampler_1024", 1024)):
        if name in found:
            try:
                check_chain(name, found[name].recipe, size, folder)
            except ValueError as error:
                yield Finding("unfit", f"{folder.name}: {error}")
    for name in ("clip", "prior", "decoder"):
        if name not in found and not (name == "prior" and "prior_ar" in found):
            mend = f"python src/train.py stage={name} bundle={folder.name} …"
            yield Finding("note", f"{folder.name}: no {name}, so no pictures of captions", mend)


if __name__ == "__main__":
    sys.exit(main())
