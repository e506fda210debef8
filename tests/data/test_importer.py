"""Importing images: folders and COCO, rejected images with reasons, and resuming."""

import csv
import io
import json
import os
import signal
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
from PIL import Image
from tiny_shards import read_shard

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
from unclip.data.prepare.resumable import ResumableBuild, run_jobs
from unclip.data.reader import SampleReader

WAIT = 60  # seconds


def save(path, color, size=(40, 32), caption=None) -> Path:
    """Save an image, and its caption next to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size, color)
    image.putpixel((0, 0), (1, 2, 3))
    image.save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
    return path


def save_many(folder, count, size=(40, 32)):
    for number in range(count):
        save(folder / f"{number}.png", (number, len(folder.name), 60), size, "x")


@pytest.fixture
def folder(tmp_path):
    """Twelve good images with captions in every supported form, and one bad image per reason."""
    root = tmp_path / "mine"
    for number in range(6):
        text = f"image {number}\nnumber {number} in other words\n"
        save(root / f"pic.{number}.png", (40 * number, 0, 9), caption=text)
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
    save(bad / "small.png", (200, 2, 1), (12, 90), caption="small")
    save(bad / "twice.png", (40, 0, 9), caption="again")
    save(bad / "blank.png", (200, 3, 1), caption=" \n ")
    save(bad / "latin.png", (200, 4, 1)).with_suffix(".txt").write_bytes(b"caf\xe9")
    cut = save(bad / "cut.png", (200, 5, 1), caption="cut off")
    cut.write_bytes(cut.read_bytes()[:60])
    (bad / "film.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0")
    (bad / "old.tga").write_bytes(bytes(50))
    for name in ("film", "old"):
        (bad / f"{name}.txt").write_text("a format that is not read")
    (bad / "README").write_text("BM is no image")
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
    settings = {"sizes": (16,), "val": 2, "workers": 0} | settings
    return import_images(read_folder(source), out, **settings)


def accepted(out) -> dict[str, dict[str, int]]:
    return json.loads((out / "report.json").read_text())["accepted"]


def reasons(out) -> dict[str, str]:
    with open(out / "rejected.csv", encoding="utf-8") as file:
        return {row["source"]: row["reason"] for row in csv.DictReader(file)}


def samples(out, split="train", size=16) -> dict[str, dict]:
    """The samples of the first shard by the source of the image."""
    rows = read_shard(out / split / str(size) / "00000.tar")
    return {row["json"]["source"]: row for row in rows}


def everything(root):
    return {p.relative_to(root): p.read_bytes() for p in sorted(root.rglob("*.tar"))}


def test_a_folder_becomes_shards_that_the_loader_reads(folder, tmp_path, capsys):
    out = tmp_path / "data"
    words = ["folder", str(folder), str(out), "--sizes", "16", "64", "--val", "2", "--workers", "0"]
    assert prepare.main(words) == 0
    said = capsys.readouterr().out
    assert "val: 2 at 16 px" in said and "1 × duplicate" in said
    assert reasons(out) == REASONS
    report = json.loads((out / "report.json").read_text())
    assert report["accepted"]["train"]["16"] == 10
    assert sum(report["rejected"].values()) == len(REASONS)
    large = sum(sizes.get("64", 0) for sizes in report["accepted"].values())
    assert large == 6  # two of 200 × 100 and four of 64 × 64

    (batch,) = ShardDataset(out / "train" / "16", SampleReader(image_size=16), batch_size=10)
    assert len(set(batch["key"])) == 10 and all(batch["valid"])
    found = samples(out) | samples(out, "val")
    assert len(found) == 12
    assert found["pic.3.png"]["json"]["captions"] == ["image 3", "number 3 in other words"]
    assert found["json/1.jpg"]["json"]["captions"] == ["a json 1"]
    assert found["table/deep/2.webp"]["json"]["captions"] == ["from a table 2"]


def test_pngs_stay_lossless_and_the_central_square_is_taken(tmp_path):
    image = Image.new("RGB", (96, 32), (0, 0, 255))
    image.paste((10, 200, 30), (32, 0, 64, 32))
    for name, one in (("a", image), ("b", image.transpose(Image.Transpose.ROTATE_90))):
        one.save(save(tmp_path / "in" / f"{name}.png", 0, caption="green"))
    run(tmp_path / "in", tmp_path / "out", sizes=(32,), val=0)
    found = samples(tmp_path / "out", size=32)
    assert found.keys() == {"a.png", "b.png"}
    for sample in found.values():
        opened = Image.open(io.BytesIO(sample["png"]))
        assert opened.size == (32, 32) and opened.getcolors() == [(1024, (10, 200, 30))]


def test_an_interrupted_import_resumes_and_gives_the_same_bytes(folder, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    settings = {"sizes": (16, 32), "shard_size": 3}
    run(folder, whole, **settings)
    real, calls = importer._write_shard, []

    def interrupted(shard):
        calls.append(shard)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(shard)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(importer, "_write_shard", interrupted)
        run(folder, cut, **settings)
    assert not (cut / "dataset.json").exists()
    stored = cut / "inspected.jsonl"
    stored.write_text(stored.read_text()[:-20])  # killed while writing a line
    run(folder, cut, **settings)
    assert everything(cut) == everything(whole)
    assert not (cut / "building.json").exists()


def test_a_build_killed_at_its_first_write_starts_again(tmp_path):
    (tmp_path / ".building.json.7.tmp").write_text("{")
    ResumableBuild(tmp_path, "imported images")
    (tmp_path / "other.txt").touch()
    with pytest.raises(ValueError, match="something other"):
        ResumableBuild(tmp_path, "emoji scenes")


def report_and_sleep(pid):
    pid.write_text(str(os.getpid()))
    time.sleep(WAIT)


def build_slowly(pids):
    list(run_jobs(report_and_sleep, pids, len(pids), about="jobs"))


def wait_until(true):
    end = time.monotonic() + WAIT
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def is_running(pid):
    stat = Path(f"/proc/{pid.read_text()}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_the_workers_of_a_killed_build_end(tmp_path):
    pids = [tmp_path / "0", tmp_path / "1"]
    build = get_context("spawn").Process(target=build_slowly, args=(pids,))
    build.start()
    wait_until(lambda: all(pid.exists() and pid.read_text() for pid in pids))
    assert all(map(is_running, pids))
    build.kill()
    wait_until(lambda: not any(map(is_running, pids)))


def test_other_images_need_overwrite_and_other_folders_are_safe(folder, tmp_path):
    out = tmp_path / "out"
    run(folder, out)
    before = everything(out)
    save(folder / "new.png", (77, 77, 1), caption="new")
    with pytest.raises(ValueError, match=r"train images: 10 there, 11 here.*--overwrite"):
        run(folder, out)
    assert everything(out) == before
    run(folder, out, overwrite=True)
    assert everything(out) != before
    images = read_folder(folder)
    with pytest.raises(ValueError, match="something other"):
        run(folder, folder, overwrite=True)
    assert read_folder(folder) == images


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"val": 99}, "leaves none to train on"),
        ({"sizes": (64, 64)}, "distinct"),
        ({"sizes": (8,)}, "at least 16 pixels"),
    ],
)
def test_impossible_settings_are_errors(folder, tmp_path, settings, problem):
    with pytest.raises(ValueError, match=problem):
        run(folder, tmp_path / "out", **settings)


@pytest.mark.parametrize("seed", range(4))
def test_every_size_has_training_and_validation_images(seed, tmp_path):
    save_many(tmp_path / "in" / "large", 12, (100, 100))
    save_many(tmp_path / "in" / "small", 48)
    for val, small, large in ((3, 3, 1), (1, 1, 1), (20, 20, 4), (0, 0, 0)):
        out = tmp_path / f"out{val}"
        run(tmp_path / "in", out, sizes=(16, 64), val=val, seed=seed)
        held_out = {"val": {"16": small, "64": large}} if val else {}
        assert accepted(out) == {"train": {"16": 60 - small, "64": 12 - large}} | held_out


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (
            {"large": 2, "small": 3},  # five images are enough for both splits
            {"train": {"16": 4, "64": 1}, "val": {"16": 1, "64": 1}},
        ),
        (
            {"train": 5, "test": 5},  # data without val gets one
            {"test": {"16": 5}, "train": {"16": 4}, "val": {"16": 1}},
        ),
        ({"train": 3, "validation": 2}, {"train": {"16": 3}, "val": {"16": 2}}),
    ],
)
def test_folders_are_splits_if_they_are_named_so(folders, expected, tmp_path):
    for name, count in folders.items():
        save_many(tmp_path / "in" / name, count, (80, 80) if name == "large" else (40, 32))
    run(tmp_path / "in", tmp_path / "out", sizes=(16, 64), val=None)
    assert accepted(tmp_path / "out") == expected


def captions_of(root, *column) -> list[tuple[str, ...]]:
    return [record.captions for record in read_folder(root, *column).records]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_tables_can_be_jsonl_or_parquet(kind, tmp_path):
    texts = {"a.png": ["one", "two"], "b.png": ["three", None, " "]}
    rows = [{"file_name": name, "said": said} for name, said in texts.items()]
    for number, name in enumerate(texts):
        save(tmp_path / name, (1, 2, number))
    if kind == "jsonl":
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "metadata.parquet")
    assert captions_of(tmp_path, "said") == [("one", "two"), ("three",)]
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
    assert captions_of(tmp_path) == [("a dog",), ("a cat \ufffd",)]
    (tmp_path / "a.txt").write_text("\n")  # a blank file next to a caption in the table
    assert captions_of(tmp_path)[0] == ("a dog",)


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
        assert captions_of(tmp_path) == [expected]
    else:
        with pytest.raises(ValueError, match=rf"metadata\.csv: {expected}"):
            read_folder(tmp_path)


def test_a_name_may_be_decomposed_on_the_disk_and_composed_in_the_table(tmp_path):
    save(tmp_path / "cafe\u0301.png", (1, 2, 3))
    (tmp_path / "metadata.csv").write_text("file_name,text\ncaf\u00e9.png,one\n")
    assert captions_of(tmp_path) == [("one",)] and read_folder(tmp_path).rejected == []


def test_the_content_of_a_file_decides_its_format(tmp_path):
    kinds = {"a.jpg": "PNG", "b.png": "WEBP", "c.webp": "JPEG", "d.bmp": "BMP", "e.tif": "TIFF"}
    kinds |= {"f.gif": "GIF", "g.avif": "AVIF", "h.dat": "PNG", "no_extension": "JPEG"}
    root, out = tmp_path / "in", tmp_path / "out"
    root.mkdir()
    for number, (name, kind) in enumerate(kinds.items()):
        image = Image.new("RGB", (40, 32), (20 * number, 9, 9))
        with open(root / name, "wb") as file:
            image.save(file, kind, icc_profile=bytes(range(256)) * 400)
        (root / name).with_suffix(".txt").write_text(kind)
    assert "rejected" not in run(root, out, val=0)
    found = samples(out)
    assert found.keys() == kinds.keys()
    lossless = {source for source, sample in found.items() if "png" in sample}
    assert lossless == {"a.jpg", "d.bmp", "e.tif", "f.gif", "h.dat"}
    for sample in found.values():
        content = sample.get("png") or sample["jpg"]
        assert len(content) < 2000
        assert "icc_profile" not in Image.open(io.BytesIO(content)).info


@pytest.mark.timeout(60)
def test_unusual_files_are_read_or_listed(tmp_path):
    root, out, elsewhere = tmp_path / "in", tmp_path / "out", tmp_path / "elsewhere"
    root.mkdir()
    names = [b"caf\xe9.png", "猫.png".encode(), b"two\nlines.png", b"UPPER.PNG", b"a.b.c.png"]
    for number, name in enumerate(names):
        path = root / os.fsdecode(name)
        save(path.with_suffix(".png"), (9 * number, 9, 9), caption="a name").rename(path)
    save(elsewhere / "deep" / "linked.png", (7, 7, 7), caption="a link")
    (root / "link").symlink_to(elsewhere)
    (elsewhere / "loop").symlink_to(root)
    (root / "loop").symlink_to(root / "loop")
    (root / "gone.png").symlink_to(root / "nowhere.png")
    for name in ("pipe.png", "pipe", "pipe\udce9.png"):
        os.mkfifo(root / name)
    for name in ("gone", "pipe", "pipe\udce9"):
        (root / f"{name}.txt").write_text("never")
    (root / "alone\udce9.png").write_bytes(b"")
    run(root, out, val=0)
    found = samples(out)
    expected = {name.decode("utf-8", "backslashreplace") for name in names}
    assert found.keys() == expected | {"link/deep/linked.png"}
    assert all(sample["__key__"].isascii() for sample in found.values())
    assert reasons(out) == {
        "gone.png": "unreadable file",
        "pipe.png": "unreadable file",
        "pipe\\xe9.png": "unreadable file",
        "alone\\xe9.png": "missing caption",
    }


def test_keys_are_safe_and_unique(tmp_path):
    sources = ["a/b.c.png", "a_b.c.png", "日本.png", "x" * 300 + ".png", "a-b.jpg", "a-b.png"]
    keys = [Record(source, tmp_path, ("x",)).key for source in sources]
    assert len(set(keys)) == len(sources)
    assert all(key.replace("_", "").isalnum() and key.isascii() and len(key) < 60 for key in keys)


def write_captions(file, names: dict[int, str], rows: list[tuple[int, int, str]]) -> Path:
    """Write a caption file; a row is the id, the image's id and the caption."""
    images = [{"id": number, "file_name": name} for number, name in names.items()]
    annotations = [{"id": i, "image_id": image, "caption": text} for i, image, text in rows]
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"images": images, "annotations": annotations}))
    return file


