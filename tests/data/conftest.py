"""A web server for the tests of downloads; no other host is contacted."""

import functools
import http.server
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, whole files or ranges, with the faults that the test wants."""

    def __init__(self, *args, served: SimpleNamespace, **options):
        self.served = served
        super().__init__(*args, directory=str(served.folder), **options)

    def do_GET(self):
        served, wanted = self.served, self.headers.get("Range")
        path = Path(self.translate_path(self.path))
        served.requested.append(self.path)
        served.ranges.append(wanted)
        if status := served.status(self.path):
            self.send_error(status)
        elif path.is_file() and (wanted or served.break_at):
            content = path.read_bytes()
            start = int(wanted[len("bytes=") : -1]) if wanted and served.knows_ranges else 0
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self.wfile.write(content[start : served.break_at])
        else:
            super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def served(tmp_path):
    """Serve the new folder `folder` at `url`.

    `requested` and `ranges` are the paths and ranges of all requests. `status(path)` is the HTTP
    status of a failure, or None; files break off at the byte `break_at`.
    """
    served = SimpleNamespace(folder=tmp_path / "served", requested=[], ranges=[], break_at=None)
    served.status, served.knows_ranges = lambda path: None, True
    served.folder.mkdir()
    handler = functools.partial(Handler, served=served)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    served.url = f"http://127.0.0.1:{server.server_port}"
    yield served
    server.shutdown()
    server.server_close()
