import contextlib
import gzip
import json
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_bundle
import torch
import torch.nn.functional as F
from PIL import Image

import sample
from cli.sample_output import slug
from unclip.cascade import Cascade

SCRIPT = Path(sample.__file__)


@pytest.fixture
def run(tiny_folder, tmp_path):
    """Run the script in this process on the tiny bundle at 64 pixels; return its exit code."""

    def run(*arguments: str) -> int:
        default = ["--model", str(tiny_folder), "--out", str(tmp_path / "out"), "--size", "64"]
        try:
            return sample.main([*arguments[:1], *default, *arguments[1:]])
        except SystemExit as stopped:
            return stopped.code

    return run


@pytest.fixture
def made(tmp_path):
    return lambda: sorted(path.name for path in (tmp_path / "out").iterdir())


@pytest.fixture
def start(tiny_folder, tmp_path):
    """Return a function that starts the script as a process."""

    def start(words):
        words = f"{words} --model {tiny_folder} --out {tmp_path / 'out'}"
        command = [sys.executable, str(SCRIPT), *shlex.split(words)]
        pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
        return subprocess.Popen(command, text=True, **pipes)

    return start


@pytest.mark.slow
def test_as_a_program(start, made, tmp_path):
    process = start("'a red apple' --count 2 --seed 3 --size 256 --stages")
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    expected = [f"a-red-apple-seed{seed}-{size}.png" for size in (64, 256) for seed in (3, 4)]
    expected.append("sheet.png")
    assert [Path(line).name for line in output.splitlines()] == expected
    assert made() == sorted(expected)
    images = [Image.open(tmp_path / "out" / name) for name in expected]
    assert {image.mode for image in images} == {"RGB"}
    *sizes, (width, height) = (image.size for image in images)
    assert sizes == 2 * [(64, 64)] + 2 * [(256, 256)]
    assert width > 2 * 256 > height  # a row of the sheet per prompt


def test_the_image_is_the_cascades_and_has_its_settings(run, tiny, tmp_path):
    assert run("A red apple!", "--seed", "5", "--guidance", "3", "--steps", "decoder=3") == 0
    expected = tiny.text_to_image(
        ["A red apple!"], seeds=[5], size=64, guidance_scale=3.0, steps={"decoder": 3}
    ).images[64][0]
    with Image.open(tmp_path / "out" / "a-red-apple-seed5-64.png") as image:
        pixels = torch.tensor(list(image.convert("RGB").tobytes())).reshape(64, 64, 3)
        metadata = dict(image.text)
    assert torch.equal(pixels.permute(2, 0, 1), expected.long())
    assert (metadata["prompt"], metadata["seed"]) == ("A red apple!", "5")
    assert metadata["Software"].startswith("unclip ")
    settings = {"size": 64, "guidance": 3.0, "steps": {"decoder": 3}}
    settings |= {"prior": "diffusion", "prior_guidance": None}
    assert settings.items() <= json.loads(metadata["settings"]).items()
    fingerprints = {name: data.fingerprint for name, data in tiny.metadata.items()}
    assert json.loads(metadata["bundle"]) == {
        name: fingerprints[name] for name in ("clip", "prior", "decoder")
    }


def test_an_image_without_a_prior(run, tmp_path):
    assert run("a dog", "--prior", "none") == 0
    with Image.open(tmp_path / "out" / "a-dog-seed0-64.png") as image:
        assert json.loads(image.text["settings"])["prior"] == "none"
        assert json.loads(image.text["bundle"]).keys() == {"clip", "decoder"}


def test_the_same_image_and_sheet_are_replaced_and_others_are_not(run, made):
    first = ["a-dog-seed0-64.png", "sheet.png"]
    both = ["a-dog-seed0-64-2.png", "a-dog-seed0-64.png", "sheet-2.png", "sheet.png"]
    one, guided = ("--batch-size", "1"), ("--guidance", "4")
    names = [first, first, both, both, both]
    for words, expected in zip([(), one, guided, guided, ()], names, strict=True):
        assert run("a dog", "--grid", *words) == 0
        assert made() == expected
    assert run("A dog!") == 0
    assert len(made()) == 5


def test_a_file_of_another_program_is_kept(run, tmp_path, made):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a-dog-seed0-64.png").write_text("mine")
    assert run("a dog") == 0
    assert (tmp_path / "out" / "a-dog-seed0-64.png").read_text() == "mine"
    assert made() == ["a-dog-seed0-64-2.png", "a-dog-seed0-64.png"]


def test_several_prompts_and_a_file_of_prompts(run, tmp_path, made):
    file = tmp_path / "prompts.txt"
    file.write_text("ein Apfel\n\n  zwei Äpfel \n", encoding="utf-8")
    assert run("text", "text", "--prompts", str(file), "--batch-size", "2") == 0
    slugs = ["ein-apfel", "text", "zwei-apfel"]  # a prompt may be the name of a command
    assert made() == [f"{one}-seed0-64.png" for one in slugs]


