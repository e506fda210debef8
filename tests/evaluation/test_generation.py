"""The folder of generated images: what names it, and how it resumes."""

import json
import multiprocessing
import os
import signal
from dataclasses import replace
from unittest.mock import Mock

import pytest
import tiny_bundle
import torch
from PIL import Image
from tiny_evaluation import COUNT, PROTOCOL, part_of, settings_of

from unclip import bundle
from unclip.cascade import Cascade
from unclip.evaluation.generation import ImageFolder, Sampling, generate
from unclip.evaluation.protocol import Prompt
from unclip.evaluation.sources import open_source

BLACK = Image.new("RGB", (8, 8))


@pytest.fixture
def cascade(tiny_model):
    return Cascade.load(tiny_model, device="cpu")


@pytest.fixture(scope="module")
def prompts(squares):
    return PROTOCOL.draw(open_source(squares, "test_seen", PROTOCOL).items)


def sampled(cascade, prompts, out, *, protocol=PROTOCOL, data="x", **settings):
    return generate(Sampling(settings_of(**settings), cascade), prompts, protocol, out, data=data)


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
    BLACK.save(tmp_path / "a.png")
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
    again = part_of(tiny_model, tmp_path / "again", "clip", "prior")
    recipe = tiny_bundle.recipe("decoder")
    recipe["sampler"]["steps"] = 3
    file = tiny_model / "decoder.safetensors"
    stage, clip = bundle.load_stage(file), bundle.read_metadata(file).clip_fingerprint
    bundle.save_stage(
        again / "decoder.safetensors", stage, recipe=recipe, steps=3, clip_fingerprint=clip
    )
    other = Cascade.load(again, device="cpu")
    assert cascade.metadata["decoder"].fingerprint == other.metadata["decoder"].fingerprint
    folders = [sampled(each, prompts[:2], tmp_path) for each in (cascade, other)]
    assert folders[0].path != folders[1].path
    assert [f.settings["sampling"]["decoder"]["steps"] for f in folders] == [2, 3]


def test_a_kill_loses_at_most_one_batch(cascade, prompts, tmp_path, monkeypatch):
    """A process is killed between two images of its third batch; the next one resumes there."""

    def run_until_killed():
        write = ImageFolder.write

        def last(folder, k, image):
            if k == 10:
                os.kill(os.getpid(), signal.SIGKILL)
            write(folder, k, image)

        ImageFolder.write = last
        sampled(cascade, prompts, tmp_path / "a")

    child = multiprocessing.get_context("fork").Process(target=run_until_killed)
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert len(list((tmp_path / "a").rglob("*.png"))) == 10

    whole = sampled(cascade, prompts, tmp_path / "b")
    spy = Mock(side_effect=Sampling.text_to_image)
    monkeypatch.setattr(Sampling, "text_to_image", lambda *args, **how: spy(*args, **how))
    resumed = sampled(cascade, prompts, tmp_path / "a")
    firsts = [call.kwargs["first"] for call in spy.call_args_list]
    assert firsts == list(range(8, COUNT, 4))  # the third batch again, as a whole
    assert torch.equal(*(f.load(range(COUNT), PROTOCOL) for f in (resumed, whole)))


