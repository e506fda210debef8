"""Spelling and the power spectrum measured on a tiny bundle."""

import pytest
from tiny_context import configured, context_of, write_data, write_model

from unclip.evaluation import limits as spelling
from unclip.evaluation.measurement import run

pytestmark = pytest.mark.filterwarnings("ignore:a prompt is too long")

SMALL = {
    "spelling": {"words": ["HELLO", "STOP"], "each": 1},
    "detail": {"images": {"64": 4, "256": 2, "1024": 1}, "resamples": 4},
}


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    folder = tmp_path_factory.mktemp("limits")
    data, model = write_data(folder / "data"), write_model(folder / "model")
    return context_of(model, data, folder / "out")


def measured(context, monkeypatch, read):
    monkeypatch.setattr(spelling, "load_reader", lambda: read)
    return run(configured("limits", SMALL), context).results


def read_signs(image):
    """Read HELLO from any black words on white, and nothing from a generated image."""
    return "HELLO" if image.min() == 0 and image.max() == 255 else ""


def test_each_limit_is_next_to_real_images(context, monkeypatch):
    found = measured(context, monkeypatch, read_signs)
    words = found["spelling"].values["limits"]["spelling"]["scores"]
    assert words["right"]["real"] == 0.5 and words["right"]["n"] == words["right"]["n_real"] == 2
    detail = found["detail"].values["limits"]["detail"]
    bands = {f"{size}_{band}" for size in (64, 256, 1024) for band in ("low", "middle", "high")}
    assert detail["scores"].keys() == bands and detail["about"]["unit"] == "dB"
    assert {"spelling", "power_spectrum"} == {k for one in found.values() for k in one.images}
    for result in found.values():
        (table,) = result.tables.values()
        assert table.rows and {len(row) for row in table.rows} == {len(table.head)}


def test_a_second_run_finds_the_images(context, monkeypatch):
    first = measured(context, monkeypatch, read_signs)
    before = {path: path.stat().st_mtime_ns for path in context.out.rglob("*.png")}
    again = measured(context, monkeypatch, read_signs)
    assert len(before) > 7
    assert again["detail"].values == first["detail"].values
    assert before == {path: path.stat().st_mtime_ns for path in context.out.rglob("*.png")}


def test_a_missing_reader_is_named_and_the_rest_is_measured(context, monkeypatch):
    def missing():
        raise FileNotFoundError("pip install it")

    monkeypatch.setattr(spelling, "load_reader", missing)
    found = run(configured("limits", SMALL), context)
    assert found.not_available == {"spelling": "pip install it"}
    assert found.results.keys() == {"detail"}
