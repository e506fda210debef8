"""From a folder of one's own images to a trained bundle and its first image, as the docs say."""

import shutil

import pytest
import script
from PIL import Image

from unclip.bundle import read_metadata

STAGES = ("clip", "prior", "decoder", "upsampler_256", "upsampler_1024")
QUICK = (
    "scale=quick data=folder trainer.accelerator=cpu trainer.max_steps=2 "
    "trainer.limit_val_batches=1"
)


def make_bundle(place, name, count, stages, init=""):
    """Write images of several sizes with captions, and train stages on them."""
    images = place / f"images {name}"
    images.mkdir()
    for number in range(count):
        side = 1030 if number < count // 20 else 70 + 230 * (number % 2)
        image = Image.new("RGB", (side, side + 7), (4 * number, 90, 250 - 4 * number))
        image.paste((255, 255, 255), (9, 9, 30 + number, 40))
        image.save(images / f"image {number}.png")
        (images / f"image {number}.txt").write_text(f"a square of {30 + number} pixels\n")
    script.run(f"python src/prepare.py folder '{images.name}' data/{name} --workers 0", place)
    for stage in stages:
        words = f"stage={stage} data.root=data/{name} bundle={name} {init}"
        script.run(f"python src/train.py {words} {QUICK}", place)


def sample(place, bundle, size):
    steps = "--steps prior=1 decoder=1" + " upsampler_256=1" * (size > 64)
    words = f"--model models/{bundle} --out samples/{bundle} --size {size} {steps}"
    script.run(f"python src/sample.py 'a square of 31 pixels' {words}", place)
    (made,) = (place / "samples" / bundle).glob("*.png")
    with Image.open(made) as image:
        assert image.size == (size, size)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a bundle that was trained on 60 images."""
    place = tmp_path_factory.mktemp("own")
    make_bundle(place, "mine", 60, STAGES)
    yield place
    shutil.rmtree(place)


@pytest.mark.slow
def test_60_images_are_enough_for_a_bundle_of_all_stages(place):
    for stage in STAGES:
        assert read_metadata(place / "models" / "mine" / f"{stage}.safetensors").steps == 2
    sample(place, "mine", 256)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stages", "init"),
    [("few", STAGES[:3], ""), ("tuned", ("prior", "decoder"), "init=models/mine")],
)
def test_5_images_are_enough_for_a_bundle_and_to_fine_tune_one(place, name, stages, init):
    make_bundle(place, name, 5, stages, init)
    sample(place, name, 64)
    clips = [place / "models" / bundle / "clip.safetensors" for bundle in ("mine", name)]
    assert (clips[0].read_bytes() == clips[1].read_bytes()) == bool(init)
