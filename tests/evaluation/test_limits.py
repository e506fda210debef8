"""The limits measured on a tiny bundle, in results, summary and page, and by the command line."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
import tiny_bundle
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from PIL import Image

pytest.importorskip("resvg_py")

from unclip.emoji.scene_shards import write_shard
from unclip.evaluation import spelling
from unclip.evaluation.detail import Detail
from unclip.evaluation.evaluation import Evaluation
from unclip.evaluation.protocol import Protocol
from unclip.evaluation.publish import publish
from unclip.evaluation.sampling import Settings
from unclip.evaluation.spelling import Spelling

pytestmark = pytest.mark.filterwarnings("ignore:a prompt is too long")
ROOT = Path(__file__).parents[2]
PROTOCOL = Protocol(
    name="tiny",
    format="shards",
    split="test_seen",
    captions="first",
    count=2,
    resolution=64,
    reference="test_seen",
    network="none",
)
LIMITS = {
    "spelling": Spelling(words=["HELLO", "STOP"], each=1),
    "detail": Detail(pictures={"64": 4, "256": 2}, resamples=4),
    "left_out": None,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for split, size, count in (
        ("test_seen", 64, 40),
        ("test_held_out", 64, 20),
        ("test_seen", 256, 2),
    ):
        path = folder / split / str(size) / "00000.tar"
        path.parent.mkdir(parents=True)
        write_shard(path, "S", 0, split, size, range(count))
    (folder / "dataset.json").write_text(json.dumps({"settings": {"set": "S"}}))
    return folder


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setattr(spelling, "reader", lambda: lambda image: "HELLO" if image.min() == 0 else "")
    torch.manual_seed(0)
    model = tiny_bundle.write(tmp_path_factory.mktemp("models") / "tiny")
    out = tmp_path_factory.mktemp("out")
    evaluation = Evaluation(
        protocol=PROTOCOL,
        metrics={},
        networks={},
        settings=Settings(batch_size=8, progress=False),
        limits=LIMITS,
        cache=out / "cache",
        device="cpu",
    )
    outcome = evaluation(data=data, out=out, model=model)
    patch.undo()
    return evaluation, outcome, model, out


def test_each_limit_stands_beside_real_pictures(run):
    _, outcome, _, _ = run
    limits = outcome.results["limits"]
    assert limits.keys() == {"spelling", "detail"}
    assert limits["spelling"]["scores"]["right"]["real"] == 0.5  # it reads HELLO from any font
    assert limits["detail"]["scores"].keys() == {
        f"{size}_{band}" for size in (64, 256) for band in ("low", "middle", "high")
    }
    assert "limits" in outcome.results["seconds"]


def test_their_pictures_open(run):
    _, outcome, _, out = run
    paths = [path for one in outcome.results["limits"].values() for path in one["paths"]]
    names = {Path(path).relative_to(out).as_posix() for path in paths}
    assert names == {f"pictures/{name}.png" for name in ("spelling", "detail")}
    for path in paths:
        with Image.open(path) as picture:
            picture.load()


def test_they_are_printed_and_on_the_page(run, capsys):
    _, outcome, _, out = run
    publish(outcome, out)
    printed = capsys.readouterr().out
    page = (out / "report.html").read_text()
    for words in ("similarity", "256_high", "spelling.png"):
        assert words in printed
    assert "limits that the paper admits" in page and page.count("data:image/png") >= 3
    HTMLParser().feed(page)
    assert json.loads((out / "results.json").read_text())["limits"]["detail"]["about"]["unit"]


def test_a_second_run_finds_the_images(run, data, monkeypatch):
    evaluation, outcome, model, out = run
    before = {path: path.stat().st_mtime_ns for path in (out / "samples").rglob("*.png")}
    monkeypatch.setattr(spelling, "reader", lambda: lambda image: "")
    again = evaluation(data=data, out=out, model=model).results["limits"]
    assert again["detail"] == outcome.results["limits"]["detail"]
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_what_is_missing_is_named_and_the_rest_is_measured(run, tmp_path, monkeypatch):
    evaluation, _, _, _ = run

    def missing():
        raise FileNotFoundError("pip install it")

    monkeypatch.setattr(spelling, "reader", missing)
    torch.manual_seed(0)
    small = tiny_bundle.write(tmp_path / "small", ("clip", "prior", "decoder"))
    folder = tmp_path / "data" / "test_seen" / "64"
    folder.mkdir(parents=True)
    write_shard(folder / "00000.tar", "S", 0, "test_seen", 64, range(4))
    outcome = evaluation(data=tmp_path / "data", out=tmp_path / "out", model=small)
    limits = outcome.results["limits"]
    assert limits["spelling"]["not_available"] == "pip install it"
    assert set(limits["detail"]["scores"]) == {"64_low", "64_middle", "64_high"}


@pytest.fixture
def composed():
    GlobalHydra.instance().clear()

    def make(*overrides):
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            cfg = compose("evaluate", list(overrides))
        return cfg, instantiate(cfg.evaluation, _convert_="all")

    yield make
    GlobalHydra.instance().clear()


def test_the_configurations_values_are_the_codes_own_defaults(composed):
    cfg, made = composed("metrics=limits")
    assert made.limits == {"spelling": Spelling(), "detail": Detail()}
    assert made.metrics == {} and cfg.by_stage is False and made.protocol.count == 12
    _, made = composed("metrics=limits", "limits.detail.pictures.64=8", "limits.spelling=null")
    assert made.limits["detail"].pictures == {"64": 8, "256": 32, "1024": 8}
    assert made.limits["spelling"] is None


def test_they_belong_to_the_full_metrics_and_not_to_the_offline_ones(composed):
    assert composed("metrics=full")[1].limits.keys() == LIMITS.keys() - {"left_out"}
    assert composed("metrics=offline")[1].limits == {}
    assert composed("limits=quick")[1].limits["detail"].resamples == 20
