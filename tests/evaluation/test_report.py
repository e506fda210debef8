"""The files, tables and pages that an evaluation leaves."""

import json
import re
from pathlib import Path
from unittest.mock import Mock

import pytest
import tiny_evaluation
import torch
from PIL import Image

from unclip.evaluation.generation import ImageFolder
from unclip.evaluation.measurement import Result, Results, Score, Table, mean_score
from unclip.evaluation.protocol import Prompt
from unclip.evaluation.report import (
    Report,
    _merge,
    log_report,
    main_score,
    publish,
    write_results,
)
from unclip.evaluation.sweep_plot import axes, differing, lines_of, read_points
from unclip.evaluation.tables import format_table, not_available

PROTOCOL = tiny_evaluation.protocol(name="coco14-30k", format="coco", network="inception")


EMPTY = {"model": "models/x", "device": "cpu", "key": None, "paths": []}
EMPTY |= {"scores": {}, "not_available": {}, "made_with": {}, "protocol": PROTOCOL.describe()}
EMPTY |= {"seconds": {"total": 61.0}, "versions": {"torch": "2"}}


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
    sampling = {
        "prior": {"sampler": "ddim", "steps": 4, "guidance_scale": 1.0},
        "decoder": {"sampler": "ddpm", "steps": steps, "guidance_scale": guidance},
    }
    results = {
        **EMPTY,
        "generated": str(made.path),
        "key": PROTOCOL.key(data, count),
        "n": count,
        "n_reference": 40504,
        "scores": {name: score.plain() for name, score in scores.items()},
        "not_available": {"cmmd": "download <it>"},
        "networks": {"judge": "1234"},
        "made_with": {"sampling": sampling, "seed": 0},
    }
    found = Results({"metrics": Result(scores)}, {"cmmd": "download <it>"})
    table = Table(["stage", "M parameters"], [["decoder", 5.5]])
    note, title = "Small <stages>.", "The bundle"
    found.results["stages"] = Result(tables={"Stages": table}, note=note, title=title)
    return Report(results, found, made)


def test_results_are_strict_json_and_written_atomically(tmp_path):
    path = tmp_path / "new" / "results.json"
    write_results({"a": [1.5, float("nan"), float("inf")], "b": {256: Path("x")}}, path)
    assert json.loads(path.read_text()) == {"a": [1.5, None, None], "b": {"256": "x"}}
    with pytest.raises(TypeError):
        write_results({"new": object()}, path)
    assert json.loads(path.read_text())["a"] and len(list(path.parent.iterdir())) == 1


def test_a_score_keeps_its_names_in_results_json():
    plain = Score(1.0, 0.1, (0.8, 1.2), 5, "lower", baseline=0.5, rows=torch.ones(5)).plain()
    assert plain["real"] == 0.5 and plain["interval"] == (0.8, 1.2)
    names = ["value", "error", "interval", "n", "better", "n_reference", "real", "n_real", "about"]
    assert sorted(plain) == sorted(names)


def test_values_of_measurements_are_merged_key_by_key():
    results = {}
    _merge(results, {"decoder": {"fd": {"n": 5}}})
    _merge(results, {"decoder": {"prior_gap": {"n": 3}}, "judge": {"x": 1}})
    assert results == {"decoder": {"fd": {"n": 5}, "prior_gap": {"n": 3}}, "judge": {"x": 1}}


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


def test_the_page_needs_no_other_file_and_escapes_all_text(tmp_path, capsys):
    report, name = report_of(tmp_path, guidance=3.0), 'x"><b>y'
    image = Image.new("RGB", (4, 4))
    report.found.results["stages"].images = {name: image, "full_size/0": image}  # one is not shown
    report.results["paths"] = ["models/x/images/single_objects.png"]
    assert publish(report, tmp_path) == 20.0  # the FID
    page = (tmp_path / "report.html").read_text()
    sources = re.findall('(?:src|href)="([^"]*)"', page)
    assert len(sources) == 4 and all(s.startswith("data:image/png;base64,") for s in sources)
    for words in (
        *("fid", "20.0", "download &lt;it&gt;", "coco14-30k", "highest clip_score_judge"),
        *("<h2>The bundle</h2>", "<p>Small &lt;stages&gt;.</p>"),
        "<td>decoder sampled with</td><td>sampler ddpm, steps 8, guidance_scale 3.0</td>",
    ):
        assert words in page
    assert not any(words in page for words in ("<it>", "<stages>", name))
    printed = capsys.readouterr().out
    for words in (
        *(PROTOCOL.key("d", 30), "Stages\nstage    M parameters", "0:01:01", "report.html"),
        *("not available: cmmd: download <it>", "models/x/images/single_objects.png"),
    ):
        assert words in printed


