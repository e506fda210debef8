"""The COCO downloader, against a local web server."""

import hashlib
import http.server
import io
import threading
import zipfile

import pytest

from unclip.data.prepare import coco_download
from unclip.data.prepare.coco_download import Archive, download_coco

IMAGES = {f"val2014/COCO_val2014_{k:012d}.jpg": bytes([k]) * 3000 for k in range(5)}


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `files` with ranges; `break_after` interrupts one response."""

    files: dict[str, bytes]
    break_after: int | None
    ranges: bool
    requested: list[str]

    def do_GET(self):
        content = self.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        wanted = self.headers.get("Range")
        self.requested.append(wanted or "all")
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.ranges else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        stop, type(self).break_after = type(self).break_after, None
        self.wfile.write(content[start : stop if stop is not None else len(content)])

    def log_message(self, *_):
        pass


def zipped(members: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return content.getvalue()


@pytest.fixture
def server():
    content = zipped({**IMAGES, "val2014/../../escaped.jpg": b"x", "other/file": b"y"})
    handler = type("Own", (Handler,), {"break_after": None, "ranges": True, "requested": []})
    handler.files = {"/zips/val2014.zip": content}
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    handler.archive = Archive(
        "zips/val2014.zip",
        len(content),
        hashlib.md5(content).hexdigest(),
        "val2014/COCO_val2014_*",
        5,
    )
    handler.source = f"http://127.0.0.1:{running.server_port}"
    yield handler
    running.shutdown()
    running.server_close()


def run(server, root, **more):
    return download_coco(root, source=server.source, archives=[server.archive], **more)


def test_sizes_are_printed_and_only_selected_members_unpacked(server, tmp_path, capsys):
    root = tmp_path / "deep" / "coco"
    assert str(root) in run(server, root)
    assert f"GB free in {root.resolve()}" in capsys.readouterr().out.splitlines()[0]
    found = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*.*")}
    assert found == IMAGES  # the archive was deleted, other members not unpacked
    assert not (tmp_path / "escaped.jpg").exists()
    assert "already" in run(server, root) and len(server.requested) == 1


def test_a_broken_connection_is_resumed(server, tmp_path):
    server.break_after = 700
    with pytest.raises(OSError, match=r"700 of .* bytes.*run again"):
        run(server, tmp_path)
    run(server, tmp_path)
    assert server.requested == ["all", "bytes=700-"]
    assert len(list((tmp_path / "val2014").iterdir())) == 5


def test_a_killed_download_is_resumed(server, tmp_path):
    (tmp_path / "val2014.zip.part").write_bytes(server.files["/zips/val2014.zip"][:1000])
    run(server, tmp_path)
    assert server.requested == ["bytes=1000-"]


def test_a_server_may_ignore_ranges(server, tmp_path):
    server.ranges = False
    (tmp_path / "val2014.zip.part").write_bytes(b"begun with other bytes")
    run(server, tmp_path)
    assert len(list((tmp_path / "val2014").iterdir())) == 5


def test_a_file_with_another_md5_is_deleted(server, tmp_path):
    content = bytearray(server.files["/zips/val2014.zip"])
    content[50] ^= 1
    server.files["/zips/val2014.zip"] = bytes(content)
    with pytest.raises(ValueError, match="md5"):
        run(server, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_error_names_a_missing_file(server, tmp_path):
    server.files.clear()
    with pytest.raises(OSError, match=r"zips/val2014\.zip .*404"):
        run(server, tmp_path)


def test_a_small_disk_is_an_error_before_the_download(server, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 20_000})
    monkeypatch.setattr(coco_download.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match="free disk space"):
        run(server, tmp_path)
    assert not server.requested


def test_missing_members_are_unpacked_again(server, tmp_path):
    run(server, tmp_path)
    (tmp_path / "val2014" / "COCO_val2014_000000000003.jpg").unlink()
    run(server, tmp_path)
    assert len(list((tmp_path / "val2014").iterdir())) == 5
