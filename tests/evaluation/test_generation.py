"""The folder of generated images: what names it, and how it resumes."""

import json
import multiprocessing
import os
import shutil
import signal
from dataclasses import replace

import pytest
import tiny_bundle
import torch
from PIL import Image
from tiny_protocol import COUNT, PROTOCOL, settings_of

from unclip import bundle
from unclip.cascade import Cascade
from unclip.evaluation.generation import ImageFolder, Sampling, generate
from unclip.evaluation.protocol import Prompt
from unclip.evaluation.sources import open_source
from unclip.images import to_pil


@pytest.fixture
def cascade(tiny_model):
    return Cascade.load(tiny_model, device="cpu")


@pytest.fixture(scope="module")
def prompts(squares):
    return PROTOCOL.draw(open_source(squares, "test_seen", PROTOCOL).items)


def sampled(cascade, prompts, out, *, protocol=PROTOCOL, data="x", **settings):
    return generate(cascade, prompts, protocol, settings_of(**settings), out, data=data)


def test_images_of_another_size_or_format_are_resized(tmp_path):
    Image.effect_noise((96, 80), 50).save(tmp_path / "b.jpg")
    Image.effect_noise((64, 64), 50).save(tmp_path / "a.webp", lossless=True)
    folder = ImageFolder.read(tmp_path)
    assert [row.id for row in folder.rows] == ["a", "b"] and folder.prompts is None
    assert folder.load(range(2), PROTOCOL).shape == (2, 3, 64, 64)


@pytest.mark.parametrize(
    ("manifest", "error", "words"),
    [
        ('{"id": "a"}', ValueError, "line 1"),
        ("no json", ValueError, "line 1"),
        ('{"id": "missing", "prompt": "x"}', FileNotFoundError, "missing"),
        ('{"id": "a", "file": "/etc/passwd", "prompt": "x"}', FileNotFoundError, "passwd"),
    ],
)
def test_a_damaged_manifest_is_named(tmp_path, manifest, error, words):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "manifest.jsonl").write_text(manifest)
    with pytest.raises(error, match=words):
        ImageFolder.read(tmp_path)


