import hashlib
import http.server
import io
import threading
import zipfile

import pytest

from unclip.data import coco
from unclip.data.coco import Archive, fetch

PICTURES = {f"val2014/COCO_val2014_{k:012d}.jpg": bytes([k]) * 3000 for k in range(5)}


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves the class's files with ranges; breaks off where it is told to."""

    files: dict[str, bytes]
    break_after: int | None
    ranges: bool
    asked: list[str]

    def do_GET(self):
        content = self.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        wanted = self.headers.get("Range")
        self.asked.append(wanted or "all")
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
    content = zipped({**PICTURES, "val2014/../../escaped.jpg": b"x", "other/file": b"y"})
    handler = type("Own", (Handler,), {"break_after": None, "ranges": True, "asked": []})
    handler.files = {"/zips/val2014.zip": content}
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    handler.archive = Archive(
        "zips/val2014.zip",
        len(content),
        hashlib.md5(content).hexdigest(),
        ("val2014/COCO_val2014_",),
        5,
        15_000,
    )
    handler.source = f"http://127.0.0.1:{running.server_port}"
    yield handler
    running.shutdown()
    running.server_close()


def run(server, root, **more):
    return fetch(root, source=server.source, archives=[server.archive], pause=0.01, **more)


def test_it_says_size_and_place_first_and_unpacks_what_is_wanted(server, tmp_path, capsys):
    root = tmp_path / "deep" / "coco"
    assert str(root) in run(server, root)
    assert f"GB free, into {root.resolve()}" in capsys.readouterr().out.splitlines()[0]
    found = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*.*")}
    assert found == PICTURES  # the archive is gone, the rest was never unpacked
    assert not (tmp_path / "escaped.jpg").exists()
    assert "already" in run(server, root) and len(server.asked) == 1


def test_a_connection_that_breaks_goes_on_where_it_was(server, tmp_path):
    server.break_after = 700
    run(server, tmp_path)
    assert server.asked == ["all", "bytes=700-"]
    assert len(list((tmp_path / "val2014").iterdir())) == 5


def test_another_run_goes_on_where_a_killed_one_was(server, tmp_path):
    (tmp_path / "val2014.zip.part").write_bytes(server.files["/zips/val2014.zip"][:1000])
    run(server, tmp_path)
    assert server.asked == ["bytes=1000-"]


def test_a_server_without_ranges_sends_all_of_it(server, tmp_path):
    server.ranges = False
    (tmp_path / "val2014.zip.part").write_bytes(b"begun with other bytes")
    run(server, tmp_path)
    assert len(list((tmp_path / "val2014").iterdir())) == 5


def test_another_file_is_refused_and_removed(server, tmp_path):
    content = bytearray(server.files["/zips/val2014.zip"])
    content[50] ^= 1
    server.files["/zips/val2014.zip"] = bytes(content)
    with pytest.raises(ValueError, match="md5"):
        run(server, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_source_without_the_file_is_named(server, tmp_path):
    server.files.clear()
    with pytest.raises(OSError, match=r"zips/val2014\.zip cannot be fetched .*404"):
        run(server, tmp_path)


def test_a_small_disk_is_an_error_before_anything_is_fetched(server, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 20_000})
    monkeypatch.setattr(coco.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match="needed"):
        run(server, tmp_path)
    assert not server.asked


def test_a_half_unpacked_archive_is_finished(server, tmp_path):
    run(server, tmp_path)
    (tmp_path / "val2014" / "COCO_val2014_000000000003.jpg").unlink()
    run(server, tmp_path)
    assert len(list((tmp_path / "val2014").iterdir())) == 5
