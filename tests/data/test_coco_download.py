"""The COCO downloader, against a local web server."""

import hashlib
import zipfile

import pytest

from unclip.data.prepare import coco_download
from unclip.data.prepare.coco_download import Archive, download_coco

IMAGES = {f"val2014/COCO_val2014_{k:012d}.jpg": bytes([k]) * 3000 for k in range(5)}
OTHERS = {"val2014/../../escaped.jpg": b"x", "other/file": b"y"}


@pytest.fixture
def archive(served):
    """A zip on the server with images and other members."""
    path = served.folder / "val2014.zip"
    with zipfile.ZipFile(path, "w") as opened:
        for name, content in (IMAGES | OTHERS).items():
            opened.writestr(name, content)
    return path


@pytest.fixture
def download(served, archive, tmp_path):
    """Return a function that downloads the zip to a folder, tmp_path/coco."""
    content = archive.read_bytes()
    md5 = hashlib.md5(content).hexdigest()
    wanted = Archive(archive.name, len(content), md5, "val2014/COCO_val2014_*", len(IMAGES))
    return lambda: download_coco(tmp_path / "coco", source=served.url, archives=[wanted])


def files(tmp_path):
    root = tmp_path / "coco"
    paths = [path for path in root.rglob("*") if path.is_file()]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


def test_sizes_are_printed_and_only_selected_members_unpacked(download, served, tmp_path, capsys):
    root = tmp_path / "coco"
    assert str(root) in download()
    assert f"GB free in {root.resolve()}" in capsys.readouterr().out.splitlines()[0]
    assert files(tmp_path) == IMAGES  # the archive was deleted, other members not unpacked
    assert not list(tmp_path.rglob("escaped.jpg"))
    assert "already" in download() and len(served.requested) == 1


def test_a_broken_connection_is_resumed(download, served, tmp_path):
    served.break_at = 700
    with pytest.raises(OSError, match=r"700 of .* bytes.*run again"):
        download()
    served.break_at = None
    download()
    assert served.ranges == [None, "bytes=700-"] and files(tmp_path) == IMAGES


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_a_killed_download_is_resumed_if_the_server_knows_ranges(
    knows_ranges, download, served, archive, tmp_path
):
    served.knows_ranges = knows_ranges
    begun = archive.read_bytes()[:1000] if knows_ranges else b"begun with other bytes" * 40
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco" / "val2014.zip.part").write_bytes(begun)
    download()
    assert served.ranges == [f"bytes={len(begun)}-"] and files(tmp_path) == IMAGES


def test_a_file_with_another_md5_is_deleted(download, archive, tmp_path):
    content = bytearray(archive.read_bytes())
    content[50] ^= 1
    archive.write_bytes(content)
    with pytest.raises(ValueError, match="md5"):
        download()
    assert files(tmp_path) == {}


def test_the_error_names_a_missing_file(download, archive):
    archive.rename(archive.with_name("other.zip"))
    with pytest.raises(OSError, match=r"/val2014\.zip .*404"):
        download()


def test_a_small_disk_is_an_error_before_the_download(download, served, monkeypatch):
    usage = type("Usage", (), {"free": 20_000})
    monkeypatch.setattr(coco_download.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match="free disk space"):
        download()
    assert not served.requested


def test_missing_members_are_unpacked_again(download, tmp_path):
    download()
    (tmp_path / "coco" / "val2014" / "COCO_val2014_000000000003.jpg").unlink()
    download()
    assert files(tmp_path) == IMAGES