def test_only_the_images_that_clip_ranks_highest_are_kept(run, tiny, made, tmp_path):
    prompts, seeds = ["a dog", "a red apple"], range(2, 6)
    best = set()
    for prompt in prompts:
        images = tiny.text_to_image([prompt] * 4, seeds=seeds, size=64).images[64]
        z = F.normalize(torch.cat([tiny.embedder.image(image[None]) for image in images]))
        cosines = z @ F.normalize(tiny.embedder.text([prompt]).text_embedding).T
        worst = seeds[int(cosines.argmin())]
        best |= {f"{slug(prompt)}-seed{seed}-64.png" for seed in seeds if seed != worst}
    (tmp_path / "prompts.txt").write_text("\n".join([*prompts, "a dog"]))
    given = ["text", "--prompts", str(tmp_path / "prompts.txt")]
    given += ["--count", "4", "--seed", "2", "--batch-size", "3"]
    assert run(*given, "--keep", "3") == 0
    assert made() == sorted(best)
    assert run(*given) == 0  # the kept images are the same, and replaced
    assert len(made()) == 8


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("A red apple, to the left of a dog.", "a-red-apple-to-the-left-of-a-dog"),
        ("../../etc/passwd", "etc-passwd"),
        ("C:\\x\0y|*?<>", "c-x-y"),
        ("日本", "image"),
        ("-rf", "rf"),
        ("word " * 100, ("word-" * 12)[:-1]),
    ],
)
def test_file_names_are_safe(prompt, expected):
    assert slug(prompt) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "error: no prompt: try `python src/sample.py"),
        ((" ",), "error: a prompt is blank"),
        (("a dog", "--model", "models/none"), "error: models/none holds no stage"),
        (("a dog", "--prompts", "none.txt"), "error: none.txt: No such file"),
        (("a dog", "--out", __file__), "is a file: name a folder"),
        (("a dog", "--steps", "upsampler=3"), "error: steps names 'upsampler'"),
        (("a dog", "--steps", "prior=100000"), "error: steps is 100000; it can be from 1"),
        (("a dog", "--device", "tpu7"), "error: --device tpu7 cannot be used here"),
        (("a dog", "--device", "cuda:99"), "error: --device cuda:99 cannot be used here"),
        (("a dog", "--count", "0"), "'0': expected an integer, at least 1"),
        (("a dog", "--count", "2", "--keep", "3"), "--keep 3 is more than --count 2"),
        (("a dog", "--batch-size", "x"), "'x': expected an integer, at least 1"),
        (("a dog", "--steps", "16"), "'16' is not STAGE=N, such as decoder=16"),
        (("a dog", "--guidance", "nan"), "'nan': expected a number, finite"),
        (("a dog", "--seed", str(2**64)), "expected an integer, from 0 to 9"),
        (("edit", "x.png", "--to", "y", "--strength", "inf"), "expected a number, finite"),
        (("vary", "x.png", "--eta", "1.5"), "expected a number, from 0 to 1"),
        (("a dog", "--size", "128"), "invalid choice: 128"),
        (("a dog", "--cuont", "2"), "arguments: --cuont 2; did you mean --count?"),
        (("cat.png",), "cat.png is an image; commands for images are vary, interp"),
    ],
)
def test_a_user_error_is_one_sentence_and_exit_code_2(run, capsys, arguments, message):
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_bundle_without_the_last_upsampler_makes_256_pixels(tmp_path, capsys):
    names = ("clip", "prior", "decoder", "upsampler_256")
    short, out = tiny_bundle.write(tmp_path / "short", names=names), tmp_path / "o"
    assert sample.main(["a dog", "--model", str(short), "--out", str(out)]) == 0
    assert [path.name for path in out.iterdir()] == ["a-dog-seed0-256.png"]
    assert f"the largest images that {short} makes have 256 pixels" in capsys.readouterr().err
    arguments = ["a dog", "--model", str(short), "--out", str(out), "--size", "1024"]
    assert sample.main(arguments) == 2
    assert "upsampler_1024.safetensors is missing" in capsys.readouterr().err


def test_too_little_memory(run, capsys, monkeypatch):
    def fails(*arguments, **keywords):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(Cascade, "text_to_image", fails)
    assert run("a dog") == 2
    assert "not enough memory: try a smaller --batch-size" in capsys.readouterr().err


def test_finished_images_are_kept(run, made, capsys, monkeypatch):
    original, calls = Cascade.text_to_image, []

    def interrupted(self, *arguments, **keywords):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, *arguments, **keywords)

    monkeypatch.setattr(Cascade, "text_to_image", interrupted)
    assert run("a dog", "--count", "3", "--batch-size", "1") == 130
    assert made() == ["a-dog-seed0-64.png"]
    assert capsys.readouterr().err.strip() == "stopped; finished images are kept"


@pytest.mark.slow
def test_ctrl_c_ends_the_program(start, made):
    process = start("'a dog' --size 64 --count 100000 --batch-size 1")
    process.stdout.readline()
    for _ in range(3):  # Python ignores an exception that is raised within a destructor
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            _, errors = process.communicate(timeout=30)
            break
    assert process.returncode == 130
    assert errors.count("Traceback") == errors.count("Exception ignored")
    assert made() and all(name.endswith(".png") for name in made())


def test_a_profile_of_sampling_is_written_and_printed(run, tmp_path, capsys):
    assert run("a red apple", "--profile") == 0
    with gzip.open(tmp_path / "out" / "profile.json.gz") as trace:
        names = {event.get("name") for event in json.load(trace)["traceEvents"]}
    assert {"aten::convolution", "aten::addmm"} <= names
    table = re.findall(r"^ *\S.*?  +([\d.]+)%", capsys.readouterr().out, re.MULTILINE)
    shares = [float(share) for share in table]
    assert len(shares) == 10 and shares == sorted(shares, reverse=True)
