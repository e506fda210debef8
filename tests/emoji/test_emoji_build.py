"""The data set on disk: bytes, resuming, settings, shards, COCO export, license."""

import hashlib
import io
import json
import shutil
import tarfile

import pytest
from PIL import Image

import prepare
from unclip.emoji.emoji_build import build_emoji, default_counts
from unclip.evaluation.protocol import Protocol
from unclip.evaluation.sources import load_images, open_source

COUNTS = {
    "train": {64: 48, 256: 16},
    "val": {64: 8, 256: 4},
    "test_seen": {64: 8, 256: 4},
    "test_held_out": {64: 8, 256: 4},
}


def _build(root, **changes):
    return build_emoji(root, **{"counts": COUNTS, "workers": 0, "progress": False} | changes)


def _bytes(root):
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return _build(tmp_path_factory.mktemp("emoji") / "scenes")


def _samples(path):
    with tarfile.open(path) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar.getmembers()}
    keys = list(dict.fromkeys(name.partition(".")[0] for name in members))
    return {key: (members[f"{key}.png"], json.loads(members[f"{key}.json"])) for key in keys}


def test_bytes_do_not_depend_on_the_number_of_processes(root, tmp_path):
    again = _build(tmp_path / "again", workers=2)
    assert _bytes(again) == _bytes(root)


def test_an_interrupted_build_is_resumed(root, tmp_path):
    partial = tmp_path / "partial"
    shutil.copytree(root, partial)
    missing = partial / "train" / "64" / "00003.tar"
    kept = partial / "train" / "64" / "00004.tar"
    missing.unlink()
    (partial / "dataset.json").rename(partial / "building.json")
    settings = json.loads((partial / "building.json").read_text())["settings"]
    (partial / "building.json").write_text(json.dumps(settings))
    (partial / "train" / "64" / ".00003.tar.1.tmp").write_bytes(b"half a sh")
    before = kept.stat().st_mtime_ns
    _build(partial)
    assert kept.stat().st_mtime_ns == before
    assert _bytes(partial) == _bytes(root)


def test_a_complete_data_set_is_not_changed(root):
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    _build(root)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_other_settings_need_overwrite(root, tmp_path):
    copy = shutil.copytree(root, tmp_path / "copy")
    with pytest.raises(ValueError, match=r"seed: 0 there, 1 here.*--overwrite"):
        _build(copy, seed=1)
    assert _bytes(copy) == _bytes(root)
    _build(copy, seed=1, overwrite=True)
    shards = [name for name in _bytes(root) if name.endswith(".tar")]
    assert all(_bytes(copy)[name] != _bytes(root)[name] for name in shards)


def test_a_foreign_folder_is_never_touched(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds something other"):
        _build(tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_impossible_counts_are_errors(tmp_path):
    few = COUNTS | {"train": {64: 4}}
    with pytest.raises(ValueError, match="set at least 16"):
        _build(tmp_path / "few", counts=few)
    many = COUNTS | {"train": {64: 32, 256: 64}}
    with pytest.raises(ValueError, match="at most 32"):
        _build(tmp_path / "many", counts=many)
    with pytest.raises(ValueError, match="choose one of S, M, L"):
        default_counts("XS")


def test_dataset_json_lists_the_shards_with_their_hashes(root):
    record = json.loads((root / "dataset.json").read_text())
    shards = sorted(path.relative_to(root).as_posix() for path in root.glob("*/*/*.tar"))
    assert sorted(record["sha256"]) == shards
    assert len(list((root / "train" / "64").iterdir())) == 16
    assert len(list((root / "val" / "256").iterdir())) == 4
    for shard in shards:
        assert record["sha256"][shard] == hashlib.sha256((root / shard).read_bytes()).hexdigest()
    assert not (root / "building.json").exists()


def test_samples_have_images_captions_and_boxes(root):
    keys, indices = [], set()
    for path in sorted((root / "train" / "64").glob("*.tar")):
        samples = _samples(path)
        keys += samples
        for key, (png, description) in samples.items():
            assert Image.open(io.BytesIO(png)).size == (64, 64)
            assert set(description) == {
                *("captions", "objects", "background", "kind"),
                *("relation", "held_out", "index"),
            }
            assert len(description["captions"]) == 5
            assert description["index"] == int(key.partition("-")[0])
            indices.add(description["index"])
            for thing in description["objects"]:
                x, y, width, height = thing["box"]
                assert min(x, y) >= 0 and max(x + width, y + height) <= 1
    assert indices == set(range(48))
    assert keys == sorted(keys) and len(keys) == len(set(keys))
    twins = [at for at, key in enumerate(keys) if "-" in key]
    assert {keys[at].partition("-")[2] for at in twins} == {"swap", "other", "colours"}
    assert all(keys[at - 1].partition("-")[0] == keys[at].partition("-")[0] for at in twins)


def test_larger_images_show_the_first_of_the_same_scenes(root):
    small, large = ({}, {})
    for size, samples in ((64, small), (256, large)):
        for path in sorted((root / "train" / str(size)).glob("*.tar")):
            samples.update(_samples(path))
    assert sorted(large) == [key for key in sorted(small) if int(key[:8]) < 16]
    assert all(small[key][1] == large[key][1] for key in large)
    assert all(Image.open(io.BytesIO(png)).size == (256, 256) for png, _ in large.values())


def test_pycocotools_reads_the_export(root):
    coco = pytest.importorskip("pycocotools.coco")
    captions = coco.COCO(root / "coco" / "annotations" / "captions_val2014.json")
    instances = coco.COCO(root / "coco" / "annotations" / "instances_val2014.json")
    assert captions.getImgIds() == instances.getImgIds()
    assert {image["split"] for image in captions.imgs.values()} == {"test_seen", "test_held_out"}
    described = {
        (split, key): description
        for split in ("test_seen", "test_held_out")
        for path in (root / split / "64").glob("*.tar")
        for key, (_, description) in _samples(path).items()
    }
    assert len(described) == len(captions.imgs)
    for image in instances.imgs.values():
        with Image.open(root / "coco" / "val2014" / image["file_name"]) as opened:
            size = opened.size
        assert size == (image["width"], image["height"]) == (256, 256)
        expected = described[image["split"], image["key"]]
        found = captions.loadAnns(captions.getAnnIds(image["id"]))
        assert [annotation["caption"] for annotation in found] == expected["captions"]
        things = instances.loadAnns(instances.getAnnIds(image["id"]))
        assert image["held_out"] == expected["held_out"]
        for thing, listed in zip(things, expected["objects"], strict=True):
            assert instances.cats[thing["category_id"]]["name"] == listed["name"]
            assert thing["attributes"]["colour"] == listed["colour"]
            assert thing["bbox"] == pytest.approx(
                [256 * value for value in listed["box"]], abs=0.01
            )
            assert 0 < thing["area"] <= thing["bbox"][2] * thing["bbox"][3]
            assert thing["iscrowd"] == 0
    assert instances.dataset["licenses"][0]["name"] == "CC BY-SA 4.0"


def test_the_evaluation_reads_the_export(root):
    protocol = Protocol(
        name="export",
        format="coco",
        split="val2014",
        captions="one_per_image",
        count=5,
        resolution=64,
        reference="val2014",
        network="inception",
    )
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
