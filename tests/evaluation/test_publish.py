"""What an evaluation leaves behind: the page, a sweep's curves, a logger's tables and pictures."""

import json
import re
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from unclip.evaluation.curve import (
    axes,
    comparable,
    differing,
    lines_of,
    read_points,
    write_curve,
)
from unclip.evaluation.evaluation import Outcome
from unclip.evaluation.extremes import extremes
from unclip.evaluation.folder import PictureFolder
from unclip.evaluation.page import page
from unclip.evaluation.protocol import Prompt, Protocol
from unclip.evaluation.publish import headline, publish
from unclip.evaluation.scores import Score, mean_score
from unclip.evaluation.scoring import Scored
from unclip.evaluation.tracking import track

PROTOCOL = Protocol(
    name="coco14-30k",
    format="coco",
    split="val2014",
    captions="one_per_image",
    count=30,
    resolution=8,
    reference="val2014",
    network="inception",
)


def outcome(folder, *, guidance=None, fid=20.0, data="d", count=30, steps=8) -> Outcome:
    prompts = [Prompt(f"{k:03d}", f'picture {k} <b>"bold"</b>', k) for k in range(count)]
    made = PictureFolder.create(folder / "samples", prompts, {"x": 1}, seed=0)
    for k in range(count):
        made.write(k, torch.full((3, 8, 8), k, dtype=torch.uint8))
    clip = mean_score(torch.linspace(10, 30, count), seed=0, better="higher", real=31.5)
    scores = {
        "fid": Score(fid, 0.5, (fid - 1, fid + 1), count, "lower", 40504, 3.5, 20252),
        "fd_effnet_lite0": Score(90.0, None, None, count, "lower", 40504),
        "clip_score_judge": clip,
    }
    results = {
        "model": "models/x",
        "generated": str(made.path),
        "protocol": PROTOCOL.describe(),
        "key": PROTOCOL.key(data, count),
        "n": count,
        "n_reference": 40504,
        "scores": {name: score.plain() for name, score in scores.items()},
        "not_available": {"cmmd": "fetch <it>"},
        "networks": {"judge": "1234"},
        "made_with": {
            "sampling": {
                "prior": {"sampler": "ddim", "steps": 4, "guidance_scale": 1.0},
                "decoder": {"sampler": "ddpm", "steps": steps, "guidance_scale": guidance},
            },
            "seed": 0,
        },
        "seconds": {"total": 3.0},
        "versions": {"torch": "2"},
        "device": "cpu",
    }
    return Outcome(results, made, Scored(scores, {"cmmd": "fetch <it>"}))


