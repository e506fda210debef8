import gzip
import io
import json
import os
import struct
import tarfile
from pathlib import Path
from unittest import mock

import pytest
from make_shards import flat_image, keys, sample, write_shard, write_shards

from unclip.data.bad_samples import BadSample, BadSamples
from unclip.data.shards import Shard, count_samples, list_shards, open_shards, read_positions


def read(shards, positions=None, **options):
    positions = range(sum(shard.samples for shard in shards)) if positions is None else positions
    return list(read_positions(shards, positions, **options))


def counts(source) -> list[int]:
    return [shard.samples for shard in open_shards(source)]


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def change(path: Path, start: int, content: bytes):
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(content)


def change_header(path: Path, start: int, fields: dict[int, bytes]):
    """Change fields of a tar header at `start`, and its checksum."""
    header = bytearray(path.read_bytes()[start : start + 512])
    for offset, content in (fields | {148: b" " * 8}).items():
        header[offset : offset + len(content)] = content
    header[148:156] = b"%06o\0 " % sum(header)
    change(path, start, header)


def test_index_is_written_trusted_and_updated(tmp_path):
    write_shards(tmp_path, [3, 5])
    assert counts(tmp_path) == [3, 5]
    index = tmp_path / "index.json"
    assert json.loads(index.read_text()) == {"00000.tar": 3, "00001.tar": 5}
    index.write_text('{"00000.tar": 33, "00001.tar": 5}')
    assert counts(tmp_path) == [33, 5]  # trusted while newer
    os.utime(index, (0, 0))
    assert counts(tmp_path) == [3, 5]
    write_shard(tmp_path / "00002.tar", [sample(9)])
    assert counts(tmp_path) == [3, 5, 1]
    assert counts(tmp_path / "00001.tar") == [5]
    assert counts([tmp_path / "00001.tar", tmp_path / "00000.tar"]) == [5, 3]
    assert not list(tmp_path.glob(".*"))


def test_an_index_that_cannot_be_written_or_read_is_ignored(tmp_path, monkeypatch):
    write_shards(tmp_path, [3])
    (tmp_path / "index.json").write_text("not json")
    os.utime(tmp_path / "index.json", (0, 0))

    refuse = mock.Mock(side_effect=PermissionError("read-only"))
    monkeypatch.setattr("unclip.data.shards.write_text", refuse)
    assert counts(tmp_path) == [3]
    assert (tmp_path / "index.json").read_text() == "not json"


def test_an_existing_folder_with_braces_is_no_pattern(tmp_path):
    write_shards(tmp_path / "set{a}", [3])
    assert len(list_shards(str(tmp_path / "set{a}"))) == 1
    write_shard(tmp_path / "set{a}" / "00001.tar", [sample(1)])
    assert len(list_shards(str(tmp_path / "set{a}" / "{00000..00001}.tar"))) == 2


def test_missing_shards_name_folder_and_command(tmp_path):
    mine = tmp_path / "mine"
    write_shards(mine / "train" / "64", [1])
    (mine / "dataset.json").write_text('{"settings": {"data": "imported images"}}')
    for source, expected in {
        "train/64": rf"{tmp_path}.*prepare\.py folder",
        "00007.tar": r"00007\.tar.*prepare\.py folder",
        "mine/val/1024": rf"prepare\.py folder DIR {mine}`",
        "emoji_s/train/64": r"prepare\.py emoji`",
        "coco/train/64": rf"prepare\.py coco {tmp_path}/coco OUT`",
    }.items():
        with pytest.raises(FileNotFoundError, match=expected):
            list_shards(tmp_path / source)
    write_shards(tmp_path, [3, 2])
    shards = open_shards(tmp_path)
    (tmp_path / "00000.tar").unlink()
    for act, given in ((open_shards, tmp_path), (read, shards)):
        with pytest.raises(FileNotFoundError, match=r"00000\.tar.*prepare\.py folder"):
            act(given)


def test_positions_continue_over_shards_and_wrap_around(tmp_path):
    sizes = [3, 5, 1]
    shards = open_shards(write_shards(tmp_path, sizes))
    everything = keys(sizes)
    assert [raw.key for _, raw in read(shards)] == everything
    for start in range(0, 9, 2):
        for stop in range(start, 24, 5):
            rows = read(shards, range(start, stop))
            assert [position for position, _ in rows] == list(range(start, stop))
            assert [raw.key for _, raw in rows] == [everything[i % 9] for i in range(start, stop)]
    rows = read(shards, range(9), wanted=lambda position: position % 4 == 3)
    assert [raw.key for _, raw in rows] == [everything[3], everything[7]]


