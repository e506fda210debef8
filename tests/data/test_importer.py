"""Importing images: folders and COCO, rejected images with reasons, and resuming."""

import csv
import io
import json
import os
import signal
import tarfile
from pathlib import Path

import pytest
from PIL import Image

import prepare
from unclip.data.loader import ShardDataset
from unclip.data.prepare import importer
from unclip.data.prepare.importer import import_images
from unclip.data.prepare.listing import (
    CocoImage,
    Record,
    read_coco,
    read_coco_captions,
    read_folder,
)
from unclip.data.prepare.resumable import run_jobs
from unclip.data.reader import SampleReader


def save(path, color, size=(40, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size, color)
    image.putpixel((0, 0), (1, 2, 3))
    image.save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    """Twelve good images with captions in every supported form, and one bad image per reason."""
    root = tmp_path / "mine"
    for number in range(6):
        save(root / f"pic.{number}.png", (40 * number, 0, 9)).with_suffix(".txt").write_text(
            f"image {number}\nnumber {number} in other words\n"
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
    (bad / "film.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0")
    (bad / "film.txt").write_text("a film")
    (bad / "old.tga").write_bytes(bytes(50))
    (bad / "old.txt").write_text("a format that is not read")
    (bad / "README").write_text("BM is no image")
    (root / ".hidden").mkdir()
    save(root / ".hidden" / "x.png", (9, 9, 9))
    return root


REASONS = {
    "bad/alone.png": "missing caption",
    "bad/small.png": "image too small",
    "pic.1.png": "duplicate",  # bad/twice.png is first
    "bad/blank.png": "empty captions",
    "bad/latin.png": "bad text",
    "bad/cut.png": "corrupt image",
    "bad/film.heic": "other format",
    "bad/old.tga": "not an image",
    "table/metadata.csv: deep/none.webp": "no such file",
    "table/metadata.csv: ../../../etc/x.png": "no such file",
}


def run(source, out, **settings):
    quiet = {"workers": 0, "progress": False}
    return import_images(read_folder(source), out, **{"sizes": (16,), "val": 2} | quiet | settings)


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
    with open(out / "rejected.csv") as file:
        rows = {row["source"]: row["reason"] for row in csv.DictReader(file)}
    assert rows == REASONS
    report = json.loads((out / "report.json").read_text())
    assert report["accepted"]["train"]["16"] == 10
    assert sum(report["rejected"].values()) == len(REASONS)
    large = sum(sizes.get("64", 0) for sizes in report["accepted"].values())
    assert large == 6  # two of 200 × 100 and four of 64 × 64

    (batch,) = ShardDataset(out / "train" / "16", SampleReader(image_size=16), batch_size=10)
    assert len(set(batch["key"])) == 10 and all(batch["valid"])
    train, val = (members(out / split / "16" / "00000.tar") for split in ("train", "val"))
    assert all(name.count(".") == 1 and "/" not in name for name in train)
    samples = [json.loads(text) for name, text in (train | val).items() if name.endswith("json")]
    captions = {sample["source"]: sample["captions"] for sample in samples}
    assert captions["pic.3.png"] == ["image 3", "number 3 in other words"]
    assert captions["json/1.jpg"] == ["a json 1"]
    assert captions["table/deep/2.webp"] == ["from a table 2"]


def test_pngs_stay_lossless_and_the_central_square_is_taken(tmp_path):
    image = Image.new("RGB", (96, 32), (0, 0, 255))
    image.paste((10, 200, 30), (32, 0, 64, 32))
    (tmp_path / "in").mkdir()
    image.save(tmp_path / "in" / "a.png")
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "in" / "b.png")
    for name in "ab":
        (tmp_path / "in" / f"{name}.txt").write_text("green")
    run(tmp_path / "in", tmp_path / "out", sizes=(32,), val=0)
    content = members(tmp_path / "out" / "train" / "32" / "00000.tar")
    images = [text for name, text in content.items() if name.endswith("png")]
    assert len(images) == 2
    for one in images:
        opened = Image.open(io.BytesIO(one))
        assert opened.size == (32, 32) and opened.getcolors() == [(1024, (10, 200, 30))]


def test_an_interrupted_import_resumes_and_gives_the_same_bytes(folder, tmp_path, monkeypatch):
    settings = {"sizes": (16, 32), "shard_size": 3}
    run(folder, tmp_path / "whole", **settings)
    real, calls = importer._write_shard, []

    def interrupted(shard):
        calls.append(shard)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(shard)

    monkeypatch.setattr(importer, "_write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "cut", **settings)
    assert not (tmp_path / "cut" / "dataset.json").exists()
    monkeypatch.setattr(importer, "_write_shard", real)
    stored = tmp_path / "cut" / "inspected.jsonl"
    lines = stored.read_text().splitlines(keepends=True)
    stored.write_text("".join(lines[:-1]) + lines[-1][:20])  # killed while writing a line
    run(folder, tmp_path / "cut", **settings)
    assert everything(tmp_path / "cut") == everything(tmp_path / "whole")
    assert not (tmp_path / "cut" / "building.json").exists()


def test_other_images_need_overwrite_and_other_folders_are_safe(folder, tmp_path):
    out = tmp_path / "out"
    run(folder, out)
    before = everything(out)
    save(folder / "new.png", (77, 77, 1)).with_suffix(".txt").write_text("new")
    with pytest.raises(ValueError, match=r"train images: 10 there, 11 here.*--overwrite"):
        run(folder, out)
    assert everything(out) == before
    run(folder, out, overwrite=True)
    assert everything(out) != before
    with pytest.raises(ValueError, match="something other"):
        run(folder, folder)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"val": 99}, "leaves none to train on"),
        ({"val": -1}, "out of range"),
        ({"shard_size": 0}, "out of range"),
        ({"sizes": (64, 64)}, "distinct"),
        ({"sizes": (8,)}, "at least 16 pixels"),
    ],
)
def test_impossible_settings_are_errors(folder, tmp_path, settings, problem):
    with pytest.raises(ValueError, match=problem):
        run(folder, tmp_path / "out", **settings)