def test_only_a_truncated_image_is_sampled_again(cascade, prompts, tmp_path, monkeypatch):
    folder = sampled(cascade, prompts, tmp_path)
    path, before = folder.rows[5].path, folder.rows[5].path.read_bytes()
    path.write_bytes(before[: len(before) // 2])
    assert sampled(cascade, prompts, tmp_path).path == folder.path
    assert path.read_bytes() == before
    monkeypatch.setattr(Cascade, "stage", None)  # no stage is loaded if all images exist
    sampled(cascade, prompts, tmp_path)


def test_other_settings_get_a_folder_of_their_own(cascade, prompts, tmp_path):
    few = prompts[:2]
    for settings in ({}, {"guidance_scale": 3.0}, {"seed": 1}, {"steps": {"decoder": 1}}):
        sampled(cascade, few, tmp_path, **settings)
    sampled(cascade, few, tmp_path, data="other")
    sampled(cascade, few, tmp_path, batch_size=1)  # changes no image
    sampled(cascade, few, tmp_path, guidance_scale=2.0, steps={"decoder": 2})  # the stage's own
    assert len(list(tmp_path.iterdir())) == 5
    with pytest.raises(ValueError, match="another out="):
        sampled(cascade, prompts, tmp_path)


@pytest.mark.parametrize(
    ("prior", "stages", "sampler"),
    [
        ("ar", {"clip", "prior_ar", "decoder"}, "autoregressive"),
        ("linear", {"clip", "prior", "decoder"}, "linear"),
        ("none", {"clip", "decoder"}, "none"),
    ],
)
def test_another_prior_samples_into_a_folder_that_says_so(
    cascade, prompts, tmp_path, prior, stages, sampler, monkeypatch
):
    predict = Mock(return_value=torch.ones(2, tiny_bundle.EMBEDDING_DIM))
    monkeypatch.setattr(Cascade, "prior", predict)
    default = sampled(cascade, prompts[:2], tmp_path)
    other = sampled(cascade, prompts[:2], tmp_path, prior=prior)
    assert other.path != default.path and other.settings["stages"].keys() == stages
    assert other.settings["sampling"]["prior"]["sampler"] == sampler
    assert [call.kwargs["prior"] for call in predict.call_args_list] == ["diffusion", prior]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"prior": "arr"}, "'arr'"),
        ({"guidance_scale": float("nan")}, "^guidance_scale is nan; it must be a finite number"),
        ({"prior_guidance_scale": float("inf")}, "^prior_guidance_scale is inf"),
        ({"batch_size": 0}, "^batch_size is 0"),
    ],
)
def test_impossible_settings_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        settings_of(**setting)


def test_a_missing_stage_is_named_before_anything_is_sampled(tiny_model, prompts, tmp_path):
    cascade = Cascade.load(part_of(tiny_model, tmp_path / "model", "clip", "decoder"), device="cpu")
    with pytest.raises(FileNotFoundError, match=r"train\.py stage=prior"):
        sampled(cascade, prompts[:2], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_upsamplers_beyond_the_resolution_are_not_used(cascade, prompts, tmp_path):
    protocol = replace(PROTOCOL, resolution=256, count=2)
    folder = sampled(cascade, prompts[:2], tmp_path, protocol=protocol)
    assert folder.load(range(2), protocol).shape == (2, 3, 256, 256)
    assert folder.settings["stages"].keys() == {"clip", "prior", "decoder", "upsampler_256"}


def test_each_repeat_of_a_prompt_has_its_own_noise(cascade, squares, tmp_path):
    protocol = replace(PROTOCOL, repeats=2, count=2)
    prompts = protocol.draw(open_source(squares, "test_seen", protocol).items)
    folder = sampled(cascade, prompts, tmp_path, protocol=protocol)
    images = folder.load(range(4), protocol)
    assert folder.rows[0].prompt == folder.rows[1].prompt
    assert not torch.equal(images[0], images[1])


def test_names_with_slashes_and_long_names_stay_inside_the_folder(tmp_path):
    out = tmp_path / "out" / "folder"
    names = ["../../x", *("猫" * 100 + end for end in "ab")]
    prompts = [Prompt(name, "a cat", 0) for name in names]
    folder = ImageFolder.create(out, prompts, {}, seed=0)
    for k in range(3):
        folder.write(k, torch.full((3, 8, 8), k, dtype=torch.uint8))
    assert {row.path.parent for row in folder.rows} == {out} and not list(tmp_path.glob("*.png"))
    (out / "other.png").touch()
    paths = [row.path for row in folder.rows]
    assert [row.path for row in ImageFolder.read(out).rows] == paths and len(set(paths)) == 3


def test_images_that_differ_in_their_extension_are_two(tmp_path):
    names = ["0.jpg", "0.png", "1.0.png"]
    for name in names:
        BLACK.save(tmp_path / name)

    def read(*lines):
        if lines:
            (tmp_path / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))
        return [row.path.name for row in ImageFolder.read(tmp_path).rows]

    assert read() == names
    second = {"id": "1", "file": "0.jpg", "prompt": "y"}
    lines = {"id": "0", "prompt": "x"}, second, {"id": "1.0", "prompt": "z"}
    assert read(*lines) == ["0.png", "0.jpg", "1.0.png"]
    with pytest.raises(FileNotFoundError, match="lists 1, which is missing"):
        read({"id": "1", "prompt": "x"})