def test_coco_is_imported_with_all_captions_and_its_splits(tmp_path):
    for split in ("train2017", "val2017"):
        for number in range(2):
            save(tmp_path / split / f"{number:012d}.jpg", (90 * number, len(split), 7))
        rows = [(n, n % 2, f"{split} {n} ") for n in (2, 3, 0, 1)] + [(4, 2, "gone")]
        names = {number: f"{number:012d}.jpg" for number in range(3)}
        write_captions(tmp_path / "annotations" / f"captions_{split}.json", names, rows)
    listing = read_coco(tmp_path)
    assert [record.split for record in listing.records] == ["train", "train", "val", "val"]
    assert listing.records[1].captions == ("train2017 1", "train2017 3")
    assert [one.reason for one in listing.rejected] == ["no such file"] * 2
    assert prepare.main(["coco", str(tmp_path / "nowhere"), str(tmp_path / "o")]) == 2


def test_coco_captions_are_in_the_order_of_their_ids(tmp_path):
    rows = [(9, 7, " second\nline "), (2, 7, "first"), (4, 7, "  "), (1, 5, "of no image")]
    file = write_captions(tmp_path / "captions.json", {7: "b.jpg", 3: "a.jpg"}, rows)
    assert read_coco_captions(file) == [
        CocoImage(3, "a.jpg", ()),
        CocoImage(7, "b.jpg", ("first", "second line")),
    ]


@pytest.mark.parametrize(
    ("image", "problem"),
    [
        ({"id": 1}, "is not a COCO caption file"),
        ({"id": 1, "file_name": "../x.jpg"}, "names an image outside its folder"),
    ],
)
def test_a_bad_coco_file_is_named(image, problem, tmp_path):
    file = tmp_path / "captions.json"
    file.write_text(json.dumps({"images": [image], "annotations": []}))
    with pytest.raises(ValueError, match=f"{file} {problem}"):
        read_coco_captions(file)


def test_workers_leave_ctrl_c_to_the_process_that_started_them():
    results = run_jobs(signal.getsignal, [signal.SIGINT], workers=1, about="signals")
    assert list(results) == [signal.SIG_IGN]