@pytest.mark.parametrize("seed", range(4))
def test_every_size_has_training_and_validation_images(seed, tmp_path):
    for number in range(60):
        size = (100, 100) if number < 12 else (40, 30)
        path = save(tmp_path / "in" / f"{number}.png", (number, 9, 9), size)
        path.with_suffix(".txt").write_text("x")
    for val, expected in ((3, (3, 1)), (1, (1, 1)), (20, (20, 4)), (0, (0, 0))):
        out = tmp_path / f"out{val}"
        run(tmp_path / "in", out, sizes=(16, 64), val=val, seed=seed)
        accepted = json.loads((out / "report.json").read_text())["accepted"]
        held_out = accepted.get("val", {})
        assert (held_out.get("16", 0), held_out.get("64", 0)) == expected
        assert accepted["train"] == {"16": 60 - expected[0], "64": 12 - expected[1]}


def test_five_images_are_enough_for_both_splits(tmp_path):
    for number in range(5):
        size = (80, 80) if number < 2 else (40, 30)
        path = save(tmp_path / "in" / f"{number}.png", (number, 9, 9), size)
        path.with_suffix(".txt").write_text("x")
    run(tmp_path / "in", tmp_path / "out", sizes=(16, 64), val=None)
    accepted = json.loads((tmp_path / "out" / "report.json").read_text())["accepted"]
    assert accepted == {"train": {"16": 4, "64": 1}, "val": {"16": 1, "64": 1}}


def test_data_without_val_gets_one(tmp_path):
    for split in ("train", "test"):
        for number in range(5):
            path = save(tmp_path / "in" / split / f"{number}.png", (number, len(split), 60))
            path.with_suffix(".txt").write_text("x")
    run(tmp_path / "in", tmp_path / "out", val=None)
    accepted = json.loads((tmp_path / "out" / "report.json").read_text())["accepted"]
    assert accepted == {"test": {"16": 5}, "train": {"16": 4}, "val": {"16": 1}}


def test_split_folders_become_splits(tmp_path):
    for split, count in (("train", 3), ("validation", 2)):
        for number in range(count):
            path = save(tmp_path / "in" / split / f"{number}.png", (number, count, 60))
            path.with_suffix(".txt").write_text("x")
    listing = read_folder(tmp_path / "in")
    assert [record.split for record in listing.records] == ["train"] * 3 + ["val"] * 2


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_tables_can_be_jsonl_or_parquet(kind, tmp_path):
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
    listing = read_folder(tmp_path, "said")
    assert [record.captions for record in listing.records] == [("one", "two"), ("three",)]
    with pytest.raises(ValueError, match="no column captions or caption or text among file_name"):
        read_folder(tmp_path)