def test_an_evaluation_without_the_protocols_images_has_no_scores(tmp_path):
    assert publish(Report(EMPTY, Results()), tmp_path) is None
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "report.html"}
    assert "Scores" not in (tmp_path / "report.html").read_text()
    other = report_of(tmp_path).results
    del other["scores"]["fid"]
    assert main_score(other) is None  # another network's distance is not a FID


def test_best_worst_and_first_images(tmp_path):
    found = report_of(tmp_path).best_and_worst(count=4)
    assert {title: [row.id for row, _ in chosen] for title, chosen in found.items()} == {
        "the first": ["000", "001", "002", "003"],
        "highest clip_score_judge": ["029", "028", "027", "026"],
        "lowest clip_score_judge": ["000", "001", "002", "003"],
    }


def test_a_sweep_has_a_curve_and_a_table_for_each_key(tmp_path):
    (tmp_path / "9").mkdir()
    (tmp_path / "9" / "results.json").write_text('{"key": ')  # a job that is being written
    for job, (guidance, data) in enumerate([(2.0, "d"), (1.0, "d"), (1.5, "d"), (1.0, "other")]):
        folder = tmp_path / str(job)
        publish(report_of(folder, guidance=guidance, fid=20 + job, data=data), folder, sweep=True)
    one, other = PROTOCOL.key("d", 30), PROTOCOL.key("other", 30)
    points = read_points(tmp_path)
    assert [point.key for point in points].count(other) == 1
    points = [point for point in points if point.key == one]
    assert [point.guidance for point in points] == [1.0, 1.5, 2.0]
    assert axes(points) == ["fid", "clip_score_judge"]
    written = {path.name for path in tmp_path.glob("curve-*")}
    assert written == {f"curve-{one}.csv", f"curve-{other}.csv", f"curve-{one}.png"}
    with Image.open(tmp_path / f"curve-{one}.png") as image:
        assert image.width > 3 * 300
    lines = (tmp_path / f"curve-{one}.csv").read_text().splitlines()
    assert len(lines) == 4 and lines[1].startswith("1,1.0,21")
    page = (tmp_path / "report.html").read_text()
    tables = re.findall("<table>.*?</table>", page, re.DOTALL)
    assert [table.count("<tr>") for table in sorted(tables, key=len)] == [2, 4]


def test_other_settings_of_a_sweep_are_columns_and_lines_of_their_own(tmp_path):
    jobs = [(1.0, 8), (2.0, 8), (1.0, 25), (2.0, 25)]
    for job, (guidance, steps) in enumerate(jobs):
        folder = tmp_path / str(job)
        report = report_of(folder, guidance=guidance, steps=steps, fid=20 + job)
        if job == 3:
            report.results["networks"]["judge"] = "5678"
            report.results["made_with"]["sampling"]["prior"]["sampler"] = "autoregressive"
        publish(report, folder, sweep=True)
    points = read_points(tmp_path)
    assert differing(points) == ["prior", "steps.decoder", "networks.judge"]
    lines = {words: [point.job for point in line] for words, line in lines_of(points).items()}
    assert lines == {
        "prior ddim, steps.decoder 8, networks.judge 1234": ["0", "1"],
        "prior ddim, steps.decoder 25, networks.judge 1234": ["2"],
        "prior autoregressive, steps.decoder 25, networks.judge 5678": ["3"],
    }
    head, *rows = (tmp_path / f"curve-{points[0].key}.csv").read_text().splitlines()
    assert head.startswith("job,guidance,prior,steps.decoder,networks.judge,fid,fid ±")
    starts = [",".join(row.split(",")[:4]) for row in rows]
    assert starts == ["0,1.0,ddim,8", "2,1.0,ddim,25", "1,2.0,ddim,8", "3,2.0,autoregressive,25"]
    assert (tmp_path / f"curve-{points[0].key}.png").is_file()


def test_a_logger_gets_numbers_tables_and_images_by_their_key(tmp_path):
    report, logger = report_of(tmp_path), Mock()
    log_report(logger, report)
    json.dumps(logger.log_hyperparams.call_args.args)
    assert logger.log_metrics.call_args.args[0][f"{report.key}/fid"] == 20.0
    tables = {call.kwargs["key"]: call.kwargs["data"] for call in logger.log_table.call_args_list}
    assert len(tables[f"{report.key}/{report.key}"]) == 3
    assert tables[f"{report.key}/Stages"] == [["decoder", 5.5]]
    images = {call.kwargs["key"] for call in logger.log_image.call_args_list}
    assert images == {f"{report.key}/{title}" for title in report.best_and_worst()}
    logger.finalize.assert_called_once_with("success")
