"""Run by test_kills.py: disturbs a script at random moments, and starts it again until it finishes.

A process is killed at its nth change of a file, or after some CPU time, which may be within a write
or a computation; or its writes fail in the middle of a file. It is forked from this process, with
the libraries imported already unless the imports may be killed, too.
"""

import importlib
import json
import os
import random
import resource
import runpy
import shutil
import signal
import sys
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).parents[1] / "src"
LIBRARIES = ("cli.training", "unclip.training.trainer", "unclip.training.run")
LIBRARIES += ("unclip.evaluation.context", "unclip.evaluation.features")
LIBRARIES += ("unclip.data.prepare.importer", "unclip.data.prepare.listing")
REPLACED = ("previous.ckpt", "building.json", ".lock")
CHANGES = ("os.rename", "os.remove", "os.link", "os.mkdir")  # and files opened to be written


class Ended(NamedTuple):
    code: int  # negative after a signal
    seconds: float  # of the CPU
    changes: int  # of files
    last: str  # change


def attempt(place, words, **moment):
    """Runs a script in `place`, and kills it at a change of a file or after CPU seconds."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _run(place, words, writer, **moment)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        events = pipe.read().splitlines()
    _, status, used = os.wait4(child, 0)
    code, seconds = os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime
    return Ended(code, seconds, len(events), (events or [""])[-1])


def _run(place, words, writer, change=None, seconds=None, limit=None):
    """Becomes the script; never returns. No file can be larger than `limit` bytes."""
    own, count = os.getpid(), 0

    def note(event, arguments):
        nonlocal count
        written = event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_ACCMODE
        if os.getpid() != own or not (written or event in CHANGES):
            return
        count += 1
        os.write(writer, f"{event} {arguments[0]!r}\n".encode())
        if count == change:
            os.kill(own, signal.SIGKILL)

    code = 1
    try:
        os.chdir(place)
        output = os.open("output.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.argv = [str(SOURCE / words[0]), *words[1:]]
        sys.addaudithook(note)
        if seconds is not None:
            signal.setitimer(signal.ITIMER_PROF, seconds)  # SIGPROF kills as SIGKILL does
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
        print("" if isinstance(stopped.code, int | None) else stopped.code)
    finally:
        sys.stdout.flush()
        os._exit(code)


def torture(folder, words, kills, seed):
    """Runs a script undisturbed in FOLDER/whole, and in FOLDER/0, 1, … with kills.

    FOLDER/template has the inputs. Every third kill is a full disk. A run that finishes before its
    kill is followed by another one from the start.
    """
    chance, lives, log = random.Random(seed), 0, []
    shutil.copytree(folder / "template", folder / "whole")
    whole = attempt(folder / "whole", words)
    assert whole.code == 0, (folder / "whole" / "output.log").read_text()[-2000:]
    given = {path.name for path in (folder / "template").rglob("*")} | {"output.log"}
    written = [path for path in (folder / "whole").rglob("*.*") if path.name not in given]
    sizes = sorted({path.stat().st_size for path in written if path.stat().st_size})
    while kills:
        place = folder / str(lives)
        shutil.copytree(folder / "template", place)
        ended = None
        while ended is None or ended.code != 0:
            moment = {}
            if kills % 3 == 1:
                moment["change"] = chance.randint(1, whole.changes)
            elif kills % 3 == 2:
                moment["seconds"] = chance.uniform(0.01, whole.seconds)
            elif kills:
                moment["limit"] = chance.choice(sizes) - 1
            before = [
                p for p in place.rglob("*.*") if p.name not in REPLACED and p.suffix != ".tmp"
            ]
            ended = attempt(place, words, **moment)
            killed = ended.code in (-signal.SIGKILL, -signal.SIGPROF)
            log_file = place / "output.log"
            output = log_file.read_text(errors="replace")  # a full disk may cut a character
            full = "limit" in moment and ended.code > 0 and "Traceback" not in output
            assert killed or full or ended.code == 0, output[-2000:]
            assert all(path.exists() for path in before), moment
            kills -= ended.code != 0
            log.append({**moment, **ended._asdict(), "output": output[-300:]})
        lives += 1
    (folder / "log.json").write_text(json.dumps([whole._asdict(), *log], indent=1))


def main(folder):
    """Disturbs FOLDER/TASK/words.json, one after another."""
    kills, seed = int(os.environ.get("KILLS", 3)), int(os.environ.get("SEED", 0))
    if "KILL_IMPORTS" not in os.environ:
        for name in LIBRARIES:
            importlib.import_module(name)
    for words in sorted(folder.glob("*/words.json")):
        torture(words.parent, json.loads(words.read_text()), kills, seed)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