class Reader(HTMLParser):
    """Counts tags, and what is open at the end."""

    void = ("meta", "img", "br")

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.sources, self.words = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def read(path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    assert not reader.open
    return reader


def test_the_page_needs_no_other_file_and_escapes_what_others_wrote(tmp_path, capsys):
    publish(outcome(tmp_path), tmp_path)
    page = read(tmp_path / "report.html")
    assert page.sources and all(s.startswith("data:image/png;base64,") for s in page.sources)
    assert "b" not in page.tags[page.tags.index("figure") :]  # no prompt's mark-up came through
    text = " ".join(page.words)
    for words in ("fid", "20.0", "fetch <it>", "coco14-30k", "highest clip_score_judge"):
        assert words in text
    printed = capsys.readouterr().out
    assert "not available: cmmd: fetch <it>" in printed and "report.html" in printed


def test_the_headline_is_in_the_protocols_own_network(tmp_path):
    results = outcome(tmp_path, fid=7.0).results
    assert headline(results) == 7.0
    del results["scores"]["fid"]
    assert headline(results) is None  # another network's distance is no FID


def test_best_worst_and_first(tmp_path):
    found = extremes(outcome(tmp_path), count=4)
    assert [row.id for row, _ in found["the first"]] == ["000", "001", "002", "003"]
    assert [row.id for row, _ in found["highest clip_score_judge"]] == ["029", "028", "027", "026"]
    assert [row.id for row, _ in found["lowest clip_score_judge"]] == ["000", "001", "002", "003"]


@pytest.fixture
def sweep(tmp_path):
    for job, (guidance, data) in enumerate([(2.0, "d"), (1.0, "d"), (1.5, "d"), (1.0, "other")]):
        folder = tmp_path / str(job)
        publish(outcome(folder, guidance=guidance, fid=20 + job, data=data), folder, sweep=True)
    return tmp_path


def test_a_sweep_has_a_curve_and_a_table_for_each_key(sweep):
    (sweep / "9").mkdir()
    (sweep / "9" / "results.json").write_text('{"key": ')  # a job that is being written
    points = read_points(sweep)
    groups = comparable(points)
    assert sorted(len(group) for group in groups.values()) == [1, 3]
    group = max(groups.values(), key=len)
    assert [point.guidance for point in group] == [1.0, 1.5, 2.0]
    assert axes(group) == ("fid", "clip_score_judge")
    written = {path.name for path in write_curve(sweep)}
    keys = {PROTOCOL.key("d", 30), PROTOCOL.key("other", 30)}
    assert written == {f"curve-{key}.csv" for key in keys} | {f"curve-{group[0].key}.png"}
    with Image.open(sweep / f"curve-{group[0].key}.png") as picture:
        assert picture.width > 3 * 300
    lines = (sweep / f"curve-{group[0].key}.csv").read_text().splitlines()
    assert len(lines) == 4 and lines[1].startswith("1,1.0,21")


def test_settings_beside_guidance_are_columns_and_lines_of_their_own(tmp_path):
    jobs = [(1.0, 8), (2.0, 8), (1.0, 25), (2.0, 25)]
    for job, (guidance, steps) in enumerate(jobs):
        folder = tmp_path / str(job)
        found = outcome(folder, guidance=guidance, steps=steps, fid=20 + job)
        found.results["networks"]["judge"] = "5678" if job == 3 else "1234"
        publish(found, folder, sweep=True)
    points = read_points(tmp_path)
    assert differing(points) == ["steps.decoder", "networks.judge"]
    lines = {words: [point.job for point in line] for words, line in lines_of(points).items()}
    assert lines == {
        "steps.decoder 8, networks.judge 1234": ["0", "1"],
        "steps.decoder 25, networks.judge 1234": ["2"],
        "steps.decoder 25, networks.judge 5678": ["3"],
    }
    head, *rows = (tmp_path / f"curve-{points[0].key}.csv").read_text().splitlines()
    assert head.startswith("job,guidance,steps.decoder,networks.judge,fid,fid ±")
    assert [row.split(",")[:3] for row in rows] == [
        ["0", "1.0", "8"], ["2", "1.0", "25"], ["1", "2.0", "8"], ["3", "2.0", "25"],
    ]  # fmt: skip
    assert (tmp_path / f"curve-{points[0].key}.png").is_file()


def test_the_page_says_how_each_stage_was_sampled(tmp_path):
    publish(outcome(tmp_path, guidance=3.0), tmp_path)
    words = read(tmp_path / "report.html").words
    told = words[words.index("decoder sampled with") + 1]
    assert told == "sampler ddpm, steps 8, guidance_scale 3.0"


def test_names_of_files_and_limits_are_escaped(tmp_path):
    name = 'x"><b>y'
    Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
    found = outcome(tmp_path)
    found.results["limits"] = {
        "<b>": {"scores": {}, "paths": [], "about": {}, "not_available": "<b>"}
    }
    html = page(found, curves=[tmp_path / f"{name}.png"])
    assert name not in html and "<b><b>" not in html
    (tmp_path / "report.html").write_text(html)
    read(tmp_path / "report.html")


def test_a_sweeps_page_has_no_table_of_two_keys(sweep):
    page = (sweep / "report.html").read_text()
    tables = re.findall("<table>.*?</table>", page)
    assert [table.count("<tr>") for table in sorted(tables, key=len)] == [2, 4]
    read(sweep / "report.html")


class Recorder:
    """A logger that can do what wandb's can."""

    def __init__(self):
        self.metrics, self.tables, self.images, self.done = {}, {}, {}, None

    def log_hyperparams(self, params):
        json.dumps(params)

    def log_metrics(self, metrics):
        self.metrics |= metrics

    def log_table(self, key, columns, data):
        assert all(len(row) == len(columns) for row in data)
        self.tables[key] = data

    def log_image(self, key, images, caption):
        assert len(images) == len(caption)
        self.images[key] = images

    def save(self):
        pass

    def finalize(self, status):
        self.done = status


def test_a_logger_gets_numbers_tables_and_pictures_by_their_key(tmp_path):
    found, logger = outcome(tmp_path), Recorder()
    track(logger, found)
    key = found.results["key"]
    assert logger.metrics[f"{key}/fid"] == 20.0 and logger.done == "success"
    assert len(logger.tables[f"{key}/scores"]) == 3
    assert logger.images.keys() == {f"{key}/{title}" for title in extremes(found)}
