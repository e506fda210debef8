"""`make eval-coco` on a folder like COCO, on two processes, killed at several moments."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import script
import tiny_bundle
import tiny_evaluation
from coco_like import PNG_CALLED_JPG, write_coco

from unclip.data.prepare.listing import read_coco_captions
from unclip.evaluation.sources import open_source

ROOT = Path(__file__).parents[2]
COUNT = 20
FORK = multiprocessing.get_context("fork")  # imports are paid for once


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("coco") / "coco", images=60)


def make_command(**variables) -> str:
    """Return the command of `make eval-coco`."""
    words = [
        "make",
        "-n",
        "--no-print-directory",
        "eval-coco",
        *(f"{name}={value}" for name, value in variables.items()),
    ]
    lines = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    command = lines[lines.index("src/evaluate.py") :].replace("\\\n", " ")
    return f"python {command}"


def evaluate(command, folder, coco, rank, port):
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["COCO_ROOT"] = str(coco)
    sys.stdout = sys.stderr = open(folder / f"log{rank}", "a", encoding="utf-8", buffering=1)  # noqa: SIM115
    script.run(command, folder)


def start(command, folder, coco, processes):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [(command, folder, coco, rank, port) for rank in range(processes)]
    children = [FORK.Process(target=evaluate, args=each) for each in arguments]
    for child in children:
        child.start()
    return children


def test_results_of_the_shipped_bundle_are_written_elsewhere():
    command = make_command(MODEL="models/demo")
    assert "model=models/demo " in command and "out=runs/demo/coco" in command
    assert "trainer=ddp" in command and "protocol.count" not in command
    assert "out=models/mine/coco" in make_command(MODEL="models/mine")


@pytest.mark.slow
def test_it_ends_with_the_undisturbed_results_after_three_kills(coco, tmp_path):
    model = tiny_bundle.write(tmp_path / "model", ("clip", "prior", "decoder", "upsampler_256"))
    found = {}
    for name, processes, moments in (("whole", 1, ()), ("killed", 2, (0, 3, COUNT // 2))):
        (folder := tmp_path / name).mkdir()
        command = make_command(MODEL=model, OUT="out", COUNT=COUNT)
        command += f" trainer.devices={processes} trainer.accelerator=cpu batch_size=2"
        command += " only=[frechet] references=references"
        for images in moments:
            children = start(command, folder, coco, processes)
            while len(list(folder.glob("out/coco/samples/*/[!.]*"))) < 2 + images:
                assert all(child.is_alive() for child in children), (folder / "log0").read_text()
                time.sleep(0.01)
            for child in children:
                os.kill(child.pid, signal.SIGKILL)
                child.join(60)
        children = start(command, folder, coco, processes)
        for child in children:
            child.join(200)
        log = (folder / "log0").read_text()
        assert [child.exitcode for child in children] == [0] * processes, log
        results = json.loads((folder / "out" / "coco" / "results.json").read_text())
        images = {path.name: path.read_bytes() for path in folder.glob("out/coco/samples/*/*.png")}
        found[name] = results["key"], results["scores"], images
    assert found["whole"] == found["killed"]
    assert len(found["whole"][2]) == COUNT and results["n_reference"] == 60


def test_every_odd_image_of_coco_is_read(coco):
    protocol = tiny_evaluation.protocol(
        format="coco", split="val2014", captions="any", count=1000, resolution=32
    )
    source = open_source(coco, "val2014", protocol)
    assert len(source.items) == 60 and source.bad == {}
    sizes = {image.size for image in source.images(range(60))}
    assert {(64, 48), (48, 64), (64, 1)} <= sizes
    assert f"{PNG_CALLED_JPG:012d}" in {item.id for item in source.items}
    texts = [text for item in source.items for text in item.captions]
    assert len(texts) == 301 and texts == [" ".join(text.split()) for text in texts]
    assert len({prompt.id for prompt in protocol.draw(source.items)}) == len(texts)


def test_coco_is_imported_for_training(tmp_path):
    for split, images in (("train2014", 40), ("val2014", 20)):
        write_coco(tmp_path / "coco", images, split)
    script.run("python src/prepare.py coco coco shards --sizes 16 32 --workers 0", tmp_path)
    report = json.loads((tmp_path / "shards" / "report.json").read_text())
    assert report == {
        "accepted": {"train": {"16": 39, "32": 39}, "val": {"16": 20, "32": 20}},
        "rejected": {"image too small": 1},  # the one of 1 pixel
    }


def test_a_caption_file_of_cocos_size_is_read_in_seconds(tmp_path):
    images = [{"id": 7 * k, "file_name": f"COCO_val2014_{7 * k:012d}.jpg"} for k in range(40_504)]
    rows = [
        {"id": k, "image_id": 7 * (k % 40_504), "caption": "A bicycle replica with a clock.\n"}
        for k in range(202_654)
    ]
    path = tmp_path / "captions_val2014.json"
    path.write_text(json.dumps({"images": images, "annotations": rows}))
    started = time.process_time()
    found = read_coco_captions(path)
    assert time.process_time() - started < 10
    assert len(found) == 40_504 and sum(len(image.captions) for image in found) == 202_654