def test_a_table_uses_the_first_column_with_a_caption(tmp_path):
    save(tmp_path / "a.png", (1, 2, 3))
    save(tmp_path / "b.png", (1, 2, 4))
    rows = [
        {"file_name": "a.png", "captions": None, "text": "a\u2028dog"},
        {"file_name": "b.png", "captions": ["", None], "caption": "a\ncat \ud83d"},
    ]
    content = "\ufeff" + "\n".join(json.dumps(row, ensure_ascii=row is rows[1]) for row in rows)
    (tmp_path / "metadata.jsonl").write_text(content)
    captions = [record.captions for record in read_folder(tmp_path).records]
    assert captions == [("a dog",), ("a cat \ufffd",)]
    (tmp_path / "a.txt").write_text("\n")  # a blank file next to a caption in the table
    assert read_folder(tmp_path).records[0].captions == ("a dog",)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("file_name,text\na.png,one", ("one",)),
        ("\ufefffile_name, text\r\na.png, one", ("one",)),
        ('file_name,text\na.png,"one, two\nthree"', ("one, two three",)),
        ("file_name,text\na.png,one\u2028two\x85", ("one two",)),
        ("file_name,captions,text\na.png,,one\na.png,two,", ("one", "two")),
        ('file_name,captions\na.png,"[""one"", null, ""two, three""]"', ("one", "two, three")),
        ("file_name,text\na.png,[1] is a number", ("[1] is a number",)),
        ("file_name,text\na.png,one, two", "row 1 has too many columns"),
        ("file_name;text\na.png;one", "row 1 has no file_name"),
        ("file_name,text\na.png,o\0ne", "byte 22 is a NUL"),
    ],
)
def test_a_csv_table_is_read_or_refused(content, expected, tmp_path):
    save(tmp_path / "a.png", (1, 2, 3))
    (tmp_path / "metadata.csv").write_bytes(content.encode())
    if isinstance(expected, tuple):
        (record,) = read_folder(tmp_path).records
        assert record.captions == expected
    else:
        with pytest.raises(ValueError, match=rf"metadata\.csv: {expected}"):
            read_folder(tmp_path)


def test_a_name_may_be_decomposed_on_the_disk_and_composed_in_the_table(tmp_path):
    save(tmp_path / "cafe\u0301.png", (1, 2, 3))
    (tmp_path / "metadata.csv").write_text("file_name,text\ncaf\u00e9.png,one\n")
    listing = read_folder(tmp_path)
    assert [record.captions for record in listing.records] == [("one",)]
    assert listing.rejected == []


def test_the_content_of_a_file_decides_its_format(tmp_path):
    kinds = {"a.jpg": "PNG", "b.png": "WEBP", "c.webp": "JPEG", "d.bmp": "BMP", "e.tif": "TIFF"}
    kinds |= {"f.gif": "GIF", "g.avif": "AVIF", "h.dat": "PNG", "no_extension": "JPEG"}
    for number, (name, kind) in enumerate(kinds.items()):
        image = Image.new("RGB", (40, 32), (20 * number, 9, 9))
        with open(tmp_path / name, "wb") as file:
            image.save(file, kind, icc_profile=bytes(range(256)) * 400)
        (tmp_path / name).with_suffix(".txt").write_text(kind)
    said = run(tmp_path, tmp_path.with_name("out"), val=0)
    assert "rejected" not in said
    content = members(tmp_path.with_name("out") / "train" / "16" / "00000.tar")
    stored = {
        json.loads(content[name])["source"]: next(
            other for other in content if other != name and other.startswith(name[:-4])
        )
        for name in content
        if name.endswith("json")
    }
    lossless = {source for source, name in stored.items() if name.endswith("png")}
    assert lossless == {"a.jpg", "d.bmp", "e.tif", "f.gif", "h.dat"}
    assert stored.keys() == kinds.keys()
    for name in stored.values():
        assert (
            len(content[name]) < 2000
            and "icc_profile" not in Image.open(io.BytesIO(content[name])).info
        )


