"""From a folder of one's own images to a trained bundle and its first image, as the docs say."""

import random
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
KINDS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "CMYK", "16 bits", "MPO")


def write_images(folder, count, *, large=0):
    """Write images of mixed formats and sizes; one has no caption, one is no image."""
    folder.mkdir()
    generator = random.Random(count)
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        side = 1030 if number < large else generator.choice((70, 300))
        image = Image.new("RGB", (side, side + 7), tuple(generator.choices(range(256), k=3)))
        image.paste((255, 255, 255), (9, 9, 30 + number, 40))
        if kind == "CMYK":
            image, kind = image.convert("CMYK"), "JPEG"
        if kind == "16 bits":
            image, kind = image.convert("L").convert("I;16").point(lambda x: x * 257), "PNG"
        with open(folder / f"image {number}.{kind.lower()}", "wb") as file:
            image.save(file, kind)
        caption = f"a square of {30 + number} pixels\n"
        (folder / f"image {number}.txt").write_text(caption)
    Image.new("RGB", (70, 70)).save(folder / "no caption.png")
    (folder / "broken.jpg").write_bytes(b"<html>not found</html>")
    (folder / "broken.txt").write_text("a broken image\n")
    return folder


def prepare(place, images, data):
    script.run(f"python src/prepare.py folder {images} {data} --workers 0", place)


def train(place, stages, words):
    for stage in stages:
        script.run(f"python src/train.py stage={stage} {QUICK} {words}", place)


def sample(place, bundle, size):
    steps = "--steps prior=1 decoder=1" + " upsampler_256=1" * (size > 64)
    words = f"--model models/{bundle} --out samples/{bundle} --size {size} {steps}"
    script.run(f"python src/sample.py 'a square of 31 pixels' {words}", place)
    (made,) = (place / "samples" / bundle).glob("*.png")
    with Image.open(made) as image:
        assert image.size == (size, size)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a bundle that was trained on 60 mixed images."""
    place = tmp_path_factory.mktemp("own")
    write_images(place / "images 60", 60, large=3)
    prepare(place, "'images 60'", "data/mine")
    train(place, STAGES, "data.root=data/mine bundle=mine")
    yield place
    shutil.rmtree(place)


@pytest.mark.slow
def test_60_mixed_images_are_enough_for_a_bundle_of_all_stages(place):
    rejected = (place / "data" / "mine" / "rejected.csv").read_text()
    assert len(rejected.splitlines()) == 3  # a heading and the two bad files
    for stage in STAGES:
        assert read_metadata(place / "models" / "mine" / f"{stage}.safetensors").steps == 2
    sample(place, "mine", 256)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stages", "init"),
    [("few", STAGES[:3], ""), ("tuned", ("prior", "decoder"), "init=models/mine")],
)
def test_5_images_are_enough_for_a_bundle_and_to_fine_tune_one(place, name, stages, init):
    write_images(place / name, 5)
    prepare(place, name, f"data/{name}")
    train(place, stages, f"data.root=data/{name} bundle={name} {init}")
    sample(place, name, 64)
    clips = [place / "models" / bundle / "clip.safetensors" for bundle in ("mine", name)]
    assert (clips[0].read_bytes() == clips[1].read_bytes()) == bool(init)