def test_only_named_members_are_read(tmp_path):
    marker = tmp_path / "executed"
    evil = b"cposix\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR."
    names = ["pickle", "pyd", "pkl", "pth", "npy", "txt.gz", "PY"]
    path = write_shard(
        tmp_path / "00000.tar",
        [sample(0) | dict.fromkeys(names, evil), {"__key__": "1", "pickle": evil}, sample(2)],
    )
    rows = read(open_shards(path))
    assert [raw.key for _, raw in rows] == ["00000000", "00000002"]
    assert [set(raw.members) for _, raw in rows] == [{"png", "json"}] * 2
    assert not marker.exists()


def test_images_can_be_left_unread(tmp_path):
    ((_, raw),) = read(open_shards(write_shards(tmp_path, [1])), images=False)
    assert raw.members["png"] is None
    assert json.loads(raw.members["json"])["index"] == 0


def test_unusual_names_are_only_keys(tmp_path):
    names = ["../../x.PNG", "/etc/y.png", "a b/ü.png", "caf\udce9.png", "no_extension", "v.2.png"]
    (tmp_path / "shards").mkdir()
    path = write_tar(tmp_path / "shards" / "00000.tar", [(name, flat_image(1)) for name in names])
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    rows = read(open_shards(path))
    assert [raw.key for _, raw in rows] == ["../../x", "/etc/y", "a b/ü", "caf\\xe9", "v"]
    assert [list(raw.members) for _, raw in rows] == [["png"]] * 4 + [[]]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["shards"]


def test_oversize_and_sparse_members_are_not_read(tmp_path, monkeypatch):
    large, image = b" " * (2**20 + 1), flat_image(1)
    members = [("0.json", large), ("1.png", image), ("2.png", b""), ("3.png", image)]
    path = write_tar(tmp_path / "00000.tar", members)
    size = b"\x80" + (200 * 2**30).to_bytes(11, "big")
    sparse = path.read_bytes().index(b"2.png")  # GNU sparse: claims 200 GiB, holds nothing
    change_header(path, sparse, {156: tarfile.GNUTYPE_SPARSE, 257: b"ustar  \0", 483: size})
    monkeypatch.setattr("unclip.data.shards.MAX_IMAGE_BYTES", len(image))
    kinds = [raw.bad and raw.bad.kind for _, raw in read(open_shards(path))]
    assert kinds == ["oversize member", None, "oversize member", None]


def usable(rows) -> list[str]:
    return [raw.key for _, raw in rows if raw.bad is None and set(raw.members) == {"png", "json"}]


@pytest.mark.timeout(20)
def test_forged_sizes_cost_one_sample(tmp_path):
    path = write_shards(tmp_path, [3]) / "00000.tar"
    second = 2048  # the header of the second sample's first member
    change_header(path, second, {124: b"\xff" * 4 + struct.pack(">q", -2048)})
    assert count_samples(path).samples == 3
    assert usable(read([Shard(path, 3)])) == ["00000000", "00000002"]


def test_a_shard_cut_anywhere_yields_every_place_and_the_whole_samples(tmp_path):
    path = write_shards(tmp_path, [4]) / "00000.tar"
    whole = path.read_bytes()
    data_end = 4 * 4 * 512  # four samples of two members, each a header and a block
    for cut in [*range(512, data_end + 1024, 256), 700, 1300]:
        path.write_bytes(whole[:cut])
        report = mock.Mock()
        rows = read([Shard(path, 4)], report=report)
        reports = [call.args[2].kind for call in report.call_args_list]
        assert [place for place, _ in rows] == [0, 1, 2, 3]
        complete = [raw for _, raw in rows if raw.bad is None and len(raw.members) == 2]
        assert all(len(raw.members["png"]) == len(flat_image(1)) for raw in complete)
        # 2048 bytes a sample; the last block of each holds the json and padding
        assert len(complete) >= cut // 2048 if cut < data_end else len(complete) == 4
        broken = any(raw.bad is not None or len(raw.members) < 2 for _, raw in rows)
        assert broken or reports == ["damaged shard"] * (cut < data_end + 512)
        assert bool(count_samples(path).damage) == (cut < data_end + 512)


