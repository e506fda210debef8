import json
from collections import Counter

import pytest
import tiny_evaluation
import torch
from PIL import Image
from tiny_shards import write_shards

from unclip.evaluation.protocol import Item
from unclip.evaluation.sources import crop_and_resize, load_images, open_source
from unclip.files import write_text
from unclip.images import to_tensor

ITEMS = [Item(f"{k:03d}", (f"first of {k}", f"second of {k}", f"third of {k}")) for k in range(40)]


COCO = dict(format="coco", split="val2014", reference="val2014", captions="one_per_image")


def protocol(**changes):
    return tiny_evaluation.protocol(**COCO | {"name": "test", "resolution": 32} | changes)


def test_every_setting_is_hashed():
    changes = {"name": "other", "format": "shards", "split": "train", "captions": "any"}
    changes |= {"count": 21, "resolution": 64, "crop": "none", "filter": "bicubic"}
    changes |= {"reference": "train", "reference_count": 5, "network": "effnet_lite0"}
    changes |= {"repeats": 4, "seed": 1}
    keys = {protocol(**{name: value}).key("data", 20) for name, value in changes.items()}
    keys |= {protocol().key(*about) for about in (("data", 20), ("other data", 20), ("data", 19))}
    assert len(keys) == len(changes) + 3
    assert protocol().key("data", 20).startswith("test-32-n20-")


@pytest.mark.parametrize("captions", ["one_per_image", "any", "first"])
def test_a_smaller_count_is_a_prefix(captions):
    many = protocol(captions=captions, count=30).draw(ITEMS)
    assert protocol(captions=captions, count=7).draw(ITEMS) == many[:7]
    assert len({prompt.id for prompt in many}) == 30
    for prompt in many:
        assert prompt.text in ITEMS[prompt.item].captions


def test_prompts_are_drawn_of_all_images_of_all_captions_or_of_none():
    drawn = protocol(count=1000).draw(ITEMS)
    assert len(drawn) == 40 == len({prompt.item for prompt in drawn})
    assert {prompt.text.split()[0] for prompt in drawn} == {"first", "second", "third"}
    assert [prompt.item for prompt in drawn] != sorted(prompt.item for prompt in drawn)
    assert protocol(count=1000, seed=1).draw(ITEMS) != drawn
    drawn = protocol(captions="any", count=1000).draw(ITEMS)
    assert len(drawn) == 120 and max(Counter(p.item for p in drawn[:60]).values()) > 1
    drawn = protocol(captions="first", count=3).draw(ITEMS)
    assert [prompt.text for prompt in drawn] == ["first of 0", "first of 1", "first of 2"]


@pytest.mark.parametrize(
    "change",
    [
        *({"captions": "all"}, {"count": 0}, {"crop": "left"}),
        *({"name": name} for name in ("", "a/b", 'x"><b>', "two words", "../x")),
    ],
)
def test_an_impossible_setting_is_refused(change):
    with pytest.raises(ValueError, match=rf"protocol\.{next(iter(change))}"):
        protocol(**change)


def coco(folder):
    (folder / "val2014").mkdir(parents=True)
    names = {k: f"COCO_val2014_{k:012d}.png" for k in (7, 2, 5)}
    for k, name in names.items():
        Image.new("RGB", (48, 32), (k, 10 * k, 0)).save(folder / "val2014" / name)
    texts = [{"id": 9 - k, "image_id": k, "caption": f"  image\n {k} "} for k in (7, 5)]
    texts.append({"id": 0, "image_id": 7, "caption": "seven first"})
    images = [{"id": k, "file_name": name} for k, name in names.items()]
    path = folder / "annotations" / "captions_val2014.json"
    write_text(path, json.dumps({"images": images, "annotations": texts}))
    return folder


def test_a_coco_folder_is_read_in_the_order_of_ids(tmp_path):
    source = open_source(coco(tmp_path), "val2014", protocol())
    assert source.items == [  # image 2 has no caption
        Item("000000000005", ("image 5",)),
        Item("000000000007", ("seven first", "image 7")),
    ]
    images = load_images(source, [0, 1], protocol())
    assert images.shape == (2, 3, 32, 32) and images.dtype == torch.uint8
    assert images[1, :, 0, 0].tolist() == [7, 70, 0]


def test_the_fingerprint_ignores_the_folder_and_notices_changes(tmp_path):
    first, second = (open_source(coco(tmp_path / n), "val2014", protocol()) for n in "ab")
    assert first.fingerprint == second.fingerprint and first.stamp != second.stamp
    Image.new("RGB", (200, 200)).save(tmp_path / "a" / "val2014" / "COCO_val2014_000000000005.png")
    third = open_source(tmp_path / "a", "val2014", protocol())
    assert third.fingerprint != first.fingerprint


def test_missing_coco_is_an_error_with_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match="make data-coco"):
        open_source(tmp_path, "val2014", protocol())
    folder = coco(tmp_path / "x")
    next((folder / "val2014").glob("*5.png")).unlink()
    with pytest.raises(FileNotFoundError, match="make data-coco"):
        open_source(folder, "val2014", protocol())


def test_annotations_cannot_name_files_elsewhere(tmp_path):
    path = coco(tmp_path) / "annotations" / "captions_val2014.json"
    text = path.read_text().replace("COCO_val2014_000000000005.png", "../../secret.png")
    for content, message in ((text, "outside"), ("{}", "caption file")):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            open_source(tmp_path, "val2014", protocol())


def test_the_crop_is_the_middle_square_and_squashing_is_another_protocol():
    image = Image.new("RGB", (96, 32), (0, 0, 255))
    image.paste((255, 0, 0), (32, 0, 64, 32))
    assert crop_and_resize(image, protocol())[0].min() == 255  # the middle alone
    assert crop_and_resize(image, protocol(crop="none"))[0].min() == 0


@pytest.mark.parametrize("factor", [1, 2, 3])
@pytest.mark.parametrize("name", ["lanczos", "bicubic"])
def test_the_resize_is_pillows_antialiased_one(name, factor):
    noise = Image.effect_noise((32 * factor, 32 * factor), 80).convert("RGB")
    expected = noise.resize((32, 32), Image.Resampling[name.upper()])
    assert torch.equal(crop_and_resize(noise, protocol(filter=name)), to_tensor(expected))


def test_items_of_shards_have_the_metadata_of_their_scene(tmp_path):
    root = write_shards(tmp_path, splits=("val",), images=6)
    items = open_source(root, "val", tiny_evaluation.PROTOCOL).items
    assert items[1].about["captions"] == list(items[1].captions)
