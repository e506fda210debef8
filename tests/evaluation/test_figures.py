import inspect
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_bundle
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from unclip.cascade import Cascade
from unclip.evaluation.figures.attack import labelled
from unclip.evaluation.figures.base import Studio
from unclip.evaluation.figures.differences import differences
from unclip.evaluation.figures.gallery import PAGE, command_of, write_figure
from unclip.evaluation.real import Real

CONF = Path(__file__).parents[2] / "conf"
SMALL = {
    "variations": ["pictures=2", "count=2"],
    "interpolation": ["pairs=1", "frames=3"],
    "text_diffs": ["pictures=2", "frames=2"],
    "components": ["pictures=2", "dimensions=[1,4,99]"],
    "movement": ["pairs=4", "frames=3"],
    "inversion": ["pictures=2", "steps=[2,3]", "guidance=[1.0]"],
    "typographic": ["pictures=2", "count=1"],
    "prior_importance": ["prompts=[a red apple,a blue star]"],
    "priors": ["captions=3", "shown=2"],
    "guidance": ["scales=[1.0,2.0]", "captions=2", "each=3"],
    "limits": ["prompts={writing:[a sign]}", "count=2"],
}


def scene(row):
    names, colors = ("apple", "star", "fish"), ("red", "blue", "green", "pink")
    item = {"name": names[row % 3], "colour": colors[row % 4], "concept": "1"}
    return {"objects": [item], "background": ("white", "grey")[row % 2]}


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    folder = tiny_bundle.write(tmp_path_factory.mktemp("models") / "tiny")
    tiny_bundle.write_judge(folder)
    made = Studio(
        cascade=Cascade.load(folder, device="cpu"),
        data=Path("none"),
        split="test",
        size=64,
        seed=0,
        batch_size=4,
    )
    scenes = [scene(row) for row in range(12)]
    captions = [f"a {s['objects'][0]['colour']} {s['objects'][0]['name']}" for s in scenes]
    torch.manual_seed(0)
    made._read[64] = Real(torch.randint(256, (12, 3, 64, 64)).byte(), captions, scenes)
    return made


def with_seed(studio, seed):
    made = replace(studio, seed=seed)
    made._read.update(studio._read)
    return made


def figure(name, overrides=()):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        settings = [f"figure.{override}" for override in overrides]
        cfg = compose("reproduce", [f"figure={name}", *settings])
    return instantiate(cfg.figure, _convert_="all")


def test_every_figure_of_the_configuration_is_tried_here():
    assert {path.stem for path in (CONF / "figure").glob("*.yaml")} == set(SMALL)


@pytest.mark.parametrize("name", SMALL)
def test_a_figure_draws_and_tells(studio, name, tmp_path):
    made = figure(name, SMALL[name])
    drawn = made(studio)
    assert drawn.sheets or drawn.tables
    for table in drawn.tables.values():
        assert table.rows and all(len(row) == len(table.head) for row in table.rows)
    command = command_of(name, ["size=64"])
    written = write_figure(tmp_path, name, made, drawn, command=command, made_with={"seed": 0})
    assert all(path.stat().st_size > 100 for path in written)
    page = (tmp_path / PAGE).read_text()
    assert f"python src/reproduce.py figure={name} size=64" in page
    assert json.loads((tmp_path / f"{name}.json").read_text())["title"] == made.title


def test_the_page_lists_every_figure_once(studio, tmp_path):
    for name in ("limits", "variations", "limits"):
        made = figure(name, SMALL[name])
        write_figure(tmp_path, name, made, made(studio), command=f"draw {name}", made_with={})
    page = (tmp_path / PAGE).read_text()
    assert page.count("draw limits") == page.count("draw variations") == 1


def test_a_bundle_without_a_prior_is_told_how_to_train_it(studio):
    remark = figure("priors", SMALL["priors"])(studio).remark
    assert "ar: `python src/train.py stage=prior_ar" in remark


def test_a_difference_changes_one_thing():
    scenes = [scene(row) for row in range(12)]
    tasks = differences(scenes, 12, seed=1)
    assert [task.row for task in tasks] == list(range(12))
    assert [task.changed for task in tasks[:4]] == ["colour", "object", "background", "colour"]
    for task in tasks:
        item = scenes[task.row]["objects"][0]
        assert f"{item['colour']} {item['name']}" in task.source
        different = set(task.source.split()) ^ set(task.target.split())
        assert 2 <= len(different - {"a", "an"}) <= 2
    assert tasks == differences(scenes, 12, seed=1) != differences(scenes, 12, seed=2)


def test_too_few_pictures_for_differences():
    with pytest.raises(ValueError, match="13 pictures of one coloured object are needed, not 12"):
        differences([scene(row) for row in range(12)], 13, seed=0)


def test_a_word_is_written_on_a_slip():
    plain = torch.zeros(3, 256, 256, dtype=torch.uint8)
    changed = (labelled(plain, "star") != plain).any(dim=0)
    rows, columns = changed.nonzero().unbind(dim=1)
    assert 0 < changed.float().mean() < 0.3
    assert 128 < rows.float().mean() < 220 and 100 < columns.float().mean() < 156


def test_no_judge(studio, tmp_path):
    folder = tiny_bundle.write(tmp_path / "alone", names=("clip",))
    alone = Studio(
        cascade=Cascade.load(folder, device="cpu"),
        data=Path("none"), split="test", size=64, seed=0, batch_size=1,
    )  # fmt: skip
    with pytest.raises(FileNotFoundError, match=r"judge\.safetensors is missing: train it with"):
        _ = alone.judge


def test_the_bundles_own_clip_is_no_judge(tmp_path):
    folder = tiny_bundle.write(tmp_path / "own", names=("clip",))
    shutil.copy(folder / "clip.safetensors", folder / "judge.safetensors")
    own = Studio(
        cascade=Cascade.load(folder, device="cpu"),
        data=Path("none"), split="test", size=64, seed=0, batch_size=1,
    )  # fmt: skip
    with pytest.raises(ValueError, match="the model's own CLIP"):
        _ = own.judge


@pytest.fixture
def longer(monkeypatch):
    """Embeddings of pictures with a length of their own, as Karlo's CLIP gives them."""
    embed = Cascade.embed
    monkeypatch.setattr(Cascade, "embed", lambda *args, **how: 3 * embed(*args, **how))


def test_the_cosine_of_an_inversion_is_one(studio, longer):
    (table,) = figure("inversion", SMALL["inversion"])(studio).tables.values()
    assert all(1 / 9 < row[-1] <= 1 + 1e-5 for row in table.rows)


def test_zero_shot_answers_are_by_cosines(studio, request):
    made = figure("typographic", SMALL["typographic"])
    (before,) = made(studio).tables.values()
    request.getfixturevalue("longer")
    (after,) = made(studio).tables.values()
    for row, expected in zip(after.rows, before.rows, strict=True):
        assert row[2:] == pytest.approx(expected[2:], abs=1e-5)


@pytest.mark.parametrize("name", ["text_diffs", "movement"])
def test_differences_are_drawn_by_the_studios_seed(studio, name, monkeypatch):
    seeds, module = [], inspect.getmodule(type(figure(name)))

    def drawn(scenes, count, *, seed):
        seeds.append(seed)
        return differences(scenes, count, seed=seed)

    monkeypatch.setattr(module, "differences", drawn)
    figure(name, SMALL[name])(with_seed(studio, 7))
    assert seeds == [7]
