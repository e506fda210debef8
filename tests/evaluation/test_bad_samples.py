"""Bad samples in evaluated data are left out and counted; too many are an error that names one."""

from dataclasses import replace

import pytest
import tiny_evaluation
from PIL import Image
from tiny_shards import encode_png

from unclip.data.prepare.resumable import write_samples
from unclip.evaluation import sources
from unclip.evaluation.measurement import run
from unclip.evaluation.report import collect
from unclip.evaluation.sources import open_source, read_real

PROTOCOL = replace(tiny_evaluation.PROTOCOL, split="val", count=60)


def png(k):
    return encode_png(Image.new("RGB", (64, 64), (k, 9, 9)))


def sample(key, color, caption):
    return {"__key__": key, "png": png(color), "json": {"caption": caption}}


BAD = {
    "empty_caption": ({"json": {"caption": ""}}, "empty captions"),
    "corrupt_image": ({"png": png(0)[:60]}, "corrupt image"),
    "no_image": ({"png": b""}, "not an image"),
}


def write(folder, odd):
    """Write a shard of 100 samples with some odd ones at the positions 3, 4, …."""
    every = [sample(f"{k:04d}", k, f"caption {k}") for k in range(100)]
    for k, change in enumerate(odd, start=3):
        every[k] = every[k] | change
    write_samples(folder / "val" / "64" / "00000.tar", every)
    return folder


@pytest.mark.parametrize("name", BAD)
def test_one_bad_sample_is_left_out_as_if_it_were_not_there(name, tmp_path, caplog):
    change, kind = BAD[name]
    source = open_source(write(tmp_path, [change]), "val", PROTOCOL)
    assert [item.id for item in source.items] == [f"{k:04d}" for k in range(100) if k != 3]
    assert source.bad == {kind: 1}
    assert f"{kind} in sample '0003' of" in caplog.text and "00000.tar" in caplog.text
    colors = [image.getpixel((0, 0))[0] for image in source.images([0, 3, 98])]
    assert colors == [0, 4, 99]
    real = read_real(tmp_path, "val", 64, count=5)
    assert real.captions == ["caption 0", "caption 1", "caption 2", "caption 4"]
    assert real.images[3, 0, 0, 0] == 4


def test_too_many_bad_samples_name_a_sample_and_its_shard(tmp_path):
    root = write(tmp_path, [change for change, _ in BAD.values()])
    with pytest.raises(ValueError, match=r"3 of 50 samples are bad .*'0005' of .*00000\.tar"):
        open_source(root, "val", PROTOCOL)
    assert len(open_source(root, "val", PROTOCOL, max_bad_fraction=0.1).items) == 97


def test_images_are_checked_once_until_the_data_changes(tmp_path, monkeypatch):
    cache, decoded, image = tmp_path / "cache", [], sources._image
    monkeypatch.setattr(sources, "_image", lambda raw: decoded.append(raw.key) or image(raw))
    root = write(tmp_path, [{"png": b""}])
    first, again = (open_source(root, "val", PROTOCOL, cache=cache) for _ in range(2))
    assert len(decoded) == 100 and again.bad == first.bad and again.items == first.items
    write(tmp_path, [])
    assert open_source(root, "val", PROTOCOL, cache=cache).bad == {}


def test_the_results_have_the_number_of_bad_samples(tiny_model, tmp_path):
    root = write(tmp_path / "data", [BAD["corrupt_image"][0]])
    context = tiny_evaluation.context_of(tiny_model, root, tmp_path, protocol=PROTOCOL)
    measurements = {"frechet": tiny_evaluation.METRICS["frechet"]}
    found = run(measurements, context)
    report = collect(found, measurements, context, model=None, seconds=1.0)
    assert report.results["bad_samples"] == {"val": {"corrupt image": 1}}
    assert report.results["n_reference"] == 99


def test_equal_keys_in_two_shards_are_two_images(tmp_path):
    for shard in range(2):
        samples = [sample(f"{k}", 20 * shard + k, f"{shard} {k}") for k in range(3)]
        write_samples(tmp_path / "val" / "64" / f"{shard:05d}.tar", samples)
    source = open_source(tmp_path, "val", PROTOCOL)
    assert [item.id for item in source.items] == ["0", "1", "2", "00001-0", "00001-1", "00001-2"]
    assert [image.getpixel((0, 0))[0] for image in source.images([1, 4])] == [1, 21]
