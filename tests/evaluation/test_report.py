"""The files, tables and pages that an evaluation leaves."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from unclip.evaluation.generation import ImageFolder
from unclip.evaluation.measurement import Result, Results, Score, Table, mean_score
from unclip.evaluation.protocol import Prompt, Protocol
from unclip.evaluation.report import (
    Report,
    _merge,
    log_report,
    main_score,
    publish,
    render_report,
    summarize,
    write_results,
)
from unclip.evaluation.sweep_plot import (
    axes,
    comparable,
    differing,
    lines_of,
    read_points,
    write_curves,
)
from unclip.evaluation.tables import format_table, not_available

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


def made_with(guidance, steps):
    return {
        "sampling": {
            "prior": {"sampler": "ddim", "steps": 4, "guidance_scale": 1.0},
            "decoder": {"sampler": "ddpm", "steps": steps, "guidance_scale": guidance},
        },
        "seed": 0,
    }


def report_of(folder, *, guidance=None, fid=20.0, data="d", count=30, steps=8) -> Report:
    prompts = [Prompt(f"{k:03d}", f'image {k} <b>"bold"</b>', k) for k in range(count)]
    made = ImageFolder.create(folder / "samples", prompts, {"x": 1}, seed=0)
    for k in range(count):
        made.write(k, torch.full((3, 8, 8), k, dtype=torch.uint8))
    clip = mean_score(torch.linspace(10, 30, count), seed=0, real=torch.tensor([31.5]))
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
        "not_available": {"cmmd": "download <it>"},
        "networks": {"judge": "1234"},
        "made_with": made_with(guidance, steps),
        "paths": [],
        "seconds": {"total": 61.0},
        "versions": {"torch": "2"},
        "device": "cpu",
    }
    found = Results({"metrics": Result(scores)}, {"cmmd": "download <it>"})
    return Report(results, found, made)


class Reader(HTMLParser):
    """Collects tags, words and addresses, and checks that tags match."""

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


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    assert not reader.open
    return reader


def test_results_are_strict_json_and_written_atomically(tmp_path):
    path = tmp_path / "new" / "results.json"
    write_results({"a": [1.5, float("nan"), float("inf")], "b": {256: Path("x")}}, path)
    assert json.loads(path.read_text()) == {"a": [1.5, None, None], "b": {"256": "x"}}
    with pytest.raises(TypeError):
        write_results({"new": object()}, path)
    assert json.loads(path.read_text())["a"] and len(list(path.parent.iterdir())) == 1


def test_a_score_keeps_its_names_in_results_json():
    plain = Score(1.0, 0.1, (0.8, 1.2), 5, "lower", baseline=0.5, rows=torch.ones(5)).plain()
    assert plain["real"] == 0.5 and plain["interval"] == [0.8, 1.2]
    names = ["value", "error", "interval", "n", "better", "n_reference", "real", "n_real", "about"]
    assert sorted(plain) == sorted(names)


def test_values_of_measurements_are_merged_key_by_key():
    results = {"scores": {}}
    _merge(results, {"decoder": {"fd": {"n": 5}}})
    _merge(results, {"decoder": {"prior_gap": {"n": 3}}, "judge": {"x": 1}})
    expected = {"fd": {"n": 5}, "prior_gap": {"n": 3}}
    assert results == {"scores": {}, "decoder": expected, "judge": {"x": 1}}


def test_columns_of_a_text_table_are_aligned():
    table = Table(["word", "x", "n"], [["short", 1.0, None], ["a longer word", 22.5, 1234]])
    assert format_table(table).splitlines() == [
        "word               x      n",
        "─────────────  ─────  ─────",
        "short          1.000      –",
        "a longer word   22.5  1,234",
    ]


def test_a_reason_is_given_once():
    missing = dict.fromkeys(("fid", "kid"), "download the weights") | {"cmmd": "download a CLIP"}
    assert not_available(missing) == [
        "not available: fid, kid: download the weights",
        "not available: cmmd: download a CLIP",
    ]


def with_table(report: Report) -> Report:
    """Add a measurement with a table and a note."""
    table = Table(["stage", "M parameters"], [["decoder", 5.5]])
    report.found.results["stages"] = Result(
        tables={"Stages": table}, note="Small <stages>.", title="The bundle"
    )
    return report


def test_the_summary_has_all_tables_and_what_is_missing(tmp_path):
    report = with_table(report_of(tmp_path))
    report.results["paths"] = ["models/x/images/single_objects.png"]
    text = summarize(report)
    for words in (
        PROTOCOL.key("d", 30),
        "Stages\nstage    M parameters",
        "not available: cmmd: download <it>",
        "models/x/images/single_objects.png",
        "0:01:01",
    ):
        assert words in text


def test_the_page_needs_no_other_file_and_escapes_all_text(tmp_path, capsys):
    publish(with_table(report_of(tmp_path)), tmp_path)
    page = read((tmp_path / "report.html").read_text())
    assert page.sources and all(s.startswith("data:image/png;base64,") for s in page.sources)
    assert "it" not in page.tags and "stages" not in page.tags  # no markup of a text
    text = " ".join(page.words)
    for words in ("fid", "20.0", "download <it>", "coco14-30k", "highest clip_score_judge"):
        assert words in text
    assert "The bundle" in page.words and "Small <stages>." in page.words
    printed = capsys.readouterr().out
    assert "not available: cmmd: download <it>" in printed and "report.html" in printed


def test_the_page_embeds_images_but_not_those_in_folders(tmp_path):
    name = 'x"><b>y'
    report = with_table(report_of(tmp_path))
    report.folder = None
    image = Image.new("RGB", (4, 4))
    report.found.results["stages"].images = {name: image, "full_size/0": image}
    html = render_report(report)
    assert name not in html and len(read(html).sources) == 1


def test_the_page_says_how_each_stage_was_sampled(tmp_path):
    words = read(render_report(report_of(tmp_path, guidance=3.0))).words
    value = words[words.index("decoder sampled with") + 1]
    assert value == "sampler ddpm, steps 8, guidance_scale 3.0"


def test_an_evaluation_without_the_protocols_images_has_no_scores(tmp_path):
    results = {
        "model": "models/x",
        "protocol": PROTOCOL.describe(),
        "key": None,
        "scores": {},
        "not_available": {},
        "made_with": {},
        "paths": [],
        "seconds": {"total": 1.0},
        "versions": {},
        "device": "cpu",
    }
    report = Report(results, Results())
    assert publish(report, tmp_path) is None
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "report.html"}
    assert "Scores" not in read((tmp_path / "report.html").read_text()).words


def test_the_main_number_is_in_the_protocols_own_network(tmp_path):
    results = report_of(tmp_path, fid=7.0).results
    assert main_score(results) == 7.0
    del results["scores"]["fid"]
    assert main_score(results) is None  # another network's distance is not a FID


def test_best_worst_and_first_images(tmp_path):
    found = report_of(tmp_path).best_and_worst(count=4)
    assert [row.id for row, _ in found["the first"]] == ["000", "001", "002", "003"]
    assert [row.id for row, _ in found["highest clip_score_judge"]] == ["029", "028", "027", "026"]
    assert [row.id for row, _ in found["lowest clip_score_judge"]] == ["000", "001", "002", "003"]


@pytest.fixture
def sweep(tmp_path):
    for job, (guidance, data) in enumerate([(2.0, "d"), (1.0, "d"), (1.5, "d"), (1.0, "other")]):
        folder = tmp_path / str(job)
        publish(report_of(folder, guidance=guidance, fid=20 + job, data=data), folder, sweep=True)
    return tmp_path


def test_a_sweep_has_a_curve_and_a_table_for_each_key(sweep):
    (sweep / "9").mkdir()
    (sweep / "9" / "results.json").write_text('{"key": ')  # a job that is being written
    points = read_points(sweep)
    groups = comparable(points)
    assert sorted(len(group) for group in groups.values()) == [1, 3]
    group = max(groups.values(), key=len)
    assert [point.guidance for point in group] == [1.0, 1.5, 2.0]
    assert axes(group) == ["fid", "clip_score_judge"]
    keys = {PROTOCOL.key("d", 30), PROTOCOL.key("other", 30)}
    assert {section.title for section in write_curves(sweep)} == keys
    written = {path.name for path in sweep.glob("curve-*")}
    assert written == {f"curve-{key}.csv" for key in keys} | {f"curve-{group[0].key}.png"}
    with Image.open(sweep / f"curve-{group[0].key}.png") as image:
        assert image.width > 3 * 300
    lines = (sweep / f"curve-{group[0].key}.csv").read_text().splitlines()
    assert len(lines) == 4 and lines[1].startswith("1,1.0,21")


def test_other_settings_of_a_sweep_are_columns_and_lines_of_their_own(tmp_path):
    jobs = [(1.0, 8), (2.0, 8), (1.0, 25), (2.0, 25)]
    for job, (guidance, steps) in enumerate(jobs):
        folder = tmp_path / str(job)
        report = report_of(folder, guidance=guidance, steps=steps, fid=20 + job)
        report.results["networks"]["judge"] = "5678" if job == 3 else "1234"
        publish(report, folder, sweep=True)
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


def test_a_sweep_over_priors_tells_them_apart(tmp_path):
    for job, prior in enumerate(("ddim", "autoregressive")):
        report = report_of(tmp_path / str(job), guidance=1.0)
        report.results["made_with"]["sampling"]["prior"]["sampler"] = prior
        publish(report, tmp_path / str(job), sweep=True)
    assert differing(read_points(tmp_path)) == ["prior"]


def test_no_table_of_a_sweep_has_rows_of_two_keys(sweep):
    page = (sweep / "report.html").read_text()
    tables = re.findall("<table>.*?</table>", page, re.DOTALL)
    assert [table.count("<tr>") for table in sorted(tables, key=len)] == [2, 4]
    read(page)


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

    def log_image(self, key, images):
        self.images[key] = images

    def save(self):
        pass

    def finalize(self, status):
        self.done = status


def test_a_logger_gets_numbers_tables_and_images_by_their_key(tmp_path):
    report, logger = with_table(report_of(tmp_path)), Recorder()
    log_report(logger, report)
    assert logger.metrics[f"{report.key}/fid"] == 20.0 and logger.done == "success"
    assert len(logger.tables[f"{report.key}/{report.key}"]) == 3
    assert logger.tables[f"{report.key}/Stages"] == [["decoder", 5.5]]
    assert logger.images.keys() == {f"{report.key}/{t}" for t in report.best_and_worst()}