@pytest.mark.timeout(60)
def test_unusual_files_are_read_or_listed(tmp_path):
    root, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    names = [b"caf\xe9.png", "猫.png".encode(), b"two\nlines.png", b"UPPER.PNG", b"a.b.c.png"]
    save(root / "x.png", (1, 1, 1)).unlink()
    for number, name in enumerate(names):
        path = Path(os.fsdecode(os.fsencode(root) + b"/" + name))
        save(path.with_suffix(".png"), (9 * number, 9, 9)).rename(path)
        path.with_suffix(".txt").write_text("a name")
    save(elsewhere / "deep" / "linked.png", (7, 7, 7)).with_suffix(".txt").write_text("a link")
    (root / "link").symlink_to(elsewhere)
    (elsewhere / "loop").symlink_to(root)
    (root / "loop").symlink_to(root / "loop")
    (root / "gone.png").symlink_to(root / "nowhere.png")
    os.mkfifo(root / "pipe.png")
    os.mkfifo(root / "pipe")
    for name in ("gone", "pipe"):
        (root / f"{name}.txt").write_text("never")
    (root / "alone\udce9.png").write_bytes(b"")
    os.mkfifo(root / "pipe\udce9.png")
    (root / "pipe\udce9.txt").write_text("never")
    run(root, tmp_path / "out", val=0)
    content = members(tmp_path / "out" / "train" / "16" / "00000.tar")
    assert all(name.isascii() for name in content)
    sources = {json.loads(text)["source"] for name, text in content.items() if "json" in name}
    expected = {name.decode("utf-8", "backslashreplace") for name in names}
    assert sources == expected | {"link/deep/linked.png"}
    with open(tmp_path / "out" / "rejected.csv", encoding="utf-8") as file:
        reasons = {row["source"]: row["reason"] for row in csv.DictReader(file)}
    assert reasons == {
        "gone.png": "unreadable file",
        "pipe.png": "unreadable file",
        "pipe\\xe9.png": "unreadable file",
        "alone\\xe9.png": "missing caption",
    }


def test_coco_is_imported_with_all_captions_and_its_splits(tmp_path):
    (tmp_path / "annotations").mkdir()
    for split in ("train2017", "val2017"):
        for number in range(2):
            save(tmp_path / split / f"{number:012d}.jpg", (90 * number, len(split), 7))
        images = [{"id": n, "file_name": f"{n:012d}.jpg"} for n in range(3)]
        texts = [{"id": n, "image_id": n % 2, "caption": f"{split} {n} "} for n in (2, 3, 0, 1)]
        texts.append({"id": 4, "image_id": 2, "caption": "gone"})
        table = tmp_path / "annotations" / f"captions_{split}.json"
        table.write_text(json.dumps({"images": images, "annotations": texts}))
    listing = read_coco(tmp_path)
    assert [record.split for record in listing.records] == ["train", "train", "val", "val"]
    assert listing.records[1].captions == ("train2017 1", "train2017 3")
    assert [one.reason for one in listing.rejected] == ["no such file"] * 2
    assert prepare.main(["coco", str(tmp_path / "nowhere"), str(tmp_path / "o")]) == 2


def test_keys_are_safe_and_unique(tmp_path):
    sources = ["a/b.c.png", "a_b.c.png", "日本.png", "x" * 300 + ".png", "a-b.jpg", "a-b.png"]
    keys = [Record(source, tmp_path, ("x",)).key for source in sources]
    assert len(set(keys)) == len(sources)
    assert all(key.replace("_", "").isalnum() and key.isascii() and len(key) < 60 for key in keys)


def test_coco_captions_are_in_the_order_of_their_ids(tmp_path):
    images = [{"id": 7, "file_name": "b.jpg"}, {"id": 3, "file_name": "a.jpg"}]
    rows = [(9, 7, " second\nline "), (2, 7, "first"), (4, 7, "  "), (1, 5, "of no image")]
    annotations = [{"id": i, "image_id": image, "caption": text} for i, image, text in rows]
    file = tmp_path / "captions.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations}))
    assert read_coco_captions(file) == [
        CocoImage(3, "a.jpg", ()),
        CocoImage(7, "b.jpg", ("first", "second line")),
    ]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"images": [{"id": 1}], "annotations": []}, "is not a COCO caption file"),
        ({"images": [{"id": 1, "file_name": "../x.jpg"}], "annotations": []}, "outside its folder"),
    ],
)
def test_a_bad_coco_file_is_named(content, problem, tmp_path):
    file = tmp_path / "captions.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"{file} .*{problem}|{file} names"):
        read_coco_captions(file)


def test_workers_leave_ctrl_c_to_the_process_that_started_them():
    assert list(run_jobs(signal.getsignal, [signal.SIGINT], workers=1)) == [signal.SIG_IGN]
