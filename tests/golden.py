"""Fingerprint what a commit computes, to compare two commits on the same machine.

python tests/golden.py run OUT [--repo CLONE]   trains, samples and evaluates at quick scale
python tests/golden.py compare OUT_A OUT_B      lists every tensor, image and number that differs
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

from PIL import Image
from safetensors import safe_open

STAGES = ["clip", "judge", "prior", "prior_ar", "decoder", "upsampler_256", "upsampler_1024"]
SAMPLES = ["samples", "large", "ar", "vary", "interpolate", "edit", "inpaint", "reconstruct"]
PROMPTS = ["a red apple to the left of a dog", "two stars"]


def run(repo: Path, out: Path) -> None:
    """Run the commands of `repo` and write their fingerprints to OUT/golden.json."""
    out.mkdir(parents=True)
    out, model = out.resolve(), str(out.resolve() / "models/emoji_quick")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repo / "src")}

    def script(name: str, *arguments: str) -> None:
        print(name, *arguments, flush=True)
        command = [sys.executable, str(repo / "src" / name), *arguments]
        with (out / "log.txt").open("a") as log:
            subprocess.run(command, cwd=repo, env=env, check=True, stdout=log, stderr=log)

    data = f"{out}/data"
    script("prepare.py", "emoji", "--quick", "--out", data, "--workers", "0")
    folders = [f"folders.models={out}/models", f"folders.runs={out}/runs", f"data.root={data}"]
    for stage in STAGES:
        script("train.py", f"stage={stage}", "scale=quick", "bundle=emoji_quick", *folders)
    where = ["--model", model, "--size", "64", "--batch-size", "4"]
    large, apple, star = out / "large", out / "samples/0.png", out / "samples/1.png"
    script("sample.py", *PROMPTS, "--model", model, "--batch-size", "1", "--out", str(large))
    script("sample.py", *PROMPTS, *where, "--out", f"{out}/samples")
    for number, path in enumerate(sorted((out / "samples").glob("*.png"))):
        path.rename(out / f"samples/{number}.png")
    script("sample.py", *PROMPTS, *where, "--prior", "ar", "--out", f"{out}/ar")
    script("sample.py", "vary", str(apple), *where, "--count", "2", "--out", f"{out}/vary")
    script("sample.py", "interpolate", str(apple), str(star), *where, "--out", f"{out}/interpolate")
    edit = ["--from", "a red apple", "--to", "a blue apple"]
    script("sample.py", "edit", str(apple), *edit, *where, "--out", f"{out}/edit")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (8, 8, 40, 40))
    mask.save(out / "mask.png")
    inpaint = [str(apple), "a dog", "--mask", f"{out}/mask.png"]
    script("sample.py", "inpaint", *inpaint, *where, "--out", f"{out}/inpaint")
    script("sample.py", "reconstruct", str(apple), *where, "--out", f"{out}/reconstruct")
    evaluate = [f"model={model}", "data=emoji_quick", f"data.root={data}", "measure=quick"]
    script("evaluate.py", *evaluate, f"out={out}/evaluation", f"references={out}/references")
    (out / "golden.json").write_text(json.dumps(fingerprints(out), indent=1) + "\n")


def fingerprints(out: Path) -> dict[str, object]:
    """Return {name: digest or number} of all tensors, pixels, shards and results in `out`."""
    found: dict[str, object] = {}
    for path in sorted((out / "models").rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                found[f"{path.stem}:{name}"] = _digest(file.get_tensor(name).numpy().tobytes())
    for folder in SAMPLES:
        for number, path in enumerate(sorted((out / folder).glob("*.png"))):
            found[f"{folder}:{number}"] = _digest(Image.open(path).convert("RGB").tobytes())
    for path in sorted((out / "data").rglob("*.tar")):
        found[str(path.relative_to(out))] = _digest(path.read_bytes())
    results = json.loads((out / "evaluation/results.json").read_text())
    changing = ("settings", "versions", "seconds", "paths", "made_with")
    for name in (*changing, "model", "generated", "tables"):
        results.pop(name, None)
    _flatten("results", results, found)
    _flatten("dataset", json.loads((out / "data/dataset.json").read_text()), found)
    return found


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _flatten(name: str, value: object, found: dict[str, object]) -> None:
    if isinstance(value, dict):
        for key, part in value.items():
            _flatten(f"{name}.{key}", part, found)
    elif isinstance(value, list):
        for number, part in enumerate(value):
            _flatten(f"{name}.{number}", part, found)
    elif "seconds" not in name:
        found[name] = value


def compare(first: Path, second: Path) -> int:
    """Print every difference between two runs and return how many there are."""
    one, two = (json.loads((path / "golden.json").read_text()) for path in (first, second))
    names = sorted(one.keys() | two.keys())
    different = [name for name in names if one.get(name) != two.get(name)]
    for name in different:
        print(f"{name}: {one.get(name, 'missing')} | {two.get(name, 'missing')}")
    print(f"{len(names) - len(different)} of {len(names)} equal")
    return len(different)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("run", "compare"))
    parser.add_argument("paths", type=Path, nargs="+")
    parser.add_argument("--repo", type=Path, default=Path(__file__).resolve().parents[1])
    options = parser.parse_args()
    if options.action == "run":
        run(options.repo.resolve(), options.paths[0])
    else:
        sys.exit(bool(compare(*options.paths)))