@pytest.mark.parametrize(
    ("content", "looks"),
    [
        (b"", "an empty file"),
        (b"garbage" * 1000, "unknown data of 7000 bytes"),
        (b"\xff" * 512 + bytes(9728), "unknown data"),
        (gzip.compress(bytes(10240)), "a gzip file: .*gunzip"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer: .*lfs pull"),
        (b"\n<!DOCTYPE html><html>404</html>" * 40, "a web page: download"),
        (bytes(4096), "zeros: download"),
        (bytes(2**20), "zeros: download"),
        (b"PK\x03\x04" + bytes(600), "another archive"),
    ],
)
def test_a_file_that_is_not_a_tar_is_an_error_that_names_it(tmp_path, content, looks):
    write_shards(tmp_path, [3])
    (tmp_path / "00001.tar").write_bytes(content)
    statistics = tmp_path / "00001_stats.json"
    for act in (
        lambda: open_shards(tmp_path),
        lambda: open_shards(tmp_path),
        lambda: statistics.write_text('{"successes": 2}') and open_shards(tmp_path),
        lambda: read([Shard(tmp_path / "00001.tar", 2)]),
    ):
        with pytest.raises(ValueError, match=rf"00001\.tar is not a tar file but {looks}"):
            act()


def test_an_archive_without_samples_is_reported(tmp_path, caplog):
    write_tar(tmp_path / "00000.tar", [])
    (tmp_path / "00001.tar").write_bytes(bytes(1024))
    write_tar(tmp_path / "00002.tar", [("00000.tar.gz", b"x" * 5000)])
    assert counts(tmp_path) == [0, 0, 0]
    assert all(f"0000{number}.tar holds no images" in caplog.text for number in range(3))


def test_a_damaged_header_costs_one_sample_of_a_thousand(tmp_path, caplog):
    path = write_shards(tmp_path, [1000]) / "00000.tar"
    change(path, 100 * 2048, b"\xff" * 512)
    shards = open_shards(tmp_path)
    assert shards[0].samples == 1000
    assert len(usable(read(shards))) == 999
    (message,) = [record.getMessage() for record in caplog.records]
    assert str(path) in message and "from byte 204800 to 205824" in message
    assert "about 1 of 1001 samples are lost" in message


def test_a_damaged_shard_is_reported_and_counted_again(tmp_path, caplog):
    path = write_shards(tmp_path, [100]) / "00000.tar"
    whole = path.read_bytes()
    for content in (whole[: 60 * 2048] + bytes(40 * 2048), whole[: 70 * 2048 + 100]):
        path.write_bytes(content)
        caplog.clear()
        assert counts(tmp_path) in ([60], [70]) and str(path) in caplog.text
        assert json.loads((tmp_path / "index.json").read_text()) == {}
    path.write_bytes(whole)
    assert counts(tmp_path) == [100]
    assert json.loads((tmp_path / "index.json").read_text()) == {"00000.tar": 100}


def test_concatenated_archives_are_read_to_the_end(tmp_path):
    path = write_shards(tmp_path, [5]) / "00000.tar"
    write_shard(tmp_path / "more.tar", [sample(7)])
    path.write_bytes(path.read_bytes() + (tmp_path / "more.tar").read_bytes())
    assert count_samples(path).samples == 6


def test_duplicate_keys_and_members_are_counted(tmp_path):
    names = ("0.png", "0.json", "0.png", "1.png", "1.json", "0.png", "0.json")
    shards = open_shards(write_tar(tmp_path / "00000.tar", [(name, b"x") for name in names]))
    assert shards[0].samples == 3
    report = mock.Mock()
    rows = read(shards, report=report)
    assert [raw.bad and raw.bad.kind for _, raw in rows] == [None, None, "duplicate key"]
    assert [call.args[2].kind for call in report.call_args_list] == ["duplicate key"]


def test_an_index_with_too_few_samples_is_an_error(tmp_path):
    path = write_shards(tmp_path, [4]) / "00000.tar"
    with pytest.raises(ValueError, match=r"index.json.*delete that file"):
        read([Shard(path, 3)])


def run_pass(counter: BadSamples, samples: int, bad: set[int]) -> None:
    for i in range(samples):
        if i in bad:
            counter.record(Path("some/00003.tar"), str(i), BadSample("bad json"))
        counter.mark_seen()


def test_too_many_bad_samples_name_the_shard_and_the_kinds():
    with pytest.raises(ValueError, match=r"50 of 50 .*bad json: 50.*00003.tar.*max_bad_fraction"):
        run_pass(BadSamples(0.01, 10**9), 1000, set(range(1000)))
    for tolerated, samples, bad in (
        (0.01, 60, {3}),  # one of a short pass
        (0.01, 5000, set(range(0, 5000, 90))),
        (0.0, 100, {99}),
    ):
        with pytest.raises(ValueError, match="are bad"):
            run_pass(BadSamples(tolerated, samples), samples, bad)


def test_a_few_bad_samples_are_tolerated(caplog):
    run_pass(BadSamples(0.01, 40), 40, set(range(40)))  # too few to judge
    run_pass(BadSamples(0.01, 5000), 5000, {0, 1, 2})  # early, but few of all
    caplog.clear()
    counter = BadSamples(0.5, 10**6)
    run_pass(counter, 6000, set(range(0, 6000, 3)))
    counter.finish()
    numbers = [record.args[0] for record in caplog.records]
    assert numbers == [1, 1000, 2000, 2000]  # the first, every thousandth, the summary
