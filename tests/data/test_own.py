"""Own pictures into shards: folders and COCO, what is dropped and why, and going on."""

import csv
import io
import json
import sys
import tarfile

import pytest
from PIL import Image

import prepare
from unclip.data.loader import ShardLoader
from unclip.data.own import Settings, build, read_coco, read_folder
from unclip.data.own.entries import Entry
from unclip.data.reader import SampleReader


def save(path, color, size=(40, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGB", size, color)
    picture.putpixel((0, 0), (1, 2, 3))
    picture.save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    """Twelve good pictures in every way that captions are kept, and one of each bad kind."""
    root = tmp_path / "mine"
    for number in range(6):
        save(root / f"pic.{number}.png", (40 * number, 0, 9)).with_suffix(".txt").write_text(
            f"picture {number}\nnumber {number} in other words\n"
        )
    for number in range(2):
        path = save(root / "json" / f"{number}.jpg", (0, 90 * number, 90), (200, 100))
        path.with_suffix(".json").write_text(json.dumps({"caption": f"a json {number}"}))
    for number in range(4):
        save(root / "table" / "deep" / f"{number}.webp", (9, 9, 60 * number), (64, 64))
    rows = [f"deep/{number}.webp,from a table {number}" for number in range(4)]
    table = ["file_name,text", *rows, "deep/none.webp,x", "../../../etc/x.png,x"]
    (root / "table" / "metadata.csv").write_text("\n".join(table))
    bad = root / "bad"
    save(bad / "alone.png", (200, 1, 1))
    save(bad / "small.png", (200, 2, 1), (12, 90)).with_suffix(".txt").write_text("small")
    save(bad / "twice.png", (40, 0, 9)).with_suffix(".txt").write_text("again")
    save(bad / "blank.png", (200, 3, 1)).with_suffix(".txt").write_text(" \n ")
    save(bad / "latin.png", (200, 4, 1)).with_suffix(".txt").write_bytes(b"caf\xe9")
    save(bad / "cut.png", (200, 5, 1)).with_suffix(".txt").write_text("cut off")
    (bad / "cut.png").write_bytes((bad / "cut.png").read_bytes()[:60])
    (bad / "film.gif").write_bytes(b"GIF89a")
    (root / ".hidden").mkdir()
    save(root / ".hidden" / "x.png", (9, 9, 9))
    return root


REASONS = {
    "bad/alone.png": "missing caption",
    "bad/small.png": "picture too small",
    "pic.1.png": "duplicate",  # bad/twice.png comes first
    "bad/blank.png": "empty captions",
    "bad/latin.png": "bad text",
    "bad/cut.png": "corrupt picture",
    "bad/film.gif": "other format",
    "table/metadata.csv: deep/none.webp": "no such picture",
    "table/metadata.csv: ../../../etc/x.png": "no such picture",
}


def members(shard):
    with tarfile.open(shard) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def everything(root):
    return {p.relative_to(root): p.read_bytes() for p in sorted(root.rglob("*.tar"))}


def test_a_folder_becomes_shards_that_the_loader_reads(folder, tmp_path, capsys):
    out = tmp_path / "data"
    words = ["folder", str(folder), str(out), "--sizes", "16", "64", "--val", "2", "--workers", "0"]
    assert prepare.main(words) == 0
    said = capsys.readouterr().out
    assert "val: 2 at 16 px" in said and "1 × duplicate" in said
    with open(out / "dropped.csv") as file:
        rows = {row["source"]: row["reason"] for row in csv.DictReader(file)}
    assert rows == REASONS
    report = json.loads((out / "report.json").read_text())
    assert report["kept"]["train"]["16"] == 10 and sum(report["dropped"].values()) == len(REASONS)
    large = sum(sizes.get("64", 0) for sizes in report["kept"].values())
    assert large == 6  # two of 200 × 100 and four of 64 × 64

    loader = ShardLoader(out / "train" / "16", SampleReader(image_size=16), batch_size=10)
    (batch,) = loader
    assert len(set(batch["key"])) == 10 and all(batch["valid"])
    content = members(out / "train" / "16" / "00000.tar")
    assert all(name.count(".") == 1 and "/" not in name for name in content)
    about = [json.loads(text) for name, text in content.items() if name.endswith("json")]
    captions = {one["source"]: one["captions"] for one in about}
    captions |= {
        one["source"]: one["captions"]
        for name, text in members(out / "val" / "16" / "00000.tar").items()
        if name.endswith("json") and (one := json.loads(text))
    }
    assert captions["pic.3.png"] == ["picture 3", "number 3 in other words"]
    assert captions["json/1.jpg"] == ["a json 1"]
    assert captions["table/deep/2.webp"] == ["from a table 2"]


def test_lossless_stays_lossless_and_the_middle_is_taken(tmp_path):
    picture = Image.new("RGB", (96, 32), (0, 0, 255))
    picture.paste((10, 200, 30), (32, 0, 64, 32))
    (tmp_path / "in").mkdir()
    picture.save(tmp_path / "in" / "a.png")
    picture.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "in" / "b.png")
    for name in "ab":
        (tmp_path / "in" / f"{name}.txt").write_text("green")
    build(read_folder(tmp_path / "in"), tmp_path / "out", Settings(sizes=(32,), val=0), workers=0)
    content = members(tmp_path / "out" / "train" / "32" / "00000.tar")
    pictures = [text for name, text in content.items() if name.endswith("png")]
    assert len(pictures) == 2
    for one in pictures:
        opened = Image.open(io.BytesIO(one))
        assert opened.size == (32, 32) and opened.getcolors() == [(1024, (10, 200, 30))]


def test_a_cut_off_build_goes_on_and_gives_the_same_bytes(folder, tmp_path, monkeypatch):
    settings = Settings(sizes=(16, 32), val=2, shard_size=3)
    build(read_folder(folder), tmp_path / "whole", settings, workers=0, progress=False)

    module = sys.modules["unclip.data.own.build"]  # the package has a function of that name
    real, calls = module.write_shard, []

    def dies(path, *arguments):
        calls.append(path)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(path, *arguments)

    monkeypatch.setattr(module, "write_shard", dies)
    with pytest.raises(KeyboardInterrupt):
        build(read_folder(folder), tmp_path / "cut", settings, workers=0, progress=False)
    assert not (tmp_path / "cut" / "dataset.json").exists()
    monkeypatch.setattr(module, "write_shard", real)
    memory = tmp_path / "cut" / "examined.jsonl"
    lines = memory.read_text().splitlines(keepends=True)
    memory.write_text("".join(lines[:-1]) + lines[-1][:20])  # killed in the middle of a line
    build(read_folder(folder), tmp_path / "cut", settings, workers=0, progress=False)
    assert everything(tmp_path / "cut") == everything(tmp_path / "whole")
    assert not (tmp_path / "cut" / "building.json").exists()


def test_other_pictures_need_overwrite_and_other_folders_are_safe(folder, tmp_path):
    out, settings = tmp_path / "out", Settings(sizes=(16,), val=2)
    build(read_folder(folder), out, settings, workers=0, progress=False)
    before = everything(out)
    save(folder / "new.png", (77, 77, 1)).with_suffix(".txt").write_text("new")
    with pytest.raises(ValueError, match=r"digest differ.*--overwrite"):
        build(read_folder(folder), out, settings, workers=0, progress=False)
    assert everything(out) == before
    build(read_folder(folder), out, settings, workers=0, progress=False, overwrite=True)
    assert everything(out) != before
    with pytest.raises(ValueError, match="something else"):
        build(read_folder(folder), folder, settings, workers=0, progress=False)
    with pytest.raises(ValueError, match="leave none to train on"):
        more = Settings(sizes=(16,), val=99)
        build(read_folder(folder), tmp_path / "none", more, workers=0, progress=False)


def test_split_folders_are_kept(tmp_path):
    for split, count in (("train", 3), ("validation", 2)):
        for number in range(count):
            path = save(tmp_path / "in" / split / f"{number}.png", (number, count, 60))
            path.with_suffix(".txt").write_text("x")
    found = read_folder(tmp_path / "in")
    assert [entry.split for entry in found.entries] == ["train"] * 3 + ["val"] * 2


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_tables_of_other_kinds(kind, tmp_path):
    save(tmp_path / "a.png", (1, 2, 3))
    save(tmp_path / "b.png", (1, 2, 4))
    rows = [
        {"file_name": "a.png", "said": ["one", "two"]},
        {"file_name": "b.png", "said": ["three", None, " "]},
    ]
    if kind == "jsonl":
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "metadata.parquet")
    found = read_folder(tmp_path, "said")
    assert [entry.captions for entry in found.entries] == [("one", "two"), ("three",)]
    with pytest.raises(ValueError, match="no column captions or caption or text among file_name"):
        read_folder(tmp_path)


