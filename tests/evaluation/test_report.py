import json
import os
from pathlib import Path

import pytest

from unclip.evaluation.report import by_reason, summary, table, write_results

STARTS = ("real", "true_embedding", "prior", "text_embedding", "caption_alone")


@pytest.fixture
def results() -> dict:
    share = {"share": 0.5, "error": 0.1, "among": 16, "n": 25}
    entry = {"distance": 100.0, "error": 3.0}
    return {
        "stages": {
            "clip": {"parameters": 2_000_000, "steps": 9, "images": None, "seconds": None},
            "decoder": {"parameters": 5_500_000, "steps": 4000, "images": 64_000, "seconds": 725.4},
            "upsampler_256": {"parameters": 1, "steps": 1, "images": 1, "seconds": 1.0},
        },
        "clip": {"clip": {"recall_at_1": 0.75, "recall_at_5": 1.0, "among": 64, "n": 64}},
        "decoder": {
            "fd_effnet_lite0": {"real": entry, "prior": entry, "untrained": entry, "n": 500},
            "prior_gap": {start: {**entry, "kid": 1.5} for start in STARTS} | {"n": 66},
        },
        "judge": {"test_seen": {"generated": {"caption": share}, "real": {"caption": share}}},
        "left_out": {"upsampler_1024": "no such file"},
        "paths": ["models/x/pictures/single_objects.png"],
        "seconds": {"total": 61.0},
    }


def test_results_are_strict_json_and_written_whole(tmp_path):
    path = tmp_path / "new" / "results.json"
    write_results({"a": [1.5, float("nan"), float("inf")], "b": {256: Path("x")}}, path)
    assert json.loads(path.read_text()) == {"a": [1.5, None, None], "b": {"256": "x"}}
    assert [entry.name for entry in path.parent.iterdir()] == ["results.json"]


def test_a_failed_write_leaves_the_old_results(tmp_path, monkeypatch):
    path = write_results({"old": 1}, tmp_path / "results.json")
    with pytest.raises(TypeError):
        write_results({"new": object()}, path)

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="no space"):
        write_results({"new": 2}, path)
    assert json.loads(path.read_text()) == {"old": 1}
    assert os.listdir(tmp_path) == ["results.json"]


def test_columns_line_up():
    lines = table([["short", 1.0, None], ["a longer word", 22.5, 1234]], head=["word", "x", "n"])
    assert lines.splitlines() == [
        "word               x      n",
        "─────────────  ─────  ─────",
        "short          1.000      –",
        "a longer word   22.5  1,234",
    ]


def test_the_summary_says_what_was_measured_and_what_not(results):
    text = summary(results)
    for words in (
        "12 min 05 s",
        "recall@1 0.750",
        "fd_effnet_lite0 100.0 (real 100.0, untrained 100.0) at n=500",
        "caption alone",
        "left out: upsampler_1024: no such file",
        "models/x/pictures/single_objects.png",
        "1 min 01 s",
    ):
        assert words in text


def test_a_share_is_printed_next_to_its_ceiling_and_marked_where_that_is_low(results):
    weak = {"share": 0.25, "error": 0.1, "among": 18, "n": 20}
    ceiling = {"caption": {**weak, "share": 1.0}, "pair_concept": {**weak, "share": 0.89}}
    generated = {"caption": {**weak, "share": 0.5}, "pair_concept": weak}
    results["judge"] = {"test_seen": {"generated": generated, "real": ceiling}}
    lines = [line.split() for line in summary(results).splitlines()]
    (caption,) = [line for line in lines if line[:2] == ["own", "caption"]]
    assert caption[-5:] == ["0.500", "0.100", "1.000", "0.500", "20"]
    (concept,) = [line for line in lines if line[:3] == ["a", "concept", "of"]]
    assert concept[-10:-5] == ["0.250", "0.100", "0.890", "0.281", "20"]
    assert " ".join(concept[-5:]) == "not measurable with this judge"


def test_a_summary_of_an_empty_bundle_has_no_numbers_to_show():
    assert "evaluated in 1 s" in summary({"stages": {}, "seconds": {"total": 1.0}})


def test_what_lacks_one_file_is_said_once():
    missing = dict.fromkeys(("fid", "kid"), "fetch the weights") | {"cmmd": "fetch a CLIP"}
    assert by_reason(missing) == {"fetch the weights": "fid, kid", "fetch a CLIP": "cmmd"}
