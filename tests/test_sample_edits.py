import json
import shutil
from pathlib import Path

import pytest
import tiny_bundle
import torch
from PIL import Image

import sample
from unclip.images import open_image, to_tensor


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
        assert names == [
            "a-interpolate-seed0-00-64.png",
            "a-interpolate-seed0-01-64.png",
            "a-interpolate-seed0-02-64.png",
            "a-interpolate-seed0-64.gif",
        ]
        with Image.open("out/a-interpolate-seed0-64.gif") as animation:
            assert animation.n_frames == 4
            assert json.loads(animation.info["comment"])["command"] == "interpolate"

    def test_an_animation_of_other_settings_is_another_file(self, run):
        for arguments in ((), ("--guidance", "3"), ()):
            names = run("interpolate", "a.png", "b.png", "--frames", "2", "--gif", *arguments)
        stem = "a-interpolate-seed0-64"
        assert [name for name in names if name.endswith("gif")] == [f"{stem}-2.gif", f"{stem}.gif"]

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

    def test_inpaint_keeps_the_rest(self, run):
        run("inpaint", "a.png", "a dog", "--mask", "mask.png")
        made = pixels("out/a-inpaint-seed0-00-64.png")
        known = pixels("a.png")[:, :, 8:72]
        assert torch.equal(made[:, :20], known[:, :20])
        assert not torch.equal(made, known)

    def test_outpaint(self, run):
        run("inpaint", "a.png", "--margin", "0.5")
        assert pixels("out/a-inpaint-seed0-00-64.png").shape == (3, 64, 64)

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
        other = tiny_bundle.write(Path("models/another"), names=("clip", "prior"))
        assert other.is_dir()
        assert sample.main(["again", f"out/{name}"]) == 0
        assert "pixel for pixel" in capsys.readouterr().err

    def test_an_input_image_may_be_next_to_the_result(self, run, tiny_folder):
        (name,) = run("reconstruct", "a.png")
        Path("a.png").rename("out/a.png")
        assert sample.main(["again", f"out/{name}", "--model", str(tiny_folder)]) == 0

    def test_images_that_cannot_be_reproduced(self, run, tiny_folder, capsys):
        names = run("vary", "a.png", "--count", "1", "--grid")
        Path("plain.png").write_bytes(Path("b.png").read_bytes())
        for image, message in (
            ("out/none.png", "there is no out/none.png"),
            ("plain.png", "has no settings"),
            (f"out/{names[1]}", "is a contact sheet"),
        ):
            assert sample.main(["again", image, "--model", str(tiny_folder)]) == 2
            assert message in capsys.readouterr().err
        assert sample.main(["again", f"out/{names[0]}"]) == 2
        assert "no folder in models/ is the bundle" in capsys.readouterr().err
        shutil.copy("b.png", "a.png")
        assert sample.main(["again", f"out/{names[0]}", "--model", str(tiny_folder)]) == 2
        assert "a.png has changed since" in capsys.readouterr().err
        Path("a.png").unlink()
        assert sample.main(["again", f"out/{names[0]}", "--model", str(tiny_folder)]) == 2
        assert "a.png, which the image was made from, is missing" in capsys.readouterr().err


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