def test_missing_and_damaged_images_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        ImageFolder.read(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="no image"):
        ImageFolder.read(tmp_path)
    (tmp_path / "a.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(ValueError, match=r"a\.png"):
        ImageFolder.read(tmp_path).load([0], PROTOCOL)


def test_another_recipe_with_equal_weights_gets_another_folder(
    tiny_model, cascade, prompts, tmp_path
):
    again = tmp_path / "again"
    shutil.copytree(tiny_model, again)
    recipe = tiny_bundle.recipe("decoder")
    recipe["sampler"]["steps"] = 3
    clip = bundle.read_metadata(tiny_model / "clip.safetensors").clip_fingerprint
    stage = bundle.load_stage(tiny_model / "decoder.safetensors")
    bundle.save_stage(
        again / "decoder.safetensors", stage, recipe=recipe, steps=3, clip_fingerprint=clip
    )
    other = Cascade.load(again, device="cpu")
    assert cascade.metadata["decoder"].fingerprint == other.metadata["decoder"].fingerprint
    folders = [sampled(each, prompts[:2], tmp_path) for each in (cascade, other)]
    assert folders[0].path != folders[1].path
    assert [f.settings["sampling"]["decoder"]["steps"] for f in folders] == [2, 3]


def test_a_stages_own_settings_given_explicitly_name_the_same_folder(cascade, prompts, tmp_path):
    own = sampled(cascade, prompts[:2], tmp_path)
    explicit = sampled(cascade, prompts[:2], tmp_path, guidance_scale=2.0, steps={"decoder": 2})
    assert own.path == explicit.path


def test_a_kill_loses_at_most_one_batch(cascade, prompts, tmp_path, monkeypatch):
    """A process is killed between two images of its third batch; the next one resumes there."""

    def run_until_killed():
        write, written = ImageFolder.write, []

        def last(folder, k, image):
            if len(written) == 10:
                os.kill(os.getpid(), signal.SIGKILL)
            written.append(k)
            write(folder, k, image)

        ImageFolder.write = last
        sampled(cascade, prompts, tmp_path / "a")

    child = multiprocessing.get_context("fork").Process(target=run_until_killed)
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert len(list((tmp_path / "a").rglob("*.png"))) == 10

    drawn, text_to_image = [], Sampling.text_to_image

    def counted(self, captions, *, size, first):
        drawn.extend(range(first, first + len(captions)))
        return text_to_image(self, captions, size=size, first=first)

    with monkeypatch.context() as patch:
        patch.setattr(Sampling, "text_to_image", counted)
        resumed = sampled(cascade, prompts, tmp_path / "a")
    assert drawn == list(range(8, COUNT))  # the third batch again, as a whole
    whole = sampled(cascade, prompts, tmp_path / "b")
    assert torch.equal(*(f.load(range(COUNT), PROTOCOL) for f in (resumed, whole)))


def test_a_truncated_image_is_sampled_again(cascade, prompts, tmp_path):
    folder = sampled(cascade, prompts, tmp_path)
    before = folder.rows[5].path.read_bytes()
    folder.rows[5].path.write_bytes(before[: len(before) // 2])
    sampled(cascade, prompts, tmp_path)
    assert folder.rows[5].path.read_bytes() == before


def test_no_stage_is_loaded_if_all_images_exist(tiny_model, prompts, tmp_path, monkeypatch):
    folder = sampled(Cascade.load(tiny_model, device="cpu"), prompts[:4], tmp_path)

    def load(self, name):
        raise AssertionError(f"{name} was loaded")

    monkeypatch.setattr(Cascade, "stage", load)
    again = sampled(Cascade.load(tiny_model, device="cpu"), prompts[:4], tmp_path)
    assert again.path == folder.path


def test_other_settings_get_a_folder_of_their_own(cascade, prompts, tmp_path):
    few = prompts[:2]
    for settings in ({}, {"guidance_scale": 3.0}, {"seed": 1}, {"steps": {"decoder": 1}}):
        sampled(cascade, few, tmp_path, **settings)
    sampled(cascade, few, tmp_path, data="other")
    sampled(cascade, few, tmp_path, batch_size=1)  # changes no image
    assert len(list(tmp_path.iterdir())) == 5
    with pytest.raises(ValueError, match="another out="):
        sampled(cascade, prompts, tmp_path)


@pytest.mark.parametrize(
    ("prior", "stages", "sampler"),
    [
        ("ar", {"clip", "prior_ar", "decoder"}, {"sampler": "autoregressive"}),
        ("linear", {"clip", "prior", "decoder"}, {"sampler": "linear"}),
        ("none", {"clip", "decoder"}, {"sampler": "none"}),
    ],
)
def test_another_prior_has_a_folder_that_says_so(
    cascade, prompts, tmp_path, prior, stages, sampler, monkeypatch
):
    drawn = []

    def text_to_image(self, captions, *, size, first):
        drawn.append(self.settings.prior)
        return torch.zeros(len(captions), 3, size, size, dtype=torch.uint8)

    monkeypatch.setattr(Sampling, "text_to_image", text_to_image)
    default = sampled(cascade, prompts[:2], tmp_path)
    other = sampled(cascade, prompts[:2], tmp_path, prior=prior)
    assert other.path != default.path and other.settings["stages"].keys() == stages
    assert other.settings["sampling"]["prior"].items() >= sampler.items()
    assert drawn == ["diffusion", prior]


def test_the_autoregressive_prior_samples_other_images(cascade, prompts, tmp_path):
    folders = [sampled(cascade, prompts[:2], tmp_path, prior=name) for name in ("diffusion", "ar")]
    assert not torch.equal(*(folder.load(range(2), PROTOCOL) for folder in folders))


def test_an_unknown_prior_is_refused():
    with pytest.raises(ValueError, match="'arr'"):
        settings_of(prior="arr")


def test_a_missing_stage_is_named_before_anything_is_sampled(tiny_model, prompts, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model" / "prior.safetensors").unlink()
    cascade = Cascade.load(tmp_path / "model", device="cpu")
    with pytest.raises(FileNotFoundError, match=r"train\.py stage=prior"):
        sampled(cascade, prompts[:2], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_upsamplers_beyond_the_resolution_are_not_used(cascade, prompts, tmp_path):
    protocol = replace(PROTOCOL, resolution=256, count=2)
    folder = sampled(cascade, prompts[:2], tmp_path, protocol=protocol)
    assert folder.load(range(2), protocol).shape == (2, 3, 256, 256)
    assert folder.settings["stages"].keys() == {"clip", "prior", "decoder", "upsampler_256"}


def test_every_point_of_a_sweep_has_the_same_captions_and_noise(cascade, prompts, tmp_path):
    """At (almost) no guidance nothing differs, so only guidance moves a sweep's numbers."""
    folders = [
        sampled(cascade, prompts[:4], tmp_path, guidance_scale=scale) for scale in (1.0, 1.0 + 1e-9)
    ]
    first, second = (folder.load(range(4), PROTOCOL).int() for folder in folders)
    assert folders[0].path != folders[1].path and (first - second).abs().max() <= 1
    assert [row.prompt for row in folders[0].rows] == [row.prompt for row in folders[1].rows]


def test_each_repeat_of_a_prompt_has_its_own_noise(cascade, squares, tmp_path):
    protocol = replace(PROTOCOL, repeats=2, count=2)
    prompts = protocol.draw(open_source(squares, "test_seen", protocol).items)
    folder = sampled(cascade, prompts, tmp_path, protocol=protocol)
    images = folder.load(range(4), protocol)
    assert folder.rows[0].prompt == folder.rows[1].prompt
    assert not torch.equal(images[0], images[1])


def test_a_name_with_slashes_stays_inside_the_folder(tmp_path):
    out = tmp_path / "out" / "folder"
    folder = ImageFolder.create(out, [Prompt("../../x", "a cat", 0)], {}, seed=0)
    folder.write(0, torch.zeros(3, 8, 8, dtype=torch.uint8))
    assert folder.rows[0].path.parent == out and not list(tmp_path.glob("*.png"))
    (out / "other.png").touch()
    assert ImageFolder.read(out).rows[0].path == folder.rows[0].path


def test_a_long_name_is_shortened_to_a_file_name(tmp_path):
    names = ["猫" * 100 + end for end in "ab"]
    prompts = [Prompt(name, "a cat", 0) for name in names]
    folder = ImageFolder.create(tmp_path, prompts, {}, seed=0)
    for k in range(2):
        folder.write(k, torch.full((3, 8, 8), k, dtype=torch.uint8))
    assert [row.path for row in ImageFolder.read(tmp_path).rows] == [r.path for r in folder.rows]
    assert len({row.path for row in folder.rows}) == 2


def test_an_image_s_name_may_have_a_dot(tmp_path):
    for name in ("a", "a.b"):
        to_pil(torch.zeros(3, 8, 8, dtype=torch.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "manifest.jsonl").write_text('{"id": "a.b", "prompt": "a cat"}\n')
    assert ImageFolder.read(tmp_path).rows[0].path == tmp_path / "a.b.png"


def test_images_that_differ_in_their_extension_are_two(tmp_path):
    names = ["0.jpg", "0.png", "1.0.png"]
    for name in names:
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    assert [row.path.name for row in ImageFolder.read(tmp_path).rows] == names
    lines = [{"id": "0", "prompt": "x"}, {"id": "1", "file": "0.jpg", "prompt": "y"}]
    (tmp_path / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [row.path.name for row in ImageFolder.read(tmp_path).rows] == ["0.png", "0.jpg"]
    (tmp_path / "manifest.jsonl").write_text('{"id": "1", "prompt": "x"}')
    with pytest.raises(FileNotFoundError, match="lists 1, which is missing"):
        ImageFolder.read(tmp_path)


@pytest.mark.parametrize("name", ["guidance_scale", "prior_guidance_scale"])
def test_guidance_that_is_not_finite_is_refused(name):
    with pytest.raises(ValueError, match=f"^{name} is nan; it must be a finite number"):
        settings_of(**{name: float("nan")})