def test_coco(tmp_path):
    (tmp_path / "annotations").mkdir()
    for split in ("train2017", "val2017"):
        for number in range(2):
            save(tmp_path / split / f"{number:012d}.jpg", (90 * number, len(split), 7))
        images = [{"id": n, "file_name": f"{n:012d}.jpg"} for n in range(3)]
        texts = [{"image_id": n % 2, "caption": f"{split} {n} "} for n in range(4)]
        texts.append({"image_id": 2, "caption": "gone"})
        table = tmp_path / "annotations" / f"captions_{split}.json"
        table.write_text(json.dumps({"images": images, "annotations": texts}))
    found = read_coco(tmp_path)
    assert [entry.split for entry in found.entries] == ["train", "train", "val", "val"]
    assert found.entries[1].captions == ("train2017 1", "train2017 3")
    assert [one.reason for one in found.dropped] == ["no such picture"] * 2
    assert prepare.main(["coco", str(tmp_path / "nowhere"), str(tmp_path / "o")]) == 2


def test_keys_are_safe_and_unique(tmp_path):
    sources = ["a/b.c.png", "a_b.c.png", "日本.png", "x" * 300 + ".png", "a-b.jpg", "a-b.png"]
    keys = [Entry(source, tmp_path, ("x",)).key for source in sources]
    assert len(set(keys)) == len(sources)
    assert all(key.replace("_", "").isalnum() and key.isascii() and len(key) < 60 for key in keys)
