"""The data set on disk: bytes, resuming, settings, shards, COCO export, license."""

import hashlib
import io
import json
import shutil

import pytest
from PIL import Image
from tiny_shards import read_shard

import prepare
from unclip.emoji.emoji_build import build_emoji
from unclip.evaluation.protocol import Protocol
from unclip.evaluation.sources import load_images, open_source

TEST_SPLITS = ("test_seen", "test_held_out")
FEW = {64: 8, 256: 4}
COUNTS = {"train": {64: 48, 256: 16}, "val": FEW} | dict.fromkeys(TEST_SPLITS, FEW)


def _build(root, **changes):
    return build_emoji(root, **{"counts": COUNTS, "workers": 0} | changes)


def _hashes(root, pattern="*"):
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob(pattern))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return _build(tmp_path_factory.mktemp("emoji") / "scenes")


def _samples(root, split, size):
    """The samples of all shards in their order."""
    shards = sorted((root / split / str(size)).glob("*.tar"))
    return [sample for shard in shards for sample in read_shard(shard)]


def _size(sample):
    return Image.open(io.BytesIO(sample["png"])).size


def test_bytes_do_not_depend_on_the_number_of_processes(root, tmp_path):
    again = _build(tmp_path / "again", workers=2)
    assert _hashes(again) == _hashes(root)


def test_an_interrupted_build_is_resumed(root, tmp_path):
    partial = shutil.copytree(root, tmp_path / "partial")
    shards = partial / "train" / "64"
    settings = json.loads((partial / "dataset.json").read_text())["settings"]
    (partial / "building.json").write_text(json.dumps(settings))
    for missing in (partial / "dataset.json", shards / "00003.tar"):
        missing.unlink()
    (shards / ".00003.tar.1.tmp").write_bytes(b"half a sh")
    before = (shards / "00004.tar").stat().st_mtime_ns
    _build(partial)
    assert (shards / "00004.tar").stat().st_mtime_ns == before
    assert _hashes(partial) == _hashes(root)


def test_a_complete_data_set_is_not_changed(root):
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    _build(root)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_other_settings_need_overwrite(root, tmp_path):
    copy = shutil.copytree(root, tmp_path / "copy")
    with pytest.raises(ValueError, match=r"seed: 0 there, 1 here.*--overwrite"):
        _build(copy, seed=1)
    assert _hashes(copy) == _hashes(root)
    _build(copy, seed=1, overwrite=True)
    old, new = (_hashes(folder, "*.tar") for folder in (root, copy))
    assert old.keys() == new.keys() and not set(old.values()) & set(new.values())


@pytest.mark.parametrize(
    ("train", "problem"), [({64: 4}, "set at least 16"), ({64: 32, 256: 64}, "at most 32")]
)
def test_impossible_counts_are_errors(train, problem, tmp_path):
    with pytest.raises(ValueError, match=problem):
        _build(tmp_path / "data", counts=COUNTS | {"train": train})


def test_dataset_json_lists_the_shards_with_their_hashes(root):
    record = json.loads((root / "dataset.json").read_text())
    assert record["sha256"] == _hashes(root, "*.tar")
    assert len(list((root / "train" / "64").iterdir())) == 16
    assert len(list((root / "val" / "256").iterdir())) == 4
    assert not (root / "building.json").exists()


def test_samples_have_images_captions_and_boxes(root):
    samples = _samples(root, "train", 64)
    names = {"captions", "objects", "background", "kind", "relation", "held_out", "index"}
    for sample in samples:
        description = sample["json"]
        assert _size(sample) == (64, 64) and set(description) == names
        assert len(description["captions"]) == 5
        assert description["index"] == int(sample["__key__"].partition("-")[0])
        for thing in description["objects"]:
            x, y, width, height = thing["box"]
            assert min(x, y) >= 0 and max(x + width, y + height) <= 1
    assert {sample["json"]["index"] for sample in samples} == set(range(48))
    keys = [sample["__key__"] for sample in samples]
    assert keys == sorted(set(keys))
    twins = [at for at, key in enumerate(keys) if "-" in key]
    assert {keys[at].partition("-")[2] for at in twins} == {"swap", "other", "colours"}
    assert all(keys[at - 1].partition("-")[0] == keys[at].partition("-")[0] for at in twins)


def test_larger_images_show_the_first_of_the_same_scenes(root):
    small, large = (_samples(root, "train", size) for size in (64, 256))
    first = [sample for sample in small if sample["json"]["index"] < 16]
    assert [sample["json"] for sample in large] == [sample["json"] for sample in first]
    assert {_size(sample) for sample in large} == {(256, 256)}


def test_pycocotools_reads_the_export(root):
    coco = pytest.importorskip("pycocotools.coco")
    captions = coco.COCO(root / "coco" / "annotations" / "captions_val2014.json")
    instances = coco.COCO(root / "coco" / "annotations" / "instances_val2014.json")
    assert captions.getImgIds() == instances.getImgIds()
    described = {
        (split, sample["__key__"]): sample["json"]
        for split in TEST_SPLITS
        for sample in _samples(root, split, 64)
    }
    assert {(image["split"], image["key"]) for image in captions.imgs.values()} == set(described)
    for image in instances.imgs.values():
        with Image.open(root / "coco" / "val2014" / image["file_name"]) as opened:
            assert opened.size == (image["width"], image["height"]) == (256, 256)
        expected = described[image["split"], image["key"]]
        found = captions.loadAnns(captions.getAnnIds(image["id"]))
        assert [annotation["caption"] for annotation in found] == expected["captions"]
        things = instances.loadAnns(instances.getAnnIds(image["id"]))
        assert image["held_out"] == expected["held_out"]
        for thing, listed in zip(things, expected["objects"], strict=True):
            assert instances.cats[thing["category_id"]]["name"] == listed["name"]
            assert thing["attributes"]["colour"] == listed["colour"]
            box = [256 * value for value in listed["box"]]
            assert thing["bbox"] == pytest.approx(box, abs=0.01)
            assert 0 < thing["area"] <= thing["bbox"][2] * thing["bbox"][3]
            assert thing["iscrowd"] == 0
    assert instances.dataset["licenses"][0]["name"] == "CC BY-SA 4.0"


def test_the_evaluation_reads_the_export(root):
    about = {"name": "export", "format": "coco", "split": "val2014", "captions": "one_per_image"}
    about |= {"reference": "val2014", "network": "inception"}
    protocol = Protocol(**about, count=5, resolution=64)
    source = open_source(root / "coco", "val2014", protocol)
    text = (root / "coco" / "annotations" / "captions_val2014.json").read_text()
    captions = {}
    for row in json.loads(text)["annotations"]:
        captions.setdefault(row["image_id"], []).append(row["caption"])
    assert {int(item.id): list(item.captions) for item in source.items} == captions
    assert load_images(source, [0, 2], protocol).float().std() > 10


def test_license_and_contact_sheet_are_next_to_the_data(root):
    assert "CC BY-SA 4.0" in (root / "LICENSE.txt").read_text()
    assert "OpenMoji" in (root / "ATTRIBUTION.txt").read_text()
    with Image.open(root / "contact_sheet.png") as sheet:
        assert sheet.width > 1000


def test_the_script_reports_errors_with_their_fix(root, capsys):
    assert prepare.main(["emoji", "--quick", "--out", str(root), "--seed", "5"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert prepare.main(["emoji", "--train", "8", "--out", str(root / "other")]) == 2
    assert "at least 16" in capsys.readouterr().err
