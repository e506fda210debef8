"""Check the environment, packages, data and bundles, and suggest fixes."""

import sys
import tomllib
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, NamedTuple

from packaging.requirements import Requirement

from cli import Parser

ROOT = Path(__file__).parents[1]


class Finding(NamedTuple):
    """Result of one check; `fix` is a command or advice."""

    state: Literal["ok", "info", "error"]
    message: str
    fix: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print all findings; return 1 if there is an error."""
    parser = Parser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the data sets")
    parser.add_argument("--models", type=Path, default=Path("models"), help="folder of the bundles")
    options = parser.parse_args(arguments)
    checks = {"packages": check_packages(), "environment": check_environment()}
    checks |= {"data": check_data(options.data), "bundles": check_bundles(options.models)}
    failed = False
    for title, findings in checks.items():
        print(title)
        for state, message, fix in findings:
            print(f"  {state:5}  {message}" + (f"\n         fix: {fix}" if fix else ""))
            failed |= state == "error"
        if failed and title == "packages":
            break  # the other checks import them
    return int(failed)


def check_environment() -> Iterator[Finding]:
    """Check that torch and torchvision can be imported, and list the GPUs."""
    try:
        import unclip  # isort: skip # noqa: F401 (lets torchvision load next to a CPU torch)
        import torch
        import torchvision
    except (ImportError, RuntimeError, OSError) as error:
        yield Finding("error", f"torch and torchvision: {error}", "make setup")
        return
    yield Finding("ok", f"torch {torch.__version__}, torchvision {torchvision.__version__}")
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if native else "no bf16, so float32 is used"
        yield Finding("ok", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, {precision}")
    if not torch.cuda.is_available():
        fix = "if you have a GPU, install a CUDA build of torch: https://pytorch.org/get-started"
        yield Finding("info", "no GPU: use the scales quick and emoji", fix)


def check_packages() -> Iterator[Finding]:
    """Compare the installed packages with the requirements and extras in pyproject.toml."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    for extra, wanted in {"": project["dependencies"], **project["optional-dependencies"]}.items():
        faults = list(filter(None, map(_fault, map(Requirement, wanted))))
        name = f"extra {extra}" if extra else "required packages"
        install = f"pip install -c constraints.txt -e '.[{extra}]'" if extra else "make setup"
        if faults:
            yield Finding("info" if extra else "error", f"{name}: {', '.join(faults)}", install)
        else:
            yield Finding("ok", f"{name}: complete")


def _fault(requirement: Requirement) -> str | None:
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return f"{requirement.name} is missing"
    if requirement.specifier.contains(found, prereleases=True):
        return None
    return f"{requirement.name} is {found}, not {requirement.specifier}"


def check_data(folder: Path) -> Iterator[Finding]:
    """Compare the shards of each data set in a folder with their checksums, and count samples."""
    from unclip.data.shards import count_samples, open_shards
    from unclip.files import read_json, sha256_of

    again = "run its prepare.py command again"
    roots = sorted({path.parents[2] for path in folder.glob("*/train/*/*.tar")})
    if not roots:
        yield Finding("info", f"no data set in {folder}", "make data-emoji, or see docs/data.md")
    for root in roots:
        if (root / "building.json").is_file():
            yield Finding("error", f"{root.name} is not finished", again)
            continue
        record = root / "dataset.json"
        sums = read_json(record)["sha256"] if record.is_file() else {}
        for name, expected in sums.items():
            path = root / name
            if not path.is_file() or sha256_of(path) != expected:
                fault = "has a wrong checksum: remove it" if path.is_file() else "is missing"
                yield Finding("error", f"{root.name}: {name} {fault}", again)
        for path in sorted({path.parent for path in root.glob("*/*/*.tar")}):
            try:
                shards = open_shards(path)
                count = sum(shard.samples for shard in shards)
                yield Finding("ok", f"{path.relative_to(folder)}: {count} samples")
                for shard in shards:
                    if damage := count_samples(shard.path).damage:
                        yield Finding("error", f"{shard.path.relative_to(folder)}: {damage}", again)
            except (OSError, ValueError) as error:
                yield Finding("error", f"{path.relative_to(folder)}: {error}", again)


def check_bundles(folder: Path) -> Iterator[Finding]:
    """Load each stage of each bundle in a folder."""
    from unclip import Cascade
    from unclip.bundle import load_stage, read_metadata
    from unclip.clip import fingerprint

    bundles = sorted({path.parent for path in folder.glob("*/*.safetensors")})
    if not bundles:
        yield Finding("info", f"no bundle in {folder}", "make train")
    for path in bundles:
        files = sorted(path.glob("*.safetensors"))
        try:
            Cascade.load(path, device="cpu")  # compares the stages' CLIPs
            for file in files:
                weights = load_stage(file).state_dict()
                if fingerprint(weights) != read_metadata(file).fingerprint:
                    raise ValueError(f"{file}: the weights have changed since they were saved")
            yield Finding("ok", f"{path.name}: {', '.join(file.stem for file in files)}")
        except (OSError, ValueError) as error:
            yield Finding("error", f"{path.name}: {error}", "train that stage again or restore it")


if __name__ == "__main__":
    sys.exit(main())
