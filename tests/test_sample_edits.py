import json
import shutil
from pathlib import Path

import pytest
import tiny_bundle
import torch
from PIL import Image

import sample
from unclip.images import open_image, to_tensor

GIF = "a-interpolate-seed0-64.gif"


@pytest.fixture
def images(tmp_path):
    """Write two images and a mask into the folder in which the commands run."""
    for name, color in (("a.png", "red"), ("b.png", "blue")):
        image = Image.new("RGB", (80, 64), "white")
        image.paste(color, (20, 10, 60, 50))
        image.save(tmp_path / name)
    mask = Image.new("L", (80, 64))
    mask.paste(255, (30, 20, 50, 40))
    mask.save(tmp_path / "mask.png")
    return tmp_path


@pytest.fixture
def run(tiny_folder, images, monkeypatch):
    """Run a command on the tiny bundle at 64 pixels, few steps; return the names of the files."""
    monkeypatch.chdir(images)

    def run(command: str, *arguments: str) -> list[str]:
        default = ["--model", str(tiny_folder), "--out", "out", "--size", "64"]
        default += ["--steps", "decoder=3"]
        assert sample.main([command, *arguments, *default]) == 0
        return sorted(path.name for path in Path("out").iterdir())

    return run


def pixels(path):
    return to_tensor(open_image(path))


class TestCommands:
    def test_vary(self, run, tiny):
        names = run("vary", "a.png", "--count", "2", "--eta", "0.5", "--seed", "3", "--grid")
        assert names == [f"a-vary-seed3-{end}.png" for end in ("00-64", "01-64", "sheet")]
        expected = tiny.vary("a.png", 2, eta=0.5, seed=3, size=64, steps={"decoder": 3})
        for name, image in zip(names, expected.images[64], strict=False):
            assert torch.equal(pixels(Path("out", name)), image)

    def test_interpolate_writes_an_animation(self, run):
        names = run("interpolate", "a.png", "b.png", "--frames", "3", "--gif")
        assert names == [f"a-interpolate-seed0-{k:02d}-64.png" for k in range(3)] + [GIF]
        with Image.open(f"out/{GIF}") as animation:
            assert animation.n_frames == 4
            assert json.loads(animation.info["comment"])["command"] == "interpolate"

    def test_an_animation_of_other_settings_is_another_file(self, run):
        for arguments in ((), ("--guidance", "3"), ()):
            names = run("interpolate", "a.png", "b.png", "--frames", "2", "--gif", *arguments)
        other = GIF.replace(".gif", "-2.gif")
        assert [name for name in names if name.endswith("gif")] == [other, GIF]

    def test_a_path_through_three_and_a_mixture(self, run):
        assert len(run("interpolate", "a.png", "b.png", "a.png", "--frames", "3")) == 5
        shutil.rmtree("out")
        assert len(run("interpolate", "a.png", "b.png", "--weights", "1", "3")) == 1

    def test_edit(self, run):
        names = run("edit", "a.png", "--from", "a cat", "--to", "a dog", "--frames", "2")
        assert names == ["a-edit-seed0-00-64.png", "a-edit-seed0-01-64.png"]
        run("reconstruct", "a.png")
        back = pixels("out/a-reconstruct-seed0-00-64.png")
        assert torch.equal(pixels("out/a-edit-seed0-00-64.png"), back)

    def test_inpaint_keeps_the_rest_and_paints_a_margin(self, run):
        run("inpaint", "a.png", "a dog", "--mask", "mask.png")
        made, known = pixels("out/a-inpaint-seed0-00-64.png"), pixels("a.png")[:, :, 8:72]
        assert torch.equal(made[:, :20], known[:, :20])
        assert not torch.equal(made, known)
        assert len(run("inpaint", "a.png", "--margin", "0.5")) == 2

    @pytest.mark.parametrize(
        "command", ["vary", "interpolate", "edit", "inpaint", "reconstruct", "again", "text"]
    )
    def test_help_shows_an_example(self, capsys, command):
        with pytest.raises(SystemExit) as stopped:
            sample.main([command, "--help"])
        assert stopped.value.code == 0
        words = capsys.readouterr().out
        assert "For example:\n\n    python src/sample.py " in words
        assert "--model" in words


class TestAgain:
    @pytest.mark.parametrize(
        "arguments",
        [
            ("text", "a dog", "a cat", "--count", "2", "--guidance", "3"),
            ("text", "a dog", "--dtype", "bfloat16", "--offload"),
            ("vary", "a.png", "--count", "2"),
            ("interpolate", "a.png", "b.png", "--frames", "3", "--batch-size", "2"),
            ("edit", "a.png", "--to", "a dog", "--frames", "2"),
            ("inpaint", "a.png", "a dog", "--mask", "mask.png", "--count", "2"),
            ("reconstruct", "a.png", "b.png"),
        ],
    )
    def test_bit_for_bit(self, run, tiny_folder, capsys, arguments):
        name = run(*arguments)[-1]
        capsys.readouterr()
        again = ["again", f"out/{name}", "--model", str(tiny_folder), "--out", "again"]
        assert sample.main(again) == 0
        assert "the same, pixel for pixel" in capsys.readouterr().err
        assert Path("again", name).read_bytes() == Path("out", name).read_bytes()

    def test_a_bundle_is_found_by_its_fingerprints(self, run, tiny_folder, capsys):
        (name,) = run("reconstruct", "a.png")
        shutil.copytree(tiny_folder, "models/elsewhere")
        tiny_bundle.write(Path("models/another"), names=("clip", "prior"))
        Path("a.png").rename("out/a.png")  # an input image may be next to the result
        assert sample.main(["again", f"out/{name}"]) == 0
        assert "pixel for pixel" in capsys.readouterr().err

    def test_images_that_cannot_be_reproduced(self, run, tiny_folder, capsys):
        name, sheet = run("vary", "a.png", "--count", "1", "--grid")
        shutil.copy("b.png", "plain.png")

        def refused(image, message, *model):
            assert sample.main(["again", image, *model]) == 2
            assert message in capsys.readouterr().err

        own = ("--model", str(tiny_folder))
        refused("out/none.png", "there is no out/none.png", *own)
        refused("plain.png", "has no settings", *own)
        refused(f"out/{sheet}", "is a contact sheet", *own)
        refused(f"out/{name}", "no folder in models/ is the bundle")
        shutil.copy("b.png", "a.png")
        refused(f"out/{name}", "a.png has changed since", *own)
        Path("a.png").unlink()
        refused(f"out/{name}", "a.png, which the image was made from, is missing", *own)


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("vary", "none.png"), "none.png"),
            (("vary", "text.png"), "text.png: not an image"),
            (("interpolate", "a.png"), "needs two images or more"),
            (("edit", "a.png", "--from", "a", "--to", "a"), "the same embedding"),
            (("inpaint", "a.png"), "where to paint? Use --mask FILE, or --margin"),
        ],
    )
    def test_a_user_error_is_one_sentence_and_exit_code_2(
        self, tiny_folder, images, monkeypatch, capsys, arguments, message
    ):
        monkeypatch.chdir(images)
        Path("text.png").write_text("no image")
        assert sample.main([*arguments, "--model", str(tiny_folder), "--size", "64"]) == 2
        errors = capsys.readouterr().err.strip()
        assert errors.startswith("error: ") and message in errors
        assert len(errors.splitlines()) == 1
